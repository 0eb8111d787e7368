"""Tokens a second, utilisation and waiting, on a clock that the test turns."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.model import build_model
from bitnet_lit.native import library
from bitnet_lit.quant.kernels import cpu
from bitnet_lit.training.callbacks import throughput
from bitnet_lit.training.callbacks.throughput import Throughput, peak_flops, peak_memory_bytes
from bitnet_lit.training.module import BitNetModule

PLAN = SimpleNamespace(tokens_per_step=100, accounting=SimpleNamespace(training_flops_per_token=1e6))


class Module(BitNetModule):
    """A module that was not built, and keeps what it is given."""

    device = torch.device("cpu")
    model = None

    def __init__(self):
        object.__setattr__(self, "step_figures", Given())

    @property
    def logged(self):
        return self.step_figures.logged


class Given(dict):
    """Reads the figures of each logged step, which are functions until then."""

    def __init__(self):
        self.logged = []

    def __ior__(self, figures):
        self.logged.append({name: figure() if callable(figure) else figure for name, figure in figures.items()})
        return self


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision, network: 1e9)
    return now


def steps(callback, clock, module, count, *, waiting=1.0, computing=3.0, accumulate=1, every=2, world_size=1):
    trainer = SimpleNamespace(
        accumulate_grad_batches=accumulate, log_every_n_steps=every, global_step=0, world_size=world_size
    )
    callback.on_train_start(trainer, module)
    for batch in range(count * accumulate):
        clock.seconds += waiting
        callback.on_train_batch_start(trainer, module, None, batch)
        clock.seconds += computing
        trainer.global_step = (batch + 1) // accumulate
        callback.on_train_batch_end(trainer, module, None, None, batch)
    return trainer


def test_figures_of_a_window(clock):
    module = Module()
    steps(Throughput(PLAN, "32-true"), clock, module, 4)
    assert len(module.logged) == 2  # every second step
    for figures in module.logged:
        assert figures["perf/tokens_per_s"] == pytest.approx(2 * 100 / 8)
        assert figures["perf/mfu"] == pytest.approx(25 * 1e6 / 1e9)
        assert figures["perf/data_wait_share"] == pytest.approx(1 / 4)
        assert figures["perf/peak_memory_gib"] == pytest.approx(peak_memory_bytes(module.device) / 2**30, rel=0.01)


def test_accumulated_batches_are_one_step_and_devices_share_the_peak(clock):
    module = Module()
    steps(Throughput(PLAN, "32-true"), clock, module, 2, accumulate=3, world_size=2)
    assert module.logged[-1]["perf/tokens_per_s"] == pytest.approx(2 * 100 / 24)
    assert module.logged[-1]["perf/mfu"] == pytest.approx(2 * 100 / 24 * 1e6 / 2e9)


def test_validation_does_not_count(clock):
    module, callback = Module(), Throughput(PLAN, "32-true")
    trainer = steps(callback, clock, module, 1)
    callback.on_validation_start(trainer, module)
    clock.seconds += 1000
    callback.on_validation_end(trainer, module)
    clock.seconds += 1
    callback.on_train_batch_start(trainer, module, None, 1)
    clock.seconds += 3
    trainer.global_step = 2
    callback.on_train_batch_end(trainer, module, None, None, 1)
    assert module.logged[-1]["perf/tokens_per_s"] == pytest.approx(2 * 100 / 8)


def test_a_known_gpu_is_held_against_its_data_sheet_and_others_are_measured(monkeypatch):
    monkeypatch.setattr(throughput, "measured_peak_flops", lambda device, dtype: (device.type, dtype))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), "bf16-mixed") == 989e12
    assert peak_flops(torch.device("cuda"), "32-true") == ("cuda", torch.float32)
    assert peak_flops(torch.device("cpu"), "bf16-true") == ("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("quant", "has_compiler", "has_amx", "peak"),
    [
        (QuantConfig(), True, True, 6e9),
        (QuantConfig(name="none"), True, True, 6e9),
        (QuantConfig(), True, False, 1e9),
        (QuantConfig(), False, True, 1e9),
        (QuantConfig(kernel="reference"), True, True, 1e9),
        (QuantConfig(name="none", kernel="reference"), True, True, 1e9),
    ],
)
def test_a_cpu_is_held_against_the_products_that_its_kernels_compute(monkeypatch, quant, has_compiler, has_amx, peak):
    """With AMX they multiply in bfloat16, so the figure of float32 would give an MFU above 1.

    The reference multiplies in float32, where the figure of bfloat16 would give a sixth of it.
    """
    speeds = {torch.float32: 1e9, torch.bfloat16: 6e9}
    monkeypatch.setattr(throughput, "measured_peak_flops", lambda device, dtype: speeds[dtype])
    monkeypatch.setattr(cpu, "_missing", lambda: None if has_compiler else "no C++ compiler")
    monkeypatch.setattr(library, "has_amx", lambda: has_amx)
    model = build_model(ModelConfig(hidden_size=16, num_hidden_layers=1, vocab_size=8), quant)
    assert peak_flops(torch.device("cpu"), "32-true", model) == peak


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/cpuinfo says what the processor has")
def test_the_compiled_functions_use_amx_only_where_there_is_one():
    if not library.is_available():
        pytest.skip("no C++ compiler")
    assert library.has_amx() in (False, "amx_bf16" in Path("/proc/cpuinfo").read_text())
