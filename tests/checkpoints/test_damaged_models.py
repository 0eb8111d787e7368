"""Damage of one kind each: a model that works or one line for the user, with both engines.

Damage drawn at random is in tests/fuzz/, sizes that no model has in tests/faults/test_absurd_sizes.py.
"""

import json
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bitnet_lit
from bitnet_lit.checkpoints.formats.llama2c_checkpoint import open_pt
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.checkpoints.stored_model import STATISTICS
from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError
from tests.exports.exporting import export_to
from tests.parity.test_imports import llama2c_weights, write_pt
from tests.support import tiny_model

PROJECTION = "model.layers.0.mlp.down_proj.weight"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
ENGINES = ["cpu", "torch"]


@pytest.fixture
def folder(tmp_path, tokenizer):
    model = tiny_model(num_hidden_layers=1, vocab_size=tokenizer.vocab_size)
    save_model_folder(tmp_path / "model", model, QuantConfig(), tokenizer)
    return tmp_path / "model"


def story(folder, engine):
    model = bitnet_lit.load(folder, engine=engine, threads=1)
    return model.generate("Once upon a time", max_new_tokens=6, seed=1)


def one_line(folder, engine="torch"):
    with pytest.raises(UserError) as error:
        story(folder, engine)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def change_config(folder, change):
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("info", [[], "x", 3, None, {"sequence_length": "x"}, {"recipe": []}, {"metrics": 1}])
def test_what_training_noted_has_another_type(folder, info):
    change_config(folder, lambda raw: raw["bitnet_lit"].update(info=info))
    assert "bitnet_lit.info" in one_line(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.update(vocab_size=None), "vocab_size: must be a whole number, not null"),
        (lambda raw: raw.update(max_position_embeddings=1), "no room for a token"),
        (lambda raw: raw.update(hidden_size=10**400), "hidden_size"),
        (lambda raw: raw.update(rope_theta=float("nan")), "rope_theta: must be a finite number"),
        (lambda raw: raw.update(rms_norm_eps=1e300), "rms_norm_eps"),
        (lambda raw: raw.update(tie_word_embeddings="yes"), "tie_word_embeddings: must be true or false"),
        (lambda raw: raw.update(bitnet_lit=[]), "bitnet_lit: must be an object"),
        (lambda raw: raw["bitnet_lit"].update(format_version=2), "written by a later version"),
        (lambda raw: raw["bitnet_lit"]["quant"].update(group_size=64), "quant=b158: has no setting group_size"),
        (lambda raw: raw["bitnet_lit"]["quant"].update(skip="lm_head"), "quant.skip: must be a list"),
        (lambda raw: raw["bitnet_lit"]["quant"].pop("skip"), "quant.skip: is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_with_another_value(folder, change, says):
    change_config(folder, change)
    assert says in one_line(folder, "cpu")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 100_000, "nested more than"),
        ('{"a":' * 100_000, "nested more than"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "too many digits"),
        ('{"a": 1, "a": 2}', "appears twice"),
        ("", "not a config.json"),
        ("null", "not a config.json"),
    ],
    ids=["brackets", "objects", "digits", "twice", "empty", "null"],
)
def test_a_config_that_is_no_json(folder, content, says):
    (folder / "config.json").write_text(content)
    assert says in one_line(folder)


def test_a_byte_order_mark_is_no_damage(folder):
    expected = story(folder, "torch")
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert story(folder, "torch") == expected


@pytest.mark.parametrize(
    "noted",
    [
        "[" * 100_000,
        "{",
        "[]",
        "null",
        f'{{"{PROJECTION}": [1e999, 0]}}',
        f'{{"{PROJECTION}": [{"9" * 400}, 0]}}',
        f'{{"{PROJECTION}": [1e300, 0]}}',
        f'{{"{PROJECTION}": [NaN, NaN]}}',
        f'{{"{PROJECTION}": [true, "x"]}}',
        f'{{"{PROJECTION}": [1]}}',
        f'{{"{PROJECTION}": [-1, 0]}}',
        f'{{"{PROJECTION}": [1e-300, 0]}}',
        f'{{"{PROJECTION}": [0.5, 0.25]}}',
    ],
    ids=lambda noted: noted[:12] + noted[-12:],
)
def test_noted_statistics_that_are_damaged_are_computed_again(folder, noted):
    expected = story(folder, "cpu")
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", STATISTICS: noted})
    assert story(folder, "cpu") == expected


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [NORM, EMBEDDING, PROJECTION, f"{PROJECTION}_scale"])
def test_a_number_that_is_none_is_named_when_the_model_is_opened(tmp_path, folder, name, value, engine):
    if name.endswith("_scale"):
        export_to(tmp_path / "packed", folder, format="packed", verify=False)
        folder = tmp_path / "packed"
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError) as error:
        bitnet_lit.load(folder, engine=engine, threads=1)
    assert f"tensor {name} " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bfloat16_that_is_no_number_is_named_too(tmp_path, folder, engine):
    export_to(tmp_path / "half", folder, format="latent", dtype="bfloat16", verify=False)
    path = tmp_path / "half" / "model.safetensors"
    tensors = load_file(path)
    tensors[EMBEDDING][3, 3] = float("nan")
    save_file(tensors, path)
    assert f"tensor {EMBEDDING} holds 1 of " in one_line(tmp_path / "half", engine)


def test_checking_for_numbers_finds_each(folder):
    stored = open_stored(folder)
    values = np.ones(2**19 + 5, dtype=np.float32)
    stored.check_finite("x", values)
    stored.check_finite("x", np.full(7, np.finfo(np.float32).max))
    stored.check_finite("x", np.zeros((0, 4), dtype=np.float32))
    for place in (0, 2**18 - 1, 2**18, len(values) - 1):
        damaged = values.copy()
        damaged[place] = np.nan
        with pytest.raises(UserError, match="holds 1 of"):
            stored.check_finite("x", damaged)
        with pytest.raises(UserError, match="holds 1 of"):
            stored.check_finite("x", (damaged.view(np.uint32) >> 16).astype(np.uint16))


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-42])
def test_a_scale_that_is_none(tmp_path, folder, scale):
    """Hugging Face's `bitlinear` divides by it: the smallest numbers have no inverse."""
    export_to(tmp_path / "packed", folder, format="packed", verify=False)
    stored = open_stored(tmp_path / "packed")
    stored.inverse_scales = True
    stored.reader.read = lambda name: np.array([scale], dtype=np.float32)
    with pytest.raises(UserError, match="scales are positive and finite"):
        stored.scale(PROJECTION)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {}}',
        "{",
        '{"weight_map": {"a": "../model.safetensors"}}',
        "[" * 100_000,
    ],
)
def test_an_index_that_is_none(folder, content):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    assert "index.json" in one_line(folder)


def test_a_pipe_in_place_of_the_weights_is_not_waited_for(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pipe.safetensors"}}')
    assert "it is a pipe" in one_line(folder)


def test_weights_that_are_cut_after_they_were_opened(folder):
    stored = open_stored(folder)
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(UserError, match="is shorter than when it was opened"):
        for name in stored.tensors:
            stored.array(name)


def test_a_pt_that_asks_for_more_than_it_holds(tmp_path):
    """A tensor of one number seen as 2**44, and an archive that unpacks to a gigabyte."""
    weights, arguments = llama2c_weights(2, tied=False)
    huge = {**weights, "tok_embeddings.weight": torch.zeros(1).expand(2**22, 2**22)}
    huge["output.weight"] = huge["tok_embeddings.weight"]
    write_pt(tmp_path / "expanded.pt", huge, arguments)
    write_pt(tmp_path / "good.pt", weights, arguments)
    open_pt(tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in good.infolist():
            content = bytes(2**30) if entry.filename.endswith("data.pkl") else good.read(entry)
            bomb.writestr(entry.filename, content, compress_type=zipfile.ZIP_DEFLATED)
    for name, says in {"expanded": "the file holds only a part", "bomb": "it is compressed"}.items():
        with pytest.raises(UserError, match=says):
            open_pt(tmp_path / f"{name}.pt")


def test_tables_of_positions_beyond_any_models_are_refused(tmp_path):
    """The weights may be small, and the tables that are computed from the config not."""
    sizes = {"hidden_size": 2, "head_dim": 4096, "num_attention_heads": 1, "intermediate_size": 4, "vocab_size": 8}
    save_model_folder(tmp_path / "m", tiny_model("none", sub_norm=False, **sizes), QuantConfig(name="none"), None)
    path = tmp_path / "m" / "config.json"
    open_stored(tmp_path / "m")
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 2**17}))
    with pytest.raises(UserError, match="1 heads of 4096, a context of 131072: beyond what a model has"):
        open_stored(tmp_path / "m")
