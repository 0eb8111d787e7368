"""`download` fetches a file; a call that was interrupted is continued by the next one."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bitnet_lit.errors import UserError
from bitnet_lit.terminal import console

CHUNK_BYTES = 1 << 20
SILENCE_SECONDS = 60  # after which a connection counts as dead


def download(url: str, path: Path) -> None:
    """Fetch `url` to `path`. An interrupted call leaves what it got in `path`.part, and the next one continues there.

    Raises:
        UserError: there is no connection, the server refuses or falls silent, or it sends fewer bytes than it promised.
        OSError: the disk does not take it.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with _network_errors(url):
            response = urllib.request.urlopen(request, timeout=SILENCE_SECONDS)
        with response:
            total = _receive(response, url, part, have)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: there is nothing behind the end of the part, so it is whole already
            raise UserError(f"{url}: the server answers {error.code} {error.reason}: try again later") from None
        whole = (error.headers.get("Content-Range") or "").rpartition("/")[2]  # bytes */<size>
        total = _number(whole)
        if total is not None and have > total:
            raise UserError(f"{part}: {have} bytes, but the archive has {total}: delete it and try again") from None
    if total is not None and part.stat().st_size != total:
        raise UserError(f"{url}: got {part.stat().st_size} of {total} bytes: the same command goes on where it stopped")
    part.rename(path)


def _receive(response: http.client.HTTPResponse, url: str, part: Path, have: int) -> int | None:
    """Append the body of a response to `part`, which holds `have` bytes; return the size of the whole, if known."""
    if have and response.status != 206:  # a server without ranges sends it all again
        have = 0
    start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    if response.status == 206 and start not in ("", str(have)):
        raise UserError(f"{url}: byte {have} was asked for, {start} came: delete {part} and try again")
    length = _number(response.headers.get("Content-Length") or "")
    total = None if length is None else have + length
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
    )
    with bar as progress, part.open("ab" if have else "wb") as file:
        task = progress.add_task(part.stem, total=total, completed=have)
        while True:
            with _network_errors(url):
                chunk = response.read1(CHUNK_BYTES)  # returns what is there: nothing is lost when a server stalls
            if not chunk:
                break
            file.write(chunk)
            progress.advance(task, len(chunk))
        file.flush()
        os.fsync(file.fileno())
    return total


def _number(text: str) -> int | None:
    """Return a size that a server sent; None where it is not a number."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Turn errors of the connection into one line; errors of the disk are raised outside of this block."""
    remedy = "the same command goes on where it stopped"
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except TimeoutError:
        raise UserError(f"{url}: the server said nothing for {SILENCE_SECONDS} seconds: {remedy}") from None
    except (OSError, http.client.HTTPException) as error:  # urllib's URLError is an OSError
        raise UserError(f"{url}: {error}: {remedy}") from None
