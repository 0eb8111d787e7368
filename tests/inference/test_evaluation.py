"""Evaluation: figures by their definitions, whatever the batches; data that is not the model's; data that is none."""

import math

import pytest
import torch
import torch.nn.functional as F

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import EvaluateConfig, QuantConfig
from bitnet_lit.data.shards import open_shards
from bitnet_lit.errors import UserError
from bitnet_lit.inference import evaluation, evaluation_data
from bitnet_lit.inference.evaluation import evaluate
from bitnet_lit.inference.loss_sums import LossSums
from bitnet_lit.quant.kernels.interface import measuring_losses
from tests.support import tiny_model


@pytest.fixture
def folder(tmp_path, tokenizer):
    save_model_folder(tmp_path / "model", tiny_model(max_position_embeddings=32), QuantConfig(), tokenizer)
    return tmp_path / "model"


def test_the_figures_are_those_of_their_definitions(folder, shards, tokenizer):
    found = evaluate(EvaluateConfig(checkpoint=str(folder), data_dir=str(shards), batch_size=7, accelerator="cpu"))
    model = tiny_model(max_position_embeddings=32)
    split = open_shards(shards).validation(32)
    ids = torch.from_numpy(split.gather(range(split.num_sequences)))
    with torch.no_grad(), measuring_losses():  # by the same kernels: an activation at a rounding border has one code
        logits = model(ids[:, :-1])
    targets = ids[:, 1:]
    loss = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten()).item()
    # Sums of a few thousand float32 cross-entropies of about 6, each right to 5e-7.
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["accuracy"] == (logits.argmax(-1) == targets).double().mean().item()
    text_bytes = tokenizer.text_bytes(ids[:, :-1].numpy(), targets.numpy())
    assert found["bits_per_byte"] == pytest.approx(loss * targets.numel() / math.log(2) / text_bytes, rel=1e-6)
    assert (found["tokens"], found["sequence_length"], found["data_dir"]) == (targets.numel(), 32, str(shards))


def test_sums_of_parts_are_those_of_the_whole(tokenizer):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 512, (6, 9), generator=generator)
    losses, hits = torch.rand(6, 8, generator=generator) * 6, torch.rand(6, 8, generator=generator) < 0.5
    whole, parts = LossSums(), LossSums()
    whole.add(losses.flatten(), hits.flatten(), ids, tokenizer)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts.add(losses[rows].flatten(), hits[rows].flatten(), ids[rows], tokenizer)
    parts.add(losses[:0].flatten(), hits[:0].flatten(), ids[:0], tokenizer)  # a rank without valid rows
    assert LossSums.from_tensor(parts.as_tensor()) == parts
    assert (parts.tokens, parts.correct, parts.text_bytes) == (whole.tokens, whole.correct, whole.text_bytes)
    assert parts.nats == pytest.approx(whole.nats, rel=1e-12)  # float64 sums of equal numbers, in another order
    assert whole.tokens == 48 and whole.text_bytes > 0
    assert "bits_per_byte" not in LossSums(1.0, 1).metrics()


def test_a_loss_beyond_float64s_exponent_has_a_perplexity():
    assert LossSums(nats=1e6, tokens=1).metrics()["perplexity"] == math.exp(700)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "does not say what it was trained on: give data_dir="),
        ({"sequence_length": 33}, "sequence_length=33: is beyond the model's context of 32 tokens: give 32 or less"),
        ({"data_dir": "nowhere"}, r"^data_dir=nowhere: no such folder: .*bitnet_lit.prepare source=<text> out="),
        ({"data_dir": "data/demo"}, r"data_dir=data/demo: no such folder: .*bitnet_lit.prepare source=demo$"),
    ],
    ids=str,
)
def test_what_cannot_be_evaluated_is_one_line(folder, options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the repository may hold data/demo, from `make demo`
    with pytest.raises(UserError, match=says) as error:
        evaluate(EvaluateConfig(checkpoint=str(folder), accelerator="cpu", **options))
    assert "\n" not in str(error.value)


def test_an_empty_validation_split_is_one_line(folder, shards, monkeypatch):
    monkeypatch.setattr(evaluation_data, "_split_batches", lambda split, batch_size: iter(()))
    with pytest.raises(UserError, match="its validation split is empty: give data_dir="):
        evaluate(EvaluateConfig(checkpoint=str(folder), data_dir=str(shards), accelerator="cpu"))


def test_devices_by_either_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [evaluation._device(name) for name in ("auto", "gpu", "cuda", "cpu")] == ["cuda", "cuda", "cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert evaluation._device("auto") == "cpu"
    for name in ("gpu", "cuda"):
        with pytest.raises(UserError, match=f"accelerator={name}: not available on this machine"):
            evaluation._device(name)
