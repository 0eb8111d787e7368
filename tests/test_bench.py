"""`bench` runs the suite that is named, prints a table, and ends with one line of JSON."""

import json
import sys

import pytest
import torch

from bitnet_lit import bench
from bitnet_lit.config import BenchConfig
from bitnet_lit.errors import UserError


def test_an_unknown_suite_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"suite=gpu_tran: .*gpu_train"):
        BenchConfig(suite="gpu_tran")


@pytest.mark.parametrize("suite", sorted(BenchConfig.SUITES))
def test_every_suite_names_the_function_that_measures_it(suite):
    if suite == "gpu_decode":
        pytest.importorskip("triton")
    assert callable(bench._rows_of(suite))


def test_a_suite_whose_package_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "bitnet_lit.inference.gpu_benchmark", raising=False)
    for name in [name for name in sys.modules if name.startswith("bitnet_lit.inference.engines.cuda")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match="suite=gpu_decode: needs the package triton"):
        bench._rows_of("gpu_decode")


@pytest.mark.parametrize("suite", ["gpu_train", "gpu_decode"])
def test_a_suite_of_the_gpu_without_a_gpu_is_refused(suite, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"suite={suite}: this machine has no CUDA device"):
        bench._bench(BenchConfig(suite=suite))


def test_the_rows_become_a_table_and_a_line_of_json(monkeypatch, capsys):
    rows = [{"shape": "1 x 2", "what": "decode", "ours": 1234.5, "unit": "tokens/s"}]
    monkeypatch.setattr("bitnet_lit.data.benchmark.data_rows", lambda config: rows * config.rounds)
    bench._bench(BenchConfig(suite="data", rounds=2))
    *table, last = capsys.readouterr().out.splitlines()
    assert "suite=data, medians of interleaved" in table[0] and any("1,234.50" in line for line in table)
    found = json.loads(last)
    assert found["rows"] == rows * 2 and found["suite"] == "data" and found["machine"]["torch"] == torch.__version__
