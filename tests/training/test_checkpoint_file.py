"""Checkpoint files: whole or not at all, every flipped bit is noticed, nothing goes through the temporary directory."""

import errno
import os
import random
import tempfile
import zipfile

import pytest
import torch

from bitnet_lit.errors import UserError
from bitnet_lit.training.checkpoint_file import link_checkpoint, read_checkpoint, write_checkpoint


def content(step=3):
    return {
        "state_dict": {"model.weight": torch.arange(600.0).view(20, 30)},
        "optimizer_states": [],
        "lr_schedulers": [],
        "loops": {},
        "callbacks": {},
        "global_step": step,
        "pytorch-lightning_version": "2.5.0",
    }


@pytest.fixture
def path(tmp_path):
    write_checkpoint(content(), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_it_comes_back_and_torch_opens_it_too(path):
    for read in (read_checkpoint(path), torch.load(path, weights_only=True, mmap=True)):
        assert torch.equal(read["state_dict"]["model.weight"], content()["state_dict"]["model.weight"])
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_every_flipped_bit_is_noticed(path):
    raw = path.read_bytes()
    # Every bit of the last line, which says what the others must be, and 300 of the rest.
    places = [*range((len(raw) - 90) * 8, len(raw) * 8), *random.Random(0).sample(range(len(raw) * 8), 300)]
    for place in places:
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="last.ckpt: damaged"):
            read_checkpoint(path)


@pytest.mark.parametrize("length", [0, 1, 100, 2000, -1, -82, -83])
def test_a_part_of_it_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="last.ckpt: damaged"):
        read_checkpoint(path)


def test_a_checkpoint_without_the_last_line_is_checked_record_by_record(tmp_path):
    path = tmp_path / "last.ckpt"  # as versions before the last line wrote it
    torch.save(content(), path)
    assert read_checkpoint(path)["global_step"] == 3
    with zipfile.ZipFile(path) as archive:
        weights = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    raw = bytearray(path.read_bytes())
    raw[weights.header_offset + 200] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="checksum"):
        read_checkpoint(path)


@pytest.mark.parametrize("key", sorted(content()))
def test_one_without_a_key_is_refused(path, key):
    write_checkpoint({name: value for name, value in content().items() if name != key}, path)
    with pytest.raises(UserError, match=f"it has no {key}"):
        read_checkpoint(path)


def test_other_things_than_checkpoints(tmp_path):
    for name, value in {"list": [1], "text": "x", "tensors": torch.zeros(3)}.items():
        torch.save(value, tmp_path / name)
        with pytest.raises(UserError, match="no checkpoint of a run"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path)


def test_a_full_disk_is_its_own_error_and_leaves_the_old_file(path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file, self.room = file, 1000

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    original = type(path).open
    monkeypatch.setattr(type(path), "open", lambda self, mode="r", *rest: Full(original(self, mode, *rest)))
    with pytest.raises(OSError, match="No space left"):  # not torch's RuntimeError about positions in an archive
        write_checkpoint(content(4), path)
    monkeypatch.undo()
    assert read_checkpoint(path)["global_step"] == 3
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_nothing_goes_through_the_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    write_checkpoint(content(), tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_keeps_what_it_names(path, monkeypatch, links):
    best = path.with_name("best.ckpt")
    best.write_bytes(b"older")

    def no_links(*arguments):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))  # exFAT

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    link_checkpoint(path, best)
    assert best.samefile(path) == links
    write_checkpoint(content(4), path)
    assert read_checkpoint(best)["global_step"] == 3 and read_checkpoint(path)["global_step"] == 4
    assert sorted(os.listdir(path.parent)) == ["best.ckpt", "last.ckpt"]
    link_checkpoint(path, best)
    link_checkpoint(path, best)  # the same file already
    assert read_checkpoint(best)["global_step"] == 4
