"""`StoredModel` reads a model on disk, in any format, one tensor at a time.

Every format that is read opens to a `StoredModel`: our model folder, Hugging Face's folders, llama2.c's files. It gives
the sizes, the quantization, the tokenizer, and the tensors under the names of `CausalLM.state_dict()`. A dense tensor
is given in float32. A quantized projection is given as the codes and the scale that the forward pass uses, whether the
file holds latent weights or packed codes. So an export needs little memory, and a comparison of two models always
compares codes with codes and scales with scales.

The native engine starts without torch, whose import takes longer than the rest of its start. So opening a model does
not import torch, nor do the methods that return numpy arrays or `noted_statistics`. Methods that return tensors do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.checkpoints.config_json import LARGEST_NUMBER
from bitnet_lit.checkpoints.file_names import CONFIG_NAME
from bitnet_lit.checkpoints.not_finite import count_not_finite
from bitnet_lit.checkpoints.plausible_sizes import check_sizes
from bitnet_lit.checkpoints.tensor_reader import TensorReader
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.data.tokenizers import Tokenizer, missing_before
from bitnet_lit.errors import UserError
from bitnet_lit.files.foreign_json import parse_json
from bitnet_lit.files.json_shapes import ListOf, MapOf, Number
from bitnet_lit.model.tensors import EMBEDDING, HEAD, own_tensors, quantized_names, tensor_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from bitnet_lit.quant.weights import WeightRule

STATISTICS = "bitnet_lit.weight_statistics"  # key of a safetensors file's metadata
NOTED_STATISTICS = MapOf(ListOf(Number(-LARGEST_NUMBER, LARGEST_NUMBER), length=2))


@dataclass
class StoredModel:
    """Gives access to one model on disk.

    Attributes:
        path: the folder or file.
        config, quant: the sizes of the network and its quantization.
        tokenizer: None where there is none.
        info: what training recorded, as plain data.
        reader: reads the tensors as they are stored.
        inverse_scales: whether codes are divided by their stored scale (Hugging Face's `bitlinear`), not multiplied.
        tokenizer_sha256: sha256 of the tokenizer used in training, in hex; None where the folder does not say.
        tensors: name -> shape of each tensor that the network needs, in the network's order, followed by tensors that
            only a scheme's layers have. A tied head is left out.
        quantized: names of the weights that are codes and a scale in the forward pass.
        folded: names of the scheme's own tensors that codes and scales hold too: a packed model has none of them.

    Raises:
        UserError: sizes, tensors and tokenizer do not belong to one model.
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
    folded: set[str] = field(init=False)

    def __post_init__(self) -> None:
        stored = self.reader.shapes()
        check_sizes(self.path, self.config)
        layers = {name.split(".")[2] for name in stored if name.startswith("model.layers.")}
        if len(layers) != self.config.num_hidden_layers:
            # This is checked before memory is used for that many layers.
            raise UserError(
                f"{self.path}: the weights have {len(layers)} layers, the config says {self.config.num_hidden_layers}: "
                "they are not of one model"
            )
        self.check_tokenizer()
        self.quantized = quantized_names(self.config, self.quant)
        own = own_tensors(self.config, self.quant)
        self.folded = set(own) if self.quant.scheme.is_plain else set()
        self.tensors = {**tensor_shapes(self.config), **({} if self.folded and self.packed else own)}
        try:
            for rows, inputs in {self.tensors[name] for name in self.quantized}:
                self.quant.scheme.check_sizes(rows, inputs)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        self._check_tensors(stored)

    def check_tokenizer(self) -> None:
        """Refuse a tokenizer that was not used in training, or that has more pieces than the embedding has rows.

        Raises:
            UserError: the tokenizer belongs to another model.
        """
        expected = self.tokenizer_sha256
        if self.tokenizer is not None and expected not in (None, self.tokenizer.sha256):
            hashes = f"(sha256 {self.tokenizer.sha256[:12]}..., {CONFIG_NAME} says {str(expected)[:12]}...)"
            wrong = f"not the tokenizer this model was trained with {hashes}"
            file = self.tokenizer.path
            if file is not None and file.parent == self.path and (missing := missing_before(file)):
                # An export writes a tokenizer.json beside the tokenizer.model, for `transformers`.
                raise UserError(f"{self.path}: {missing} is missing, and {file.name} is {wrong}: put it there again")
            raise UserError(f"{self.tokenizer}: {wrong}: take the right one")
        rows, pieces = self.config.vocab_size or 0, self.tokenizer.vocab_size if self.tokenizer else 0
        if pieces > rows:
            raise UserError(
                f"{self.path}: the tokenizer has {pieces} pieces, the model's vocab_size is {rows}: they are not of "
                "one model: take the tokenizer that it was trained with"
            )

    def _check_tensors(self, stored: dict[str, tuple[int, ...]]) -> None:
        """Refuse tensors that are missing, of another shape, or unknown."""
        expected = {name: {shape} for name, shape in self.tensors.items()}
        for name in self.quantized & stored.keys():
            if f"{name}_scale" in stored:
                rows, columns = self.tensors[name]
                expected[name].add((rows // self.quant.scheme.codes_per_byte, columns))
                scales = self.quant.scheme.granularity.scale_shape(rows, columns)
                expected[f"{name}_scale"] = {scales} if scales else {(1,), ()}
        if self.config.tie_word_embeddings and HEAD in stored:
            expected[HEAD] = {self.tensors[EMBEDDING]}  # some tools write a tied matrix twice
        # Older Llama folders hold a rotary table, which is computed from the config here.
        stored = {name: shape for name, shape in stored.items() if not name.endswith("rotary_emb.inv_freq")}
        for name in [*expected, *stored]:
            if stored.get(name) not in expected.get(name, ()):
                says = " or ".join(map(str, expected.get(name, ()))) or "there is none"
                raise UserError(
                    f"{self.path}: tensor {name} is {stored.get(name, 'missing')} but the config says {says}: they are "
                    "not of one model, or the network has parts that are not known here"
                )

    @property
    def pieces(self) -> int:
        """How many rows of the vocabulary have a token, the first ones. A padded vocabulary has rows beyond them."""
        return self.config.vocabulary if self.tokenizer is None else self.tokenizer.vocab_size

    @property
    def packed(self) -> bool:
        """Whether the projections are stored as codes; such a model runs but cannot be trained."""
        return any(self.holds_codes(name) for name in self.quantized)

    def holds_codes(self, name: str) -> bool:
        """Return whether a quantized weight is stored as codes, several in a byte or one."""
        return f"{name}_scale" in self.reader.shapes()

    def scale(self, name: str) -> NDArray[np.float32]:
        """Return the scale that multiplies the stored codes of a weight, in the shape of the scheme's granularity.

        Raises:
            UserError: a scale is not positive and finite.
        """
        shape = self.quant.scheme.granularity.scale_shape(*self.tensors[name])
        stored = self.reader.read(f"{name}_scale").astype(np.float32).reshape(shape)
        with np.errstate(all="ignore"):
            scale = np.float32(1) / stored if self.inverse_scales else stored
        wrong = stored[~((scale > 0) & (scale < np.inf))]
        if wrong.size:
            raise UserError(
                f"{self.path}: tensor {name}_scale holds {wrong[0]}, but scales are positive and finite: copy it again"
            )
        return np.asarray(scale)

    def noted_statistics(self, name: str) -> tuple[float, float] | None:
        """Return scale and center of a latent weight (`WeightRule.statistics`) as stored in the file's metadata.

        The result is None where the file does not hold them. Means of float32 numbers differ in the last bit with the
        order of summation, so those of the trained model are stored with its weights.
        """
        scale, center = self._statistics.get(name, (0.0, 0.0))
        return (float(scale), float(center)) if scale > 0 else None

    @cached_property
    def _statistics(self) -> dict[str, list[float]]:
        try:
            noted = parse_json(self.reader.metadata.get(STATISTICS, "{}"), self.path, NOTED_STATISTICS, "")
        except UserError:
            return {}  # damaged metadata: the statistics are computed again
        return dict(noted)

    def check_finite(self, name: str, values: NDArray[Any]) -> None:
        """Refuse a tensor with a NaN or an infinity: one such value can turn every logit into NaN.

        Args:
            name: the tensor's name, for the error message.
            values: as `count_not_finite` takes them.

        Raises:
            UserError: some values are not finite; the message says how many.
        """
        bad = count_not_finite(values)
        if bad:
            raise UserError(
                f"{self.path}: tensor {name} holds {bad} of {values.size} values that are not finite (NaN, infinite): "
                "copy it again, or take an earlier checkpoint of its training"
            )

    def array(self, name: str) -> NDArray[np.float32]:
        """Return a copy of a tensor that is not quantized, or of a latent weight, as float32.

        Raises:
            UserError: it holds values that are not finite.
        """
        values = self.reader.read(name).astype(np.float32, copy=False)
        self.check_finite(name, values)
        return values

    def tensor(self, name: str) -> Tensor:
        """Return `array` as a float32 tensor."""
        import torch

        return torch.from_numpy(self.array(name))

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a quantized weight as the forward pass uses it.

        Returns:
            codes: int8 (O, I), each one of the scheme's levels.
            scale: float32, in the shape of the scheme's granularity.

        Raises:
            UserError: stored codes or scales are not valid.
        """
        import torch

        from bitnet_lit.quant.packing import unpack_codes

        codes, scale = self._codes_as_stored(name)
        return unpack_codes(codes) if codes.dtype == torch.uint8 else codes, scale

    def rule(self, name: str) -> WeightRule:
        """Return the rule that rounds a latent weight, with what its layer has learned (`Scheme.rule_with`)."""
        scheme, layer = self.quant.scheme, name.removesuffix("weight")
        rule = scheme.rule_with({own: self.tensor(layer + own) for own in scheme.own_tensors(*self.tensors[name])})
        assert rule is not None, "a dense model has no codes"
        return rule

    def packed_codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a quantized weight as `PackedBitLinear` keeps it; packed codes of the file are not unpacked.

        Returns:
            codes: uint8 (O / 4, I) or int8 (O, I), as `packing.stored_codes` returns them.
            scale: float32, in the shape of the scheme's granularity.

        Raises:
            UserError: stored codes or scales are not valid.
        """
        import torch

        from bitnet_lit.quant.packing import stored_codes

        codes, scale = self._codes_as_stored(name)
        return codes if codes.dtype == torch.uint8 else stored_codes(codes, self.quant.scheme), scale

    def _codes_as_stored(self, name: str) -> tuple[Tensor, Tensor]:
        """Return codes and scale: codes are uint8 (O / 4, I) where the file packs them, otherwise int8 (O, I)."""
        import torch

        if self.holds_codes(name):
            return self._stored_codes(name), torch.as_tensor(self.scale(name))
        codes, scale = self.rule(name).quantize(self.tensor(name))
        return codes.to(torch.int8), scale

    def _stored_codes(self, name: str) -> Tensor:
        """Read the codes of a file, as `_codes_as_stored` returns them, and check that each is valid."""
        import torch

        from bitnet_lit.quant.packing import are_packed_codes

        scheme, stored = self.quant.scheme, torch.from_numpy(self.reader.read(name))
        lowest, highest = (-1, 1) if scheme.is_ternary else (scheme.levels[0], scheme.levels[-1])
        if is_packed := stored.shape[0] != self.tensors[name][0]:
            if stored.dtype != torch.uint8:
                raise UserError(f"{self.path}: tensor {name} is {stored.dtype}, but packed codes are uint8")
            are_codes = are_packed_codes(stored)
        else:
            are_codes = bool(((stored >= lowest) & (stored <= highest) & (stored == stored.round())).all())
        if not are_codes:
            raise UserError(
                f"{self.path}: tensor {name} holds codes that are not in {lowest}..{highest}: copy it again"
            )
        return stored if is_packed else stored.to(torch.int8)

    def dequantized(self, name: str) -> Tensor:
        """Return a weight in float32: codes * scale for a quantized weight, otherwise the stored values."""
        if name not in self.quantized:
            return self.tensor(name)
        from bitnet_lit.quant.weights import spread_scale

        codes, scale = self.codes(name)
        return codes.float() * spread_scale(scale, codes.shape[1])
