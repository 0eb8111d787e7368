"""Packed codes: the same integers, whatever the shape; packing twice changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.integrations.bitnet import pack_weights, unpack_weights

from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.quant import BitLinear, PackedBitLinear, pack_linears
from bitnet_lit.quant.packing import pack_codes, unpack_codes


@settings(max_examples=60, deadline=None)
@given(quarter_rows=st.integers(1, 20), inputs=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_round_trip_and_the_layout_of_transformers(quarter_rows, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (4 * quarter_rows, inputs), generator=generator)
    packed = pack_codes(codes)
    assert torch.equal(unpack_codes(packed), codes.to(torch.int8))
    assert torch.equal(packed, pack_weights(codes.clone()))
    assert torch.equal(unpack_weights(packed, torch.int8), codes.to(torch.int8))


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="6 rows .* multiple of 4"):
        pack_codes(torch.zeros(6, 8))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quant", ["b158", "b1"])
def test_trained_and_packed_layers_agree_bit_for_bit(quant, bias):
    for seed in range(20):
        torch.manual_seed(seed)
        layer = BitLinear(48, 16, bias=bias, quant=QuantConfig(name=quant)).eval()
        x = torch.randn(5, 48)
        with torch.no_grad():
            assert torch.equal(PackedBitLinear.from_bit_linear(layer)(x), layer(x))


def test_packing_a_packed_model_changes_nothing():
    model = nn.Sequential(BitLinear(8, 8, quant=QuantConfig()), nn.ReLU(), BitLinear(8, 4, quant=QuantConfig()))
    assert pack_linears(model) == ["0", "2"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert pack_linears(model) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
