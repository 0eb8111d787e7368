"""A model on disk as a source of tensors, whatever wrote it: one tensor at a time, by one set of names.

Every door in opens to a `Source`: our model folder, Hugging Face's folders, llama2.c's files. It gives sizes,
quantization, tokenizer, and tensors by the names of `CausalLM.state_dict()`: a dense tensor in float32, a quantized
projection as the codes and the scale that the forward pass uses, whether the file holds latent weights or packed
codes. So an export streams, and what is compared in the end is always (codes, scale) against (codes, scale).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.data.tokenizer import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.model import CausalLM, build_model
from bitnet_lit.quant import BitLinear, PackedBitLinear
from bitnet_lit.quant.functional import quantize_weight
from bitnet_lit.quant.packing import CODES_PER_BYTE, unpack_codes

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LARGEST_SIZE = 2**24  # of any axis; what a damaged file says beyond it must not ask for memory
LARGEST_NUMBER = 2.0**100  # a float32
LONGEST_CONTEXT = 2**17  # tables of positions are made for the whole context


class TensorReader(Protocol):
    """Tensors of a file by the names of our state dict."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in."""


class SafetensorsReader:
    """One safetensors file, or the several that an index names.

    Raises:
        UserError: a file that is missing or damaged.
    """

    def __init__(self, files: list[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    self._file_of[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """One tensor; the file is opened for it alone, so that its pages are given back with it."""
        with _opened(self._file_of[name]) as file:
            return file.get_tensor(name)


class _opened:
    """`safe_open` with a user's errors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            self._file = safe_open(self.path, framework="pt")
            return self._file.__enter__()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read ({error.strerror or error}): is this a model folder?"
            ) from None
        except SafetensorError as error:
            raise UserError(
                f"{self.path}: damaged or not a safetensors file ({error}): copy or export it again"
            ) from None

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)


def safetensors_files(folder: Path) -> list[Path]:
    """The weights of a Hugging Face folder: model.safetensors, or the files that model.safetensors.index.json names.

    Raises:
        UserError: neither, or an index that cannot be read.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no file of this folder")
        return [folder / name for name in names]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: cannot be used ({type(error).__name__}: {error}): copy it again") from None


def _check_types(config: ModelConfig | QuantConfig) -> None:
    """Refuse values that a config.json can hold and a config cannot: `true` for a number, NaN, 10**12 layers.

    Raises:
        UserError: the first of them.
    """
    for key, kind in get_type_hints(type(config)).items():
        value, options = getattr(config, key), get_args(kind) or (kind,)
        if kind == list[str]:
            fits = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        elif int in options:
            fits = value is None if type(None) in options else False
            fits = fits or (type(value) is int and value <= LARGEST_SIZE)
        elif kind is float:
            fits = type(value) in (int, float) and abs(value) < LARGEST_NUMBER
        else:
            fits = isinstance(value, kind)
        if not fits:
            raise UserError(f"{key}={value!r}: no value for it, or beyond what a model has: copy it again")


@dataclass
class Source:
    """One model on disk.

    Attributes:
        path: the folder or file.
        config, quant: what it is.
        tokenizer: None where there is none.
        info: what training noted; plain data.
        reader: the tensors as they are stored.
        inverse_scales: packed weights whose stored scale divides (Hugging Face's `bitlinear`).
        tensors: name to shape of everything that the network needs, in the network's order; a tied head is left out.
        quantized: names of the weights that are codes and a scale in the forward pass.
    """

    path: Path
    config: ModelConfig
    quant: QuantConfig
    tokenizer: Tokenizer | None
    info: dict[str, Any]
    reader: TensorReader
    inverse_scales: bool = False
    tensors: dict[str, tuple[int, ...]] = field(init=False)
    quantized: set[str] = field(init=False)

    def __post_init__(self) -> None:
        stored = self.reader.shapes()
        try:
            _check_types(self.config)
            _check_types(self.quant)
            if self.config.attention_size > LARGEST_SIZE or self.config.max_position_embeddings > LONGEST_CONTEXT:
                raise UserError(
                    f"{self.config.num_attention_heads} heads of {self.config.head_size}, a context of "
                    f"{self.config.max_position_embeddings}: beyond what a model has: copy it again"
                )
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        layers = {name.split(".")[2] for name in stored if name.startswith("model.layers.")}
        if len(layers) != self.config.num_hidden_layers:
            # Said before a network of that many layers is laid out.
            raise UserError(
                f"{self.path}: the weights have {len(layers)} layers, the config says {self.config.num_hidden_layers}: "
                "they are not of one model"
            )
        network = build_model(self.config, self.quant, device="meta")
        self.tensors = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        if self.config.tie_word_embeddings:
            del self.tensors[HEAD]
        linears = {f"{name}.weight" for name, m in network.named_modules() if isinstance(m, BitLinear)}
        self.quantized = linears & self.tensors.keys()  # a tied head has no weight of its own
        self._check(stored)

    def _check(self, stored: dict[str, tuple[int, ...]]) -> None:
        expected = {name: {shape} for name, shape in self.tensors.items()}
        for name in self.quantized & stored.keys():
            if f"{name}_scale" in stored:
                rows, columns = self.tensors[name]
                expected[name].add((rows // CODES_PER_BYTE, columns))
                expected[f"{name}_scale"] = {(1,), ()}
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
        return any(f"{name}_scale" in self.reader.shapes() for name in self.quantized)

    def tensor(self, name: str) -> Tensor:
        """A tensor that is not quantized, or a latent weight: float32."""
        return self.reader.read(name).float()

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """A quantized weight as the forward pass uses it.

        Returns:
            codes: int8 (O, I), in {-1, 0, +1}.
            scale: float32 (); weight ~= codes * scale.

        Raises:
            UserError: stored codes that are none.
        """
        if f"{name}_scale" not in self.reader.shapes():
            codes, scale = quantize_weight(self.tensor(name), self.quant)
            return codes.to(torch.int8), scale
        stored, scale = self.reader.read(name), self.tensor(f"{name}_scale").reshape(())
        if stored.shape[0] != self.tensors[name][0]:
            if stored.dtype != torch.uint8:
                raise UserError(f"{self.path}: tensor {name} is {stored.dtype}, but packed codes are uint8")
            stored = unpack_codes(stored)
        if not bool(((stored >= -1) & (stored <= 1)).all()) or not 0 < float(scale) < float("inf"):
            raise UserError(f"{self.path}: tensor {name} holds no ternary codes with a scale: copy it again")
        return stored.to(torch.int8), 1.0 / scale if self.inverse_scales else scale

    def dequantized(self, name: str) -> Tensor:
        """A weight as plain float32 numbers: codes * scale, or what is stored."""
        if name not in self.quantized:
            return self.tensor(name)
        codes, scale = self.codes(name)
        return codes.float() * scale


def fill(module: nn.Module, source: Source, prefix: str = "") -> nn.Module:
    """Give a module made on the meta device its weights.

    Args:
        module: part of the network of `source`, or the whole; latent projections stay trainable, packed ones become
            `PackedBitLinear`.
        prefix: of the module's names in the network ("model.layers.3.").
    """
    for name, layer in list(module.named_modules()):
        weight = f"{prefix}{name}.weight"
        if source.packed and isinstance(layer, BitLinear) and weight in source.quantized:
            bias = None if layer.bias is None else source.tensor(f"{prefix}{name}.bias")
            module.set_submodule(name, PackedBitLinear.from_codes(*source.codes(weight), bias, layer.quant))
    for name in _parameter_names(module):
        if prefix + name in source.tensors:
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(source.tensor(prefix + name))
            setattr(module.get_submodule(owner), leaf, parameter)
    return module


def _parameter_names(module: nn.Module) -> Iterator[str]:
    for name, _ in list(module.named_parameters()):
        yield name


@dataclass
class LoadedModel:
    """A model in memory.

    Attributes:
        path: where it came from.
        model: weights loaded, in eval mode.
        packed: its projections are codes: it runs, and cannot be trained.
        quant, tokenizer, info: as in `Source`.
    """

    path: Path
    model: CausalLM
    quant: QuantConfig
    tokenizer: Tokenizer | None
    info: dict[str, Any]
    packed: bool

    @property
    def config(self) -> ModelConfig:
        """The sizes."""
        return self.model.config


def load(source: Source) -> LoadedModel:
    """Build the network of `source` with its weights; nothing is initialised first."""
    model = build_model(source.config, source.quant, device="meta")
    fill(model, source)
    model.tie_weights()
    model.model.reset_rotary()
    model.eval()
    return LoadedModel(source.path, model, source.quant, source.tokenizer, source.info, source.packed)
