"""`transformers` encodes text as SentencePiece does only from a tokenizer.json, which is written here.

From a bare tokenizer.model `AutoTokenizer` guesses: for the model type bitnet it puts neither BOS nor a space in front
of a text, and every id behind that is another one. A tokenizer.json says each step of the encoding:

    normalizer      spaces at the ends are removed and runs of spaces become one, where SentencePiece does that; a
                    space is put in front, and every space is written as U+2581
    model           BPE: the two neighbours that merge first are those whose joined piece has the best score
    post_processor  BOS in front
    decoder         the way back: spaces, bytes to characters, without the space in front

The ids are SentencePiece's but for two cases. The texts of control tokens are these tokens ("</s>" is EOS), as
everywhere in `transformers`. And where two overlapping pairs merge to the same piece ("aaa" from "aa" + "a"),
SentencePiece takes the left one, and the order of the merges decides here.
"""

from __future__ import annotations

import json
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from bitnet_lit.data.tokenizers.tokenizer import SPACE, Piece, PieceKind, SentencePieceVocabulary
from bitnet_lit.data.tokenizers.tokenizer_json import JsonTokenizer

_USER_DEFINED = 4  # ModelProto.SentencePiece.Type in sentencepiece_model.proto


def transformers_files(processor: SentencePieceProcessor, vocabulary: SentencePieceVocabulary) -> dict[str, str]:
    """Return the files that `transformers.AutoTokenizer` needs: their names and contents.

    There are none for a SentencePiece model that is not a plain BPE: one with another algorithm, a normalization of
    characters, or pieces that the user defined.
    """
    spec = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    spec.ParseFromString(processor.serialized_model_proto())
    if (
        not vocabulary.is_bpe
        or spec.normalizer_spec.precompiled_charsmap
        or spec.trainer_spec.treat_whitespace_as_suffix
        or any(piece.type == _USER_DEFINED for piece in spec.pieces)
    ):
        return {}
    pieces = vocabulary.pieces
    tokens = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": vocabulary.unk_id}
    names = {name: pieces[token].text for name, token in tokens.items() if token >= 0}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(token, piece.text)
            for token, piece in enumerate(pieces)
            if piece.kind in (PieceKind.CONTROL, PieceKind.UNKNOWN)
        ],
        "normalizer": _normalizer(spec.normalizer_spec.remove_extra_whitespaces, vocabulary.adds_space_prefix),
        "pre_tokenizer": None,
        "post_processor": _bos_in_front(names["bos"], tokens["bos"]),
        "decoder": _decoder(vocabulary.adds_space_prefix),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names.get("unk"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind is PieceKind.BYTE for piece in pieces),
            "ignore_merges": False,
            "vocab": {piece.text: token for token, piece in enumerate(pieces)},
            "merges": merges(pieces),
        },
    }
    config = {f"{name}_token": text for name, text in names.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    contents = json.dumps(described, ensure_ascii=False), json.dumps(settings, ensure_ascii=False, indent=2)
    return {name: f"{content}\n" for name, content in zip(JsonTokenizer.file_names, contents, strict=True)}


def merges(pieces: list[Piece]) -> list[list[str]]:
    """Return the pairs of pieces that BPE joins, the best score of the joined piece first."""
    texts = {piece.text for piece in pieces if piece.kind is PieceKind.NORMAL}
    found = [
        (-piece.score, at, piece.text)
        for piece in pieces
        if piece.kind is PieceKind.NORMAL
        for at in range(1, len(piece.text))
        if piece.text[:at] in texts and piece.text[at:] in texts
    ]
    return [[text[:at], text[at:]] for _, at, text in sorted(found)]


def _added_token(token: int, text: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": text, **flags}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _normalizer(removes_spaces: bool, adds_space: bool) -> dict[str, Any]:
    steps = []
    if removes_spaces:
        steps += [_replace({"Regex": r"\A +| +\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if adds_space:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return {"type": "Sequence", "normalizers": [*steps, _replace({"String": " "}, SPACE)]}


def _bos_in_front(text: str, token: int) -> dict[str, Any]:
    def special(of_sequence: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": of_sequence}}

    def sequence(name: str, of_sequence: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": of_sequence}}

    return {
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }


def _decoder(takes_space_away: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if takes_space_away:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
