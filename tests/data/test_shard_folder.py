"""meta.json of a shard folder: whatever it holds, every reader takes it or refuses it in the same one line."""

import json
import shutil

import numpy as np
import pytest

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.shard_folder import META_NAME, is_complete, read_meta
from bitnet_lit.data.shards import open_shards
from bitnet_lit.errors import UserError

CONFIG = {"source": "demo", "num_stories": 60, "vocab_size": 400, "num_workers": 1}
WRONG = [None, True, -1, 0, 0.5, 1e-300, float("nan"), 10**400, "", "x", "\ud83d", [], {}, [[]], {"a": 1}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("meta")
    prepare(PrepareConfig(out=str(out), **CONFIG))
    return out


def fields(meta):
    """Where every value of a meta.json stands: the keys on the way to it."""
    shard = next(iter(meta["shards"]))
    yield from ([key] for key in meta)
    yield ["shards", shard]
    yield from (["shards", shard, key] for key in meta["shards"][shard])


def test_every_field_of_every_wrong_kind_is_taken_or_refused_in_one_line(folder, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    content = (out / META_NAME).read_text()
    refused = 0
    for keys in fields(json.loads(content)):
        for value in WRONG:
            meta = json.loads(content)
            holder = meta
            for key in keys[:-1]:
                holder = holder[key]
            holder[keys[-1]] = value
            (out / META_NAME).write_text(json.dumps(meta))
            for use in (open_shards, lambda out: prepare(PrepareConfig(out=str(out), **CONFIG))):
                try:
                    use(out)
                except UserError as error:
                    refused += 1
                    assert str(error).isprintable() and len(str(error)) < 1000
    assert refused > 200
    assert is_complete(folder) and not is_complete(tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("dtype", "meta.json: dtype: is missing: choose another out="),
        ("vocab_size", "meta.json: vocab_size: is missing"),
        ("shards", "its meta.json is not one that prepare wrote"),
        ("tokenizer_sha256", "meta.json says tokenizer_sha256=None"),
        ("source", "holds shards of another tokenizer or source"),
        ("bos_id", "meta.json says bos_id=None"),
    ],
)
def test_prepare_refuses_a_field_that_is_missing(folder, tmp_path, key, message):
    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    meta = json.loads((out / META_NAME).read_text())
    del meta[key]
    (out / META_NAME).write_text(json.dumps(meta))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError) as error:
        prepare(PrepareConfig(out=str(out), **CONFIG))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_folder_that_does_not_say_whether_it_is_complete_is_finished(folder, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    meta = json.loads((out / META_NAME).read_text())
    (out / META_NAME).write_text(json.dumps({key: value for key, value in meta.items() if key != "complete"}))
    prepare(PrepareConfig(out=str(out), **CONFIG))
    assert json.loads((out / META_NAME).read_text()) == meta


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested more than 64 deep"),
        (b"\xef\xbb\xbf[1]", "must be an object, not a list of 1"),
        (b'{"dtype": "uint16", "vocab_size": 1' + b"0" * 5000 + b"}", "a number has too many digits"),
        (b'{"dtype": "uint16", "vocab_size": 70000}', "uint16 cannot hold the ids of 70000 tokens"),
        (b'{"dtype": "uint16", "vocab_size": 5, "format_version": 2}', "format_version: must be 1, not 2"),
        (b"\xff\xfe{\0}\0", "UTF-16"),
    ],
)
def test_what_is_no_meta(tmp_path, content, message):
    (tmp_path / META_NAME).write_bytes(content)
    np.ones(100, np.uint16).tofile(tmp_path / "data00.bin")
    for use in (read_meta, open_shards, lambda out: prepare(PrepareConfig(out=str(out), **CONFIG))):
        with pytest.raises(UserError, match=message):
            use(tmp_path)


def test_a_tokenizer_that_was_exchanged_is_not_mixed_in(folder, tmp_path):
    out, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(folder, out)
    prepare(PrepareConfig(out=str(other), **CONFIG | {"vocab_size": 420}))
    shutil.copy(other / "tokenizer.model", out)
    (out / "data01.bin").unlink()
    with pytest.raises(UserError, match=r"meta.json says vocab_size=400, its tokenizer 420: choose another out="):
        prepare(PrepareConfig(out=str(out), **CONFIG))
    (out / META_NAME).unlink()
    (out / "data00.bin").unlink()
    for given in ({}, {"vocab_size": None, "tokenizer": str(folder / "tokenizer.model")}):
        with pytest.raises(UserError, match=r"tokenizer.model (lies )?there"):  # nobody's tokenizer is overwritten
            prepare(PrepareConfig(out=str(out), **CONFIG | given))
    assert (out / "tokenizer.model").read_bytes() == (other / "tokenizer.model").read_bytes()
    shutil.copy(folder / "tokenizer.model", out)  # as a call leaves it that was killed before it wrote meta.json
    prepare(PrepareConfig(out=str(out), **CONFIG))
    assert (out / "data01.bin").read_bytes() == (folder / "data01.bin").read_bytes()
