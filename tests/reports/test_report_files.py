"""The files of a report: every figure in report.csv, names as they are in report.md and report.html, old or new."""

import csv
import json
import re

import numpy as np
import pytest

from bitnet_lit.config import ReportConfig
from bitnet_lit.errors import UserError
from bitnet_lit.reports import report_files
from bitnet_lit.reports.health import read_matrices
from bitnet_lit.reports.page import as_page
from bitnet_lit.reports.page_data import MOST_POINTS, page_data, thinned
from bitnet_lit.reports.report_files import make_comparison, report
from tests.reports.making import config_of, make_run
from tests.support import REPOSITORY

ODD = "</script><b>x</b> | a_b `c` %{x} [/red] é"


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_files_lie_in_the_sweeps_folder(tmp_path, capsys):
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", quant="none", seed=seed, final=2.0 + seed / 10)
        make_run(tmp_path / f"b{seed}", quant="b158", seed=seed, final=2.5)
    report(ReportConfig(runs=[str(tmp_path)], by=["quant"]))
    with (tmp_path / "report.csv").open(encoding="utf-8") as file:
        rows = {row["quant"]: row for row in csv.DictReader(file)}
    assert float(rows["none"]["val/loss"]) == pytest.approx(2.15) and rows["none"]["best"] == "True"
    assert float(rows["b158"]["gap_at_equal_tokens"]) == pytest.approx(0.35)
    assert float(rows["b158"]["gap_at_equal_tokens_ci95"]) == pytest.approx(12.7062 * 0.05, rel=1e-4)
    assert rows["b158"]["gap_at_equal_bytes_why_not"].startswith("it takes dense models of two sizes")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| **none** | **2** |" in text
    assert "- In finished runs of one length it is of the whole validation split." in text
    printed = capsys.readouterr().out
    assert "2.1500 ± 0.6353 best" in printed and "+0.3500 ± 0.6353" in printed


def test_the_folder_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one/a", "one/b", "two/c"):
        make_run(tmp_path / name, seed=len(name) + ord(name[-1]))
    report(ReportConfig(runs=["one/a", "one/b"]))
    assert (tmp_path / "one" / "report.csv").is_file()
    report(ReportConfig(runs=["*/*"]))
    assert (tmp_path / "report.csv").is_file()
    report(ReportConfig(runs=["two"], out="elsewhere/new"))
    assert (tmp_path / "elsewhere" / "new" / "report.csv").is_file() and not (tmp_path / "two" / "report.csv").exists()
    with pytest.raises(UserError, match=r"out=/dev/null/x"):
        report(ReportConfig(runs=["two"], out="/dev/null/x"))


@pytest.mark.parametrize("name", ["report.csv", "report.md", "report.html"])
def test_a_report_of_the_users_own_is_not_replaced(tmp_path, capsys, name):
    make_run(tmp_path / "runs" / "a")
    config = ReportConfig(runs=[str(tmp_path / "runs")], out=str(tmp_path))
    (tmp_path / name).write_text("# Report of last year\n")
    with pytest.raises(UserError, match=f"{name}: is there already, and no report wrote it: choose another out="):
        report(config)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [name] and not capsys.readouterr().out
    (tmp_path / name).unlink()
    report(config)
    report(config)  # its own are replaced


def test_without_plotly_there_is_no_page_and_one_line_says_so(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "a")
    monkeypatch.setitem(report_files.sys.modules, "plotly", None)
    monkeypatch.setitem(report_files.sys.modules, "plotly.offline", None)
    report(ReportConfig(runs=[str(tmp_path)]))
    assert (tmp_path / "report.md").exists() and not (tmp_path / "report.html").exists()
    expected = "note: report.html: needs the package plotly: pip install plotly, or pip install 'bitnet-lit[report]'\n"
    assert capsys.readouterr().err == expected


def test_names_are_text_in_every_file(tmp_path, capsys):
    for number, name in enumerate((ODD, "plain")):
        make_run(tmp_path / str(number), config=config_of(model="small") | {"tag": name, "seed": number})
    comparison = make_comparison(ReportConfig(runs=[str(tmp_path)], by=["tag"]))
    page = as_page(comparison, f"Report of {ODD}", "/* plotly.js */")
    assert "<b>x</b>" not in page and page.count("</script>") == 3
    assert "&lt;/script&gt;&lt;b&gt;x&lt;/b&gt; | a_b `c` %{x} [/red] é" in page
    assert ODD in [row["name"] for row in data_of(page)["rows"]]
    report(ReportConfig(runs=[str(tmp_path)], by=["tag"]))
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith("| &lt;")]
    assert "&lt;/script&gt;" in line and "a\\_b" in line and "\\|" in line and "[/red]" in capsys.readouterr().out


def test_only_a_figure_of_validations_is_explained_as_such(tmp_path):
    make_run(tmp_path / "a")
    for metric, is_said in (("val/loss", True), ("train/loss", False)):
        page = as_page(make_comparison(ReportConfig(runs=[str(tmp_path)], metric=metric)), "t", "")
        assert ("Points of the curves are of the batches that every validation takes." in page) is is_said


def test_the_page_loads_nothing(tmp_path):
    make_run(tmp_path / "a")
    page = as_page(make_comparison(ReportConfig(runs=[str(tmp_path)])), "t", "")
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page) and "@@" not in page


def test_curves_on_the_page_are_short_and_keep_their_ends_and_peaks(tmp_path):
    losses = [(step, 4.0 if step == 777 else 2.0 + 1 / step) for step in range(1, 3001)]
    make_run(tmp_path / "a", losses=losses)
    (run,) = page_data(make_comparison(ReportConfig(runs=[str(tmp_path)])))["runs"]
    curve = run["curves"]["val/loss"]
    assert len(curve["steps"]) <= MOST_POINTS and len(curve["steps"]) == len(curve["values"]) == len(curve["seconds"])
    assert (curve["steps"][0], curve["steps"][-1]) == (1, 3000) and 4.0 in curve["values"]
    assert curve["seconds"][-1] == pytest.approx(300.0)  # ten steps a second
    assert thinned(np.array([1.0, np.nan, 3.0])).tolist() == [0, 1, 2]
    assert len(thinned(np.full(5000, np.nan))) <= MOST_POINTS


def test_what_is_not_finite_is_null_on_the_page(tmp_path):
    make_run(tmp_path / "a", losses=((10, 3.0), (20, float("nan")), (30, float("inf"))), done=False)
    page = as_page(make_comparison(ReportConfig(runs=[str(tmp_path)])), "t", "")
    assert data_of(page)["runs"][0]["curves"]["val/loss"]["values"] == [3.0, None, None]


def test_runs_without_a_validation_have_their_training_curves_on_the_page(tmp_path):
    folder = make_run(tmp_path / "a", done=False)
    (folder / "metrics.csv").write_text("step,train/loss\n10,3.5\n20,3.25\n")
    comparison = make_comparison(ReportConfig(runs=[str(tmp_path)]))
    assert comparison.rows[0].loss is None
    assert comparison.notes == [f"{folder} was stopped at step 20 and has no val/loss yet"]
    (run,) = data_of(as_page(comparison, "t", ""))["runs"]
    assert run["curves"]["train/loss"]["values"] == [3.5, 3.25] and run["final"] is None


@pytest.mark.parametrize("damage", [("1280.0", "1e-320"), ("2.0", "9e300"), ("40,", "999999999999,")])
def test_numbers_that_nothing_has_do_not_end_the_report(tmp_path, damage):
    for seed in (1, 2):
        folder = make_run(tmp_path / str(seed), seed=seed, done=False)
        (folder / "metrics.csv").write_text((folder / "metrics.csv").read_text().replace(*damage))
    comparison = make_comparison(ReportConfig(runs=[str(tmp_path)], by=["quant"]))
    assert comparison.rows[0].loss.mean == (3.0 if damage[0] == "2.0" else 2.0)
    assert data_of(as_page(comparison, "t", ""))["rows"][0]["loss"][0] == comparison.rows[0].loss.mean


def test_health_of_each_matrix(tmp_path):
    lines = ["step,layer,minus,zero,plus,flip_rate,weight_scale"]
    for step in (10, 20, 30, 40):
        for layer in ("model.layers.0.self_attn.q_proj", "mine"):
            lines.append(f"{step},{layer},0.3,0.4,0.3,{'nan' if step == 10 else 0.1},{step / 100}")
    (tmp_path / "ternary_health.csv").write_text("\n".join([*lines, "50,mine,0.3,0."]))
    matrices = read_matrices(tmp_path, most_steps=3)
    assert matrices.names == ["0 q_proj", "mine"] and matrices.steps.tolist() == [10, 30, 40]
    assert matrices.figures["weight_scale"].tolist() == [[0.1, 0.3, 0.4]] * 2
    assert np.isnan(matrices.figures["flip_rate"][:, 0]).all() and (matrices.figures["zero"] == 0.4).all()
    assert read_matrices(tmp_path / "nowhere", 3) is None


def test_a_run_of_the_second_version_has_its_health_on_the_page():
    folder = REPOSITORY / "tests" / "second_version" / "run"
    (health,) = page_data(make_comparison(ReportConfig(runs=[str(folder)])))["health"]
    assert health["zero"]["values"] == [0.30329] and len(health["matrices"]["names"]) == 7


def test_hundreds_of_runs(tmp_path):
    for seed in range(300):
        make_run(tmp_path / f"{seed:03}", quant="none" if seed % 2 else "b158", seed=seed // 2)
    comparison = make_comparison(ReportConfig(runs=[str(tmp_path)], by=["quant"]))
    assert [row.loss.count for row in comparison.rows] == [150, 150]
    assert comparison.rows[0].at_equal_tokens.estimate.count == 150
    every = make_comparison(ReportConfig(runs=[str(tmp_path)], by=["quant", "seed"], over=[]))
    assert len(every.rows) == 300 and len(as_page(every, "t", "")) < 1e6
