"""Scales of the residual stream and value embeddings: a literal version, nothing changed at first, cache, compile."""

import pytest
import torch
from torch.nn.functional import cross_entropy, silu

from bitnet_lit.config import MuonConfig, QuantConfig
from bitnet_lit.model import KVCache, build_model, next_token_loss
from bitnet_lit.model.accounting import account
from bitnet_lit.model.layers import apply_rotary
from bitnet_lit.training.optimizers import build_optimizer
from tests.support import tiny_config

SCALES = {"residual_scales": True, "x0_scales": True}
VALUES = {"value_embeddings": True, "num_key_value_heads": 2, "hidden_size": 48, "num_hidden_layers": 3}
EACH = [SCALES, {"residual_scales": True}, {"x0_scales": True}, VALUES, {**SCALES, **VALUES, "qk_norm": True}]
QUANT = QuantConfig(kernel="reference")
DENSE = QuantConfig(name="none", kernel="reference")
IDS = torch.randint(0, 512, (2, 25), generator=torch.Generator().manual_seed(0))


def random_model(quant=QUANT, **sizes):
    """A model whose new parameters are not what they start as."""
    torch.manual_seed(0)
    model = build_model(tiny_config(initializer_range=0.2, **sizes), quant)
    for name, parameter in model.named_parameters():
        if ".value_embed." in name or name.endswith("_scale"):
            torch.nn.init.normal_(parameter)
    return model


def literal_logits(model, ids):
    """The network of nanochat's options, without sub-norms and dense, in plain products."""
    config, decoder = model.config, model.model
    heads, kv, size, count = config.num_attention_heads, config.num_kv_heads, config.head_size, config.num_hidden_layers
    b, t = ids.shape

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    x0 = x = decoder.embed_tokens.weight[ids]
    for i in range(count):
        p = {name.split(".", 1)[-1]: value for name, value in decoder.layers[i].named_parameters()}
        x = p["residual_scale"] * x + p["x0_scale"] * x0
        h = norm(x, decoder.layers[i].input_layernorm.weight)
        q, k, v = (h @ p[f"{name}_proj.weight"].T for name in "qkv")
        v = v.view(b, t, kv, size)
        if i in (count - 1, count - 3):
            gate = 2 / (1 + torch.exp(-h[..., :32] @ p["value_embed.gate"].T))
            v = v + gate[..., None] * p["value_embed.table.weight"][ids].view(b, t, kv, size)
        q, k = (apply_rotary(y.view(b, t, -1, size).transpose(1, 2), decoder.cos[:t], decoder.sin[:t]) for y in (q, k))
        k, v = k.repeat_interleave(heads // kv, 1), v.transpose(1, 2).repeat_interleave(heads // kv, 1)
        scores = (q @ k.transpose(-1, -2) / size**0.5).masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ p["o_proj.weight"].T
        h = norm(x, decoder.layers[i].post_attention_layernorm.weight)
        x = x + (silu(h @ p["gate_proj.weight"].T) * (h @ p["up_proj.weight"].T)) @ p["down_proj.weight"].T
    return norm(x, decoder.norm.weight) @ model.lm_head.weight.T


def test_the_network_is_the_literal_one_gradients_included():
    model = random_model(DENSE, sub_norm=False, **SCALES, **VALUES)
    expected = literal_logits(model, IDS[:, :-1])
    torch.testing.assert_close(model(IDS[:, :-1]), expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order
    loss, literal = model(IDS[:, :-1], targets=IDS[:, 1:]), cross_entropy(expected.flatten(0, 1), IDS[:, 1:].flatten())
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = zip(names, torch.autograd.grad(loss, parameters), torch.autograd.grad(literal, parameters), strict=True)
    for name, found, wanted in gradients:
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()) + 1e-6)


@pytest.mark.parametrize("quant", [QUANT, DENSE], ids=["b158", "none"])
@pytest.mark.parametrize("sizes", EACH, ids=str)
def test_at_first_the_network_is_the_plain_one(sizes, quant):
    plain = {key: value for key, value in sizes.items() if key not in ("value_embeddings", *SCALES)}
    logits = []
    for options in (sizes, plain):
        torch.manual_seed(0)
        logits.append(build_model(tiny_config(**options), quant)(IDS))
    assert torch.equal(*logits)


@pytest.mark.parametrize("sizes", EACH, ids=str)
def test_cached_steps_equal_one_pass(sizes):
    model = random_model(DENSE, **sizes).eval()
    cache = KVCache(model.config, 2, 25)
    with torch.no_grad():
        chunks = [model(part, cache) for part in IDS.split([7, 1, 1, 11, 5], dim=1)]
        # Attention sums in another order for other shapes.
        torch.testing.assert_close(torch.cat(chunks, 1), model(IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [SCALES, EACH[-1]], ids=str)
def test_checkpointing_and_compiled_layers_change_no_gradient(sizes):
    """Each layer is one graph, as a run compiles it."""
    found = []
    for way in ("plain", "checkpointed", "compiled"):
        model = random_model(gradient_checkpointing=way == "checkpointed", **sizes).train()
        if way == "compiled":
            torch.compiler.reset()
            for layer in model.model.layers:
                layer.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        next_token_loss(model(IDS[:, :-1]), IDS[:, 1:]).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, found[1][name]), name
        torch.testing.assert_close(gradient, found[2][name], msg=lambda text, name=name: f"{name}: {text}")


def test_scales_and_gates_do_not_decay_and_tables_are_embeddings():
    model = random_model(**SCALES, **VALUES)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, MuonConfig(weight_decay=0.1))
    muon, *others = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert not any("_scale" in name or "value_embed" in name for name in muon)
    for group, found in zip(optimizer.param_groups[1:], others, strict=True):
        assert (group["weight_decay"] > 0) == any("embed_tokens" in name for name in found)
        assert any("value_embed.table" in name for name in found) == any("embed_tokens" in name for name in found)
        assert any(name.endswith(("_scale", "embed.gate")) for name in found) == (group["weight_decay"] == 0)


def test_parameters_are_counted():
    plain = account(tiny_config(num_hidden_layers=3), QUANT)
    counted = account(tiny_config(num_hidden_layers=3, value_embeddings=True, **SCALES), QUANT)
    assert counted.embedding == plain.embedding + 2 * 512 * 32  # layers 0 and 2
    assert counted.norms == plain.norms + 2 * 3 + 2 * 4 * 32  # scales; gates of 4 heads, which read 32 elements
    assert counted.projections == plain.projections
    assert counted.forward_flops_per_token == plain.forward_flops_per_token + 2 * (2 * 4 * 32)
