"""Several corpora: one tokenizer, samples by weight, epochs and validation of each, and runs that go on exactly."""

import json

import numpy as np
import pytest
import torch

from bitnet_lit.cli import compose
from bitnet_lit.config import DataConfig, EvaluateConfig, PrepareConfig
from bitnet_lit.data.corpora import open_corpora
from bitnet_lit.data.prepare import prepare
from bitnet_lit.errors import UserError
from bitnet_lit.inference.evaluation import evaluate
from bitnet_lit.training.data import ShardData
from bitnet_lit.training.identity import check_identity
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN, Killed, kill_at


@pytest.fixture(scope="session")
def others(shards, tmp_path_factory):
    """A second corpus with the tokenizer of `shards`."""
    out = tmp_path_factory.mktemp("others")
    options = {"source": "demo", "num_stories": 150, "seed": 7, "num_workers": 1}
    prepare(PrepareConfig(out=str(out), tokenizer=str(shards), **options))
    return out


def mix(shards, others, **options):
    return DataConfig(mix={"a": {"dir": str(shards), "weight": 3}, "b": {"dir": str(others)}}, **options)


def test_one_split_and_one_order_for_all(shards, others):
    corpora = open_corpora(mix(shards, others))
    split, order = corpora.train(16, seed=3)
    alone = [open_corpora(DataConfig(dir=str(folder))).train(16, seed=3) for folder in (shards, others)]
    indices = np.arange(8000)
    which, own = order.split(indices)
    assert abs((which == 0).mean() - 0.75) < 1e-3
    gathered = split.gather(order(indices))
    for corpus, (its_split, its_order) in enumerate(alone):
        # Each corpus comes as it would alone with this seed, through its own epochs.
        assert np.array_equal(gathered[which == corpus], its_split.gather(its_order(own[which == corpus])))
    assert own[which == 1].max() > alone[1][1].num_samples  # the small one is in its second epoch
    assert corpora.num_sequences(16) == {"a": alone[0][0].num_sequences, "b": alone[1][0].num_sequences}


def test_the_order_of_the_names_is_part_of_what_a_run_goes_on_with(shards, others):
    first, second = {"dir": str(shards)}, {"dir": str(others)}
    split = {}
    for names in ("ab", "ba"):
        corpora = dict(zip(names, (first, second) if names == "ab" else (second, first), strict=True))
        split[names] = ShardData(DataConfig(mix=corpora)).identity()
    check_identity(split["ab"], dict(split["ab"]), "run")
    with pytest.raises(UserError, match="data.mix was a, b when the run began, and is b, a now"):
        check_identity(split["ab"], split["ba"], "run")


def test_the_first_sequences_of_each_corpus(shards, others):
    for shuffle in ("global", "shards"):
        _, order = open_corpora(mix(shards, others, max_train_sequences=5, shuffle=shuffle)).train(16, seed=3)
        sizes = open_corpora(mix(shards, others)).num_sequences(16)
        assert set(order(np.arange(200)).tolist()) == {*range(5), *range(sizes["a"], sizes["a"] + 5)}


def test_the_first_validation_sequences_of_each_corpus(shards, others):
    whole = open_corpora(mix(shards, others)).validation(16)
    for count in (1, 5, 10**9):
        parts = open_corpora(mix(shards, others, max_val_sequences=count)).validation(16)
        assert [part.num_sequences for part in parts] == [min(count, split.num_sequences) for split in whole]
        for part, split in zip(parts, whole, strict=True):
            numbers = np.arange(part.num_sequences)
            assert np.array_equal(part.gather(numbers), split.gather(numbers))


def test_mistakes_are_one_line(shards, others, tmp_path):
    prepare(PrepareConfig(source="demo", out=str(tmp_path / "c"), num_stories=60, vocab_size=400, num_workers=1))
    with pytest.raises(UserError, match=r"data.mix.b.dir=.*/c: another tokenizer than that of a .400 entries.*512"):
        open_corpora(mix(shards, tmp_path / "c"))
    with pytest.raises(UserError, match=r"data.mix.b.dir=.*nowhere: no such folder"):
        open_corpora(mix(shards, tmp_path / "nowhere"))
    for values, message in (
        ({"mix": {"a": {"dir": "x"}}, "dir": "y"}, "data.dir=y with data.mix: give one of them"),
        ({"mix": {"a": {"weight": 2}}}, "data.mix.a: has no folder"),
        (
            {"mix": {"a": {"dir": "x", "wieght": 2}}},
            "data.mix.a.wieght: there is no such key: .* dir, weight",
        ),
        ({"mix": {"a b": {"dir": "x"}}}, "data.mix.a b: a name has letters"),
        ({"mix": {"a": {"dir": "x", "weight": 0}}}, "weight=0: must be greater than zero"),
        ({"shuffle": "shard"}, "data.shuffle=shard: must be one of global, shards"),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig(**values)


def test_a_mixed_run_goes_on_exactly_and_validates_each_corpus(shards, others, tmp_path, capsys):
    options = [*TINY_RUN, f"data.mix.a.dir={shards}", "data.mix.a.weight=3", f"data.mix.b.dir={others}"]
    options += ["data.shuffle=shards", "data.shards_per_block=2"]
    metrics = train(compose("train", [f"run_dir={tmp_path}/whole", *options]))
    printed = " ".join(capsys.readouterr().err.split())
    assert "a: 75 %, 768 tokens" in printed and "b: 25 %, 256 tokens" in printed
    assert metrics["val/loss"] == pytest.approx(0.75 * metrics["val/loss_a"] + 0.25 * metrics["val/loss_b"], rel=1e-6)
    assert metrics["val/loss_a"] != metrics["val/loss_b"] and metrics["val/bits_per_byte"] > 0
    with pytest.raises(UserError, match=r"several corpora .a, b.: give the one to evaluate on: data_dir=.*, .*"):
        evaluate(EvaluateConfig(checkpoint=f"{tmp_path}/whole", accelerator="cpu"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 6)
        train(compose("train", [f"run_dir={tmp_path}/broken", *options]))
    resumed = train(resume_config(str(tmp_path / "broken")))
    figures = [name for name in metrics if not name.startswith("perf/") and name != "run_dir"]
    assert all(resumed[name] == metrics[name] for name in figures)
    one, other = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "broken")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(UserError, match=r"data.mix.a.weight was 3.0 when the run began, and is 2.0 now"):
        train(
            resume_config(
                str(tmp_path / "broken"), ["data.mix.a.weight=2", "trainer.max_steps=9", "schedule.total_steps=8"]
            )
        )
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text())["val/loss_b"] == metrics["val/loss_b"]
