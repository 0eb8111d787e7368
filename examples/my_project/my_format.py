"""This export format writes a NumPy file for each tensor, with dequantized float32 weights.

`held` and `tensor_names` say which networks the format supports. Another network is refused, with the name of the part
that is not supported. The export reads the files back and compares them with the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitnet_lit.checkpoints.formats.format import FLOAT_ERRORS, Format, WrittenTensor, scheme_problems
from bitnet_lit.checkpoints.stored_model import StoredModel, TensorReader
from bitnet_lit.config import QuantConfig
from bitnet_lit.config.held import ANY, SIZES, Only
from bitnet_lit.model.tensors import LAYER, network_tensors

OUTER = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
NAMES = {name: name for name in (*(spec.name for spec in LAYER if "q_norm" not in spec.name), *OUTER)}
HELD = {
    **SIZES,
    **dict.fromkeys(("rope_theta", "rms_norm_eps", "tie_word_embeddings", "sub_norm", "hidden_act"), ANY),
    "qkv_bias": Only(False, "this format has no biases"),
}


class NpyReader(TensorReader):
    """This reader reads the tensors of a folder of .npy files."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.stem: path for path in folder.glob("*.npy")}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: np.load(path, mmap_mode="r").shape for name, path in self.files.items()}

    def read(self, name: str) -> np.ndarray:
        return np.load(self.files[name])


@dataclass(frozen=True)
class Npy(Format):
    name = "npy"
    title = "a NumPy file for each tensor"
    held = HELD
    tensor_names = NAMES

    def problems(self, config, quant):
        return [*scheme_problems(quant), *super().problems(config, quant)]

    def write(self, stored: StoredModel, out: Path) -> list[WrittenTensor]:
        for name in stored.tensors:
            np.save(out / f"{name}.npy", stored.dequantized(name).numpy())
        tensors = network_tensors(stored.config)
        return [WrittenTensor(t.name, "f32", t.shape, 4 * t.size, FLOAT_ERRORS["f32"]) for t in tensors]

    def reopen(self, out: Path, stored: StoredModel) -> StoredModel:
        return StoredModel(out, stored.config, QuantConfig(name="none"), stored.tokenizer, {}, NpyReader(out))
