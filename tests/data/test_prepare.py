"""Text to shards: llama2.c's bytes, interrupted calls, refusals."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data import prepare as prepare_module
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.shards import open_shards
from bitnet_lit.data.tokenizer import Tokenizer
from bitnet_lit.errors import UserError
from tests.support import TINYSTORIES, needs_tinystories


def llama2c_pretokenize(json_path, model_path):
    """tinystories.py, process_shard, in its own few steps."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    tokens = []
    for example in json.loads(json_path.read_text(encoding="utf-8")):
        tokens.extend([processor.bos_id(), *processor.encode(example["story"].strip())])
    return np.array(tokens, dtype=np.uint16).tobytes()


@needs_tinystories
@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_bytes_are_llama2cs(tmp_path, num_workers):
    model = TINYSTORIES / "llama2_tokenizer.model"
    prepare(
        PrepareConfig(
            source=f"{TINYSTORIES}/data0[0-2].json", out=str(tmp_path), tokenizer=str(model), num_workers=num_workers
        )
    )
    for number in range(3):
        expected = llama2c_pretokenize(TINYSTORIES / f"data0{number}.json", model)
        assert (tmp_path / f"data0{number}.bin").read_bytes() == expected
    assert open_shards(tmp_path).vocab_size == 32000
    assert (tmp_path / "tokenizer.model").read_bytes() == model.read_bytes()


def demo(out, **options):
    defaults = {"source": "demo", "num_stories": 100, "vocab_size": 400, "num_workers": 1}
    return PrepareConfig(out=str(out), **{**defaults, **options})


def test_meta_says_what_is_there(tmp_path):
    summary = prepare(demo(tmp_path))
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 400 and meta["complete"]
    assert meta["tokenizer_sha256"] == Tokenizer(tmp_path / "tokenizer.model").sha256
    assert {name: entry["tokens"] for name, entry in meta["shards"].items()} == {
        path.name: path.stat().st_size // 2 for path in tmp_path.glob("*.bin")
    }
    assert summary["stories"] == 100
    tokens = np.fromfile(tmp_path / "data01.bin", dtype=np.uint16)
    assert tokens[0] == meta["bos_id"] and (tokens == meta["bos_id"]).sum() == 98


def test_again_does_nothing_and_a_lost_shard_is_written_again(tmp_path):
    prepare(demo(tmp_path))
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    prepare(demo(tmp_path))
    assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    (tmp_path / "data00.bin").unlink()
    prepare(demo(tmp_path))
    assert (tmp_path / "data00.bin").read_bytes() == before["data00.bin"][1]
    assert (tmp_path / "data01.bin").stat().st_mtime_ns == before["data01.bin"][0]


def test_another_tokenizer_in_the_same_folder_is_refused(tmp_path):
    prepare(demo(tmp_path))
    with pytest.raises(UserError, match="holds shards of another tokenizer or source"):
        prepare(demo(tmp_path, vocab_size=420))


def test_an_interrupted_call_leaves_whole_shards_and_goes_on(tmp_path, monkeypatch):
    write_shard = prepare_module.write_shard
    calls = []

    def interrupted(plan, *arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(plan.name)
        return write_shard(plan, *arguments)

    monkeypatch.setattr(prepare_module, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(demo(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data00.bin", "meta.json", "tokenizer.model"]
    with pytest.raises(UserError, match="not finished"):
        open_shards(tmp_path)
    monkeypatch.undo()
    prepare(demo(tmp_path))
    assert len(open_shards(tmp_path).paths) == 2


def test_no_space_left_is_one_line_and_no_half_file(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    prepare(demo(tmp_path))
    (tmp_path / "data01.bin").unlink()
    monkeypatch.setattr(prepare_module.FastEncoder, "encode", full)
    with pytest.raises(UserError, match="No space left on device: whole shards are kept"):
        prepare(demo(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data00.bin", "meta.json", "tokenizer.model"]


def test_bad_text_in_a_worker_comes_out_as_one_line(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    for number, content in enumerate(['[{"story": "a b c"}]', "[", '[{"story": "a b c"}]']):
        (source / f"data0{number}.json").write_text(content)
    prepare(demo(tmp_path / "tok"))
    with pytest.raises(UserError, match=r"data01.json: not JSON"):
        prepare(
            PrepareConfig(
                source=str(source),
                out=str(tmp_path / "out"),
                tokenizer=str(tmp_path / "tok" / "tokenizer.model"),
                num_workers=2,
            )
        )
    assert not [path for path in Path(tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_large_vocabulary_is_uint32(tmp_path, monkeypatch):
    monkeypatch.setattr("bitnet_lit.data.shards.np.uint16", np.uint32)
    prepare(demo(tmp_path))
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["dtype"] == "uint32"
    tokens = np.fromfile(tmp_path / "data01.bin", dtype=np.uint32)
    assert tokens.max() < 400 and tokens[0] == meta["bos_id"]
