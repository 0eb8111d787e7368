"""This module says what went wrong when a file was fetched, and whether another attempt can help.

Each kind of storage has exceptions of its own, and none of their packages is imported here. So an exception is known by
what it says of itself: its status of HTTP, its place among Python's own exceptions, the names of its classes. The same
holds for the exceptions that it was raised from, where a package has put its own around another one.

    final       no such file, no right to read it, no credentials, a URL or a setting of a wrong form, an unknown host
    silent      no answer in time: each attempt has waited already
    passing     all else: a status from 500 on, too many requests, a broken connection, a file that came damaged
"""

from __future__ import annotations

import errno
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from bitnet_lit.errors import one_line

_RETRIED_STATUS = (408, 425, 429)  # of those below 500, which say that the request is wrong
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}  # errors of this machine's disk
_FINAL_NUMBERS = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG}  # s3fs translates S3's codes to these
_FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ImportError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)
_PASSING_VALUES = (json.JSONDecodeError, UnicodeError)  # a server's page in the place of an answer
# botocore's, google.auth's and huggingface_hub's: something is missing on this machine.
_NOT_SET_UP = {
    *("NoCredentialsError", "PartialCredentialsError", "NoAuthTokenError", "ProfileNotFound", "NoRegionError"),
    *("ConfigNotFound", "ConfigParseError", "SSOError", "LoginError", "DefaultCredentialsError"),
    *("LocalTokenNotFoundError", "OfflineModeIsEnabled"),
}
_UNKNOWN_HOST = {getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)}
_MOST_CAUSES = 8


class Damaged(Exception):
    """Says what is wrong with a file that came: another attempt may bring the right one."""


@dataclass(frozen=True)
class Failure:
    """Describes an attempt that failed.

    Attributes:
        reason: a few words for the user.
        is_final: whether each later attempt would fail in the same way.
        is_silent: whether it failed because no answer came in time.
        remedy: what the user can do about a final one.
    """

    reason: str
    is_final: bool = False
    is_silent: bool = False
    remedy: str = "check the URL, and the rights to read it"


def is_of_this_disk(error: BaseException) -> bool:
    """Return whether the file could not be written here, whatever the server does."""
    # s3fs has EIO for S3's internal errors where the system has no EREMOTEIO; S3's answer is then the cause.
    return isinstance(error, OSError) and error.errno in _DISK and error.__cause__ is None


def failure(error: BaseException, is_first: bool) -> Failure:
    """Describe an attempt that ended with `error`.

    Args:
        is_first: whether nothing has come from this server so far. An unknown host is then a mistake in the URL; later
            it is a network that is gone for a while.
    """
    if isinstance(error, Damaged):
        return Failure(one_line(error, 200))
    chain = list(_causes(error))
    # Not by TimeoutError alone: asyncio's is another class in Python 3.10, and httpx and botocore have their own.
    if any("Timeout" in name for each in chain for name in _class_names(each)):
        return Failure("no answer in time", is_silent=True)
    status = next((found for each in chain if (found := _status(each)) is not None), None)
    if isinstance(error, FileNotFoundError):
        return Failure("no such file", is_final=True)
    if status is not None:
        message = getattr(error, "message", None) or ("" if _status(error) is not None else error)
        reason = one_line(f"the server answers {status} {_text(message)}".strip(), 200)
        return Failure(reason, is_final=300 <= status < 500 and status not in _RETRIED_STATUS)
    reason = re.sub(r"^\[Errno -?\d+\] ", "", one_line(error, 200)) or type(error).__name__
    if any(isinstance(each, OSError) and each.errno == errno.ECONNREFUSED for each in chain):
        return Failure("the server refuses the connection")  # aiohttp's words have its own objects in them
    if any(isinstance(each, socket.gaierror) and each.errno in _UNKNOWN_HOST for each in chain):
        return Failure(reason, is_final=is_first, remedy="check the URL, and the network")
    if any(not _NOT_SET_UP.isdisjoint(_class_names(each)) for each in chain):
        return Failure(reason, is_final=True, remedy="set up what the package of this storage needs")
    return Failure(reason, is_final=any(map(_is_final, _causes(error, explicit=True))))


def _is_final(error: BaseException) -> bool:
    if isinstance(error, _PASSING_VALUES):
        return False
    if isinstance(error, _FINAL):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FINAL_NUMBERS
    return type(error) is OSError and str(error).startswith("Forbidden: ")  # gcsfs's 403 has no number


def _causes(error: BaseException, explicit: bool = False) -> Iterator[BaseException]:
    """Yield an exception, the one that it was raised from, and so on.

    Args:
        explicit: whether to leave out exceptions that were only being handled when the next one was raised.
    """
    found: BaseException | None = error
    for _ in range(_MOST_CAUSES):
        if found is None:
            return
        yield found
        context = None if explicit or found.__suppress_context__ else found.__context__
        found = found.__cause__ or context


def _class_names(error: BaseException | None) -> set[str]:
    return {each.__name__ for each in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    """Return the status of HTTP that an exception holds; None where it holds none."""
    if "HttpProcessingError" in _class_names(error.__cause__):
        return None  # aiohttp's own 400 for an answer that is no HTTP
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}  # botocore
    held = [
        *(getattr(error, name, None) for name in ("status", "status_code")),  # aiohttp, azure
        # gcsfs and google.api_core. Not by its name alone: aiohttp has 400 as the code of an answer that was cut off.
        getattr(error, "code", None) if "HttpProcessingError" not in _class_names(error) else None,
        getattr(response, "status_code", None),  # httpx, requests, huggingface_hub
        metadata.get("HTTPStatusCode") if isinstance(metadata, dict) else None,
    ]
    numbers = (int(each) for each in held if isinstance(each, int) or (isinstance(each, str) and each.isdecimal()))
    return next((number for number in numbers if 100 <= number < 600), None)


def _text(message: object) -> str:
    return message.decode("utf-8", "replace") if isinstance(message, bytes) else str(message)
