"""Two processes train what one trains, by DDP and by FSDP2, and each goes on from the checkpoints of the others."""

import os
import shutil
import socket

import pytest
import torch

from bitnet_lit.cli import compose
from bitnet_lit.training.checkpoint_file import read_checkpoint
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN

STEPS, HALF = 8, 3  # of the whole run, and of the part after which another number of processes goes on
ONE = ["trainer.devices=1", "trainer.strategy=auto", "trainer.accumulate_grad_batches=2"]
# Two processes take one batch each of a step's two, and sum two gradients as one process does that accumulates.
TWO = {kind: ["trainer.devices=2", f"trainer.strategy={kind}"] for kind in ("ddp", "fsdp")}
# The prompt needs whole weights on rank 0.
RUN = ["optim=muon", "model.intermediate_size=36", "callbacks.sample_prompts=[Once]", f"schedule.total_steps={STEPS}"]
ON_CPU, ON_GPU = ["trainer.accelerator=cpu"], ["trainer.accelerator=gpu", "trainer.precision=32-true", "compile=false"]


def begin(folder, shards, steps, how, where):
    length = [f"trainer.max_steps={steps}", "trainer.val_check_interval=4"]
    train(compose("train", [f"run_dir={folder}", f"data.dir={shards}", *TINY_RUN, *RUN, *length, *how, *where]))


def go_on(folder, how):
    train(resume_config(str(folder), [f"trainer.max_steps={STEPS}", "trainer.accumulate_grad_batches=1", *how]))


def _rank(rank, port, folder, shards, where):
    """One of two processes, as a launcher starts them. It does every run that takes two."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    for kind, how in TWO.items():
        begin(folder / kind, shards, STEPS, how, where)
        begin(folder / f"{kind}_then_one", shards, HALF, how, where)
        go_on(folder / f"one_then_{kind}", how)
    torch.distributed.destroy_process_group()


def runs(folder, shards, where):
    """Do every run, on one device and on two, and return their folder."""
    begin(folder / "one", shards, STEPS, ONE, where)
    begin(folder / "one_then_ddp", shards, HALF, ONE, where)
    shutil.copytree(folder / "one_then_ddp", folder / "one_then_fsdp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, folder, shards, where), nprocs=2)
    for kind in TWO:
        go_on(folder / f"{kind}_then_one", ONE)
    return folder


@pytest.fixture(scope="module")
def on_cpus(tmp_path_factory, shards):
    return runs(tmp_path_factory.mktemp("cpus"), shards, ON_CPU)


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory, shards):
    return runs(tmp_path_factory.mktemp("gpus"), shards, ON_GPU)


def tensors(content, kind):
    """The weights, or the moments of a checkpoint, by name."""
    if kind == "state_dict":
        return content[kind]
    found = {}
    for part, state in enumerate(content[kind][0]["parts"]):
        for number, moments in state["state"].items():
            found |= {f"part {part}, parameter {number}: {name}": value for name, value in moments.items()}
    return found


def compare(folder, name, tolerance, figure_tolerance, kinds=("state_dict", "optimizer_states")):
    """Compare a run with the one on one device: weights, moments, losses, codes, samples, and the model folder."""
    one, other = (read_checkpoint(folder / run / "checkpoints" / "last.ckpt") for run in ("one", name))
    assert other["global_step"] == STEPS
    for kind in kinds:
        wanted, has = tensors(one, kind), tensors(other, kind)
        assert has.keys() == wanted.keys() and len(has) > 20
        for key, value in wanted.items():
            assert type(has[key]) is type(value) and has[key].shape == value.shape, key
            difference = (has[key].double() - value.double()).norm()
            assert float(difference) <= tolerance * float(value.double().norm()), key
    figures = [content["callbacks"]["Checkpoints"]["figures"] for content in (one, other)]
    for figure in ("val/loss", "train/loss", "ternary/minus", "ternary/zero", "ternary/plus"):
        assert figures[1][figure] == pytest.approx(figures[0][figure], rel=figure_tolerance), figure
    texts = [(folder / run / "samples.txt").read_text().partition(f"--- step {STEPS}\n")[2] for run in ("one", name)]
    assert texts[0] == texts[1] != ""
    assert (folder / name / "model" / "model.safetensors").exists()


NAMES = [name for kind in TWO for name in (kind, f"{kind}_then_one", f"one_then_{kind}")]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(on_cpus, name):
    # The ranks add the same two gradients. FSDP2 adds the squares of a norm in another order: float32's rounding.
    compare(on_cpus, name, 1e-5, 1e-5)


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("name", NAMES)
def test_two_gpus_are_one(on_gpus, name):
    # Newton-Schulz runs in bfloat16, and a stack of another length may sum in another order. Then some weights round to
    # another code, and gradients follow them.
    compare(on_gpus, name, 5e-2, 5e-3, kinds=("state_dict",))
