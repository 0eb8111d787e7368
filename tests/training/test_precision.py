"""What trainer.precision=auto means on each kind of machine, and when float32 products use TF32."""

import pytest
import torch

from bitnet_lit.config.trainer import TrainerConfig
from bitnet_lit.training.precision import resolved_precision, tf32


def machine(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(
    ("capability", "accelerator", "precision", "expected"),
    [
        ((9, 0), "gpu", "auto", "bf16-mixed"),
        ((8, 0), "auto", "auto", "bf16-mixed"),
        ((9, 0), "cuda", "auto", "bf16-mixed"),
        ((7, 5), "gpu", "auto", "32-true"),
        ((9, 0), "cpu", "auto", "32-true"),
        ((9, 0), "mps", "auto", "32-true"),
        (None, "auto", "auto", "32-true"),
        ((9, 0), "gpu", "32-true", "32-true"),
        ((9, 0), "gpu", "bf16-true", "bf16-true"),
        (None, "cpu", "bf16-mixed", "bf16-mixed"),
    ],
)
def test_the_precision_of_a_machine(monkeypatch, capability, accelerator, precision, expected):
    machine(monkeypatch, capability)
    assert resolved_precision(TrainerConfig(accelerator=accelerator, precision=precision)) == expected


@pytest.mark.parametrize(
    ("capability", "accelerator", "precision", "inside"),
    [
        ((9, 0), "gpu", "auto", "high"),
        ((9, 0), "gpu", "bf16-mixed", "high"),
        ((9, 0), "gpu", "32-true", "highest"),
        ((9, 0), "cpu", "auto", "highest"),
        (None, "auto", "auto", "highest"),
    ],
)
def test_tf32_is_on_only_in_the_run_and_only_if_float32_was_not_typed(
    monkeypatch, capability, accelerator, precision, inside
):
    machine(monkeypatch, capability)
    with pytest.raises(RuntimeError), tf32(TrainerConfig(accelerator=accelerator, precision=precision)):
        assert torch.get_float32_matmul_precision() == inside
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == "highest"
