"""A CUDA graph replays the kernels of a step's forward and backward pass with one launch.

Kernels of a small network take a few microseconds each, and starting one from Python takes as long, so the GPU waits
for the host. A graph records the pass once and replays it for every batch: the batch is copied into the recorded input,
and the gradients appear in the tensors that were recorded as theirs. Clipping and the optimizer run after it as usual;
Muon has a graph of its own (recorded_moves.py).

The gradients of a step of one batch are the results of the recorded pass, in the graph's memory: nothing is set to zero
or added up, which would read and write all of them once more. Where several batches or ranks add up to a step, the
gradients lie together in memory of their own.

What a graph records must not change: shapes, the network's structure, and where tensors lie. So the first steps run
without it (they compile, and choose algorithms), and `records_graph` says where it is left out. Dropout stays random: a
replay takes the state of PyTorch's generator as a plain pass does.

With several ranks (DDP) the graph computes the gradients of this rank, and then one call averages all of them over the
ranks.

A run records on a stream of its own. PyTorch would take one stream for all graphs of a process, on the GPU of the first
of them, and products take their workspace by the stream: that of a second graph would lie in the memory of the first,
which is gone when the first one is (PyTorch 2.12 and later, github.com/pytorch/pytorch/issues/193402).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitnet_lit.config import ModelConfig, TrainConfig
from bitnet_lit.errors import one_line
from bitnet_lit.quant.kernels.choose import are_unobserved
from bitnet_lit.training.plan import Plan, memory_estimate_bytes
from bitnet_lit.training.sharing import world_size

FIRST_STEPS = 3
"""Batches that are trained on before the pass is recorded."""
LARGEST_SHARE = 1 / 2
"""The largest share of the GPU's memory that a recorded run may need by its plan. A graph keeps the memory of its pass
(887 M parameters, 8 x 2048 tokens: 31.7 GiB were reserved in all, and 30.6 without a graph), so validations and samples
need theirs beside it."""
_ALIGNMENT = 64  # elements, between the gradients in their common memory


def records_graph(config: TrainConfig, plan: Plan, device: torch.device) -> bool:
    """Return whether the run records its steps.

    It does not for a network of the user's own, which may read numbers from the device; with gradient checkpointing,
    which saves the generator's state in the pass; with anomaly detection, which reads every gradient; and where FSDP
    gathers the weights anew in each pass.
    """
    if config.cuda_graph == "false" or device.type != "cuda" or not isinstance(config.model, ModelConfig):
        return False
    if config.model.gradient_checkpointing or config.trainer.detect_anomaly or config.trainer.strategy == "fsdp":
        return False
    if config.cuda_graph == "true":
        return True
    return memory_estimate_bytes(config, plan) < LARGEST_SHARE * torch.cuda.get_device_properties(device).total_memory


def agreed(flag: bool, device: torch.device) -> bool:
    """Return whether a flag is true on every rank. Every rank must call this function; it waits for the others."""
    if world_size() == 1:
        return flag
    lowest = torch.tensor(int(flag), device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return bool(lowest)


class RecordingFailed(RuntimeError):
    """Reports a pass that cannot be recorded, for example because it reads a number from the device."""


class GraphedStep:
    """The forward and backward pass over a batch, recorded at the first call after `FIRST_STEPS`.

    Args:
        loss_of: maps a batch, int64 (B, T + 1), to its loss.
        model: its parameters get the gradients.
        num_batches: batches of an optimizer step, whose mean the gradients are of.
        dtype: autocast's dtype; None for no autocast.
        stream: the pass is recorded on it. It belongs to this run, and to the device of its batches.
    """

    def __init__(
        self,
        loss_of: Callable[[Tensor], Tensor],
        model: nn.Module,
        num_batches: int,
        dtype: torch.dtype | None,
        stream: torch.cuda.Stream,
    ) -> None:
        self._loss_of, self._model, self._num_batches, self._dtype = loss_of, model, num_batches, dtype
        self._stream = stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self._memory: Tensor | None = None  # of all gradients, where something is added to them
        self._seen = 0

    def is_due(self, batch: Tensor, is_first: bool) -> bool:
        """Count a batch, and return whether the graph computes it (and is recorded before).

        Args:
            is_first: whether this is the first batch of an optimizer step. A graph begins with one.
        """
        self._seen += 1
        if self._graph is None:
            return is_first and self._seen > FIRST_STEPS
        return batch.shape == self._batch.shape

    def __call__(self, batch: Tensor, is_first: bool, is_last: bool) -> Tensor:
        """Compute the loss of a batch, float32 (), and add its gradients to the parameters.

        The loss is overwritten at the next call.

        Args:
            is_first: whether this is the first batch of an optimizer step, at which the gradients start at zero.
            is_last: whether this is the last one, after which the gradients are averaged over the ranks.

        Raises:
            RecordingFailed: the pass cannot be recorded. Nothing has been computed.
        """
        if self._graph is None:
            graph, why = None, "another rank could not record it"
            if _has_hooks(self._model):
                why = "a hook watches the network, and a replay would not call it"
            else:
                try:
                    graph = self._record(batch)
                except RuntimeError as error:
                    _reset_generator(batch.device)
                    why = one_line(error, 300)
            if not agreed(graph is not None, batch.device):
                raise RecordingFailed(why)
            self._graph = graph
        assert self._graph is not None
        self._batch.copy_(batch)
        if is_first:
            for parameter, gradient in self._gradients:
                parameter.grad = gradient  # a validation takes the gradients away
            if self._memory is not None:
                self._memory.zero_()
        self._graph.replay()
        if is_last and world_size() > 1:
            dist.all_reduce(self._memory, op=dist.ReduceOp.AVG)
        return self._loss

    def _record(self, batch: Tensor) -> torch.cuda.CUDAGraph:
        self._batch = batch.clone()
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.grad = None  # those of the step before would lie beside the new ones
        gradients: list[Tensor | None] = [None] * len(parameters)
        if self._num_batches > 1 or world_size() > 1:
            self._memory, gradients = _together(parameters)
        graph = torch.cuda.CUDAGraph()
        # Autocast's cache of weights in bfloat16 must not outlive the recording.
        autocast = torch.autocast("cuda", dtype=self._dtype, enabled=self._dtype is not None, cache_enabled=False)
        # The thread that reads batches goes on with its own CUDA calls meanwhile.
        recording = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        with _aliases(self._model, parameters, gradients) as aliases, autocast, recording:
            loss = self._loss_of(self._batch)
            (loss / self._num_batches).backward()
            self._loss = loss.detach()
        # Where there was no gradient before, that of the pass itself is the parameter's. It lies in the graph's memory.
        pairs = zip(parameters, (alias.grad for alias in aliases), strict=True)
        self._gradients = [(parameter, gradient) for parameter, gradient in pairs if gradient is not None]
        return graph


def _has_hooks(model: nn.Module) -> bool:
    """Return whether a module or a parameter has a hook, as `wandb.watch` gives them."""
    return not are_unobserved([*model.modules()]) or any(
        parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in model.parameters()
    )


def _together(parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor | None]]:
    """Return memory for all gradients of parameters of one dtype, and the part of it that is the gradient of each."""
    sizes = [-(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for parameter in parameters]
    memory = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
    parts = memory.split(sizes)
    return memory, [
        part[: parameter.numel()].view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)
    ]


@contextlib.contextmanager
def _aliases(
    model: nn.Module, parameters: list[nn.Parameter], gradients: list[Tensor | None]
) -> Iterator[list[nn.Parameter]]:
    """Put parameters of the same memory in the place of the network's in the block, with these gradients.

    Autograd adds a parameter's gradient on the stream on which the parameter was first used, and DDP used it before the
    recording began. An alias is first used inside.
    """
    aliases = [nn.Parameter(parameter.data) for parameter in parameters]
    for alias, gradient in zip(aliases, gradients, strict=True):
        alias.grad = gradient
    alias_of = dict(zip(parameters, aliases, strict=True))
    places = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter in alias_of
    ]
    try:
        for owner, name, parameter in places:
            owner[name] = alias_of[parameter]
        yield aliases
    finally:
        for owner, name, parameter in places:
            owner[name] = parameter


def _reset_generator(device: torch.device) -> None:
    """Give the generator of random numbers a new state: the old one still waits for the end of a failed recording."""
    index = torch.cuda.current_device() if device.index is None else device.index
    fresh = torch.Generator(device)
    fresh.manual_seed(torch.initial_seed())
    torch.cuda.default_generators[index].graphsafe_set_state(fresh.graphsafe_get_state())
