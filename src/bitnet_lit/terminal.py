"""The consoles that everything is printed on with rich: text from outside is text, never markup.

A story may hold `[/b]`, a path `[red]`, a prompt `:smile:`: rich would take them for a style's end, a style and an
emoji. What is to look different says so with `rich.text.Text` or a column's style.

A line of text stays one line, however long: the terminal wraps it, and a file or a pipe gets it whole. Tables and
progress bars fit the width of the console.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text


class PlainConsole(Console):
    """A console for plain text and for tables of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, but never break a line of text."""
        options.setdefault("soft_wrap", all(isinstance(each, str | Text) for each in objects))
        super().print(*objects, **options)


def console(stderr: bool = False, **options: Any) -> Console:
    """A console on the stdout or stderr of this moment."""
    return PlainConsole(stderr=stderr, **options)


def wide_console(width: int) -> Console:
    """A console on stdout, `width` columns wide where that is no terminal: a file has no width of its own."""
    return console(width=None if sys.stdout.isatty() else width)
