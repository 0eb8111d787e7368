"""Benchmarks run models with random weights: the speed of a model does not depend on their values."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet_lit.checkpoints.formats.model_folder import describe
from bitnet_lit.checkpoints.formats.model_folder_writer import write_folder
from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.checkpoints.safetensors_writer import LazyTensor
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.checkpoints.tensor_reader import TensorReader
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.model.tensors import quantized_names, tensor_shapes

BLOCK = 2**22 - 3
"""Random numbers that every tensor repeats: drawing billions takes minutes. It is prime, so no two rows are equal."""


class RandomWeights(TensorReader):
    """Gives random tensors of a network: packed codes where `quant` quantizes, else float32; norms are ones."""

    def __init__(self, config: ModelConfig, quant: QuantConfig) -> None:
        rng = np.random.default_rng(0)
        self._floats = rng.standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)
        pairs = [rng.integers(0, 3, size=BLOCK, dtype=np.uint8) << np.uint8(shift) for shift in (0, 2, 4, 6)]
        self._codes = pairs[0] | pairs[1] | pairs[2] | pairs[3]
        self._shapes: dict[str, tuple[int, ...]] = {}
        quantized = quantized_names(config, quant)
        for name, shape in tensor_shapes(config).items():
            if name in quantized:
                self._shapes[name] = (shape[0] // quant.scheme.codes_per_byte, shape[1])
                self._shapes[f"{name}_scale"] = (1,)
            else:
                self._shapes[name] = shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TensorReader`."""
        return dict(self._shapes)

    def read(self, name: str) -> NDArray[np.float32] | NDArray[np.uint8]:
        """See `TensorReader`."""
        shape = self._shapes[name]
        if f"{name}_scale" in self._shapes:
            return np.resize(self._codes, math.prod(shape)).reshape(shape)
        if name.endswith(".weight_scale"):
            return np.full(1, 0.02, dtype=np.float32)
        if len(shape) == 1:
            return np.ones(shape, dtype=np.float32)
        return np.resize(self._floats, math.prod(shape)).reshape(shape)

    def tensor(self, name: str) -> Tensor:
        """Return `read` as a tensor."""
        return torch.from_numpy(self.read(name))


def random_model(config: ModelConfig, quant: QuantConfig, tokenizer: Tokenizer | None = None) -> StoredModel:
    """Return a model in memory, of a scheme with one scale for the matrix or dense."""
    return StoredModel(Path("random"), config, quant, tokenizer, {}, RandomWeights(config, quant))


def random_folder(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> StoredModel:
    """Write a packed model folder with random codes, and open it."""
    reader, tensors = RandomWeights(config, QuantConfig()), []
    for name, shape in reader.shapes().items():
        dtype = torch.uint8 if f"{name}_scale" in reader.shapes() else torch.float32
        tensors.append(LazyTensor(name, shape, dtype, partial(reader.tensor, name)))
    folder.mkdir()
    write_folder(folder, describe(config, QuantConfig(), tokenizer, {}, packed=True), tensors, tokenizer)
    return open_stored(folder)
