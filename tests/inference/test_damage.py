"""Models that compute no numbers are named, with the tensor that is to blame, by both engines and every head."""

import pytest
import torch

import bitnet_lit
from bitnet_lit.artifacts.locate import open_source
from bitnet_lit.artifacts.save import save_model_folder
from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import ModelError
from bitnet_lit.inference.damage import find_damage
from tests.support import run_door, tiny_model

# Every kind of tensor: a row of the embedding that no prompt here holds is met only through the tied head.
NAMES = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.attn_sub_norm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.layers.1.mlp.gate_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.mlp.ffn_sub_norm.weight",
    "model.layers.1.mlp.down_proj.weight",
]


def damaged(folder, tokenizer, name, value, quant="b158"):
    model = tiny_model(quant)
    with torch.no_grad():
        model.state_dict()[name].view(-1)[7] = value
    save_model_folder(folder, model, QuantConfig(name=quant), tokenizer)
    return folder


@pytest.mark.parametrize("quant", ["b158", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_no_number_is_named_at_the_first_token(tmp_path, tokenizer, name, quant):
    folder = damaged(tmp_path / "model", tokenizer, name, float("nan"), quant)
    engines = [{"engine": "torch"}]
    engines += [{"engine": "cpu", "head": head, "threads": 2} for head in ("int4", "int8", "float")]
    engines += [{"engine": "cpu", "kv_cache": cache} for cache in ("float", "int8")]
    for options in engines:
        model = bitnet_lit.load(folder, **options)
        for temperature in (0.0, 0.8):
            with pytest.raises(ModelError, match=f"no numbers: .* tensor {name} of .* not finite"):
                model.generate("Lily went home", temperature=temperature, max_new_tokens=20, seed=1)


@pytest.mark.parametrize("engine", ["cpu", "torch"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight"])
def test_an_infinite_weight_is_named(tmp_path, tokenizer, name, engine):
    model = bitnet_lit.load(damaged(tmp_path / "model", tokenizer, name, float("-inf")), engine=engine)
    with pytest.raises(ModelError, match=f"tensor {name}"):
        model.generate("Lily", max_new_tokens=20, seed=1)


def test_weights_that_are_finite_and_overflow(tmp_path, tokenizer):
    folder = damaged(tmp_path / "model", tokenizer, "model.norm.weight", 1e38)
    assert "every weight" in find_damage(open_source(folder))


def test_infer_says_it_in_one_line(tmp_path, tokenizer):
    damaged(tmp_path / "model", tokenizer, "model.norm.weight", float("nan"))
    for engine in ("cpu", "torch"):
        result = run_door("infer", "checkpoint=model", f"engine={engine}", cwd=tmp_path, check=False)
        assert result.returncode == 1 and result.stderr.startswith("error: the model computes no numbers")
        assert result.stderr.count("\n") == 1 and "model.norm.weight" in result.stderr
