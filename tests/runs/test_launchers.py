"""Jobs side by side compute what they compute one after the other; SLURM's jobs go on after a requeue."""

import json
import signal

import pytest
from omegaconf import OmegaConf

from bitnet_lit import cli
from bitnet_lit.errors import TrainingStopped, UserError
from bitnet_lit.runs import sweep
from bitnet_lit.runs.grid import check_launcher
from tests.support import TINY_RUN, run_command


def figures(folder):
    """What a run computed, without how fast and where."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if not key.startswith("perf/") and key != "run_dir"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package"), [("joblib", "hydra_plugins.hydra_joblib_launcher"), ("submitit_local", "submitit")]
)
def test_jobs_side_by_side_compute_the_same(tmp_path, shards, launcher, package):
    pytest.importorskip(package, reason=f"launcher={launcher} needs a package")
    arguments = ["-m", *TINY_RUN, f"data.dir={shards}", "callbacks=quiet", "seed=1,2"]
    run_command("train", *arguments, f"launcher={launcher}", "hydra.sweep.dir=beside", cwd=tmp_path)
    # The same line without the launcher finds everything done; another folder trains anew, one after the other.
    again = run_command("train", *arguments, "hydra.sweep.dir=beside", cwd=tmp_path)
    assert "2 jobs, 2 done" in again.stderr
    run_command("train", *arguments, "hydra.sweep.dir=alone", cwd=tmp_path)
    for seed in (1, 2):
        beside, alone = (figures(tmp_path / name / f"seed={seed}") for name in ("beside", "alone"))
        assert beside == alone


def test_a_signal_to_a_job_of_slurm_is_for_that_job_alone(tmp_path, monkeypatch):
    """It has saved. Then submitit's handler, which was there before the run's, queues the job again and ends it."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")

    def requeue(number, frame):
        raise SystemExit(-1)

    def stopped():
        raise TrainingStopped("SIGUSR2 at step 1: saved", status=128 + signal.SIGUSR2)

    previous = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit):
            sweep.run_job(stopped, tmp_path / "0", tmp_path, is_main_process=False)
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert sweep.stop_number(tmp_path) is None and not (tmp_path / "0" / "error.txt").exists()


def test_a_job_of_slurm_gets_what_the_launcher_says(tmp_path):
    """The sbatch file that submitit would send, from the keys of conf/launcher/submitit_slurm.yaml."""
    slurm = pytest.importorskip("submitit.slurm.slurm", reason="launcher=submitit_slurm needs the package submitit")
    given = OmegaConf.load(cli.CONF_DIR / "launcher" / "submitit_slurm.yaml").hydra.launcher
    resources = {"mem": f"{given.mem_gb}GB", "time": given.timeout_min, "gpus_per_node": given.gpus_per_node}
    text = slurm._make_sbatch_string("python x", str(tmp_path), cpus_per_task=given.cpus_per_task, **resources)
    for line in ("--time=240", "--gpus-per-node=1", "--cpus-per-task=8", "--mem=32GB", "--open-mode=append"):
        assert f"#SBATCH {line}" in text
    assert "USR2" in text  # a signal that a run takes for a request to save


def test_mistakes_are_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    config = OmegaConf.create({"hydra": {"launcher": {"_target_": "hydra_plugins.x.SlurmLauncher"}}})
    with pytest.raises(UserError, match="launcher=submitit_slurm: no srun on this machine"):
        check_launcher(config)
