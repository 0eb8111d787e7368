"""Without the lm-evaluation-harness the command says how to get it."""

import sys

import pytest

from bitnet_lit import lm_eval as command


def test_a_harness_that_is_missing_is_one_line(monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.models", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "lm_eval: needs the package lm_eval: pip install lm_eval, or pip install 'bitnet-lit[eval]'" in error
