"""A folder behind a URL: what comes is what was prepared, whatever the network does."""

import json
import os
import pickle
import pwd
import shutil
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bitnet_lit import cli
from bitnet_lit.config import DataConfig, EvaluateConfig, PrepareConfig
from bitnet_lit.data import fetch as fetch_module
from bitnet_lit.data import shard_cache
from bitnet_lit.data.batches import TrainBatches
from bitnet_lit.data.corpora import open_corpora
from bitnet_lit.data.fetch import is_url, joined, shown
from bitnet_lit.data.order import SampleOrder
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.shard_cache import RemoteShard, ShardCache
from bitnet_lit.data.shards import open_shards
from bitnet_lit.errors import DataError, UserError
from bitnet_lit.inference.evaluation import evaluate
from bitnet_lit.train import _configure, _place
from bitnet_lit.training.run import train
from tests.data.failing_server import served
from tests.support import TINY_RUN, Killed, kill_at


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Five shards of 60 stories each, so that a run reads several."""
    from bitnet_lit.data.sources.demo import demo_story

    folder = tmp_path_factory.mktemp("texts")
    for number in range(5):
        stories = [{"story": demo_story(number, index)} for index in range(60)]
        (folder / f"data{number:02d}.json").write_text(json.dumps(stories))
    return folder


@pytest.fixture(scope="session")
def folder(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "corpus"
    prepare(PrepareConfig(source=str(texts), out=str(out), vocab_size=400, num_workers=1))
    return out


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Pauses and time limits that suit a server on the loopback."""
    monkeypatch.setattr(fetch_module, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(fetch_module, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(shard_cache, "default_cache_folder", lambda: tmp_path / "cache")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def everything(opened):
    split = opened.train(16)
    return split.gather(np.arange(split.num_sequences))


def test_urls():
    assert is_url("s3://bucket/folder") and is_url("simplecache::s3://b/f") and is_url("https://host/a")
    assert not is_url("data/demo") and not is_url("C:/x") and not is_url("./a://b") and not is_url(Path("a"))
    assert joined("https://host/a/?sig=1&x=2", "meta.json") == "https://host/a/meta.json?sig=1&x=2"
    assert shown("https://me:secret@host/a?sig=1") == "https://host/a" and shown("s3://bucket/a") == "s3://bucket/a"


def test_a_served_folder_is_the_folder(folder, tmp_path):
    local = open_shards(folder)
    with served(folder) as server:
        remote = open_shards(server.url + "/")
        assert remote.tokenizer.sha256 == local.tokenizer.sha256 and remote.vocab_size == local.vocab_size
        assert remote.digests() == local.digests() and list(remote.sizes.values()) == list(local.sizes.values())
        assert server.requests["data01.bin"] == 0  # nothing is fetched before it is read
        assert np.array_equal(everything(remote), everything(local))
        again = pickle.loads(pickle.dumps(remote.train(16)))
        assert np.array_equal(again.gather(np.arange(9)), everything(local)[:9])
        assert server.requests["data01.bin"] == 1 and server.requests["data00.bin"] == 0
    # The server is gone, and the cache is left.
    assert np.array_equal(everything(remote), everything(local))


@pytest.mark.parametrize("failure", ["500", "429", "reset", "stall", "truncate", "end", "change"])
def test_each_failure_is_tried_again(folder, failure, capsys):
    names = ("meta.json", "tokenizer.model", "data02.bin")
    with served(folder) as server:
        failing = [name for name in names if not (failure == "change" and name == "meta.json")]
        server.failures = {name: deque([failure] * 2) for name in failing}
        assert np.array_equal(everything(open_shards(server.url)), everything(open_shards(folder)))
        assert all(server.requests[name] == 3 for name in failing)
    assert "attempt 2 of 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("503", "the server answers 503"),
        ("reset", "reset by peer|disconnected"),
        ("stall", "the server fell silent"),
        ("silence", r"no answer, given up after 0\.\d s"),
        ("end", r"\d+ bytes came of \d+"),
        ("change", "not the one that meta.json describes"),
    ],
)
def test_a_failure_that_lasts_ends_in_one_line(folder, failure, reason, monkeypatch):
    monkeypatch.setattr(fetch_module, "ATTEMPTS", 2)
    monkeypatch.setattr(fetch_module, "SILENCE_SECONDS", 0.3 if failure != "silence" else 0.5)
    with served(folder) as server:
        remote = open_shards(server.url)
        server.always["data03.bin"] = failure
        with pytest.raises(DataError, match=rf"data03.bin: .*({reason}).*2 times in a row: .*later") as error:
            everything(remote)
        assert "\n" not in str(error.value) and error.value.status == 1


def test_a_long_download_that_stalls_is_tried_as_often_as_a_broken_one(folder, monkeypatch):
    """The seconds in which bytes came are no silence."""
    monkeypatch.setattr(fetch_module, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(fetch_module, "SILENT_ATTEMPTS", 1)
    with served(folder) as server:
        remote = open_shards(server.url)
        server.always["data03.bin"] = "stall"
        with pytest.raises(DataError, match=r"fell silent, 6 times in a row"):
            everything(remote)
        assert server.requests["data03.bin"] == fetch_module.ATTEMPTS


def test_a_refused_file_is_not_asked_for_again(folder):
    with served(folder) as server:
        remote = open_shards(server.url)
        server.always["data03.bin"] = "403"
        with pytest.raises(DataError, match=r"data03.bin: the server answers 403.*check the URL, and the rights"):
            everything(remote)
        assert server.requests["data03.bin"] == 1


def changed_meta(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "copy")
    meta = json.loads((copy / "meta.json").read_text())
    change(meta)
    (copy / "meta.json").write_text(json.dumps(meta))
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(complete=False), "not finished: prepare it to its end"),
        (lambda meta: meta.pop("shards"), "its meta.json names no shards"),
        (lambda meta: meta["shards"]["data02.bin"].pop("sha256"), "has no sha256 of data02.bin: run the same"),
        (lambda meta: meta.pop("tokenizer_files"), "no sha256 of the tokenizer's files: run the same"),
        (lambda meta: meta["tokenizer_files"].update({"../x": "0" * 64}), r"names '../x' as a tokenizer's file"),
    ],
)
def test_a_folder_that_says_too_little_is_refused(folder, tmp_path, change, message):
    with served(changed_meta(folder, tmp_path, change)) as server, pytest.raises(UserError, match=message) as error:
        open_shards(server.url)
    assert str(error.value).startswith(f"data.dir={server.url}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["<html>Please log in</html>", '{"format_version": 1e9}'], ids=["page", "form"])
def test_a_page_in_the_place_of_meta_json_is_asked_for_once(folder, tmp_path, content):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "meta.json").write_text(content)
    with served(copy) as server, pytest.raises(UserError, match=r"meta.json.*") as error:
        open_shards(server.url)
    assert server.requests["meta.json"] == 1 and "\n" not in str(error.value)


def test_where_there_is_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with served(tmp_path / "empty") as server, pytest.raises(UserError, match="read by the meta.json that prepare"):
        open_shards(server.url)
    with pytest.raises(UserError, match=r"s3://bucket/x.*: needs the package s3fs: pip install s3fs"):
        open_shards("s3://bucket/x")
    with pytest.raises(UserError, match=r"nonsense://bucket/x"):
        open_shards("nonsense://bucket/x")


def test_prepare_adds_what_an_earlier_version_did_not_note(folder, texts, tmp_path):
    expected = json.loads((folder / "meta.json").read_text())

    def forget(meta):
        del meta["tokenizer_files"]
        for entry in meta["shards"].values():
            del entry["sha256"], entry["digest"]

    copy = changed_meta(folder, tmp_path, forget)
    before = {path: path.stat().st_mtime_ns for path in copy.glob("*.bin")}
    prepare(PrepareConfig(source=str(texts), out=str(copy), vocab_size=400, num_workers=1))
    assert json.loads((copy / "meta.json").read_text()) == expected
    assert {path: path.stat().st_mtime_ns for path in copy.glob("*.bin")} == before


def test_the_cache_stays_below_its_limit_and_keeps_what_was_used_last(folder, tmp_path):
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.bin")}
    limit = sizes["data01.bin"] + sizes["data02.bin"] + sizes["data03.bin"] // 2
    cache = ShardCache(tmp_path / "small", limit)
    entries = json.loads((folder / "meta.json").read_text())["shards"]

    with served(folder) as server:

        def read(number):
            name = f"data{number:02d}.bin"
            descriptor = cache.open(RemoteShard(f"{server.url}/{name}", sizes[name], entries[name]["sha256"]))
            content = os.pread(descriptor, sizes[name], 0)
            os.close(descriptor)
            assert content == (folder / name).read_bytes()
            assert sum(path.stat().st_size for path in cache.folder.glob("*.bin")) <= limit

        for number in (1, 2, 1, 3):
            read(number)
        read(1)  # was used after 2, so it is still there
        assert server.requests == {"data01.bin": 1, "data02.bin": 1, "data03.bin": 1}
        read(2)
        assert server.requests["data02.bin"] == 2


def test_a_shard_is_fetched_once_by_threads_and_trusted_by_no_other_size(folder, tmp_path):
    entry = json.loads((folder / "meta.json").read_text())["shards"]["data01.bin"]
    size = (folder / "data01.bin").stat().st_size
    with served(folder) as server:
        shard = RemoteShard(f"{server.url}/data01.bin", size, entry["sha256"])
        descriptors = []
        threads = [
            threading.Thread(target=lambda: descriptors.append(ShardCache(tmp_path / "c", 10**9).open(shard)))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(descriptors) == 6 and server.requests["data01.bin"] == 1
        for descriptor in descriptors:
            os.close(descriptor)
        os.truncate(tmp_path / "c" / f"{entry['sha256']}.bin", size // 2)
        os.close(ShardCache(tmp_path / "c", 10**9).open(shard))
        assert server.requests["data01.bin"] == 2


def command(*arguments):
    cli.run("train", train, arguments, defaults=_place, configure=_configure)


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]


def evaluated(run):
    figures = evaluate(EvaluateConfig(checkpoint=run, accelerator="cpu"))
    return {name: value for name, value in figures.items() if isinstance(value, float) and "second" not in name}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_training_from_a_failing_server_gives_the_same_weights(folder, tmp_path, monkeypatch, capsys):
    """Through the command, in a run that is killed and resumed, and evaluated where the data still lies there."""
    monkeypatch.chdir(tmp_path)
    command(*TINY_RUN, f"data.dir={folder}", "run_dir=local")
    with served(folder) as server:
        kinds = ["500", "reset", "truncate", "end", "change", "stall"]
        server.failures = {f"data{i:02d}.bin": deque([kinds[i], kinds[(i + 2) % 6]]) for i in range(5)}
        server.failures |= {"meta.json": deque(["500", "end"]), "tokenizer.model": deque(["truncate"])}
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, 6)
            command(*TINY_RUN, f"data.dir={server.url}", "run_dir=remote", f"data.cache_dir={tmp_path / 'own'}")
        command("resume=remote")
        assert same(weights(tmp_path / "remote"), weights(tmp_path / "local"))
        assert evaluated("remote") == evaluated("local")
        assert not (tmp_path / "cache").exists()  # evaluating uses the cache of the run
        with pytest.raises(UserError, match="complete at step 8"):  # the same shards: it is the same run
            command("resume=local", f"data.dir={server.url}")
        assert json.loads(kept_meta(tmp_path / "own").read_text()) == json.loads((folder / "meta.json").read_text())
    # The server is gone. What the cache holds is read if the run was trained on just that.
    assert evaluated("remote") == evaluated("local")
    assert capsys.readouterr().err.count("cannot be reached: the same shards are read from data.cache_dir=") == 1
    monkeypatch.setattr(fetch_module, "ATTEMPTS", 2)
    shutil.copytree("remote", "moved")
    (tmp_path / "moved/checkpoints/last.ckpt").unlink()
    with pytest.raises(DataError, match="2 times in a row: is the server there"):
        evaluated("moved")
    entry = json.loads((folder / "meta.json").read_text())["shards"]["data00.bin"]
    (tmp_path / "own" / f"{entry['sha256']}.bin").unlink()
    with pytest.raises(DataError, match="2 times in a row: is the server there"):
        evaluated("remote")


def kept_meta(cache):
    (path,) = (cache / "folders").iterdir()
    return path


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_text("{"), lambda path: path.write_text("{}")]
)
def test_a_folder_is_read_from_the_cache_alone_if_it_is_known(folder, tmp_path, damage, monkeypatch):
    monkeypatch.setattr(fetch_module, "ATTEMPTS", 1)
    with served(folder) as server:
        opened = open_shards(server.url)
        everything(opened)
    known, other = opened.digests(), {**opened.digests(), "data01.bin": "another"}

    def again(*digests):
        return open_shards(server.url, known=lambda: digests)

    for refused in ((), (other,), (known,)):  # nothing has read the validation shard so far
        with pytest.raises(DataError):
            again(*refused)
    shard = json.loads((folder / "meta.json").read_text())["shards"]["data00.bin"]["sha256"]
    shutil.copy(folder / "data00.bin", tmp_path / "cache" / f"{shard}.bin")
    assert np.array_equal(everything(again(other, known)), everything(opened))
    for refused in ((), (other,)):
        with pytest.raises(DataError):
            again(*refused)
    with pytest.raises(DataError):
        open_shards(server.url)  # training needs the server
    damage(kept_meta(tmp_path / "cache"))
    with pytest.raises(DataError):
        again(known)


def test_the_default_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCache.default().folder == tmp_path / "bitnet_lit" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert ShardCache.default(gib=0.5).folder == Path.home() / ".cache" / "bitnet_lit" / "shards"
    assert ShardCache.default("here", 0.5).folder == Path("here") and ShardCache.default("here", 0.5).limit == 2**29


def test_a_user_without_a_home_folder_reads_shards_of_this_machine(folder, monkeypatch):
    monkeypatch.undo()
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])  # a container that is started with an unknown user
    open_corpora(DataConfig(dir=str(folder)))
    with served(folder) as server, pytest.raises(UserError, match="no home folder to keep remote shards in: give"):
        open_corpora(DataConfig(dir=server.url))


def test_a_cache_that_is_too_small_is_refused_and_shuffling_by_shards_needs_less(folder):
    sizes = sorted((path.stat().st_size for path in folder.glob("*.bin")), reverse=True)
    with served(folder) as server:
        gib = (sum(sizes) - 1) / 2**30
        with pytest.raises(UserError, match=r"data.cache_gib=.*: data.shuffle=global reads all .* GiB of the shards"):
            open_corpora(DataConfig(dir=server.url, cache_gib=gib))
        shards = DataConfig(dir=server.url, cache_gib=sum(sizes[:3]) / 2**30, shuffle="shards", shards_per_block=1)
        split, order = open_corpora(shards).train(16, seed=1)
        gathered = split.gather(order(np.arange(order.num_samples)))
        local, same_order = open_corpora(replace(shards, dir=str(folder))).train(16, seed=1)
        assert np.array_equal(gathered, local.gather(same_order(np.arange(order.num_samples))))
        with pytest.raises(UserError, match=r"two blocks of 1 shards take .* GiB: lower data.shards_per_block"):
            open_corpora(replace(shards, cache_gib=(sum(sizes[:3]) - 1) / 2**30))


def test_what_is_expected_is_fetched_ahead(folder, tmp_path):
    with served(folder) as server:
        split = open_shards(server.url).train(16)
        TrainBatches(split, SampleOrder(split.num_sequences, 1), 4)[0]
        deadline = time.monotonic() + 20
        while len(list((tmp_path / "cache").glob("*.bin"))) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert np.array_equal(split.gather(np.arange(9)), open_shards(folder).train(16).gather(np.arange(9)))
