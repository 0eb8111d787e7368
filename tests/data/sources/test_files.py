"""Text files as a source: which files share a shard, where large ones are cut, and what shards are called."""

import json

from bitnet_lit.data.sources import files
from bitnet_lit.data.sources.files import file_shards
from bitnet_lit.data.sources.find_text import find_text
from bitnet_lit.data.sources.source import Continuation, ReadCounts


def stories_of(shards, counts=None):
    """The stories of shards; one that was cut is whole again."""
    counts, found = ReadCounts() if counts is None else counts, []
    for story in (story for shard in shards for segment in shard.segments for story in segment.stories(counts)):
        if isinstance(story, Continuation):
            found[-1] += story
        else:
            found.append(story)
    return found


def test_llama2cs_names_are_kept(tmp_path):
    for number in (3, 7):
        (tmp_path / f"data{number:02d}.json").write_text('[{"story": "x"}]')
    assert [shard.name for shard in file_shards(find_text(str(tmp_path / "*.json")).files)] == [
        "data03",
        "data07",
    ]


def test_many_small_files_share_a_shard_and_large_ones_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_TEXT_BYTES", 1000)
    for number in range(50):
        (tmp_path / f"note{number:02d}.txt").write_text(f"note {number} " * 10)
    notes = file_shards(find_text(str(tmp_path)).files)
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


def test_text_that_ends_with_the_separator_leaves_no_shard_without_text(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_TEXT_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 150 + "\n<|endoftext|>\n\n")
    [shard] = file_shards([tmp_path / "a.txt"])
    assert len(shard.segments) == 1


def test_files_of_one_name_each_have_a_shard(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "data00.json").write_text(json.dumps([{"story": folder}]))
    shards = file_shards(find_text(str(tmp_path)).files)
    assert [shard.name for shard in shards] == ["data00", "data01"] and stories_of(shards) == ["a", "b"]
