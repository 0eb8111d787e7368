"""What is printed is text, whatever it holds, and no more of it than a screen."""

from rich.table import Table

from bitnet_lit.errors import LONGEST_LINE, one_line
from bitnet_lit.terminal import console, wide_console

ODD = "[/b] [red]x[/red] :smile: \\["


def test_text_is_never_markup(capsys):
    console().print(ODD)
    console(stderr=True).print(ODD)
    table = Table(ODD, title=ODD)
    table.add_row(ODD)
    wide_console(80).print(table)
    printed = capsys.readouterr()
    assert printed.out.count(ODD) == 4 and printed.err.count(ODD) == 1


def test_a_message_that_quotes_pages_leaves_their_middle_out():
    line = one_line(f"prompt={'a' * 10_000}: is wrong: do that")
    assert len(line) <= LONGEST_LINE and line.startswith("prompt=aaa") and line.endswith("aaa: is wrong: do that")
    assert one_line("b" * LONGEST_LINE) == "b" * LONGEST_LINE
