"""Names and shapes from the config alone are those of the network."""

import pytest

from bitnet_lit.config import QuantConfig
from bitnet_lit.model import build_model
from bitnet_lit.model.tensors import HEAD, quantized_names, tensor_shapes
from bitnet_lit.quant import BitLinear
from tests.support import tiny_config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"sub_norm": False, "num_key_value_heads": 1}, {"qkv_bias": True}, {"qk_norm": True, "head_dim": 10}],
    ids=str,
)
@pytest.mark.parametrize(
    "quant", [QuantConfig(), QuantConfig(name="none"), QuantConfig(skip=[]), QuantConfig(skip=["lm_head", "q_proj"])]
)
def test_the_layout_is_the_networks(quant, sizes, tied):
    config = tiny_config(tie_word_embeddings=tied, **sizes)
    network = build_model(config, quant, device="meta")
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    linears = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, BitLinear)}
    if tied:
        del expected[HEAD]
    assert list(tensor_shapes(config).items()) == list(expected.items())
    assert quantized_names(config, quant) == linears & expected.keys()
