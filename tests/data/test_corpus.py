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
    (tmp_path / "big.txt").write_text("\n<|endoftext|>\n".join(f"doc {n} " + "y" * 90 for n in range(99)))
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


def test_a_kind_of_file_that_is_no_text(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot read '.pdf' files"):
        find_files(str(tmp_path / "a.pdf"))
