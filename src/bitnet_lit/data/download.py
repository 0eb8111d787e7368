"""Getting TinyStories: a resumable download, and an archive that cannot write where it should not.

The archive is llama2.c's `TinyStories_all_data.tar.gz` (Eldan and Li, arXiv 2305.07759): fifty JSON files.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bitnet_lit.atomic import atomic_folder
from bitnet_lit.errors import UserError
from bitnet_lit.terminal import console

TINYSTORIES_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
CHUNK_BYTES = 1 << 20
SILENCE_SECONDS = 60  # after which a connection counts as dead


def download(url: str, path: Path) -> None:
    """Fetch `url` to `path`; what an interrupted call got lies in `path`.part and is gone on from.

    Raises:
        UserError: no connection, a refusal, a server that falls silent, or fewer bytes than promised.
        OSError: a disk that does not take it.
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
        if error.code != 416:  # nothing behind the part's end: it is whole already
            raise UserError(f"{url}: the server answers {error.code} {error.reason}: try again later") from None
        whole = (error.headers.get("Content-Range") or "").rpartition("/")[2]  # bytes */<size>
        total = _number(whole)
        if total is not None and have > total:
            raise UserError(f"{part}: {have} bytes, but the archive has {total}: delete it and try again") from None
    if total is not None and part.stat().st_size != total:
        raise UserError(f"{url}: got {part.stat().st_size} of {total} bytes: the same command goes on where it stopped")
    part.rename(path)


def _receive(response: http.client.HTTPResponse, url: str, part: Path, have: int) -> int | None:
    """Write a response's body behind the `have` bytes of `part`; returns the size of the whole, if it is known."""
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
                chunk = response.read1(CHUNK_BYTES)  # what is there: a server that stalls costs nothing
            if not chunk:
                break
            file.write(chunk)
            progress.advance(task, len(chunk))
        file.flush()
        os.fsync(file.fileno())
    return total


def _number(text: str) -> int | None:
    """A size that a server names; None where it is none."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Around what talks to the server, so that its failures are told from the disk's."""
    remedy = "the same command goes on where it stopped"
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except TimeoutError:
        raise UserError(f"{url}: the server said nothing for {SILENCE_SECONDS} seconds: {remedy}") from None
    except (OSError, http.client.HTTPException) as error:  # urllib's URLError is an OSError
        raise UserError(f"{url}: {error}: {remedy}") from None


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .tar.gz into `folder`, all of it or nothing.

    Raises:
        UserError: a damaged archive, a member that is no plain file inside the folder, or a disk that is full.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = tar.getmembers()  # reads the archive to its end, and so checks it
            for member in members:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
                    raise UserError(
                        f"{archive}: member '{member.name}' is no plain file inside the folder: not unpacked"
                    )
            with atomic_folder(folder) as temporary:
                for member in members:
                    if member.isfile():
                        target = temporary / member.name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        source = tar.extractfile(member)
                        assert source is not None
                        with source, target.open("wb") as file:
                            shutil.copyfileobj(source, file, CHUNK_BYTES)
    except UserError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's words, not gzip's: the archive may be whole
            raise UserError(f"{folder}: cannot be unpacked ({error.strerror}): the same command tries again") from None
        raise UserError(f"{archive}: damaged ({error}): delete it and run the same command again") from None


def fetch_tinystories(folder: Path, url: str = TINYSTORIES_URL) -> list[Path]:
    """The JSON files of TinyStories below `folder`; downloads and unpacks what is not there yet."""
    text = folder / "TinyStories_all_data"
    if not text.is_dir():
        archive = folder / "TinyStories_all_data.tar.gz"
        if not archive.exists():
            download(url, archive)
        unpack(archive, text)
    found = sorted(path for path in text.rglob("*.json") if not path.name.startswith("."))
    if not found:
        raise UserError(f"{text}: no .json files in it: delete it and run the same command again")
    return found
