"""The table of tensors is the network: names, shapes and order for every combination of the fields that decide it."""

from itertools import product

import pytest

from bitnet_lit.config import QuantConfig
from bitnet_lit.model import build_model
from bitnet_lit.model.tensors import HEAD, LAYER, Kind, network_tensors, quantized_names, tensor_shapes, unnamed_tensors
from bitnet_lit.quant import BitLinear
from tests.support import tiny_config

CHOICES = {
    "tie_word_embeddings": (True, False),
    "sub_norm": (True, False),
    "qkv_bias": (False, True),
    "qk_norm": (False, True),
    "num_key_value_heads": (None, 1),
    "head_dim": (None, 10),
    "num_hidden_layers": (1, 3),
}
OPTIONS = {
    "residual_scales": (False, True),
    "x0_scales": (False, True),
    "value_embeddings": (False, True),
    "num_key_value_heads": (None, 1),
    "num_hidden_layers": (1, 4),
}
COMBINATIONS = [
    dict(zip(choices, values, strict=True)) for choices in (CHOICES, OPTIONS) for values in product(*choices.values())
]


def test_the_table_is_the_network():
    for sizes in COMBINATIONS:
        config = tiny_config(**sizes)
        network = build_model(config, QuantConfig(name="none"), device="meta")
        expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        if config.tie_word_embeddings:
            del expected[HEAD]
        assert list(tensor_shapes(config).items()) == list(expected.items()), sizes


def test_each_tensor_says_what_it_is():
    options = {"residual_scales": True, "x0_scales": True, "value_embeddings": True}
    tensors = network_tensors(tiny_config(qkv_bias=True, qk_norm=True, num_key_value_heads=1, **options))
    assert {tensor.kind for tensor in tensors} == set(Kind)
    for tensor in tensors:
        assert (len(tensor.shape) == 2) == (tensor.kind in (Kind.EMBEDDING, Kind.PROJECTION, Kind.GATE)), tensor.name
        assert (tensor.shape == (1,)) == (tensor.kind is Kind.SCALE), tensor.name
        assert ("norm" in tensor.name) == (tensor.kind is Kind.NORM), tensor.name
        turned = tensor.within.startswith(("self_attn.q_proj", "self_attn.k_proj"))
        assert (tensor.rotary_heads is not None) == turned, tensor.name
    assert {t.rotary_heads for t in tensors if "k_proj" in t.name} == {1}


def test_a_tensor_that_a_format_has_no_name_for_is_named():
    names = {spec.name for spec in LAYER if spec.name != "self_attn.q_norm.weight"}
    names |= {"model.embed_tokens.weight", "model.norm.weight"}
    assert unnamed_tensors(tiny_config(), names) == []
    assert unnamed_tensors(tiny_config(qk_norm=True, tie_word_embeddings=False), names) == [
        "self_attn.q_norm.weight",
        HEAD,
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "quant", [QuantConfig(), QuantConfig(name="none"), QuantConfig(skip=[]), QuantConfig(skip=["lm_head", "q_proj"])]
)
def test_what_is_quantized_is_what_becomes_a_bit_linear(quant, tied):
    config = tiny_config(tie_word_embeddings=tied, qkv_bias=True)
    network = build_model(config, quant, device="meta")
    linears = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, BitLinear)}
    assert quantized_names(config, quant) == linears & tensor_shapes(config).keys()
