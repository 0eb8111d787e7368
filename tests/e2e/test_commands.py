"""The commands, as a user types them. One chain and the wheel start Python anew, and the others fork a process."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import bitnet_lit
from bitnet_lit.composed_config import CONF_DIR
from tests.support import REPOSITORY, TINY_MODEL, TINY_RUN, run_command, start_command

EXPERIMENTS = sorted(path.stem for path in Path(CONF_DIR, "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards):
    """A folder in which a run was made."""
    cwd = tmp_path_factory.mktemp("trained")
    run_command("train", f"data.dir={shards}", *TINY_RUN, "hydra.run.dir=outputs/run", cwd=cwd)
    return cwd


def test_prepare_train_evaluate_infer(tmp_path):
    options = ["source=demo", "num_stories=200", "vocab_size=400"]
    prepared = start_command("prepare", *options, "out=data/demo", cwd=tmp_path)
    assert prepared.stderr.endswith("\nnext: python -m bitnet_lit.train data.dir=data/demo\n")
    result = start_command("train", *TINY_RUN, cwd=tmp_path)  # data/demo is the default
    assert "parameters" in result.stderr and "tokens in all" not in result.stdout
    evaluated = start_command("evaluate", cwd=tmp_path).stdout
    printed = dict(line.split(None, 1) for line in evaluated.splitlines())
    assert {"loss", "perplexity", "bits_per_byte", "accuracy"} <= printed.keys()
    metrics = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    assert float(printed["loss"]) == pytest.approx(metrics["val/loss"], rel=1e-3)
    story = start_command("infer", "prompt=Once upon a time", "seed=1", "max_new_tokens=20", cwd=tmp_path)
    assert story.stdout.startswith("Once upon a time") and story.stderr == ""
    again = start_command("infer", "prompt=Once upon a time", "seed=1", "max_new_tokens=20", cwd=tmp_path)
    assert again.stdout == story.stdout


def test_a_plain_train_makes_its_own_corpus(tmp_path):
    run_command("train", *TINY_RUN, "trainer.max_steps=2", cwd=tmp_path)
    assert (tmp_path / "data" / "demo" / "meta.json").exists()
    assert list((tmp_path / "outputs").rglob("model/config.json"))


def test_help_lists_the_options_of_each_group_and_no_schema(tmp_path):
    (tmp_path / "conf" / "optim").mkdir(parents=True)
    (tmp_path / "conf" / "optim" / "sgd.yaml").write_text("_target_: torch.optim.SGD\n")
    text = run_command("train", "--help", "--config-dir", "conf", cwd=tmp_path).stdout
    assert "\noptim: adamw, custom, muon, sgd\n" in text and "schema" not in text


def test_several_samples_and_prompts_from_stdin(trained):
    several = run_command("infer", "num_samples=2", "seed=1", "max_new_tokens=8", cwd=trained).stdout
    one = run_command("infer", "seed=1", "max_new_tokens=8", cwd=trained).stdout
    assert several.startswith(one) and several.count("---") == 1
    lines = "Lily\nTom\n\nQuill\n"  # Quill is no name of the demo, which a text may hold
    typed = run_command("infer", "interactive=true", "max_new_tokens=4", cwd=trained, input=lines).stdout
    assert "Lily" in typed and "Tom" in typed and "Quill" not in typed


def test_an_empty_and_a_too_long_prompt(trained):
    assert run_command("infer", "prompt=", "seed=1", "max_new_tokens=8", cwd=trained).stdout.strip()
    long = run_command("infer", "prompt=" + "Lily went home " * 40, "max_new_tokens=8", cwd=trained)
    assert "note: the prompt has" in long.stderr and "kept the last 31" in long.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("infer", ["checkpoint=nowhere"], "checkpoint=nowhere: no such file or folder"),
        ("infer", ["temprature=1"], "unknown key 'temprature': did you mean 'temperature'?"),
        ("infer", ["top_p=2"], "must lie in (0, 1]"),
        ("evaluate", ["checkpoint=."], "no model there"),
        ("evaluate", ["accelerator=tpu"], "must be one of auto, cpu, gpu, cuda, mps"),
        ("prepare", ["source=nowhere", "out=x"], "no such file, folder or glob"),
        ("prepare", ["source=demo", "out=x", "tokenizer=a", "vocab_size=3"], "give one"),
        ("train", ["data.dir=nowhere"], "no such folder"),
        ("train", ["model=15mm"], "did you mean '15m'?"),
        ("train", ["resume=nowhere"], "no such folder"),
        ("train", ["model.hidden_size=x"], "could not be converted to Integer"),
        ("plot", ["runs=[nowhere]"], "runs=nowhere: no such folder"),
        ("report", ["runs=nowhere"], "runs=nowhere: no such folder"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(tmp_path, command, arguments, message):
    result = run_command(command, *arguments, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("model"))


@pytest.mark.parametrize("command", ["train", "prepare", "evaluate", "infer", "plot"])
def test_help_tells_what_the_command_does(tmp_path, command):
    result = start_command(command, "--help", cwd=tmp_path)
    assert f"python -m bitnet_lit.{command}" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_sweep_with_a_failing_job_keeps_the_others(tmp_path, shards):
    arguments = ["-m", f"data.dir={shards}", *TINY_RUN, "model.num_attention_heads=2,3", "seed=1,2"]
    result = run_command("train", *arguments, "hydra.sweep.dir=outputs/s", cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    with (tmp_path / "outputs" / "s" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [f"model.num_attention_heads={heads}__seed={seed}" for heads in (2, 3) for seed in (1, 2)]
    assert [row["job"] for row in rows] == names
    assert "outputs/s failed:" in result.stderr and f"  {names[2]}: " in result.stderr
    assert "UserError" not in result.stderr
    assert all(float(row["val loss"]) > 0 for row in rows[:2])
    assert all("does not divide" in row["error"] for row in rows[2:])
    assert "val loss" in result.stdout
    assert len(list(tmp_path.rglob("model/model.safetensors"))) == 2


@pytest.mark.slow
def test_every_kind_of_weights_in_one_sweep(tmp_path, shards):
    """Six run folders, six model folders, one table."""
    arguments = ["-m", f"data.dir={shards}", "quant=b158,b1,none", "seed=1,2", "mode=smoke", "trainer=cpu"]
    result = run_command("train", *arguments, cwd=tmp_path)
    assert len(list(tmp_path.rglob("model/config.json"))) == 6
    assert len(list(tmp_path.rglob("metrics.json"))) == 6
    assert len(list(tmp_path.rglob("sweep.csv"))) == 1 and result.stdout.count("val loss") == 1
    run_command("plot", "runs=outputs", "out=curves.png", cwd=tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    result = run_command("report", "runs=outputs", "by=quant", "over=seed", "out=compared", cwd=tmp_path)
    with (tmp_path / "compared" / "report.csv").open(encoding="utf-8") as file:
        rows = {row["quant"]: row for row in csv.DictReader(file)}
    assert {name: (row["runs"], row["gap_at_equal_tokens_pairs"]) for name, row in rows.items()} == {
        "b1": ("2", "2"),
        "b158": ("2", "2"),
        "none": ("2", "0"),
    }
    assert float(rows["b158"]["val/loss_ci95"]) > 0 and "gap at equal tokens" in result.stdout


@pytest.mark.slow
def test_a_scheme_of_ones_own_by_the_command_line_alone(tmp_path, shards):
    """A file beside the data: it trains, goes on, is saved by its name, and is imported only when its user says so."""
    shutil.copy(REPOSITORY / "tests" / "quant" / "toy_schemes.py", tmp_path / "my_schemes.py")
    own = ["quant._target_=my_schemes.Quinary", "quant.skip=[lm_head, down_proj]"]
    run_command("train", f"data.dir={shards}", *TINY_RUN, *own, "hydra.run.dir=outputs/run", cwd=tmp_path)
    config = (tmp_path / "outputs" / "run" / "config.yaml").read_text()
    longer = ["resume=outputs/run", "trainer.max_steps=10", "schedule.total_steps=8"]
    refused = run_command("train", *longer, cwd=tmp_path, check=False)
    assert refused.returncode == 2 and "allow=[my_schemes.Quinary]" in refused.stderr
    run_command("train", *longer, "schemes=[my_schemes.Quinary]", cwd=tmp_path)
    assert "_target_: my_schemes.Quinary" in config
    assert "_target_: my_schemes.Quinary" in (tmp_path / "outputs" / "run" / "config.yaml").read_text()
    metrics = json.loads((tmp_path / "outputs" / "run" / "metrics.json").read_text())
    saved = json.loads((tmp_path / "outputs" / "run" / "model" / "config.json").read_text())["bitnet_lit"]["quant"]
    assert metrics["steps"] == 10 and saved == {"name": "quinary", "skip": ["lm_head", "down_proj"]}
    with (tmp_path / "outputs" / "run" / "ternary_health.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["layer"].split(".")[-1] for row in rows} == {f"{k}_proj" for k in ("q", "k", "v", "o", "gate", "up")}
    refused = run_command("evaluate", cwd=tmp_path, check=False)
    assert refused.returncode == 2 and "quant.name=quinary: must be one of b158" in refused.stderr
    assert refused.stderr.count("\n") == 1
    evaluated = run_command("evaluate", "schemes=[my_schemes.Quinary]", cwd=tmp_path).stdout
    printed = dict(line.split(None, 1) for line in evaluated.splitlines())
    assert float(printed["loss"]) == pytest.approx(metrics["val/loss"], rel=1e-3)
    packed = run_command("export", "format=packed", "schemes=[my_schemes.Quinary]", "out=packed", cwd=tmp_path)
    assert "logits differ by 0.0e+00" in packed.stdout


def test_the_learning_rate_grid_runs_side_by_side(tmp_path, shards):
    grid = ["-m", "sweep=lr", "launcher=joblib", "hydra.sweep.dir=grid", "mode=smoke"]
    start_command("train", *grid, *TINY_MODEL, f"data.dir={shards}", "trainer.accelerator=cpu", cwd=tmp_path)
    runs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("grid/*/metrics.json"))]
    assert len(runs) == 6
    chosen = [OmegaConf.load(path) for path in tmp_path.glob("grid/*/config.yaml")]
    assert {(one.quant.name, one.optim.learning_rate) for one in chosen} == {
        (quant, rate) for quant in ("b158", "none") for rate in (1e-2, 2e-2, 4e-2)
    }


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_with_tiny_limits(tmp_path, shards, experiment):
    arguments = [f"experiment={experiment}", f"data.dir={shards}", *TINY_RUN, "trainer.max_steps=2"]
    dense = {
        "convert_dense": ["init_from=outputs/dense", "quant.lambda_warmup_steps=1"],
        "distill": ["distill.teacher=outputs/dense"],
    }.get(experiment)
    if dense:
        run_command("train", "quant=none", f"data.dir={shards}", *TINY_RUN, "hydra.run.dir=outputs/dense", cwd=tmp_path)
        arguments += dense
    run_command("train", *arguments, cwd=tmp_path)
    assert list(tmp_path.rglob("model/model.safetensors"))


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(tmp_path, shards):
    # The seeded order gives both the same samples; gradients are averaged over the processes in another order.
    one = ["data.batch_size=4", "trainer.accelerator=cpu"]
    two = ["trainer=ddp_sim", "data.batch_size=2"]
    tiny = [item for item in TINY_RUN if not item.startswith(("data.batch_size", "trainer.accelerator"))]
    losses, least = [], []
    for name, how in (("one", one), ("two", two)):
        run = f"hydra.run.dir=outputs/{name}"
        run_command("train", f"data.dir={shards}", *tiny, *how, "optim=adamw", "quant=none", run, cwd=tmp_path)
        figures = json.loads((tmp_path / "outputs" / name / "metrics.json").read_text())
        losses.append(figures["val/loss"])
        least.append(figures["val/best_loss"])  # over a part of the validation split, which both divide alike
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and least[0] == pytest.approx(least[1], rel=1e-4)
    assert least[0] != pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_the_wheel_works_from_an_empty_directory(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    wheel = next((tmp_path / "dist").glob("*.whl"))
    shutil.unpack_archive(wheel, site, "zip")
    assert (site / "bitnet_lit" / "conf" / "model" / "demo.yaml").exists()
    assert (site / "bitnet_lit" / "py.typed").exists()
    sources = Path("bitnet_lit") / "inference" / "engines" / "cpu" / "csrc"
    assert {path.name for path in (site / sources).iterdir()} == {
        path.name for path in (REPOSITORY / "src" / sources).iterdir()
    }
    described = next(site.glob("*.dist-info"))
    assert "bitnet-lit = bitnet_lit.__main__:main" in (described / "entry_points.txt").read_text()
    assert f"\nVersion: {bitnet_lit.__version__}\n" in (described / "METADATA").read_text()
    assert (described / "licenses" / "LICENSE").read_text() == (REPOSITORY / "LICENSE").read_text()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import bitnet_lit.cli as c; print(c.CONF_DIR)"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.strip() == str(site / "bitnet_lit" / "conf")
    start_command(
        "prepare", "source=demo", "num_stories=100", "vocab_size=400", "out=data/demo", cwd=empty, env=environment
    )
    start_command("train", *TINY_RUN, "trainer.max_steps=2", cwd=empty, env=environment)
    assert start_command("infer", "max_new_tokens=5", cwd=empty, env=environment).stdout.startswith("Once upon a time")


def test_evaluate_refuses_data_of_another_tokenizer(trained, tmp_path):
    run_command("prepare", "source=demo", "num_stories=100", "vocab_size=420", "out=other", cwd=tmp_path)
    result = run_command("evaluate", f"checkpoint={trained}/outputs/run", "data_dir=other", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "not the one that wrote" in result.stderr
