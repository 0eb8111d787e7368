"""A data module of a user's own: what it must have, its order, resuming it, and several processes."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from bitnet_lit import load
from bitnet_lit.cli import compose
from bitnet_lit.config import CustomData, EvaluateConfig
from bitnet_lit.data.custom import CustomDataModule, open_custom, own_tokenizer
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.files.plain_yaml import read_yaml
from bitnet_lit.inference.evaluation import evaluate
from bitnet_lit.training.checkpoint_file import read_checkpoint
from bitnet_lit.training.data import OwnData
from bitnet_lit.training.resume import resume_config, save_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN, Killed, kill_at

HERE = "tests.data.test_custom"
QUICK = ["callbacks.sample_prompts=[]", "callbacks.throughput=false", "callbacks.progress_bar=false"]


class Squares(L.LightningDataModule):
    """Sequences of squares modulo a number, shuffled by a DataLoader that knows nothing of runs."""

    vocab_size = 50

    def __init__(self, batch_size, sequence_length, count=22):
        super().__init__()
        rows = torch.arange(count)[:, None] + torch.arange(sequence_length + 1)
        self.rows, self.batch_size = rows**2 % self.vocab_size, batch_size

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.rows[:9], batch_size=self.batch_size)


class Counting(Squares):
    """Its batches follow from a state of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.next = 0

    def train_dataloader(self):
        while True:
            self.next += 1
            yield (self.rows[: self.batch_size] + self.next) % self.vocab_size

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state_dict):
        self.next = state_dict["next"]


class Live(Counting):
    """It returns the dictionary that it goes on changing as its state."""

    def __init__(self, **options):
        self.kept = {}
        super().__init__(**options)

    next = property(lambda self: self.kept["next"], lambda self, value: self.kept.update(next=value))

    def state_dict(self):
        return self.kept


class Folder(Squares):
    """Its arguments have the names of those of a folder of shards."""

    def __init__(self, batch_size, sequence_length, dir, tokenizer):
        super().__init__(batch_size, sequence_length)


class ByteTokenizer(Tokenizer):
    vocab_size, bos_id, eos_id = 257, 256, 256

    def encode(self, text, bos=True):
        return [256] * bos + list(text.encode())

    def decode(self, ids):
        return bytes(id for id in ids if id < 256).decode(errors="replace")

    def piece_bytes(self, token):
        return bytes([token]) if token < 256 else b""


class Bytes(Squares):
    """Text in a tokenizer of the user's own."""

    vocab_size = 257

    def __init__(self, batch_size, sequence_length):
        super().__init__(batch_size, sequence_length)
        self.tokenizer = ByteTokenizer()
        self.rows = torch.tensor(self.tokenizer.encode("abc " * 200)[: 22 * (sequence_length + 1)]).view(22, -1)


class Wrong(Squares):
    def __init__(self, batch_size, sequence_length, what):
        super().__init__(batch_size, sequence_length)
        if what == "vocabulary":
            self.vocab_size = None
        self.rows = {
            "type": self.rows.float(),
            "length": self.rows[:, 1:],
            "ids": self.rows + 50,
            "none": self.rows[:1],
        }.get(what, self.rows)


class NoValidation(Squares):
    """Its validation split is empty. Whether it says so depends on the kind of its loader."""

    batches = 0  # of training, that were taken

    def __init__(self, batch_size, sequence_length, says_length):
        super().__init__(batch_size, sequence_length)
        self.says_length = says_length

    def train_dataloader(self):
        for ids in super().train_dataloader():
            NoValidation.batches += 1
            yield ids

    def val_dataloader(self):
        return DataLoader(self.rows[:0], batch_size=self.batch_size) if self.says_length else iter(())


class NoText(Squares):
    """Its loaders give nothing, and do not say so beforehand."""

    def train_dataloader(self):
        return iter(())


class FakeTrainer:
    def __init__(self, rank=0, world_size=1):
        self.global_rank, self.world_size, self.global_step, self.should_stop = rank, world_size, 0, False
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"))


def module(cls="Squares", rank=0, world_size=1, limit=None, accumulate=1):
    config = CustomData(f"{HERE}.{cls}", batch_size=4)
    own = open_custom(config, 8, seed=3)
    made = CustomDataModule(config, own, 8, 4 * world_size * accumulate, limit, seed=3)
    made.trainer = FakeTrainer(rank, world_size)
    return made


def taken(made, count):
    batches = iter(made.train_dataloader())
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("cls", ["Squares", "Counting", "Live"])
def test_the_order_does_not_depend_on_random_numbers_processes_or_where_it_was_resumed(cls):
    whole = taken(module(cls), 24)  # more than four epochs of five batches
    torch.rand(7)
    assert all(map(torch.equal, whole, taken(module(cls), 24)))
    if cls == "Squares":
        assert sorted(torch.cat(whole[:5])[:, 0].tolist()) != sorted(torch.cat(whole[5:10])[:, 0].tolist())
    for rank in (0, 1):
        assert all(map(torch.equal, whole[rank::2], taken(module(cls, rank, 2), 12)))
    for before, after in itertools.product((1, 2, 4), repeat=2):  # processes that share the four batches of a step
        for steps in (1, 3):
            first = module(cls, 0, before, accumulate=4 // before)
            taken(first, steps * 4 // before + 1)  # a trainer reads one batch ahead
            first.trainer.global_step = steps
            for rank in range(after):
                second = module(cls, rank, after, accumulate=4 // after)
                second.load_state_dict(first.state_dict())
                assert all(map(torch.equal, whole[steps * 4 + rank :: after], taken(second, 8 // after)))


def test_validation_takes_a_part_inside_the_run_and_all_at_its_end():
    for world_size, parts in ((1, [[4, 4, 1]]), (2, [[4, 1], [4, 0]])):
        for rank, sizes in enumerate(parts):
            whole = module(rank=rank, world_size=world_size)
            assert [valid for _, valid, *_ in whole.val_dataloader()] == sizes
            part = module(rank=rank, world_size=world_size, limit=1)
            assert [(valid, in_part) for _, valid, _, in_part in part.val_dataloader()] == [(sizes[0], True)]
            part.trainer.should_stop = True
            marked = [(size, number == 0) for number, size in enumerate(sizes)]
            assert [(valid, in_part) for _, valid, _, in_part in part.val_dataloader()] == marked
    assert [valid for _, valid, *_ in module(limit=0.7).val_dataloader()] == [4, 4]


@pytest.mark.parametrize("cls", ["Squares", "Counting"])
def test_a_run_is_resumed_exactly_and_evaluated(tmp_path, monkeypatch, cls):
    options = [*TINY_RUN, *QUICK, f"data._target_={HERE}.{cls}", "data.count=23", "trainer.limit_val_batches=null"]
    metrics = train(compose("train", [f"run_dir={tmp_path}/whole", *options]))
    kill_at(monkeypatch, 6)
    with pytest.raises(Killed):
        train(compose("train", [f"run_dir={tmp_path}/broken", *options]))
    monkeypatch.undo()
    with pytest.raises(UserError, match=rf"names the class {HERE}.{cls}, .* 'allow=\[{HERE}.{cls}\]'"):
        resume_config(str(tmp_path / "broken"))
    with pytest.raises(UserError, match="data.count was 23 when the run began, and is 24 now"):
        train(resume_config(str(tmp_path / "broken"), [f"allow=[{HERE}]", "data.count=24"]))
    train(resume_config(str(tmp_path / "broken"), [f"allow=[{HERE}]"]))
    whole, resumed = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "broken"))
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name])
    assert json.loads((tmp_path / "whole" / "model" / "config.json").read_text())["vocab_size"] == 50
    folder = tmp_path / "whole" / ("model_last" if (tmp_path / "whole" / "model_last").exists() else "model")
    with pytest.raises(UserError, match=rf"names the class {HERE}.{cls}, .*checkpoint=.* 'allow="):
        evaluate(EvaluateConfig(checkpoint=str(folder), accelerator="cpu"))
    figures = evaluate(EvaluateConfig(checkpoint=str(folder), accelerator="cpu", allow=["tests"]))
    assert figures["loss"] == pytest.approx(metrics["val/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("type", r"a batch is torch.float32 \(4, 33\): it must be an int64 tensor"),
        ("length", r"a batch is \(4, 32\): it must be \(4, 33\)"),
        ("ids", r"ids from 50 to 9\d: they must lie in 0..49"),
        ("vocabulary", "its vocab_size is None"),
        ("none", "train_dataloader gives no batch"),
    ],
)
def test_a_module_that_does_not_fit_is_one_line(tmp_path, what, message):
    options = [*TINY_RUN, *QUICK, f"data._target_={HERE}.Wrong", f"data.what={what}"]
    with pytest.raises(UserError, match=message) as error:
        train(compose("train", [f"run_dir={tmp_path}/run", *options]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("says_length", [True, False])
def test_an_empty_validation_split_is_one_line(tmp_path, says_length, monkeypatch):
    """Where the loader says that it is empty, it is refused before the first step."""
    monkeypatch.setattr(NoValidation, "batches", 0)
    options = [*TINY_RUN, *QUICK, f"data._target_={HERE}.NoValidation", f"data.says_length={says_length}"]
    with pytest.raises(UserError, match="val_dataloader gives no sequence: is the text for validation shorter"):
        train(compose("train", [f"run_dir={tmp_path}/run", *options]))
    assert (NoValidation.batches == 0) == says_length


def test_a_share_of_a_loader_without_length_is_refused_before_the_first_step(tmp_path):
    options = [*TINY_RUN, *QUICK, f"data._target_={HERE}.NoValidation", "data.says_length=false"]
    options += ["trainer.limit_val_batches=0.5"]
    with pytest.raises(UserError, match=r"limit_val_batches=0.5: is a share, and val_dataloader does not say how many"):
        train(compose("train", [f"run_dir={tmp_path}/run", *options]))
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_no_sequence_to_measure_norms_on_is_one_line():
    data = OwnData(CustomData(f"{HERE}.NoText", batch_size=4), 8, seed=1)
    with pytest.raises(UserError, match="train_dataloader gives no batch"):
        data.rows(8, 8)


def test_arguments_of_a_module_of_the_users_own_stay_as_they_were_typed(tmp_path):
    """They are part of the run's identity: with another path a resume would be refused."""
    own = [f"data._target_={HERE}.Folder", "data.dir=corpus", "data.tokenizer={_target_: a.B}"]
    for overrides, folder in ((own, "corpus"), (["data.dir=corpus"], str(Path("corpus").absolute()))):
        save_config(compose("train", overrides), tmp_path)
        data = read_yaml(tmp_path / "config.yaml", "")["data"]
        assert data["dir"] == folder
    assert data["tokenizer"] is None


def test_what_is_no_data_module_is_refused():
    with pytest.raises(UserError, match=r"has no train_dataloader: derive it from LightningDataModule"):
        open_custom(CustomData("builtins.dict"), 8, seed=1)


def test_lengths_in_epochs_need_a_loader_that_says_its_length(tmp_path):
    options = [*TINY_RUN, *QUICK, "trainer.val_check_interval=null", "trainer.max_epochs=2"]
    metrics = train(compose("train", [f"run_dir={tmp_path}/run", *options, f"data._target_={HERE}.Squares"]))
    assert metrics["steps"] == 10  # five batches an epoch
    with pytest.raises(UserError, match="does not say how many batches an epoch has: give trainer.max_steps"):
        train(compose("train", [f"run_dir={tmp_path}/b", *options, f"data._target_={HERE}.Counting"]))


def test_a_run_with_a_tokenizer_of_the_users_own(tmp_path):
    """It gives bits per byte and samples, and its model generates when it is given again."""
    options = [*TINY_RUN, f"data._target_={HERE}.Bytes", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    figures = train(compose("train", [f"run_dir={tmp_path}/run", *options]))
    # Each target token is one byte of text.
    assert figures["val/bits_per_byte"] == pytest.approx(figures["val/loss"] / math.log(2))
    evaluated = evaluate(EvaluateConfig(checkpoint=f"{tmp_path}/run", allow=[HERE], accelerator="cpu"))
    assert evaluated["bits_per_byte"] == pytest.approx(figures["val/bits_per_byte"])
    assert "Once upon a time" in (tmp_path / "run" / "samples.txt").read_text()
    with pytest.raises(UserError, match="give tokenizer="):
        load(tmp_path / "run").generate("a")
    assert load(tmp_path / "run", tokenizer=ByteTokenizer()).generate("ab", max_new_tokens=3).startswith("ab")


def test_a_tokenizer_of_another_library_is_one_line():
    own = SimpleNamespace(tokenizer=object())
    with pytest.raises(UserError, match="its tokenizer is a object: save it as a tokenizer.json"):
        own_tokenizer(own)
