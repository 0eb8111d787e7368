"""Jobs side by side compute what they compute one after the other; SLURM's jobs go on after a requeue."""

import json
import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bitnet_lit import cli, gpu_errors
from bitnet_lit.errors import TrainingStopped, UserError
from bitnet_lit.runs import sweep
from bitnet_lit.runs.grid import check_launcher
from bitnet_lit.runs.job_folder import State
from bitnet_lit.runs.launch import Planned, ProcessDied, launch, why_it_died
from tests.runs import aborting_job
from tests.runs.aborting_job import GPU_ERROR
from tests.support import TINY_RUN, run_command, start_command


def figures(folder):
    """What a run computed, without how fast and where."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if not key.startswith("perf/") and key != "run_dir"}


@pytest.fixture(scope="module")
def arguments(shards):
    return ["-m", *TINY_RUN, f"data.dir={shards}", "callbacks=quiet", "seed=1,2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, arguments):
    """Jobs that ran one after the other."""
    folder = tmp_path_factory.mktemp("alone")
    run_command("train", *arguments, "hydra.sweep.dir=jobs", cwd=folder)
    return folder / "jobs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package"), [("joblib", "hydra_plugins.hydra_joblib_launcher"), ("submitit_local", "submitit")]
)
def test_jobs_side_by_side_compute_the_same(tmp_path, arguments, alone, launcher, package):
    pytest.importorskip(package, reason=f"launcher={launcher} needs a package")
    start_command("train", *arguments, f"launcher={launcher}", "hydra.sweep.dir=beside", cwd=tmp_path)
    # The same line without the launcher finds everything done.
    again = run_command("train", *arguments, "hydra.sweep.dir=beside", cwd=tmp_path)
    assert "2 jobs, 2 done" in again.stderr
    for seed in (1, 2):
        assert figures(tmp_path / "beside" / f"seed={seed}") == figures(alone / f"seed={seed}")


class Joblib:
    """Stands for Hydra's launcher, whose processes would import torch first."""

    def launch(self, jobs, initial_job_idx):
        joblib = pytest.importorskip("joblib", reason="launcher=joblib needs a package")
        return joblib.Parallel(n_jobs=2)(joblib.delayed(aborting_job.run)(Path(job[0])) for job in jobs)


def test_a_process_that_a_gpu_error_aborts_ends_no_other_job(tmp_path, capfd):
    """joblib ends the processes beside it. Their jobs begin again in new ones."""
    for name in "bc":  # of an earlier start; a run that goes on removes it
        (tmp_path / name).mkdir()
        (tmp_path / name / "error.txt").write_text("SIGTERM at step 3 of 9: saved\n")
    launch(Joblib(), [Planned([str(tmp_path / name)], tmp_path / name, State.NEW) for name in "abc"], tmp_path, 0)
    assert sorted(path.parent.name for path in tmp_path.glob("*/metrics.json")) == ["b", "c"]
    assert "a: its GPU error ended 2 other jobs: they go on in new processes" in capfd.readouterr().err


def test_a_gpu_error_of_the_last_job_ends_the_round_with_what_it_told(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "began").write_text("")  # nobody is waited for
    assert launch(Joblib(), [Planned([str(tmp_path / "a")], tmp_path / "a", State.NEW)], tmp_path, 0) == []
    assert GPU_ERROR in (tmp_path / "a" / "error.txt").read_text()


class Processes:
    """Stands for a launcher: each job of a round is run by `run_job`, in the order given."""

    def __init__(self, works):
        self.works, self.rounds = works, []

    def launch(self, jobs, initial_job_idx):
        self.rounds.append([job[0] for job in jobs])
        with pytest.MonkeyPatch.context() as patch:  # a round has new processes, which have their GPU
            patch.setattr(gpu_errors, "_kept", [])
            patch.setattr(gpu_errors, "_answers", lambda: False)
            patch.setattr(sweep.atexit, "register", lambda *_: None)
            for name, _ in jobs:
                folder = self.sweep_dir / name
                sweep.run_job(self.works[name], folder, self.sweep_dir, is_main_process=False)
        return []


def test_a_process_that_lost_its_gpu_takes_no_further_job(tmp_path, capsys):
    def lose():
        raise RuntimeError(f"{GPU_ERROR}\nSearch for `cudaErrorLaunchFailure' in https://docs.nvidia.com")

    def done(name):
        return lambda: (tmp_path / name).mkdir() or (tmp_path / name / "metrics.json").write_text("{}")

    launcher = Processes({"a": lose, "b": done("b"), "c": done("c")})
    launcher.sweep_dir = tmp_path
    launch(launcher, [Planned([name], tmp_path / name, State.NEW) for name in "abc"], tmp_path, 0)
    assert launcher.rounds == [["a", "b", "c"], ["b", "c"]]
    assert (tmp_path / "a" / "error.txt").read_text() == f"RuntimeError: {GPU_ERROR}\n"
    printed = capsys.readouterr().err
    assert "Traceback" not in printed and "its GPU error ended 2 other jobs: they go on in new processes" in printed


def test_the_jobs_of_one_process_that_lost_its_gpu_say_why_they_did_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_errors, "_kept", [RuntimeError(GPU_ERROR)])
    assert sweep.run_job(pytest.fail, tmp_path / "0", tmp_path, is_main_process=True) == float("inf")
    assert "not started: the GPU error of an earlier job" in (tmp_path / "0" / "error.txt").read_text()


@pytest.mark.parametrize(
    ("exit_code", "reason", "said"),
    [
        ("SIGKILL(-9)", None, "killed, most likely for memory: take fewer"),
        ("SIGABRT(-6)", None, "was ended by SIGABRT: its last lines say more"),
        ("EXIT(1)", "s/a: IndexError: 7", "died, most likely of the error of s/a: IndexError: 7"),
        ("SIGABRT(-6)", "s/a: IndexError: 7", "died, most likely of the error of s/a: IndexError: 7"),
        ("SIGABRT(-6), SIGKILL(-9)", "s/a: IndexError: 7", "died, most likely of the error of s/a: IndexError: 7"),
        ("SIGKILL(-9)", "s/a: IndexError: 7", "killed, most likely for memory: take fewer"),
    ],
)
def test_why_a_process_died(exit_code, reason, said):
    error = BrokenProcessPool(f"A worker process ... The exit codes of the workers are {{{exit_code}}}")
    assert said in str(why_it_died(error, reason))


@pytest.mark.parametrize(
    ("told", "seconds_ago", "said"),
    [
        ("IndexError: 7", 2, "died, most likely of the error of .*seed=2: IndexError: 7"),
        ("IndexError: 7", 7200, "was ended by SIGSEGV"),  # other jobs have run since
        ("UserError: no data", 2, "was ended by SIGSEGV"),
    ],
)
def test_the_cause_is_the_reason_of_the_job_that_failed_just_before(tmp_path, told, seconds_ago, said):
    jobs = [Planned([f"seed={seed}"], tmp_path / f"seed={seed}", State.NEW) for seed in (1, 2, 3)]

    class Launcher:
        def launch(self, overrides, initial_job_idx):
            for seed, error, seconds in ((1, "KeyError: 'x'", 7201), (2, told, seconds_ago)):
                path = tmp_path / f"seed={seed}" / "error.txt"
                path.parent.mkdir()
                path.write_text(f"{error}\n")
                os.utime(path, (time.time() - seconds,) * 2)
            raise BrokenProcessPool("The exit codes of the workers are {SIGSEGV(-11)}")

    with pytest.raises(ProcessDied, match=said):
        launch(Launcher(), jobs, tmp_path, 0)


def test_a_kill_is_not_put_down_to_a_gpu_error(tmp_path, capsys):
    class Launcher:
        def launch(self, overrides, initial_job_idx):
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "error.txt").write_text(f"RuntimeError: {GPU_ERROR}\n")
            raise BrokenProcessPool("The exit codes of the workers are {SIGKILL(-9), SIGTERM(-15)}")

    with pytest.raises(ProcessDied, match="killed, most likely for memory: take fewer"):
        launch(Launcher(), [Planned([name], tmp_path / name, State.NEW) for name in "ab"], tmp_path, 0)
    assert "GPU error" not in capsys.readouterr().err


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
