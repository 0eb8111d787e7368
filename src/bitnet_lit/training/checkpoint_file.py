"""A checkpoint file is written whole or not at all, and it is refused when one of its bytes has changed.

A checkpoint is what `torch.save` writes, with one line after it::

    <zip archive of torch.save>\\nbitnet_lit sha256 <64 hex digits>\\n

The hash covers all bytes before that line. PyTorch finds the end of the archive by itself, so `torch.load` opens the
file as it is. The file is written under a temporary name in its own folder, flushed to the disk and renamed, so a kill
at any moment leaves the old file or the new one. Checkpoints of earlier versions end without that line. For them the
CRC-32 of each record of the archive is compared, which `torch.load` does not do when it maps a file.

Reading unpickles only tensors and plain containers (`weights_only=True`).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor, nn

from bitnet_lit.errors import UserError, one_line
from bitnet_lit.files.atomic import atomic_file

SEALED = "sealed"  # a key of the content: the file was written with a hash line, so a missing line means damage
_SEAL = re.compile(rb"\nbitnet_lit sha256 ([0-9a-f]{64})\n")
_SEAL_BYTES = len(b"\nbitnet_lit sha256 ") + 64 + 1
_BLOCK_BYTES = 2**20
_KEYS: dict[str, type] = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "global_step": int,
    "pytorch-lightning_version": str,
}


class _HashingFile:
    """Passes what `torch.save` writes to a file, hashes it, and keeps the OSError that a full disk raises.

    `torch.save` turns that error into a RuntimeError about positions in the archive.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        return written

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write `content` (tensors and plain data) to `path`, which keeps its old content until the new one is complete.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save({**content, SEALED: True}, hashing)  # type: ignore[arg-type]  # it calls write and flush only
        except RuntimeError:
            if hashing.error is not None:
                raise hashing.error from None
            raise
        file.write(b"\nbitnet_lit sha256 " + hashing.sha256.hexdigest().encode() + b"\n")


def _is_sealed(path: Path) -> bool:
    """Return whether the file ends with a hash line, and compare the hash with the content.

    Raises:
        ValueError: the content has changed since it was written.
    """
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        left = max(0, file.seek(0, os.SEEK_END) - _SEAL_BYTES)
        file.seek(left)
        seal = _SEAL.fullmatch(file.read())
        if seal is None:
            return False
        file.seek(0)
        while left:
            block = file.read(min(left, _BLOCK_BYTES))
            sha256.update(block)
            left -= len(block)
    if sha256.hexdigest() != seal[1].decode():
        raise ValueError("its content is not what was written: some of its bytes have changed")
    return True


def _check_archive(path: Path) -> None:
    """Check a checkpoint that has no hash line by the CRC-32 of each record.

    Raises:
        ValueError: a record has another checksum than was written.
    """
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"the record {damaged} has another checksum than was written")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint and check it against its hash. Its tensors are mapped: they are read when they are used.

    Raises:
        UserError: the file is missing or damaged, or it is no checkpoint of a run.
    """
    try:
        sealed = _is_sealed(path)
        if not sealed:
            _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise TypeError("it holds no dictionary")
        for key, kind in _KEYS.items():
            if not isinstance(content.get(key), kind):
                raise TypeError(f"it has no {key}")
        if not all(isinstance(value, Tensor) for value in content["state_dict"].values()):
            raise TypeError("its state_dict holds other things than tensors")
        if not sealed and content.get(SEALED):
            raise ValueError("its last line, the checksum, is missing or damaged")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # torch and zipfile raise a different type for each way a file can be broken
        what = one_line(error, 200)
        raise UserError(f"{path}: damaged, or no checkpoint of a run ({type(error).__name__}: {what})") from None
    return content


def link_checkpoint(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy where the file system has no hard links.

    A checkpoint file is replaced and never changed in place, so `target` keeps its content when `source` is replaced.
    """
    with atomic_file(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


_PLAIN = (dict, OrderedDict, list, tuple, set, str, bytes, bool, int, float, type(None), Tensor, nn.Parameter)


def check_plain(content: Any, what: str) -> None:
    """Refuse a state that `torch.load(weights_only=True)` could not read: anything but tensors and plain data.

    Args:
        what: whose state it is, for the error text.

    Raises:
        UserError: the state holds an object of another type, which the text names.
    """
    if type(content) not in _PLAIN and not isinstance(content, torch.device | torch.dtype | torch.Size):
        raise UserError(
            f"{what} holds a {type(content).__module__}.{type(content).__qualname__}, which a checkpoint cannot keep: "
            "give tensors and plain data"
        )
    if isinstance(content, dict):
        for key, value in content.items():
            check_plain(value, what)
            check_plain(key, what)
    elif isinstance(content, list | tuple | set):
        for value in content:
            check_plain(value, what)


class CheckpointIO(TorchCheckpointIO):
    """Lets Lightning's Trainer write and read the checkpoint files of this module."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint as `write_checkpoint` does.

        Raises:
            UserError: a callback, a schedule or a data module of the user's own has a state that could not be read
                again.
        """
        for part, what in (
            ("callbacks", "a callback's state_dict"),
            ("lr_schedulers", "the schedule's state_dict"),
            ("CustomDataModule", "the data module's state_dict"),
        ):
            check_plain(checkpoint.get(part), what)
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the content of a checkpoint that `read_checkpoint` has checked before."""
        return dict(torch.load(path, map_location="cpu", weights_only=True))
