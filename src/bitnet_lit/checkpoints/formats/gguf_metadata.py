"""The metadata of a GGUF file say what llama.cpp needs beside the tensors: the sizes of the network and the vocabulary.

llama.cpp encodes and decodes text itself, with the pieces and scores of a SentencePiece BPE.
"""

from __future__ import annotations

from typing import Any

from bitnet_lit.checkpoints.formats.gguf_graph import graph_of
from bitnet_lit.checkpoints.formats.llama_tokenizer import llama_tokenizer_problem
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import ModelConfig
from bitnet_lit.errors import UserError


def add_sizes(writer: Any, config: ModelConfig) -> None:
    """Write the sizes of the network.

    Args:
        writer: a `gguf.GGUFWriter`.
    """
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if graph_of(config).any_head_dim:
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)


def add_vocabulary(writer: Any, stored: StoredModel) -> None:
    """Write the vocabulary, with a piece for every row of the embedding.

    Args:
        writer: a `gguf.GGUFWriter`.

    Raises:
        UserError: the tokenizer is not a SentencePiece BPE.
    """
    import gguf

    tokenizer = stored.tokenizer
    problem = llama_tokenizer_problem(tokenizer)
    vocabulary = None if tokenizer is None or problem else tokenizer.sentencepiece_vocabulary()
    if tokenizer is None or vocabulary is None:
        raise UserError(
            f"{stored.path}: {problem}, but a GGUF needs the vocabulary of a SentencePiece BPE: put the "
            "tokenizer.model there that it was trained with, or take format=packed"
        )
    kinds = gguf.TokenType
    tokens = [piece.text.encode() for piece in vocabulary.pieces]
    scores = [piece.score for piece in vocabulary.pieces]
    types = [kinds[piece.kind.name] for piece in vocabulary.pieces]
    for token in range(len(tokens), stored.config.vocab_size or 0):  # an embedding with more rows than the vocabulary
        tokens.append(f"[PAD{token}]".encode())
        scores.append(-1e4)
        types.append(kinds.UNUSED)
    writer.add_tokenizer_model("llama")  # SentencePiece BPE
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_unk_token_id(max(vocabulary.unk_id, 0))
    if tokenizer.eos_id >= 0:
        writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.bos_id)  # BOS ends a text too: it separates the stories in llama2.c's shards
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.adds_space_prefix)
