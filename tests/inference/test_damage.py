"""Models that compute no numbers are refused, with the tensor that is to blame, by both engines and every head."""

import pytest
import torch

import bitnet_lit
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.config import EvaluateConfig, QuantConfig
from bitnet_lit.errors import ModelError, UserError
from bitnet_lit.inference.damage import find_damage
from bitnet_lit.inference.evaluation import evaluate
from tests.support import run_command, tiny_model

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
def test_a_weight_that_is_no_number_is_named_when_the_model_is_opened(tmp_path, tokenizer, name, quant):
    folder = damaged(tmp_path / "model", tokenizer, name, float("nan"), quant)
    engines = [{"engine": "torch"}]
    engines += [{"engine": "cpu", "head": head, "threads": 2} for head in ("int4", "int8", "float")]
    engines += [{"engine": "cpu", "kv_cache": cache} for cache in ("float", "int8")]
    for options in engines:
        with pytest.raises(UserError, match=f"tensor {name} holds 1 of .* not finite"):
            bitnet_lit.load(folder, **options)


@pytest.mark.parametrize("engine", ["cpu", "torch"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight"])
def test_an_infinite_weight_is_named(tmp_path, tokenizer, name, engine):
    folder = damaged(tmp_path / "model", tokenizer, name, float("-inf"))
    with pytest.raises(UserError, match=f"tensor {name}"):
        bitnet_lit.load(folder, engine=engine)


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_weights_that_are_finite_and_overflow(tmp_path, tokenizer, engine):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(1e38)
        model.model.embed_tokens.weight.mul_(1e6)
    save_model_folder(tmp_path / "model", model, QuantConfig(), tokenizer)
    opened = bitnet_lit.load(tmp_path / "model", engine=engine)
    for temperature in (0.0, 0.8):
        with pytest.raises(ModelError, match=r"no numbers: the logits of token \d+ are not finite: every weight of .*"):
            opened.generate("Lily went home", temperature=temperature, max_new_tokens=20, seed=1)


def test_a_loss_that_is_no_number_is_not_printed(tmp_path, shards, tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(1e38)
        model.model.embed_tokens.weight.mul_(1e6)
    save_model_folder(tmp_path / "model", model, QuantConfig(), tokenizer)
    with pytest.raises(ModelError, match="its loss is nan: the weights are finite"):
        evaluate(EvaluateConfig(checkpoint=str(tmp_path / "model"), data_dir=str(shards), accelerator="cpu"))


def test_a_file_that_was_written_over_since_is_named(tmp_path, tokenizer):
    folder = damaged(tmp_path / "model", tokenizer, "model.norm.weight", 1.0)
    stored = open_stored(folder)
    assert "every weight" in find_damage(stored)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    _, _, offset = stored.reader._place["model.norm.weight"]
    content[offset : offset + 4] = b"\xff" * 4
    path.write_bytes(content)
    assert "tensor model.norm.weight holds 1 of" in find_damage(stored)


def test_infer_says_it_in_one_line(tmp_path, tokenizer):
    damaged(tmp_path / "model", tokenizer, "model.norm.weight", float("nan"))
    for engine in ("cpu", "torch"):
        result = run_command("infer", "checkpoint=model", f"engine={engine}", cwd=tmp_path, check=False)
        assert result.returncode == 2 and result.stderr.startswith("error: model: tensor model.norm.weight holds 1 of")
        assert result.stderr.count("\n") == 1 and "model.norm.weight" in result.stderr
