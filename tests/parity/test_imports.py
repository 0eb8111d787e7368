"""Models of others give their own logits here: folders that transformers saves, files of llama2.c."""

import json
import struct

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    BitNetForCausalLM,
    BitNetQuantConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.bitnet import pack_weights

import bitnet_lit
from bitnet_lit.checkpoints.formats.latent import latent_tensors
from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError
from tests.exports.exporting import export_to, leave_out_other_tools, saved_model
from tests.support import assert_close_but_for_borders

# float32 sums in another order; logits here are about 1 in size
DENSE = {"rtol": 1e-4, "atol": 1e-4}

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
# BitNet b1.58 2B4T: 20 heads, 5 of keys and values, relu2, theta 500000, tied; narrow and with two layers.
BITNET = {
    **TINY,
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "hidden_act": "relu2",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
}


def randomized(model, seed=0):
    """Norms and biases too: transformers starts them at one and zero, where mixing them up would not show."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model.eval()


def agree(folder, vocabulary=512, quantized=True):
    """Logits of transformers and ours on the same folder."""
    with torch.inference_mode():
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for parameter in other.parameters():
            parameter.data = parameter.data.float()
        ids = torch.randint(0, vocabulary, (3, 40), generator=torch.Generator().manual_seed(1))
        theirs = other(ids).logits
    ours = bitnet_lit.load(folder).logits(ids)
    assert ours.std() > 0.1, "a test on constant logits proves nothing"
    if quantized:
        assert_close_but_for_borders(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, **DENSE)
    return other


def bitnet_folder(folder, linear_class, mode, scale_dtype=torch.float32, dtype=torch.float32, **sizes):
    """A folder in one of transformers' spellings.

    transformers saves what it has loaded, but does not quantize latent weights: so it saves the dense
    network, its own `pack_weights` packs the codes of its rule, and its own config class describes them.
    """
    torch.manual_seed(0)
    model = randomized(BitNetForCausalLM(BitNetConfig(**{**BITNET, **sizes})))
    model.to(dtype).save_pretrained(folder)
    quantization = BitNetQuantConfig(
        linear_class=linear_class, quantization_mode=mode, modules_to_not_convert=["lm_head"]
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization.to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    if mode == "online":
        return folder
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors[name].float()
        scale = weight.abs().mean()
        tensors[name] = pack_weights((weight / scale).round().clamp(-1, 1))
        stored = 1 / scale if linear_class == "bitlinear" else scale
        tensors[f"{name}_scale"] = stored.reshape(1).to(scale_dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitnet_with_latent_weights(tmp_path, dtype):
    folder = bitnet_folder(tmp_path / "hf", "autobitlinear", "online", dtype=dtype)
    other = agree(folder)
    assert type(other) is BitNetForCausalLM
    stored = open_stored(folder)
    assert stored.quant == QuantConfig() and not stored.packed and stored.config.hidden_act == "relu2"
    assert len(stored.quantized) == 14 and next(iter(latent_tensors(stored, torch.float32)))
    # As transformers saves it once it was loaded.
    other.save_pretrained(tmp_path / "saved")
    agree(tmp_path / "saved")


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_bitnet_with_packed_codes(tmp_path, linear_class, scale_dtype):
    folder = bitnet_folder(tmp_path / "hf", linear_class, "offline", scale_dtype)
    other = agree(folder)
    stored = open_stored(folder)
    assert stored.packed and stored.inverse_scales == (linear_class == "bitlinear")
    # As it is in transformers once it was loaded: codes of AutoBitLinear are then plain numbers, one a weight, which
    # transformers 5.23 reads but does not save itself.
    if linear_class == "bitlinear":
        other.save_pretrained(tmp_path / "saved")
    else:
        tensors = {name: tensor.clone() for name, tensor in other.state_dict().items() if name != "lm_head.weight"}
        (tmp_path / "saved").mkdir()
        save_file(tensors, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "saved" / "config.json").write_text((folder / "config.json").read_text())
    stored = load_file(tmp_path / "saved" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert stored.shape[0] == (432 if linear_class == "autobitlinear" else 108)
    agree(tmp_path / "saved")
    assert open_stored(tmp_path / "saved").packed


def test_the_spellings_are_one_model(tmp_path):
    ids = torch.randint(0, 512, (2, 40))
    spellings = [("autobitlinear", "online"), ("autobitlinear", "offline"), ("bitlinear", "offline")]
    logits = [
        bitnet_lit.load(bitnet_folder(tmp_path / f"{number}", *spelling)).logits(ids)
        for number, spelling in enumerate(spellings)
    ]
    # transformers' mean of the magnitudes is PyTorch's, whose last bit depends on the number of threads; ours does not.
    assert_close_but_for_borders(logits[1], logits[0])
    # 1 / (1 / scale) is the scale to the last bit or two.
    assert_close_but_for_borders(logits[2], logits[0])


def test_bitnet_with_its_whole_vocabulary(tmp_path):
    sizes = {"vocab_size": 128256, "hidden_size": 80, "intermediate_size": 216, "num_hidden_layers": 1}
    agree(bitnet_folder(tmp_path / "hf", "autobitlinear", "online", **sizes), vocabulary=128256)


DENSE_MODELS = [
    (LlamaForCausalLM, LlamaConfig, {}),
    (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "head_dim": 32, "rms_norm_eps": 1e-5}),
    (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1, "rope_parameters": {"rope_theta": 5e5}}),
    (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    (MistralForCausalLM, MistralConfig, {"sliding_window": 48}),  # longer than the text here: all of it is seen
    (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": {"rope_theta": 1e6}}),
    (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(
    ("cls", "config", "sizes"), DENSE_MODELS, ids=lambda v: v.__name__ if isinstance(v, type) else str(v)
)
@pytest.mark.parametrize("shard", [None, "40KB"])
def test_dense_models(tmp_path, cls, config, sizes, shard):
    torch.manual_seed(0)
    model = randomized(cls(config(**{**TINY, **sizes})))
    model.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shard)
    other = agree(tmp_path, quantized=False)
    assert type(other) is cls
    stored = open_stored(tmp_path)
    assert stored.quant.name == "none" and not stored.quantized


def test_sharded_bitnet(tmp_path):
    torch.manual_seed(0)
    folder = bitnet_folder(tmp_path / "hf", "autobitlinear", "online")
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    agree(tmp_path / "sharded")


@pytest.mark.parametrize(
    ("config", "sizes", "said"),
    [
        (LlamaConfig, {"attention_bias": True}, "attention_bias=true"),
        (LlamaConfig, {"mlp_bias": True}, "mlp_bias=true"),
        (LlamaConfig, {"hidden_act": "gelu"}, "hidden_act=gelu"),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rotary positions of type linear",
        ),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window=true"),
        (Qwen3Config, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding"),
    ],
    ids=str,
)
def test_networks_that_are_not_this_one_are_refused(tmp_path, config, sizes, said):
    config(**{**TINY, **sizes}).save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=said) as error:
        open_stored(tmp_path)
    assert "\n" not in str(error.value)


def test_biases_of_packed_layers_are_refused(tmp_path):
    """AutoBitLinear multiplies the bias by the scale of the codes: reading it as a bias would be another network."""
    torch.manual_seed(0)
    randomized(Qwen2ForCausalLM(Qwen2Config(**TINY))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = BitNetQuantConfig(
        linear_class="autobitlinear", quantization_mode="offline", modules_to_not_convert=["lm_head"]
    ).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="bias"):
        open_stored(tmp_path)


@pytest.mark.parametrize("sizes", [{}, {"sub_norm": False, "num_key_value_heads": 2}], ids=["bitnet", "llama"])
@pytest.mark.parametrize("form", ["latent", "packed"])
def test_greedy_text_of_our_exports(tmp_path, monkeypatch, form, sizes):
    """Online (latent) and offline (packed): the same 64 tokens in both programs."""
    leave_out_other_tools(monkeypatch)
    # Not tied: a random tied model repeats the token it has just seen.
    sizes = {**sizes, "num_hidden_layers": 2, "max_position_embeddings": 80, "tie_word_embeddings": False}
    folder = saved_model(tmp_path / "model", QuantConfig(), None, **sizes)
    export_to(tmp_path / "out", folder, format=form)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.tensor([[1, 5, 9]])
    theirs = other.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=64, do_sample=False
    )
    model = bitnet_lit.load(tmp_path / "out")
    for _ in range(64):
        ids = torch.cat([ids, model.logits(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert theirs.shape == (1, 67) and torch.equal(ids, theirs)
    assert len(set(ids[0].tolist())) > 10, "a text of few tokens proves nothing"


# --- llama2.c: its network, written from the description of its files. ---


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x):
    """Rotary positions on neighbours: (2i, 2i + 1) of a head is one complex number; x (B, T, H, P)."""
    length, size = x.shape[1], x.shape[3]
    frequency = 10000.0 ** -(torch.arange(0, size, 2) / size)
    angle = torch.outer(torch.arange(length).float(), frequency)[None, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1)
    return pairs.flatten(-2)


def llama2c_logits(weights, arguments, ids):
    heads, kv_heads = arguments["n_heads"], arguments["n_kv_heads"]
    size = arguments["dim"] // heads
    x = weights["tok_embeddings.weight"][ids]
    batch, length = ids.shape
    mask = torch.full((length, length), float("-inf")).triu(1)
    for layer in range(arguments["n_layers"]):
        w = {name.split(".", 2)[2]: t for name, t in weights.items() if name.startswith(f"layers.{layer}.")}
        h = norm(x, w["attention_norm.weight"])
        q = turned((h @ w["attention.wq.weight"].T).view(batch, length, heads, size))
        k = turned((h @ w["attention.wk.weight"].T).view(batch, length, kv_heads, size))
        v = (h @ w["attention.wv.weight"].T).view(batch, length, kv_heads, size)
        k, v = (t.repeat_interleave(heads // kv_heads, 2) for t in (k, v))
        scores = torch.einsum("bthp,bshp->bhts", q, k) / size**0.5 + mask
        y = torch.einsum("bhts,bshp->bthp", scores.softmax(-1), v).flatten(-2)
        x = x + y @ w["attention.wo.weight"].T
        h = norm(x, w["ffn_norm.weight"])
        gated = F.silu(h @ w["feed_forward.w1.weight"].T) * (h @ w["feed_forward.w3.weight"].T)
        x = x + gated @ w["feed_forward.w2.weight"].T
    return norm(x, weights["norm.weight"]) @ weights["output.weight"].T


def llama2c_weights(kv_heads, tied):
    arguments = {
        "dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": kv_heads,
        "vocab_size": 300,
        "multiple_of": 4,
        "max_seq_len": 64,
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    dim, hidden, kv_size = 48, 136, kv_heads * 12
    weights = {"tok_embeddings.weight": torch.randn(300, dim) * 0.3}
    for layer in range(2):
        shapes = {
            "attention.wq": (dim, dim),
            "attention.wk": (kv_size, dim),
            "attention.wv": (kv_size, dim),
            "attention.wo": (dim, dim),
            "feed_forward.w1": (hidden, dim),
            "feed_forward.w2": (dim, hidden),
            "feed_forward.w3": (hidden, dim),
        }
        weights |= {f"layers.{layer}.{name}.weight": torch.randn(shape) * 0.2 for name, shape in shapes.items()}
        for name in ("attention_norm", "ffn_norm"):
            weights[f"layers.{layer}.{name}.weight"] = torch.rand(dim) + 0.5
    weights["norm.weight"] = torch.rand(dim) + 0.5
    weights["output.weight"] = weights["tok_embeddings.weight"] if tied else torch.randn(300, dim) * 0.3
    return weights, arguments


def write_pt(path, weights, arguments, prefix="_orig_mod."):
    """As train.py saves: a compiled model's names, the optimizer, and what it was called with."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in weights.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": arguments,
        "iter_num": 298000,
        "best_val_loss": torch.tensor(1.07),
        "config": {"out_dir": "out", "batch_size": 128, "dtype": "bfloat16", "compile": True},
    }
    torch.save(checkpoint, path)


def write_bin(path, weights, arguments, tied):
    """As export.py writes version 0."""

    def floats(tensor):
        return struct.pack(f"<{tensor.numel()}f", *tensor.flatten().tolist())

    vocabulary = arguments["vocab_size"]
    header = (48, 136, 2, 4, arguments["n_kv_heads"], vocabulary if tied else -vocabulary, 64)
    kinds = ["attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo"]
    kinds += ["ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    order = ["tok_embeddings.weight", *(f"layers.{i}.{kind}.weight" for kind in kinds for i in range(2)), "norm.weight"]
    content = struct.pack("<7i", *header) + b"".join(floats(weights[name]) for name in order)
    angle = torch.outer(torch.arange(64).float(), 10000.0 ** -(torch.arange(0, 12, 2) / 12))
    content += floats(angle.cos()) + floats(angle.sin())
    path.write_bytes(content + (b"" if tied else floats(weights["output.weight"])))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["pt", "pt_plain", "bin"])
def test_llama2cs_files(tmp_path, kind, kv_heads, tied):
    weights, arguments = llama2c_weights(kv_heads, tied)
    path = tmp_path / f"stories.{kind[:3].rstrip('_')}"
    if kind == "bin":
        write_bin(path, weights, arguments, tied)
    else:
        write_pt(path, weights, arguments, prefix="_orig_mod." if kind == "pt" else "")
    ids = torch.randint(0, 300, (2, 40))
    theirs = llama2c_logits(weights, arguments, ids)
    model = bitnet_lit.load(path)
    assert theirs.std() > 0.5 and model.config.tie_word_embeddings == tied
    torch.testing.assert_close(model.logits(ids), theirs, **DENSE)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_we_write_for_run_c_is_its_network(tmp_path, monkeypatch, tied):
    """The gate reads a .bin with our own reader: here another one, from the description, computes the logits."""
    leave_out_other_tools(monkeypatch)
    folder = saved_model(
        tmp_path / "model",
        QuantConfig(name="none"),
        None,
        hidden_size=48,
        intermediate_size=136,
        vocab_size=300,
        num_hidden_layers=2,
        num_key_value_heads=2,
        sub_norm=False,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    export_to(tmp_path / "c", folder, format="llama2c")
    content = (tmp_path / "c" / "model.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, context = struct.unpack("<7i", content[:28])
    assert (vocabulary > 0) == tied
    vocabulary = abs(vocabulary)
    values = torch.frombuffer(bytearray(content[28:]), dtype=torch.float32)
    at = 0

    def take(*shape):
        nonlocal at
        count = int(torch.tensor(shape).prod())
        at += count
        return values[at - count : at].reshape(shape)

    kv_size = kv_heads * (dim // heads)
    weights = {"tok_embeddings.weight": take(vocabulary, dim)}
    for kind, shape in {
        "attention_norm": (dim,),
        "attention.wq": (dim, dim),
        "attention.wk": (kv_size, dim),
        "attention.wv": (kv_size, dim),
        "attention.wo": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }.items():
        for layer in range(layers):
            weights[f"layers.{layer}.{kind}.weight"] = take(*shape)
    weights["norm.weight"] = take(dim)
    take(context * dim // heads)  # cos and sin
    weights["output.weight"] = weights["tok_embeddings.weight"] if tied else take(vocabulary, dim)
    assert at == len(values)
    ids = torch.randint(0, 300, (2, 40))
    arguments = {"dim": dim, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads}
    torch.testing.assert_close(llama2c_logits(weights, arguments, ids), bitnet_lit.load(folder).logits(ids), **DENSE)
