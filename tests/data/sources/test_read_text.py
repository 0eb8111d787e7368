"""Stories out of text files: the three formats, what divides documents, and text that is refused."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_lit.data.sources import files, read_text
from bitnet_lit.data.sources.files import file_shards
from bitnet_lit.data.sources.find_text import find_text
from bitnet_lit.data.sources.read_text import FileSegment
from bitnet_lit.data.sources.source import ReadCounts
from bitnet_lit.errors import UserError
from tests.data.sources.test_files import stories_of


def test_the_three_formats(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"story": " one "}, {"story": "two"}]))
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"story": "four"}\n')
    (tmp_path / "c.txt").write_text("five\nlines\n<|endoftext|>\nsix\n<|endoftext|>\n")
    shards = file_shards(find_text(str(tmp_path)).files)
    assert stories_of(shards) == ["one", "two", "three", "four", "five\nlines", "six"]
    assert [shard.name for shard in shards] == ["data00", "data01"]  # .json alone; the others share


def test_half_a_character_pair_becomes_a_replacement(tmp_path):
    (tmp_path / "a.json").write_text('[{"story": "a\\ud83d b"}]')
    assert stories_of(file_shards([tmp_path / "a.json"])) == ["a\N{REPLACEMENT CHARACTER} b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[", "a.json: not JSON"),
        ("a.json", b'{"story": "x"}', "holds a dict, not a list"),
        ("a.json", b'[{"story": "x"}, {"text": "y"}]', "record 1 has no text under 'story'"),
        ("a.jsonl", b'{"text": "x"}\nnope\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2 has no text"),
        ("a.json", b"[" * 100_000, "a.json: not JSON"),
        ("a.txt", b"ok \xff", "not UTF-8 at byte 3: convert it"),
        ("a.txt", "x".encode("utf-16"), r"a.txt: UTF-16, not UTF-8: convert it \(iconv -f utf-16"),
        ("a.json", '[{"story": "x"}]'.encode("utf-16"), "a.json: UTF-16, not UTF-8"),
        ("a.txt", "abc".encode("utf-16-le"), "a.txt: a NUL at byte 1: no text, or UTF-16"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\r{"text": "y"}\rnope', "line 3 is not JSON"),
    ],
)
def test_bad_text_names_file_and_record(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        stories_of(file_shards([tmp_path / name]))
    assert "\n" not in str(error.value)


def test_a_bad_line_of_a_cut_file_has_its_number_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_TEXT_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "' + "x" * 90 + '"}'] * 100 + ["nope"]))
    with pytest.raises(UserError, match=r"a\.jsonl: line 101 is not JSON"):
        stories_of(file_shards([tmp_path / "a.jsonl"]))


def test_empty_stories_of_json_stay_as_in_llama2c(tmp_path):
    (tmp_path / "a.json").write_text('[{"story": "x"}, {"story": " "}, {"story": "y"}]')
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": " "}\n')
    assert stories_of(file_shards(find_text(str(tmp_path)).files)) == ["x", "", "y", "x"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", '[{"story": "x"}]'), ("a.jsonl", '{"text": "x"}'), ("a.txt", "x")]
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert stories_of(file_shards([tmp_path / name])) == ["x"]


def test_a_file_that_went_away(tmp_path):
    for suffix in ("json", "txt"):
        with pytest.raises(UserError, match=rf"gone\.{suffix}: cannot be read \(No such file"):
            stories_of(file_shards([tmp_path / f"gone.{suffix}"]))


def test_the_separator_divides_wherever_it_stands(tmp_path):
    marker = "<|endoftext|>"
    (tmp_path / "a.txt").write_text(f"one{marker}two {marker} three\n{marker}\n\nfour{marker}")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": f"five{marker}six{marker}"}))
    (tmp_path / "c.json").write_text(json.dumps([{"story": f"{marker}seven{marker}"}, {"story": marker}]))
    counts = ReadCounts()
    shards = file_shards(find_text(str(tmp_path)).files)
    assert stories_of(shards, counts) == ["one", "two", "three", "four", "five", "six", "seven", ""]
    assert counts == ReadCounts(bytes_in=sum(path.stat().st_size for path in tmp_path.iterdir()), documents=7, empty=1)


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_line_ends_are_one_character(tmp_path, newline):
    text = f"one{newline}line{newline}"
    (tmp_path / "a.txt").write_bytes(f"{text}<|endoftext|>{newline}two".encode())
    (tmp_path / "b.jsonl").write_bytes(newline.join(json.dumps({"text": text + word}) for word in "xy").encode())
    assert stories_of(file_shards(find_text(str(tmp_path)).files)) == [
        "one\nline",
        "two",
        "one\nline\nx",
        "one\nline\ny",
    ]
    (tmp_path / "c.json").write_text(json.dumps([{"story": text + "x"}]))
    counts = ReadCounts()
    assert stories_of(file_shards([tmp_path / "c.json"]), counts) == [text + "x"]  # llama2.c's bytes
    assert counts.carriage_returns == 1


@given(
    st.lists(
        st.sampled_from(["<|endoftext|>", "<|endof", "text|>", "\n", "\r\n", " ", "word", "é", "\N{GRINNING FACE}"]),
        min_size=1,
    ),
    st.integers(1, 40),
)
def test_a_file_that_is_cut_holds_the_stories_of_the_whole_file(parts, every):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "a.txt"
        path.write_bytes("".join(parts).encode())
        whole = list(FileSegment(path, 0, path.stat().st_size).stories(ReadCounts()))
        patch.setattr(read_text, "_BLOCK", 5)  # the separator lies across blocks
        patch.setattr(files, "SHARD_TEXT_BYTES", every)
        assert stories_of(file_shards([path])) == whole


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    shards = file_shards([tmp_path / "a.txt"])
    (tmp_path / "a.txt").write_text("some")
    with pytest.raises(UserError, match="a.txt: became shorter while it was read"):
        stories_of(shards)
