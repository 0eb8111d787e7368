"""The download against a server on this machine: interrupted, refused, damaged, hostile."""

import errno
import functools
import http.server
import io
import os
import shutil
import tarfile
import threading

import pytest

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.sources import download as download_module
from bitnet_lit.data.sources import tinystories
from bitnet_lit.data.sources.download import download
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


@pytest.fixture
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content, requested = self.server.content, self.headers.get("Range")
            self.server.ranges.append(requested)
            start = int(requested.split("=")[1].rstrip("-")) if requested else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if requested else 200)
            for name, value in {"Content-Length": str(len(content) - start), **self.server.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            body = content[start:]
            if self.server.break_after is not None:
                body, self.server.break_after = body[: self.server.break_after], None
            self.wfile.write(body)
            self.wfile.flush()
            self.server.stalls.wait(timeout=30)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.content, httpd.ranges, httpd.break_after, httpd.headers = b"", [], None, {}
        httpd.stalls = threading.Event()
        httpd.stalls.set()
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/a.tar.gz"
        yield httpd
        httpd.shutdown()


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    server.content = bytes(range(256)) * 4000
    server.break_after = 300_000
    with pytest.raises(UserError, match="goes on where it stopped"):
        download(server.url, tmp_path / "a.tar.gz")
    assert not (tmp_path / "a.tar.gz").exists()
    download(server.url, tmp_path / "a.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == server.content
    assert server.ranges == [None, "bytes=300000-"]


def test_a_whole_part_is_taken_as_it_is(server, tmp_path):
    server.content = b"12345"
    (tmp_path / "a.tar.gz.part").write_bytes(b"12345")
    download(server.url, tmp_path / "a.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == b"12345"


def test_a_part_that_is_too_long_is_not_taken(server, tmp_path):
    server.content = b"12345"
    (tmp_path / "a.tar.gz.part").write_bytes(b"123456")
    with pytest.raises(UserError, match="6 bytes, but the archive has 5: delete it"):
        download(server.url, tmp_path / "a.tar.gz")
    assert not (tmp_path / "a.tar.gz").exists()


def test_a_full_disk_does_not_blame_the_archive(tmp_path, monkeypatch):
    (tmp_path / "a.tar.gz").write_bytes(archive_bytes({"data00.json": b"[]"}))

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"cannot be unpacked \(No space left on device\)"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_a_server_that_falls_silent_is_left_and_its_bytes_are_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "SILENCE_SECONDS", 0.5)
    server.content, server.break_after = bytes(100_000), 70_000
    server.stalls.clear()
    with pytest.raises(UserError, match="the server said nothing for 0.5 seconds: the same command goes on"):
        download(server.url, tmp_path / "a.tar.gz")
    server.stalls.set()
    assert (tmp_path / "a.tar.gz.part").stat().st_size == 70_000
    download(server.url, tmp_path / "a.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == server.content


def test_another_part_than_was_asked_for_is_not_taken(server, tmp_path):
    server.content, server.headers = b"12345", {"Content-Range": "bytes 1-4/5"}
    (tmp_path / "a.tar.gz.part").write_bytes(b"123")
    with pytest.raises(UserError, match=r"byte 3 was asked for, 1 came: delete .*part and try again"):
        download(server.url, tmp_path / "a.tar.gz")
    assert (tmp_path / "a.tar.gz.part").read_bytes() == b"123"


@pytest.mark.parametrize("length", ["", "-1", "many", "9" * 5000])
def test_a_length_that_is_none(server, tmp_path, length):
    server.content, server.headers = b"12345", {"Content-Length": length, "Connection": "close"}
    try:
        download(server.url, tmp_path / "a.tar.gz")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert (tmp_path / "a.tar.gz").read_bytes() == server.content


def test_a_full_disk_does_not_blame_the_server(server, tmp_path):
    server.content = bytes(1_000_000)
    (tmp_path / "a.tar.gz.part").mkdir()
    with pytest.raises(IsADirectoryError):  # `prepare` makes a line of it that names the folder
        download(server.url, tmp_path / "a.tar.gz")


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


def test_no_server(tmp_path):
    with pytest.raises(UserError, match="goes on where it stopped"):
        download("http://127.0.0.1:9/a.tar.gz", tmp_path / "a.tar.gz")


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
