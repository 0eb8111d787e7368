"""What the native engine refuses, by the name of the field or the scheme, and what it does not know of."""

from dataclasses import dataclass, fields

import pytest

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.inference.engines.cpu.supported_models import COMPUTED, why_unsupported
from bitnet_lit.model import tensors
from bitnet_lit.model.tensors import Kind, TensorSpec
from bitnet_lit.quant import register
from tests.quant.toy_schemes import Centered, Quinary, Threshold
from tests.support import tiny_config


@pytest.mark.parametrize(
    ("quant", "sizes", "why"),
    [
        (
            {"activation_bits": 4},
            {},
            "quant=b158: it rounds activations by AbsMax(bits=4), the kernels by AbsMax(",
        ),
        ({"skip": ["lm_head", "down_proj"]}, {}, "quant.skip=['lm_head', 'down_proj']: in the native engine"),
        ({"skip": []}, {}, "quant.skip=[]: in the native engine the output head alone is dense"),
        ({"name": "b158_row"}, {}, "quant=b158_row: its scales are one for each row, the kernels have one"),
        ({"name": "b158_group"}, {}, "quant=b158_group: its scales are one for 128 inputs, the kernels have one"),
        ({"name": "quinary"}, {}, "quant=quinary: its codes are -2, -1, 0, 1, 2, the kernels' are -1, 0 and +1"),
        ({"name": "centered"}, {}, "quant=centered: its layer computes more than a product of codes"),
        ({}, {"sub_norm": False, "qkv_bias": True}, "model.qkv_bias=true: the native engine has no biases"),
        ({}, {"intermediate_size": 2**18 + 4}, "a matrix has 262148 inputs: the native engine takes 262144 at most"),
        ({"name": "none"}, {"qkv_bias": True}, "model.qkv_bias=true"),
        ({"name": "b158_row"}, {"qkv_bias": True}, "model.qkv_bias=true: the native engine has no biases; "),
    ],
    ids=str,
)
def test_what_it_cannot_run_is_named(quant, sizes, why):
    for scheme in (Quinary, Centered):
        register(scheme)
    assert why_unsupported(tiny_config(**sizes), QuantConfig(**quant)).startswith(why)


@pytest.mark.parametrize("quant", ["b158", "b1", "none", "threshold"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"hidden_act": "relu2"},
        {"sub_norm": False},
        {"qk_norm": True},
        {"residual_scales": True, "x0_scales": True, "value_embeddings": True},
        {"tie_word_embeddings": False},
        {"rope_theta": 5e5},
        {"head_dim": 8},
    ],
    ids=str,
)
def test_what_it_runs(quant, sizes):
    register(Threshold)
    assert why_unsupported(tiny_config(**sizes), QuantConfig(name=quant)) is None


def test_a_field_that_was_added_since_is_refused_unless_it_has_its_default():
    @dataclass
    class Newer(ModelConfig):
        logit_softcap: float = 0.0

    assert why_unsupported(Newer(), QuantConfig()) is None
    assert why_unsupported(Newer(logit_softcap=30.0), QuantConfig()).startswith("model.logit_softcap=30.0: ")
    assert COMPUTED.keys() <= {field.name for field in fields(ModelConfig)}


def test_an_activation_that_was_added_since_is_refused():
    config = tiny_config()
    config.hidden_act = "gelu"
    assert why_unsupported(config, QuantConfig()) == (
        "model.hidden_act=gelu: the native engine computes silu and relu2"
    )


def test_a_tensor_that_was_added_since_is_refused(monkeypatch):
    added = TensorSpec("mlp.extra_norm.weight", Kind.NORM, ("intermediate_size",))
    monkeypatch.setattr(tensors, "LAYER", (*tensors.LAYER, added))
    assert why_unsupported(tiny_config(), QuantConfig()) == (
        "tensor mlp.extra_norm.weight: the native engine has no place for it"
    )
