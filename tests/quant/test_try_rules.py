"""What the rules of a scheme of the user's own return is compared with what they say, before the first step."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from bitnet_lit.cli import compose
from bitnet_lit.errors import UserError
from bitnet_lit.quant import Scheme, convert_linears
from bitnet_lit.quant.activations import AbsMax, ActivationRule
from bitnet_lit.quant.schemes import B158
from bitnet_lit.quant.try_rules import try_rules
from bitnet_lit.quant.weights import Granularity, PerRow, PerTensor, WeightRule
from bitnet_lit.training.preview import check_run
from bitnet_lit.training.run import train
from tests.support import TINY_RUN


@dataclass(frozen=True)
class Rule(WeightRule):
    fault: str

    levels = (-1, 0, 1)

    @property
    def granularity(self) -> Granularity:
        return PerRow() if self.fault == "granularity" else PerTensor()

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = weight.abs().mean()
        codes = (weight / scale).round()
        if self.fault == "not rounded":
            return weight / scale, scale
        if self.fault == "not clamped":
            return codes * 2, scale
        if self.fault == "flat":
            return codes.clamp(-1, 1).flatten(), scale
        if self.fault == "rows":
            return codes.clamp(-1, 1), weight.abs().mean(1, keepdim=True)
        return codes.clamp(-1, 1), scale * (float("nan") if self.fault == "nan" else 1)


@dataclass(frozen=True)
class Faulty(Scheme):
    name = "faulty"
    title = "a rule with a fault"
    fault: str = ""

    @property
    def weights(self) -> WeightRule:
        return Rule(self.fault)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("not rounded", r"codes such as -?\d\.\d+, and its levels are -1, 0, 1: correct quantize or levels"),
        ("not clamped", r"codes such as -?\d, and its levels are -1, 0, 1"),
        ("flat", r"codes of the shape \(32,\): return a code for each weight"),
        ("rows", r"scales of the shape \(4, 1\), and its granularity says \(\)"),
        ("granularity", r"scales of the shape \(\), and its granularity says \(4, 1\)"),
        ("nan", "codes or scales that are not finite"),
    ],
)
def test_a_rule_that_does_not_round_as_it_says_is_refused(fault, message):
    network = nn.Sequential(nn.Linear(8, 4))
    convert_linears(network, Faulty(fault))
    with pytest.raises(UserError, match=message) as refused:
        try_rules(network, "quant._target_=study.Faulty")
    assert str(refused.value).startswith("quant._target_=study.Faulty: the rule Rule rounds 0 (4, 8) to ")


@dataclass(frozen=True)
class Activations(ActivationRule):
    fault: str

    @property
    def bits(self) -> int:
        return 16 if self.fault == "bits" else 4

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = AbsMax(4).quantize(x)
        if self.fault == "not rounded":
            return x / scale, scale
        if self.fault == "not clamped":
            return codes * 2, scale
        if self.fault == "flat":
            return codes.flatten(), scale
        if self.fault == "whole batch":
            return codes, scale.amax()
        if self.fault == "zeros":
            return codes / x.abs().amax(-1, keepdim=True), scale
        return codes, scale


@dataclass(frozen=True)
class FaultyActivations(B158):
    name = "faulty_activations"
    fault: str = ""

    @property
    def activations(self) -> ActivationRule:
        return Activations(self.fault)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "not rounded",
            r"codes such as -?\d\.\d+, and with 4 bits they are the integers from -8 to 7: correct quantize",
        ),
        ("not clamped", r"codes such as -?\d+, and with 4 bits"),
        ("flat", r"codes of the shape \(48,\): return a code for each value"),
        ("whole batch", r"scales of the shape \(\): return one for each token, \(2, 3, 1\)"),
        ("zeros", "codes or scales that are not finite"),
        ("bits", r"16 bits: bits must lie in 2\.\.8"),
    ],
)
def test_an_activation_rule_that_does_not_round_as_it_says_is_refused(fault, message):
    network = nn.Sequential(nn.Linear(8, 4))
    convert_linears(network, FaultyActivations(fault=fault))
    with pytest.raises(UserError, match=message) as refused:
        try_rules(network, "quant._target_=study.Own")
    start = "quant._target_=study.Own: the rule Activations rounds activations (2, 3, 8) for 0 to "
    assert str(refused.value).startswith(start)


@pytest.mark.parametrize("scheme", [Faulty(""), B158(), B158(activation_bits=3), FaultyActivations()])
def test_a_rule_that_rounds_as_it_says_is_taken(scheme):
    network = nn.Sequential(nn.Linear(8, 4))
    convert_linears(network, scheme)
    before = network[0].weight.clone()
    try_rules(network, "")
    assert torch.equal(network[0].weight, before) and network[0].weight.grad is None


@pytest.mark.parametrize("start", [train, check_run])
@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("Faulty", "rounds model.layers.*and its levels are -1, 0, 1"),
        ("FaultyActivations", "rounds activations .* for model.layers.*and with 4 bits they are the integers"),
    ],
)
def test_a_run_with_such_a_rule_is_refused_before_the_first_step(tmp_path, shards, scheme, message, start):
    options = [f"quant._target_=tests.quant.test_try_rules.{scheme}", "quant.settings.fault=not clamped"]
    with pytest.raises(UserError, match=message):
        start(compose("train", [f"run_dir={tmp_path / 'run'}", f"data.dir={shards}", *TINY_RUN, *options]))
    assert not (tmp_path / "run" / "metrics.csv").exists()
