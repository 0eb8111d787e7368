"""The consoles that everything is printed on with rich: text from outside is text, never markup.

A story may hold `[/b]`, a path `[red]`, a prompt `:smile:`: rich would take them for a style's end, a style and an
emoji. What is to look different says so with `rich.text.Text` or a column's style.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console


def console(stderr: bool = False, **options: Any) -> Console:
    """A console for plain text and for tables of it, on the stdout or stderr of this moment."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, **options)


def wide_console(width: int) -> Console:
    """The same on stdout, `width` columns wide where that is no terminal: a file has no width of its own."""
    return console(width=None if sys.stdout.isatty() else width)
