"""Which files a source means: nothing is passed over without its name, nothing waits, nothing is read twice."""

import os

import pytest

from bitnet_lit.data.sources.find_text import find_text
from bitnet_lit.errors import UserError


def test_suffixes_in_capitals_are_read(tmp_path):
    for name in ("A.TXT", "b.txt", "c.Json", "d.JSONL"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in find_text(str(tmp_path)).files] == ["A.TXT", "b.txt", "c.Json", "d.JSONL"]
    assert find_text(str(tmp_path / "A.TXT")).files == [tmp_path / "A.TXT"]


def test_what_is_passed_over_is_named_and_counted(tmp_path):
    (tmp_path / "sub.txt").mkdir()
    (tmp_path / "sub.txt" / "c.txt").write_text("c")
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "meta.json", "tokenizer.json", ".b.txt", *(f"{number}.pdf" for number in range(5))):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    found = find_text(str(tmp_path))
    assert found.files == [tmp_path / "a.txt", tmp_path / "sub.txt" / "c.txt"]
    assert found.describe_passed_over() == (
        "hidden: 2 (.b.txt, .git); not .json, .jsonl, .txt, .parquet, .arrow: 5 (0.pdf, 1.pdf, 2.pdf, ...); "
        "no files: 2 (broken.txt, pipe.txt); of a shard folder: 2 (meta.json, tokenizer.json); empty: 1 (empty.txt)"
    )
    globbed = find_text(str(tmp_path / "*.txt"))
    assert globbed.files == [tmp_path / "a.txt"]
    assert globbed.describe_passed_over() == (
        "no files: 2 (broken.txt, pipe.txt); folders: 1 (sub.txt); empty: 1 (empty.txt)"
    )


def test_links_are_followed_and_read_once(tmp_path):
    source, outside = tmp_path / "text", tmp_path / "outside"
    (source / "deep").mkdir(parents=True)
    outside.mkdir()
    (outside / "o.txt").write_text("o")
    (source / "z.txt").write_text("z")
    (source / "deep" / "d.txt").write_text("d")
    (source / "a.txt").symlink_to("z.txt")
    (source / "deep" / "loop").symlink_to(source)
    (source / "again").symlink_to("deep")
    (source / "linked").symlink_to(outside)
    os.link(source / "deep" / "d.txt", source / "e.txt")
    found = find_text(str(source))
    assert found.files == [source / "deep" / "d.txt", source / "linked" / "o.txt", source / "z.txt"]
    assert found.describe_passed_over() == (
        "links to folders read already: 2 (again, loop); second names of a file: 2 (e.txt, a.txt)"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing*", "source=nothing\\*: no such file, folder or glob$"),
        ("a.txt,b", r"source=a.txt,b: no such file, folder or glob; for several give a list: source=\[a.txt,b\]$"),
        ("a.pdf", "a.pdf: cannot read '.pdf' files: give .json, .jsonl, .txt, .parquet, .arrow"),
        ("pipe.txt", r"pipe.txt: cannot be read \(it is a pipe, not a file\)"),
        ("/dev/zero", r"/dev/zero: cannot be read \(it is a device, not a file\)"),
        (
            ".",
            r"no .json, .jsonl, .txt, .parquet, .arrow files in it: hidden: 1 \(.x.txt\); not .json, .*, .arrow: 1",
        ),
        ("", "source is empty"),
        ("empty.txt", "^source=empty.txt: is empty: give a file with text$"),
        ("https://host/a.txt", "source=https://host/a.txt: a URL, and text is read from files: download it first"),
        ("shards", "source=shards: a folder of shards, and no text: train data.dir=shards reads shards"),
        ("a\0b", "no such file"),
        ("x" * 5000, "no such file"),
    ],
)
def test_nothing_to_read_is_one_line(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.txt")
    (tmp_path / "shards").mkdir()
    (tmp_path / "empty.txt").touch()
    for name in ("a.pdf", ".x.txt", "shards/meta.json"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=message) as error:
        find_text(source)
    assert "\n" not in str(error.value)


def test_a_name_like_that_of_a_built_in_source_is_answered_with_it():
    with pytest.raises(UserError, match=r"^source=tinystory: no such .*: did you mean source=tinystories\?$"):
        find_text("tinystory", ["demo", "tinystories"])


def test_a_folder_that_cannot_be_listed_ends_the_call(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "sub").mkdir()
    listdir = os.listdir

    def refuse(path="."):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=r"sub: cannot be read \(Permission denied\): check its permissions"):
        find_text(str(tmp_path))
