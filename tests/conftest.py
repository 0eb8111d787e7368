"""What many tests share, and an environment without network, login or compiler runs.

A test tests the CPU, and sees no GPU where there is one. The marker `gpu` says that a test needs one, and
`@pytest.mark.gpu(count=2)` that it needs two: it sees them, `torch.compile` compiles there, and on a machine with fewer
it is skipped with the reason.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

# Before anything imports the libraries that read these.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}

import torch

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.tokenizers import Tokenizer, open_tokenizer

# A script that runs the tests in the background lets them ignore Ctrl-C, which the tests of signals send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
# Composing a config makes many small objects, and collections among all that was imported took a quarter of its time.
gc.freeze()
gc.set_threshold(100_000, 20, 20)
GPUS = torch.cuda.device_count()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (marker := item.get_closest_marker("gpu")) is None:
        return
    needed = marker.kwargs.get("count", 1)
    if needed > GPUS:
        pytest.skip("needs an NVIDIA GPU" if needed == 1 else f"needs {needed} NVIDIA GPUs, and there are {GPUS}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """`pytest -m gpu` is one process: each process on a GPU takes half a GB of it, and they wait for each other."""
    return 1 if config.option.markexpr == "gpu" else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test with the marker `gpu`, and its fixtures, see the GPUs and compile for them, and other tests see none.

    Processes that the test starts see the same, through their environment.
    """
    if not GPUS:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("gpu") is None:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            return (yield)
        from torch import _dynamo  # takes a second, and only these tests need it

        patch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # PyTorch reads it at each compilation
        result = yield
        _dynamo.reset()  # dynamo stops compiling a function that was compiled for many shapes in one process
        torch.cuda.empty_cache()
        return result


@pytest.fixture(autouse=True)
def handlers_of_signals() -> Generator[None]:
    """Give each test the handlers of signals that were there before: a command that runs in this process sets its own.

    A process that is forked by a later test would inherit them, and with a handler in Python it may outlive SIGTERM:
    when the signal comes just before a call that waits, the handler waits too.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of demo shards: 400 stories, a vocabulary of 512."""
    out = tmp_path_factory.mktemp("shards")
    prepare(PrepareConfig(source="demo", out=str(out), num_stories=400, vocab_size=512, num_workers=1))
    return out


@pytest.fixture(scope="session")
def tokenizer(shards: Path) -> Tokenizer:
    return open_tokenizer(shards / "tokenizer.model")
