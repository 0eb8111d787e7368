"""Sources of text: formats, cutting into shards, bad input."""

import json

import pytest

from bitnet_lit.data import corpus
from bitnet_lit.data.corpus import file_shards, find_files, read_stories
from bitnet_lit.errors import UserError


def stories_of(plans):
    return [story for plan in plans for segment in plan.segments for story in read_stories(segment)]


def test_the_three_formats(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"story": " one "}, {"story": "two"}]))
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"story": "four"}\n')
    (tmp_path / "c.txt").write_text("five\nlines\n<|endoftext|>\nsix\n<|endoftext|>\n")
    plans = file_shards(find_files(str(tmp_path)))
    assert stories_of(plans) == ["one", "two", "three", "four", "five\nlines", "six"]
    assert [plan.name for plan in plans] == ["data00.bin", "data01.bin"]  # .json alone; the others share


def test_llama2cs_names_are_kept(tmp_path):
    for number in (3, 7):
        (tmp_path / f"data{number:02d}.json").write_text('[{"story": "x"}]')
    assert [plan.name for plan in file_shards(find_files(str(tmp_path / "*.json")))] == ["data03.bin", "data07.bin"]


def test_many_small_files_share_a_shard_and_large_ones_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD_TEXT_BYTES", 1000)
    for number in range(50):
        (tmp_path / f"note{number:02d}.txt").write_text(f"note {number} " * 10)
    notes = file_shards(find_files(str(tmp_path)))
    assert 3 <= len(notes) <= 6 and len(stories_of(notes)) == 50
    lines = [json.dumps({"text": f"story {number} " + "x" * 50}) for number in range(200)]
    (tmp_path / "big.jsonl").write_text("\n".join(lines))
    parts = file_shards([tmp_path / "big.jsonl"])
    assert len(parts) > 8
    assert stories_of(parts) == [json.loads(line)["text"] for line in lines]
    for separator in ("\n<|endoftext|>\n", "\r\n<|endoftext|>\r\n"):
        (tmp_path / "big.txt").write_bytes(separator.join(f"doc {n} " + "y" * 90 for n in range(99)).encode())
        parts = file_shards([tmp_path / "big.txt"])
        assert len(parts) > 5 and [story.split()[1] for story in stories_of(parts)] == [str(n) for n in range(99)]


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
        ("a.txt", b"ok \xff", "not UTF-8 at byte 3"),
    ],
)
def test_bad_text_names_file_and_record(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        stories_of(file_shards([tmp_path / name]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"), [("nothing*", "no such file, folder or glob"), (".", "files in this folder")]
)
def test_nothing_there(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        find_files(source)


def test_a_bad_line_of_a_cut_file_has_its_number_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD_TEXT_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "' + "x" * 90 + '"}'] * 100 + ["nope"]))
    with pytest.raises(UserError, match=r"a\.jsonl: line 101 is not JSON"):
        stories_of(file_shards([tmp_path / "a.jsonl"]))


def test_empty_stories_of_json_stay_as_in_llama2c(tmp_path):
    (tmp_path / "a.json").write_text('[{"story": "x"}, {"story": " "}, {"story": "y"}]')
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": " "}\n')
    assert stories_of(file_shards(find_files(str(tmp_path)))) == ["x", "", "y", "x"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", '[{"story": "x"}]'), ("a.jsonl", '{"text": "x"}'), ("a.txt", "x")]
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert stories_of(file_shards([tmp_path / name])) == ["x"]


def test_folders_and_our_own_files_are_passed_over(tmp_path):
    (tmp_path / "sub.txt").mkdir()
    (tmp_path / "meta.json").write_text("{}")
    (tmp_path / "a.txt").write_text("x")
    assert find_files(str(tmp_path)) == find_files(str(tmp_path / "*.txt")) == [tmp_path / "a.txt"]


def test_a_file_that_went_away(tmp_path):
    for suffix in ("json", "txt"):
        with pytest.raises(UserError, match=rf"gone\.{suffix}: cannot be read \(No such file"):
            stories_of(file_shards([tmp_path / f"gone.{suffix}"]))


def test_a_kind_of_file_that_is_no_text(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot read '.pdf' files"):
        find_files(str(tmp_path / "a.pdf"))
