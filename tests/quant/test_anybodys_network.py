"""`convert_linears` on networks of others: what it changes, that it trains and packs, and where packing is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel, MambaConfig, MambaModel, ViTConfig, ViTModel

from bitnet_lit.errors import UserError
from bitnet_lit.quant import BitLinear, PackedBitLinear, convert_linears, pack_linears, uncalled_linears


def linear_names(module):
    return [name for name, layer in module.named_modules() if type(layer) is nn.Linear]


def check(module, run, skip=(), steps=12):
    """Convert, train and pack `module`; `run(module)` gives its output, a tensor. Returns the names that changed."""
    before = dict(module.named_parameters())
    expected = [n for n in linear_names(module) if not any(n == s or n.endswith("." + s) for s in skip)]
    changed = convert_linears(module, "b158", skip=skip)
    assert changed == expected and changed
    assert dict(module.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in module.named_parameters()), "weights must stay"

    module.train()
    target = torch.randn(run(module).shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(run(module), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    first = module.get_submodule(changed[0]).weight
    assert first.grad is not None and first.grad.abs().sum() > 0

    module.eval()
    with torch.no_grad():
        trained = run(module)
        dense = copy.deepcopy(module)
        for name in changed:
            layer = dense.get_submodule(name)
            dense.set_submodule(name, plain := nn.Linear(layer.in_features, layer.out_features, layer.bias is not None))
            plain.weight, plain.bias = layer.weight, layer.bias
        assert not torch.allclose(run(dense), trained, atol=1e-3), "rounded weights must matter"
        assert pack_linears(module) == changed
        # the same integers and the same last multiplication: no tolerance
        assert torch.equal(run(module), trained)
    assert pack_linears(module) == []
    return changed


class TorchViT(nn.Module):
    """A vision transformer from torch's own parts (torchvision's has the same)."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 8)

    def forward(self, images):
        return self.head(self.encoder(self.patches(images).flatten(2).mT).mean(1))


def test_a_torch_vision_transformer():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    changed = check(TorchViT(), lambda m: m(images))
    # q, k and v of nn.MultiheadAttention are one bare parameter, and it reads out_proj's weight: they stay dense.
    assert changed == [f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)] + ["head"]


@pytest.mark.parametrize("padded", [False, True])
def test_torchs_fused_encoder_path_does_not_bypass_the_rounding(padded):
    torch.manual_seed(0)
    encoder = TorchViT().encoder
    convert_linears(encoder, "b158")
    x = torch.randn(2, 5, 32)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    trained = encoder.train()(x, src_key_padding_mask=mask)  # no dropout: the same mathematics
    with torch.no_grad():
        evaluated = encoder.eval()(x, src_key_padding_mask=mask)
    valid = ~mask if padded else torch.ones(2, 5, dtype=torch.bool)
    # other attention kernels; a last bit can move an int8 code, 1/127 of a token's largest value
    torch.testing.assert_close(evaluated[valid], trained[valid], rtol=0, atol=2e-2)
    assert uncalled_linears(encoder.eval(), x, src_key_padding_mask=mask) == []


def test_hugging_face_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ids = torch.randint(0, 100, (2, 9))
    bert = BertModel(config)
    changed = check(bert, lambda m: m(ids).last_hidden_state, skip=["pooler.dense"])
    assert "encoder.layer.1.attention.self.query" in changed and "pooler.dense" not in changed
    assert bert.get_submodule("encoder.layer.0.output.dense").bias is not None


def test_hugging_face_vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vit = ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes))
    images = torch.randn(3, 3, 16, 16)
    changed = check(vit, lambda m: m(images).last_hidden_state, skip=["pooler.dense"])
    assert len(changed) == 6  # q, k, v, output, and two of the feed-forward layer


def test_mamba_names_the_layer_whose_weight_is_read():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=100, hidden_size=32, state_size=8, time_step_rank=4, num_hidden_layers=2)
    mamba, ids = MambaModel(config), torch.randint(0, 100, (2, 9))
    careless = copy.deepcopy(mamba)
    convert_linears(careless, "b158")
    assert uncalled_linears(careless, ids) == [f"layers.{i}.mixer.dt_proj" for i in (0, 1)]
    changed = check(mamba, lambda m: m(ids).last_hidden_state, skip=["dt_proj"])
    assert changed == [f"layers.{i}.mixer.{kind}" for i in (0, 1) for kind in ("in_proj", "x_proj", "out_proj")]
    assert uncalled_linears(mamba, ids) == []


class MixtureOfExperts(nn.Module):
    """Two of four experts for each token."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32)) for _ in range(4)
        )

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            share = (weights * (chosen == index)).sum(-1, keepdim=True)
            out = out + share * expert(x)
        return out


def test_a_mixture_of_experts_with_a_dense_router():
    torch.manual_seed(0)
    x = torch.randn(20, 32)
    changed = check(MixtureOfExperts(), lambda m: m(x), skip=["router"])
    assert changed == [f"experts.{i}.{j}" for i in range(4) for j in (0, 3)]


class GroupedQueryAttention(nn.Module):
    """Four heads of queries on two of keys and values."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k_proj, self.v_proj = nn.Linear(32, 16), nn.Linear(32, 16)
        self.norm = nn.RMSNorm(32)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(self.norm(y.transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize(
    "network",
    [
        lambda: nn.Sequential(nn.LayerNorm(32), GroupedQueryAttention()),
        lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32)),
    ],
    ids=["grouped_query_attention", "feed_forward"],
)
def test_attention_and_feed_forward_layers(network):
    torch.manual_seed(0)
    x = torch.randn(4, 7, 32)
    check(network(), lambda m: m(x))


class LoRA(nn.Module):
    """A frozen layer and a low-rank update beside it, written by hand."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_a_lora_trains_beside_packed_weights():
    torch.manual_seed(0)
    x, target = torch.randn(16, 32), torch.randn(16, 24)
    network = nn.Sequential(LoRA(nn.Linear(32, 24)))
    assert convert_linears(network, "b158", skip=["down", "up"]) == ["0.base"]
    before = network(x)
    assert pack_linears(network) == ["0.base"] and torch.equal(network(x), before)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_pefts_adapters_merged_into_ternary_weights_are_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    torch.manual_seed(0)
    network = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 8))
    convert_linears(network, "b158")
    model = peft.get_peft_model(network, peft.LoraConfig(r=4, target_modules=["1"], init_lora_weights=False))
    x = torch.randn(5, 32)
    apart = model(x)
    model.merge_adapter()
    with pytest.raises(UserError, match=r"adapter is merged.*unmerge"):
        pack_linears(model)
    model.unmerge_adapter()
    assert len(pack_linears(model)) == 2
    # Merging added and took away float numbers; codes on a rounding border may have moved.
    torch.testing.assert_close(model(x), apart, rtol=0, atol=5e-2)
    with pytest.raises(RuntimeError, match="size of tensor"):
        model.merge_adapter()  # a packed matrix has a quarter of the rows


def test_shared_layers_and_shared_weights_stay_shared():
    shared = nn.Linear(16, 16)
    tied = nn.Linear(16, 16)
    tied.weight = shared.weight
    network = nn.Sequential(shared, nn.ReLU(), shared, tied)
    assert convert_linears(network, "b158") == ["0", "2", "3"]
    assert network[0] is network[2] and isinstance(network[0], BitLinear)
    assert network[3].weight is network[0].weight and network[3] is not network[0]
    x = torch.randn(3, 16)
    expected = network(x)
    pack_linears(network)
    assert network[0] is network[2] and isinstance(network[0], PackedBitLinear)
    assert torch.equal(network(x), expected)
