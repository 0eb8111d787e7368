"""A tensor of the network is written to a GGUF file and read back here: its name, the order of its rows, its bytes.

A quantized projection is written as codes * scale, from which a ternary type computes the same codes again: the largest
magnitude of a block becomes its scale. It is read back as codes and scales, which are computed the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.checkpoints.formats.gguf_graph import graph_of
from bitnet_lit.checkpoints.formats.q6_k import quantize_q6_k
from bitnet_lit.checkpoints.formats.rotary_order import deinterleave, interleave
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.checkpoints.tensor_reader import TensorReader
from bitnet_lit.config import ModelConfig
from bitnet_lit.model.tensors import EMBEDDING, FINAL_NORM, HEAD, NetworkTensor, network_tensors
from bitnet_lit.quant.activations import SCALE_MIN
from bitnet_lit.quant.weights import spread_scale

if TYPE_CHECKING:
    from torch import Tensor

ROWS_AT_ONCE = 1024  # bounds the memory for converting a large matrix
# Our name, within the layer where there is one -> llama.cpp's name, after "blk.<i>." there.
TENSOR_NAMES = {
    EMBEDDING: "token_embd.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.attn_sub_norm.weight": "attn_sub_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.ffn_sub_norm.weight": "ffn_sub_norm.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    FINAL_NORM: "output_norm.weight",
    HEAD: "output.weight",
}


def their_name(tensor: NetworkTensor) -> str:
    """Return llama.cpp's name of a tensor."""
    name = TENSOR_NAMES[tensor.within]
    return name if tensor.layer is None else f"blk.{tensor.layer}.{name}"


def _interleaved_heads(tensor: NetworkTensor, config: ModelConfig) -> int | None:
    """Return the number of heads of a tensor whose rows the graph needs in another order; None for the others."""
    return tensor.rotary_heads if graph_of(config).rotates_neighbours else None


def written_values(stored: StoredModel, tensor: NetworkTensor, kind: str) -> NDArray[Any]:
    """Return a tensor as it is written.

    Args:
        kind: the type in the file, such as tq2_0, q6_k or f32.
    """
    import gguf

    def convert(rows: NDArray[np.float32]) -> NDArray[Any]:
        if kind == "q6_k":
            return quantize_q6_k(rows)
        return np.asarray(gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind.upper()]))

    values = interleave(stored.dequantized(tensor.name), _interleaved_heads(tensor, stored.config)).numpy()
    return np.concatenate([convert(values[i : i + ROWS_AT_ONCE]) for i in range(0, len(values), ROWS_AT_ONCE)])


def _scales(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Compute the scales of dequantized ternary weights, float32 (O, I).

    A scale is the largest magnitude of the weights that share it, or SCALE_MIN where all of them are 0.

    Args:
        shape: the shape of the result, as the granularity gives it: (), (O, 1) or (O, G).
    """
    import torch

    magnitude = values.abs()
    largest = magnitude.unflatten(1, (shape[1], -1)).amax(-1) if shape else magnitude.max()
    return torch.where(largest > 0, largest, SCALE_MIN)


class GgufReader(TensorReader):
    """Reads the tensors of a GGUF file with the `gguf` package, under our names and with rows in our order.

    A quantized projection is given as codes and scales, computed from the dequantized values: a scale is the largest
    magnitude, and a code is the value divided by its scale.

    Args:
        stored: the model that was written; sizes and scheme are taken from it.
    """

    def __init__(self, path: Path, stored: StoredModel) -> None:
        import gguf

        self._stored = stored
        theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        self._network = {tensor.name: tensor for tensor in network_tensors(stored.config)}
        self._tensors = {
            name: theirs[their_name(tensor)] for name, tensor in self._network.items() if their_name(tensor) in theirs
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in self._tensors.items():
            shapes[name] = tuple(map(int, reversed(tensor.shape)))  # GGUF gives the innermost dimension first
            if name in self._stored.quantized:
                shapes[f"{name}_scale"] = self._scale_shape(name) or (1,)
        return shapes

    def _scale_shape(self, name: str) -> tuple[int, ...]:
        return self._stored.quant.scheme.granularity.scale_shape(*self._stored.tensors[name])

    def _dequantized(self, name: str) -> Tensor:
        import gguf
        import torch

        tensor = self._tensors[name]
        shape = tuple(map(int, reversed(tensor.shape)))
        rows = torch.empty(shape)
        data = tensor.data.reshape(shape[0], -1)  # one row of bytes for each row of values; a vector holds its values
        for start in range(0, len(data), ROWS_AT_ONCE):
            part = gguf.quants.dequantize(data[start : start + ROWS_AT_ONCE], tensor.tensor_type)
            rows[start : start + ROWS_AT_ONCE] = torch.from_numpy(np.array(part)).reshape(-1, *shape[1:])
        return deinterleave(rows, _interleaved_heads(self._network[name], self._stored.config))

    def read(self, name: str) -> NDArray[Any]:
        weight = name.removesuffix("_scale")
        values = self._dequantized(weight)
        if weight not in self._stored.quantized:
            return values.numpy()
        scales = _scales(values, self._scale_shape(weight))
        if name != weight:
            return (scales if scales.ndim else scales.reshape(1)).numpy()
        return (values / spread_scale(scales, values.shape[1])).numpy()
