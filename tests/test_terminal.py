"""What is printed with rich is text, whatever it holds."""

from rich.table import Table

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
