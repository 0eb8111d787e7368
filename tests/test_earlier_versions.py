"""What earlier versions wrote opens: run folders with checkpoints, their model folders, and a packed export.

`first_version/` was made by the first: four steps of a model of 7,776 parameters on 120 demo stories, its loss as
it printed it. It says what config.yaml and config.json looked like, the warm-up of the quantization among them.
`second_version/` is a run of the same sizes and data by the version before classes of users' own: one scale per row,
and the first checkpoints that note what the run is.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.config import EvaluateConfig, QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.inference.evaluation import evaluate
from bitnet_lit.quant.schemes import B158
from bitnet_lit.runs.folder import MODEL
from bitnet_lit.runs.metrics_csv import read_metrics
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train

FOLDER = Path(__file__).with_name("first_version")
LOSS = 5.672786
SECOND, SECOND_LOSS = Path(__file__).with_name("second_version") / "run", 5.689489


@pytest.mark.parametrize("kind", ["run", "packed"])
def test_its_models_open_and_compute_the_same(kind):
    figures = evaluate(EvaluateConfig(checkpoint=str(FOLDER / kind), data_dir=str(FOLDER / "data"), accelerator="cpu"))
    assert figures["loss"] == pytest.approx(LOSS, abs=1e-4)  # an int8 code may round the other way elsewhere
    stored = open_stored(FOLDER / "run" / "model" if kind == "run" else FOLDER / "packed")
    assert stored.quant.describe() == QuantConfig(weight_scale="absmedian").describe() and stored.quant.scheme == B158(
        "absmedian"
    )
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
    assert config.quant == QuantConfig(activation_bits=8, weight_scale="absmedian", lambda_warmup_steps=2)
    assert train(config)["steps"] == 6
    saved = json.loads((tmp_path / "run" / MODEL / "config.json").read_text())["bitnet_lit"]["quant"]
    assert saved == {"name": "b158", "weight_scale": "absmedian", "activation_bits": 8, "skip": ["lm_head"]}


def test_a_run_that_noted_what_it_is_goes_on(tmp_path):
    """Its checkpoint holds the identity of the run: each key of it must mean today what it meant then."""
    run = tmp_path / "run"
    shutil.copytree(SECOND, run)
    before, health = read_metrics(run / "metrics.csv"), (run / "ternary_health.csv").read_bytes()
    overrides = [f"data.dir={FOLDER / 'data'}", "trainer.max_steps=6", "schedule.total_steps=4"]
    metrics = train(resume_config(str(run), overrides))
    assert metrics["steps"] == 6 and metrics["quant"] == "b158_row"
    assert read_metrics(run / "metrics.csv")[: len(before)] == before
    assert (run / "ternary_health.csv").read_bytes().startswith(health)
    assert metrics["val/loss"] == pytest.approx(SECOND_LOSS, abs=1e-4)  # the curve ended at 0: no weight has moved


@pytest.mark.parametrize(("key", "value"), [("seed", 2), ("model.qk_norm", "true"), ("quant.activation_bits", 4)])
def test_what_such_a_run_is_cannot_change(tmp_path, key, value):
    shutil.copytree(SECOND, tmp_path / "run")
    config = resume_config(
        str(tmp_path / "run"),
        [f"data.dir={FOLDER / 'data'}", "trainer.max_steps=6", "schedule.total_steps=4", f"{key}={value}"],
    )
    with pytest.raises(UserError, match=f"{key} was .* when the run began"):
        train(config)


def test_its_model_computes_the_loss_that_it_printed():
    config = EvaluateConfig(checkpoint=str(SECOND), data_dir=str(FOLDER / "data"), accelerator="cpu")
    assert evaluate(config)["loss"] == pytest.approx(SECOND_LOSS, abs=1e-4)
