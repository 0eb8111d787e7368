"""examples/my_project, as its reader uses it: copied elsewhere, by the command line alone, killed and gone on with."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.support import REPOSITORY, run_command

EXAMPLE = REPOSITORY / "examples" / "my_project"


@pytest.fixture
def project(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "mine"


@pytest.mark.slow
def test_a_run_with_everything_of_ones_own_is_killed_goes_on_and_is_evaluated(project):
    options = ["--config-dir", "conf", "experiment=sums", "hydra.run.dir=run"]
    endless = ["trainer.max_steps=100000", "trainer.val_check_interval=20"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bitnet_lit.train", *options, *endless],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not (project / "run" / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    length = ["trainer.max_steps=60", "schedule.total_steps=60"]
    refused = run_command("train", "resume=run", *length, cwd=project, check=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    allow = re.search(r"'(allow=\[\S+\])'$", refused.stderr.strip())[1]  # what the line says is what is typed
    run_command("train", "resume=run", *length, allow, cwd=project)
    figures = json.loads((project / "run" / "metrics.json").read_text())
    assert figures["steps"] == 60 and figures["quant"] == "threshold"
    with (project / "run" / "metrics.csv").open() as file:
        tokens = [row["train/tokens"] for row in csv.DictReader(file) if row["train/tokens"]]
    assert float(tokens[-1]) == 60 * 8 * 32  # the callback went on counting
    assert list((project / "run" / "second_csv").rglob("metrics.csv"))
    evaluated = run_command(
        "evaluate", "checkpoint=run", "schemes=[my_project.Threshold]", "allow=[my_project]", cwd=project
    )
    printed = dict(line.split(None, 1) for line in evaluated.stdout.splitlines())
    assert float(printed["loss"]) == pytest.approx(figures["val/loss"], rel=1e-3)
    named = ["formats=[my_format.Npy]", "schemes=[my_project.Threshold]"]
    run_command("export", "checkpoint=run", "format=npy", "out=arrays", *named, cwd=project)
    assert (project / "arrays" / "model.norm.weight.npy").is_file()
    assert (project / "run" / "samples.txt").read_text().startswith("--- step 20\n12 + 7 =")


@pytest.mark.slow
def test_a_network_of_ones_own_is_trained_and_evaluated(project):
    options = ["data=sums", "model=mixer", "trainer.max_steps=20", "trainer.accelerator=cpu", "hydra.run.dir=mixer"]
    run_command("train", "--config-dir", "conf", *options, cwd=project)
    named = ["networks=[my_project.Mixer]", "allow=[my_project]"]
    evaluated = run_command("evaluate", "checkpoint=mixer", *named, cwd=project).stdout
    figures = json.loads((project / "mixer" / "metrics.json").read_text())
    printed = dict(line.split(None, 1) for line in evaluated.splitlines())
    assert float(printed["loss"]) == pytest.approx(figures["val/loss"], rel=1e-3)


def test_classes_are_found_beside_the_config_dir(project, tmp_path):
    """From another folder, which has nothing of the project in it."""
    printed = run_command(
        "train", "--config-dir", str(project / "conf"), "experiment=sums", "--cfg", "job", cwd=tmp_path
    ).stdout
    config = yaml.safe_load(printed)
    assert config["data"] == {"_target_": "my_project.Sums", "batch_size": 8}
    assert config["optim"]["momentum"] == 0.9 and config["quant"]["_target_"] == "my_project.Threshold"
    unknown = run_command(
        "train", "--config-dir", str(project / "conf"), "experiment=sums", "data.largst=3", cwd=tmp_path, check=False
    )
    assert unknown.returncode == 2 and "did you mean largest?" in unknown.stderr
    assert unknown.stderr.count("\n") == 1


def test_the_readme_names_what_there_is():
    text = (EXAMPLE / "README.md").read_text()
    for group, option in re.findall(r"`(callbacks|optim|schedule|data|model|quant|experiment)=(\w+)`", text):
        assert (EXAMPLE / "conf" / group / f"{option}.yaml").is_file(), (group, option)
