"""Compressed files and tables hold the stories of the plain ones; what is cut off, damaged or no text is one line."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest

from bitnet_lit.data.sources import open_text, read_text
from bitnet_lit.data.sources.files import file_shards
from bitnet_lit.data.sources.find_text import find_text, kind_of
from bitnet_lit.data.sources.source import Continuation, ReadCounts
from bitnet_lit.data.write_shards import ShardEncoder
from bitnet_lit.errors import UserError
from tests.data.sources.test_files import stories_of

TXT = "one\r\nline<|endoftext|>two é<|endoftext|>\n<|endoftext|>three \N{GRINNING FACE}" * 3
JSONL = "".join(json.dumps({"text": text}) + "\r\n" for text in ("a", "", "b\nc", "d<|endoftext|>e"))
JSON = json.dumps([{"story": "x"}, {"story": "y\r\n"}])
CONTENTS = {"t.txt": TXT, "l.jsonl": JSONL, "j.json": JSON}


def packed(suffix, content):
    if suffix == ".gz":
        return gzip.compress(content)
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_compressed_file_holds_the_same_stories(tmp_path, monkeypatch, name, suffix):
    monkeypatch.setattr(open_text, "_BLOCK", 7)  # characters and line ends lie across blocks
    monkeypatch.setattr(open_text, "_COMPRESSED_BLOCK", 5)
    content = CONTENTS[name].encode()
    (tmp_path / name).write_bytes(content)
    # Two frames, one after the other, as pigz and `cat a.gz b.gz` write them.
    (tmp_path / f"{name}{suffix}").write_bytes(packed(suffix, content[:11]) + packed(suffix, content[11:]))
    counts, plain_counts = ReadCounts(), ReadCounts()
    plain = stories_of(file_shards([tmp_path / name]), plain_counts)
    assert stories_of(file_shards([tmp_path / f"{name}{suffix}"]), counts) == plain and len(plain) > 1
    assert counts == plain_counts


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[: len(content) // 2], "was cut off: it ends inside its compressed data"),
        (lambda content: content[:-3], "was cut off: it ends inside its compressed data"),
        (lambda content: b"plain text " * 9, "file, or a damaged one"),
    ],
)
def test_a_damaged_compressed_file_is_one_line(tmp_path, suffix, change, message):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(change(packed(suffix, " ".join(map(str, range(20_000))).encode())))
    with pytest.raises(UserError, match=message) as error:
        stories_of(file_shards([path]))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_bad_text_in_a_compressed_file_is_named_by_its_byte(tmp_path):
    for content, message in (
        (b"x" * 3_000_000 + b"\xff", "not UTF-8 at byte 3000000"),
        (b"x" * 3_000_000 + b"\xc3", "not UTF-8 at byte 3000000"),
        (b"x" * 2_000_000 + b"\0", "a NUL at byte 2000000"),
        ("x".encode("utf-16"), "UTF-16, not UTF-8"),
    ):
        path = tmp_path / "a.txt.gz"
        path.write_bytes(gzip.compress(content))
        with pytest.raises(UserError, match=message):
            stories_of(file_shards([path]))


def test_kinds_of_files(tmp_path):
    names = ("A.TXT.GZ", "b.jsonl.zst", "c.parquet", "d.arrow", "e.json.gz")
    assert [kind_of(tmp_path / name) for name in names] == [".txt", ".jsonl", ".parquet", ".arrow", ".json"]
    assert [kind_of(tmp_path / name) for name in ("f.parquet.gz", "g.tar.gz", "h.gz")] == [".gz"] * 3
    for name in ("data-00000-of-00001.arrow", "cache-0123abcd.arrow", "dataset_info.json", "state.json", "h.gz"):
        (tmp_path / name).write_text("x")
    found = find_text(str(tmp_path))
    assert [path.name for path in found.files] == ["data-00000-of-00001.arrow"]
    assert "of a folder of datasets: 3 (cache-0123abcd.arrow, dataset_info.json, state.json)" in (
        found.describe_passed_over()
    )


@pytest.fixture
def table(tmp_path):
    """Write a table; return its path."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name, columns, rows_per_group=2):
        made = pyarrow.table(columns)
        if name.endswith(".parquet"):
            parquet.write_table(made, tmp_path / name, row_group_size=rows_per_group)
        else:
            new = pyarrow.ipc.new_stream if "stream" in name else pyarrow.ipc.new_file
            with new(tmp_path / name, made.schema) as writer:
                writer.write_table(made, max_chunksize=rows_per_group)
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_tables(table, name, monkeypatch):
    texts = ["one", "two\r\nlines", None, "three<|endoftext|>four", " five "]
    path = table(name, {"id": list(range(5)), "text": texts, "other": ["x"] * 5})
    expected = ["one", "two\nlines", "three", "four", "five"]
    counts = ReadCounts()
    assert stories_of(file_shards([path]), counts) == expected
    assert (counts.documents, counts.empty, counts.bytes_in) == (5, 1, sum(len(text or "") for text in texts))
    monkeypatch.setattr("bitnet_lit.data.sources.files.SHARD_TEXT_BYTES", 1)
    shards = file_shards([path])
    assert len(shards) == (3 if name == "a.parquet" else 1) and stories_of(shards) == expected  # one a row group
    assert stories_of(file_shards([path], "other")) == ["x"] * 5


def test_what_is_wrong_with_a_table_is_one_line(table, tmp_path):
    path = table("a.parquet", {"id": [1, 2], "title": ["a", "b"], "body": ["c", "d"]})
    for column, message in (
        (None, r"a.parquet: which column has the text\? Give column=<name>: it has id \(int64\), title .string., body"),
        ("texts", r"column=texts: .*a.parquet has no such column: it has id \(int64\)"),
        ("id", r"column=id: holds int64 in .*a.parquet, not text"),
    ):
        with pytest.raises(UserError, match=message) as error:
            file_shards([path], column)
        assert "\n" not in str(error.value)
    assert stories_of(file_shards([path], "body")) == ["c", "d"]
    whole = path.read_bytes()
    for name, content in (("b.parquet", whole[:-20]), ("c.arrow", whole), ("d.parquet", b"x" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: damaged, or no .{name[2:]} file .*: copy or download it again"):
            stories_of(file_shards([tmp_path / name]))


def test_the_key_of_a_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "t", "body": "b"}\n')
    assert stories_of(file_shards([tmp_path / "a.jsonl"], "body")) == ["b"]
    with pytest.raises(UserError, match=r"a.jsonl: line 1 has no text under 'title': .* or give column=<its key>"):
        stories_of(file_shards([tmp_path / "a.jsonl"], "title"))


# White space and SentencePiece's sign for it beside a space: no place to cut at.
BESIDE_A_SPACE = "\u00a0 \u3000 \u2028 \u2581 \u1680 \u0085 \u205f  \n \t "


@pytest.mark.parametrize("word", ["word", "слово", "λόγος", "سلام", "한국어", "かな", "სიტყვა", "漢字", "🙂"])
def test_a_document_that_is_too_long_is_cut_between_words(tmp_path, monkeypatch, word):
    """Its tokens are those of the whole, in several shards of a plain file and in one of a compressed file."""
    number = 500 * 8 // len(f"{word}000 ".encode())
    words = "".join(f"{word}{word} {BESIDE_A_SPACE if n % 9 == 0 else ''}" for n in range(number * 2))
    text = words + "<|endoftext|>next"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    monkeypatch.setattr("bitnet_lit.data.sources.files.SHARD_TEXT_BYTES", 900)
    monkeypatch.setattr(read_text, "_BLOCK", 64)
    monkeypatch.setattr(read_text, "LONGEST_CHARACTERS", 900)
    monkeypatch.setattr(open_text, "_BLOCK", 64)
    for name, is_cut in (("a.txt", True), ("b.txt.gz", False)):
        cut, counts = file_shards([tmp_path / name]), ReadCounts()
        parts = [story for shard in cut for segment in shard.segments for story in segment.stories(counts)]
        assert (len(cut) > 3) == is_cut and sum(isinstance(part, Continuation) for part in parts) >= 3
        assert all(part[0] == " " for part in parts if isinstance(part, Continuation))
        *long, last = parts
        assert "".join(long) == text.partition("<|endoftext|>")[0].strip() and last == "next"
        assert counts.documents == 2


@pytest.mark.parametrize("longest", [3, 20, 60])
def test_documents_do_not_depend_on_the_pieces_that_are_read(tmp_path, monkeypatch, longest):
    """Separators and places to cut lie in two pieces, at the end of one, and beside each other."""
    text = "ab cd<|endoftext|> ef  gh <|endoftext|><|endoftext|>i <|endof jk lm\n no pq" * 3
    path = tmp_path / "a.txt"
    path.write_text(text)
    monkeypatch.setattr(read_text, "LONGEST_CHARACTERS", longest)
    for block in range(1, 40):
        monkeypatch.setattr(open_text, "_BLOCK", block)
        documents = stories_of(file_shards([path]))
        assert documents == [part.strip() for part in text.split("<|endoftext|>") if part.strip()], block


def test_a_text_that_has_no_place_to_be_cut_at_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("слово\n" * 2000)
    monkeypatch.setattr(read_text, "LONGEST_CHARACTERS", 900)
    assert len(stories_of(file_shards([tmp_path / "a.txt"]))) == 1
    monkeypatch.setattr(read_text, "LONGEST_LINE_CHARACTERS", 3000)
    monkeypatch.setattr(open_text, "_BLOCK", 64)
    with pytest.raises(UserError, match=r"a.txt: 3000 characters with neither <\|endoftext\|> nor a space .*: put"):
        stories_of(file_shards([tmp_path / "a.txt"]))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_memory_is_bounded_by_the_size_of_a_shard(tmp_path, monkeypatch, suffix):
    """24 MB without a separator, in parts of 1 MB: the most that is held is a few parts and the reader's blocks."""
    content = b"some words and more of them " * 900_000
    (tmp_path / f"a.txt{suffix}").write_bytes(gzip.compress(content, 1) if suffix else content)
    monkeypatch.setattr("bitnet_lit.data.sources.files.SHARD_TEXT_BYTES", 2**20)
    monkeypatch.setattr(read_text, "LONGEST_CHARACTERS", 2**20)
    shards = file_shards([tmp_path / f"a.txt{suffix}"])
    tracemalloc.start()
    try:
        total = sum(
            len(story) for shard in shards for segment in shard.segments for story in segment.stories(ReadCounts())
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == len(content) - 1 and peak < 12 * 2**20


def test_the_tokens_of_a_part_are_those_behind_the_text_before(tokenizer):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    byte_level = Tokenizer(models.BPE({piece: i for i, piece in enumerate(["a", "b", "Ġ", "Ġa", "Ġb", "ab"])}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()

    class ByteLevel:
        vocab_size, bos_id = 6, 5

        def shard_encoder(self, dtype):
            return lambda text: np.array(byte_level.encode(text).ids, dtype).tobytes()

    for encoder, whole, part in (
        (ShardEncoder(tokenizer), "Once upon a time there was", "Once upon a"),
        (ShardEncoder(ByteLevel()), "ab a b ab", "ab a"),
    ):
        assert encoder(part) + encoder(Continuation(whole[len(part) :])) == encoder(whole)
