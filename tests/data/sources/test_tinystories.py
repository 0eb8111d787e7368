"""TinyStories: the archive is fetched once, and one that is damaged or hostile leaves nothing behind."""

import errno
import functools
import io
import os
import shutil
import tarfile

import pytest

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.sources import tinystories
from bitnet_lit.data.sources.tinystories import fetch_tinystories, unpack
from bitnet_lit.errors import UserError


def archive_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_a_full_disk_does_not_blame_the_archive(tmp_path, monkeypatch):
    (tmp_path / "a.tar.gz").write_bytes(archive_bytes({"data00.json": b"[]"}))

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"cannot be unpacked \(No space left on device\)"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_a_folder_of_downloads_is_one_calls_at_a_time(server, tmp_path, tokenizer, monkeypatch):
    server.content = archive_bytes({"data00.json": b'[{"story": "x"}]', "._data00.json": b"\0"})
    monkeypatch.setattr(tinystories, "fetch_tinystories", functools.partial(fetch_tinystories, url=server.url))
    options = {"source": "tinystories", "tokenizer": str(tokenizer.path), "num_workers": 1}
    for out, download_dir in (("a", "d"), ("b", "d"), ("c", "c"), ("e", None)):
        place = None if download_dir is None else str(tmp_path / download_dir)
        assert prepare(PrepareConfig(out=str(tmp_path / out), download_dir=place, **options))["stories"] == 1
    assert len(server.ranges) == 3


def test_an_archive_without_text(server, tmp_path):
    server.content = archive_bytes({"readme": b"x"})
    with pytest.raises(UserError, match=r"no \.json files"):
        fetch_tinystories(tmp_path, server.url)


def test_fetch_downloads_once_and_unpacks(server, tmp_path):
    server.content = archive_bytes({"data00.json": b"[]", "data01.json": b"[]"})
    assert [path.name for path in fetch_tinystories(tmp_path, server.url)] == ["data00.json", "data01.json"]
    fetch_tinystories(tmp_path, server.url)
    assert len(server.ranges) == 1


@pytest.mark.parametrize(
    "members",
    [{"ok.json": b"x", "../evil": b"x"}, {"/abs": b"x"}, {"link": None}, {"a/../../evil": b"x"}],
    ids=str,
)
def test_members_that_leave_the_folder_unpack_nothing(tmp_path, members):
    (tmp_path / "a.tar.gz").write_bytes(archive_bytes(members))
    with pytest.raises(UserError, match="not a plain file inside the folder"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"no gzip", lambda b: b[:40] + b"\0" + b[41:]]
)
def test_a_damaged_archive_unpacks_nothing(tmp_path, damage):
    import random

    whole = archive_bytes({"data00.json": random.Random(0).randbytes(100_000)})
    (tmp_path / "a.tar.gz").write_bytes(damage(whole))
    with pytest.raises(UserError, match="damaged"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]
