"""Hugging Face's tokenizer.json, read with the `tokenizers` library.

Models of others come with it (BitNet b1.58 2B4T, Llama 3, Qwen); ours come with a SentencePiece model. Two spellings
of the bytes behind a token are known: *byte level* (GPT-2's), where each byte is one printable character, and
*metaspace* (SentencePiece's, U+2581 for a space and <0xNN> for a lone byte).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bitnet_lit.atomic import atomic_file
from bitnet_lit.data.tokenizer import SPACE, Tokenizer, without_surrogates
from bitnet_lit.errors import UserError, needs_extra

TOKENIZER_NAMES = ("tokenizer.model", "tokenizer.json")


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class JsonTokenizer(Tokenizer):
    """An opened tokenizer.json; the surface of `Tokenizer`, without its `processor`.

    BOS and EOS come from the files that lie beside it (tokenizer_config.json, config.json).

    Raises:
        UserError: missing, unreadable, no tokenizer.json, or neither BOS nor EOS in it.
    """

    def __init__(self, path: Path | str) -> None:
        with needs_extra("tokenizers", f"tokenizer {path}"):
            import tokenizers
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"tokenizer {path}: cannot be read ({error.strerror}): give an existing one") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
            self.is_byte_level = '"ByteLevel"' in json.dumps(json.loads(content).get("decoder"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust library is no Exception
            line = " ".join(str(error).split())[:100]
            raise UserError(f"tokenizer {path}: not a tokenizer.json ({line}): give another file") from None
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
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
        """The id of the BOS or EOS token, from the files beside."""
        token = _read_json(self.path.parent / "tokenizer_config.json").get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        found = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        if found is None:
            found = _read_json(self.path.parent / "config.json").get(f"{name}_token_id")
            if isinstance(found, list):
                found = found[0] if found else None
        return found if isinstance(found, int) and 0 <= found < self.vocab_size else None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens its template puts in front unless told otherwise."""
        ids: list[int] = self._tokenizer.encode(without_surrogates(text), add_special_tokens=bos).ids
        return ids or ([self.bos_id] if bos else [])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are silent."""
        text: str = self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)
        return text

    def piece_bytes(self, token: int) -> bytes:
        """What a token adds to the middle of a text: UTF-8, a part of it, or nothing for a special token."""
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
        """Put the tokenizer into a folder, with the names of its BOS and EOS tokens beside it."""
        with atomic_file(folder / "tokenizer.json") as temporary:
            shutil.copyfile(self.path, temporary)
        named = _read_json(self.path.parent / "tokenizer_config.json")
        for name, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            named[name] = self._tokenizer.id_to_token(token)
        with atomic_file(folder / "tokenizer_config.json") as temporary:
            temporary.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")

    def stream_decoder(self, prompt_ids: Sequence[int] = ()) -> JsonStreamDecoder:
        """A decoder of the text that goes on from `prompt_ids`."""
        return JsonStreamDecoder(self, prompt_ids)


class JsonStreamDecoder:
    """Text from tokens as they come, never a broken character."""

    def __init__(self, tokenizer: JsonTokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        # Only a text's first piece can lose spaces it starts with: decoding says which.
        self._at_start = not any(tokenizer.piece_bytes(int(token)) for token in prompt_ids)

    def feed(self, token: int) -> str:
        """The text that became final with this token."""
        piece = self._tokenizer.piece_bytes(token)
        if self._at_start and piece:
            self._at_start = False
            if b" " in piece and not self._tokenizer.is_byte_level:
                piece = self._tokenizer.decode([token]).encode()
        return self._characters.decode(piece)

    def flush(self) -> str:
        """What is left of an incomplete character at the end."""
        return self._characters.decode(b"", final=True)


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer's file in a folder, SentencePiece's first; None where there is none."""
    return next((folder / name for name in TOKENIZER_NAMES if (folder / name).is_file()), None)


def open_tokenizer(path: Path | str) -> Tokenizer:
    """A SentencePiece model or a tokenizer.json, by its name.

    Raises:
        UserError: missing, unreadable or neither.
    """
    return JsonTokenizer(path) if Path(path).suffix == ".json" else Tokenizer(path)
