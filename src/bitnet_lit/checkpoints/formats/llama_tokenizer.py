"""llama.cpp and run.c can use only some tokenizers; this module says which.

Both merge the pair of pieces with the best score. This is SentencePiece's BPE, but not its other models. Neither
normalizes the text.
"""

from __future__ import annotations

from bitnet_lit.data.tokenizers import Tokenizer


def llama_tokenizer_problem(tokenizer: Tokenizer | None) -> str | None:
    """Say why llama.cpp and run.c would not encode text as this tokenizer does; return None where they would."""
    vocabulary = None if tokenizer is None else tokenizer.sentencepiece_vocabulary()
    if vocabulary is None:
        return "no SentencePiece tokenizer.model"
    if not vocabulary.is_bpe:
        return "its SentencePiece model is not a BPE"
    return "its SentencePiece model normalizes the text" if vocabulary.normalizes else None
