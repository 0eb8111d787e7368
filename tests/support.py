"""Small configs and models, and the commands as a user types them."""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.model import CausalLM, build_model
from tests.forked import ForkServer, call_as_typed

REPOSITORY = Path(__file__).parents[1]
TINYSTORIES = REPOSITORY.parent / "shared" / "tinystories"
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc, which only Linux has")
needs_dev_full = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="the system has no device that is always full"
)
names_are_any_bytes = pytest.mark.skipif(sys.platform == "darwin", reason="macOS takes no names that are not Unicode")
needs_tinystories = pytest.mark.skipif(
    not TINYSTORIES.is_dir(), reason=f"the TinyStories sample is not at {TINYSTORIES}"
)

TINY_MODEL = [
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=64",
    "model.max_position_embeddings=32",
]
"""Overrides that make a run take seconds."""

TINY_RUN = [
    *TINY_MODEL,
    "data.batch_size=4",
    "trainer.accelerator=cpu",
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    "trainer.limit_val_batches=2",
    "trainer.log_every_n_steps=1",
    "callbacks.sample_max_new_tokens=5",
]


def tiny_config(**sizes: object) -> ModelConfig:
    defaults: dict = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 512,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**{**defaults, **sizes})


def tiny_model(quant: str = "b158", seed: int = 0, **sizes: object) -> CausalLM:
    """A random model; weights ten times the usual spread, so that its logits differ clearly from token to token."""
    torch.manual_seed(seed)
    return build_model(tiny_config(initializer_range=0.2, **sizes), QuantConfig(name=quant)).eval()


def assert_close_but_for_borders(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits of one quantized network whose float32 sums run in two orders, as every kind of processor has its own.

    Where a last bit moves an activation over a rounding border its code changes by 1 of 127, and what comes after with
    it. 240 runs of `tiny_model` with last bits changed at random gave differences of at most 15 % of their spread,
    0.64 % in the RMS, and left at least 52 % of the logits as close as dense ones. Scales that are wrong by 0.1 % leave
    1 % of them, another eps or rope_theta 3 %; another network differs by 140 % in the RMS.
    """
    difference, spread = (ours - expected).float().abs(), ours.float().std()
    assert difference.max() < 0.3 * spread
    assert difference.square().mean().sqrt() < 0.02 * spread
    assert (difference < 1e-4 * spread).float().mean() > 0.3


@functools.cache
def fork_server() -> ForkServer:
    """The server of this process of pytest, for tests that need no other environment or imports."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def run_command(
    command: str, *arguments: str, cwd: Path, check: bool = True, input: str = ""
) -> subprocess.CompletedProcess:
    """`python -m bitnet_lit.<command> <arguments>`, in a process that is forked: a start costs seconds of imports."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        for stream, text in zip(streams, (input, "", ""), strict=True):
            stream.write_text(text)
        result = fork_server().run(
            call_as_typed, command, arguments, dict(os.environ), list(map(str, streams)), cwd=cwd, seconds=240
        )
        printed, said = (stream.read_text() for stream in streams[1:])
    assert result.status == 0 or not check, printed + said + result.output
    return subprocess.CompletedProcess([command, *arguments], result.status, printed, said)


def start_command(
    command: str, *arguments: str, cwd: Path, check: bool = True, **options
) -> subprocess.CompletedProcess:
    """`python -m bitnet_lit.<command> <arguments>` in a new interpreter, as a user types it.

    For tests of the start itself, of variables that are read at imports, of joblib's processes, and of GPUs.
    """
    result = subprocess.run(
        [sys.executable, "-m", f"bitnet_lit.{command}", *arguments],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=240,
        **options,
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


class Killed(BaseException):
    """Stands for a kill: no `except Exception` of a run catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the runs that follow die behind an optimizer step, until `monkeypatch.undo()`."""
    from bitnet_lit.training.callbacks.checkpoints import Checkpoints  # imports Lightning

    original = Checkpoints.on_train_batch_end

    def on_train_batch_end(self, trainer, *arguments):  # type: ignore[no-untyped-def]
        original(self, trainer, *arguments)
        if trainer.global_step == step:
            raise Killed

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", on_train_batch_end)
