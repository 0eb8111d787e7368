"""The study of examples/recipes: what it starts in which order, and that it goes on after a kill and elsewhere.

`train -m` is a stand-in that leaves results at once (stand_in_for_train.py).
"""

import importlib
import json
import math
import re
import shutil
import sys
import zlib

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from bitnet_lit.cli import compose
from bitnet_lit.errors import UserError
from bitnet_lit.reports.statistics import quantile_975
from bitnet_lit.runs.folder import locked
from bitnet_lit.runs.search import distribution
from tests.support import REPOSITORY

RECIPES = REPOSITORY / "examples" / "recipes"
MODULES = ("plan", "results", "teachers", "pictures", "pool", "tables", "dry_run", "study")
STAND_IN = [sys.executable, "-S", str(REPOSITORY / "tests" / "examples" / "stand_in_for_train.py")]
SMALL = ["gpus=0", "trials=3", "jobs_per_gpu=2", "space={optim.learning_rate: 'interval(1e-2, 1e-1)'}"]
TWINS = "order=[search gutenberg_5m, seeds gutenberg_5m]"


@pytest.fixture
def modules(monkeypatch):
    """The modules of the folder, which import each other by their bare names as a script's folder allows."""
    monkeypatch.syspath_prepend(str(RECIPES))
    found = {name: importlib.import_module(name) for name in MODULES}
    monkeypatch.setattr(found["study"], "POLL_SECONDS", 0.05)
    yield found
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def study(modules, tmp_path, monkeypatch):
    """A call that runs the study with the stand-in, and returns its exit status."""
    monkeypatch.setattr(modules["study"].signal, "signal", lambda *_: None)  # the handlers are pytest's
    monkeypatch.setattr(modules["study"], "is_complete", lambda folder: True)
    return lambda *typed: modules["study"].main([f"out={tmp_path}", *SMALL, *typed], STAND_IN)


def lines_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines() if line]


def default_plan(modules, *typed):
    return modules["plan"].Plan(modules["plan"].read_settings([*typed], RECIPES / "study.yaml"))


def test_every_recipe_option_and_range_of_the_plan_composes(modules):
    """Options with different keys are composed together, since each composition takes a while."""
    plan = default_plan(modules)
    space = OverridesParser.create().parse_overrides([f"{key}={v}" for key, v in plan.sweeps[0].space.items()])
    ranges = {key: distribution(each) for each in space if (key := each.get_key_element())}
    first = {key: one.choices[0] if hasattr(one, "choices") else one.low for key, one in ranges.items()}
    last = {key: one.choices[-1] if hasattr(one, "choices") else one.high for key, one in ranges.items()}
    composed = [
        {"experiment": "recipes/gutenberg_5m"} | {key: str(v) for key, v in each.items()} for each in (first, last)
    ]
    composed += [{"experiment": f"recipes/{recipe}"} for recipe in plan.settings["recipes"]]
    added = [plan.option(name) for name in plan.settings["options"]]
    wider = [sizes["overrides"] for what in ("wide", "equal_bytes") for sizes in plan.settings[what].values()]
    for option in map(modules["plan"].by_key, added + wider):
        free = next((one for one in composed if not one.keys() & option.keys()), None)
        if free is None:
            composed.append(free := {})
        free |= option
    for overrides in composed:
        assert compose("train", ["run_dir=unused", *(f"{key}={value}" for key, value in overrides.items())])


def test_twins_are_searched_alike_and_first_in_order(modules):
    sweeps = default_plan(modules).sweeps
    by_name = {sweep.name: sweep for sweep in sweeps}
    for recipe in ("gutenberg_5m", "gutenberg_40m", "gutenberg_800k", "tinystories_5m"):
        b158, none = by_name[f"{recipe}/b158/search"], by_name[f"{recipe}/none/search"]
        assert (b158.jobs, b158.space, b158.tokens) == (none.jobs, none.space, none.tokens)
        assert {key for key in b158.fixed if b158.fixed[key] != none.fixed[key]} == {"quant"}
    for place, sweep in enumerate(sweeps):
        assert set(sweep.needs) <= {before.name for before in sweeps[:place]}


def test_searches_of_a_recipe_draw_the_same_points_and_those_of_others_do_not(modules, tmp_path):
    plan = default_plan(modules, f"out={tmp_path}")
    study = modules["study"].Study(plan, STAND_IN, "")
    searches = [sweep for sweep in plan.sweeps if sweep.what == "search"]
    seeds = {sweep.name: modules["plan"].by_key(study.overrides(sweep, 1))["sweep.seed"] for sweep in searches}
    assert seeds["gutenberg_5m/b158/search"] == "326952759"  # on every machine
    assert len(seeds) == 2 * len(plan.settings["recipes"]) == 2 * len({*seeds.values()})
    assert all(seeds[f"{sweep.recipe}/b158/search"] == seeds[f"{sweep.recipe}/none/search"] for sweep in searches)


def test_the_results_in_the_repository_are_those_of_the_plan(modules, tmp_path):
    shutil.copy(RECIPES / "results.jsonl", tmp_path)
    results = modules["results"].Results(tmp_path)
    plan = default_plan(modules)
    results.check(plan)
    assert len(results.records) >= 108 and results.best("gutenberg_5m/b158/search") is not None
    tables, page = modules["tables"].Tables(plan, results).text(), RECIPES.parents[1] / "docs" / "recipes.md"
    assert tables in page.read_text(encoding="utf-8")
    assert "| gutenberg_5m | 5.65 M, 7.22 M |" in tables  # value embeddings make the dense twin larger


def test_the_best_trial_goes_on_with_every_seed(study, tmp_path):
    assert study(TWINS, "seeds=[1,2,3]") == 0
    found = lines_of(tmp_path)
    assert len(found) == 2 * 3 + 2 * 3
    base = [line for line in found if line["sweep"] == "gutenberg_5m/b158/base"]
    assert [line["seed"] for line in base] == [1, 2, 3]
    assert {line["overrides"]["optim.learning_rate"] for line in base} == {"0.02"}  # trials had 0.01, 0.02 and 0.04
    assert base[0]["loss"] == pytest.approx(0.111) and base[0]["tokens_per_s"] == 1100
    page = (tmp_path / "tables.md").read_text()
    assert f"12 runs on {found[0]['machine']}." in page and "torch 2." in page and page.count("No run yet.") == 6
    half = quantile_975(2) * 0.001 / math.sqrt(3)
    assert f"| +0.1020 ± {half:.4f} |" in page and f"| +0.0510 ± {half / 2:.4f} |" in page
    assert "`experiment=recipes/gutenberg_5m quant=b158 optim.learning_rate=0.02 seed=1,2,3`" in page
    assert not (tmp_path / "gutenberg_5m/b158/search/optim.learning_rate=0.02000/model").exists()
    assert (tmp_path / "gutenberg_5m/b158/base/seed=1/model").exists()


def test_the_same_line_again_does_nothing(study, tmp_path, capfd):
    assert study(TWINS) == 0
    before = (tmp_path / "results.jsonl").read_text()
    capfd.readouterr()
    assert study(TWINS) == 0
    assert (tmp_path / "results.jsonl").read_text() == before and "bitnet_lit.train" not in capfd.readouterr().out


def test_the_tables_alone_go_into_a_page(modules, study, tmp_path):
    """It needs neither GPUs nor data."""
    assert study(TWINS, "seeds=[1]") == 0
    page = tmp_path / "page.md"
    page.write_text(f"{modules['tables'].BEGIN}{modules['tables'].END}")
    assert (
        modules["study"].main(
            [f"out={tmp_path}", TWINS, "seeds=[1]", "trials=3", "budget_minutes=0", f"into={page}"], []
        )
        == 0
    )
    assert "### The twins at equal tokens" in page.read_text()


def test_weights_of_a_run_that_still_holds_its_folder_are_removed_later(modules, study, tmp_path):
    run = tmp_path / "gutenberg_5m/b158/search/optim.learning_rate=0.01000"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules["results"].shutil, "rmtree", lambda *_, **__: None)
        assert study(TWINS, "seeds=[1]") == 0
    results = modules["results"].Results(tmp_path)
    sweep = next(each for each in default_plan(modules).sweeps if each.name == "gutenberg_5m/b158/search")
    with locked(run):
        assert results.collect(sweep) == [] and (run / "checkpoints").is_dir()
    assert results.collect(sweep) == [] and not (run / "checkpoints").exists() and (run / "metrics.json").exists()


def test_it_goes_on_without_the_folders_and_with_a_line_cut_off(study, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN_JOBS", "2")
    assert study(TWINS) == 1  # the searches have two of three trials
    assert len(lines_of(tmp_path)) == 4
    for name in ("gutenberg_5m", "logs"):
        shutil.rmtree(tmp_path / name)
    results = tmp_path / "results.jsonl"
    results.write_text(results.read_text()[:-30])
    monkeypatch.delenv("STAND_IN_JOBS")
    capfd.readouterr()
    assert study(TWINS, "seeds=[1,2]") == 0
    said = capfd.readouterr().out
    seed = zlib.crc32(b"gutenberg_5m")
    assert f"sweep.n_trials=1 sweep.seed={seed + 2}" in said and f"sweep.n_trials=2 sweep.seed={seed + 1}" in said
    searched = [json.loads(line)["sweep"] for line in results.read_text().splitlines() if line.endswith("}")]
    assert sorted(searched) == sorted(
        f"gutenberg_5m/{quant}/{what}" for quant in ("b158", "none") for what in 3 * ["search"] + 2 * ["base"]
    )
    assert study(TWINS, "seeds=[1,2,3]") == 0 and "seed=3" in capfd.readouterr().out


def test_a_trial_that_diverged_counts_and_is_never_the_best(study, tmp_path):
    assert study("order=[search gutenberg_5m]", "trials=5") == 0  # the last rate is 0.16
    diverged = [line for line in lines_of(tmp_path) if line["state"] == "diverged"]
    assert len(diverged) == 2 and all(line["loss"] is None for line in diverged)
    assert "| 5 (1 diverged) |" in (tmp_path / "tables.md").read_text()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["overrides=[trainer.max_steps=20]"], "search has a result without trainer.max_steps, and this plan has"),
        (["trials=4"], "trials=4: .*/base has results with the best of 3 trials: give trials=3, or another out="),
    ],
)
def test_results_of_another_plan_are_refused(study, tmp_path, typed, message, capsys):
    assert study(TWINS, "seeds=[1]") == 0
    before = lines_of(tmp_path)
    capsys.readouterr()
    assert study(TWINS, "seeds=[1]", *typed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line) and lines_of(tmp_path) == before


def test_other_seeds_are_counted_as_runs_that_are_left(study, tmp_path, capfd):
    assert study(TWINS, "seeds=[1,2,3]") == 0
    assert study(TWINS, "seeds=[4,5]") == 0
    assert "seed=4,5" in (out := capfd.readouterr().out) and "n_jobs=-1" not in out


def test_results_of_a_trial_of_small_sizes_are_refused(study, capsys):
    assert study(TWINS, "seeds=[1]", "overrides=[trainer.max_steps=20]") == 0
    assert study(TWINS, "seeds=[1,2]") == 2
    assert "search has a result with trainer.max_steps=20, this plan has none: give another" in capsys.readouterr().err


def test_options_widths_and_times_stand_beside_the_base(study, tmp_path):
    kinds = ("search", "seeds", "wide", "equal_bytes", "same_time", "options")
    order = f"order=[{', '.join(f'{kind} gutenberg_5m' for kind in kinds)}]"
    options = (
        "options={wsd: {overrides: [schedule=wsd], twins: [b158]}, "
        "distill: {overrides: ['distill.teacher={dense_run}'], twins: [b158]}}"
    )
    assert study(order, options, "seeds=[1,2]") == 0
    found = {line["sweep"]: line["overrides"] for line in lines_of(tmp_path)}
    assert found["gutenberg_5m/b158/wide"]["model.hidden_size"] == "512"
    assert found["gutenberg_5m/b158/equal_bytes"]["model.hidden_size"] == "640"
    assert found["gutenberg_5m/b158/wsd"]["schedule"] == "wsd"
    assert int(found["gutenberg_5m/b158/same_time"]["trainer.max_tokens"]) == 36_300_000  # 1.1 times as fast
    assert found["gutenberg_5m/b158/distill"]["distill.teacher"] == str(tmp_path / "gutenberg_5m/none/base/seed=1")
    page = (tmp_path / "tables.md").read_text()
    assert "| 1.1 k | 1 k | 1.100 |" in page and "wsd: `schedule=wsd`" in page


def test_a_teacher_on_another_machine_is_trained_again(study, tmp_path, capfd):
    steps = ("search", "seeds", "options")
    order = f"order=[{', '.join(f'{kind} gutenberg_5m' for kind in steps)}]"
    distill = "distill: {overrides: ['distill.teacher={dense_run}'], twins: [b158]}"
    assert study(order, "options={wsd: {overrides: [schedule=wsd], twins: [b158]}}", "seeds=[2,3]") == 0
    before = (tmp_path / "results.jsonl").read_text()
    shutil.rmtree(tmp_path / "gutenberg_5m")  # as after a copy of results.jsonl
    capfd.readouterr()
    assert study(order, f"options={{{distill}}}", "seeds=[2,3]") == 0
    begun = re.findall(r"gutenberg_5m/(\S+) on the CPU.* (seed=\S+)", capfd.readouterr().out)
    assert begun == [("none/base", "seed=2"), ("b158/distill", "seed=2,3")]
    after = (tmp_path / "results.jsonl").read_text()
    assert after.startswith(before)
    added = [json.loads(line) for line in after.removeprefix(before).splitlines()]
    assert [line["sweep"] for line in added] == ["gutenberg_5m/b158/distill"] * 2
    (teacher,) = (tmp_path / "gutenberg_5m" / "none" / "base").iterdir()
    assert teacher.name.startswith("experiment=")  # as `train -m` names the only job of a sweep
    assert {line["overrides"]["distill.teacher"] for line in added} == {str(teacher)} and (teacher / "model").is_dir()


def test_runs_too_short_for_a_speed_leave_out_the_same_time(study, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("STAND_IN_SPEED", "")
    assert study("order=[search gutenberg_5m, same_time gutenberg_5m]", "seeds=[1]") == 1
    assert "gutenberg_5m/b158/same_time: the runs for the speed logged no tokens/s" in capsys.readouterr().err
    assert "tokens/s" not in (tmp_path / "tables.md").read_text()


def test_the_pictures_show_what_is_there(study, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    order = "order=[search gutenberg_5m, seeds gutenberg_5m, options gutenberg_5m b158]"
    options = "options={wsd: {overrides: [schedule=wsd], twins: [b158]}}"
    assert study(order, options, "seeds=[1,2]", f"pictures={tmp_path / 'new'}") == 0
    assert (tmp_path / "new" / "recipes_options.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "a_file").write_text("")
    assert study(order, options, "seeds=[1,2]", f"pictures={tmp_path / 'a_file'}") == 2
    assert "a_file: cannot be written (File exists): give another folder" in capsys.readouterr().err


def test_the_options_that_helped_are_combined(study, modules, tmp_path):
    """Of two options that set one key the better one counts, and one that makes it worse does not."""
    options = {
        "wsd": "schedule=wsd, stand_in.gain=0.02",
        "two_stage": "schedule=two_stage, stand_in.gain=0.01",
        "qk_norm": "model.qk_norm=true, stand_in.more_gain=0.01",
        "absmedian": "quant.weight_scale=absmedian, stand_in.other_gain=-0.01",
    }
    typed = ", ".join(f"{name}: {{overrides: [{keys}], twins: [b158]}}" for name, keys in options.items())
    steps = ("search", "seeds", "options", "combined")
    order = f"order=[{', '.join(f'{kind} gutenberg_5m' for kind in steps)}]"
    assert study(order, f"options={{{typed}}}", "seeds=[1,2]") == 0
    found = {line["sweep"]: line for line in lines_of(tmp_path)}
    overrides = found["gutenberg_5m/b158/combined"]["overrides"]
    assert (overrides["schedule"], overrides["model.qk_norm"], overrides.get("quant.weight_scale")) == (
        "wsd",
        "true",
        None,
    )
    assert found["gutenberg_5m/b158/combined"]["loss"] == pytest.approx(0.122 - 0.03)
    assert "gutenberg_5m/none/combined" not in found  # no option was tried with it
    assert "`schedule=wsd`" in (tmp_path / "tables.md").read_text()


def test_b158_gets_the_options_of_the_dense_twins_combination(study, tmp_path, capfd):
    """It begins from its own best trial, and a teacher whose folder is missing is trained again before it."""
    steps = [f"{kind} gutenberg_5m" for kind in ("search", "seeds", "options", "combined")]
    options = (
        "options={wsd: {overrides: [schedule=wsd, stand_in.gain=0.02], twins: [none]}, "
        "distill: {overrides: ['distill.teacher={dense_run}', stand_in.more_gain=0.01], twins: [none]}, "
        "sherry: {overrides: [quant=sherry, stand_in.other_gain=0.03], twins: [b158]}}"
    )
    assert study(f"order=[{', '.join(steps)}]", options) == 0
    shutil.rmtree(tmp_path / "gutenberg_5m")
    capfd.readouterr()
    order = f"order=[same_options gutenberg_5m, {', '.join(steps)}]"
    assert study(order, options) == 0
    begun = re.findall(r"gutenberg_5m/(\S+) on the CPU.* (seed=\S+)", capfd.readouterr().out)
    assert begun == [("none/base", "seed=1"), ("b158/same_options", "seed=1,2,3")]
    found = {line["sweep"].removeprefix("gutenberg_5m/"): line["overrides"] for line in lines_of(tmp_path)}
    (teacher,) = (tmp_path / "gutenberg_5m" / "none" / "base").iterdir()
    options_of_dense = {"schedule": "wsd", "stand_in.gain": "0.02", "stand_in.more_gain": "0.01"}
    wanted = found["b158/base"] | options_of_dense | {"distill.teacher": str(teacher)}
    assert found["b158/same_options"] == wanted
    page = (tmp_path / "tables.md").read_text().partition("### Both twins with the dense twin's options")[2]
    (row,) = re.findall("^[|] gutenberg_5m .*", page.partition("###")[0], re.MULTILINE)
    half = quantile_975(2) * 0.001 / math.sqrt(3)
    assert f"| +0.1020 ± {half:.4f} | -0.0300 ± 0.0000 |" in row


def test_without_options_that_helped_the_dense_twin_b158_is_not_tried_with_them(study, tmp_path, capfd):
    steps = ("same_options", "search", "seeds", "options", "combined")  # whatever the order
    order = f"order=[{', '.join(f'{kind} gutenberg_5m' for kind in steps)}]"
    options = "options={wsd: {overrides: [schedule=wsd, stand_in.gain=-0.01], twins: [none]}}"
    assert study(order, options) == 0
    assert "same_options" not in {line["sweep"].rpartition("/")[2] for line in lines_of(tmp_path)}
    capfd.readouterr()
    assert study(order, options, "dry_run=true") == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("0 runs, ")


def test_the_end_of_the_budget_ends_the_sweeps(study, monkeypatch, tmp_path):
    monkeypatch.setenv("STAND_IN_SECONDS", "3600")
    assert study(TWINS, "budget_minutes=0.005") == 3
    assert not (tmp_path / "results.jsonl").exists()


def test_gpus_share_their_room(modules):
    plan = default_plan(modules)
    sweeps = {sweep.name: sweep for sweep in plan.sweeps}
    search, base = sweeps["gutenberg_5m/b158/search"], sweeps["gutenberg_5m/b158/base"]
    pool = modules["pool"].Pool(["0", "1"], 6)
    assert pool.place_for(search, 16) == (0, 6)

    def take(sweep, place, jobs):
        pool.running.append(modules["pool"].Running(sweep, None, place, jobs, 0.0))

    take(search, 0, 6)
    assert pool.place_for(base, 3) == (1, 3)
    take(base, 1, 3)
    assert pool.place_for(base, 3) == (1, 3) and pool.place_for(search, 16) is None
    alone = sweeps["gutenberg_5m/b158/speed"]
    assert pool.place_for(alone, 1) is None
    pool.running.clear()
    take(alone, 0, 1)
    assert pool.place_for(base, 3) is None


def test_tables_go_between_the_marks_of_a_page(modules, tmp_path):
    tables, page = modules["tables"], tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.put_into(page, "new")
    assert page.read_text() == f"before\n{tables.BEGIN}\n\nnew\n{tables.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(UserError, match="no page with one"):
        tables.put_into(page, "new")
    text = (REPOSITORY / "docs" / "recipes.md").read_text()
    assert text.count(tables.BEGIN) == text.count(tables.END) == 1


def test_missing_data_and_gpus_are_said_at_once(modules, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(modules["study"].signal, "signal", lambda *_: None)
    monkeypatch.setattr(modules["study"], "visible_gpus", list)
    data = f"data={{gutenberg: {tmp_path}, tinystories: {tmp_path}}}"
    for typed, message in ((["gpus=0"], "no shards there"), ([], "no GPU is visible"), (["gpus=2"], "shows 0")):
        assert modules["study"].main([f"out={tmp_path / 'out'}", data, *typed], STAND_IN) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_sweep_is_started_once_more_and_then_its_error_is_told(study, capsys, monkeypatch):
    monkeypatch.setenv("STAND_IN_JOBS", "0")
    assert study("order=[search gutenberg_5m b158]") == 1
    first, second, *_ = capsys.readouterr().err.splitlines()
    told = "gutenberg_5m/b158/search: exit status 1, error: as the test wants it (see "
    assert first.startswith(f"once more: {told}") and second.startswith(f"failed: {told}")


def test_a_search_whose_process_died_goes_on(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN_DIES", str(tmp_path / "died"))
    assert study("order=[search gutenberg_5m b158]") == 0
    assert (
        len(lines_of(tmp_path)) == 3
        and "once more: gutenberg_5m/b158/search: exit status -9" in capsys.readouterr().err
    )


def test_overrides_that_a_run_would_refuse_end_the_study_at_once(study, tmp_path, capsys):
    assert study(TWINS, "overrides=[trainer.max_tokens=many]") == 2
    assert "trainer.max_tokens=many: must be a number of tokens" in capsys.readouterr().err
    assert study(TWINS, "overrides=[trainer.max_steps=many]") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: overrides=['trainer.max_steps=many']: ")
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_prints_what_it_does_and_the_keys(modules, capsys, flag):
    assert modules["study"].main([flag], STAND_IN) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("The study of recipes: does a 1.58-bit model lose") and "jobs_per_gpu: 6 #" in printed
    assert all(f"\n{key}:" in printed for key in default_plan(modules).settings)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("trial=3", "trial=3: give key=value with one of"),
        ("trials=0", "trials=0: must be a whole number, at least 1"),
        ("budget_minutes=soon", "budget_minutes=soon: must be a number"),
        ("order=[search gutenberg_6m]", "order: search gutenberg_6m: give one of"),
        ("order=[search]", "order: search : give one of"),
        ("order=[search gutenberg_5m b1]", "order: search gutenberg_5m b1: its twins are b158 and none"),
        ("order=[combined gutenberg_5m]", "order: combined gutenberg_5m: needs a step options"),
        ("seeds=[]", "seeds=\\[\\] is empty"),
        ("dry_run=ture", "dry_run=ture: must be true or false"),
        ("seeds=1,2", "seeds=1,2: must be a list such as"),
        ("seeds=3", "seeds=3: must be a list such as"),
        ("seeds=[a]", "must be a list such as"),
        ("options=3", "options=3: must be a mapping"),
        ("options={wsd: [schedule=wsd]}", "options.wsd.overrides=None: must be a list"),
        ("trials=2.5", "trials=2.5: must be a whole number"),
        ("gpus=1.5", "gpus=1.5: must be a whole number"),
        ("overrides=trainer.max_steps=3", "overrides=trainer.max_steps=3: must be a list"),
        ("overrides=[trainer.max_steps]", "overrides=\\['trainer.max_steps'\\]: "),
        ("data={gutenberg: /tmp}", "data: no folder for tinystories"),
        ("order=[search gutenberg_5m, same_options gutenberg_5m]", "same_options needs gutenberg_5m/none/combined"),
        ("order=[seeds gutenberg_5m]", "gutenberg_5m/b158/base needs gutenberg_5m/b158/search: add its step"),
    ],
)
def test_a_mistake_is_one_line(study, typed, message, capsys):
    assert study(typed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_a_combination_waits_for_its_search_and_not_for_a_failed_option(modules, tmp_path):
    steps = ", ".join(f"{kind} gutenberg_5m" for kind in ("search", "seeds", "options", "combined"))
    study = modules["study"].Study(default_plan(modules, f"order=[{steps}]", f"out={tmp_path}"), [], "")
    study.failed = dict.fromkeys(("gutenberg_5m/b158/search", "gutenberg_5m/b158/wsd"), "out of memory")
    assert study._is_over("gutenberg_5m/b158/wsd") and not study._is_over("gutenberg_5m/b158/search")


def test_a_combination_that_began_keeps_its_options(modules, tmp_path, monkeypatch):
    """Further seeds may change what helps; the tables and further runs name what the first runs had."""
    steps = ", ".join(f"{kind} gutenberg_5m" for kind in ("search", "seeds", "options", "combined"))
    plan = default_plan(modules, f"order=[{steps}]", f"out={tmp_path}")
    results = modules["results"].Results(tmp_path)
    had = {
        "experiment": "recipes/gutenberg_5m",
        "quant": "sherry",
        "model.qk_norm": "true",
        "distill.teacher": "/a/run",
    }
    sweep = plan.by_name["gutenberg_5m/b158/combined"]
    results.records[sweep.name, "seed=1"] = {"sweep": sweep.name, "overrides": had, "values": {"seed": "1"}}
    options = {"quant": "sherry", "model.qk_norm": "true", "distill.teacher": "{dense_run}"}
    assert results.combination(plan, sweep) == options
    monkeypatch.setattr(results, "is_complete", lambda sweep: True)
    results.check(plan)  # quant=sherry is an option's, no sign of another plan


def test_a_scheme_and_the_keys_of_another_scheme_clash(modules):
    clash = modules["results"]._clash
    assert clash({"quant": "sherry"}, {"quant.weight_scale": "absmedian"})
    assert clash({"quant.activation_bits": "4"}, {"quant": "tequila"})
    assert clash({"model.qk_norm": "true"}, {"model.qk_norm": "true"})
    assert not clash({"quant": "sherry"}, {"quant.start_at": "0.3"})
    assert not clash({"quant.activation_bits": "4"}, {"quant.weight_scale": "absmedian", "model.qk_norm": "true"})
