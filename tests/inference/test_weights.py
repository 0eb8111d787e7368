"""Weights on their way into the native engine: from every kind of folder the same codes, and none of others."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.checkpoints.stored_model import STATISTICS
from bitnet_lit.cli import compose
from bitnet_lit.config import QuantConfig
from bitnet_lit.inference.engines.cpu.engine import NativeModel
from bitnet_lit.inference.engines.cpu.weights import Arena, Weights, pack
from tests.inference.test_cpu_engine import needs_compiler
from tests.parity.test_imports import llama2c_weights, write_pt
from tests.support import run_command, tiny_model

NAME = "model.layers.1.mlp.gate_proj.weight"
QUANTS = {
    "mean": QuantConfig(),
    "median": QuantConfig(weight_scale="absmedian"),
    "b1": QuantConfig(name="b1"),
}


def packed_by(stored, name=NAME):
    weights = Weights(stored)
    packed, scale = weights._packed(name)
    return packed.copy(), scale


def expected_of(stored, name=NAME):
    codes, scale = stored.codes(name)
    return pack(codes.numpy(), Arena()), float(scale)


def without_metadata(folder, **changed):
    """Write the weights again with other metadata or tensors."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({**tensors, **changed.get("tensors", {})}, path, changed.get("metadata", metadata))


@needs_compiler
@pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)
def test_codes_and_scale_are_those_of_the_definition(tmp_path, quant, monkeypatch):
    # Odd sizes, so that groups and blocks are not whole; a third of the weights lie on a rounding border or at 0.
    model = tiny_model("none", hidden_size=52, intermediate_size=90, num_attention_heads=2)
    for parameter in model.parameters():
        parameter.data[parameter.abs() < 0.007] = 0
    save_model_folder(tmp_path / "m", model, quant, None)
    stored = open_stored(tmp_path / "m")
    for name in sorted(stored.quantized):
        noted = stored.noted_statistics(name)
        found, scale = packed_by(stored, name)
        codes, expected_scale = expected_of(stored, name)
        assert np.array_equal(found, codes) and scale == expected_scale == noted[0], name
    monkeypatch.setattr(type(stored), "noted_statistics", lambda *_: None)
    found, scale = packed_by(stored)
    assert np.array_equal(found, expected_of(stored)[0]) and scale == expected_of(stored)[1]


@needs_compiler
@pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)
def test_statistics_of_other_weights_are_not_used(tmp_path, quant):
    save_model_folder(tmp_path / "m", tiny_model("none"), quant, None)
    stored = open_stored(tmp_path / "m")
    stale = {NAME: stored.tensor(NAME) * 1.01 + (0.001 if quant.name == "b1" else 0)}
    without_metadata(tmp_path / "m", tensors=stale)
    stored = open_stored(tmp_path / "m")
    assert stored.noted_statistics(NAME)
    found, scale = packed_by(stored)
    assert np.array_equal(found, expected_of(stored)[0]) and scale == expected_of(stored)[1]


@needs_compiler
@pytest.mark.parametrize("noted", [None, {}, [], {NAME: [0, 0]}, {NAME: ["a", 1]}, {NAME: [float("nan"), 0]}], ids=str)
def test_damaged_statistics_are_not_used(tmp_path, noted):
    text = "{" if noted is None else json.dumps(noted)
    save_model_folder(tmp_path / "m", tiny_model(), QuantConfig(), None)
    without_metadata(tmp_path / "m", metadata={"format": "pt", STATISTICS: text})
    stored = open_stored(tmp_path / "m")
    assert stored.noted_statistics(NAME) is None
    assert np.array_equal(packed_by(stored)[0], expected_of(stored)[0])


@needs_compiler
@pytest.mark.parametrize(
    "options", [["format=packed"], ["format=packed", "dtype=bfloat16"], ["format=latent", "dtype=bfloat16"]], ids=str
)
def test_every_folder_gives_the_same_codes_and_close_logits(tmp_path, options, tokenizer):
    from bitnet_lit.exports.write import export

    save_model_folder(tmp_path / "m", tiny_model(), QuantConfig(), tokenizer)
    export(compose("export", [f"checkpoint={tmp_path}/m", *options, f"out={tmp_path}/out"]))
    original, exported = open_stored(tmp_path / "m"), open_stored(tmp_path / "out")
    assert np.array_equal(packed_by(original)[0], packed_by(exported)[0])
    logits = []
    for stored in (original, exported):
        for head in ("float", "int8"):
            model = NativeModel(stored, head=head, threads=2)
            logits.append(model.step([1, 2, 3], [model.new_cache()] * 3, [0, 1, 2]))
    # Exact, or what rounding the embedding or the scale to bfloat16 moves.
    difference = np.abs(logits[0] - logits[2]).mean() / logits[0].std()
    assert difference == 0 if options == ["format=packed"] else difference < 0.1
    assert np.array_equal(logits[0].argmax(-1), logits[1].argmax(-1))
    assert np.array_equal(logits[2].argmax(-1), logits[3].argmax(-1))


@needs_compiler
def test_bytes_that_are_no_codes_are_refused(tmp_path, tokenizer):
    from bitnet_lit.exports.write import export

    save_model_folder(tmp_path / "m", tiny_model(), QuantConfig(), tokenizer)
    export(compose("export", [f"checkpoint={tmp_path}/m", "format=packed", f"out={tmp_path}/out"]))
    codes = torch.from_numpy(open_stored(tmp_path / "out").reader.read(NAME))
    codes[3, 5] |= 0b1100
    without_metadata(tmp_path / "out", tensors={NAME: codes})
    result = run_command("infer", f"checkpoint={tmp_path}/out", cwd=tmp_path, check=False)
    assert result.returncode == 2 and f"{NAME} holds no ternary codes" in result.stderr


@needs_compiler
@pytest.mark.parametrize("quant", ["b158", "b1", "none"])
def test_infer_needs_no_torch(tmp_path, tokenizer, quant):
    """The whole command in a process where torch cannot be imported."""
    save_model_folder(tmp_path / "model", tiny_model(quant), QuantConfig(name=quant), tokenizer)
    script = (
        "import sys\n"
        "for name in ('torch', 'lightning', 'transformers', 'wandb'): sys.modules[name] = None\n"
        "from bitnet_lit.infer import main; main()"
    )
    arguments = [f"checkpoint={tmp_path}/model", "max_new_tokens=5", "seed=1", "num_samples=2"]
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.rstrip("\n").split("\n---\n")
    assert first.startswith("Once upon a time") and first != second and result.stderr == ""


def test_a_file_that_begins_its_numbers_anywhere_is_read_aligned(tmp_path):
    """Another program's archive pads nothing; reading float32 at an odd address is undefined in C++."""
    write_pt(tmp_path / "padded.pt", *llama2c_weights(2, tied=False))
    with zipfile.ZipFile(tmp_path / "padded.pt") as padded, zipfile.ZipFile(tmp_path / "plain.pt", "w") as plain:
        for name in padded.namelist():
            plain.writestr(name, padded.read(name))
    stored, expected = open_stored(tmp_path / "plain.pt"), open_stored(tmp_path / "padded.pt")
    norms = [name for name in stored.tensors if name.endswith("norm.weight")]
    assert any(stored.array(name).ctypes.data % 4 for name in stored.tensors), "the archive is aligned by chance"
    weights = Weights(stored)
    assert all(weights._dense(name).ctypes.data % 4 == 0 for name in stored.tensors)
    assert all(weights.vector(name) % 4 == 0 for name in norms)
    assert all(np.array_equal(weights._dense(name), expected.array(name)) for name in stored.tensors)
