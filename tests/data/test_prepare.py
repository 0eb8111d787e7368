"""Text to shards: llama2.c's bytes, interrupted calls, refusals."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data import prepare as prepare_module
from bitnet_lit.data import write_shards as write_shards_module
from bitnet_lit.data.exclusive_folder import exclusive_folder
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.shards import open_shards
from bitnet_lit.data.sources.demo import demo_stories
from bitnet_lit.data.tokenizers import open_tokenizer
from bitnet_lit.data.tokenizers.train_sentencepiece import train_tokenizer
from bitnet_lit.errors import UserError
from tests.support import TINYSTORIES, names_are_any_bytes, needs_tinystories


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
    assert meta["tokenizer_sha256"] == open_tokenizer(tmp_path / "tokenizer.model").sha256
    assert {name: entry["tokens"] for name, entry in meta["shards"].items()} == {
        path.name: path.stat().st_size // 2 for path in tmp_path.glob("*.bin")
    }
    assert summary["stories"] == 100 and summary["shards"] == 2
    assert summary["text_bytes"] == sum(len(story) for story in demo_stories(100))
    assert summary["bytes_per_token"] == summary["text_bytes"] / summary["tokens"] and summary["megabytes_per_s"] > 0
    tokens = np.fromfile(tmp_path / "data01.bin", dtype=np.uint16)
    assert tokens[0] == meta["bos_id"] and (tokens == meta["bos_id"]).sum() == 98


def test_again_does_nothing_and_says_so_and_a_lost_shard_is_written_again(tmp_path, capsys):
    prepare(demo(tmp_path))
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    [first] = capsys.readouterr().err.splitlines()
    prepare(demo(tmp_path))
    [second] = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{tmp_path}: 2 shards, 100 documents, ") and first.endswith(" MB/s")
    assert second == first[: first.index(" bytes a token, ")] + " bytes a token, complete already"
    assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    (tmp_path / "data00.bin").unlink()
    prepare(demo(tmp_path))
    assert (tmp_path / "data00.bin").read_bytes() == before["data00.bin"][1]
    assert (tmp_path / "data01.bin").stat().st_mtime_ns == before["data01.bin"][0]


def test_another_tokenizer_in_the_same_folder_is_refused(tmp_path):
    prepare(demo(tmp_path))
    with pytest.raises(UserError, match="holds shards of another tokenizer or source"):
        prepare(demo(tmp_path, vocab_size=420))


def text_folder(folder, count=3, stories=20):
    folder.mkdir(parents=True)
    for number in range(count):
        content = [{"story": story} for story in demo_stories(stories, seed=number)]
        (folder / f"data{number:02d}.json").write_text(json.dumps(content))
    return folder


def test_several_sources_are_one_text(tmp_path, tokenizer, capsys):
    first, second = text_folder(tmp_path / "a"), text_folder(tmp_path / "b", count=1)
    (tmp_path / "c.txt").write_text("Lily went home.")
    sources = [str(first), str(second / "*.json"), str(second / "data00.json"), str(tmp_path / "c.txt")]
    options = {"out": str(tmp_path / "out"), "tokenizer": str(tokenizer.path), "num_workers": 1}
    prepared = prepare(PrepareConfig(source=sources, **options))
    assert (prepared["files"], prepared["stories"]) == (5, 3 * 20 + 20 + 1)
    assert f"source=[{','.join(sources)}]: not read: second names of a file: 1 (data00.json)" in capsys.readouterr().err
    again = prepare(PrepareConfig(source=sources, **options))
    assert again["tokens"] == prepared["tokens"] and "complete already" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds shards of another tokenizer or source"):
        prepare(PrepareConfig(source=sources[:2], **options))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["a.txt", "b.txt"], r"^source=\[a.txt,b.txt\]: several sources have no name: give out=<folder>$"),
        (["demo", "a.txt"], r"^source=\[demo,a.txt\]: demo is a built-in source, which is not joined: give it alone$"),
        (["a.txt", "b.txt"], r"^source=b.txt: no such file, folder or glob"),
    ],
)
def test_several_sources_that_do_not_fit(tmp_path, monkeypatch, sources, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Lily went home.")
    with pytest.raises(UserError, match=message):
        prepare(PrepareConfig(source=sources, out=None if "no name" in message else "out"))
    assert os.listdir() == ["a.txt"]


def test_another_source_in_the_same_folder_is_refused(tmp_path, tokenizer):
    first, second, out = text_folder(tmp_path / "a"), text_folder(tmp_path / "b", count=1), tmp_path / "out"
    options = {"out": str(out), "tokenizer": str(tokenizer.path), "num_workers": 1}
    prepare(PrepareConfig(source=str(first), **options))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="holds shards of another tokenizer or source: choose another out="):
        prepare(PrepareConfig(source=str(second), **options))
    (first / "data01.json").unlink()
    with pytest.raises(UserError, match="holds data01.bin, whose text is no longer in the source"):
        prepare(PrepareConfig(source=str(first), **options))
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_text_that_joined_the_source_is_added(tmp_path, tokenizer):
    source, out = text_folder(tmp_path / "a"), tmp_path / "out"
    config = PrepareConfig(source=str(source), out=str(out), tokenizer=str(tokenizer.path), num_workers=1)
    prepare(config)
    before = (out / "data02.bin").stat().st_mtime_ns
    (source / "data03.json").write_text('[{"story": "One more."}]')
    assert prepare(config)["stories"] == 61
    assert len(open_shards(out).paths) == 4 and (out / "data02.bin").stat().st_mtime_ns == before


def test_meta_json_is_not_written_anew_for_each_of_many_shards(tmp_path, tokenizer, monkeypatch):
    """It lists all shards, so writing it after each one costs the square of their number."""
    source, out, written = text_folder(tmp_path / "a", count=30, stories=2), tmp_path / "out", []
    write_meta = prepare_module.write_meta

    def counted(folder, meta):
        written.append((meta["complete"], len(meta["shards"])))
        write_meta(folder, meta)

    monkeypatch.setattr(prepare_module, "write_meta", counted)
    monkeypatch.setattr(prepare_module, "NOTE_SECONDS", 3600)
    prepare(PrepareConfig(source=str(source), out=str(out), tokenizer=str(tokenizer.path), num_workers=1))
    assert written == [(False, 0), (False, 0), (True, 30)]
    assert len(open_shards(out).paths) == 30


def test_somebody_elses_shards_are_left_alone(tmp_path):
    (tmp_path / "data00.bin").write_bytes(b"12")
    with pytest.raises(UserError, match=r"data00.bin lies there without a meta.json"):
        prepare(demo(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["data00.bin"]


@pytest.mark.parametrize("name", ["notes.txt", "mine/data00.bin"])
@pytest.mark.parametrize("source", ["demo", "tinystories", "elsewhere/a.txt"])
def test_shards_are_not_written_among_other_files(tmp_path, monkeypatch, source, name):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "out" / name, tmp_path / "elsewhere" / "a.txt"):
        path.parent.mkdir(parents=True)
        path.write_text("Once upon a time.")
    before = sorted((tmp_path / "out").rglob("*"))
    found = name.partition("/")[0]
    said = f"^out=out: holds {found}, which prepare did not write: .* shards alone, such as out=out/shards$"
    with pytest.raises(UserError, match=said):  # tinystories is not downloaded first
        prepare(PrepareConfig(source=source, out="out", num_stories=50, vocab_size=400, num_workers=1))
    assert sorted((tmp_path / "out").rglob("*")) == before


@pytest.mark.parametrize("is_link", [False, True])
def test_shards_may_lie_beside_their_text(tmp_path, tokenizer, is_link):
    out = tmp_path / "out"
    text_folder(tmp_path / "text" if is_link else out / "text", count=2)
    out.mkdir(exist_ok=True)
    if is_link:
        (out / "text").symlink_to(tmp_path / "text")
    (out / "notes.png").write_bytes(b"x")
    config = PrepareConfig(source=str(out / "text"), out=str(out), tokenizer=str(tokenizer.path), num_workers=1)
    assert prepare(config)["shards"] == 2
    (out / "later.png").write_bytes(b"x")
    assert prepare(config)["shards"] == 2  # the same call again


@pytest.mark.parametrize("content", ["[]", "[1]"])
def test_a_foreign_meta_is_refused(tmp_path, content):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError):
        prepare(demo(tmp_path))


def test_a_shard_without_text_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"a\.txt: no text in it"):
        prepare(PrepareConfig(source=f"{tmp_path}/*.txt", out=str(tmp_path / "out"), tokenizer=str(tokenizer.path)))
    assert not list((tmp_path / "out").glob("*.bin"))


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match=r"cannot be written \(something else .* there\): choose another out="):
        prepare(demo(tmp_path / "out"))


def test_leftovers_of_a_killed_call_are_removed(tmp_path):
    (tmp_path / ".data00.bin.123.tmp").write_bytes(b"half")
    (tmp_path / ".text.123.tmp").mkdir()
    (tmp_path / ".mine.tmp").write_bytes(b"")
    prepare(demo(tmp_path))
    assert [path.name for path in tmp_path.glob(".*")] == [".mine.tmp"]


def test_two_calls_at_once_write_one_after_the_other(tmp_path, capsys):
    with ThreadPoolExecutor() as pool:
        with exclusive_folder(tmp_path):
            calls = [pool.submit(prepare, demo(tmp_path)) for _ in range(2)]
            time.sleep(0.3)
            assert not any(call.done() for call in calls) and not list(tmp_path.iterdir())
        first, second = (call.result(timeout=60) for call in calls)
    assert first["tokens"] == second["tokens"] and 0 in (first["megabytes_per_s"], second["megabytes_per_s"])
    assert "waiting for another process" in capsys.readouterr().err
    assert len(open_shards(tmp_path).paths) == 2


def test_an_empty_folder_is_removed_before_its_lock_is_released(tmp_path, monkeypatch):
    """A call that waits for the lock would otherwise go on in a folder that is removed a moment later."""
    there, close = [], os.close

    def release(descriptor):
        there.append((tmp_path / "out").exists())
        close(descriptor)

    with exclusive_folder(tmp_path / "out"):
        monkeypatch.setattr(os, "close", release)
    assert there == [False]


def test_a_source_that_does_not_exist_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such file, folder or glob"):
        prepare(PrepareConfig(source=str(tmp_path / "none"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_a_killed_call_ends_its_processes_and_goes_on(tmp_path, tokenizer, number):
    source, out = text_folder(tmp_path / "text", count=60, stories=200), tmp_path / "out"
    config = PrepareConfig(source=str(source), out=str(out), tokenizer=str(tokenizer.path), num_workers=2)
    command = [f"{key}={getattr(config, key)}" for key in ("source", "out", "tokenizer", "num_workers")]
    for _ in range(5):  # again where this process was not scheduled in time, and the call finished before the signal
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "bitnet_lit.prepare", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
        while len(list(out.glob("*.bin"))) < 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(number)
        process.communicate(timeout=30)  # its output ends when its workers do
        if len(list(out.glob("*.bin"))) < 60:
            break
    assert len(list(out.glob("*.bin"))) < 60
    prepare(config)
    assert len(open_shards(out).paths) == 60 and not list(out.glob(".*"))
    assert (out / "data07.bin").read_bytes() == llama2c_pretokenize(source / "data07.json", tokenizer.path)


def test_an_interrupted_call_leaves_whole_shards_and_goes_on(tmp_path, monkeypatch):
    write_shard = write_shards_module.write_shard
    calls = []

    def interrupted(plan, *arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(plan.name)
        return write_shard(plan, *arguments)

    monkeypatch.setattr(write_shards_module, "write_shard", interrupted)
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
    monkeypatch.setattr(write_shards_module.ShardEncoder, "many", full)
    with pytest.raises(UserError, match="the disk is full: whole shards are kept"):
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


def test_the_sums_of_what_was_read_and_written_are_printed(tmp_path, tokenizer, capsys):
    source = tmp_path / "text"
    source.mkdir()
    (source / "A.TXT").write_text("one<|endoftext|>two")
    (source / "b.jsonl").write_text('{"text": "three"}\n{"text": " "}\n')
    (source / "[b]c.pdf").write_text("x")
    options = {"source": str(source), "out": str(tmp_path / "out"), "tokenizer": str(tokenizer.path)}
    summary = prepare(PrepareConfig(**options))
    assert (summary["files"], summary["documents"], summary["stories"], summary["empty"]) == (2, 4, 3, 1)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == f"source={source}: not read: not .json, .jsonl, .txt, .parquet, .arrow: 1 ([b]c.pdf)"
    assert second == f"source={source}: read 2 files, 4 documents, 51 bytes; 1 document without text"
    assert third.startswith(f"{tmp_path}/out: 1 shard, 3 documents, ")


def test_files_of_one_name_are_both_encoded(tmp_path, tokenizer):
    for folder in "ab":
        (tmp_path / "text" / folder).mkdir(parents=True)
        (tmp_path / "text" / folder / "data00.json").write_text(json.dumps([{"story": folder}]))
    options = {"source": str(tmp_path / "text"), "out": str(tmp_path / "out"), "tokenizer": str(tokenizer.path)}
    assert prepare(PrepareConfig(**options, num_workers=1))["shards"] == 2
    for number, folder in enumerate("ab"):
        tokens = np.fromfile(tmp_path / "out" / f"data0{number}.bin", np.uint16)
        assert tokens.tolist() == tokenizer.encode(folder)


def test_text_that_changes_while_it_is_encoded_is_no_whole_shard(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text("some text")
    encode = write_shards_module.ShardEncoder.many

    def changing(self, stories):
        (tmp_path / "a.txt").write_text("other")
        return encode(self, stories)

    monkeypatch.setattr(write_shards_module.ShardEncoder, "many", changing)
    options = {"source": str(tmp_path / "a.txt"), "out": str(tmp_path / "out"), "tokenizer": str(tokenizer.path)}
    with pytest.raises(UserError, match="a.txt: it, or a file read with it, changed meanwhile"):
        prepare(PrepareConfig(**options))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["meta.json", "tokenizer.model"]


@names_are_any_bytes
def test_names_of_any_bytes(tmp_path, tokenizer):
    source = os.fsencode(tmp_path) + b"/t\xffxt [b]\n"
    os.mkdir(source)
    with open(source + b"/\xfe.txt", "w") as file:
        file.write("text")
    options = {"source": os.fsdecode(source), "out": str(tmp_path / "out"), "tokenizer": str(tokenizer.path)}
    assert prepare(PrepareConfig(**options)) and prepare(PrepareConfig(**options))["stories"] == 1


def test_a_killed_encoding_process_is_one_line(tmp_path, tokenizer, monkeypatch):
    def broken(*arguments):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(write_shards_module.ProcessPoolExecutor, "submit", broken)
    source = text_folder(tmp_path / "text", stories=2)
    options = {"source": str(source), "out": str(tmp_path / "out"), "tokenizer": str(tokenizer.path)}
    with pytest.raises(UserError, match="num_workers=2: an encoding process was killed, most likely for memory"):
        prepare(PrepareConfig(**options, num_workers=2))


def test_a_signal_does_not_wait_for_the_shards_that_are_written(tmp_path, tokenizer):
    """A shard of unlike words takes many seconds. None is finished, and no temporary file stays."""
    (tmp_path / "text").mkdir()
    letters = np.random.default_rng(0).integers(97, 123, size=2**25, dtype=np.uint8)
    letters[::7] = ord(" ")
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / "text" / name).write_bytes(letters.tobytes())
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bitnet_lit.prepare", "source=text", "out=out", f"tokenizer={tokenizer.path}"]
    process = subprocess.Popen([*command, "num_workers=2"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(out.glob(".data*.tmp")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120)[1] == "error: ended by SIGTERM\n"
    assert process.returncode == 128 + signal.SIGTERM
    assert sorted(path.name for path in out.iterdir()) == ["meta.json", "tokenizer.model"]


def test_a_tokenizer_is_trained_beside_the_thread_that_handles_signals(tmp_path):
    threads = []

    def texts():
        for number in range(300):
            threads.append(threading.current_thread())
            yield f"story {number} of a cat and a dog"

    train_tokenizer(texts(), 290, tmp_path / "tokenizer.model")
    assert len(threads) == 300 and threading.main_thread() not in threads[1:]  # the first text is looked at before


def test_a_large_vocabulary_is_uint32(tmp_path, monkeypatch):
    monkeypatch.setattr("bitnet_lit.data.shards.np.uint16", np.uint32)
    prepare(demo(tmp_path))
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["dtype"] == "uint32"
    tokens = np.fromfile(tmp_path / "data01.bin", dtype=np.uint32)
    assert tokens.max() < 400 and tokens[0] == meta["bos_id"]
