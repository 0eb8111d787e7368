"""What is printed is text, whatever it holds, and no more of it than a screen."""

from rich.table import Table
from rich.text import Text

from bitnet_lit.errors import LONGEST_LINE, one_line
from bitnet_lit.terminal import console, is_shared, lines_named, wide_console

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


def test_a_line_of_text_is_never_broken_and_a_table_fits_the_width(capsys):
    words = "Once upon a time there was a girl " * 20
    page = console(width=80)
    page.print(words)
    page.print(Text.assemble(("step 5: ", "dim"), words))
    table = Table("story")
    table.add_row(words)
    page.print(table)
    text, styled, *rows = capsys.readouterr().out.splitlines()
    assert text.strip() == words.strip() and styled.strip() == f"step 5: {words}".strip()
    assert len(rows) > 10 and max(map(len, rows)) <= 80


def test_each_line_of_a_job_beside_others_begins_with_its_name(capsys):
    table = Table("plan")
    with lines_named("seed=1"):
        assert is_shared()
        console(stderr=True).print(Text.assemble(("step 5: ", "dim"), "Once\n\nupon [/b]"))
        console(stderr=True).print("step 5/9", "loss 2.000")
        console(stderr=True).print(table)
    assert not is_shared()
    with lines_named(""):
        console(stderr=True).print("alone")
    *lines, alone = capsys.readouterr().err.splitlines()
    named = ["seed=1: step 5: Once", "seed=1: ", "seed=1: upon [/b]", "seed=1: step 5/9 loss 2.000", "seed=1:"]
    assert lines[:5] == named and "plan" in "".join(lines[5:]) and alone == "alone"
