"""The files of examples/cluster: what they start, what they do when a signal comes, and that a run goes on.

srun, scontrol and torchrun are stand-ins that write down how they were called. What they were told to start is then
started in small: ranks with the environment of SLURM or torchrun, in processes that are forked.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from bitnet_lit.errors import UserError
from bitnet_lit.training import run as training_run
from bitnet_lit.training.callbacks.checkpoints import Checkpoints
from tests.forked import call_command
from tests.support import REPOSITORY, TINY_RUN, fork_server

CLUSTER = REPOSITORY / "examples" / "cluster"
TASKS = {"SLURM_JOB_ID": "70", "SLURM_JOB_NAME": "bitnet", "SLURM_NODELIST": "localhost"}

STAND_IN = """#!{python} -S
import json, os, signal, sys, time
name = os.path.basename(sys.argv[0])
with open(name + ".json.tmp", "w") as file:
    json.dump(sys.argv[1:], file)
if name == "srun":
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(138))  # as a run that has saved
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
os.rename(name + ".json.tmp", name + ".json")
while name == "srun" and not os.path.exists("srun_ends"):
    time.sleep(0.02)
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder with a bin/ of stand-ins, in which the files of examples/cluster are run."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("srun", "scontrol", "torchrun"):
        (programs / name).write_text(STAND_IN.format(python=sys.executable))
        (programs / name).chmod(0o755)
    return tmp_path


def start(cluster, script, *arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = f"{cluster / 'bin'}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", CLUSTER / script, *arguments], cwd=cluster, env=inherited | environment | {"PATH": path}
    )


@contextlib.contextmanager
def job(cluster, *arguments, nodes=2, tasks=1):
    """A job of train.sbatch whose srun runs."""
    sizes = {"SLURM_NNODES": str(nodes), "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_JOB_ID": "70"}
    process = start(cluster, "train.sbatch", *arguments, **sizes)
    try:
        called(cluster, "srun")
        yield process
        process.wait(30)
    finally:
        process.kill()
        process.wait()
        (cluster / "srun_ends").touch()


def called(cluster, name, seconds=30):
    """Wait until a program is called, and return its arguments."""
    deadline = time.monotonic() + seconds
    while not (cluster / f"{name}.json").exists():
        assert time.monotonic() < deadline, name
        time.sleep(0.02)
    return json.loads((cluster / f"{name}.json").read_text())


def test_the_directives_are_those_that_the_script_counts_on():
    text = (CLUSTER / "train.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert text.count("#SBATCH") == len(options)
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # a process on each GPU
    assert options["signal"].startswith("B:USR1@") and "requeue" in options  # to the shell, which sends it on
    assert options["open-mode"] == "append" and "%j" in options["output"]
    assert "ntasks" not in options  # SLURM_NTASKS_PER_NODE would be missing


@pytest.mark.parametrize("is_complete", [False, True])
def test_a_job_whose_time_is_up_saves_and_is_queued_again_unless_it_is_complete(cluster, is_complete):
    (cluster / "run").mkdir()
    with job(cluster, "run", "seed=1") as process:
        if is_complete:
            (cluster / "run" / "metrics.json").touch()
        process.send_signal(signal.SIGUSR1)
    assert process.returncode == 138
    if is_complete:
        assert not (cluster / "scontrol.json").exists()
    else:
        assert called(cluster, "scontrol") == ["requeue", "70"]


def test_a_job_that_is_cancelled_is_not_queued_again(cluster):
    with job(cluster, "run") as process:
        process.send_signal(signal.SIGTERM)  # SLURM sends it to the processes too
        time.sleep(0.2)
        assert process.poll() is None  # it waits for them
        (cluster / "srun_ends").touch()
    assert process.returncode == 0 and not (cluster / "scontrol.json").exists()


def test_the_same_command_starts_a_run_and_goes_on_with_it(cluster):
    (cluster / "srun_ends").touch()
    typed = ["my run", "data.dir=a b", "allow=[mine]"]
    both = ["trainer.devices=4", "trainer.num_nodes=2"]
    train = ["-m", "bitnet_lit.train"]
    command = ["--kill-on-bad-exit=1", "--cpus-per-task=1", "python", *train]
    with job(cluster, *typed, tasks=4):
        pass
    assert called(cluster, "srun") == [*command, "hydra.run.dir=my run", *typed[1:], *both]
    nodes = {"GPUS": "4", "NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    assert start(cluster, "torchrun.sh", *typed, **nodes).wait(30) == 0
    of_torchrun = called(cluster, "torchrun")
    assert of_torchrun[of_torchrun.index("-m") :] == [
        "-m",
        "bitnet_lit.train",
        "hydra.run.dir=my run",
        *typed[1:],
        *both,
    ]
    assert of_torchrun[:10] == [
        *("--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "4"),
        *("--master-addr", "10.0.0.1", "--master-port", "29500"),
    ]
    for name in ("srun.json", "torchrun.json"):
        (cluster / name).unlink()
    checkpoint = cluster / "my run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    with job(cluster, *typed, tasks=4):
        pass
    assert called(cluster, "srun") == [*command, "resume=my run", "allow=[mine]", *both]
    assert start(cluster, "torchrun.sh", *typed, **nodes).wait(30) == 0
    of_torchrun = called(cluster, "torchrun")
    assert of_torchrun[of_torchrun.index("-m") :] == [*train, "resume=my run", "allow=[mine]", *both]


@pytest.mark.parametrize(
    ("script", "program", "environment"),
    [("train.sbatch", "srun", {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1"}), ("torchrun.sh", "torchrun", {})],
)
def test_a_run_that_is_complete_is_left_as_it_is_until_it_is_made_longer(cluster, capfd, script, program, environment):
    (cluster / "srun_ends").touch()
    (cluster / "run" / "checkpoints").mkdir(parents=True)
    (cluster / "run" / "checkpoints" / "last.ckpt").touch()
    (cluster / "run" / "metrics.json").write_text(json.dumps({"warmup_steps": 3, "steps": 40, "tokens": 7}, indent=2))
    longer = ["resume=run", "trainer.max_steps=60", "schedule.total_steps=60"]

    assert start(cluster, script, "run", "trainer.max_steps=60", **environment).wait(30) == 0
    said, warned = capfd.readouterr()
    assert said.startswith("run: complete at step 40. To go on: ") and said.count("\n") == 1 and not warned
    assert f"{script} run {' '.join(longer)}".replace("=60", "=<more>") in said
    assert not (cluster / f"{program}.json").exists()

    assert start(cluster, script, "run", *longer, **environment).wait(30) == 0
    arguments = called(cluster, program)
    assert arguments[arguments.index("bitnet_lit.train") + 1 :][:-2] == longer  # without the numbers of GPUs and nodes
    (cluster / f"{program}.json").unlink()

    (cluster / "run" / "metrics.json").write_text(json.dumps({"steps": 60}))  # and queued again
    assert start(cluster, script, "run", *longer, **environment).wait(30) == 0
    assert capfd.readouterr().out.startswith("run: complete at step 60. ")
    assert not (cluster / f"{program}.json").exists()


@pytest.mark.parametrize(
    ("typed", "is_longer"),
    [
        ("trainer.max_steps=60", False),
        ("trainer.max_steps=6e1", False),
        ("trainer.max_steps=0_060", False),
        ("trainer.max_steps=59", False),
        ("trainer.max_steps=61", True),
        ("trainer.max_steps=600", True),
        ("trainer.max_steps=6.1e+1", True),
        ("trainer.max_tokens=61_000", False),  # of 1,024 tokens a step: the last step has a few more
        ("trainer.max_tokens=6.2e4", True),
        ("trainer.max_tokens=null", True),  # train says what it thinks of these
        ("trainer.max_epochs=3", True),
    ],
)
def test_a_length_is_compared_as_a_number(cluster, capfd, typed, is_longer):
    (cluster / "srun_ends").touch()
    (cluster / "run").mkdir()
    (cluster / "run" / "metrics.json").write_text(json.dumps({"tokens": 61440, "steps": 60, "perf/tokens_per_s": 7}))
    sizes = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1"}
    for script, program in (("train.sbatch", "srun"), ("torchrun.sh", "torchrun")):
        assert start(cluster, script, "run", "resume=run", typed, **sizes).wait(30) == 0
        said, warned = capfd.readouterr()
        assert (cluster / f"{program}.json").exists() == is_longer and not warned
        assert said.startswith("run: complete at step 60. ") != is_longer


class Prepared(L.LightningDataModule):
    """Data that the first process prepares slowly, and that every process then reads."""

    vocab_size = 50

    def __init__(self, batch_size, sequence_length):
        super().__init__()
        self.batch_size, self.sequence_length = batch_size, sequence_length

    def prepare_data(self):
        time.sleep(0.5)
        with Path("prepared.txt").open("a") as file:
            file.write("prepared\n")

    def setup(self, stage):
        assert Path("prepared.txt").exists()
        rows = torch.arange(40)[:, None] + torch.arange(self.sequence_length + 1)
        self.rows = rows**2 % self.vocab_size

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=self.batch_size, shuffle=True)

    val_dataloader = train_dataloader


def statuses_of(arguments, environments, prepare=lambda number: None):
    """Run the command once with each environment, at the same time, each behind `prepare(its number)`."""
    children = []
    for number, environment in enumerate(environments):
        child = os.fork()
        if child == 0:
            os.environ |= environment
            prepare(number)
            try:
                call_command("train", arguments)
                status = 0
            except SystemExit as end:
                status = end.code
            os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def ranks(arguments, environments, stops):
    """Run the command once with each environment, at the same time. Where `stops`, USR1 reaches one rank at step 3."""
    original = Checkpoints.on_train_batch_end

    def on_train_batch_end(self, trainer, *others):
        if stops and trainer.global_step == 3 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        original(self, trainer, *others)

    Checkpoints.on_train_batch_end = on_train_batch_end
    statuses = {*statuses_of(arguments, environments)}
    assert len(statuses) == 1, statuses
    sys.exit(statuses.pop())


def ranks_of_which_one_fails(arguments, environments, name):
    """Run the command once with each environment. A part of the start fails in the last one."""

    def refuse(*_, **__):
        raise UserError(f"no {name} on this machine")

    def prepare(number):
        if number == len(environments) - 1:
            setattr(training_run, name, refuse)

    print(statuses_of(arguments, environments, prepare))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["import_classes", "open_data", "build_loggers", "describe"])
def test_where_one_process_cannot_begin_all_of_them_end(tmp_path, shards, name):
    arguments = [*TINY_RUN, f"data.dir={shards}", "hydra.run.dir=run", "trainer.num_nodes=2", "trainer.devices=1"]
    given = slurm_tasks(2, 1, free_port())
    result = fork_server().run(ranks_of_which_one_fails, arguments, given, name, cwd=tmp_path, seconds=100)
    other = f"error: the start of {tmp_path / 'run'} has failed in process 1 of the run, which says why"
    assert sorted(result.output.splitlines()) == sorted(["[2, 2]", f"error: no {name} on this machine", other])
    assert not (tmp_path / "run" / "config.yaml").exists()


def slurm_tasks(nodes, tasks, port):
    """What srun sets for each process."""
    common = TASKS | {
        "SLURM_NTASKS": str(nodes * tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_NNODES": str(nodes),
        "MASTER_PORT": port,
    }
    places = [(node, place) for node in range(nodes) for place in range(tasks)]
    return [
        common | {"SLURM_PROCID": str(number), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(place)}
        for number, (node, place) in enumerate(places)
    ]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


@pytest.mark.slow
def test_a_job_that_is_stopped_goes_on_on_other_nodes_with_the_same_command(cluster):
    (cluster / "srun_ends").touch()
    data = [f"data._target_={__name__}.Prepared", "data.batch_size=4", "allow=[tests]", "callbacks.sample_prompts=[]"]
    typed = ["run", *TINY_RUN, *data, "trainer.accumulate_grad_batches=2", "trainer.limit_val_batches=null"]
    for nodes, tasks, status in ((2, 1, 138), (1, 4, 0)):  # 16 sequences a step on two ranks, and then on four
        with job(cluster, *typed, nodes=nodes, tasks=tasks):
            pass
        arguments = called(cluster, "srun")
        arguments = arguments[arguments.index("bitnet_lit.train") + 1 :]
        (cluster / "srun.json").unlink()
        given = slurm_tasks(nodes, tasks, free_port())
        result = fork_server().run(ranks, arguments, given, status == 138, cwd=cluster, seconds=250)
        assert result.status == status, result.output
        assert (cluster / "run" / "checkpoints" / "last.ckpt").exists()
    assert "SIGUSR1 at step 3 of 8: saved" not in result.output
    figures = json.loads((cluster / "run" / "metrics.json").read_text())
    assert figures["steps"] == 8 and figures["tokens"] == 8 * 16 * 32
    assert (cluster / "prepared.txt").read_text() == "prepared\n" * 2  # by the first process of each job
    assert not list((cluster / "run").rglob("hpc_ckpt*"))  # Lightning's way to requeue is off
