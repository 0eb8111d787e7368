"""The parity gate: a written artefact is read back and compared with the model it came from.

Three comparisons, from exact to loose:

1. Tensor by tensor: codes must be equal, scales and dense tensors equal up to the rounding of the type they were stored
   in.
2. Logits on a fixed text, by our own network, once with the original's weights and once with the artefact's. Both are
   run layer by layer, so that a model that does not fit into memory can be checked.
3. Where it is installed and the model is small enough, the tool that the artefact is for: `transformers`, llama.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from itertools import islice

import torch
from torch import Tensor, nn

from bitnet_lit.checkpoints.formats.format import Tool, WrittenTensor
from bitnet_lit.checkpoints.pretrained import fill
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.data.sources.demo import demo_stories
from bitnet_lit.errors import ParityError, one_line
from bitnet_lit.extras import installed
from bitnet_lit.model import next_token_loss
from bitnet_lit.model.layers import DecoderLayer, RMSNorm, rotary_tables
from bitnet_lit.model.tensors import EMBEDDING, HEAD
from bitnet_lit.quant import convert_linears

TEXT_TOKENS = 256
ROWS_AT_ONCE = 1024
WHOLE_MODEL_BYTES = 2 * 2**30  # larger models are not loaded whole into another tool to be checked

# A rounding of a scale or of the embedding moves some activations over a rounding border of their int8 codes. Seen on
# trained models: mean |difference| below 0.02 of the logits' spread, loss within 0.002; a wrong row order, activation
# or scale moves both by more than 0.3. A network can be chaotic (large random weights are), so that the rounding of the
# file alone moves more: another tool may then differ by three times what it moves, and the comparison of tensors binds.
LOGIT_ERROR, LOSS_ERROR = 0.1, 0.02
CHAOS = 3.0
ROUNDING_LOGIT_ERROR, ROUNDING_LOSS_ERROR = 0.5, 0.5


def _trim_heap() -> None:
    """Give what was freed back to the system: glibc keeps it, in pieces too small for the next large tensor."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def fixed_ids(stored: StoredModel, length: int = TEXT_TOKENS) -> Tensor:
    """The text that every export is compared on: demo stories, or fixed random ids where there is no tokenizer.

    Returns:
        int64 (1, T), T at most `length` and the context.
    """
    length = min(length, stored.config.max_position_embeddings)
    if stored.tokenizer is None:
        vocabulary = stored.config.vocab_size or 1
        return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    ids: list[int] = []
    for story in islice(demo_stories(1000), 1000):
        ids += stored.tokenizer.encode(story)
        if len(ids) >= length:
            break
    return torch.tensor([ids[:length]])


@torch.inference_mode()
def layerwise_logits(stored: StoredModel, ids: Tensor, float_activations: bool = False) -> Tensor:
    """Logits with one layer in memory at a time; int64 (B, T) -> float32 (B, T, V).

    Args:
        float_activations: run the dequantized weights as a dense network, as tools without quantized activations do.
    """
    config = stored.config
    x = stored.tensor(EMBEDDING)[ids]
    cos, sin = (table[: ids.shape[1]] for table in rotary_tables(config))
    for index in range(config.num_hidden_layers):
        with torch.device("meta"):
            layer = DecoderLayer(config, index)
        prefix = f"model.layers.{index}."
        if float_activations:
            for name in dict(layer.named_parameters()):
                owner, _, leaf = name.rpartition(".")
                weight = stored.dequantized(prefix + name)
                setattr(layer.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
        else:
            convert_linears(layer, stored.quant)
            fill(layer, stored, prefix)
        x = layer.eval()(x, cos, sin)
        _trim_heap()
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight.copy_(stored.tensor("model.norm.weight"))
    return norm(x) @ stored.tensor(HEAD if HEAD in stored.tensors else EMBEDDING).T


def loss_of(logits: Tensor, ids: Tensor) -> float:
    """Nats per token of the text under its own logits."""
    return float(next_token_loss(logits[:, :-1], ids[:, 1:]))


def largest_error(expected: Tensor, stored: Tensor) -> float:
    """Largest difference over the largest magnitude; some rows at a time, for the sake of memory."""
    low, high = map(float, expected.aminmax())
    parts = zip(expected.split(ROWS_AT_ONCE), stored.split(ROWS_AT_ONCE), strict=True)
    # `max` of Python would lose a NaN, which must not pass for equal. One number is kept rather than one for each part:
    # small ones that outlive a part keep the heap from reusing its memory.
    worst = torch.zeros(())
    for a, b in parts:
        torch.maximum(worst, (a - b).abs_().max(), out=worst)
    return float(worst) / (max(-low, high) or 1.0)


def compare_tensors(stored: StoredModel, artefact: StoredModel, rows: list[WrittenTensor]) -> None:
    """Fill in the errors of `rows`.

    Raises:
        ParityError: codes that differ, or an error beyond what the type rounds.
    """
    for row in rows:
        _trim_heap()
        if row.name in stored.quantized and artefact.quant.scheme.quantizes:
            codes, scale = stored.codes(row.name)
            found, found_scale = artefact.codes(row.name)
            if differing := int((codes != found).sum()):
                raise ParityError(f"{row.name}: {differing} of {codes.numel()} codes differ")
            error = (found_scale / scale - 1).abs()
            if scale.ndim:  # a row or group of zeros multiplies its scale by nothing, and not every format keeps it
                error = error[codes.unflatten(1, (scale.shape[1], -1)).any(-1)]
            row.error = float(error.max()) if error.numel() else 0.0
        else:
            row.error = largest_error(stored.dequantized(row.name), artefact.tensor(row.name))
        if not row.error <= row.bound:
            raise ParityError(
                f"{row.name}: error {row.error:.3g} of its largest value, {row.kind} rounds {row.bound:.3g}"
            )


def _differences(
    name: str, ours: Tensor, theirs: Tensor, ids: Tensor, logit_bound: float, loss_bound: float
) -> dict[str, float]:
    """Figures of two sets of logits, checked.

    Raises:
        ParityError: they are not of the same model.
    """
    spread = float(ours.std()) or 1.0  # logits that are all equal, as those of zero weights are, have none
    difference = (ours - theirs).abs_()
    figures = {
        "loss": loss_of(theirs, ids),
        "loss_difference": loss_of(theirs, ids) - loss_of(ours, ids),
        "mean_logit_difference": float(difference.mean()) / spread,
        "max_logit_difference": float(difference.max()) / spread,
        "same_likeliest_token": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }
    close = figures["mean_logit_difference"] <= logit_bound and abs(figures["loss_difference"]) <= loss_bound
    if not close:  # also when a figure is no number
        raise ParityError(
            f"{name}: logits differ by {figures['mean_logit_difference']:.3g} of their spread (at most "
            f"{logit_bound:.3g}), loss by {figures['loss_difference']:.3g} (at most {loss_bound:.3g})"
        )
    return figures


def _run_tool(tool: Tool, stored: StoredModel, artefact: StoredModel) -> Tensor | str:
    """Logits of another tool that runs the artefact, or why there are none."""
    size = 4 * sum(math.prod(shape) for shape in stored.tensors.values())
    if not installed(*tool.packages):
        return "not installed"
    if size > WHOLE_MODEL_BYTES:
        return f"not run: {size / 2**30:.1f} GiB of float32 weights"
    try:
        return tool.logits(artefact.path, fixed_ids(stored))
    except ImportError as error:  # a part of it is missing
        return f"not installed ({error.name or type(error).__name__})"  # its message can hold paths
    except Exception as error:  # whatever it raises: a file that it cannot run is none for it
        reason = one_line(error, 200)
        raise ParityError(f"{tool.name} cannot run it: {type(error).__name__}: {reason}") from None


def verify(
    stored: StoredModel, artefact: StoredModel, rows: list[WrittenTensor], tool: Tool | None
) -> dict[str, object]:
    """Compare a written artefact with the model it was written from.

    Args:
        artefact: the file or folder as it was read back.
        rows: of the table; their errors are filled in.
        tool: another tool that computes this model; None where none does.

    Returns:
        Figures for each reader, plain data.

    Raises:
        ParityError: they differ.
    """
    compare_tensors(stored, artefact, rows)
    ids = fixed_ids(stored)
    # A target without quantized activations is compared with the network it will run.
    dense = stored.quant.scheme.quantizes and not artefact.quant.scheme.quantizes
    ours = layerwise_logits(stored, ids, float_activations=dense)
    read_back = layerwise_logits(artefact, ids)
    rounding = _differences("read back", ours, read_back, ids, ROUNDING_LOGIT_ERROR, ROUNDING_LOSS_ERROR)
    figures: dict[str, object] = {"text_tokens": ids.shape[1], "loss": loss_of(ours, ids), "bitnet_lit": rounding}
    logit_bound = max(LOGIT_ERROR, CHAOS * rounding["mean_logit_difference"])
    loss_bound = max(LOSS_ERROR, CHAOS * abs(rounding["loss_difference"]))
    if dense:
        quantized = layerwise_logits(stored, ids)
        figures["loss_with_quantized_activations"] = loss_of(quantized, ids)
    if tool is not None:
        result = _run_tool(tool, stored, artefact)
        if isinstance(result, str):
            figures[tool.name] = result
        else:
            figures[tool.name] = _differences(tool.name, ours, result, ids, logit_bound, loss_bound)
    return figures
