"""Ways to damage a file, drawn from a seed: what bad disks, broken downloads, other programs and enemies do.

A mutator takes the content of a file and a `random.Random` and returns the damaged content. The same seed gives the
same damage. Those of one kind of file know its structure, because random bits alone rarely get past its first check.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

Mutator = Callable[[bytes, Random], bytes]

NUMBERS: list[Any] = [
    *(0, -1, 1, 2, 3, 7, 255, 256, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**12, 10**400),
    *(0.0, -0.0, 0.5, 1.5, 1e-300, 1e-45, 1e38, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
]
TEXTS = [
    *("", " ", "x", "0", "1", "-1", "null", "true", "nan", "inf", "1e5", "a\nb", "a\0b", "é", "日本語", "\U0001f642"),
    *("\ud800", "[/b]", "[bold]", "${x}", "${oc.env:HOME}", "../x", "/dev/null/x", "~", "a" * 5000, "\u2028", "\ufeff"),
    *(
        "{",
        "}",
        "[",
        "]",
        "'",
        '"',
        "\\",
        "%",
        "!",
        "!!python/object:os.system",
        "&a",
        "*a",
        "|",
        ">",
        ",",
        ":",
        "#",
        "=",
    ),
]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], {"a": 1}, {"": None}, [None] * 3, "1" * 5000]


def value(draw: Random) -> Any:
    """A value that is none of those a file should hold, or an extreme one of them."""
    return draw.choice([draw.choice(NUMBERS), draw.choice(TEXTS), draw.choice(OTHERS)])


def flipped(content: bytes, draw: Random) -> bytes:
    """A few bits."""
    changed = bytearray(content or b"\0")
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flipped_early(content: bytes, draw: Random) -> bytes:
    """A few bits of the header, where the sizes stand."""
    head = flipped(content[:400], draw)
    return head + content[400:]


def truncated(content: bytes, draw: Random) -> bytes:
    """The beginning alone."""
    size = len(content)
    return content[: draw.choice([0, 1, 7, 8, 28, draw.randrange(size + 1), max(0, size - 1)])]


def spliced(content: bytes, draw: Random) -> bytes:
    """Some bytes from elsewhere, put in or written over."""
    start, length = draw.randrange(len(content) + 1), draw.randrange(1, 200)
    other = draw.choice([content[start : start + length], draw.randbytes(length), b"\0" * length, b"\xff" * length])
    at = draw.randrange(len(content) + 1)
    return content[:at] + other + content[at + draw.choice([0, len(other)]) :]


def appended(content: bytes, draw: Random) -> bytes:
    """More than there should be."""
    return content + draw.choice([draw.randbytes(draw.randrange(1, 1000)), content])


def encoded(content: bytes, draw: Random) -> bytes:
    """Another encoding, another line end, a byte order mark, a byte that no text has."""
    text = content.decode("utf-8", "replace")
    return draw.choice(
        [
            b"\xef\xbb\xbf" + content,
            text.encode("utf-16"),
            text.encode("latin-1", "replace") + b"\xe9",
            content.replace(b"\n", b"\r\n"),
            content.replace(b"\n", b"\r"),
            content.replace(b"a", b"\xff", 3),
            content.replace(b"e", b"\0", 2),
        ]
    )


BYTES: list[Mutator] = [flipped, flipped_early, truncated, spliced, appended]


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every place below a document where a value stands: its owner and its key there."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        owner = waiting.pop()
        items = owner.items() if isinstance(owner, dict) else enumerate(owner) if isinstance(owner, list) else ()
        for key, below in items:
            found.append((owner, key))
            waiting.append(below)
    return found


def change_document(document: Any, draw: Random) -> Any:
    """Values of another type or size, swapped ones, lost ones, or new ones in a document of dicts and lists."""
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        found = places(document)
        if not found:
            return value(draw)
        owner, key = draw.choice(found)
        what = draw.random()
        if what < 0.1:
            del owner[key]
        elif what < 0.2:
            other, other_key = draw.choice(found)
            owner[key] = other[other_key] if not isinstance(other[other_key], dict | list) else value(draw)
        elif what < 0.3 and isinstance(owner, dict):
            owner[draw.choice(TEXTS)] = value(draw)
        elif what < 0.4 and isinstance(owner[key], int | float):
            owner[key] = draw.choice([owner[key] + 1, owner[key] - 1, -owner[key], owner[key] * 2, float(owner[key])])
        elif what < 0.5:
            owner[key] = [owner[key]]
        else:
            owner[key] = value(draw)
    return document


def changed_json(content: bytes, draw: Random) -> bytes:
    """A JSON document with other values, or whose nesting, numbers or names no reader likes."""
    document = json.loads(content)
    what = draw.random()
    if what < 0.08:
        depth = draw.choice([50, 500, 100_000])
        nested = draw.choice([("[", "]"), ('{"a":', "}")])
        found = [place for place in places(document) if isinstance(place[0], dict)]
        if found:
            owner, key = draw.choice(found)
            owner[key] = "HERE"
        text = nested[0] * depth + "1" + nested[1] * depth
        return json.dumps(document).replace('"HERE"', text).encode() if found else text.encode()
    if what < 0.12:
        text = json.dumps(document)
        return draw.choice([text + text, text.replace("{", '{"dtype": 1, "dtype": 2, ', 1), f"[{text}]"]).encode()
    return json.dumps(change_document(document, draw)).encode()


def changed_header(content: bytes, draw: Random) -> bytes:
    """A safetensors file whose header says something else: shapes, types, offsets, or what is noted in it as text."""
    size = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    notes = header.get("__metadata__", {})
    if notes and draw.random() < 0.4:
        key = draw.choice(sorted(notes))
        try:
            notes[key] = changed_json(notes[key].encode(), draw).decode()
        except ValueError:
            notes[key] = draw.choice(TEXTS)
        changed = json.dumps(header).encode()
    else:
        changed = changed_json(json.dumps(header).encode(), draw)
    if draw.random() < 0.05:
        return struct.pack("<Q", draw.choice([0, 2**63, len(changed) + 1, 2**40])) + changed + body
    return struct.pack("<Q", len(changed)) + changed + body


def changed_numbers(content: bytes, draw: Random) -> bytes:
    """A few float32 of a file's body that are none, or extreme."""
    changed = bytearray(content)
    start = int.from_bytes(content[:8], "little") % 4 if content[8:9] == b"{" else 0  # safetensors: behind the header
    first = draw.choice([len(content) // 8, len(content) // 2])
    for _ in range(draw.choice([1, 1, 4, 64])):
        at = (draw.randrange(first, max(first + 1, len(content) - 8)) // 4) * 4 + start
        kind = draw.choice([float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-42, 0.0, 1e20])
        changed[at : at + 4] = struct.pack("<f", kind)
    return bytes(changed[: len(content)])


def changed_yaml(content: bytes, draw: Random) -> bytes:
    """A line of a YAML file with another value, twice, or not at all."""
    lines = content.decode().split("\n")
    for _ in range(draw.choice([1, 1, 2])):
        at = draw.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        what = draw.random()
        if what < 0.1:
            lines.insert(at, lines[at])
        elif what < 0.2:
            del lines[at]
        elif colon:
            new = value(draw)
            lines[at] = f"{key}: {new if isinstance(new, str) else json.dumps(new)}"
        if not lines:
            break
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def changed_table(content: bytes, draw: Random) -> bytes:
    """A CSV file with another cell, or half a row."""
    rows = [row.split(",") for row in content.decode().splitlines()]
    for _ in range(draw.choice([1, 1, 3])):
        row = draw.choice(rows)
        what = draw.random()
        if what < 0.2:
            del row[draw.randrange(len(row)) :]
        elif row:
            row[draw.randrange(len(row))] = str(value(draw))
    return "\n".join(",".join(row) for row in rows if row).encode("utf-8", "surrogatepass")


def changed_integers(content: bytes, draw: Random) -> bytes:
    """One of the first 32-bit integers of a file: the sizes of llama2.c's .bin."""
    at = 4 * draw.randrange(7)
    new = draw.choice([0, -1, 1, 2, 3, 5, 2**31 - 1, -(2**31), 2**24, 10**6, 288, 511, 512, 513])
    return content[:at] + struct.pack("<i", new) + content[at + 4 :]


def changed_pickle(content: bytes, draw: Random) -> bytes:
    """A file of torch.save with a value of another type or size, or without a part of its archive."""
    if draw.random() < 0.2:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w") as target:
            lost = draw.choice(source.namelist())
            for name in source.namelist():
                data = source.read(name)
                if name != lost:
                    target.writestr(name, data)
                elif draw.random() < 0.5:
                    target.writestr(name, draw.choice(BYTES)(data, draw))
        return out.getvalue()
    state = torch.load(io.BytesIO(content), weights_only=True)
    found = places(state)
    owner, key = draw.choice(found)
    what = draw.random()
    if what < 0.2:
        del owner[key]
    elif what < 0.6 and isinstance(owner[key], torch.Tensor):
        tensor = owner[key]
        flat = tensor.flatten()
        owner[key] = draw.choice(
            [tensor.double(), flat, flat[: len(flat) // 2], tensor.to(torch.int64), tensor * float("nan"), tensor[None]]
        )
    else:
        owner[key] = value(draw)
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def changed_ids(content: bytes, draw: Random) -> bytes:
    """Token ids beyond every vocabulary, in a file of uint16."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 2, 50])):
        at = 2 * draw.randrange(max(1, len(content) // 2))
        changed[at : at + 2] = struct.pack("<H", draw.choice([511, 512, 513, 65535, 32768]))
    return bytes(changed)


def changed_lines(content: bytes, draw: Random) -> bytes:
    """A text with other lines in it."""
    lines = content.decode("utf-8", "replace").split("\n")
    for _ in range(draw.choice([1, 3])):
        lines.insert(draw.randrange(len(lines) + 1), draw.choice([*TEXTS, "<|endoftext|>", "{}", "[1]", "x" * 100_000]))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutators_for(path: Path) -> list[Mutator]:
    """What can happen to a file of this name; what knows its structure stands twice as often."""
    known: dict[str, list[Mutator]] = {
        ".json": [changed_json, changed_json, changed_json, encoded],
        ".safetensors": [changed_header, changed_header, changed_numbers, changed_numbers],
        ".yaml": [changed_yaml, changed_yaml, changed_yaml, encoded],
        ".csv": [changed_table, changed_table, encoded],
        ".ckpt": [changed_pickle, changed_pickle],
        ".pt": [changed_pickle, changed_pickle],
        ".txt": [changed_lines, changed_lines, encoded],
        ".jsonl": [changed_lines, encoded],
    }
    if path.suffix == ".bin":
        return [
            *BYTES,
            *([changed_ids] * 4 if path.name.startswith("data") else [changed_integers, changed_numbers] * 2),
        ]
    return [*BYTES, *known.get(path.suffix, [])]


def damage(path: Path, draw: Random) -> str:
    """Damage a file; returns what was done."""
    content = path.read_bytes()
    mutator = draw.choice(mutators_for(path))
    try:
        changed = mutator(content, draw)
    except (ValueError, OverflowError, RuntimeError, TypeError):  # a value that its own format cannot hold
        mutator = flipped
        changed = flipped(content, draw)
    path.write_bytes(changed)
    return f"{path.name}: {mutator.__name__}"
