"""Weights that are rounded once per optimizer step, where a step has several forward passes."""

import pytest

from bitnet_lit.cli import compose
from bitnet_lit.quant.bit_linear import BitLinear, bit_linear_reference
from bitnet_lit.quant.kernels import choose
from bitnet_lit.quant.kernels.interface import Kernels
from bitnet_lit.training.callbacks.step_log import StepLog
from bitnet_lit.training.run import train
from tests.support import TINY_RUN


class Counting(Kernels):
    """Kernels for the CPU that compute the reference, and note how weights are held."""

    name = "triton"

    def __init__(self):
        self.rounded, self.passes_with, self.passes_without = 0, 0, 0

    def refusal(self, layers, device, dtype):
        return None

    def normed_linears(self, x, norm, layers):
        if layers[0].held is None:
            self.passes_without += 1
        else:
            self.passes_with += 1
        if norm is not None:
            x = norm.weight * x
        return tuple(bit_linear_reference(x, layer.weight, layer.bias, layer.scheme) for layer in layers)

    def hold(self, layers, dtype, before):
        assert all(isinstance(layer, BitLinear) for layer in layers)
        self.rounded += 1
        return before or [len(layers)]


def counted(monkeypatch, tmp_path, shards, *overrides):
    kernels = Counting()
    monkeypatch.setitem(choose.KERNELS, "cpu", kernels)
    train(compose("train", [f"run_dir={tmp_path}/run", f"data.dir={shards}", *TINY_RUN, *overrides]))
    return kernels


def test_once_for_each_optimizer_step_and_not_in_validation(tmp_path, shards, monkeypatch):
    overrides = ("trainer.max_steps=3", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=3")
    kernels = counted(monkeypatch, tmp_path, shards, *overrides)
    groups = kernels.rounded // 3
    assert kernels.rounded == 3 * groups > 0
    assert kernels.passes_with == 3 * 2 * groups
    assert kernels.passes_without > 0


def test_one_batch_for_each_step_rounds_in_the_forward_pass(tmp_path, shards, monkeypatch):
    kernels = counted(monkeypatch, tmp_path, shards, "trainer.max_steps=2")
    assert kernels.rounded == kernels.passes_with == 0


def test_a_run_that_ends_between_two_batches_of_a_step_holds_nothing(tmp_path, shards, monkeypatch):
    networks, were_held = [], []

    def stop(self, trainer, module, outputs, batch, batch_idx):
        networks.append(module.model)
        were_held.extend(layer.held for layer in module.model.modules() if isinstance(layer, BitLinear))
        raise ZeroDivisionError

    monkeypatch.setattr(StepLog, "on_train_batch_end", stop)
    with pytest.raises(ZeroDivisionError):
        counted(monkeypatch, tmp_path, shards, "trainer.accumulate_grad_batches=2")
    assert any(were_held)
    assert not any(layer.held for layer in networks[0].modules() if isinstance(layer, BitLinear))
