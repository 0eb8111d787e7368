"""Scores: those of the literal definition, however windows share tokens and whatever computes them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bitnet_lit
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import ModelError, UserError
from bitnet_lit.inference.scoring import NativeScorer, NetworkScorer, Window, plan_rows
from tests.inference.test_cpu_engine import needs_compiler
from tests.support import tiny_model


def literal(model, window):
    """Losses and hits of a window by their definition."""
    with torch.no_grad():
        logits = model(torch.tensor([list(window.ids[:-1])])).double()[0]
    targets = range(window.start, len(window.ids))
    losses = [-float(logits[i - 1].log_softmax(-1)[window.ids[i]]) for i in targets]
    return np.array(losses), np.array([int(logits[i - 1].argmax()) == window.ids[i] for i in targets], dtype=bool)


def some_windows():
    """Choices that share a question, a choice of one token, one that is the beginning of another, nothing to score."""
    draw = np.random.default_rng(0)
    question = draw.integers(3, 512, 20).tolist()
    choices = [draw.integers(3, 512, count).tolist() for count in (1, 1, 3, 5)]
    windows = [Window(question + choice, 20) for choice in choices]
    windows += [Window(question + choices[3][:2], 20), Window(question + choices[3], 1), Window(question, 20)]
    windows += [Window(draw.integers(3, 512, length).tolist(), length // 2) for length in (65, 65, 2, 31)]
    return [*windows, windows[0]]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("quant", ["none", "b158"])
def test_a_network_gives_the_literal_scores(quant, batch_size):
    model = tiny_model(quant)
    windows = some_windows()
    for window, found in zip(windows, NetworkScorer(model, 64, batch_size).score(windows), strict=True):
        if window.start == len(window.ids):
            assert found.losses.shape == found.hits.shape == (0,)
            continue
        losses, hits = literal(model, window)
        assert found.losses.dtype == np.float32 and len(losses) == len(found.losses)
        # The products of a batch may sum in another order. In a quantized network that can move a code by one.
        np.testing.assert_allclose(found.losses, losses, rtol=1e-5 if quant == "none" else 0.02, atol=1e-5)
        assert np.array_equal(found.hits, hits)


def test_any_network_can_be_scored():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(512, 16), torch.nn.Linear(16, 512)).eval()
    windows = some_windows()[:4]
    for window, found in zip(windows, NetworkScorer(model, 64).score(windows), strict=True):
        np.testing.assert_allclose(found.losses, literal(model, window)[0], rtol=1e-5)


@needs_compiler
def test_the_native_engine_gives_the_literal_scores(tmp_path):
    """A dense model: nothing is rounded that a last bit could move."""
    model = tiny_model("none")
    save_model_folder(tmp_path / "model", model, QuantConfig(name="none"), None)
    scorer = bitnet_lit.load(tmp_path / "model", engine="cpu", head="float", kv_cache="float").scorer()
    assert isinstance(scorer, NativeScorer)
    windows = some_windows()
    found = scorer.score(windows)
    for window, scores in zip(windows, found, strict=True):
        losses, hits = literal(model, window) if window.start < len(window.ids) else (np.empty(0), np.empty(0, bool))
        # float32 logits of about 10, whose sums run in another order
        np.testing.assert_allclose(scores.losses, losses, rtol=1e-4, atol=1e-4)
        assert np.array_equal(scores.hits, hits)
    for step_tokens in (1, 7):
        scorer._step_tokens = step_tokens
        for scores, again in zip(found, scorer.score(windows), strict=True):
            assert np.array_equal(scores.losses, again.losses) and np.array_equal(scores.hits, again.hits)
    with pytest.raises(UserError, match="a text of 65 tokens: the model's context is 64"):
        scorer.score([Window([5] * 66, 1)])


@needs_compiler
def test_engines_agree_on_a_trained_model(trained_run, shards):
    from bitnet_lit.data.shards import open_shards

    ids = open_shards(shards).validation(60).gather(range(6)).tolist()
    windows = [Window(row, start) for row in ids for start in (1, 40)]
    models = bitnet_lit.load(trained_run, engine="cpu", head="float"), bitnet_lit.load(trained_run, engine="torch")
    ours, theirs = ([scores.losses.mean() for scores in model.scorer().score(windows)] for model in models)
    np.testing.assert_allclose(ours, theirs, rtol=5e-3)  # where a last bit moves a code; the keys are float16 here


TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=12)


@given(TEXTS, st.data())
def test_every_window_has_a_row_and_no_row_is_superfluous(texts, data):
    windows = [Window(ids, data.draw(st.integers(1, len(ids)))) for ids in texts]
    rows = plan_rows(windows)
    numbers = [number for row in rows for number in row.windows]
    assert sorted(numbers) == [i for i, window in enumerate(windows) if window.start < len(window.ids)]
    for row in rows:
        for number in row.windows:
            inputs = list(windows[number].ids[:-1])
            assert list(row.ids[: len(inputs)]) == inputs
        assert row.first == min(windows[number].start - 1 for number in row.windows)
        assert not any(other is not row and list(other.ids[: len(row.ids)]) == list(row.ids) for other in rows)
    assert [list(row.ids) for row in rows] == sorted(list(row.ids) for row in rows)


def test_a_model_that_computes_nan_is_one_line():
    model = tiny_model("none")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="a loss is NaN: train it again"):
        NetworkScorer(model, 64).score([Window([1, 2, 3], 1)])


def test_the_native_engine_computes_in_float32_alone(tmp_path):
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), None)
    model = bitnet_lit.load(tmp_path / "model")
    if model.engine.name == "PyTorch":
        pytest.skip("there is no compiler here")
    with pytest.raises(UserError, match="dtype=bfloat16: the native engine computes in float32: take engine=torch"):
        model.scorer(dtype="bfloat16")


def test_autocast_rounds_matrix_products():
    model, windows = tiny_model("none"), some_windows()[:3]
    exact = NetworkScorer(model, 64).score(windows)
    rounded = NetworkScorer(model, 64, dtype=torch.bfloat16).score(windows)
    for one, other in zip(exact, rounded, strict=True):
        assert not np.array_equal(one.losses, other.losses)
        np.testing.assert_allclose(one.losses, other.losses, rtol=0.05, atol=0.05)  # bfloat16 has 8 bits
