"""A decoder layer as one function in C++: the bits of its parts, and the parts where somebody looks at them."""

import pytest
import torch

from bitnet_lit.config import QuantConfig
from bitnet_lit.model import build_model
from bitnet_lit.model.layers import MLP
from bitnet_lit.model.transformer import batch_loss
from bitnet_lit.native import library
from bitnet_lit.quant.kernels.cpu import CpuKernels
from tests.support import tiny_config

if not library.is_available():
    pytest.skip("no C++ compiler", allow_module_level=True)


def network(quant="b158", **sizes):
    torch.manual_seed(0)
    return build_model(tiny_config(**sizes), QuantConfig(name=quant, kernel="native"))


def loss_and_gradients(model):
    torch.manual_seed(1)
    loss = batch_loss(model, torch.randint(512, (3, 41)))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.fixture
def layers(monkeypatch):
    """The number of layers that were computed as a whole."""
    counts = [0]
    whole = CpuKernels.decoder_layer

    def counted(*arguments):
        result = whole(*arguments)
        counts[0] += result is not None
        return result

    monkeypatch.setattr(CpuKernels, "decoder_layer", counted)
    return counts


@pytest.mark.parametrize(
    ("quant", "sizes"),
    [
        ("b158", {}),
        ("b1", {"gradient_checkpointing": True}),
        ("sherry", {}),
        ("none", {}),
        ("none", {"sub_norm": False, "hidden_act": "relu2", "num_key_value_heads": 2}),
        ("b158", {"residual_scales": True, "x0_scales": True}),
    ],
)
def test_a_layer_has_the_bits_of_its_parts(layers, monkeypatch, quant, sizes):
    ours = loss_and_gradients(network(quant, **sizes))
    assert layers[0] >= 2
    monkeypatch.setattr(CpuKernels, "decoder_layer", lambda *_: None)
    assert all(map(torch.equal, ours, loss_and_gradients(network(quant, **sizes))))


PARTS = ["self_attn", "mlp", "dropout", "input_layernorm", "self_attn.o_proj", "mlp.ffn_sub_norm", "self_attn.q_norm"]


@pytest.mark.parametrize("part", PARTS)
def test_a_hook_on_a_part_is_called(layers, part):
    plain = loss_and_gradients(network())
    model, calls = network(), []
    model.model.layers[1].get_submodule(part).register_forward_hook(lambda *_: calls.append(part))
    layers[0] = 0
    hooked = loss_and_gradients(model)
    assert calls
    assert layers[0] == 1  # the other layer
    assert torch.allclose(hooked[0], plain[0], rtol=1e-3)


@pytest.mark.parametrize("sizes", [{"dropout": 0.1}, {"qk_norm": True}, {"qkv_bias": True}, {"value_embeddings": True}])
def test_layers_with_other_parts_are_computed_in_parts(layers, sizes):
    assert all(gradient.isfinite().all() for gradient in loss_and_gradients(network(**sizes)))
    assert layers[0] == (1 if "value_embeddings" in sizes else 0)


def test_a_part_of_another_class_is_called(layers):
    class Silent(MLP):
        def forward(self, x_BTD, norm):
            return torch.zeros_like(x_BTD)

    model = network()
    model.model.layers[0].mlp.__class__ = Silent
    assert loss_and_gradients(model)[0].isfinite()
    assert layers[0] == 1
    assert model.model.layers[0].mlp.gate_proj.weight.grad is None


def test_dropout_rests_in_validation(layers):
    model = network(dropout=0.1).eval()
    assert loss_and_gradients(model)[0].isfinite()
    assert layers[0] == 2
