"""Codes, flips and scales of the quantized matrices, computed here a second time by hand."""

import csv
from types import SimpleNamespace

import pytest
import torch

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.model import build_model
from bitnet_lit.training.callbacks import ternary_health
from bitnet_lit.training.callbacks.ternary_health import TernaryHealth
from bitnet_lit.training.strategies import shard_model


class Module(torch.nn.Module):
    """As much of the LightningModule as the callback looks at."""

    def __init__(self, quant):
        super().__init__()
        torch.manual_seed(0)
        config = ModelConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=32
        )
        self.model = build_model(config, QuantConfig(name=quant))
        self.logged = {}

    def forward(self, ids):
        return self.model(ids)

    def log_dict(self, figures):
        self.logged = figures


@pytest.fixture
def module(monkeypatch):
    monkeypatch.setattr(ternary_health, "BitNetModule", Module)
    return Module("b158")


def validate(callback, module, step=0, is_global_zero=True):
    trainer = SimpleNamespace(global_step=step, is_global_zero=is_global_zero, strategy=SimpleNamespace(model=module))
    callback.on_validation_epoch_end(trainer, module)


def rows(folder):
    with (folder / "ternary_health.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_shares_flips_and_scales_are_those_of_the_codes(tmp_path, module):
    callback, layer = TernaryHealth(tmp_path), module.model.model.layers[0].mlp.down_proj
    validate(callback, module, step=10)
    with torch.no_grad():
        layer.weight[0] *= -1  # turns the codes of one row that are not zero
    validate(callback, module, step=20)
    found = [row for row in rows(tmp_path) if row["layer"].endswith("down_proj")]
    assert [row["step"] for row in found] == ["10", "20"] and len(rows(tmp_path)) == 2 * 7
    scale = layer.weight.detach().abs().mean()
    codes = (layer.weight.detach() / scale).round().clamp(-1, 1)
    for name, code in (("minus", -1), ("zero", 0), ("plus", 1)):
        assert float(found[1][name]) == pytest.approx((codes == code).float().mean().item(), abs=1e-7)
    assert found[0]["flip_rate"] == "nan"
    assert float(found[1]["flip_rate"]) == pytest.approx((codes[0] != 0).sum().item() / codes.numel(), abs=1e-7)
    assert float(found[1]["weight_scale"]) == pytest.approx(scale.item(), rel=1e-6)


def test_the_means_are_logged_and_a_rate_that_there_is_not_is_left_out(tmp_path, module):
    callback = TernaryHealth(tmp_path)
    validate(callback, module)
    assert module.logged.keys() == {"ternary/minus", "ternary/zero", "ternary/plus", "ternary/weight_scale"}
    zero = [float(row["zero"]) for row in rows(tmp_path)]
    assert module.logged["ternary/zero"] == pytest.approx(sum(zero) / 7)
    validate(callback, module)
    assert module.logged["ternary/flip_rate"] == 0


def test_a_resumed_run_counts_the_flips_since_the_checkpoint_and_repeats_no_row(tmp_path, module):
    unbroken = TernaryHealth(tmp_path)
    validate(unbroken, module, step=10)
    checkpoint = {"callbacks": {"TernaryHealth": unbroken.state_dict()}}
    with torch.no_grad():
        for weight in module.model.model.layers.parameters():
            weight.neg_()
    validate(unbroken, module, step=20)
    expected = rows(tmp_path)

    resumed = TernaryHealth(tmp_path)
    resumed.on_load_checkpoint(SimpleNamespace(is_global_zero=True), module, checkpoint)
    assert rows(tmp_path) == expected[:7]
    validate(resumed, module, step=20)
    assert rows(tmp_path) == expected
    assert float(expected[-1]["flip_rate"]) > 0.5


def test_other_ranks_and_dense_models_write_nothing(tmp_path, module):
    validate(TernaryHealth(tmp_path), module, is_global_zero=False)
    validate(TernaryHealth(tmp_path), Module("none"))
    assert not list(tmp_path.iterdir())


def _on_a_rank(rank, folder):
    """One of two processes that have some rows of each matrix."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ternary_health.BitNetModule = Module
    module = Module("b158")
    shard_model(module.model, torch.device("cpu"), 2)
    with torch.no_grad():
        module.model(torch.zeros(1, 4, dtype=torch.int64))  # the callback comes behind a forward pass
    trainer = SimpleNamespace(global_step=10, is_global_zero=rank == 0)
    callback = TernaryHealth(folder)
    callback.on_validation_epoch_end(trainer, module)
    callback.on_validation_epoch_end(trainer, module)
    assert module.logged["ternary/flip_rate"] == 0
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_matrices_are_counted_whole(tmp_path, module):
    torch.multiprocessing.spawn(_on_a_rank, (tmp_path,), nprocs=2)
    sharded = rows(tmp_path)
    (tmp_path / "ternary_health.csv").unlink()
    callback = TernaryHealth(tmp_path)
    validate(callback, module, step=10)
    validate(callback, module, step=10)
    assert sharded == rows(tmp_path)
