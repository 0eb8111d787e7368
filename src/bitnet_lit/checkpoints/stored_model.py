"""A model at rest, whatever wrote it: its tensors one at a time, by one set of names.

Every format that is read opens to a `StoredModel`: our model folder, Hugging Face's folders, llama2.c's files. It
gives sizes, quantization, tokenizer, and tensors by the names of `CausalLM.state_dict()`: a dense tensor in float32, a
quantized projection as the codes and the scale that the forward pass uses, whether the file holds latent weights or
packed codes. So an export streams, and what is compared in the end is always (codes, scale) against (codes, scale).

Opening needs no torch, and neither do `array` and `statistics` where the file notes them, on which the native engine
starts: importing torch takes longer than that engine's whole start. The methods that return tensors import it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.checkpoints.config_json import LARGEST_NUMBER, LARGEST_SIZE, field_shapes
from bitnet_lit.checkpoints.file_names import CONFIG_NAME
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.foreign_json import ListOf, MapOf, Mismatch, Number, parse_json
from bitnet_lit.model.tensors import EMBEDDING, HEAD, own_tensors, quantized_names, tensor_shapes

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_CONTEXT = 2**17  # tables of positions are made for the whole context
LARGEST_TABLE = 2**26  # elements of such a table, positions times head_dim; those of real models have 2**24
STATISTICS = "bitnet_lit.weight_statistics"  # key of a safetensors file's metadata
NOTED_STATISTICS = MapOf(ListOf(Number(-LARGEST_NUMBER, LARGEST_NUMBER), length=2))
CHECKED_AT_ONCE = 2**18  # values: they stay in the processor's cache between the passes of a check


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in an open file.

    Attributes:
        descriptor: of the file; open for as long as the reader lives.
        offset: of the first element, in bytes.
        dtype: numpy's name of the elements: "<f4", "<u2" (the bits of bfloat16) or "u1".
    """

    descriptor: int
    offset: int
    dtype: str


class TensorReader(ABC):
    """Tensors of a file by the names of our state dict.

    Attributes:
        metadata: texts that the file carries beside its tensors.
    """

    metadata: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""

    @abstractmethod
    def read(self, name: str) -> NDArray[Any]:
        """A copy of one tensor: any float type as float32, integers as they are."""

    def place(self, name: str) -> Place | None:
        """Where one tensor lies as float32, bfloat16 or bytes; None where it is stored in another way."""
        return None

    def raw(self, name: str) -> NDArray[Any] | None:
        """A copy of one tensor as it is stored: float32, bfloat16 as its bits (uint16), or bytes; None where `place` is
        None."""
        return None


def _check_sizes(config: ModelConfig) -> None:
    """Refuse sizes beyond those of any model, before something is laid out for them.

    Raises:
        UserError: the first of them.
    """
    shapes = field_shapes(type(config))  # type: ignore[arg-type]  # classes are hashable
    for key, shape in shapes.items():
        try:
            shape.check(getattr(config, key), key)
        except Mismatch as error:
            raise UserError(f"{error}: copy it again") from None
    if config.max_position_embeddings < 2:
        raise UserError("max_position_embeddings=1: no room for a token and the one after it: copy it again")
    table = config.head_size * config.max_position_embeddings
    if (
        config.attention_size > LARGEST_SIZE
        or config.max_position_embeddings > LONGEST_CONTEXT
        or table > LARGEST_TABLE
    ):
        raise UserError(
            f"{config.num_attention_heads} heads of {config.head_size}, a context of "
            f"{config.max_position_embeddings}: beyond what a model has: copy it again"
        )


@dataclass
class StoredModel:
    """One model on disk.

    Attributes:
        path: the folder or file.
        config, quant: what it is.
        tokenizer: None where there is none.
        info: what training noted; plain data.
        reader: the tensors as they are stored.
        tokenizer_sha256: of the tokenizer that it was trained with, in hex; None where the folder does not say.
        inverse_scales: packed weights whose stored scale divides (Hugging Face's `bitlinear`).
        tensors: name to shape of everything that the network needs, in the network's order, what a scheme's layers have
            of their own behind it; a tied head is left out.
        quantized: names of the weights that are codes and a scale in the forward pass.
    """

    path: Path
    config: ModelConfig
    quant: QuantConfig
    tokenizer: Tokenizer | None
    info: dict[str, Any]
    reader: TensorReader
    inverse_scales: bool = False
    tokenizer_sha256: str | None = None
    tensors: dict[str, tuple[int, ...]] = field(init=False)
    quantized: set[str] = field(init=False)

    def __post_init__(self) -> None:
        stored = self.reader.shapes()
        try:
            _check_sizes(self.config)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        layers = {name.split(".")[2] for name in stored if name.startswith("model.layers.")}
        if len(layers) != self.config.num_hidden_layers:
            # Said before a network of that many layers is laid out.
            raise UserError(
                f"{self.path}: the weights have {len(layers)} layers, the config says {self.config.num_hidden_layers}: "
                "they are not of one model"
            )
        self.check_tokenizer()
        self.tensors = {**tensor_shapes(self.config), **own_tensors(self.config, self.quant)}
        self.quantized = quantized_names(self.config, self.quant)
        try:
            for rows, inputs in {self.tensors[name] for name in self.quantized}:
                self.quant.scheme.granularity.scale_shape(rows, inputs)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        self._check(stored)

    def check_tokenizer(self) -> None:
        """Refuse a tokenizer that is not the one the model was trained with, or has more pieces than there are rows.

        Raises:
            UserError: it is of another model.
        """
        expected = self.tokenizer_sha256
        if self.tokenizer is not None and expected not in (None, self.tokenizer.sha256):
            raise UserError(
                f"{self.tokenizer}: not the tokenizer this model was trained with (sha256 "
                f"{self.tokenizer.sha256[:12]}..., {CONFIG_NAME} says {str(expected)[:12]}...): take the right one"
            )
        rows, pieces = self.config.vocab_size or 0, self.tokenizer.vocab_size if self.tokenizer else 0
        if pieces > rows:
            raise UserError(
                f"{self.path}: the tokenizer has {pieces} pieces, the model's vocab_size is {rows}: they are not of "
                "one model: take the tokenizer that it was trained with"
            )

    def _check(self, stored: dict[str, tuple[int, ...]]) -> None:
        expected = {name: {shape} for name, shape in self.tensors.items()}
        for name in self.quantized & stored.keys():
            if f"{name}_scale" in stored:
                rows, columns = self.tensors[name]
                expected[name].add((rows // self.quant.scheme.codes_per_byte, columns))
                scales = self.quant.scheme.granularity.scale_shape(rows, columns)
                expected[f"{name}_scale"] = {scales} if scales else {(1,), ()}
        if self.config.tie_word_embeddings and HEAD in stored:
            expected[HEAD] = {self.tensors[EMBEDDING]}  # some write a tied matrix twice
        # Older Llama folders hold a table that is computed from the config.
        stored = {name: shape for name, shape in stored.items() if not name.endswith("rotary_emb.inv_freq")}
        for name in [*expected, *stored]:
            if stored.get(name) not in expected.get(name, ()):
                says = " or ".join(map(str, expected.get(name, ()))) or "there is none"
                raise UserError(
                    f"{self.path}: tensor {name} is {stored.get(name, 'missing')} but the config says {says}: they are "
                    "not of one model, or the network has parts that are not known here"
                )

    @property
    def packed(self) -> bool:
        """Whether the projections are stored as codes: such a model runs, and cannot be trained."""
        return any(self.holds_codes(name) for name in self.quantized)

    def holds_codes(self, name: str) -> bool:
        """Whether a quantized weight is stored as codes, packed or plain."""
        return f"{name}_scale" in self.reader.shapes()

    def scale(self, name: str) -> NDArray[np.float32]:
        """The scale that multiplies the stored codes of a weight, in the shape of the scheme's granularity.

        Raises:
            UserError: not positive numbers.
        """
        shape = self.quant.scheme.granularity.scale_shape(*self.tensors[name])
        stored = self.reader.read(f"{name}_scale").astype(np.float32).reshape(shape)
        with np.errstate(all="ignore"):
            scale = np.float32(1) / stored if self.inverse_scales else stored
        wrong = stored[~((scale > 0) & (scale < np.inf))]
        if wrong.size:
            raise UserError(f"{self.path}: tensor {name}_scale is {wrong[0]}: no scale of codes: copy it again")
        return np.asarray(scale)

    def noted_statistics(self, name: str) -> tuple[float, float] | None:
        """Scale and center of a latent weight (`WeightRule.statistics`) as the file notes them beside it;
        None where it does not.

        Means of float32 numbers differ in the last bit with the order of summation, so the trained model's own are
        kept with its weights.
        """
        scale, center = self._statistics.get(name, (0.0, 0.0))
        return (float(scale), float(center)) if scale > 0 else None

    @cached_property
    def _statistics(self) -> dict[str, list[float]]:
        try:
            noted = parse_json(self.reader.metadata.get(STATISTICS, "{}"), self.path, NOTED_STATISTICS, "")
        except UserError:
            return {}  # damaged: they are computed again
        return dict(noted)

    def check_finite(self, name: str, values: NDArray[Any]) -> None:
        """Refuse a tensor with a NaN or an infinity in it: one is enough to turn every logit into NaN.

        Args:
            values: float32, or bfloat16 as its bits (uint16).

        Raises:
            UserError: which tensor, and how many of its values.
        """
        bad = 0
        flat = values.reshape(-1)
        with np.errstate(all="ignore"):
            for start in range(0, flat.size, CHECKED_AT_ONCE):
                part = flat[start : start + CHECKED_AT_ONCE]
                if part.dtype == np.uint16:
                    bad += int(np.count_nonzero((part & 0x7F80) == 0x7F80))
                elif not np.isfinite(part.sum()):  # one pass; large numbers may add up to an infinity too
                    bad += int(np.count_nonzero(~np.isfinite(part)))
        if bad:
            raise UserError(
                f"{self.path}: tensor {name} holds {bad} of {flat.size} values that are no numbers (NaN or infinite): "
                "copy it again, or take an earlier checkpoint of its training"
            )

    def array(self, name: str) -> NDArray[np.float32]:
        """A tensor that is not quantized, or a latent weight; a copy.

        Raises:
            UserError: values in it that are no numbers.
        """
        values = self.reader.read(name).astype(np.float32, copy=False)
        self.check_finite(name, values)
        return values

    def tensor(self, name: str) -> Tensor:
        """`array` as a float32 tensor."""
        import torch

        return torch.from_numpy(self.array(name))

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """A quantized weight as the forward pass uses it.

        Returns:
            codes: int8 (O, I), of the scheme's levels.
            scale: float32, in the shape of the scheme's granularity.

        Raises:
            UserError: stored codes that are none.
        """
        import torch

        from bitnet_lit.quant.packing import unpack_codes

        rule = self.quant.scheme.weights
        assert rule is not None, "a dense model has no codes"
        if not self.holds_codes(name):
            codes, scale = rule.quantize(self.tensor(name))
            return codes.to(torch.int8), scale
        stored = self._stored_codes(name)
        is_packed = stored.shape[0] != self.tensors[name][0]
        return unpack_codes(stored) if is_packed else stored.to(torch.int8), torch.as_tensor(self.scale(name))

    def packed_codes(self, name: str) -> tuple[Tensor, Tensor]:
        """A quantized weight as `PackedBitLinear` keeps it: as it lies in the file, where it lies there packed.

        Returns:
            codes: uint8 (O / 4, I) of ternary schemes, otherwise int8 (O, I); quant/packing.py has the layout.
            scale: float32, in the shape of the scheme's granularity.

        Raises:
            UserError: stored values that are no codes.
        """
        import torch

        from bitnet_lit.quant.packing import stored_codes

        rows, scheme = self.tensors[name][0], self.quant.scheme
        if self.holds_codes(name) and (stored := self._stored_codes(name)).shape[0] == rows // scheme.codes_per_byte:
            packed = stored if scheme.codes_per_byte > 1 else stored.to(torch.int8)
            return packed, torch.as_tensor(self.scale(name))
        codes, scale = self.codes(name)
        return stored_codes(codes, scheme), scale

    def _stored_codes(self, name: str) -> Tensor:
        """Codes as they lie in the file, packed or one in a byte, each checked to be one."""
        import torch

        from bitnet_lit.quant.packing import are_packed_codes

        scheme, stored = self.quant.scheme, torch.from_numpy(self.reader.read(name))
        lowest, highest = (-1, 1) if scheme.is_ternary else (scheme.levels[0], scheme.levels[-1])
        if stored.shape[0] != self.tensors[name][0]:
            if stored.dtype != torch.uint8:
                raise UserError(f"{self.path}: tensor {name} is {stored.dtype}, but packed codes are uint8")
            are_codes = are_packed_codes(stored)
        else:
            are_codes = bool(((stored >= lowest) & (stored <= highest)).all())
        if not are_codes:
            raise UserError(
                f"{self.path}: tensor {name} holds codes that are not in {lowest}..{highest}: copy it again"
            )
        return stored

    def dequantized(self, name: str) -> Tensor:
        """A weight as plain float32 numbers: codes * scale, or what is stored."""
        if name not in self.quantized:
            return self.tensor(name)
        from bitnet_lit.quant.weights import spread_scale

        codes, scale = self.codes(name)
        return codes.float() * spread_scale(scale, codes.shape[1])
