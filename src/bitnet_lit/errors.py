"""These exceptions are messages to users, each in one line: what is wrong, the value seen, what to do.

    UserError         a mistake on the command line, in a config or in a file             status 2
    DiskError         a disk that is full, broken or gone                                  status 1
    TrainingStopped   a run that diverged (1), or that a signal ended (128 + its number)
    DataError         shards that changed or broke while they were read                    status 1
    GpuError          an error of the GPU or its driver                                    status 1
    ParityError       an export that differs from the model it was written from            status 1
    ModelError        a model whose results are not finite, or too little memory           status 1

The commands print the line and exit with the status. Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

LONGEST_LINE = 2000  # characters; about one screen


def one_line(message: object, longest: int = LONGEST_LINE) -> str:
    """Put a message on one line and escape characters that cannot be printed: it may quote anything typed or read.

    Args:
        longest: the most characters. A longer message loses its middle, because it starts with what is wrong and ends
            with the remedy.
    """
    text = " ".join(str(message).split())
    text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    half = longest // 2 - 3
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def nearest(word: str, words: Sequence[str], cutoff: float = 0.7) -> str | None:
    """Return the one of `words` that is spelled almost like `word`, or None.

    Args:
        cutoff: the least similarity, 0 to 1, as in `difflib.get_close_matches`.
    """
    found = difflib.get_close_matches(word, words, n=3, cutoff=cutoff)
    swapped = [each for each in found if sorted(each) == sorted(word)]  # "modle" means "model" and not "mode"
    return next(iter([*swapped, *found]), None)


def list_remedy(key: str, value: str) -> str:
    """Return the remedy for a name that was not found, if its commas may divide several names; otherwise nothing."""
    return f"; for several give a list: {key}=[{value}]" if "," in value else ""


class UserError(ValueError):
    """Reports a user's mistake in one line: what is wrong, the value seen, the remedy.

    Attributes:
        status: the exit status of the process.
    """

    status = 2


class DiskError(UserError):
    """Reports a disk that is full, broken or gone. This is not the user's mistake, so the status is 1."""

    status = 1


class TrainingStopped(RuntimeError):
    """Reports a run that ended early on purpose: it diverged, or a signal stopped it. `status` is the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Interruption(BaseException):
    """Carries the message of a signal out of the code that the signal met; it is raised by a signal's handler.

    It is no Exception, as KeyboardInterrupt is none, so that libraries do not catch it and report it in their way.

    Attributes:
        stopped: the message, which is raised in its place where the run or the job ends.
    """

    def __init__(self, stopped: TrainingStopped) -> None:
        super().__init__(str(stopped))
        self.stopped = stopped


class Diverged(TrainingStopped):
    """Reports a run whose loss or gradient is no longer finite."""


class DataError(TrainingStopped):
    """Reports shards that changed or broke while they were read. This is not the user's mistake: the status is 1."""


# CUDA's libraries have a status of their own, for example where other runs on the GPU have left too little for cuBLAS.
_OUT_OF_MEMORY = re.compile(
    "can't allocate memory|out of memory|not enough memory|_ALLOC_FAILED|_ALLOCATION_FAILED", re.IGNORECASE
)


def names_out_of_memory(text: str) -> bool:
    """Return whether a message says that memory ran out."""
    return _OUT_OF_MEMORY.search(text) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: Python and numpy raise MemoryError, torch raises RuntimeError on every device."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and names_out_of_memory(str(error)))


class GpuError(TrainingStopped):
    """Reports an error of the GPU or its driver, after which the process cannot use the GPU any more: status 1."""


class ParityError(RuntimeError):
    """Reports an export that differs from the model it was written from; the export is removed."""

    status = 1


class ModelError(RuntimeError):
    """Reports a model whose results are not finite, or that runs out of memory."""

    status = 1


MESSAGES = (UserError, TrainingStopped, ParityError, ModelError)
"""All messages to users; each has its exit status."""


def without_class_name(line: str) -> str:
    """Return a line of the form `UserError: what is wrong`, as in a job's error.txt, without the name of our class."""
    name, colon, message = line.partition(": ")
    classes = list(MESSAGES)
    for each in classes:  # grows by the subclasses
        classes += each.__subclasses__()
    return message if colon and name in {each.__name__ for each in classes} else line


# The system's error number: what to say. The remedy of `disk_errors` is `full` for the first two tables.
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
}
_BROKEN = {
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network mount is gone",
    errno.ENOTCONN: "the network mount is gone",
    errno.EHOSTDOWN: "the network mount is gone",
    errno.ETIMEDOUT: "the network mount does not answer",
    errno.ENODEV: "the disk is gone",
    errno.ENXIO: "the disk is gone",
    errno.EFBIG: "the file system, or ulimit -f, holds no file of that size",
    errno.EMFILE: "too many open files (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
}
_REFUSED = {
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EROFS: "a read-only file system",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EINVAL: "the file system does not take it (a name that it cannot hold?)",
    errno.EILSEQ: "the file system cannot hold the name",
    errno.ENOTDIR: "a file lies where a folder is needed",
    errno.EEXIST: "something else of that name lies there",
    errno.EISDIR: "a folder lies there",
    errno.ENOTEMPTY: "a folder that is not empty lies there",
    errno.ENOENT: "the folder is not there",
    errno.ELOOP: "a link leads to itself",
    errno.EBUSY: "it is in use, or a mount point",
    errno.EXDEV: "it spans two file systems",
    errno.ETXTBSY: "it is being executed",
}
_SHORT_WRITE = re.compile(r"requested and \d+ written|PytorchStreamWriter|inline_container|file write failed")


@contextlib.contextmanager
def disk_errors(
    where: str | Path,
    full: str = "make room, and give the same command again",
    refused: str = "choose another place",
) -> Iterator[None]:
    """Turn an error of the disk in the block into one line without a traceback.

    For a full disk, torch and safetensors raise their own exceptions, and numpy raises an OSError without a number.
    These are recognized too.

    Args:
        where: the start of the line, such as "out=data/x".
        full: the remedy where the disk is full or broken.
        refused: the remedy where this user cannot write to the place, or nobody can.

    Raises:
        DiskError: the disk is full, broken or gone.
        UserError: the place cannot be written.
    """
    try:
        yield
    except Exception as error:
        number, name, text = getattr(error, "errno", None), getattr(error, "filename", None), str(error)
        if type(error).__name__ == "SafetensorError" and (found := re.search(r"\(os error (\d+)\)", text)):
            number = int(found[1])
        elif not isinstance(error, OSError | RuntimeError) or (number == errno.EINVAL and name is None):
            raise
        if isinstance(name, str | Path) and str(name) not in str(where):
            where = f"{where}: {name}"
        if number in _FULL:
            raise DiskError(f"{where}: {_FULL[number]}: {full}") from error
        if number in _BROKEN:
            raise DiskError(f"{where}: {_BROKEN[number]}: {full}") from error
        if number in _REFUSED:
            raise UserError(f"{where}: cannot be written ({_REFUSED[number]}): {refused}") from error
        if number is None and _SHORT_WRITE.search(text):
            raise DiskError(f"{where}: the disk took only a part (is it full, or a quota used up?): {full}") from error
        raise


@contextlib.contextmanager
def read_errors(where: str | Path, remedy: str) -> Iterator[None]:
    """Turn an error of the system while the block reads a file or folder into one line.

    Args:
        where: the start of the line: the path, with its key where that was typed.
        remedy: the end of the line: what the user can do.

    Raises:
        UserError: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or one_line(error)}): {remedy}") from None
