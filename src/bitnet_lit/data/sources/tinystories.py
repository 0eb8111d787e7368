"""TinyStories (Eldan and Li, arXiv 2305.07759) is a source: llama2.c's archive is downloaded and unpacked.

The archive is TinyStories_all_data.tar.gz: 1.5 GB, fifty .json files of about 100,000 stories each.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.exclusive_folder import exclusive_folder
from bitnet_lit.data.shard_folder import check_alone
from bitnet_lit.data.sources.download import CHUNK_BYTES, download
from bitnet_lit.data.sources.files import file_shards
from bitnet_lit.data.sources.source import Source
from bitnet_lit.errors import UserError
from bitnet_lit.files.atomic import atomic_folder

URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"

_TEXT = "TinyStories_all_data"  # llama2.c's name of the folder with the text; the archive's name begins with it


def tinystories_source(config: PrepareConfig) -> Source:
    """Open the text in `download_dir`, or in the folder to write where that is not given; download what is missing."""
    folder = Path(config.download_dir or config.folder)
    # The folder to write is locked already. Calls that write different folders may share the downloads.
    is_out = os.path.realpath(folder) == os.path.realpath(config.folder)
    if is_out:
        check_alone(folder, folder.glob(f"{_TEXT}*"))  # before anything is downloaded
    with contextlib.nullcontext() if is_out else exclusive_folder(folder, "download_dir"):
        files = fetch_tinystories(folder)
        return Source("tinystories", file_shards(files), files)


def fetch_tinystories(folder: Path, url: str = URL) -> list[Path]:
    """Return the .json files of TinyStories below `folder`; download and unpack them if they are not there.

    Raises:
        UserError: the download or the archive fails, or there are no .json files; one line.
    """
    text = folder / _TEXT
    if not text.is_dir():
        archive = folder / f"{_TEXT}.tar.gz"
        if not archive.exists():
            download(url, archive)
        unpack(archive, text)
    found = sorted(path for path in text.rglob("*.json") if not path.name.startswith("."))
    if not found:
        raise UserError(f"{text}: no .json files in it: delete it and run the same command again")
    return found


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .tar.gz into `folder`, all of it or nothing.

    Raises:
        UserError: the archive is damaged, a member would be written outside the folder or is not a plain file, or the
            disk is full.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = tar.getmembers()  # reads the archive to its end, and so checks it
            for member in members:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
                    raise UserError(
                        f"{archive}: member '{member.name}' is not a plain file inside the folder, and nothing was "
                        "unpacked: delete the archive"
                    )
            with atomic_folder(folder) as temporary:
                for member in members:
                    if member.isfile():
                        target = temporary / member.name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        content = tar.extractfile(member)
                        assert content is not None
                        with content, target.open("wb") as file:
                            shutil.copyfileobj(content, file, CHUNK_BYTES)
    except UserError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's words, not gzip's: the archive may be whole
            raise UserError(f"{folder}: cannot be unpacked ({error.strerror}): the same command tries again") from None
        raise UserError(f"{archive}: damaged ({error}): delete it and run the same command again") from None
