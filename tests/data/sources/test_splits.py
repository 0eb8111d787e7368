"""The splits of a data set: validation text becomes the first shard, and test text is not trained on."""

import json
import shlex
from pathlib import Path

import pytest

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.sources.files import files_source, text_source
from bitnet_lit.data.sources.splits import divide, split_names
from bitnet_lit.data.tokenizers import open_tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.inference.evaluation_text import check_files
from tests.data.sources.test_files import stories_of


def write(folder, *names):
    """Write a file of text under each name; its story is its name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("test_sft-00000-of-00001-0123456789abcdef.parquet", "test_sft"),  # with the hash of older repositories
        ("stories-validation-00000-of-00001.arrow", "validation"),  # as the cache of `datasets` has it
        ("Val.jsonl.zst", "Val"),
        ("dev.txt", "dev"),
        ("test-of-patience.txt", ""),
        ("test_results.txt", ""),
        ("data-00000-of-00001.arrow", "data"),
        ("latest.txt", ""),
    ],
)
def test_the_split_of_a_name(tmp_path, name, split):
    assert split_names([tmp_path / name]) == {tmp_path / name: split}


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/a.txt", "test/a.txt"], ["train", "test"]),
        (["en/Train/a.txt", "en/dev/validation.txt", "de/test/a.txt"], ["Train", "validation", ""]),
        (["test/a.txt", "a/b.txt"], ["", ""]),  # who has a folder of this name alone need not mean a split
        (["train/data-00000-of-00001.txt", "test/data-00000-of-00001.txt"], ["train", "test"]),
        (["train/a.txt", "train/test.txt"], ["", "test"]),
        (["train/en/a.txt", "test/en/a.txt", "test/b.txt", "c.txt"], ["train", "test", "test", ""]),
        (["train/en/dev/a.txt", "train/en/test/a.txt", "test/a.txt"], ["dev", "test", "test"]),  # the innermost one
        (["test/train/a.txt", "test/test/b.txt"], ["train", "test"]),  # the source may be called test
        (["test/en/a.txt", "test/de/a.txt"], ["", ""]),
    ],
)
def test_the_split_of_a_folder(names, splits):
    assert list(split_names([Path(name) for name in names]).values()) == splits


@pytest.mark.parametrize(
    ("names", "validation", "left_out"),
    [
        (["train-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"], "v", "t"),
        (["train.jsonl", "test.jsonl"], "t", ""),
        (["train.jsonl", "notes.jsonl", "dev.jsonl"], "d", ""),
        (["train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl"], "t", ""),
        (["train.jsonl", "unsupervised-00000-of-00001.jsonl"], "", ""),
        (["train/a.jsonl", "validation/a.jsonl"], "v", ""),
        (["train/en/a.jsonl", "train/de/a.jsonl", "test/en/a.jsonl", "validation/en/a.jsonl"], "v", "t"),
        (["notes.jsonl", "test.jsonl"], "", ""),  # nothing says that a file is for training: the user chose them
        (["test-00000-of-00001.jsonl"], "", ""),
    ],
)
def test_which_files_are_trained_on(tmp_path, names, validation, left_out):
    paths = [tmp_path / name for name in sorted(names)]
    found = divide(paths)
    one_of = {"v": "validation", "d": "dev", "t": "test"}
    expected = [
        [path for path in paths if first and path.relative_to(tmp_path).as_posix().startswith(one_of[first])]
        for first in (validation, left_out)
    ]
    assert [found.validation, found.left_out] == expected
    assert found.training == [path for path in paths if path not in [*expected[0], *expected[1]]]


@pytest.fixture
def saved(tmp_path):
    """A folder as `DatasetDict.save_to_disk` writes it, with train, validation and test."""
    pa = pytest.importorskip("pyarrow")
    folder = tmp_path / "saved"
    for split in ("train", "validation", "test"):
        (folder / split).mkdir(parents=True)
        table = pa.table({"text": [f"{split} {number}" for number in range(3)]})
        with pa.ipc.new_stream(str(folder / split / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table)
        (folder / split / "state.json").write_text("{}")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    return folder


def test_a_saved_dataset_dict(saved):
    source = files_source([str(saved)])
    first, second = source.shards
    assert stories_of([first]) == ["validation 0", "validation 1", "validation 2"]
    assert stories_of([second]) == ["train 0", "train 1", "train 2"]
    assert source.validation == "validation"
    assert source.passed_over.endswith("split test: 1 (data-00000-of-00001.arrow)")
    assert stories_of(files_source([str(saved / "test")]).shards) == ["test 0", "test 1", "test 2"]


@pytest.mark.parametrize(
    ("names", "splits", "remedy"),
    [
        (["train/a.jsonl", "validation/a.jsonl"], "train, validation", "validation"),
        (["train/en/a.jsonl", "test/en/a.jsonl", "test/de/a.jsonl"], "test, train", "test"),
        (["validation/a.jsonl", "a.jsonl"], None, None),
        (["train.jsonl", "dev.jsonl", "a.jsonl"], "dev, train", "dev.jsonl"),
        (["test.jsonl", "validation.jsonl"], "test, validation", "test.jsonl"),
        (
            [*(f"test-0000{number}-of-00002.jsonl" for number in (0, 1)), "train-00000-of-00001.jsonl"],
            "test, train",
            "test-*",
        ),
        (["train.jsonl", "unsupervised-00000-of-00001.jsonl"], None, None),
        (["a.jsonl", "test.jsonl"], None, None),
    ],
)
def test_text_to_measure_is_of_one_split(tmp_path, monkeypatch, names, splits, remedy):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my set", *names)
    if splits is None:
        assert len(stories_of(text_source("my set", None, "data").shards)) == len(names)
        return
    with pytest.raises(UserError) as error:
        text_source("my set", None, "data")
    said, _, place = str(error.value).partition(": give one of them, such as data=")
    assert said == f"data=my set: holds the splits {splits}"
    (place,) = shlex.split(place)
    assert place == f"my set/{remedy}"
    assert stories_of(text_source(place, None, "data").shards)


def test_evaluate_asks_for_a_split_of_a_saved_dataset_dict(saved):
    said = f"^data={saved}: holds the splits test, train, validation: give one of them, such as data={saved}/test$"
    with pytest.raises(UserError, match=said):
        check_files([str(saved)])
    check_files([str(saved / "train"), str(saved / "test")])  # who types several splits means them
    assert stories_of(text_source(str(saved / "test"), None, "data").shards) == ["test 0", "test 1", "test 2"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_split_without_rows_is_none(tmp_path, capsys, kind):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for split, rows in (("train", 3), ("validation", 0), ("test", 2)):
        table = pa.table({"text": pa.array([f"{split} {number}" for number in range(rows)], pa.string())})
        path = tmp_path / "clone" / f"{split}-00000-of-00001.{kind}"
        path.parent.mkdir(exist_ok=True)
        if kind == "parquet":
            parquet.write_table(table, path)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table)
    source = files_source([str(tmp_path / "clone")])
    assert source.validation == "test" and list(map(stories_of, [[each] for each in source.shards])) == [
        ["test 0", "test 1"],
        ["train 0", "train 1", "train 2"],
    ]
    assert source.passed_over == f"without rows: 1 (validation-00000-of-00001.{kind})"
    for path in (tmp_path / "clone").glob("t*"):
        path.unlink()
    with pytest.raises(UserError, match=r"no .* files in it: without rows: 1 \(validation"):
        files_source([str(tmp_path / "clone")])
    with pytest.raises(UserError, match=rf"validation-00000-of-00001.{kind}: is empty: give a file with text"):
        files_source([str(tmp_path / "clone" / f"validation-00000-of-00001.{kind}")])


def test_prepare_says_what_the_splits_are_for(tmp_path, capsys):
    source, tokenizer = tmp_path / "clone", tmp_path / "tok"
    write(source, "data/train.jsonl", "data/test.jsonl", "data/validation.jsonl")
    prepare(PrepareConfig(source="demo", num_stories=50, vocab_size=400, num_workers=1, out=str(tokenizer)))
    capsys.readouterr()
    out = tmp_path / "out"
    options = {"source": str(source), "out": str(out), "tokenizer": str(tokenizer), "num_workers": 1}
    assert prepare(PrepareConfig(**options))["files"] == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        f"source={source}: not read: split test: 1 (test.jsonl)",
        f"source={source}: split validation is for validation (the first shard), not training",
    ]
    meta = json.loads((out / "meta.json").read_text())
    encode = open_tokenizer(tokenizer).encode
    assert [entry["tokens"] for entry in meta["shards"].values()] == [
        len(encode(f"data/{name}.jsonl")) for name in ("validation", "train")
    ]
