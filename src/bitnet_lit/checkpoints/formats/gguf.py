"""GGUF, llama.cpp's file: written straight from our codes and scale, read back with the `gguf` package.

TQ2_0 stores 256 codes and an fp16 scale in 66 bytes, TQ1_0 in 54. Each block's scale is the largest magnitude in it, so
scales per row fit, and per group of 256 inputs or a multiple; and what is quantized must be code * scale: of latent
weights, most would become 0. The fp16 rounding of the scale is the
whole error of a projection. llama.cpp then quantizes activations by blocks of 256 rather than by tokens, so its logits
differ from ours by a little more than that.

With sub-norms the architecture is `bitnet`, without them `llama`, whose graph turns the pairs (2i, 2i + 1) of a head,
so the rows of q and k are reordered for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet_lit.checkpoints.formats.llama2c import deinterleave, interleave
from bitnet_lit.checkpoints.formats.q6_k import quantize_q6_k
from bitnet_lit.checkpoints.stored_model import StoredModel, TensorReader
from bitnet_lit.config import ModelConfig
from bitnet_lit.errors import UserError
from bitnet_lit.exports.targets import tokenizer_problem
from bitnet_lit.extras import needs
from bitnet_lit.model.tensors import EMBEDDING, HEAD
from bitnet_lit.quant.activations import SCALE_MIN
from bitnet_lit.quant.weights import spread_scale

ROWS_AT_ONCE = 1024  # of a large matrix: bounds the memory of a conversion
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.down_proj": "ffn_down",
}
OTHER_NAMES = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
FILE_TYPES = {"tq2_0": "MOSTLY_TQ2_0", "tq1_0": "MOSTLY_TQ1_0", "f16": "MOSTLY_F16"}


def _gguf() -> Any:
    with needs("gguf", "format=gguf"):
        import gguf
    return gguf


def their_name(name: str) -> str:
    """GGUF's name of a tensor."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, _, layer, kind = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[kind]}.weight"


def _heads(name: str, config: ModelConfig) -> int | None:
    """Heads of a matrix whose rows the llama graph wants in another order; None for the others."""
    if config.sub_norm:
        return None
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_kv_heads if name.endswith("k_proj.weight") else None


def tensor_type(name: str, stored: StoredModel, type: str, embeddings: str) -> str:
    """The type that a tensor is written in, lower case."""
    if len(stored.tensors[name]) == 1:
        return "f32"
    if name in (EMBEDDING, HEAD):
        return embeddings
    return type if name in stored.quantized else "f16"


def _add_fields(writer: Any, stored: StoredModel, type: str) -> None:
    """Sizes and vocabulary."""
    gguf, config, tokenizer = _gguf(), stored.config, stored.tokenizer
    writer.add_name(config.name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    problem = tokenizer_problem("gguf_f16", tokenizer)
    vocabulary = None if tokenizer is None or problem else tokenizer.sentencepiece_vocabulary()
    if tokenizer is None or vocabulary is None:
        raise UserError(
            f"{stored.path}: {problem}, and a GGUF's vocabulary is written from a BPE of SentencePiece here: put one "
            "there that it was trained with, or take format=packed"
        )
    kinds = gguf.TokenType
    tokens = [piece.text.encode() for piece in vocabulary.pieces]
    scores = [piece.score for piece in vocabulary.pieces]
    types = [kinds[piece.kind.name] for piece in vocabulary.pieces]
    for token in range(len(tokens), config.vocab_size or 0):  # an embedding with more rows than the vocabulary
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
    writer.add_eot_token_id(tokenizer.bos_id)  # llama2.c's shards separate stories by BOS: it ends a text too
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.adds_space_prefix)


def _converted(values: Callable[[int, int], NDArray[np.float32]], rows: int, kind: str) -> NDArray[Any]:
    """Rows of float32 values as bytes of the type `kind`, some at a time."""
    gguf = _gguf()
    convert = (
        quantize_q6_k if kind == "q6_k" else lambda v: gguf.quants.quantize(v, gguf.GGMLQuantizationType[kind.upper()])
    )
    return np.concatenate([convert(values(i, min(i + ROWS_AT_ONCE, rows))) for i in range(0, rows, ROWS_AT_ONCE)])


def _bytes_of(stored: StoredModel, name: str, kind: str) -> NDArray[Any]:
    """A tensor as it stands in the file."""
    heads = _heads(name, stored.config)
    if name not in stored.quantized:
        tensor = stored.tensor(name)
        tensor = interleave(tensor, heads) if heads else tensor
        if tensor.ndim == 1:
            return tensor.numpy()
        return _converted(lambda i, j: tensor[i:j].numpy(), len(tensor), kind)
    codes, scale = stored.codes(name)
    scale = spread_scale(scale, codes.shape[1]).expand(codes.shape)
    codes, scale = (interleave(tensor, heads) if heads else tensor for tensor in (codes, scale))
    return _converted(lambda i, j: (codes[i:j].float() * scale[i:j]).numpy(), len(codes), kind)


def write_gguf(stored: StoredModel, path: Path, type: str, embeddings: str) -> dict[str, tuple[str, int]]:
    """Write a GGUF file, one tensor after the other.

    Args:
        type: of the quantized projections: tq2_0, tq1_0 or f16. Norms are f32, dense projections f16.
        embeddings: of the embedding and an untied head: q8_0, q6_k or f16.

    Returns:
        The type and the bytes of each tensor, by our names.

    Raises:
        UserError: no SentencePiece vocabulary, or rows that the type of the embeddings cannot hold.
    """
    gguf = _gguf()
    writer = gguf.GGUFWriter(path, "bitnet" if stored.config.sub_norm else "llama")
    _add_fields(writer, stored, type)
    written: dict[str, tuple[str, int]] = {}
    for name, shape in stored.tensors.items():
        kind = tensor_type(name, stored, type, embeddings)
        quantized = gguf.GGMLQuantizationType[kind.upper()]
        block, size = gguf.GGML_QUANT_SIZES[quantized]
        if shape[-1] % block:
            raise UserError(
                f"embeddings={embeddings}: stores blocks of {block}, but the rows of {name} hold {shape[-1]}: take "
                "embeddings=f16"
            )
        count = int(np.prod(shape)) // block * size
        dtype = {"f32": np.float32, "f16": np.float16}.get(kind, np.uint8)
        stored_shape = shape if kind in ("f32", "f16") else (*shape[:-1], shape[-1] // block * size)
        writer.add_tensor_info(their_name(name), stored_shape, np.dtype(dtype), count, raw_dtype=quantized)
        written[name] = kind, count
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (kind, _) in written.items():
        writer.write_tensor_data(_bytes_of(stored, name, kind))
    writer.close()
    return written


def _scales(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Scales of dequantized ternary weights (O, I): the largest magnitude of those that share one, or, where all their
    codes are 0, the smallest scale there is; of `shape`, as the granularity gives it."""
    magnitude = values.abs()
    largest = magnitude.unflatten(1, (shape[1], -1)).amax(-1) if shape else magnitude.max()
    return torch.where(largest > 0, largest, SCALE_MIN)


class GgufReader(TensorReader):
    """A GGUF file as `gguf` reads and dequantizes it, under our names, rows in our order.

    A quantized projection is given as codes and scales: the dequantized values over the largest of them.
    """

    def __init__(self, path: Path, stored: StoredModel) -> None:
        self._stored = stored
        self._tensors = {tensor.name: tensor for tensor in _gguf().GGUFReader(path).tensors}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self._stored.tensors:
            if (tensor := self._tensors.get(their_name(name))) is not None:
                shapes[name] = tuple(map(int, reversed(tensor.shape)))  # GGUF's are innermost first
                if name in self._stored.quantized:
                    shapes[f"{name}_scale"] = self._scale_shape(name) or (1,)
        return shapes

    def _scale_shape(self, name: str) -> tuple[int, ...]:
        rows, inputs = self._stored.tensors[name]
        return self._stored.quant.scheme.granularity.scale_shape(rows, inputs)

    def _dequantized(self, name: str) -> Tensor:
        tensor = self._tensors[their_name(name)]
        shape = tuple(map(int, reversed(tensor.shape)))
        rows = torch.empty(shape)
        data = tensor.data.reshape(shape[0], -1)  # a row of bytes for each row of values; a vector's are its values
        for start in range(0, len(data), ROWS_AT_ONCE):
            part = _gguf().quants.dequantize(data[start : start + ROWS_AT_ONCE], tensor.tensor_type)
            rows[start : start + ROWS_AT_ONCE] = torch.from_numpy(np.array(part)).reshape(-1, *shape[1:])
        heads = _heads(name, self._stored.config)
        return deinterleave(rows, heads) if heads else rows

    def read(self, name: str) -> NDArray[Any]:
        weight = name.removesuffix("_scale")
        values = self._dequantized(weight)
        if weight not in self._stored.quantized:
            return values.numpy()
        scales = _scales(values, self._scale_shape(weight))
        if name != weight:
            return (scales if scales.ndim else scales.reshape(1)).numpy()
        return (values / spread_scale(scales, values.shape[1])).numpy()


def reopened(path: Path, stored: StoredModel) -> StoredModel:
    """The written file as a stored model of its own, to be compared with the one it was written from."""
    return StoredModel(path, stored.config, stored.quant, stored.tokenizer, {}, GgufReader(path, stored))
