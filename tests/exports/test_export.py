"""Export: every format takes every model that it can hold, and refuses the others with a remedy, leaving nothing."""

import importlib
import itertools
import json
import re
import shlex

import gguf
import numpy as np
import pytest
import torch

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.checkpoints.pretrained import from_pretrained
from bitnet_lit.config import ExportConfig, QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.exports.destination import default_out
from bitnet_lit.exports.targets import problems
from bitnet_lit.exports.write import export
from tests.exports.exporting import (
    FORMATS,
    QUANTS,
    export_to,
    files_below,
    leave_out_other_tools,
    random_model,
    saved_model,
)
from tests.support import run_command

HEADS = 4


def without_llama_cpp():
    """Why llama.cpp cannot run here; empty where it can."""
    try:
        importlib.import_module("llama_cpp")
    except Exception as error:  # not installed, a package it needs is missing, or a library that does not load
        return f"llama_cpp cannot be imported: {type(error).__name__}: {error}"
    return ""


needs_llama_cpp = pytest.mark.skipif(bool(without_llama_cpp()), reason=without_llama_cpp())


def expected_refusal(options, quant, tied, sub_norm):
    """The remedy that a user hears; None where the format holds the model. Written from the tools' graphs, not code."""
    form, type = options["format"], options.get("type")
    if form == "packed" and quant == "none":
        return "take format=latent, or train with quant=b158"
    if form == "llama2c" and sub_norm:
        return "train with model.sub_norm=false"
    if form == "gguf" and sub_norm and not tied:
        return "train with true, or with model.sub_norm=false"
    if form == "gguf" and type != "f16" and quant == "none":
        return "take type=f16 (target gguf_f16), or train with quant=b158"
    return None


@pytest.mark.parametrize("sub_norm", [True, False], ids=["sub_norm", "llama"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [1, HEADS // 2, HEADS], ids=lambda heads: f"kv{heads}")
@pytest.mark.parametrize("quant", QUANTS)
def test_every_format_holds_the_model_or_refuses_it(tmp_path, tokenizer, monkeypatch, quant, kv_heads, tied, sub_norm):
    leave_out_other_tools(monkeypatch)
    folder = saved_model(
        tmp_path / "model",
        QUANTS[quant],
        tokenizer,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        sub_norm=sub_norm,
        intermediate_size=512 if kv_heads == 1 else 256,
    )
    stored = open_stored(folder)
    for name, options in FORMATS.items():
        out = tmp_path / "out" / name
        remedy = expected_refusal(options, quant, tied, sub_norm)
        if options["format"] != "latent":
            chosen = ExportConfig(**options).chosen_format
            assert bool(problems(chosen, stored.config, stored.quant)) == (remedy is not None), name
        if remedy is not None:
            before = files_below(tmp_path)
            with pytest.raises(UserError) as error:
                export_to(out, folder, **options)
            assert remedy in str(error.value) and "\n" not in str(error.value), name
            assert files_below(tmp_path) == before, name
            continue
        report = export_to(out, folder, **options)
        found = report["parity"]["bitnet_lit"]
        if name in ("latent", "packed", "llama2c"):
            # Nothing is rounded there: the same codes, scales and floats in the same order of summation.
            assert found["max_logit_difference"] == 0, name
            assert all(row["error"] == 0 for row in report["tensors"]), name
        else:
            assert found["max_logit_difference"] > 0, name  # rounded, and the comparison saw it
        assert {row["name"] for row in report["tensors"]} == set(stored.tensors), name
        assert out.exists() and not list(out.parent.glob(".*")), name


@pytest.mark.parametrize(
    ("format", "says"),
    [({"format": "latent"}, "2.0 times fp16"), ({"format": "latent", "dtype": "bfloat16"}, "1/1.0 of")],
)
def test_a_size_above_that_of_fp16_is_a_factor(tmp_path, tokenizer, capsys, format, says):
    model = random_model(QuantConfig(name="none"))
    save_model_folder(tmp_path / "model", model, QuantConfig(name="none"), tokenizer)
    export(ExportConfig(checkpoint=str(tmp_path), out=str(tmp_path / "out"), verify=False, **format))
    assert f"bits a weight with embeddings, {says}" in capsys.readouterr().out


def test_the_report_says_the_sizes_that_lie_on_the_disk(tmp_path, tokenizer, monkeypatch):
    leave_out_other_tools(monkeypatch)
    folder = saved_model(tmp_path / "model", QuantConfig(), tokenizer, intermediate_size=512)
    written = {"packed": "model.safetensors", "latent": "model.safetensors", "llama2c": "model.bin"}
    for name, options in FORMATS.items():
        if name == "llama2c":
            continue
        out = tmp_path / name
        report = export_to(out, folder, **options)
        file = out / written[options["format"]] if out.is_dir() else out
        # Beside the tensors stand a header and, in a GGUF, the vocabulary: below 64 KiB for 512 entries.
        assert 0 < file.stat().st_size - report["sizes"]["bytes"] < 2**16, name
        note = json.loads((out / "export.json" if out.is_dir() else tmp_path / f"{name}.json").read_text())
        assert note == json.loads(json.dumps({key: value for key, value in report.items() if key != "out"}))
    packed, ternary = (json.loads((tmp_path / n).read_text()) for n in ("packed/export.json", "tq2_0+q8_0.json"))
    bits = {row["name"]: 8 * row["bytes"] / (row["shape"][0] * row["shape"][-1]) for row in packed["tensors"]}
    assert 2 < bits["model.layers.0.mlp.up_proj.weight"] < 2.001  # four codes a byte, and 4 bytes of scale
    bits = {row["name"]: 8 * row["bytes"] / (row["shape"][0] * row["shape"][-1]) for row in ternary["tensors"]}
    assert bits["model.layers.0.mlp.up_proj.weight"] == 66 * 8 / 256
    assert bits["model.embed_tokens.weight"] == 34 * 8 / 32


MODERN = {"intermediate_size": 512, "num_key_value_heads": 2}
LLAMA = {**MODERN, "sub_norm": False}
QWEN = {**LLAMA, "qk_norm": True}


@pytest.mark.parametrize(
    ("quant", "sizes", "options"),
    [
        ("b158", {**MODERN, "hidden_act": "relu2", "rope_theta": 5e5}, "latent"),
        ("b158", MODERN, "latent_bf16"),
        ("b158", {**MODERN, "tie_word_embeddings": False}, "packed"),
        ("absmedian", LLAMA, "packed"),
        ("b1", LLAMA, "packed_bf16"),
        ("none", {**LLAMA, "qkv_bias": True}, "latent"),
        ("none", {**LLAMA, "qk_norm": True, "head_dim": 32}, "latent_bf16"),
        ("b158", {**LLAMA, "qkv_bias": True}, "latent"),
        ("b158", {**LLAMA, "qk_norm": True, "head_dim": 32}, "latent"),
    ],
    ids=str,
)
def test_transformers_computes_the_same(tmp_path, tokenizer, quant, sizes, options):
    folder = saved_model(tmp_path / "model", QUANTS[quant], tokenizer, **sizes)
    found = export_to(tmp_path / "out", folder, **FORMATS[options])["parity"]["transformers"]
    # Sums in another order: where a last bit moves an activation over a rounding border, its code changes by 1 of 127.
    # bfloat16 rounds 1/256 of each dense weight on top of it (0.018 at most over the 48 models of the matrix).
    bound = 0.03 if options.endswith("bf16") else 0.003
    assert found["mean_logit_difference"] < bound and found["same_likeliest_token"] > 0.8


@pytest.mark.llama_cpp
@needs_llama_cpp
@pytest.mark.parametrize(
    ("quant", "sizes", "options"),
    [
        ("b158", MODERN, "tq2_0+q8_0"),
        ("b158", MODERN, "tq1_0+q6_k"),
        ("b1", MODERN, "tq2_0+f16"),
        ("absmedian", {**LLAMA, "tie_word_embeddings": False}, "tq2_0+q6_k"),
        ("b158", {**LLAMA, "num_key_value_heads": 1, "rope_theta": 5e5}, "tq1_0+f16"),
        ("b158", MODERN, "f16+f16"),
        ("none", {**LLAMA, "tie_word_embeddings": False}, "f16+q8_0"),
        ("b158", QWEN, "tq2_0+q8_0"),
        ("b1", {**QWEN, "tie_word_embeddings": False}, "tq1_0+f16"),
        ("none", {**QWEN, "head_dim": 32}, "f16+f16"),
    ],
    ids=str,
)
def test_llama_cpp_computes_the_same(tmp_path, tokenizer, quant, sizes, options):
    folder = saved_model(tmp_path / "model", QUANTS[quant], tokenizer, **sizes)
    found = export_to(tmp_path / "out.gguf", folder, **FORMATS[options])["parity"]["llama.cpp"]
    # It quantizes activations by blocks of 256 and the head's inputs to 8 bits: more than our own reading differs, and
    # less than any of its parts left out or turned (0.3 and more, see test_export_gate.py).
    assert found["mean_logit_difference"] < 0.06 and abs(found["loss_difference"]) < 0.02


@pytest.mark.parametrize("options", ["latent", "packed"])
@pytest.mark.parametrize(
    ("quant", "sizes"),
    [
        (QuantConfig(activation_bits=4), {}),
        (QuantConfig(skip=["lm_head", "o_proj"]), {}),
        (QuantConfig(name="b158_row"), {}),
        (QuantConfig(name="b158_group", settings={"group_size": 64}), {}),
        (QuantConfig(), {"head_dim": 32}),
        (QuantConfig(), {"residual_scales": True, "x0_scales": True, "value_embeddings": True}),
        (QuantConfig(), {"qkv_bias": True}),
    ],
    ids=str,
)
def test_what_transformers_does_not_know_stays_ours(tmp_path, tokenizer, quant, sizes, options):
    """Folders are written in any case; transformers refuses them, because it would compute something else."""
    folder = saved_model(tmp_path / "model", quant, tokenizer, **sizes)
    if options == "packed" and "qkv_bias" in sizes:  # it would read the codes, and multiply the biases
        with pytest.raises(UserError, match="transformers"):
            export_to(tmp_path / "out", folder, **FORMATS[options])
        assert not (tmp_path / "out").exists()
        return
    report = export_to(tmp_path / "out", folder, **FORMATS[options])
    assert "transformers" not in report["parity"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "bitnet_lit"
    ids = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "out").model(ids), from_pretrained(folder).model(ids))


@pytest.mark.parametrize("options", ["packed", "tq2_0+q8_0", "f16+f16", "llama2c"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_quantized_head_is_held_by_no_other_tool(tmp_path, tokenizer, monkeypatch, options, tied):
    leave_out_other_tools(monkeypatch)
    folder = saved_model(tmp_path / "model", QuantConfig(skip=[]), tokenizer, sub_norm=False, tie_word_embeddings=tied)
    with pytest.raises(UserError, match="lm_head"):
        export_to(tmp_path / "out", folder, **FORMATS[options])
    assert not (tmp_path / "out").exists()
    export_to(tmp_path / "latent", folder, format="latent")
    ids = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "latent").model(ids), from_pretrained(folder).model(ids))


@pytest.mark.parametrize(
    ("quant", "sizes", "options"),
    [
        ("b158", {}, "tq2_0+q8_0"),
        ("b1", {"tie_word_embeddings": False}, "tq1_0+f16"),
        ("none", {"head_dim": 32}, "f16+f16"),
    ],
    ids=str,
)
def test_norms_of_queries_and_keys_go_to_llama_cpps_qwen3_graph(
    tmp_path, tokenizer, monkeypatch, quant, sizes, options
):
    leave_out_other_tools(monkeypatch)
    folder = saved_model(tmp_path / "model", QUANTS[quant], tokenizer, **{**QWEN, **sizes})
    report = export_to(tmp_path / "out.gguf", folder, **FORMATS[options])
    stored = open_stored(folder)
    assert {row["name"] for row in report["tensors"]} == set(stored.tensors)
    assert all(row["error"] == 0 for row in report["tensors"] if row["name"].endswith("norm.weight"))
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.get_field("general.architecture").contents() == "qwen3"
    assert reader.get_field("qwen3.attention.key_length").contents() == stored.config.head_size
    # This graph rotates the pairs (i, i + head_dim / 2) as this project does: the rows stay where they are.
    (q_proj,) = (tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    written = gguf.quants.dequantize(q_proj.data, q_proj.tensor_type)
    expected = stored.dequantized("model.layers.0.self_attn.q_proj.weight").numpy()
    assert np.abs(written - expected).max() <= 2**-11 * np.abs(expected).max()  # fp16


@pytest.mark.parametrize("format", ["latent", "packed", "llama2c", "gguf"])
def test_the_last_line_says_how_to_run_it(tmp_path, tokenizer, monkeypatch, capsys, format):
    leave_out_other_tools(monkeypatch)
    sub_norm = format != "llama2c"
    saved_model(tmp_path / "a model", QuantConfig(), tokenizer, sub_norm=sub_norm)
    export_to(tmp_path / "an export", tmp_path / "a model", format=format)
    *_, last = capsys.readouterr().err.splitlines()
    words = shlex.split(last.removeprefix("next: "))
    if format == "gguf":
        assert words == ["llama-cli", "-m", str(tmp_path / "an export"), "-p", "Once upon a time"]
        return
    assert words[:3] == ["python", "-m", "bitnet_lit.infer"]
    assert run_command("infer", *words[3:], "max_new_tokens=4", cwd=tmp_path).stdout.startswith("Once upon a time")


def test_a_model_without_a_tokenizer_writes_no_text(tmp_path, monkeypatch, capsys):
    leave_out_other_tools(monkeypatch)
    export_to(tmp_path / "out", saved_model(tmp_path / "model", QuantConfig(), None), format="packed")
    assert "next:" not in capsys.readouterr().err


REFUSED = [
    ("tq2_0+q8_0", {"hidden_act": "relu2"}, "train with model.hidden_act=silu"),
    ("f16+f16", {"hidden_act": "relu2"}, "train with model.hidden_act=silu"),
    (
        "tq2_0+q8_0",
        {"intermediate_size": 384},
        "model.intermediate_size=384.*take type=f16 .target gguf_f16., or train with (256|512)$",
    ),
    ("tq1_0+q8_0", {"hidden_size": 128}, "model.hidden_size=128.*take type=f16 .target gguf_f16., or train with 256"),
    ("f16+q6_k", {"hidden_size": 128}, "take embeddings=f16"),
    ("f16+q8_0", {"hidden_size": 48, "num_attention_heads": 4}, "take embeddings=f16"),
    ("f16+f16", {"head_dim": 32}, "heads must add up to hidden_size"),
    ("f16+f16", {"sub_norm": False, "qkv_bias": True}, "graphs have no biases"),
    ("f16+f16", {"sub_norm": False, "qkv_bias": True, "qk_norm": True}, "graphs have no biases"),
    ("tq2_0+q8_0", {"qk_norm": True}, "qwen3 graph has norms of queries and keys, but no sub-norms: train with"),
    ("tq2_0+q8_0", {"sub_norm": False, "qk_norm": True, "head_dim": 32}, "num_attention_heads . head_dim=128.*256"),
    ("llama2c", {"sub_norm": False, "hidden_act": "relu2"}, "train with model.hidden_act=silu"),
    ("llama2c", {"sub_norm": False, "rope_theta": 5e5}, "train with model.rope_theta=10000"),
    ("llama2c", {"sub_norm": False, "rms_norm_eps": 1e-6}, "train with model.rms_norm_eps=1e-5"),
    ("llama2c", {"sub_norm": False, "head_dim": 32}, "add up to hidden_size"),
    ("llama2c", {"sub_norm": False, "qkv_bias": True}, "no biases: train with model.qkv_bias=false"),
    ("llama2c", {"sub_norm": False, "qk_norm": True}, "no norms on queries.*: train with model.qk_norm=false"),
    ("tq2_0+q8_0", {"residual_scales": True}, "model.residual_scales=true: this part of a network is not known"),
    ("f16+f16", {"sub_norm": False, "x0_scales": True}, "model.x0_scales=true: this part of a network is not known"),
    ("llama2c", {"sub_norm": False, "value_embeddings": True}, "model.value_embeddings=true: this part of a network"),
    ("packed", {"intermediate_size": 254}, "model.intermediate_size=254.*take format=latent, or train with a"),
    ("packed", {"num_key_value_heads": 1, "head_dim": 2}, "take format=latent, or train with a multiple of 4"),
    ("packed", {"sub_norm": False, "qkv_bias": True}, "multiplies the bias.*take format=latent"),
]


@pytest.mark.parametrize(("options", "sizes", "remedy"), REFUSED, ids=str)
def test_sizes_that_a_format_cannot_hold(tmp_path, tokenizer, monkeypatch, options, sizes, remedy):
    leave_out_other_tools(monkeypatch)
    saved_model(tmp_path / "model", QuantConfig(), tokenizer, **sizes)
    before = files_below(tmp_path)
    with pytest.raises(UserError, match=remedy) as error:
        export_to(tmp_path / "out", tmp_path / "model", **FORMATS[options])
    assert "\n" not in str(error.value)
    # What needs another training says so: only options of the export can be taken.
    assert not re.search(r"take (?!(format|type|embeddings)=)", str(error.value))
    assert files_below(tmp_path) == before


def test_a_gguf_needs_a_vocabulary(tmp_path):
    folder = saved_model(tmp_path / "model", QuantConfig(), None)
    before = files_below(tmp_path)
    with pytest.raises(UserError, match="no SentencePiece tokenizer.model.*or take format=packed"):
        export_to(tmp_path / "out.gguf", folder, format="gguf")
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("options", ["packed", "latent", "llama2c"])
def test_without_a_tokenizer_the_comparison_takes_random_ids(tmp_path, monkeypatch, options):
    leave_out_other_tools(monkeypatch)
    folder = saved_model(tmp_path / "model", QuantConfig(), None, sub_norm=False)
    report = export_to(tmp_path / "out", folder, **FORMATS[options])
    assert report["parity"]["bitnet_lit"]["max_logit_difference"] == 0
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_packed_codes_have_no_latent_weights(tmp_path, tokenizer, monkeypatch):
    leave_out_other_tools(monkeypatch)
    folder = saved_model(tmp_path / "model", QuantConfig(), tokenizer)
    export_to(tmp_path / "packed", folder, format="packed")
    before = files_below(tmp_path)
    with pytest.raises(UserError, match="export the folder that was trained"):
        export_to(tmp_path / "out", tmp_path / "packed", format="latent")
    assert files_below(tmp_path) == before


def test_where_it_goes_by_itself(tmp_path, tokenizer, monkeypatch):
    leave_out_other_tools(monkeypatch)
    folder = saved_model(tmp_path / "run" / "model", QuantConfig(), tokenizer)
    for options in ("packed", "latent", "tq2_0+q8_0"):
        report = export_to(None, tmp_path / "run", **FORMATS[options])
        assert report["out"] == str(default_out(ExportConfig(**FORMATS[options]).chosen_format, folder))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "model",
        "model-float32",
        "model-packed",
        "model-tq2_0.gguf",
        "model-tq2_0.gguf.json",
    ]


@pytest.mark.parametrize("options", ["packed", "tq2_0+q8_0"])
def test_what_may_not_be_overwritten(tmp_path, tokenizer, monkeypatch, options):
    leave_out_other_tools(monkeypatch)
    folder = saved_model(tmp_path / "model", QuantConfig(), tokenizer)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "note.txt").write_text("y")
    before = files_below(tmp_path)
    taken = [folder, tmp_path / "mine", tmp_path / "model" / ".." / "model"]
    # A file cannot become a folder, nor be a folder on the way; one that a GGUF is to replace was named by the user.
    taken += [tmp_path / "note.txt" / "below"] + ([tmp_path / "note.txt"] if options == "packed" else [])
    for out in taken:
        with pytest.raises(UserError, match="choose another out="):
            export_to(out, folder, **FORMATS[options])
        assert files_below(tmp_path) == before, out


@pytest.mark.parametrize("options", ["packed", "latent", "llama2c", "tq2_0+q8_0"])
def test_an_older_export_is_replaced(tmp_path, tokenizer, monkeypatch, options):
    leave_out_other_tools(monkeypatch)
    models = [saved_model(tmp_path / f"model{seed}", QuantConfig(), tokenizer, seed, sub_norm=False) for seed in (0, 1)]
    contents = []
    for model in [*models, models[0]]:
        export_to(tmp_path / "outs" / "out", model, **FORMATS[options])
        contents.append(files_below(tmp_path / "outs"))
    assert contents[0] == contents[2] and contents[0] != contents[1]
    assert contents[0].keys() == contents[1].keys()


def test_without_the_comparison(tmp_path, tokenizer):
    folder = saved_model(tmp_path / "model", QuantConfig(), tokenizer)
    report = export_to(tmp_path / "out", folder, format="packed", verify=False)
    assert report["parity"] == {} and all(row["error"] is None for row in report["tensors"])
    assert from_pretrained(tmp_path / "out").packed


@pytest.mark.parametrize(("options", "tied"), itertools.product(["packed", "tq2_0+q8_0", "tq1_0+f16"], [True, False]))
def test_a_matrix_of_zeros_is_exported(tmp_path, tokenizer, monkeypatch, options, tied):
    """Codes are 0 and the scale is the smallest there is: no division by it may stop an export."""
    leave_out_other_tools(monkeypatch)
    model = random_model(QuantConfig(), sub_norm=False, tie_word_embeddings=tied)
    torch.nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    save_model_folder(tmp_path / "model", model, QuantConfig(), tokenizer)
    report = export_to(tmp_path / "out", tmp_path / "model", **FORMATS[options])
    assert report["parity"]["bitnet_lit"]["same_likeliest_token"] > 0.9


@pytest.mark.parametrize("options", ["latent", "packed"])
def test_a_model_whose_logits_are_all_equal_is_exported(tmp_path, tokenizer, monkeypatch, options):
    leave_out_other_tools(monkeypatch)
    model = random_model(QUANTS["b158"])
    torch.nn.init.zeros_(model.model.norm.weight)
    save_model_folder(tmp_path / "m", model, QUANTS["b158"], tokenizer)
    report = export_to(tmp_path / "out", tmp_path / "m", **FORMATS[options])
    assert report["parity"]["bitnet_lit"]["mean_logit_difference"] == 0.0
