"""The .bin file of llama2.c, which run.c runs, is written and read here.

The .bin is version 0 of llama2.c's `export.py`. It begins with seven int32: dim, hidden_dim, n_layers, n_heads,
n_kv_heads, vocab_size, max_seq_len. A negative vocab_size means that the head is not tied to the embedding. Then come
float32 tensors: for each kind of tensor, those of all layers. Two rotary tables, which run.c skips, stand before an
untied head. The network is a Llama with silu, RoPE theta 10000 and norms with eps 1e-5, which the file does not say. A
BitNet model is written as dequantized weights, because run.c does not quantize activations.

llama2c_tokenizer.py writes the tokenizer.bin beside it, and llama2c_checkpoint.py reads llama2.c's checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.checkpoints.formats.format import (
    FLOAT_ERRORS,
    FORMATS,
    Format,
    WrittenTensor,
    infer_command,
    scheme_problems,
)
from bitnet_lit.checkpoints.formats.llama2c_tokenizer import run_c_tokenizer_problem, write_tokenizer
from bitnet_lit.checkpoints.formats.rotary_order import deinterleave, interleave
from bitnet_lit.checkpoints.safetensors_reader import read_into
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.checkpoints.tensor_reader import TensorReader
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.config.held import ANY, SIZES, Only
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.data.tokenizers.sentencepiece import SentencePieceTokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.files.regular_file import open_regular
from bitnet_lit.model.tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    NetworkTensor,
    layer_tensors,
    network_tensors,
    outer_tensors,
)

if TYPE_CHECKING:
    from torch import Tensor

HEADER_INTS = 7
MODEL_NAME, TOKENIZER_NAME = "model.bin", "tokenizer.bin"
# Our name within a layer -> llama2.c's name after "layers.<i>.", in the order of the .bin.
LAYER_NAMES = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
}
OTHER_NAMES = {EMBEDDING: "tok_embeddings.weight", FINAL_NORM: "norm.weight", HEAD: "output.weight"}

TENSOR_NAMES = {**LAYER_NAMES, **OTHER_NAMES}
HELD = {
    **SIZES,
    "tie_word_embeddings": ANY,
    "sub_norm": Only(False, "run.c has no sub-norms: train with model.sub_norm=false"),
    "hidden_act": Only("silu", "run.c computes silu: train with model.hidden_act=silu"),
    "rope_theta": Only(10000.0, "run.c rotates with theta 10000: train with model.rope_theta=10000"),
    "rms_norm_eps": Only(1e-5, "run.c's norms have eps 1e-5: train with model.rms_norm_eps=1e-5"),
    "qkv_bias": Only(False, "run.c has no biases: train with model.qkv_bias=false"),
    "qk_norm": Only(False, "run.c has no norms on queries and keys: train with model.qk_norm=false"),
}


def their_name(tensor: NetworkTensor) -> str:
    """Return llama2.c's name of a tensor."""
    if tensor.layer is None:
        return OTHER_NAMES[tensor.name]
    return f"layers.{tensor.layer}.{LAYER_NAMES[tensor.within]}"


def file_order(config: ModelConfig) -> list[NetworkTensor]:
    """Return the tensors of a network in the order of the .bin."""
    tensors = {tensor.name: tensor for tensor in network_tensors(config)}
    layers = [
        tensors[f"model.layers.{layer}.{name}"] for name in LAYER_NAMES for layer in range(config.num_hidden_layers)
    ]
    return [tensors[EMBEDDING], *layers, *(tensors[name] for name in (FINAL_NORM, HEAD) if name in tensors)]


class Llama2cReader(TensorReader):
    """Reads the tensors of llama2.c under our names, with rows in our order.

    Args:
        config: the network.
        shapes: our name -> shape of the tensor in the file.
        read: reads one tensor by our name, with rows in llama2.c's order.
    """

    def __init__(self, config: ModelConfig, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
        self._heads = {tensor.name: tensor.rotary_heads for tensor in network_tensors(config)}
        self._shapes, self._read = shapes, read

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> NDArray[Any]:
        return deinterleave(self._read(name).float(), self._heads[name]).numpy()


def tokenizer_beside(path: Path) -> Tokenizer | None:
    """Open the SentencePiece model in the folder of a file; return None where there is none."""
    found = path.with_name(SentencePieceTokenizer.file_names[0])
    return SentencePieceTokenizer(found) if found.is_file() else None


def llama2c_config(
    name: str, dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int, tied: bool
) -> ModelConfig:
    """Return the config of a network of llama2.c with these sizes."""
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
        **{key: only.value for key, only in HELD.items() if isinstance(only, Only)},
    )


def open_bin(path: Path) -> StoredModel:
    """Open a .bin of llama2.c.

    Raises:
        UserError: there is no such file, or its size does not fit its header.
    """
    file = open_regular(path, "give a .bin of llama2.c")
    size = os.fstat(file.fileno()).st_size
    header = np.frombuffer(file.read(4 * HEADER_INTS)[: size // 4 * 4], dtype="<i4")
    not_one = f"{path}: not a .bin of llama2.c"
    if len(header) < HEADER_INTS or header[0] == 0x616B3432:  # "ak42" begins the newer versions
        raise UserError(f"{not_one} in the form that run.c reads (version 0): export it with --version 0")
    dim, hidden, layers, heads, kv_heads, vocab, context = map(int, header)
    # The sizes are checked before memory is allocated: a damaged header must not request too much.
    if min(dim, hidden, layers, heads, kv_heads, abs(vocab), context) < 1 or max(map(abs, header.tolist())) > 2**24:
        raise UserError(f"{not_one} (its header says {header.tolist()}): copy it again")
    try:
        config = llama2c_config(path.stem, dim, hidden, layers, heads, kv_heads, abs(vocab), context, vocab > 0)
    except UserError as error:
        raise UserError(f"{not_one} ({error}): copy it again") from None
    tables = context * config.head_size  # elements of cos and sin together: each has half a head per position
    in_a_layer, outside = layer_tensors(config), outer_tensors(config)
    expected = layers * sum(t.size for t in in_a_layer) + sum(t.size for t in outside) + tables
    if size != 4 * (HEADER_INTS + expected):
        raise UserError(f"{not_one} ({size} bytes, its header says {4 * (HEADER_INTS + expected)}): copy it again")
    offsets: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    position = 4 * HEADER_INTS
    for tensor in file_order(config):
        if tensor.name == HEAD:
            position += 4 * tables
        offsets[tensor.name], shapes[tensor.name] = position, tensor.shape
        position += 4 * tensor.size

    def read(name: str) -> Tensor:
        import torch

        values = np.empty(shapes[name], dtype="<f4")
        read_into(values, file.fileno(), offsets[name], path)
        return torch.from_numpy(values)

    reader = Llama2cReader(config, shapes, read)
    return StoredModel(path, config, QuantConfig(name="none"), tokenizer_beside(path), {}, reader)


@FORMATS.register
@dataclass(frozen=True)
class Llama2c(Format):
    """Writes a folder with the files of run.c: model.bin and tokenizer.bin."""

    name = "llama2c"
    title = "llama2.c's model.bin"
    held = HELD
    tensor_names = TENSOR_NAMES
    read_suffixes = (".bin", ".pt")
    weights = MODEL_NAME

    def problems(self, config: ModelConfig, quant: QuantConfig) -> list[str]:
        """List why run.c does not compute a model."""
        found = [*scheme_problems(quant), *super().problems(config, quant)]
        if config.attention_size != config.hidden_size:
            found.append(
                f"model.head_dim={config.head_dim}: run.c's heads add up to hidden_size: train without head_dim"
            )
        return found

    def tokenizer_problem(self, tokenizer: Tokenizer | None) -> str | None:
        return run_c_tokenizer_problem(tokenizer)

    def write(self, stored: StoredModel, out: Path) -> list[WrittenTensor]:
        """Write model.bin, and tokenizer.bin where run.c can use the tokenizer; one tensor is in memory at a time."""
        config, vocab = stored.config, stored.config.vocabulary
        header = [
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_kv_heads,
            vocab if config.tie_word_embeddings else -vocab,
            config.max_position_embeddings,
        ]
        *before_tables, last = file_order(config)
        if last.name != HEAD:
            before_tables.append(last)
        with (out / MODEL_NAME).open("wb") as file:
            file.write(np.array(header, dtype="<i4").tobytes())
            for tensor in before_tables:
                weight = interleave(stored.dequantized(tensor.name), tensor.rotary_heads)
                file.write(np.ascontiguousarray(weight.numpy(), dtype="<f4").data)  # tofile would hide why it failed
            file.write(_rotary_tables(config))
            if last.name == HEAD:
                file.write(np.ascontiguousarray(stored.tensor(HEAD).numpy(), dtype="<f4").data)
        if (tokenizer := stored.tokenizer) is not None and tokenizer.sentencepiece_vocabulary() is not None:
            tokenizer.copy_to(out)
            if run_c_tokenizer_problem(tokenizer) is None:
                write_tokenizer(tokenizer, vocab, out / TOKENIZER_NAME)
        return [WrittenTensor(t.name, "f32", t.shape, 4 * t.size, FLOAT_ERRORS["f32"]) for t in network_tensors(config)]

    def reopen(self, out: Path, stored: StoredModel) -> StoredModel:
        """Open the file as every command does."""
        return open_bin(out / MODEL_NAME)

    @classmethod
    def open(cls, path: Path) -> StoredModel:
        """Open a .bin or a training checkpoint (.pt).

        Raises:
            UserError: the file is damaged or of another kind.
        """
        if path.suffix == ".bin":
            return open_bin(path)
        from bitnet_lit.checkpoints.formats.llama2c_checkpoint import open_pt  # imports torch

        return open_pt(path)

    @classmethod
    def earlier_names(cls, folder: Path) -> set[str]:
        """Return the names of the three files of such a folder."""
        return {MODEL_NAME, TOKENIZER_NAME, *SentencePieceTokenizer.file_names}

    def remark(self, stored: StoredModel) -> str | None:
        """Say why there is no tokenizer.bin; return None where there is one."""
        problem = self.tokenizer_problem(stored.tokenizer)
        return problem and f"no {TOKENIZER_NAME} was written ({problem}): run.c needs one for this model"

    def next_command(self, out: Path, schemes: Sequence[str]) -> list[str]:
        """Return the command of this project, because run.c must be compiled first."""
        return infer_command(out / MODEL_NAME, schemes)

    def how_to_run(self, repository: str, runs_there: bool) -> Iterator[str]:
        """Yield how to run the export with run.c and with this project."""
        yield f"```sh\n./run {MODEL_NAME} -z {TOKENIZER_NAME}   # llama2.c\n```"
        yield from super().how_to_run(repository, runs_there)


def _rotary_tables(config: ModelConfig) -> bytes:
    """Return cos and sin of half a head for each position, float32; run.c skips them and computes its own."""
    from bitnet_lit.model.layers import rotary_tables

    cos, sin = (table[:, : config.head_size // 2].numpy() for table in rotary_tables(config))
    return bytes(cos.astype("<f4").tobytes() + sin.astype("<f4").tobytes())
