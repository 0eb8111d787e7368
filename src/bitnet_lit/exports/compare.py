"""Every export is read back and compared with the model it was written from before it is kept.

There are three comparisons, from exact to loose:

1. Tensors are compared one by one. Codes must be equal. Scales and dense tensors must be equal up to the rounding of
   the type that they are stored in.
2. Our own network computes the logits of a fixed text, with the original's weights and with the export's. Both run
   layer by layer, so that a model that does not fit into memory can be checked.
3. The tool that the export is for (`transformers`, llama.cpp) computes the logits too, where it is installed and the
   model is small enough.
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
from bitnet_lit.model.layers import DecoderLayer, rotary_tables
from bitnet_lit.model.normed_linears import RMSNorm
from bitnet_lit.model.tensors import EMBEDDING, HEAD
from bitnet_lit.quant import convert_linears

TEXT_TOKENS = 256
ROWS_AT_ONCE = 1024
WHOLE_MODEL_BYTES = 2 * 2**30  # float32 weights; larger models are not run in another tool

# Rounding a scale or the embedding changes some int8 codes of the activations. On trained models this changed the
# logits by less than 0.02 of their standard deviation in the mean, and the loss by less than 0.002 (measured). A wrong
# row order, activation or scale changed both by more than 0.3. A network can amplify rounding errors (large random
# weights do), so that the rounding of the file alone changes more. Another tool may then differ by three times that
# change, and the comparison of tensors decides.
LOGIT_ERROR, LOSS_ERROR = 0.1, 0.02
CHAOS = 3.0
ROUNDING_LOGIT_ERROR, ROUNDING_LOSS_ERROR = 0.5, 0.5


def _trim_heap() -> None:
    """Return freed memory to the system: glibc keeps it in pieces too small for the next large tensor."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def fixed_ids(stored: StoredModel, length: int = TEXT_TOKENS) -> Tensor:
    """Return the token ids that an export is compared on: demo stories, or random ids where there is no tokenizer.

    Returns:
        int64 (1, T); T is at most `length` and the model's context. The ids are the same in every call.
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
    """Compute logits with one layer in memory at a time.

    Args:
        ids: int64 (B, T).
        float_activations: run the dequantized weights as a dense network, as tools without quantized activations do.

    Returns:
        float32 (B, T, V).
    """
    config = stored.config
    x = x0 = stored.tensor(EMBEDDING)[ids]
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
        x = layer.eval()(x, cos, sin, x0_BTD=x0, ids_BT=ids)
        _trim_heap()
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight.copy_(stored.tensor("model.norm.weight"))
    return norm(x) @ stored.tensor(HEAD if HEAD in stored.tensors else EMBEDDING).T


def loss_of(logits: Tensor, ids: Tensor) -> float:
    """Return the loss of a text in nats per token; float32 (B, T, V), int64 (B, T)."""
    return float(next_token_loss(logits[:, :-1], ids[:, 1:]))


def largest_error(expected: Tensor, stored: Tensor) -> float:
    """Return the largest difference divided by the largest expected magnitude, in little memory."""
    low, high = map(float, expected.aminmax())
    parts = zip(expected.split(ROWS_AT_ONCE), stored.split(ROWS_AT_ONCE), strict=True)
    # Python's `max` would lose a NaN, which must not count as equal. One number is kept rather than one for each part:
    # small tensors that outlive a part keep the heap from reusing the memory of the part.
    worst = torch.zeros(())
    for a, b in parts:
        torch.maximum(worst, (a - b).abs_().max(), out=worst)
    return float(worst) / (max(-low, high) or 1.0)


def compare_tensors(stored: StoredModel, artefact: StoredModel, rows: list[WrittenTensor]) -> None:
    """Compare the tensors of two models and set `error` in each of `rows`.

    Raises:
        ParityError: codes differ, or an error is larger than the rounding of the type.
    """
    for row in rows:
        _trim_heap()
        if row.name in stored.quantized and artefact.quant.scheme.quantizes:
            codes, scale = stored.codes(row.name)
            found, found_scale = artefact.codes(row.name)
            if differing := int((codes != found).sum()):
                raise ParityError(f"{row.name}: {differing} of {codes.numel()} codes differ")
            error = (found_scale / scale - 1).abs()
            if scale.ndim:  # a row or group of zeros does not use its scale, and not every format keeps it
                error = error[codes.unflatten(1, (scale.shape[1], -1)).any(-1)]
            row.error = float(error.max()) if error.numel() else 0.0
        else:
            row.error = largest_error(stored.dequantized(row.name), artefact.tensor(row.name))
        if not row.error <= row.bound:
            raise ParityError(
                f"{row.name}: error {row.error:.3g} of its largest value, but {row.kind} rounds at most {row.bound:.3g}"
            )


def _differences(
    name: str, ours: Tensor, theirs: Tensor, ids: Tensor, logit_bound: float, loss_bound: float
) -> dict[str, float]:
    """Compare two sets of logits of the same text; float32 (B, T, V).

    Returns:
        The loss of `theirs`, and the differences of losses (nats per token) and logits (standard deviations).

    Raises:
        ParityError: a difference is larger than its bound.
    """
    spread = float(ours.std()) or 1.0  # all-zero weights give equal logits
    difference = (ours - theirs).abs_()
    figures = {
        "loss": loss_of(theirs, ids),
        "loss_difference": loss_of(theirs, ids) - loss_of(ours, ids),
        "mean_logit_difference": float(difference.mean()) / spread,
        "max_logit_difference": float(difference.max()) / spread,
        "same_likeliest_token": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }
    close = figures["mean_logit_difference"] <= logit_bound and abs(figures["loss_difference"]) <= loss_bound
    if not close:  # also where a value is NaN
        raise ParityError(
            f"{name}: logits differ by {figures['mean_logit_difference']:.3g} of their spread (at most "
            f"{logit_bound:.3g}), loss by {figures['loss_difference']:.3g} (at most {loss_bound:.3g})"
        )
    return figures


def _run_tool(tool: Tool, stored: StoredModel, artefact: StoredModel) -> Tensor | str:
    """Return the logits that another tool computes from the export, or text that says why it was not run."""
    size = 4 * sum(math.prod(shape) for shape in stored.tensors.values())
    if not installed(*tool.packages):
        return "not installed"
    if size > WHOLE_MODEL_BYTES:
        return f"not run: {size / 2**30:.1f} GiB of float32 weights"
    try:
        return tool.logits(artefact.path, fixed_ids(stored))
    except ImportError as error:  # a package that it needs is missing
        return f"not installed ({error.name or type(error).__name__})"  # the message can hold paths
    except Exception as error:  # any exception means that the tool cannot run the file
        reason = one_line(error, 200)
        raise ParityError(f"{tool.name} cannot run it: {type(error).__name__}: {reason}") from None


def verify(
    stored: StoredModel, artefact: StoredModel, rows: list[WrittenTensor], tool: Tool | None
) -> dict[str, object]:
    """Compare an export with the model it was written from.

    Args:
        artefact: the export as it was read back.
        rows: the rows of the report's table; `error` is set in each.
        tool: another tool that computes this model; None where there is none.

    Returns:
        The comparison of logits for each reader, as plain data.

    Raises:
        ParityError: they differ by more than rounding explains.
    """
    compare_tensors(stored, artefact, rows)
    ids = fixed_ids(stored)
    # A target without quantized activations is compared with the dense network that it runs.
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
