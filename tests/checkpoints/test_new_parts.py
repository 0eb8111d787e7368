"""A field that is added to the network, and a scheme: each format and engine carries it, or refuses it by its name.

Nothing but the config is changed here, as if somebody had added the field and forgotten everything else.
"""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from bitnet_lit.checkpoints import config_json
from bitnet_lit.checkpoints.formats import model_folder
from bitnet_lit.checkpoints.formats.format import all_targets, formats
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.config.checks import POSITIVE, Range
from bitnet_lit.errors import UserError
from bitnet_lit.exports.targets import problems
from bitnet_lit.inference.engines.cpu.supported_models import why_unsupported
from bitnet_lit.model import build_model
from bitnet_lit.quant import register
from tests.exports.exporting import export_to, files_below
from tests.quant.toy_schemes import Threshold
from tests.support import tiny_config

SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_key_value_heads": 4, "head_dim": 64}
CLIPPED = {**SIZES, "sub_norm": False, "clip_qkv": 8.0}


@dataclass
class WiderConfig(ModelConfig):
    """A network whose queries, keys and values are clipped, as MPT has it."""

    clip_qkv: float | None = None
    RANGES: ClassVar[dict[str, Range]] = {**ModelConfig.RANGES, "clip_qkv": POSITIVE}


@pytest.fixture
def later_version(monkeypatch):
    """The version that has the field."""
    for module in (config_json, model_folder):
        monkeypatch.setattr(module, "ModelConfig", WiderConfig)


def wider(**values):
    return WiderConfig(**{**vars(tiny_config()), **values})


def saved(folder, config, quant, tokenizer):
    torch.manual_seed(0)
    save_model_folder(folder, build_model(config, quant), quant, tokenizer)
    return folder


@pytest.mark.parametrize("quant", ["b158", "none", "threshold"])
def test_the_model_folder_carries_the_field_through_round_trips(tmp_path, tokenizer, later_version, quant):
    register(Threshold)
    config, quant = wider(**CLIPPED), QuantConfig(name=quant)
    folder = saved(tmp_path / "model", config, quant, tokenizer)
    carried = []
    for format in ("latent", "packed"):
        if formats().named(format)().problems(config, quant):
            continue  # dense weights have no codes
        report = export_to(tmp_path / format, folder, format=format)
        opened = open_stored(tmp_path / format)
        assert opened.config == config and opened.quant.scheme == quant.scheme
        described = json.loads((tmp_path / format / "config.json").read_text())
        assert described["model_type"] == "bitnet_lit" and not report["runs_in_transformers"]
        carried.append(format)
    assert "latent" in carried


def test_an_earlier_version_refuses_the_folder_by_the_fields_name(tmp_path, tokenizer, monkeypatch):
    with monkeypatch.context() as patch:
        for module in (config_json, model_folder):
            patch.setattr(module, "ModelConfig", WiderConfig)
        saved(tmp_path / "clipped", wider(**CLIPPED), QuantConfig(), tokenizer)
        saved(tmp_path / "plain", wider(**SIZES), QuantConfig(), tokenizer)
    with pytest.raises(
        UserError, match=r"bitnet_lit.clip_qkv=8.0 is not known here: written by a later version"
    ) as error:
        open_stored(tmp_path / "clipped")
    assert "\n" not in str(error.value)
    assert open_stored(tmp_path / "plain").config == tiny_config(**SIZES)  # without the new part, a folder as before
    saved(tmp_path / "before", tiny_config(**SIZES), QuantConfig(), tokenizer)
    assert files_below(tmp_path / "before") == files_below(tmp_path / "plain")


@pytest.mark.parametrize("target", all_targets(), ids=lambda target: target.target)
@pytest.mark.parametrize("quant", ["b158", "none"])
def test_every_target_refuses_it_by_name(target, quant):
    quant = QuantConfig(name=quant)
    with_it, without = (
        problems(target, wider(**CLIPPED), quant),
        problems(target, wider(**{**CLIPPED, "clip_qkv": None}), quant),
    )
    (line,) = (line for line in with_it if line not in without)
    assert line.startswith("model.clip_qkv=8.0: this part of a network is not known there")
    if target.tensor_names is not None:  # the others hold it; it is transformers that refuses to compute it
        assert line.endswith(": take format=latent, or train with model.clip_qkv=null")


@pytest.mark.parametrize("options", [{"format": "gguf"}, {"format": "llama2c"}], ids=str)
def test_an_export_refuses_it_and_leaves_nothing(tmp_path, tokenizer, later_version, options):
    folder = saved(tmp_path / "model", wider(**CLIPPED), QuantConfig(), tokenizer)
    before = files_below(tmp_path)
    with pytest.raises(UserError, match="model.clip_qkv=8.0: this part of a network is not known there"):
        export_to(tmp_path / "out", folder, **options)
    assert files_below(tmp_path) == before


def test_the_native_engine_refuses_it_by_name():
    assert "model.clip_qkv=8.0" in str(why_unsupported(wider(**CLIPPED), QuantConfig()))
    assert why_unsupported(wider(), QuantConfig()) is None


def test_how_a_network_is_trained_is_no_part_of_it():
    trained = tiny_config(dropout=0.1, gradient_checkpointing=True, initializer_range=0.1, sub_norm=False, name="x")
    for target in all_targets():
        assert problems(target, trained, QuantConfig()) == problems(target, tiny_config(sub_norm=False), QuantConfig())
    assert why_unsupported(trained, QuantConfig()) is None
