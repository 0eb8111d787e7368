"""The bare loop of `bench suite=gpu_train` trains the same network as the command, and the rows are complete."""

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn

from bitnet_lit import cli
from bitnet_lit.cli import compose
from bitnet_lit.config import BenchConfig, QuantConfig
from bitnet_lit.model import batch_loss, build_model
from bitnet_lit.training import benchmark
from bitnet_lit.training.benchmark import BareNetwork, FakeQuantLinear, Shape

TINY = Shape(hidden=32, layers=2, feed_forward=64, heads=2, batch=2, length=16)
NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "norms.attention_norm": "input_layernorm",
    "norms.o_norm": "self_attn.attn_sub_norm",
    "norms.mlp_norm": "post_attention_layernorm",
    "norms.down_norm": "mlp.ffn_sub_norm",
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def our_name(name):
    if name in NAMES:
        return NAMES[name]
    _, layer, rest = name.removesuffix(".weight").split(".", 2)
    return f"model.layers.{layer}.{NAMES[rest]}.weight"


@pytest.mark.parametrize(("linear", "quant"), [(nn.Linear, "none"), (FakeQuantLinear, "b158")])
def test_the_bare_network_has_the_loss_and_the_gradients_of_ours(linear, quant):
    torch.manual_seed(0)
    ours, bare = build_model(TINY.model, QuantConfig(quant)), BareNetwork(TINY, linear)
    theirs = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            theirs.pop(our_name(name)).copy_(parameter)
    assert not theirs  # every parameter has its twin
    ids = torch.randint(0, benchmark.VOCABULARY, (TINY.batch, TINY.length + 1))
    loss, expected = bare(ids[:, :-1], ids[:, 1:]), batch_loss(ours, ids)
    loss.backward()
    expected.backward()
    # Fake quantization applies the scales before the product, so float rounding can turn a code further on.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6 if quant == "none" else 1e-3)
    for name, parameter in bare.named_parameters():
        other = ours.get_parameter(our_name(name)).grad
        cosine = torch.cosine_similarity(parameter.grad.flatten(), other.flatten(), dim=0)
        assert cosine > (0.99999 if quant == "none" else 0.99), name


def test_the_command_trains_while_bench_is_a_command_itself(monkeypatch, shards):
    def on_a_cpu(command, overrides):
        return compose(command, [item.replace("accelerator=gpu", "accelerator=cpu") for item in overrides])

    monkeypatch.setattr(benchmark, "compose", on_a_cpu)
    monkeypatch.setattr(benchmark, "WARM_UP", 1)
    monkeypatch.setattr(benchmark, "WINDOW", 1)
    speeds = []

    def task(config):
        hydra = GlobalHydra.instance().hydra
        speeds.append(benchmark.through_the_command(TINY, "b158", shards))
        assert hydra is not None and GlobalHydra.instance().hydra is hydra

    cli.run("bench", task, ["suite=gpu_train", "rounds=1"])
    assert speeds[0].tokens_per_s > 0


@pytest.mark.gpu
def test_the_rows_compare_the_command_with_the_bare_loop(monkeypatch):
    monkeypatch.setattr(benchmark, "SHAPES", (TINY,))
    rows = benchmark.gpu_train_rows(BenchConfig(suite="gpu_train", rounds=1))
    compared = {(row["what"], row["peer"]) for row in rows}
    assert compared >= {
        ("train, b158", "train, none"),
        ("train, b158", "bare loop, fake quantization"),
        ("train, none", "bare loop, dense"),
    }
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"]) and row["ours"] > 0
