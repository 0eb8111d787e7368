"""plot: it draws what there is, and says in one line what is wrong."""

import pytest

from bitnet_lit.config import PlotConfig
from bitnet_lit.errors import UserError
from bitnet_lit.runs import curves
from bitnet_lit.runs.curves import plot_curves
from bitnet_lit.runs.history import read_run

pytest.importorskip("matplotlib")


def run(folder, rows="1,,5.0\r\n2,4.5,\r\n", config="quant:\n  name: b158\n"):
    folder.mkdir()
    (folder / "metrics.csv").write_bytes(b"step,val/loss,train/loss\r\n" + rows.encode())
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def plot(tmp_path, **options):
    return plot_curves(PlotConfig(**{"runs": [str(tmp_path)], "out": str(tmp_path / "c.png"), **options}))


def test_what_cannot_be_drawn_is_left_out_with_a_note(tmp_path, capsys):
    run(tmp_path / "whole")
    run(tmp_path / "_no_config $x^{", config=None)
    run(tmp_path / "literal", config="quant: ${oc.env:HOME}\n")
    run(tmp_path / "no_validation_yet", rows="1,,5.0\r\n")
    run(tmp_path / "empty", rows="")
    run(tmp_path / "half_a_row", rows="1,4.5,\r\n2,4.")
    assert plot(tmp_path).read_bytes().startswith(b"\x89PNG")
    notes = capsys.readouterr().err
    assert "no_validation_yet" in notes and "empty" in notes and notes.count("note: ") == 2


def test_a_run_is_labelled_by_a_value_a_groups_name_or_its_class(tmp_path):
    folder = run(tmp_path / "a", config="seed: 3\nquant:\n  name: b1\noptim:\n  _target_: torch.optim.SGD\n")
    labels = [curves._label(read_run(folder), key) for key in ("seed", "quant", "optim", "optim.eps")]
    assert labels == ["seed=3", "quant=b1", "optim=torch.optim.SGD", "optim.eps=None"]


def test_values_that_agree_in_six_digits_are_two_labels(tmp_path):
    runs = [
        read_run(run(tmp_path / name, config=f"seed: 1\noptim:\n  learning_rate: 0.012345678{name}\n")) for name in "12"
    ]
    labels = [f"optim.learning_rate=0.012345678{name}" for name in "12"]
    assert list(curves._by_label(runs, "optim.learning_rate")) == labels


def test_runs_of_one_label_have_one_colour_and_the_keys_that_differ(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    for quant, seed in (("b158", 1), ("b158", 2), ("none", 1)):
        run(tmp_path / f"{quant}_{seed}", config=f"quant:\n  name: {quant}\nseed: {seed}\n")
    copy = run(tmp_path / "none_copy", config="quant:\n  name: none\nseed: 1\n")
    run(tmp_path / "only", config="quant:\n  name: b1\nseed: 3\n")
    run(tmp_path / "empty", rows="", config="quant:\n  name: b1\nseed: 4\n")
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: figures.append(self) or save(self, *args, **options)
    )
    plot(tmp_path)
    (axes,) = figures[0].axes
    lines = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in axes.lines}
    first, second, alone = (lines[f"quant={name}: 4.500"] for name in ("b158 seed=1", "b158 seed=2", "b1"))
    dense = [lines[f"quant=none ({folder}): 4.500"] for folder in (tmp_path / "none_1", copy)]
    assert len(lines) == 5 and first[0] == second[0] and dense[0][0] == dense[1][0]
    assert len({first[0], dense[0][0], alone[0]}) == 3
    assert first[1] != second[1] and dense[0][1] != dense[1][1]


def test_a_file_that_is_no_picture_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "a")
    (tmp_path / "Makefile").write_text("all:\n")
    with pytest.raises(UserError, match=r"^out=Makefile: is there already, and is no picture: .* out=Makefile.png$"):
        plot_curves(PlotConfig(runs=["a"], out="Makefile"))
    assert (tmp_path / "Makefile").read_text() == "all:\n"
    for _ in range(2):
        assert plot_curves(PlotConfig(runs=["a"], out="curves")).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ("", {}, "metric=val/loss: not in .*metrics.csv, which has no rows"),
        ("1,,5.0\r\n", {}, "metric=val/loss: not in .*which has train/loss"),
        ("1,4.5,5.0\r\n", {"metric": "loss"}, "metric=loss: not in .*: did you mean val/loss\\?$"),
        ("1,x,5.0\r\n", {}, "val/loss of step 1 is 'x', no number"),
        ("1,4.5\r\n", {}, "line 2 is no row"),
        ("1,4.5,\r\n", {"out": "c.xyz"}, "out=c.xyz: no kind of picture is called .xyz"),
        ("1,4.5,\r\n", {"out": "/dev/null/c.png"}, "out=/dev/null/c.png"),
        ("1,1e308,\r\n2,-1e308,\r\n", {}, "metric=val/loss: its values cannot be drawn"),
        ("1,4.5,\r\n", {"runs": ["nowhere"]}, "runs=nowhere: no such folder"),
        ("1,4.5,\r\n", {"label": "optim.ep"}, "label=optim.ep: no run has this key"),
        ("1,4.5,\r\n", {"runs": ["run/metrics.csv"]}, "runs=run/metrics.csv: a file: give runs=run$"),
        ("1,4.5,\r\n", {"runs": ["notes.txt"]}, "runs=notes.txt: a file: give the folder of a run or of a sweep$"),
        ("1,4.5,\r\n", {"out": ""}, "^out= is empty: give a path, or leave it out$"),
    ],
)
def test_one_line(tmp_path, rows, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "run", rows)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=message) as error:
        plot(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_anothers_csv(tmp_path):
    (tmp_path / "metrics.csv").write_text("a;b\n1;2\n")
    with pytest.raises(UserError, match="its first column is not step"):
        plot(tmp_path)


def test_a_folder_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("bitnet_lit.runs.history.os.access", lambda *_: False)  # root reads every folder
    with pytest.raises(UserError, match="runs=.*: cannot be read: check its permissions$"):
        plot(tmp_path)
