"""What llama.cpp and run.c need of a tokenizer.

Both merge the pair of pieces with the best score, which is SentencePiece's BPE and no other of its models, and read the
text as it is.
"""

from __future__ import annotations

from bitnet_lit.data.tokenizers import Tokenizer


def llama_tokenizer_problem(tokenizer: Tokenizer | None) -> str | None:
    """Why they cannot encode text with this tokenizer as it was trained; None where they can."""
    vocabulary = None if tokenizer is None else tokenizer.sentencepiece_vocabulary()
    if vocabulary is None:
        return "no SentencePiece tokenizer.model"
    if not vocabulary.is_bpe:
        return "its SentencePiece model is no BPE"
    return "its SentencePiece model normalizes the text" if vocabulary.normalizes else None
