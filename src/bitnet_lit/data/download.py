"""Getting TinyStories: a resumable download, and an archive that cannot write where it should not.

The archive is llama2.c's `TinyStories_all_data.tar.gz` (Eldan and Li, arXiv 2305.07759): fifty JSON files.
"""

from __future__ import annotations

import http.client
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bitnet_lit.atomic import atomic_folder
from bitnet_lit.errors import UserError

TINYSTORIES_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
CHUNK_BYTES = 1 << 20


def download(url: str, path: Path) -> None:
    """Fetch `url` to `path`; what an interrupted call got lies in `path`.part and is gone on from.

    Raises:
        UserError: no connection, a refusal, or fewer bytes than promised.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    columns = (TextColumn(path.name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    try:
        with (
            urllib.request.urlopen(request, timeout=60) as response,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            if have and response.status != 206:  # a server without ranges sends it all again
                have = 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            task = progress.add_task("download", total=total, completed=have)
            with part.open("ab" if have else "wb") as file:
                while chunk := response.read(CHUNK_BYTES):
                    file.write(chunk)
                    progress.advance(task, len(chunk))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing behind the part's end: it is whole already
            raise UserError(f"{url}: the server answers {error.code} {error.reason}: try again later") from None
        whole = (error.headers.get("Content-Range") or "").rpartition("/")[2]  # bytes */<size>
        total = int(whole) if whole.isdecimal() else have
        if have > total:
            raise UserError(f"{part}: {have} bytes, but the archive has {total}: delete it and try again") from None
    except (OSError, http.client.HTTPException) as error:  # urllib's URLError is an OSError
        raise UserError(f"{url}: {error}: the same command goes on where it stopped") from None
    if total is not None and part.stat().st_size != total:
        raise UserError(f"{url}: got {part.stat().st_size} of {total} bytes: the same command goes on where it stopped")
    part.rename(path)


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
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
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
    found = sorted(text.rglob("*.json"))
    if not found:
        raise UserError(f"{text}: no .json files in it: delete it and run the same command again")
    return found
