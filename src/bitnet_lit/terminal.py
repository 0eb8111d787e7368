"""All output of rich goes through the consoles made here, which never read text as markup.

A story may hold `[/b]`, a path `[red]` and a prompt `:smile:`. Rich would read them as the end of a style, a style and
an emoji. Styled output uses `rich.text.Text` or the style of a column.

Rich never breaks a line of text here: a terminal wraps it, and a file or a pipe gets the whole line. Tables and
progress bars fit the width of the console.

Jobs of a sweep that run side by side print to one terminal or log. There each line begins with the name of its job.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_name = ""  # of the job that this process runs beside others


@contextlib.contextmanager
def lines_named(name: str) -> Iterator[None]:
    """Let each line of text that this process prints while the block runs begin with a name, and each table follow it.

    Args:
        name: of the job; empty where no other process prints to the same place.
    """
    global _name
    before, _name = _name, name
    try:
        yield
    finally:
        _name = before


def is_shared() -> bool:
    """Return whether other processes print to the same place, where a bar would spoil their lines."""
    return bool(_name)


class PlainConsole(Console):
    """Prints text without reading it as markup, emoji codes or highlighted syntax."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `rich.console.Console` does, but never break a line of text, and name it (`lines_named`)."""
        is_text = all(isinstance(each, str | Text) for each in objects)
        options.setdefault("soft_wrap", is_text)
        if _name and objects and is_text:
            whole = Text(" ").join(Text(each) if isinstance(each, str) else each for each in objects)
            lines = whole.split("\n", allow_blank=True)
            objects = (Text("\n").join(Text.assemble((f"{_name}: ", "dim"), line) for line in lines),)
        elif _name and any(isinstance(each, Table) for each in objects):
            objects = (Text(f"{_name}:", "dim"), *objects)
        super().print(*objects, **options)


def console(stderr: bool = False, **options: Any) -> Console:
    """Return a console on the current `sys.stdout` or `sys.stderr`."""
    return PlainConsole(stderr=stderr, **options)


def wide_console(width: int) -> Console:
    """Return a console on stdout; it is `width` columns wide where stdout is not a terminal."""
    return console(width=None if sys.stdout.isatty() else width)


def time_span(seconds: float) -> str:
    """Return a length of time as text with two digits that count: 45 s, 3 min, 2.5 h."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 99.5 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"
