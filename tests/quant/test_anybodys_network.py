"""`convert_linears` on networks of others: what it changes, that it trains and packs, and where packing is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from transformers import BertConfig, BertModel, MambaConfig, MambaModel, ViTConfig, ViTModel

from bitnet_lit.errors import UserError
from bitnet_lit.quant import BitLinear, PackedBitLinear, convert_linears, pack_linears, uncalled_linears


def names_of(kind, module):
    return [name for name, layer in module.named_modules() if type(layer) is kind]


def train(module, run, steps=12, learning_rate=3e-3):
    """Mean squared error against a fixed random target; the losses."""
    module.train()
    with torch.no_grad():
        target = torch.randn(run(module).shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(run(module), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def evaluate(module, run):
    return run(module.eval())


def dense_twin(module):
    """The same network and weights without rounding."""
    twin = copy.deepcopy(module)
    for name in names_of(BitLinear, twin):
        layer = twin.get_submodule(name)
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight, plain.bias = layer.weight, layer.bias
        twin.set_submodule(name, plain)
    return twin


def pack_and_compare(module, run, changed):
    """Packing changes just `changed`, and no bit of the output; packing again changes nothing."""
    trained = evaluate(module, run)
    assert not torch.allclose(evaluate(dense_twin(module), run), trained, atol=1e-3), "rounding must matter"
    assert pack_linears(module) == changed == names_of(PackedBitLinear, module)
    # No tolerance: sums of integers below 2**24 are exact in float32 in any order, and the scales enter alike.
    assert torch.equal(evaluate(module, run), trained)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert pack_linears(module) == []
    after = module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def check(module, run, changed, skip=()):
    """Convert, train and pack `module`; `run(module)` gives its output, `changed` names what should change."""
    before = dict(module.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    linears = names_of(nn.Linear, module)
    assert convert_linears(module, "b158", skip=skip) == changed == names_of(BitLinear, module)
    assert names_of(nn.Linear, module) == [name for name in linears if name not in changed]
    after = dict(module.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before), "the very parameters"
    assert all(torch.equal(after[name], values[name]) for name in values)

    losses = train(module, run)
    assert losses[-1] < 0.97 * losses[0]
    frozen = {name for name, parameter in before.items() if not parameter.requires_grad}
    for name in changed:
        if f"{name}.weight" not in frozen:
            assert not torch.equal(before[f"{name}.weight"], values[f"{name}.weight"]), f"{name} did not learn"
    assert all(torch.equal(before[name], values[name]) for name in frozen)
    pack_and_compare(module, run, changed)


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
    # q, k and v of nn.MultiheadAttention are one bare parameter, and it reads out_proj's weight: they stay dense.
    changed = [f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)] + ["head"]
    vit = TorchViT()
    out_proj = vit.encoder.layers[0].self_attn.out_proj
    check(vit, lambda m: m(images), changed)
    assert vit.encoder.layers[0].self_attn.out_proj is out_proj and out_proj.weight.is_floating_point()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("skip", [[], ["linear1"], ["linear2"]], ids=["both", "linear2", "linear1"])
def test_torchs_fused_encoder_path_does_not_bypass_the_rounding(skip, padded):
    torch.manual_seed(0)
    encoder = TorchViT().encoder
    convert_linears(encoder, "b158", skip=skip)
    x = torch.randn(2, 5, 32)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    valid = ~mask if padded else torch.ones(2, 5, dtype=torch.bool)

    def run(module):
        return module(x, src_key_padding_mask=mask)[valid]

    trained = run(encoder.train()).detach()  # no dropout: the same mathematics
    # Another order of sums in attention; a last bit can move an int8 code, 1/127 of a token's largest value.
    torch.testing.assert_close(evaluate(encoder, run), trained, rtol=0, atol=2e-2)
    assert (evaluate(dense_twin(encoder), run) - trained).abs().max() > 0.1  # what the fused path would give
    assert uncalled_linears(encoder, x, src_key_padding_mask=mask) == []
    pack_and_compare(encoder, run, names_of(BitLinear, encoder))


def test_the_fused_path_is_there_and_is_found():
    """The test above means something as long as torch has this path."""
    torch.manual_seed(0)
    encoder, x = TorchViT().encoder, torch.randn(2, 5, 32)
    changed = convert_linears(encoder, "b158")
    for layer in encoder.layers:
        layer.activation_relu_or_gelu = 2
    assert uncalled_linears(encoder.eval(), x) == changed
    assert uncalled_linears(encoder.train(), x) == []


def test_hugging_face_bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = BertModel(BertConfig(vocab_size=100, **sizes, **dropout))
    ids = torch.randint(0, 100, (2, 9))
    parts = [f"attention.self.{kind}" for kind in ("query", "key", "value")]
    parts += ["attention.output.dense", "intermediate.dense", "output.dense"]
    changed = [f"encoder.layer.{i}.{part}" for i in (0, 1) for part in parts]
    check(bert, lambda m: m(ids).last_hidden_state, changed, skip=["pooler.dense"])
    assert bert.get_submodule("encoder.layer.0.output.dense").bias is not None


def test_hugging_face_vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vit = ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes))
    images = torch.randn(3, 3, 16, 16)
    changed = [name for name in names_of(nn.Linear, vit) if name != "pooler.dense"]
    assert len(changed) == 6  # q, k, v, output, and two of the feed-forward layer; their names differ by version
    check(vit, lambda m: m(images).last_hidden_state, changed, skip=["pooler.dense"])


def test_mamba_names_the_layer_whose_weight_is_read():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=100, hidden_size=32, state_size=8, time_step_rank=4, num_hidden_layers=2)
    mamba, ids = MambaModel(config), torch.randint(0, 100, (2, 9))
    careless = copy.deepcopy(mamba)
    convert_linears(careless, "b158")
    for mode in (True, False):
        assert uncalled_linears(careless.train(mode), ids) == [f"layers.{i}.mixer.dt_proj" for i in (0, 1)]
    pack_linears(careless)
    with pytest.raises(RuntimeError):  # bytes where it reads a float matrix
        careless(ids)

    changed = [f"layers.{i}.mixer.{kind}" for i in (0, 1) for kind in ("in_proj", "x_proj", "out_proj")]
    check(mamba, lambda m: m(ids).last_hidden_state, changed, skip=["dt_proj"])


class ReadsInTraining(nn.Module):
    """Calls its layer in evaluation and reads its weight in training, as Mamba does where it has CUDA kernels."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(F.linear(x, self.proj.weight) if self.training else self.proj(x))


def test_uncalled_layers_are_those_of_the_mode_and_nothing_is_left_behind():
    torch.manual_seed(0)
    network, x = ReadsInTraining(), torch.randn(4, 8)
    convert_linears(network, "b158")
    assert uncalled_linears(network.train(), x) == ["proj"]
    assert uncalled_linears(network.eval(), x) == []
    with pytest.raises(RuntimeError):
        uncalled_linears(network, torch.randn(4, 9))
    assert not torch.nn.modules.module._global_forward_hooks


class MixtureOfExperts(nn.Module):
    """Two of four experts for each token; an expert sees only its own tokens, and sometimes none."""

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
            token, slot = torch.where(chosen == index)
            out = out.index_add(0, token, weights[token, slot, None] * expert(x[token]))
        return out


def test_a_mixture_of_experts_with_a_dense_router():
    torch.manual_seed(0)
    x, network = torch.randn(20, 32), MixtureOfExperts()
    check(network, lambda m: m(x), [f"experts.{i}.{j}" for i in range(4) for j in (0, 3)], skip=["router"])
    assert type(network.router) is nn.Linear
    token = x[:1]  # two experts get no token
    chosen = network.router(token).topk(2).indices[0].tolist()
    weights = network.router(token).softmax(-1)[0]
    expected = sum(weights[index] * network.experts[index](token) for index in chosen)
    torch.testing.assert_close(network(token), expected)  # float sums in another order


class GroupedQueryAttention(nn.Module):
    """Four heads of queries on two of keys and values."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 32), nn.Linear(32, 16)
        self.v_proj, self.o_proj = nn.Linear(32, 16), nn.Linear(32, 32)
        self.norm = nn.RMSNorm(32)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(self.norm(y.transpose(1, 2).flatten(-2)))


def test_grouped_query_attention():
    torch.manual_seed(0)
    x, network = torch.randn(4, 7, 32), nn.Sequential(nn.LayerNorm(32), GroupedQueryAttention())
    check(network, lambda m: m(x), [f"1.{kind}_proj" for kind in "qkvo"])


def test_a_feed_forward_network():
    torch.manual_seed(0)
    x, network = torch.randn(4, 7, 32), nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    check(network, lambda m: m(x), ["0", "2"])


class LoRA(nn.Module):
    """A frozen layer and a low-rank update beside it, written by hand."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(4, base.in_features) / 4)
        self.B = nn.Parameter(torch.zeros(base.out_features, 4))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


def gradients(module, run):
    module.zero_grad()
    run(module).square().mean().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}


def test_a_lora_trains_beside_packed_weights_and_through_them():
    torch.manual_seed(0)
    x = torch.randn(16, 32)
    network = nn.Sequential(LoRA(nn.Linear(32, 24)), nn.LayerNorm(24), LoRA(nn.Linear(24, 24)))
    check(network, lambda m: m(x), ["0.base", "2.base"])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    losses = train(network, lambda m: m(x), learning_rate=1e-2)
    assert losses[-1] < 0.97 * losses[0]
    after = network.state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        f"{i}.base.{tensor}" for i in (0, 2) for tensor in ("weight", "weight_scale", "bias")
    }


def test_packed_layers_pass_the_gradient_of_trained_ones():
    """The first adapter learns through the second, packed layer: rounding must count as the identity there too."""
    torch.manual_seed(0)
    x = torch.randn(16, 32)
    network = nn.Sequential(LoRA(nn.Linear(32, 24)), nn.LayerNorm(24), LoRA(nn.Linear(24, 24)))
    for adapter in (network[0], network[2]):
        nn.init.normal_(adapter.B, std=0.1)
    convert_linears(network, "b158")
    expected = gradients(network, lambda m: m(x))
    pack_linears(network)
    actual = gradients(network, lambda m: m(x))
    assert list(actual) == list(expected) and float(expected["0.A"].abs().sum()) > 0
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name  # the same codes, scales and products


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed (pip install peft)")


def adapted_network(peft, **options):
    """A ternary network with peft's adapters on its two layers; the second layer has four rows, one byte high."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 4))
    convert_linears(network, "b158")
    config = peft.LoraConfig(r=4, target_modules=["1", "3"], init_lora_weights=False, **options)
    return peft.get_peft_model(network, config), torch.randn(16, 32)


BASES = ["base_model.model.1.base_layer", "base_model.model.3.base_layer"]


def test_pefts_adapters_train_before_and_after_packing(peft):
    model, x = adapted_network(peft)
    losses = train(model, lambda m: m(x))
    assert losses[-1] < 0.97 * losses[0]
    expected = gradients(model, lambda m: m(x))
    pack_and_compare(model, lambda m: m(x), BASES)
    actual = gradients(model, lambda m: m(x))
    assert len(actual) == 4 and all(".lora_" in name for name in actual)
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name
    more = train(model, lambda m: m(x))
    assert more[-1] < 0.97 * more[0]


def test_networks_with_adapters_are_converted_around_them(peft):
    torch.manual_seed(0)
    network = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 4))
    model = peft.get_peft_model(network, peft.LoraConfig(r=4, target_modules=["1", "3"], init_lora_weights=False))
    x = torch.randn(16, 32)
    check(model, lambda m: m(x), BASES, skip=["lora_A.default", "lora_B.default"])


def test_an_adapter_around_a_layer_of_torchs_encoder_is_not_bypassed(peft):
    torch.manual_seed(0)
    x, config = torch.randn(2, 5, 32), peft.LoraConfig(r=4, target_modules=["linear1"], init_lora_weights=False)
    model = peft.get_peft_model(TorchViT().encoder, config)
    convert_linears(model, "b158", skip=["lora_A.default", "lora_B.default"])
    trained = model.train()(x).detach()
    torch.testing.assert_close(evaluate(model, lambda m: m(x)), trained, rtol=0, atol=2e-2)  # as without adapter


def test_an_adapter_merged_into_ternary_weights_is_refused(peft):
    model, x = adapted_network(peft)
    weights = [model.get_submodule(name).weight.detach().clone() for name in BASES]
    model.merge_adapter()
    with pytest.raises(UserError, match=r"model\.1: adapter default is merged .*: unmerge it first") as refusal:
        pack_linears(model)
    assert "\n" not in str(refusal.value)
    assert names_of(BitLinear, model) == BASES, "a refusal changes nothing"
    model.unmerge_adapter()
    for name, weight in zip(BASES, weights, strict=True):
        # peft added numbers of order 1 and took them away again
        torch.testing.assert_close(model.get_submodule(name).weight.detach(), weight, rtol=0, atol=1e-6)
    pack_and_compare(model, lambda m: m(x), BASES)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_into_packed_weights_fails_and_changes_nothing(peft, safe_merge):
    model, x = adapted_network(peft)
    pack_linears(model)
    state, apart = copy.deepcopy(model.state_dict()), evaluate(model, lambda m: m(x))
    for name in BASES:
        wrapper = model.get_submodule(name.removesuffix(".base_layer"))
        with pytest.raises(RuntimeError, match="size of tensor|shape"):  # a packed matrix has a quarter of the rows
            wrapper.merge(safe_merge=safe_merge)
        assert not wrapper.merged
    with pytest.raises(RuntimeError, match="size of tensor"):
        model.merge_and_unload()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(evaluate(model, lambda m: m(x)), apart)


def test_an_adapter_that_computes_from_the_weights_is_refused(peft):
    model, _ = adapted_network(peft, use_dora=True)
    with pytest.raises(UserError, match=r"adapter default is a DoRA.*plain LoRA"):
        pack_linears(model)
    assert names_of(BitLinear, model) == BASES


def test_shared_layers_and_shared_weights_stay_shared():
    torch.manual_seed(0)
    shared, tied, embedding = nn.Linear(16, 16), nn.Linear(16, 16), nn.Embedding(16, 16)
    tied.weight = shared.weight
    head = nn.Linear(16, 16)
    head.weight = embedding.weight
    network = nn.Sequential(embedding, shared, nn.ReLU(), shared, tied, head)
    ids = torch.arange(12)
    assert convert_linears(network, "b158") == ["1", "3", "4", "5"]
    assert network[1] is network[3] and isinstance(network[1], BitLinear) and network[4] is not network[1]
    losses = train(network, lambda m: m(ids))
    assert losses[-1] < losses[0]
    assert network[4].weight is network[1].weight and network[5].weight is network[0].weight
    trained = evaluate(network, lambda m: m(ids))
    assert pack_linears(network) == ["1", "3", "4", "5"]
    assert network[1] is network[3] and isinstance(network[1], PackedBitLinear)
    assert torch.equal(network[4].weight, network[1].weight) and network[0].weight.is_floating_point()
    assert torch.equal(evaluate(network, lambda m: m(ids)), trained)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
def test_weights_computed_from_others_stay(wrap):
    torch.manual_seed(0)
    network, x = nn.Sequential(wrap(nn.Linear(16, 16)), nn.Linear(16, 16)), torch.randn(3, 16)
    before = evaluate(network[0], lambda m: m(x))
    assert convert_linears(network, "b158") == ["1"]
    assert torch.equal(evaluate(network[0], lambda m: m(x)), before)


def test_a_forward_of_its_own_stays_and_hooks_come_along():
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(3, 16)
    network[0].forward = lambda x: x
    seen = []
    handle = network[1].register_forward_hook(lambda layer, *_: seen.append(type(layer)))
    assert convert_linears(network, "b158") == ["1"]
    network(x)
    handle.remove()
    network(x)
    assert seen == [BitLinear]


@pytest.mark.parametrize("quant", ["b158", "b1", "b158_row", "sherry"])
def test_codes_of_rows_that_fill_no_bytes_take_a_byte_each(quant):
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 10)), torch.randn(3, 16)
    convert_linears(network, quant)
    before = evaluate(network, lambda m: m(x))
    assert pack_linears(network) == ["0", "1"]
    assert torch.equal(evaluate(network, lambda m: m(x)), before)
    assert [(layer.weight.dtype, *layer.weight.shape) for layer in network] == [
        (torch.uint8, 4, 16),
        (torch.int8, 10, 16),
    ]
