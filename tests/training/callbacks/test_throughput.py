"""Tokens a second, utilisation and waiting, on a clock that the test turns."""

import time
from types import SimpleNamespace

import pytest
import torch

from bitnet_lit.training.callbacks import throughput
from bitnet_lit.training.callbacks.throughput import Throughput, peak_flops, peak_memory_bytes
from bitnet_lit.training.module import BitNetModule

PLAN = SimpleNamespace(tokens_per_step=100, accounting=SimpleNamespace(training_flops_per_token=1e6))


class Module(BitNetModule):
    """A module that was not built, and keeps what it is given."""

    device = torch.device("cpu")

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
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 1e9)
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


@pytest.mark.parametrize(("has_amx", "peak"), [(True, 6e9), (False, 1e9)])
def test_a_cpu_is_held_against_its_fastest_product(monkeypatch, has_amx, peak):
    """BitNet's codes are multiplied in bfloat16 there, so the figure of float32 would give an MFU above 1."""
    speeds = {torch.float32: 1e9, torch.bfloat16: 6e9}
    monkeypatch.setattr(throughput, "measured_peak_flops", lambda device, dtype: speeds[dtype])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert peak_flops(torch.device("cpu"), "32-true") == peak
