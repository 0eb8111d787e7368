"""llama2.c's files: the training checkpoint stories*.pt and the .bin that run.c reads.

The .bin is the first version of `export.py`: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
max_seq_len; a negative vocab_size says that the head is not the embedding), then float32 tensors, one kind after the
other over all layers, then two tables of positions that run.c skips. Its network is a Llama with silu, RoPE theta
10000 and norms with eps 1e-5, none of which the file says.

llama2.c turns the pairs (2i, 2i + 1) of a head, Hugging Face (i, i + P/2): the rows of q and k are reordered.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet_lit.checkpoints.safetensors_reader import read_into
from bitnet_lit.checkpoints.stored_model import StoredModel, TensorReader
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.data.tokenizers.sentencepiece import SentencePieceTokenizer
from bitnet_lit.data.tokenizers.tokenizer import SPACE, SentencePieceVocabulary
from bitnet_lit.errors import UserError
from bitnet_lit.exports.targets import tokenizer_problem
from bitnet_lit.model.layers import rotary_tables
from bitnet_lit.model.tensors import EMBEDDING, HEAD
from bitnet_lit.regular_file import open_regular

HEADER_INTS = 7
# Hugging Face's name after "model.layers.<i>.": llama2.c's after "layers.<i>.", in the order of the .bin.
LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
OTHER_NAMES = {EMBEDDING: "tok_embeddings.weight", "model.norm.weight": "norm.weight", HEAD: "output.weight"}


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from Hugging Face's order to llama2.c's; (O, I) -> (O, I)."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def deinterleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from llama2.c's order to Hugging Face's; the inverse of `interleave`."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _their_name(name: str) -> str:
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, _, layer, kind = name.removesuffix(".weight").split(".", 3)
    return f"layers.{layer}.{LAYER_NAMES[kind]}.weight"


def network_names(layers: int, tied: bool) -> list[str]:
    """Our names of all tensors, in the order of the .bin."""
    names = [EMBEDDING]
    names += [f"model.layers.{i}.{kind}.weight" for kind in LAYER_NAMES for i in range(layers)]
    return [*names, "model.norm.weight", *([] if tied else [HEAD])]


class Llama2cReader(TensorReader):
    """Tensors under our names, rows in our order.

    Args:
        read: one tensor by our name, rows in llama2.c's order.
    """

    def __init__(self, config: ModelConfig, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
        self._config, self._shapes, self._read = config, shapes, read

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> NDArray[Any]:
        tensor = self._read(name).float()
        if name.endswith("q_proj.weight"):
            tensor = deinterleave(tensor, self._config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            tensor = deinterleave(tensor, self._config.num_kv_heads)
        return tensor.numpy()


def _tokenizer_beside(path: Path) -> Tokenizer | None:
    found = path.with_name(SentencePieceTokenizer.file_names[0])
    return SentencePieceTokenizer(found) if found.is_file() else None


def _config(
    name: str, dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        name=name,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        sub_norm=False,
    )


def _bin_layout(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Our name and the shape of every tensor of a .bin, in the file's order."""
    dim, hidden, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    assert vocab is not None
    kv_size = config.num_kv_heads * config.head_size
    shapes = {
        "q_proj": (dim, dim),
        "k_proj": (kv_size, dim),
        "v_proj": (kv_size, dim),
        "o_proj": (dim, dim),
        "gate_proj": (hidden, dim),
        "down_proj": (dim, hidden),
        "up_proj": (hidden, dim),
        "embed_tokens": (vocab, dim),
        "lm_head": (vocab, dim),
    }
    for name in network_names(config.num_hidden_layers, tied=True):
        yield name, shapes.get(name.split(".")[-2], (dim,))


def open_bin(path: Path) -> StoredModel:
    """A .bin of llama2.c.

    Raises:
        UserError: no such file, or one whose size is not what its header says.
    """
    file = open_regular(path, "give a .bin of llama2.c")
    size = os.fstat(file.fileno()).st_size
    header = np.frombuffer(file.read(4 * HEADER_INTS)[: size // 4 * 4], dtype="<i4")
    not_one = f"{path}: not a .bin of llama2.c"
    if len(header) < HEADER_INTS or header[0] == 0x616B3432:  # "ak42" begins the newer versions
        raise UserError(f"{not_one} in the form that run.c reads (version 0): export it with --version 0")
    dim, hidden, layers, heads, kv_heads, vocab, context = map(int, header)
    # Multiplied out before anything is laid out: a damaged header must not ask for memory.
    if min(dim, hidden, layers, heads, kv_heads, abs(vocab), context) < 1 or max(map(abs, header.tolist())) > 2**24:
        raise UserError(f"{not_one} (its header says {header.tolist()}): copy it again")
    try:
        config = _config(path.stem, dim, hidden, layers, heads, kv_heads, abs(vocab), context, vocab > 0)
    except UserError as error:
        raise UserError(f"{not_one} ({error}): copy it again") from None
    kv_size = kv_heads * (dim // heads)
    per_layer = 2 * dim * dim + 2 * dim * kv_size + 3 * dim * hidden + 2 * dim
    tables = context * (dim // heads)  # cos and sin, half a head each
    expected = abs(vocab) * dim * (1 if vocab > 0 else 2) + layers * per_layer + dim + tables
    if size != 4 * (HEADER_INTS + expected):
        raise UserError(f"{not_one} ({size} bytes, its header says {4 * (HEADER_INTS + expected)}): copy it again")
    offsets: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    position = 4 * HEADER_INTS
    for name, shape in _bin_layout(config):
        offsets[name], shapes[name] = position, shape
        position += 4 * math.prod(shape)
    if vocab < 0:
        offsets[HEAD], shapes[HEAD] = position + 4 * tables, (abs(vocab), dim)

    def read(name: str) -> Tensor:
        values = np.empty(shapes[name], dtype="<f4")
        read_into(values, file.fileno(), offsets[name], path)
        return torch.from_numpy(values)

    reader = Llama2cReader(config, shapes, read)
    return StoredModel(path, config, QuantConfig(name="none"), _tokenizer_beside(path), {}, reader)


def _check_archive(path: Path) -> None:
    """Refuse an archive whose contents are larger than itself: torch would unpack it into memory.

    Raises:
        ValueError: so it is.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries overlap")


def _check_tensor(name: str, tensor: Any) -> None:
    """Refuse what is no tensor of plain numbers, each of which lies in the file.

    Raises:
        ValueError: so it is.
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{name} holds no plain numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} is {tuple(tensor.shape)}, of which the file holds a part")


def open_pt(path: Path) -> StoredModel:
    """A training checkpoint of llama2.c; plain data only, nothing in it is executed.

    Raises:
        UserError: not such a checkpoint.
    """
    not_one = f"{path}: not a training checkpoint of llama2.c"
    try:
        _check_archive(path)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        arguments, state = checkpoint["model_args"], checkpoint["model"]
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
        for name, tensor in state.items():
            _check_tensor(name, tensor)
        hidden = int(state["layers.0.feed_forward.w1.weight"].shape[0])
        tied = torch.equal(state["output.weight"], state["tok_embeddings.weight"])
        config = _config(
            path.stem,
            int(arguments["dim"]),
            hidden,
            int(arguments["n_layers"]),
            int(arguments["n_heads"]),
            int(arguments.get("n_kv_heads") or arguments["n_heads"]),
            int(arguments["vocab_size"]),
            int(arguments["max_seq_len"]),
            tied,
        )
        names = {name: _their_name(name) for name in network_names(config.num_hidden_layers, tied)}
        shapes = {name: tuple(state[theirs].shape) for name, theirs in names.items()}
    except UserError as error:
        raise UserError(f"{not_one} ({error}): copy it again") from None
    except Exception as error:  # torch raises a different type for each way a file can be broken
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"{not_one} ({type(error).__name__}: {reason}): give stories*.pt or a model folder") from None
    reader = Llama2cReader(config, shapes, lambda name: state[names[name]])
    return StoredModel(path, config, QuantConfig(name="none"), _tokenizer_beside(path), {}, reader)


def _write_tokenizer(tokenizer: Tokenizer, vocabulary: SentencePieceVocabulary, rows: int, path: Path) -> None:
    """tokenizer.bin: the longest piece's bytes (int32), then score (float32), length (int32) and bytes of each.

    run.c reads a piece for each of the model's `rows`: those beyond the vocabulary get names that no text holds.
    """
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


def write_bin(stored: StoredModel, folder: Path) -> None:
    """Write model.bin, and tokenizer.bin where there is a tokenizer that run.c can use, into `folder`.

    A BitNet is written as its dequantized weights: run.c does not quantize activations. The caller has asked
    `targets.problems` whether the network fits.
    """
    config = stored.config
    vocab = config.vocab_size or 0
    tied = config.tie_word_embeddings
    header = [
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_kv_heads,
        vocab if tied else -vocab,
        config.max_position_embeddings,
    ]
    with (folder / "model.bin").open("wb") as file:
        file.write(np.array(header, dtype="<i4").tobytes())
        for name in network_names(config.num_hidden_layers, tied=True):
            weight = stored.dequantized(name)
            if name.endswith("q_proj.weight"):
                weight = interleave(weight, config.num_attention_heads)
            elif name.endswith("k_proj.weight"):
                weight = interleave(weight, config.num_kv_heads)
            file.write(np.ascontiguousarray(weight.numpy(), dtype="<f4").data)  # tofile would not say why it failed
        cos, sin = (table[:, : config.head_size // 2].numpy() for table in rotary_tables(config))
        file.write(cos.astype("<f4").tobytes() + sin.astype("<f4").tobytes())
        if not tied:
            file.write(np.ascontiguousarray(stored.tensor(HEAD).numpy(), dtype="<f4").data)
    vocabulary = None if stored.tokenizer is None else stored.tokenizer.sentencepiece_vocabulary()
    if stored.tokenizer is not None and vocabulary is not None:
        stored.tokenizer.copy_to(folder)
        if tokenizer_problem("llama2c", stored.tokenizer) is None:
            _write_tokenizer(stored.tokenizer, vocabulary, vocab, folder / "tokenizer.bin")
