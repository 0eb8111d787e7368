"""An export format as a user writes it, in a file of one's own: numpy's archive with dequantized float32 weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitnet_lit.checkpoints.formats.format import FLOAT_ERRORS, Format, WrittenTensor, scheme_problems
from bitnet_lit.checkpoints.stored_model import StoredModel, TensorReader
from bitnet_lit.config import QuantConfig
from bitnet_lit.config.held import ANY, SIZES, Only
from bitnet_lit.model.tensors import LAYER, network_tensors

PARTS = ("rope_theta", "rms_norm_eps", "tie_word_embeddings", "sub_norm", "hidden_act")
HELD = {**SIZES, **dict.fromkeys(PARTS, ANY), "qkv_bias": Only(False, "an archive has no biases")}
NAMES = {spec.name: spec.name for spec in LAYER if "q_norm" not in spec.name}
NAMES |= {name: name for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
ARCHIVE = "weights.npz"


class ArchiveReader(TensorReader):
    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self._arrays = dict(archive)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self._arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name].copy()


@dataclass(frozen=True)
class Npz(Format):
    """weights.npz in a folder."""

    name = "npz"
    title = "numpy's archive"
    held = HELD
    tensor_names = NAMES
    compressed: bool = False

    def problems(self, config, quant):
        return [*scheme_problems(quant), *super().problems(config, quant)]

    def write(self, stored: StoredModel, out: Path) -> list[WrittenTensor]:
        save = np.savez_compressed if self.compressed else np.savez
        save(out / ARCHIVE, **{name: stored.dequantized(name).numpy() for name in stored.tensors})
        tensors = network_tensors(stored.config)
        return [WrittenTensor(t.name, "f32", t.shape, 4 * t.size, FLOAT_ERRORS["f32"]) for t in tensors]

    def reopen(self, out: Path, stored: StoredModel) -> StoredModel:
        return StoredModel(
            out, stored.config, QuantConfig(name="none"), stored.tokenizer, {}, ArchiveReader(out / ARCHIVE)
        )
