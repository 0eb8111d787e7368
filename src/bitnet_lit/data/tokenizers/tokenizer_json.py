"""This module reads Hugging Face's tokenizer.json with the `tokenizers` library.

Models of others come with such a file: BitNet b1.58 2B4T, Llama 3, Qwen. It writes the bytes of a token in one of two
ways. *Byte level* is GPT-2's: one printable character stands for each byte. *Metaspace* is SentencePiece's: U+2581
stands for a space, and <0xNN> for a byte of a character that no token covers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bitnet_lit.data.tokenizers.tokenizer import MAX_FILE_BYTES, SPACE, Tokenizer, without_surrogates
from bitnet_lit.errors import UserError, one_line
from bitnet_lit.extras import needs
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.files.foreign_json import parse_json, read_json
from bitnet_lit.files.json_shapes import Either, Integer, ListOf, OrNull, Record, Text
from bitnet_lit.files.regular_file import read_regular

CONFIG_NAME = "tokenizer_config.json"
MAX_IDS = 2**22  # ids may leave numbers out, and tables have a row for each number
_TOKEN = OrNull(Either(Text(), Record({"content": Text()}), called="text, or an object with its content"))
_ID = Integer(-1, 2**31 - 1)
_IDS = OrNull(Either(_ID, ListOf(_ID), called="an id or a list of ids"))
TOKENIZER_CONFIG = Record(optional={"bos_token": _TOKEN, "eos_token": _TOKEN})
MODEL_CONFIG = Record(optional={"bos_token_id": _IDS, "eos_token_id": _IDS})


@cache
def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's alphabet: printable bytes are their own characters, the others those from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class JsonTokenizer(Tokenizer):
    """Encodes and decodes with a tokenizer.json.

    The file does not say which tokens are BOS and EOS: tokenizer_config.json or config.json beside it does.

    Attributes:
        is_byte_level: whether its tokens are written in GPT-2's alphabet.

    Raises:
        UserError: a file is missing, cannot be read, or is not a tokenizer.json, or none names a BOS or EOS token.
    """

    file_names = ("tokenizer.json", CONFIG_NAME)
    path: Path

    def __init__(self, path: Path | str) -> None:
        with needs("tokenizers", f"tokenizer {path}"):
            import tokenizers
        self.path = Path(path)
        remedy = "give another file"
        self._content = read_regular(path, remedy, MAX_FILE_BYTES)
        parsed = parse_json(
            self._content, f"tokenizer {path}: not a tokenizer.json", Record({"model": Record()}), remedy
        )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._content.decode("utf-8-sig"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust library is not an Exception
            line = one_line(error, 100)
            raise UserError(f"tokenizer {path}: not a tokenizer.json ({line}): {remedy}") from None
        # The file may hold the truncation and padding of the batches that its own model was trained on.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.is_byte_level = '"ByteLevel"' in json.dumps(parsed.get("decoder"))
        self.sha256 = hashlib.sha256(self._content).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < self.vocab_size <= MAX_IDS:
            raise UserError(f"tokenizer {path}: ids from 0 to {self.vocab_size - 1}, at most {MAX_IDS} fit: {remedy}")
        beside = self.path.parent
        self._names = _read_beside(beside / CONFIG_NAME, TOKENIZER_CONFIG)
        self._model_config = _read_beside(beside / "config.json", MODEL_CONFIG)
        self._special = {token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}
        bos, eos = self._named("bos"), self._named("eos")
        if bos is None and eos is None:
            raise UserError(
                f"tokenizer {path}: neither tokenizer_config.json nor config.json beside it names a BOS or EOS token: "
                "put them there"
            )
        # A model that knows no BOS (Qwen) begins a text after its end-of-text token.
        self.bos_id = int(bos if bos is not None else eos)  # type: ignore[arg-type]  # one of them is there
        self.eos_id = int(eos if eos is not None else bos)  # type: ignore[arg-type]

    def _named(self, name: str) -> int | None:
        """Return the id of the BOS or EOS token, from the files beside; None where they do not name one."""
        token = self._names.get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        found = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        if found is None:
            found = self._model_config.get(f"{name}_token_id")
            if isinstance(found, list):
                found = found[0] if found else None
        return found if isinstance(found, int) and 0 <= found < self.vocab_size else None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Return the token ids of a text, with what the file's template puts in front unless `bos` is False."""
        try:
            ids: list[int] = self._tokenizer.encode(without_surrogates(text), add_special_tokens=bos).ids
        except Exception as error:  # a character that no token covers, where there is no unknown token
            line = one_line(error, 100)
            raise UserError(f"tokenizer {self.path}: cannot encode a text ({line}): give another one") from None
        return ids or ([self.bos_id] if bos else [])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. Special tokens have none."""
        text: str = self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)
        return text

    def piece_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes that a token adds in the middle of a text; none for a special token."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self._special:
            return b""
        if self.is_byte_level:
            table = _byte_of_character()
            if all(character in table for character in piece):
                return bytes(table[character] for character in piece)
            return str(piece).encode()  # an added token stands for itself
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace(SPACE, " ").encode()

    def copy_to(self, folder: Path) -> None:
        """Write tokenizer.json, as it was when it was opened, and tokenizer_config.json, which names BOS and EOS."""
        with atomic_file(folder / self.file_names[0]) as temporary:
            temporary.write_bytes(self._content)
        named = dict(self._names)
        for name, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            named[name] = self._tokenizer.id_to_token(token)
        with atomic_file(folder / CONFIG_NAME) as temporary:
            temporary.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")


def _read_beside(path: Path, shape: Record) -> dict[str, Any]:
    """Return the content of a settings file beside the tokenizer's; empty where there is none."""
    if not os.path.lexists(path):
        return {}
    content: dict[str, Any] = read_json(path, shape, "mend it, or take it away")
    return content
