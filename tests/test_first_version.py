"""What the first version wrote opens: a run folder with a checkpoint, its model folder, and a packed export of it.

`first_version/` was made by that version: four steps of a model of 7,776 parameters on 120 demo stories, its loss as
it printed it. It says what config.yaml and config.json looked like, the warm-up of the quantization among them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.config import EvaluateConfig, QuantConfig
from bitnet_lit.inference.evaluation import evaluate
from bitnet_lit.quant.schemes import B158
from bitnet_lit.runs.folder import MODEL_LAST
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train

FOLDER = Path(__file__).with_name("first_version")
LOSS = 5.672786


@pytest.mark.parametrize("kind", ["run", "packed"])
def test_its_models_open_and_compute_the_same(kind):
    figures = evaluate(EvaluateConfig(checkpoint=str(FOLDER / kind), data_dir=str(FOLDER / "data"), accelerator="cpu"))
    assert figures["loss"] == pytest.approx(LOSS, abs=1e-4)  # an int8 code may round the other way elsewhere
    stored = open_stored(FOLDER / "run" / "model" if kind == "run" else FOLDER / "packed")
    assert stored.quant == QuantConfig(weight_scale="absmedian") and stored.quant.scheme == B158("absmedian")
    assert stored.packed == (kind == "packed")


def test_its_packed_codes_are_those_of_its_latent_weights():
    latent, packed = open_stored(FOLDER / "run" / "model"), open_stored(FOLDER / "packed")
    for name in sorted(latent.quantized):
        for ours, theirs in zip(latent.codes(name), packed.codes(name), strict=True):
            assert torch.equal(ours, theirs)


def test_its_run_goes_on(tmp_path):
    shutil.copytree(FOLDER / "run", tmp_path / "run")
    overrides = [f"data.dir={FOLDER / 'data'}", "trainer.max_steps=6", "schedule.total_steps=4"]
    config = resume_config(str(tmp_path / "run"), overrides)
    assert config.quant == QuantConfig(weight_scale="absmedian", lambda_warmup_steps=2)
    assert train(config)["steps"] == 6
    saved = json.loads((tmp_path / "run" / MODEL_LAST / "config.json").read_text())["bitnet_lit"]["quant"]
    assert saved == {"name": "b158", "weight_scale": "absmedian", "activation_bits": 8, "skip": ["lm_head"]}
