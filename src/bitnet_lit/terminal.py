"""All output of rich goes through the consoles made here, which never read text as markup.

A story may hold `[/b]`, a path `[red]` and a prompt `:smile:`. Rich would read them as the end of a style, a style and
an emoji. Styled output uses `rich.text.Text` or the style of a column.

Rich never breaks a line of text here: a terminal wraps it, and a file or a pipe gets the whole line. Tables and
progress bars fit the width of the console.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text


class PlainConsole(Console):
    """Prints text without reading it as markup, emoji codes or highlighted syntax."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `rich.console.Console` does, but never break a line of text."""
        options.setdefault("soft_wrap", all(isinstance(each, str | Text) for each in objects))
        super().print(*objects, **options)


def console(stderr: bool = False, **options: Any) -> Console:
    """Return a console on the current `sys.stdout` or `sys.stderr`."""
    return PlainConsole(stderr=stderr, **options)


def wide_console(width: int) -> Console:
    """Return a console on stdout; it is `width` columns wide where stdout is not a terminal."""
    return console(width=None if sys.stdout.isatty() else width)
