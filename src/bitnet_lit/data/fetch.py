"""One file is fetched from a URL here, through fsspec: it arrives whole and checked, or an error says why not.

fsspec knows many kinds of storage by the start of the URL: https:// (with aiohttp, which Lightning brings), s3:// (the
package s3fs), gs:// (gcsfs), hf:// (huggingface_hub), and more. Credentials come from where each package looks for
them, or from fsspec's own settings (FSSPEC_S3_ANON=true reads a public bucket).

A network fails now and then: a server answers 500, a connection breaks or falls silent, fewer bytes come than were
promised. Then the file is fetched again, after a pause that doubles each time. A file that is not there, or that may
not be read, is not asked for again.
"""

from __future__ import annotations

import errno
import importlib.util
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bitnet_lit.errors import DataError, UserError, one_line
from bitnet_lit.terminal import console

ATTEMPTS = 6  # with the pauses between them: about half a minute, in which a server restarts
FIRST_PAUSE_SECONDS = 1.0  # it doubles with each attempt
SILENCE_SECONDS = 60.0  # after which a connection counts as dead
_RETRIED_STATUS = (408, 425, 429)  # of those below 500, which say that the request is wrong
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}  # errors of this machine's disk
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:://|::)")


class NotThere(DataError):
    """Reports a file that is not behind its URL, or that may not be read."""


class Damaged(Exception):
    """Says what is wrong with a file that came; `fetch` then tries again."""


def is_url(place: str | Path) -> bool:
    """Return whether a folder lies behind a URL: s3://bucket/folder, https://host/folder."""
    return isinstance(place, str) and _URL.match(place) is not None


def joined(url: str, name: str) -> str:
    """Return the URL of a file in the folder `url`. A query, such as a signature, stays at the end."""
    folder, sign, query = url.partition("?")
    return f"{folder.rstrip('/')}/{name}{sign}{query}"


def shown(url: str) -> str:
    """Return a URL for a message, without its query and its user, which may hold a password."""
    folder = url.partition("?")[0]
    user = urlsplit(folder).netloc.rpartition("@")[0]
    return folder.replace(f"{user}@", "", 1) if user else folder


def fetch(url: str, path: Path, check: Callable[[Path], None]) -> None:
    """Write the file behind a URL to `path`, which exists.

    Args:
        check: raises `Damaged` for a file that is not the right one, and `NotThere` where no later one will be.

    Raises:
        NotThere: there is no such file, or it may not be read; one line.
        DataError: the file did not come whole in ATTEMPTS attempts; one line.
        UserError: a package is missing for this kind of URL.
        OSError: the disk does not take it.
    """
    system, remote = _open_file_system(url)
    pause = FIRST_PAUSE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            system.get_file(remote, str(path))
            check(path)
            return
        except NotThere:
            raise
        except Exception as error:  # each kind of storage has exceptions of its own
            if isinstance(error, OSError) and error.errno in _DISK:
                raise
            reason = _reason(error)
            if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError) or _is_refused(error):
                raise NotThere(f"{shown(url)}: {reason}: check the URL, and the rights to read it") from None
            if attempt == ATTEMPTS:
                question = "is the folder being written?" if isinstance(error, Damaged) else "is the server there?"
                remedy = f"{question} Give the same command again later"
                raise DataError(f"{shown(url)}: {reason}, {ATTEMPTS} times in a row: {remedy}") from None
            console(stderr=True).print(
                f"{shown(url)}: {reason}: attempt {attempt + 1} of {ATTEMPTS} in {pause:.1f} s", markup=False
            )
            # Ranks that failed together come back at different times. (Not random.random, whose state is the run's.)
            time.sleep(pause * random.SystemRandom().uniform(0.8, 1.2))
            pause *= 2


def _is_refused(error: Exception) -> bool:
    """Return whether a web server says that the request is wrong, so that asking again is of no use."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED_STATUS


def _reason(error: Exception) -> str:
    """Say in a few words why a file did not come."""
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    if isinstance(status, int):
        return one_line(f"the server answers {status} {message or ''}".strip(), 200)
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, TimeoutError):  # aiohttp's, asyncio's and fsspec's are
        return f"no answer for {SILENCE_SECONDS:g} s"
    return re.sub(r"^\[Errno \d+\] ", "", one_line(error, 200)) or type(error).__name__


def _open_file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path of the file in it.

    Raises:
        UserError: fsspec does not know this kind of URL, or a package is missing.
    """
    import fsspec.core  # not at the top: a process that reads local shards does not need it
    from fsspec.registry import known_implementations

    kind = re.split("://|::", url)[0].lower()
    options: dict[str, Any] = {}
    if kind in ("http", "https"):
        import aiohttp

        # aiohttp's own limit is five minutes for the whole file; and it does not look at the proxy's variables.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    elif kind in known_implementations:
        package = known_implementations[kind]["class"].partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{shown(url)}: needs the package {package}: pip install {package}")
    try:
        system, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(f"{shown(url)}: {one_line(error)}: pip install what it names") from None
    except ValueError as error:
        raise UserError(f"{shown(url)}: {one_line(error)}: give a URL that fsspec reads, or a folder") from None
    return system, str(path)
