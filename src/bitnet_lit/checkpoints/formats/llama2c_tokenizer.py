"""The tokenizer.bin of llama2.c holds the pieces of a SentencePiece BPE, from which run.c encodes and decodes text.

run.c fixes some ids: BOS is piece 1, EOS is piece 2, and byte b is piece b + 3.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bitnet_lit.checkpoints.formats.llama_tokenizer import llama_tokenizer_problem
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.data.tokenizers.tokenizer import SPACE, PieceKind

FIRST_BYTE = 3  # the piece of byte 0


def run_c_tokenizer_problem(tokenizer: Tokenizer | None) -> str | None:
    """Say why run.c would not encode text as this tokenizer does; return None where it would."""
    vocabulary = None if tokenizer is None else tokenizer.sentencepiece_vocabulary()
    problem = llama_tokenizer_problem(tokenizer)
    if problem is not None or tokenizer is None or vocabulary is None:
        return problem
    bytes_ = vocabulary.pieces[FIRST_BYTE : FIRST_BYTE + 256]
    has_bytes = len(bytes_) == 256 and all(piece.kind is PieceKind.BYTE for piece in (bytes_[0], bytes_[-1]))
    if (tokenizer.bos_id, has_bytes) == (1, True):
        return None
    return "its BOS is not piece 1, or its bytes do not begin at 3"


def write_tokenizer(tokenizer: Tokenizer, rows: int, path: Path) -> None:
    """Write tokenizer.bin: the length of the longest piece (int32), then each piece.

    A piece is written as score (float32), length in bytes (int32) and bytes. run.c reads one piece for each of the
    `rows` of the embedding. Rows beyond the vocabulary get pieces that occur in no text.

    Args:
        tokenizer: one that has no `run_c_tokenizer_problem`.
    """
    vocabulary = tokenizer.sentencepiece_vocabulary()
    assert vocabulary is not None, "run.c has no other tokenizers"
    control = {tokenizer.bos_id: "\n<s>\n", tokenizer.eos_id: "\n</s>\n"}
    texts = [control.get(token, piece.text) for token, piece in enumerate(vocabulary.pieces)]
    pieces = [text.replace(SPACE, " ").encode() for text in texts]
    scores = [piece.score for piece in vocabulary.pieces]
    pieces += [f"\n<unused {token}>\n".encode() for token in range(len(pieces), rows)]
    scores += [-1e4] * (rows - len(scores))
    with path.open("wb") as file:
        file.write(np.array([max(map(len, pieces))], dtype="<i4").tobytes())
        for piece, score in zip(pieces, scores, strict=True):
            file.write(np.array([score], dtype="<f4").tobytes())
            file.write(np.array([len(piece)], dtype="<i4").tobytes())
            file.write(piece)
