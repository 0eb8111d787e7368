"""An error of the GPU is one line, and a process that lost its GPU ends without an abort. No GPU is needed here."""

import subprocess
import sys

import pytest
import torch

from bitnet_lit import entry_point, gpu_errors
from bitnet_lit.errors import GpuError
from bitnet_lit.training.failures import in_one_line

# Messages of PyTorch 2.9 and later (c10/cuda/CUDAException.cpp) and of Triton.
LAUNCH_FAILURE = (
    "CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure' in https://docs.nvidia.com/cuda/"
    "cuda-runtime-api/group__CUDART__TYPES.html for more information.\nCUDA kernel errors might be asynchronously "
    "reported at some other API call, so the stacktrace below might be incorrect.\nFor debugging consider passing "
    "CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
TRITON = "Triton Error [CUDA]: an illegal memory access was encountered"


@pytest.fixture
def lost(monkeypatch):
    """A GPU that does not answer any more."""

    def synchronize():
        raise RuntimeError(LAUNCH_FAILURE)

    monkeypatch.setattr(gpu_errors, "_kept", [])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (LAUNCH_FAILURE, "CUDA error: unspecified launch failure"),
        (TRITON, TRITON),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_a_run_says_what_is_kept_and_what_to_try(tmp_path, monkeypatch, lost, message, shown):
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("x")
    with pytest.raises(GpuError) as raised, in_one_line(lambda: tmp_path, world_size=2, rank=0):
        raise torch.AcceleratorError(message)
    text = str(raised.value)
    assert text.startswith(f"{shown}; the last checkpoint is kept: go on with python -m bitnet_lit.train resume=")
    assert "CUDA_LAUNCH_BLOCKING=1" in text and "quant.kernel=reference" in text and "Search for" not in text
    assert gpu_errors.is_lost() and raised.value.status == 1


def test_who_looks_for_the_place_gets_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    with pytest.raises(torch.AcceleratorError), in_one_line(lambda: tmp_path, 1, 0):
        raise torch.AcceleratorError(LAUNCH_FAILURE)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://x"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("shapes do not match"),
        ValueError("CUDA error: quoted by a user"),
    ],
)
def test_other_errors_are_none_of_the_gpu(lost, error):
    gpu_errors.note(error)
    assert not gpu_errors.is_gpu_error(error) and not gpu_errors.is_lost()
    assert gpu_errors.names_gpu_error(str(error)) == isinstance(error, ValueError)  # a text has no class


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (
            torch.AcceleratorError(LAUNCH_FAILURE.replace("unspecified launch failure", "out of memory")),
            " (CUDA error: out of memory)",
        ),
        (MemoryError(), ""),
    ],
    ids=["GPU", "Python"],
)
def test_too_little_memory_is_one_line_with_the_remedy(capsys, error, what):
    def work():
        raise error

    assert entry_point._status_of(work) == 1
    assert capsys.readouterr().err == f"error: out of memory{what}: take a smaller batch, context or model\n"


def test_a_gpu_that_still_answers_is_not_lost(lost, monkeypatch):
    """A launch with wrong arguments fails alone: "invalid configuration argument"."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu_errors.note(torch.AcceleratorError("CUDA error: invalid configuration argument"))
    assert not gpu_errors.is_lost()


def test_a_rank_among_others_does_not_wait_for_its_gpu(lost, monkeypatch):
    """A collective on the GPU would wait for ranks that have not failed."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("waits"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    gpu_errors.note(torch.AcceleratorError(LAUNCH_FAILURE))
    assert gpu_errors.is_lost()


def test_no_destructor_runs_in_a_process_that_lost_its_gpu():
    """A tensor's destructor would abort the process. Here one that runs sets another exit status."""
    script = """
import os
from bitnet_lit import entry_point, gpu_errors
gpu_errors._answers = lambda: False
class Held:
    def __del__(self): os._exit(134)
def fail():
    held = Held()
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nCUDA kernel errors might be reported")
entry_point.leave(fail)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "error: CUDA error: an illegal memory access was encountered: CUDA_LAUNCH_BLOCKING=1 shows where\n"
    )
