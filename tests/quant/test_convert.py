"""The pass: only what it should change, and nothing of what was learned is lost."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitnet_lit.errors import UserError
from bitnet_lit.quant import BitLinear, QuantConfig, convert_linears


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"proj": nn.Linear(8, 8, bias=False), "head": nn.Linear(8, 2)})
        self.shared = self.first

    def forward(self, x):
        return self.block["head"](self.block["proj"](self.shared(self.first(x))))


def test_changes_exactly_the_named_layers_and_keeps_their_parameters():
    model = Network()
    weight, bias = model.first.weight, model.first.bias
    assert convert_linears(model, "b158", skip=["head"]) == ["first", "block.proj", "shared"]
    assert isinstance(model.first, BitLinear) and type(model.block["head"]) is nn.Linear
    assert model.first.weight is weight and model.first.bias is bias
    assert model.shared is model.first
    model(torch.randn(3, 8)).sum().backward()
    assert weight.grad is not None and bias.grad is not None


def test_none_changes_nothing_and_twice_is_once():
    model = Network()
    assert convert_linears(model, "none") == []
    convert_linears(model, QuantConfig(name="b1", skip=[]))
    assert convert_linears(model, "b1") == []


def test_a_lone_linear_is_refused():
    with pytest.raises(UserError, match="no parent"):
        convert_linears(nn.Linear(4, 4), "b158")


def test_unknown_rule_is_refused():
    with pytest.raises(UserError, match=r"quant.name=b159.*b158, b158_row, b158_group, b1, .*none"):
        convert_linears(Network(), "b159")


def test_somebody_elses_llama_trains():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    changed = convert_linears(model, "b158", skip=["lm_head"])
    assert len(changed) == 14 and not any("lm_head" in name for name in changed)
    ids = torch.randint(0, 64, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_one_name_to_skip_is_a_name_and_not_its_letters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.ab = nn.Linear(8, 8), nn.Linear(8, 8)

    assert convert_linears(Net(), "b158", skip="ab") == ["a"]


@pytest.mark.parametrize("quant", ["b158", "none"])
@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ("haed", r"skip=\[haed\]: no linear layer of that name: did you mean head\?"),
        (["head", "block"], r"skip=\[block\]: no linear layer of that name: there are first, head, proj, shared"),
    ],
)
def test_a_name_to_skip_that_no_layer_has_is_refused(quant, skip, message):
    model = Network()
    with pytest.raises(UserError, match=message):
        convert_linears(model, quant, skip=skip)
    assert not any(isinstance(layer, BitLinear) for layer in model.modules())


@pytest.mark.parametrize("quant", [None, 158, ["b158"]], ids=str)
def test_what_is_no_rule_is_refused(quant):
    with pytest.raises(UserError, match="must be a scheme, its name"):
        convert_linears(nn.Sequential(nn.Linear(8, 8)), quant)
    with pytest.raises(UserError, match="has no codes"):
        BitLinear(8, 8, quant="none").quantized_weight()
