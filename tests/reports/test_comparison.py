"""Rows, intervals and gaps, each against figures computed by hand, and every kind of run that cannot count."""

import math
import os
from dataclasses import fields

import pytest
import yaml

from bitnet_lit.config import DistillConfig, ModelConfig, MuonConfig, QuantConfig, ReportConfig, ScheduleConfig
from bitnet_lit.errors import UserError
from bitnet_lit.model.accounting import account
from bitnet_lit.reports.report_files import make_comparison
from bitnet_lit.reports.statistics import quantile_975
from bitnet_lit.reports.weight_sizes import weight_sizes
from bitnet_lit.runs import config_keys
from bitnet_lit.runs.folder import locked
from bitnet_lit.runs.history import run_folders
from tests.reports.making import config_of, make_run
from tests.support import REPOSITORY, tiny_config


def compared(folder, **options):
    comparison = make_comparison(ReportConfig(runs=[str(folder)], **options))
    return {row.name: row for row in comparison.rows}, comparison.notes


def test_a_mean_over_seeds_and_the_gap_of_pairs(tmp_path):
    for seed, dense, ternary in ((1, 2.0, 2.1), (2, 2.4, 2.6), (3, 2.2, 2.5)):
        make_run(tmp_path / f"a{seed}", quant="none", seed=seed, final=dense)
        make_run(tmp_path / f"b{seed}", quant="b158", seed=seed, final=ternary)
    rows, notes = compared(tmp_path, by=["quant"])
    assert list(rows) == ["b158", "none"] and notes == []
    assert rows["none"].is_best and not rows["b158"].is_best and rows["none"].is_dense
    t = quantile_975(2)
    assert rows["none"].loss.mean == pytest.approx(2.2)
    assert rows["none"].loss.half_width == pytest.approx(t * 0.2 / math.sqrt(3))
    gap = rows["b158"].at_equal_tokens.estimate  # of 0.1, 0.2 and 0.3
    assert gap.mean == pytest.approx(0.2) and gap.count == 3
    assert gap.half_width == pytest.approx(t * 0.1 / math.sqrt(3))
    assert rows["b158"].tokens == 40 * 128 and rows["b158"].seconds == pytest.approx(4.0)


def test_the_keys_that_tell_runs_apart_are_found(tmp_path):
    for number, (model, quant, seed) in enumerate([("small", "b158", 1), ("large", "b158", 1), ("small", "none", 2)]):
        make_run(tmp_path / str(number), model=model, quant=quant, seed=seed)
    rows, _ = compared(tmp_path)
    assert list(rows) == ["large b158", "small b158", "small none"]
    rows, _ = compared(tmp_path, by=["quant,hidden_size"])  # the last part of a key is enough
    assert list(rows) == ["b158 32", "b158 128", "none 32"]
    assert list(compared(tmp_path / "0")[0]) == ["0"]


def test_jobs_that_have_not_begun_add_no_keys_but_those_that_the_sweep_varies(tmp_path):
    """A run writes config.yaml with the whole path of its data and its vocabulary, which Hydra's record lacks."""
    (tmp_path / "multirun.yaml").write_text("")
    for quant, seed in (("b158", 1), ("b158", 2), ("none", 1)):
        folder = tmp_path / f"quant={quant}__seed={seed}"
        if (quant, seed) == ("b158", 1):
            begun = config_of(quant, seed)
            begun["data"]["dir"] = "/home/a/data/demo"
            make_run(folder, config=begun)
        (folder / ".hydra").mkdir(parents=True)
        recorded = config_of(quant, seed, run_dir="${bitnet.run_dir:}")
        recorded["model"]["vocab_size"] = None
        (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(recorded))
    assert list(compared(tmp_path)[0]) == ["b158", "none"]
    (tmp_path / "quant=b158__seed=1" / ".hydra" / "config.yaml").write_text("{damaged")
    assert list(compared(tmp_path)[0]) == ["b158", "none"]


def test_runs_of_different_lengths_are_compared_at_the_tokens_that_both_reached(tmp_path):
    make_run(tmp_path / "dense", quant="none", losses=((10, 4.0), (30, 2.0), (50, 1.0)))
    make_run(tmp_path / "ternary", quant="b158", losses=((10, 5.0), (40, 2.0)), done=False)
    rows, notes = compared(tmp_path, by=["quant"])
    gap = rows["b158"].at_equal_tokens  # at 40 steps the dense run has 1.5
    assert gap.estimate.mean == pytest.approx(0.5) and gap.tokens == 40 * 128
    assert any("5,120 tokens" in note and "interpolated" in note for note in notes)
    assert "b158: no run is finished: the mean is that so far" in notes
    make_run(tmp_path / "b158 2", quant="b158", seed=2, losses=((10, 5.0), (20, 3.0)), done=False)
    rows, notes = compared(tmp_path, by=["quant"])
    assert rows["b158"].loss.mean == pytest.approx((4.0 + 3.0) / 2) and rows["b158"].tokens == 20 * 128


def test_the_gap_at_equal_bytes_is_interpolated_in_the_logarithm(tmp_path):
    losses = {("none", "small"): 3.0, ("none", "large"): 2.0, ("b158", "large"): 2.1, ("b158", "small"): 3.5}
    for (quant, model), loss in losses.items():
        make_run(tmp_path / f"{quant}-{model}", quant=quant, model=model, final=loss)
    rows, _ = compared(tmp_path, by=["model", "quant"])
    size = {name: row.sizes.num_bytes for name, row in rows.items()}
    share = math.log(size["large b158"] / size["small none"]) / math.log(size["large none"] / size["small none"])
    assert 0 < share < 1
    gap = rows["large b158"].at_equal_bytes
    assert gap.estimate.mean == pytest.approx(2.1 - (3.0 - share))
    outside = rows["small b158"].at_equal_bytes
    assert outside.estimate is None and "those of the dense models" in outside.why_not
    assert compared(tmp_path / "b158-small")[0]["b158-small"].at_equal_bytes.why_not.startswith("it takes dense models")


def test_the_bytes_of_weights_are_those_of_accounting():
    counted = account(tiny_config(), QuantConfig(name="b158"))
    config = {"model": vars(tiny_config()), "quant": {"name": "b158", "kernel": "of another version"}}
    sizes = weight_sizes(config, 16)
    assert sizes.bits_per_weight == counted.bits_per_weight
    expected = counted.projections * counted.bits_per_weight / 8 + (counted.embedding + counted.norms) * 2
    assert sizes.num_bytes == pytest.approx(expected)
    assert weight_sizes({**config, "quant": {"name": "none"}}, 16).num_bytes == 2 * counted.parameters
    for unknown in (
        {"quant": {"name": "no_such"}},
        {"model": {"_target_": "my.Net"}},
        {"model": None},
        {"quant": None},
    ):
        assert weight_sizes({**config, **unknown}, 16) is None


def test_runs_that_cannot_count_are_named_with_the_reason(tmp_path):
    make_run(tmp_path / "good", seed=1)
    make_run(tmp_path / "failed", seed=2, done=False, error="UserError: no data\n")
    make_run(tmp_path / "nan", seed=3, final=math.nan, done=True)
    (tmp_path / "nan" / "metrics.json").write_text('{"val/loss": null, "steps": 40, "tokens": 5120}')
    make_run(tmp_path / "going", seed=4, done=False)
    make_run(tmp_path / "fresh", seed=5, losses=(), done=False)
    make_run(tmp_path / "damaged", seed=6)
    (tmp_path / "damaged" / "metrics.csv").write_text("step,val/loss\n1,x\n")
    (tmp_path / "early" / ".hydra").mkdir(parents=True)
    (tmp_path / "early" / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config_of(seed=7)))
    (tmp_path / "early" / "error.txt").write_text("UserError: too early")
    make_run(
        tmp_path / "stopped", seed=8, losses=(), done=False, error="TrainingStopped: SIGINT at step 11 of 40: saved"
    )
    (tmp_path / "sweep" / "waiting" / ".hydra").mkdir(parents=True)
    (tmp_path / "sweep" / "multirun.yaml").write_text("seed: 9\n")
    (tmp_path / "sweep" / "waiting" / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config_of(seed=9)))
    (tmp_path / "refused" / ".hydra").mkdir(parents=True)  # a command of its own, not a job
    rows, notes = compared(tmp_path, by=["quant"])
    assert rows["b158"].loss.count == 1
    text = "\n".join(notes)
    for expected in (
        "failed failed: no data",
        "nan has no val/loss that is a finite number",
        "going was stopped at step 40, and finished runs count",
        "fresh was stopped before its first logged step and has no val/loss yet",
        "/stopped was stopped at step 11 and has no val/loss yet",
        "sweep/waiting was not started and has no val/loss yet",
        "is 'x', no number",
        "early failed: too early",
    ):
        assert expected in text, text
    assert "refused" not in text


def test_a_run_that_is_running_is_told_from_one_that_was_stopped(tmp_path):
    make_run(tmp_path / "done", seed=1)
    going = make_run(tmp_path / "going", seed=2, done=False)
    with locked(going):  # as the process that trains there does
        assert compared(tmp_path, by=["quant"])[1][0] == f"{going} is running (step 40), and finished runs count"


def test_half_a_line_of_a_run_that_goes_on_is_left_out(tmp_path):
    folder = make_run(tmp_path / "a", done=False)
    with (folder / "metrics.csv").open("a") as file:
        file.write("60,,,1.")
    assert compared(tmp_path)[0]["a"].loss.mean == 2.0


def test_the_newest_of_two_runs_with_one_config_counts(tmp_path):
    make_run(tmp_path / "old", final=9.0)
    make_run(tmp_path / "new", final=2.0)
    for path in (tmp_path / "old").iterdir():
        os.utime(path, (1, 1))
    rows, notes = compared(tmp_path, by=["quant"])
    assert rows["b158"].loss.mean == 2.0 and rows["b158"].loss.count == 1
    assert notes == [f"{tmp_path / 'old'} has the same config as {tmp_path / 'new'}, which is newer"]


def test_runs_that_differ_in_more_than_the_seed_are_said(tmp_path):
    make_run(tmp_path / "a", seed=1, optim={"name": "muon", "learning_rate": 0.02})
    make_run(tmp_path / "b", seed=1, optim={"name": "muon", "learning_rate": 0.04})
    make_run(tmp_path / "dense", seed=1, quant="none", optim={"name": "muon", "learning_rate": 0.01})
    rows, notes = compared(tmp_path, by=["quant"])
    assert rows["b158"].loss.count == 2
    assert "b158: its runs differ in optim.learning_rate too: by= can divide them" in notes
    assert "b158: the dense twin differs in optim.learning_rate too" in notes


@pytest.mark.parametrize("metric", ["val/accuracy", "val/accuracy_web"])  # the second is of a corpus of data.mix
def test_a_loss_that_is_larger_is_not_better_but_an_accuracy_is(tmp_path, metric):
    for quant, loss in (("none", 2.0), ("b158", 2.5)):
        folder = make_run(tmp_path / quant, quant=quant, final=loss)
        text = (folder / "metrics.csv").read_text().replace("val/loss", metric)
        (folder / "metrics.csv").write_text(text)
        (folder / "metrics.json").write_text(f'{{"{metric}": {loss}, "steps": 40, "tokens": 5120}}')
    rows, _ = compared(tmp_path, by=["quant"], metric=metric)
    assert rows["b158"].is_best and not rows["none"].is_best


@pytest.mark.parametrize("metric", ["val/top5", "val/mean_margin", "ternary/zero", "perf/data_wait_share"])
def test_no_row_is_best_in_a_metric_whose_direction_is_not_known(tmp_path, metric):
    for quant, value in (("none", 0.2), ("b158", 0.4)):
        folder = make_run(tmp_path / quant, quant=quant, final=value)
        (folder / "metrics.csv").write_text((folder / "metrics.csv").read_text().replace("val/loss", metric))
        (folder / "metrics.json").write_text(f'{{"{metric}": {value}, "steps": 40, "tokens": 5120}}')
    rows, _ = compared(tmp_path, by=["quant"], metric=metric)
    assert [row.loss.mean for row in rows.values()] == [0.4, 0.2] and not any(row.is_best for row in rows.values())


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"dir": "data/other"}, "data.dir"),
        ({"max_val_sequences": 40}, "data.max_val_sequences"),
        ({"sequence_length": 16}, "data.sequence_length"),
        ({"mix": {"web": {"dir": "data/web", "weight": 1.0}}, "dir": None}, "data.dir, data.mix.web.dir"),
        ({"dir": None, "_target_": "study.Bytes", "path": "a.txt"}, "data._target_, data.dir, data.path"),
    ],
)
def test_no_row_is_best_of_runs_that_are_validated_on_different_sequences(tmp_path, data, key):
    """The keys of the rows need not show it: here `quant` tells the runs apart."""
    make_run(tmp_path / "a", quant="none", final=2.0)
    make_run(tmp_path / "b", quant="b158", final=1.0, data=config_of()["data"] | data)
    rows, notes = compared(tmp_path)
    assert list(rows) == ["b158", "none"] and not any(row.is_best for row in rows.values())
    assert any(f"differ in {key}" in note and "evaluate data_dir=<one folder>" in note for note in notes)
    rows, notes = compared(tmp_path, metric="perf/tokens_per_s")
    assert not any("evaluate" in note for note in notes)


@pytest.mark.parametrize("data", [{"sequence_length": 32}, {"shuffle": "shards"}, {"num_workers": 1, "cache_dir": "c"}])
def test_runs_that_are_validated_on_the_same_sequences_have_a_best_row(tmp_path, data):
    make_run(tmp_path / "a", quant="none", final=2.0)  # its sequence_length is that of the model, 32
    make_run(tmp_path / "b", quant="b158", final=1.0, data=config_of()["data"] | data)
    rows, notes = compared(tmp_path, by=["quant"])
    assert rows["b158"].is_best and not any("sequences" in note for note in notes)


def test_a_run_whose_first_validation_is_late_is_named(tmp_path):
    make_run(tmp_path / "short", seed=1, losses=((10, 3.0), (20, 2.0)))
    make_run(tmp_path / "long", seed=2, losses=((30, 2.0), (60, 1.0)))
    make_run(tmp_path / "dense", quant="none", losses=((20, 3.0), (60, 1.5)))
    rows, notes = compared(tmp_path, by=["quant"])
    assert [run.folder.name for run in rows["b158"].counted] == ["short"] and rows["b158"].loss.count == 1
    why = "has no val/loss at the 2,560 tokens that the others are compared at"
    assert f"{tmp_path / 'long'} {why}" in notes
    assert "the rows have different lengths, 2,560 to 7,680 tokens: a gap is at one length" in notes


def test_a_scheme_of_the_users_own_is_named_with_the_remedy(tmp_path):
    own = config_of()["quant"] | {"name": "mine", "_target_": "study.Mine"}
    for steps in (20, 40):
        make_run(tmp_path / str(steps), losses=((steps, 3.0),), config=config_of(seed=steps) | {"quant": own})
    rows, notes = compared(tmp_path, by=["quant", "seed"], over=[])
    assert len(rows) == 2 and all(row.sizes is None for row in rows.values())
    remedy = "schemes=[study.Mine] gives the bytes of the weights that it rounds, if you trust that class"
    assert notes.count(remedy) == 1


@pytest.mark.parametrize(
    ("losses", "best"),
    [((2.0, 2.0, 2.5), ["b1", "b158"]), ((2.5, 2.0, 2.0), ["b158", "none"]), ((2.0, 2.0, 2.0), [])],
)
def test_rows_of_equal_losses_are_equally_good(tmp_path, losses, best):
    for quant, loss in zip(("b1", "b158", "none"), losses, strict=True):
        make_run(tmp_path / quant, quant=quant, final=loss)
    rows, _ = compared(tmp_path, by=["quant"])
    assert [name for name, row in rows.items() if row.is_best] == best


def test_runs_whose_values_look_alike_are_not_one_run(tmp_path):
    """A search draws numbers of many digits. The same holds for long lists that differ in the middle."""
    layers = [f"model.layers.{layer}.mlp.down_proj" for layer in range(20)]
    differing = [
        *({"optim": {"name": "muon", "learning_rate": rate}} for rate in (0.0123456789, 0.0123456781)),
        *({"distill": {"layers": [*layers, middle, *layers]}} for middle in ("lm_head", "model.norm")),
    ]
    for number, changes in enumerate(differing):
        make_run(tmp_path / str(number), **changes)
    rows, notes = compared(tmp_path, by=["quant"])
    assert rows["b158"].loss.count == len(differing) and not any("same config" in note for note in notes)
    rows, _ = compared(tmp_path, by=["learning_rate"])  # the others have 0.02
    assert {name: row.loss.count for name, row in rows.items()} == {"0.0123456781": 1, "0.0123456789": 1, "0.02": 2}
    rows, _ = compared(tmp_path, by=["distill.layers"])
    assert [row.loss.count for row in rows.values()] == [2, 1, 1]


def test_a_row_shows_six_digits_where_they_tell_it_from_the_others(tmp_path):
    layers = [f"model.layers.{layer}.mlp.down_proj" for layer in range(20)]
    for number, rate in enumerate((0.0123456789, 0.0123466781, 1e-05)):
        make_run(tmp_path / str(number), optim={"name": "muon", "learning_rate": rate}, skipped=layers)
    rows, _ = compared(tmp_path, by=["learning_rate", "skipped"])
    assert [name.split()[0] for name in rows] == ["1e-05", "0.0123457", "0.0123467"]
    assert max(map(len, rows)) < 220


def test_rows_are_in_the_order_of_numbers(tmp_path):
    rates = [1e-05, 0.0001, 0.005, 0.01, 0.02, 0.1, 2.0, 10.0]
    for number, rate in enumerate(reversed(rates)):
        make_run(tmp_path / str(number), optim={"name": "muon", "learning_rate": rate})
    rows, _ = compared(tmp_path, by=["learning_rate"])
    assert list(map(float, rows)) == rates


@pytest.mark.parametrize("version", ["first_version", "second_version"])
def test_runs_of_earlier_versions(version):
    rows, _ = compared(REPOSITORY / "tests" / version / "run", by=["quant", "model"])
    (row,) = rows.values()
    assert row.loss.count == 1 and 5.6 < row.loss.mean < 5.7 and row.tokens == 4 * 4 * 32 and row.sizes is not None


def test_runs_without_a_config_or_without_its_keys(tmp_path):
    make_run(tmp_path / "none", config={})
    make_run(tmp_path / "other", config={"mine": 1, "run_dir": "x"})
    rows, _ = compared(tmp_path, by=["mine"])
    assert sorted(rows) == ["-", "1"] and all(row.loss.mean == 2.0 for row in rows.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": ["quan"]}, "by=quan: no run has this key: did you mean 'quant'?"),
        ({"by": ["name"]}, "by=name: several keys end with it: give one of "),
        ({"over": ["sed"]}, "over=sed: no run has this key: did you mean 'seed'?"),
        ({"metric": "val/los"}, "metric=val/los: in no metrics.csv of these runs: did you mean val/loss?"),
        ({"metric": "loss"}, "metric=loss: in no metrics.csv of these runs: did you mean val/loss?"),
        ({"metric": "speed"}, "metric=speed: in no metrics.csv of these runs, which have perf/tokens_per_s, "),
        ({"schemes": ["no_such.Scheme"]}, "schemes="),
    ],
)
def test_one_line(tmp_path, options, message):
    make_run(tmp_path / "a")
    with pytest.raises(UserError) as error:
        compared(tmp_path, **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_what_lies_in_a_run_is_no_run_but_runs_below_it_are(tmp_path):
    """Weights & Biases keeps a config.yaml of its own, with run_dir in it."""
    run = make_run(tmp_path / "run")
    for inside in ("wandb/offline-run-1/files", ".hydra", "later/deeper"):
        make_run(run / inside, seed=2, final=9.0)
    assert run_folders([str(tmp_path)]) == [run, run / "later" / "deeper"]
    assert run_folders([str(tmp_path / "r*"), str(run / "later")]) == [run, run / "later" / "deeper"]  # each once


def test_a_row_of_dense_and_quantized_runs_has_the_gap_of_the_quantized_ones(tmp_path):
    make_run(tmp_path / "dense", quant="none", final=1.0)
    make_run(tmp_path / "ternary", quant="b158", final=2.0)
    gap = compared(tmp_path, by=["model"])[0]["small"].at_equal_tokens.estimate
    assert gap.mean == pytest.approx(1.0) and gap.count == 1


def test_keys_of_the_sweep_tell_no_runs_apart(tmp_path):
    make_run(tmp_path / "dense", quant="none", final=2.0, sweep={"n_trials": 20})
    make_run(tmp_path / "ternary", quant="b158", final=2.5, sweep={"n_trials": 40})
    rows, notes = compared(tmp_path)
    assert list(rows) == ["b158", "none"] and notes == []
    assert rows["b158"].at_equal_tokens.estimate.mean == pytest.approx(0.5)


def test_a_folder_that_does_not_exist_is_one_line(tmp_path):
    run = make_run(tmp_path / "a")
    with pytest.raises(UserError, match=r"^runs=.*typo: no such folder: give folders of runs or of sweeps$"):
        run_folders([str(run), str(tmp_path / "typo")])
    with pytest.raises(UserError, match=r": no such folder: give .*; for several give a list: runs=\[a,b\]$"):
        run_folders(["a,b"])


def test_no_runs(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.csv below: give run folders"):
        compared(tmp_path)


def test_runs_from_before_an_update_are_seeds_of_those_after_it(tmp_path):
    new = config_of(seed=3)
    for dotted, value in config_keys._BEFORE_THE_KEY.items():
        name, _, key = dotted.partition(".")
        new.setdefault(name, {})[key] = value
    new["schedule"] = {"weight_decay": "constant"}
    for seed in (1, 2):
        make_run(tmp_path / str(seed), seed=seed, schedule={})
    make_run(tmp_path / "3", config=new)
    rows, _ = compared(tmp_path)
    (row,) = rows.values()
    assert row.loss.count == 3
    new["quant"]["start_at"], new["seed"] = 0.3, 4
    make_run(tmp_path / "4", config=new)
    assert len(compared(tmp_path)[0]) == 2


def test_keys_that_later_versions_brought_are_keys():
    groups = {"model": ModelConfig, "quant": QuantConfig, "optim": MuonConfig, "schedule": ScheduleConfig}
    for dotted in config_keys._BEFORE_THE_KEY:
        name, _, key = dotted.partition(".")
        assert key in {field.name for field in fields({**groups, "distill": DistillConfig}[name])}, dotted


def test_a_group_of_the_users_own_class_gets_no_keys():
    config = {"model": {"_target_": "my.Net"}, "quant": {"_target_": "my.Scheme"}, "optim": {"name": "adamw"}}
    filled = config_keys.of_this_version(config)
    assert filled["model"] == {"_target_": "my.Net"} and filled["quant"]["start_at"] == 0
    assert set(filled["optim"]) == {"name", "cautious_weight_decay"} and config["optim"] == {"name": "adamw"}
