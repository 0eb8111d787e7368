"""A format of one's own is exported, compared, listed and refused as the built-in ones are."""

import json
from pathlib import Path

import numpy as np
import pytest

from bitnet_lit.checkpoints.formats.format import FORMATS, all_targets, formats, target_named
from bitnet_lit.cli import compose
from bitnet_lit.config import ExportConfig, QuantConfig
from bitnet_lit.errors import ParityError, UserError
from bitnet_lit.exports.targets import check_targets, print_advice, problems
from bitnet_lit.exports.write import export
from tests.exports.exporting import files_below, saved_model
from tests.exports.toy_format import ARCHIVE, Npz
from tests.support import run_command, tiny_config

NPZ = "tests.exports.toy_format.Npz"


@pytest.fixture(autouse=True)
def only_here(monkeypatch):
    """No other test sees the format."""
    monkeypatch.setattr(FORMATS, "registered", dict(formats().registered))


@pytest.fixture
def model(tmp_path, tokenizer):
    return saved_model(tmp_path / "model", QuantConfig(), tokenizer)


def test_it_is_written_compared_and_replaced(tmp_path, model):
    options = {"checkpoint": str(model), "format": "npz", "formats": [NPZ]}
    report = export(ExportConfig(**options))
    out = tmp_path / "model-npz"
    assert report["out"] == str(out) and report["format"] == report["target"] == "npz"
    assert report["parity"]["bitnet_lit"]["max_logit_difference"] == 0
    assert json.loads((out / "export.json").read_text())["files"].keys() == {ARCHIVE}
    plain = (out / ARCHIVE).stat().st_size
    (out / "mine.txt").write_text("mine")
    export(ExportConfig(**options, settings={"compressed": True}))
    assert (out / ARCHIVE).stat().st_size < plain and (out / "mine.txt").read_text() == "mine"


def test_the_gate_stops_it_too(tmp_path, model, monkeypatch):
    savez = np.savez
    one_off = lambda path, **arrays: savez(path, **{name: array + 1e-3 for name, array in arrays.items()})  # noqa: E731
    monkeypatch.setattr(np, "savez", one_off)
    before = files_below(tmp_path)
    with pytest.raises(ParityError, match="not written, because it would differ from the model"):
        export(ExportConfig(checkpoint=str(model), format="npz", formats=[NPZ]))
    assert files_below(tmp_path) == before


def test_what_it_does_not_know_is_refused_by_name(tmp_path, tokenizer):
    config, quant = tiny_config(), QuantConfig(name="none")
    assert Npz().problems(config, quant) == []
    assert "model.qkv_bias=true: an archive has no biases" in Npz().problems(tiny_config(qkv_bias=True), quant)
    assert problems(Npz(), tiny_config(qk_norm=True), quant)[0] == (
        "model.qk_norm=true: this part of a network is not known there: take format=latent, or train with "
        "model.qk_norm=false"
    )


def test_a_tensor_that_it_has_no_name_for_is_refused_by_name(monkeypatch):
    held = {**Npz.held, "qk_norm": Npz.held["sub_norm"]}
    monkeypatch.setattr(Npz, "held", held)  # as if its author had thought of the field, and not of the tensor
    (found,) = Npz().problems(tiny_config(qk_norm=True), QuantConfig(name="none"))
    assert found == "self_attn.q_norm.weight: a tensor that numpy's archive has no name for"


def test_hf_is_another_name_for_latent(tmp_path, model):
    assert target_named("hf") == target_named("latent")
    report = export(ExportConfig(checkpoint=str(model), format="hf", dtype="bfloat16", verify=False))
    assert (report["format"], report["target"]) == ("latent", "latent") and (tmp_path / "model-bfloat16").is_dir()


def test_targets_and_advice_list_it(capsys):
    compose("train", ["run_dir=x", "export.targets=[hf,packed]"])
    with pytest.raises(UserError, match="export.targets=npz: must be one of latent, packed, gguf_tq2_0"):
        compose("train", ["run_dir=x", "export.targets=[npz]"])
    with pytest.raises(UserError, match=r"; for several give a list: export.targets=\[packed,gguf_tq2_0\]$"):
        compose("train", ["run_dir=x", "export.targets=packed,gguf_tq2_0"])
    compose("train", ["run_dir=x", f"export.formats=[{NPZ}]", "export.targets=[npz,packed]"])
    assert [choice.target for choice in all_targets()][-1] == "npz" and target_named("npz") == Npz()
    with pytest.raises(UserError, match="export.targets: npz: model.qkv_bias=true"):
        check_targets(["npz"], tiny_config(qkv_bias=True), QuantConfig(name="none"))
    print_advice(tiny_config(), QuantConfig())
    assert "npz" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "npz"}, r"format=npz: must be one of latent, packed, gguf, llama2c; name the class of your own"),
        ({"formats": ["my.Missing"]}, r"formats=\[my.Missing\]: cannot be imported"),
        ({"formats": ["pathlib.Path"]}, "is no export format: derive it from"),
        ({"format": "npz", "formats": [NPZ], "settings": {"level": 3}}, "has no setting level"),
        ({"format": "npz", "formats": [NPZ], "settings": {"compressed": 3}}, "compressed=3 must be of type bool"),
        ({"format": "gguf", "settings": {"type": "f16"}}, "settings.type=f16: has a key of its own: set type"),
        ({"format": "gguf", "type": "q4_0"}, "type=q4_0: must be one of tq2_0, tq1_0, f16"),
        ({"format": "packed", "dtype": "float16"}, "dtype=float16: must be one of"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        ExportConfig(**options)
    assert "\n" not in str(error.value)


def test_an_option_that_the_format_does_not_have_is_said(model, capsys):
    export(ExportConfig(checkpoint=str(model), format="npz", formats=[NPZ], type="f16"))
    assert "note: type=f16 has no effect: format=npz has no such option" in capsys.readouterr().err


def test_by_the_command_line_alone(tmp_path, model):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "archive.py").write_text((Path(__file__).parent / "toy_format.py").read_text())
    command = ["checkpoint=model", "format=npz", "settings.compressed=true", "verify=false"]
    done = run_command("export", *command, "formats=[mine.archive.Npz]", cwd=tmp_path)
    assert "npz" in done.stdout and (tmp_path / "model-npz" / ARCHIVE).is_file()
