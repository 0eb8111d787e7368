"""The network by itself: cache, causality, options."""

import pytest
import torch

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.model import KVCache, build_model, next_token_loss
from bitnet_lit.model.accounting import account
from tests.support import assert_close_but_for_borders, tiny_config, tiny_model


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("quant", ["none", "b158", "b1"])
def test_cached_steps_equal_one_pass(quant, kv_heads):
    model = tiny_model(quant, num_key_value_heads=kv_heads)
    ids = torch.randint(0, 512, (2, 24))
    with torch.no_grad():
        whole = model(ids)
        cache = KVCache(model.config, 2, 24)
        chunks = [model(ids[:, start:stop], cache) for start, stop in ((0, 7), (7, 8), (8, 9), (9, 20), (20, 24))]
    # Attention sums in another order for other shapes.
    if quant == "none":
        torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=0, atol=1e-4)
    else:
        assert_close_but_for_borders(torch.cat(chunks, 1), whole)
    assert cache.length == 24


def test_a_later_token_changes_no_earlier_logit():
    model = tiny_model("b158")
    ids = torch.randint(0, 512, (1, 16))
    other = ids.clone()
    other[0, 10] = (other[0, 10] + 1) % 512
    with torch.no_grad():
        a, b = model(ids), model(other)
    assert torch.equal(a[:, :10], b[:, :10])
    assert not torch.equal(a[:, 10:], b[:, 10:])


def test_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="65 positions, but the model's context is 64"):
        tiny_model()(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_act": "relu2"},
        {"tie_word_embeddings": False},
        {"sub_norm": False},
        {"num_key_value_heads": 1},
        {"rope_theta": 5e5},
        {"dropout": 0.3},
    ],
    ids=str,
)
def test_every_option_trains(sizes):
    torch.manual_seed(0)
    model = build_model(tiny_config(**sizes), QuantConfig())
    ids = torch.randint(0, 512, (2, 33))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = next_token_loss(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_gradient_checkpointing_changes_no_gradient():
    ids = torch.randint(0, 512, (2, 33))
    gradients = []
    for gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(tiny_config(gradient_checkpointing=gradient_checkpointing), QuantConfig()).train()
        next_token_loss(model(ids[:, :-1]), ids[:, 1:]).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_tied_head_is_one_parameter():
    model = tiny_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = tiny_model(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_exactly_the_projections_are_quantized():
    model = tiny_model("b158")
    quantized = [name for name, module in model.named_modules() if type(module).__name__ == "BitLinear"]
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert sorted(name.split(".")[-1] for name in quantized) == sorted(names * 2)


def test_a_cache_that_grows_gives_the_same_as_none():
    model = tiny_model(max_position_embeddings=600)
    ids = torch.randint(0, 512, (1, 600), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 1, 600)
    assert cache.keys.shape[3] < 600
    with torch.no_grad():
        parts = [model(part, cache) for part in ids.split([250, 1, 10, 300, 39], dim=1)]
        assert_close_but_for_borders(torch.cat(parts, 1), model(ids))
    assert cache.keys.shape[3] == 600 == cache.length


def test_a_vocabulary_that_is_not_known_yet_is_said():
    for build in (build_model, account):
        with pytest.raises(UserError, match="vocab_size=null"):
            build(ModelConfig(), QuantConfig())
