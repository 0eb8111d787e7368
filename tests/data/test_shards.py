"""Reading shards: what is in a sequence, whose folders are understood, and what is refused."""

import json
import pickle
import shutil

import numpy as np
import pytest

from bitnet_lit.data import shards as shards_module
from bitnet_lit.data.shards import open_shards
from bitnet_lit.errors import UserError
from tests.support import TINYSTORIES, needs_tinystories


def write(path, tokens, dtype=np.uint16):
    np.asarray(tokens, dtype=dtype).tofile(path)


def test_sequences_are_consecutive_windows_over_all_training_shards(tmp_path):
    write(tmp_path / "data00.bin", np.arange(50))
    write(tmp_path / "data01.bin", np.arange(100, 141))  # 41 tokens: 4 sequences of 10, one target to spare
    write(tmp_path / "data02.bin", np.arange(200, 230))  # 30 tokens: 2 sequences
    split = open_shards(tmp_path).train(10)
    assert split.num_sequences == 6
    gathered = split.gather(np.array([5, 0, 3, 4]))
    assert gathered.dtype == np.int64
    assert gathered[:, 0].tolist() == [210, 100, 130, 200]
    assert (np.diff(gathered, axis=1) == 1).all() and gathered.shape == (4, 11)
    assert open_shards(tmp_path).validation(10).num_sequences == 4


def test_a_single_shard_is_split_inside_itself(tmp_path):
    write(tmp_path / "data00.bin", np.arange(1001))
    shards = open_shards(tmp_path)
    validation, train = shards.validation(10), shards.train(10)
    assert (validation.num_sequences, train.num_sequences) == (10, 90)
    seen = [split.gather(np.arange(split.num_sequences))[:, :-1] for split in (validation, train)]
    assert np.concatenate([part.ravel() for part in seen]).tolist() == list(range(1000))


def test_uint32_shards(tmp_path):
    write(tmp_path / "data00.bin", np.arange(70_000, 70_100), np.uint32)
    (tmp_path / "meta.json").write_text(json.dumps({"dtype": "uint32", "vocab_size": 100_000}))
    assert open_shards(tmp_path).train(8).gather(np.array([0]))[0, 0] > 70_000


def test_a_split_travels_to_a_worker_without_its_data(tmp_path):
    write(tmp_path / "data00.bin", np.arange(60_000))
    split = open_shards(_vocab(tmp_path, 60_000)).train(10)
    split.gather(np.array([0]))
    travelled = pickle.dumps(split)
    assert len(travelled) < 2000
    assert np.array_equal(pickle.loads(travelled).gather(np.array([3])), split.gather(np.array([3])))


def _vocab(folder, size):
    (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": size}))
    return folder


@needs_tinystories
def test_llama2cs_own_folders(tmp_path, tokenizer):
    everything = tmp_path / "TinyStories_all_data"
    everything.mkdir()
    write(everything / "data00.bin", [31999] * 100)
    (everything / "data00.json").write_text("[]")
    assert open_shards(everything).vocab_size == 32000
    with_tokenizer = open_shards(everything, TINYSTORIES / "llama2_tokenizer.model")
    assert with_tokenizer.tokenizer.path == TINYSTORIES / "llama2_tokenizer.model"
    tok = tmp_path / "tok512"
    tok.mkdir()
    write(tok / "data00.bin", [511] * 100)
    assert open_shards(tok).vocab_size == 512
    shutil.copy(tokenizer.path, tmp_path / "tok512.model")
    assert open_shards(tok).tokenizer.path == tmp_path / "tok512.model"


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f.rmdir(), "no such folder.*python -m bitnet_lit.prepare"),
        (lambda f: (f.rmdir(), f.write_bytes(b"")), r"not a folder: if it is text, .* source=/.*data out="),
        (lambda f: None, "no .bin shards.*python -m bitnet_lit.prepare"),
        (lambda f: (f / "data00.bin").write_bytes(b"123"), "3 bytes are not a whole number of uint16"),
        (lambda f: (f / "data00.bin").write_bytes(b""), "0 bytes"),
        (lambda f: (f / "data00.bin").mkdir(), "cannot be read"),
        (lambda f: write(f / "data00.bin", [5, 40_000, 5]), "token id 40000 lies beyond the vocabulary of 32000"),
        (lambda f: (write(f / "d.bin", [1] * 9), (f / "meta.json").write_text("{")), "meta.json: not JSON"),
        (
            lambda f: (write(f / "d.bin", [1] * 9), (f / "meta.json").write_text('{"dtype":"int8"}')),
            "must be uint16 or uint32",
        ),
    ],
)
def test_bad_folders_are_refused_in_one_line(tmp_path, make, message):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=message) as error:
        open_shards(folder)
    assert one_line(error)


def test_a_shard_in_place_of_its_folder_is_answered_with_the_folder(tmp_path):
    write(tmp_path / "data00.bin", [1] * 9)
    with pytest.raises(UserError, match=f"data00.bin: not a folder: give the folder of the shards, {tmp_path}$"):
        open_shards(tmp_path / "data00.bin")


@needs_tinystories
def test_llama2cs_folder_and_another_vocabularys_tokenizer_do_not_fit(tmp_path):
    (tmp_path / "tok512").mkdir()
    write(tmp_path / "tok512" / "data00.bin", [511] * 100)
    shutil.copy(TINYSTORIES / "llama2_tokenizer.model", tmp_path / "tokenizer.model")  # of the folder's neighbours
    with pytest.raises(UserError, match="32000 entries, but its name says that .*tok512 was written with 512"):
        open_shards(tmp_path / "tok512")


def test_a_meta_without_a_hash_and_a_larger_tokenizer_do_not_fit(tmp_path, tokenizer):
    write(tmp_path / "data00.bin", [1] * 100)
    _vocab(tmp_path, 300)
    with pytest.raises(UserError, match="512 entries, but meta.json says that .* was written with 300"):
        open_shards(tmp_path, tokenizer.path)


def test_a_shard_that_changed_size_is_refused(shards, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    content = (folder / "data01.bin").read_bytes()
    (folder / "data01.bin").write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"data01.bin: \d+ tokens, but meta.json says"):
        open_shards(folder)


def test_a_lost_or_a_foreign_shard_is_refused(shards, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    (folder / "data00.bin").rename(folder / "data09.bin")
    with pytest.raises(UserError, match=r"data00.bin is missing: run the same .*prepare again"):
        open_shards(folder)
    shutil.copy(folder / "data09.bin", folder / "data00.bin")
    with pytest.raises(UserError, match=r"meta.json knows no data09.bin"):
        open_shards(folder)


@pytest.mark.parametrize("place", [0, 99_999])
def test_large_shards_are_checked_in_places_their_ends_among_them(tmp_path, monkeypatch, place):
    monkeypatch.setattr(shards_module, "FULL_CHECK_BYTES", 0)
    monkeypatch.setattr(shards_module, "CHECK_BLOCK_TOKENS", 100)
    tokens = np.ones(100_000, dtype=np.uint16)
    write(tmp_path / "data00.bin", tokens)
    assert open_shards(tmp_path).vocab_size == 32000
    tokens[place] = 40_000
    write(tmp_path / "data00.bin", tokens)
    with pytest.raises(UserError, match="token id 40000"):
        open_shards(tmp_path)


def test_a_tokenizer_that_did_not_write_the_shards_is_refused(shards, tmp_path):
    from bitnet_lit.data.sources.demo import demo_stories
    from bitnet_lit.data.tokenizers.train_sentencepiece import train_tokenizer

    train_tokenizer(demo_stories(100, seed=5), 400, tmp_path / "other.model")
    with pytest.raises(UserError, match="not the one that wrote"):
        open_shards(shards, tmp_path / "other.model")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            [10],
            "data00.bin: 10 tokens of text, but a sequence takes 17: prepare more text, or take sequence_length=9 or",
        ),
        ([20], "too short to split"),
        (
            [2, 50],
            "data00.bin: 2 tokens of validation text, .* more validation text, or take sequence_length=1 or less$",
        ),
        ([1, 50], "data00.bin: 1 token of validation text, but a sequence takes 17: prepare more validation text$"),
        ([50, 50, 9], "data02.bin: 9 tokens of training text, .* 17: prepare more training text, or"),
    ],
    ids=str,
)
def test_too_short_for_a_sequence(tmp_path, tokens, message):
    for number, count in enumerate(tokens):
        write(tmp_path / f"data{number:02}.bin", [1] * count)
    opened = open_shards(tmp_path)
    with pytest.raises(UserError, match=message):
        (opened.validation if "validation text" in message else opened.train)(16)
    if "sequence_length=1 or" in message:
        assert opened.validation(1).num_sequences == 1
