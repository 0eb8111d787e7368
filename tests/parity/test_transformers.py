"""Other people's code agrees: Hugging Face's BitNet and Llama, layer by layer and through the model folder."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitNetForCausalLM, LlamaForCausalLM
from transformers.models.bitnet.modeling_bitnet import BitNetRotaryEmbedding, apply_rotary_pos_emb

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.pretrained import from_pretrained
from bitnet_lit.config import QuantConfig
from bitnet_lit.model.layers import apply_rotary, rotary_tables
from tests.support import assert_close_but_for_borders, tiny_config, tiny_model

# float32 sums in another order; dense logits here are about 1 in size
DENSE = {"rtol": 1e-4, "atol": 1e-4}


def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("quant", "sizes", "cls"),
    [
        ("none", {}, BitNetForCausalLM),
        ("b158", {}, BitNetForCausalLM),
        ("b158", {"hidden_act": "relu2", "num_key_value_heads": 2, "rope_theta": 5e5}, BitNetForCausalLM),
        ("b158", {"tie_word_embeddings": False, "num_key_value_heads": 1}, BitNetForCausalLM),
        ("none", {"sub_norm": False, "num_key_value_heads": 2}, LlamaForCausalLM),
        ("b158", {"sub_norm": False}, LlamaForCausalLM),
    ],
    ids=str,
)
def test_the_model_folder_gives_the_same_logits_in_transformers(tmp_path, quant, sizes, cls):
    model = tiny_model(quant, **sizes)
    save_model_folder(tmp_path / "model", model, QuantConfig(name=quant), None)
    other = theirs(tmp_path / "model")
    assert type(other) is cls
    ids = torch.randint(0, 512, (3, 40))
    with torch.no_grad():
        ours, their_logits = model(ids), other(ids).logits
    assert ours.std() > 0.1, "a test on constant logits proves nothing"
    if quant == "none":
        torch.testing.assert_close(ours, their_logits, **DENSE)
    else:
        assert_close_but_for_borders(ours, their_logits)
    reloaded = from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(reloaded.model(ids), ours)


def test_greedy_text_is_the_same(tmp_path):
    model = tiny_model("b158")
    save_model_folder(tmp_path / "model", model, QuantConfig(), None)
    other = theirs(tmp_path / "model")
    ids = torch.tensor([[1, 5, 9]])
    generated = other.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    for _ in range(generated.shape[1] - 3):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids, generated)


@pytest.mark.parametrize("quant", [QuantConfig(name="b1"), QuantConfig(weight_scale="absmedian")], ids=str)
def test_what_transformers_would_compute_wrongly_it_refuses(tmp_path, quant):
    model = tiny_model("none")
    save_model_folder(tmp_path / "model", model, quant, None)
    with pytest.raises(ValueError, match="bitnet_lit"):
        theirs(tmp_path / "model")


def test_layers_agree_inside_the_network(tmp_path):
    model = tiny_model("none")
    save_model_folder(tmp_path / "model", model, QuantConfig(name="none"), None)
    other = theirs(tmp_path / "model")
    ids = torch.randint(0, 512, (2, 20))
    ours: dict = {}
    expected: dict = {}

    def record(into, network):
        for name, module in network.named_modules():
            if name.endswith(("self_attn", "mlp", "input_layernorm", "attn_sub_norm", "ffn_sub_norm", "q_proj")):

                def hook(_, __, output, name=name):
                    into[name] = output[0] if isinstance(output, tuple) else output

                module.register_forward_hook(hook)

    record(ours, model)
    record(expected, other)
    with torch.no_grad():
        model(ids)
        other(ids)
    assert len(ours) == 12 and ours.keys() == expected.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_rotary_equals_theirs(tmp_path):
    config = tiny_config(rope_theta=5e5)
    save_model_folder(tmp_path / "model", tiny_model(rope_theta=5e5), QuantConfig(), None)
    other = theirs(tmp_path / "model")
    x = torch.randn(1, 4, 30, config.head_size)
    cos, sin = rotary_tables(config)
    their_cos, their_sin = BitNetRotaryEmbedding(other.config)(x, torch.arange(30)[None])
    expected, _ = apply_rotary_pos_emb(x, x, their_cos, their_sin)
    torch.testing.assert_close(apply_rotary(x, cos[:30], sin[:30]), expected, rtol=1e-6, atol=1e-6)


def test_config_names_what_the_folder_is(tmp_path):
    cases = {("none", True): "bitnet", ("none", False): "llama", ("b158", True): "bitnet", ("b1", True): "bitnet_lit"}
    for (quant, sub_norm), model_type in cases.items():
        save_model_folder(tmp_path / "m", tiny_model("none", sub_norm=sub_norm), QuantConfig(name=quant), None)
        written = json.loads((tmp_path / "m" / "config.json").read_text())
        assert written["model_type"] == model_type
        assert ("quantization_config" in written) == (quant != "none")
