"""`python -m bitnet_lit.native` says of each library whether it is there."""

from bitnet_lit.native import __main__ as command
from bitnet_lit.native import build


def test_it_compiles_or_says_why_not(monkeypatch, capsys):
    def library(source):
        if source.name == "engine":
            raise build.NoCompilerError("no C++ compiler")

    monkeypatch.setattr(build, "library", library)
    command.main()
    assert capsys.readouterr().out.splitlines() == [
        "training: compiled for this processor",
        "engine: no C++ compiler: PyTorch computes instead",
    ]
