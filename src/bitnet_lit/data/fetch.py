"""One file is fetched from a URL here, through fsspec: it arrives whole and checked, or an error says why not.

fsspec knows many kinds of storage by the start of the URL: https:// (with aiohttp, which Lightning brings), s3:// (the
package s3fs), gs:// (gcsfs), hf:// (huggingface_hub), and more. Credentials come from where each package looks for
them, or from fsspec's own settings (FSSPEC_S3_ANON=true reads a public bucket).

A network fails now and then: a server answers 500, a connection breaks or falls silent, fewer bytes come than were
promised. Then the file is fetched again, after a pause that doubles each time. fetch_errors.py says when that is of no
use: a file that is not there, or that may not be read, is not asked for again.
"""

from __future__ import annotations

import importlib.util
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bitnet_lit.data.fetch_errors import Damaged, failure, is_of_this_disk
from bitnet_lit.errors import DataError, UserError, is_out_of_memory, one_line
from bitnet_lit.terminal import console

ATTEMPTS = 6  # with the pauses between them: about half a minute, in which a server restarts
FIRST_PAUSE_SECONDS = 1.0  # it doubles with each attempt
SILENCE_SECONDS = 30.0  # after which a connection counts as dead
SILENT_ATTEMPTS = 3  # to a server that says nothing: each has waited so long already, a minute and a half in all
_TRY_AGAIN_THEMSELVES = ("gs", "gcs")  # gcsfs tries six times in half a minute; it cannot be told not to
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:://|::)")


class NotThere(DataError):
    """Reports a file that is not behind its URL, or that may not be read."""


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


def fetch(
    url: str, path: Path, check: Callable[[Path], None], is_first: bool = False, attempts: int | None = None
) -> None:
    """Write the file behind a URL to `path`, which exists.

    Args:
        check: raises `Damaged` for a file that is not the right one, and `NotThere` where no later one will be.
        is_first: whether it is the first file of its server: then an unknown host is a mistake in the URL.
        attempts: how often it is tried; None: ATTEMPTS.

    Raises:
        NotThere: there is no such file, or it may not be read; one line.
        DataError: the file did not come whole in that many attempts, or SILENT_ATTEMPTS had no answer; one line.
        UserError: a package is missing for this kind of URL.
        OSError: the disk does not take it.
    """
    pause, silent_seconds = FIRST_PAUSE_SECONDS, 0.0
    attempts = attempts or (2 if _kind(url) in _TRY_AGAIN_THEMSELVES else ATTEMPTS)
    for attempt in range(1, attempts + 1):
        start = time.monotonic()
        try:
            system, remote = _open_file_system(url)
            path.write_bytes(b"")  # what an earlier attempt left is not of this one
            system.get_file(remote, str(path))
            check(path)
            return
        except (NotThere, UserError):
            raise
        except Exception as error:  # each kind of storage has exceptions of its own
            if is_of_this_disk(error) or is_out_of_memory(error):
                raise
            found, seconds = failure(error, is_first), time.monotonic() - start
            # A server that has sent something is there: only the connection is lost, however long the attempt took.
            is_silent = found.is_silent and not (path.is_file() and path.stat().st_size)
            reason = "the server fell silent" if found.is_silent else found.reason
            if is_silent:
                reason = f"no answer, given up after {seconds:.{0 if seconds >= 10 else 1}f} s"
            if found.is_final:
                raise NotThere(f"{shown(url)}: {reason}: {found.remedy}") from None
            # Not a number of attempts: gcsfs and huggingface_hub try several times themselves, and wait each time.
            silent_seconds += seconds if is_silent else 0.0
            if attempt == attempts or silent_seconds >= SILENT_ATTEMPTS * SILENCE_SECONDS:
                question = "is the folder being written?" if isinstance(error, Damaged) else "is the server there?"
                times = f", {attempt} times in a row" if attempt > 1 else ""
                raise DataError(
                    f"{shown(url)}: {reason}{times}: {question} Give the same command again later"
                ) from None
            console(stderr=True).print(
                f"{shown(url)}: {reason}: attempt {attempt + 1} of {attempts} in {pause:.1f} s", markup=False
            )
            # Ranks that failed together come back at different times. (Not random.random, whose state is the run's.)
            time.sleep(pause * random.SystemRandom().uniform(0.8, 1.2))
            pause *= 2


def _kind(url: str) -> str:
    """Return the kind of storage, such as s3."""
    return re.split("://|::", url)[0].lower()


def _open_file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path of the file in it. fsspec keeps it, with its connections.

    Raises:
        UserError: fsspec does not know this kind of URL, or a package is missing.
    """
    import fsspec.core  # not at the top: a process that reads local shards does not need it
    from fsspec.registry import known_implementations

    kind = _kind(url)
    if kind not in ("http", "https") and kind in known_implementations:
        package = known_implementations[kind]["class"].partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{shown(url)}: needs the package {package}: pip install {package}")
    try:
        system, path = fsspec.core.url_to_fs(url, **_options(kind))
    except ImportError as error:
        raise UserError(f"{shown(url)}: {one_line(error)}: pip install what it names") from None
    except ValueError as error:
        raise UserError(f"{shown(url)}: {one_line(error)}: give a URL that fsspec reads, or a folder") from None
    if hasattr(system, "retries"):
        system.retries = 1  # s3fs would try five times itself, each of them in silence
    return system, str(path)


def _options(kind: str) -> dict[str, Any]:
    """Return options of fsspec's file system. The user's own settings of fsspec are kept and win."""
    from fsspec.config import conf

    if kind in ("http", "https"):
        import aiohttp

        # aiohttp's own limit is five minutes for the whole file; and it does not look at the proxy's variables.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
        key, kinds, ours = "client_kwargs", ("http", "https"), {"timeout": timeout, "trust_env": True}
    elif kind in ("s3", "s3a"):  # botocore would try five times, each time that s3fs does
        key, kinds, ours = "config_kwargs", ("s3", "s3a"), {"retries": {"max_attempts": 0}}
    else:
        return {}
    for each in kinds:
        users = conf.get(each, {}).get(key, {})
        ours |= users if isinstance(users, dict) else {}
    return {key: ours}
