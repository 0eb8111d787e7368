"""The download against a server on this machine: interrupted, refused, wrong about sizes."""

import pytest

from bitnet_lit.data.sources import download as download_module
from bitnet_lit.data.sources.download import download
from bitnet_lit.errors import UserError


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
def test_a_length_that_is_not_a_number_is_not_believed(server, tmp_path, length):
    server.content, server.headers = b"12345", {"Content-Length": length, "Connection": "close"}
    download(server.url, tmp_path / "a.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == server.content


def test_a_full_disk_does_not_blame_the_server(server, tmp_path):
    server.content = bytes(1_000_000)
    (tmp_path / "a.tar.gz.part").mkdir()
    with pytest.raises(IsADirectoryError):  # `prepare` makes a line of it that names the folder
        download(server.url, tmp_path / "a.tar.gz")


def test_no_server(tmp_path):
    with pytest.raises(UserError, match="goes on where it stopped"):
        download("http://127.0.0.1:9/a.tar.gz", tmp_path / "a.tar.gz")
