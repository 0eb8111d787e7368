"""JSON of others: what is read, what is refused, and that every refusal is one bounded line."""

import json
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitnet_lit.errors import UserError
from bitnet_lit.files.foreign_json import MAX_DEPTH, parse_json, read_json
from bitnet_lit.files.json_shapes import (
    SHA256,
    Anything,
    Choice,
    Either,
    Flag,
    Integer,
    ListOf,
    MapOf,
    Number,
    OrNull,
    Record,
    Text,
)
from bitnet_lit.files.regular_file import open_regular

SHAPE = Record(
    {"dtype": Choice("uint16", "uint32"), "size": Integer(1, 100)},
    optional={
        "scale": Number(0, exclusive_low=True),
        "ok": Flag(),
        "name": Text(),
        "hash": OrNull(SHA256),
        "ends": Either(Integer(0, 9), ListOf(Integer(0, 9)), called="an id or a list of ids"),
        "pair": ListOf(Number(), length=2),
        "shards": MapOf(Record({"tokens": Integer(0, 2**63 - 1)})),
    },
)
WHOLE = {
    "dtype": "uint16",
    "size": 3,
    "scale": 0.5,
    "ok": True,
    "name": "é\n",
    "hash": None,
    "ends": [1, 2],
    "pair": [1, -2.5],
    "shards": {"a.bin": {"tokens": 2**40, "unknown": {"kept": []}}},
    "unknown": "kept",
}


def refusal(content, shape=SHAPE):
    with pytest.raises(UserError) as error:
        parse_json(content, "m.json", shape, "write it again")
    line = str(error.value)
    assert line.startswith("m.json: ") and line.endswith(": write it again")
    assert line.isprintable() and len(line) < 250
    return line


def test_what_fits_comes_back_as_it_stands(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps(WHOLE), encoding="utf-8-sig")
    assert read_json(tmp_path / "m.json", SHAPE, "") == WHOLE
    assert parse_json('{"dtype": "uint32", "size": 1}', "m", SHAPE, "") == {"dtype": "uint32", "size": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 5}, "dtype: must be uint16 or uint32, not 5"),
        ({"dtype": ["uint16"]}, "dtype: must be uint16 or uint32, not a list of 1"),
        ({"size": True}, "size: must be a whole number, not true"),
        ({"size": 3.0}, "size: must be a whole number, not 3.0"),
        ({"size": 0}, "size: must be from 1 to 100, not 0"),
        ({"size": 10**4000}, "size: must be from 1 to 100, not 1000"),
        ({"scale": 0}, "scale: must be above 0, not 0"),
        ({"scale": float("nan")}, "scale: must be a finite number, not NaN"),
        ({"scale": 10**400}, "scale: must be a finite number, not 1000"),
        ({"ok": 1}, "ok: must be true or false, not 1"),
        ({"name": {"a": 1}}, "name: must be text, not an object of 1 keys"),
        ({"name": "\ud83d"}, "half of a surrogate pair"),
        ({"hash": "xyz"}, 'hash: must be a sha256 in hex, not "xyz"'),
        ({"ends": [1, 10]}, "ends: must be an id or a list of ids, not a list of 2"),
        ({"pair": [1]}, "pair: must be a list of 2, not of 1"),
        ({"pair": [1, "x" * 500]}, 'pair[1]: must be a number, not "xxx'),
        ({"shards": {"a\x1b[31m\n": {"tokens": -1}}}, r"shards.a\u001b[31m\n.tokens: must be from 0"),
        ({"shards": {"a": 1e-300}}, "shards.a: must be an object, not 1e-300"),
        ({"shards": {"a": {}}}, "shards.a.tokens: is missing"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(change, message):
    assert message in refusal(json.dumps(WHOLE | change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"[1", "not JSON"),
        (b'{"size": 1}', "dtype: is missing"),
        (b"[]", "must be an object, not a list of 0"),
        (b"\xff\xfe{\0}\0", "not UTF-8 but UTF-16"),
        (b'{"a": "\xe9"}', "not UTF-8 at byte 7"),
        (b'{"size": 1, "size": 2}', "size: appears twice"),
        (b'{"size": ' + b"1" * 5000 + b"}", "too many digits"),
        (b'{"size": 1e999, "dtype": "uint16"}', "size: must be a whole number, not Infinity"),
    ],
)
def test_what_is_no_such_file(content, message):
    assert message in refusal(content)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'["\\\\",["]",'])
def test_deep_nesting_is_refused_before_it_is_parsed_and_in_time(opening):
    start = time.monotonic()
    assert f"nested more than {MAX_DEPTH} deep" in refusal(opening * 1_000_000, Anything())
    assert time.monotonic() - start < 20  # a hang's limit: it takes about a second


def test_brackets_in_texts_are_no_nesting():
    value = ["[" * 500, '\\"[' * 500, {"[{" * 100: 1}, *[[]] * 500]
    assert parse_json(json.dumps(value), "m", Anything(), "") == value
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deepest, "m", Anything(), "") == json.loads(deepest)


@pytest.mark.parametrize("content", ['"' * 2_000_001, '"' + "\\" * 2_000_000, '"' + '\\"' * 1_000_000 + "[" * 99])
def test_unfinished_texts_are_refused_in_time(content):
    start = time.monotonic()
    refusal("[" * 70 + content, Anything())
    assert time.monotonic() - start < 20


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


# Hypothesis builds its table of Unicode at the first text, which takes seconds.
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from([*WHOLE, "other"]), json_values))
def test_any_json_fits_or_is_refused_in_one_line(changes):
    content = json.dumps(WHOLE | changes)
    try:
        parse_json(content, "m.json", SHAPE, "write it again")
    except UserError:
        refusal(content)


@given(st.binary(max_size=40) | st.text(alphabet='[]{}",:\\u0dDe1-N ', max_size=30).map(str.encode))
def test_any_bytes_are_read_or_refused_in_one_line(content):
    try:
        parse_json(content, "m.json", Anything(), "write it again")
    except UserError:
        refusal(content, Anything())


def test_only_regular_files_of_a_sensible_size_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * 100)
    for path, message in [
        (tmp_path / "pipe", r"it is a pipe, not a file\): write it again"),
        (tmp_path, "it is a directory"),
        ("/dev/zero", "it is a device"),
        (tmp_path / "none", "cannot be read \\(No such file or directory\\): write it again"),
        (tmp_path / "large", "100 bytes, but at most 10 are allowed"),
        ("a\0b", "embedded null byte"),
    ]:
        with pytest.raises(UserError, match=message):
            read_json(path, Anything(), "write it again", max_bytes=10)


def test_a_link_to_a_file_is_that_file(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to("a")
    with open_regular(tmp_path / "link", "") as file:
        assert file.read() == b"x"


def test_a_file_that_may_not_be_read_is_no_file_of_another_kind(tmp_path, monkeypatch):
    """Root reads every file, so the system's refusal is a stand-in."""
    (tmp_path / "a.json").touch()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bitnet_lit.files.regular_file.os.open", refuse)
    with pytest.raises(UserError, match=r"a.json: cannot be read \(Permission denied\): check its permissions$"):
        open_regular(tmp_path / "a.json", "is this a model folder?")
