"""A data module of the user's own is made to give batches without end, and the same ones again after a resume.

A LightningDataModule serves if it has

    vocab_size          int: all token ids are below it
    tokenizer           a `bitnet_lit.data.tokenizers.Tokenizer`, or tokenizer_path: a SentencePiece model or a
                        tokenizer.json, which the model folder keeps; without them, no samples and no bits per byte
    train_dataloader()  an iterable of int64 (B, T + 1): B is data.batch_size, T the length of a sequence; one epoch
    val_dataloader()    the same, for validation; a batch may be smaller

It may make them in `__init__`, in `prepare_data` (which the first process alone calls) or in `setup`. Its constructor
gets `batch_size`, `sequence_length` and `seed` if it has arguments of these names, and the other keys of the group. It
need not know about devices: of W processes, process r trains on the batches r, r + W, r + 2 W and so on.

PyTorch's random numbers are seeded for each batch, from (seed, epoch, batch). So a shuffling `DataLoader` gives the
same order again, and a resumed run passes over the batches that were consumed. If the module has `state_dict` and
`load_state_dict`, its state is saved and restored instead.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from bitnet_lit.config.data import CustomData
from bitnet_lit.data.tokenizers import Tokenizer, open_tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.instantiate import instantiate, locate, takes
from bitnet_lit.runs.meeting import first_alone

_MIX = 0x9E3779B97F4A7C15  # an odd multiplier spreads small numbers over 64 bits (splitmix64, Steele 2014)
NO_BATCH = "data: train_dataloader gives no batch: is the text shorter than a batch of sequences?"
NO_VALIDATION = "data: val_dataloader gives no sequence: is the text for validation shorter than a sequence?"
_KEPT_STATES = 64  # a trainer reads ahead by less


def open_custom(config: CustomData, sequence_length: int, seed: int, is_first: bool | None = None) -> Any:
    """Make the data module of `config` and set it up, so that it gives batches.

    Args:
        is_first: whether this process prepares the data, and the other processes of its run wait; None: it is alone.

    Raises:
        UserError: the module cannot be made, or lacks what a run needs.
    """
    target = locate(config._target_, "data")
    given = {"batch_size": config.batch_size, "sequence_length": sequence_length, "seed": seed}
    own = instantiate(config.call, "data", **{name: value for name, value in given.items() if takes(target, name)})
    lacks = [name for name in ("train_dataloader", "val_dataloader", "setup") if not callable(getattr(own, name, None))]
    if lacks:
        raise UserError(f"data._target_={config._target_}: has no {lacks[0]}: derive it from LightningDataModule")
    if is_first is None:
        own.prepare_data()
    else:
        first_alone(own.prepare_data, is_first, f"data._target_={config._target_}: prepare_data")
    own.setup("fit")
    vocab_size = getattr(own, "vocab_size", None)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
        raise UserError(
            f"data._target_={config._target_}: its vocab_size is {vocab_size!r}: it must say below which number ids lie"
        )
    return own


def own_tokenizer(own: Any) -> Tokenizer | None:
    """Return the tokenizer of a data module: the object, or the one in its file; None where it has neither.

    Raises:
        UserError: the object is of another library, or the file cannot be opened; one line.
    """
    tokenizer, path = getattr(own, "tokenizer", None), getattr(own, "tokenizer_path", None)
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if path is not None:
        return open_tokenizer(path)
    if tokenizer is not None:
        raise UserError(
            f"data: its tokenizer is a {type(tokenizer).__name__}: save it as a tokenizer.json and give its path as "
            "tokenizer_path, or derive it from bitnet_lit.data.tokenizers.Tokenizer"
        )
    return None


def length_of(loader: Any) -> int | None:
    """Return the number of batches of an epoch; None where the loader does not say."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # PyTorch raises either where the dataset does not know its length
        return None


def checked(ids: Any, sequence_length: int, vocab_size: int, batch_size: int | None = None) -> Tensor:
    """Return a batch of the user's own, int64 (B, T + 1), after checking it.

    Raises:
        UserError: the batch has another type or shape, or ids that the vocabulary does not have.
    """
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 2:
        what = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise UserError(f"data: a batch is {what}: it must be an int64 tensor (B, T + 1)")
    if ids.shape[1] != sequence_length + 1 or (batch_size is not None and len(ids) != batch_size):
        wanted = f"({'B' if batch_size is None else batch_size}, {sequence_length + 1})"
        raise UserError(
            f"data: a batch is {tuple(ids.shape)}: it must be {wanted}, from data.batch_size and the length of a "
            "sequence (data.sequence_length) plus 1; a DataLoader leaves out a smaller last batch with drop_last=True"
        )
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise UserError(
            f"data: a batch holds ids from {int(ids.min())} to {int(ids.max())}: they must lie in 0..{vocab_size - 1} "
            "(vocab_size)"
        )
    return ids


class _Epochs:
    """Yields the batches of a data module, epoch after epoch, with PyTorch's generator seeded for each batch."""

    def __init__(self, own: Any, seed: int, epoch: int = 0, batch: int = 0) -> None:
        self.own, self.seed, self.epoch, self.batch = own, seed, epoch, batch

    def __iter__(self) -> Iterator[Any]:
        while True:
            loader = self.own.train_dataloader()
            set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self.epoch)
            batches, end = None, object()
            while True:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed((self.seed * _MIX + self.epoch * 1_000_003 + self.batch) % 2**63)
                    batches = iter(loader) if batches is None else batches
                    ids = next(batches, end)
                if ids is end:
                    break
                self.batch += 1
                yield ids
            if self.batch == 0:
                raise UserError(NO_BATCH)
            self.epoch, self.batch = self.epoch + 1, 0


class _Train(IterableDataset):
    """Yields this process's share of the batches that have not been consumed."""

    def __init__(self, module: CustomDataModule) -> None:
        self.module = module

    def __iter__(self) -> Iterator[Tensor]:
        module, config = self.module, self.module.config
        assert module.trainer is not None
        rank, world_size = module.trainer.global_rank, module.trainer.world_size
        number, epochs = module.position()
        for ids in epochs:
            number += 1  # batches of all processes so far
            module.note(number, epochs)
            if number > module.consumed and (number - 1) % world_size == rank:
                yield checked(ids, module.sequence_length, module.own.vocab_size, config.batch_size)


class _Validation(IterableDataset):
    """Yields batches as `ValidationBatches` does; all processes get the same number of batches.

    The part that every validation takes are the first batches, because a loader is read in order.
    """

    def __init__(self, module: CustomDataModule) -> None:
        self.module = module

    def __iter__(self) -> Iterator[tuple[Tensor, int, int, bool]]:
        module = self.module
        assert module.trainer is not None
        rank, world_size, takes_all = module.trainer.global_rank, module.trainer.world_size, module.trainer.should_stop
        loader = module.own.val_dataloader()
        limit = module.validation_limit(loader, world_size)
        group: list[Tensor] = []
        rows, in_part = 0, True
        for number, ids in enumerate(loader):
            in_part = limit is None or number < limit * world_size
            if not in_part and not takes_all:
                break
            group.append(checked(ids, module.sequence_length, module.own.vocab_size))
            rows += len(ids)
            if len(group) == world_size:
                yield group[rank], len(group[rank]), 0, in_part
                group = []
        if group:
            yield (group[rank], len(group[rank]), 0, in_part) if rank < len(group) else (group[0][:1], 0, 0, in_part)
        if not rows:
            raise UserError(NO_VALIDATION)


class CustomDataModule(L.LightningDataModule):
    """Gives Lightning the batches of a data module of the user's own.

    Args:
        own: the module that `open_custom` returned.
        sequence_length: T, the tokens that a sequence predicts.
        samples_per_step: sequences that all ranks together consume in an optimizer step.
        limit_val_batches: batches that every validation takes, or, as a float, a share of them. None: all.
        seed: decides the order of the batches.
    """

    def __init__(
        self,
        config: CustomData,
        own: Any,
        sequence_length: int,
        samples_per_step: int,
        limit_val_batches: int | float | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.config, self.own, self.sequence_length, self.seed = config, own, sequence_length, seed
        self.batches_per_step = samples_per_step // config.batch_size
        self.limit_val_batches = limit_val_batches
        self.resumed: dict[str, Any] = {"batches": 0, "step": 0}
        self._states: deque[dict[str, Any]] = deque(maxlen=_KEPT_STATES)
        cls, base = type(own), L.LightningDataModule
        self._has_state = getattr(cls, "state_dict", base.state_dict) is not base.state_dict

    @property
    def consumed(self) -> int:
        """Return how many batches had been consumed when the run began, or was resumed."""
        return int(self.resumed["batches"])

    def setup(self, stage: str) -> None:
        """Give the user's module its trainer; `open_custom` has called its `setup`.

        Raises:
            UserError: it says that its validation split has no batch, or does not say of how many a share is wanted.
        """
        self.own.trainer = self.trainer
        loader = self.own.val_dataloader()
        if length_of(loader) == 0:
            raise UserError(NO_VALIDATION)
        assert self.trainer is not None
        self.validation_limit(loader, self.trainer.world_size)

    def train_dataloader(self) -> DataLoader:
        """Return batches without end, from the first one on that was not consumed: int64 (B, T + 1)."""
        return self._loader(_Train(self))

    def val_dataloader(self) -> DataLoader:
        """Return batches of the validation split (see `ValidationBatches`)."""
        return self._loader(_Validation(self))

    def _loader(self, batches: IterableDataset) -> DataLoader:
        # The user's code runs in this thread, because it may draw PyTorch's random numbers, which all threads share.
        # A batch in pinned memory is copied to a GPU without waiting for it.
        assert self.trainer is not None
        return DataLoader(batches, batch_size=None, pin_memory=self.trainer.strategy.root_device.type == "cuda")

    def validation_limit(self, loader: Any, world_size: int) -> int | None:
        """Return how many batches this process takes in every validation; None: all.

        Raises:
            UserError: the limit is a share, and the loader does not say its length.
        """
        if not isinstance(self.limit_val_batches, float):
            return self.limit_val_batches
        if (length := length_of(loader)) is None:
            raise UserError(
                f"trainer.limit_val_batches={self.limit_val_batches}: is a share, and val_dataloader does not say how "
                "many batches it has: give a number of batches"
            )
        return max(1, int(self.limit_val_batches * length / world_size))

    def position(self) -> tuple[int, _Epochs]:
        """Return how many batches come before the place to begin at, and the epochs from there."""
        if "own" in self.resumed:
            self.own.load_state_dict(self.resumed["own"])
            number = int(self.resumed["number"])
            return number, _Epochs(self.own, self.seed, int(self.resumed["epoch"]), int(self.resumed["batch"]))
        length = length_of(self.own.train_dataloader())
        epoch = self.consumed // length if length else 0
        return epoch * (length or 0), _Epochs(self.own, self.seed, epoch)

    def note(self, number: int, epochs: _Epochs) -> None:
        """Keep the state after a batch: the trainer reads ahead, but saves the state of what was consumed."""
        if self._has_state:
            place = {"number": number, "epoch": epochs.epoch, "batch": epochs.batch}
            own = copy.deepcopy(self.own.state_dict())  # the module may return what it goes on changing
            self._states.append({**place, "own": own})

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches the run has consumed, and the state of the user's module there or before."""
        assert self.trainer is not None
        steps = self.trainer.global_step - self.resumed["step"]
        batches = self.consumed + steps * self.batches_per_step
        kept = [state for state in self._states if state["number"] <= batches]
        return {"batches": batches, "step": self.trainer.global_step, **(kept[-1] if kept else self._resumed_place())}

    def _resumed_place(self) -> dict[str, Any]:
        return {key: value for key, value in self.resumed.items() if key not in ("batches", "step")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue behind the last consumed batch."""
        self.resumed = dict(state_dict)
