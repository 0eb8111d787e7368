"""A CUDA graph replays the kernels of a step's forward and backward pass with one launch.

A small network's kernels take a few microseconds each, and starting one from Python takes as long. At 288 hidden units
and 6 layers the host needs 12 ms to start the kernels of a step, and an H100 less to run them. So the pass is recorded
once, and replayed for every batch: the batch is copied into the recorded input, and the gradients appear in the tensors
that were recorded as theirs. Clipping and the optimizer run after it as usual.

What a graph records must not change: shapes, the network's structure, and where tensors lie. So the first steps run
without it (they compile, and choose algorithms), and it is left out where it cannot be or does not pay (`GraphedStep`
says when). Dropout stays random: a replay takes the state of PyTorch's generator as a plain pass does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitnet_lit.config import ModelConfig, TrainConfig
from bitnet_lit.errors import one_line

LARGEST_HIDDEN_SIZE = 1024
FIRST_STEPS = 3
"""Batches that are trained on before the pass is recorded."""


def records_graph(config: TrainConfig, device: torch.device, world_size: int) -> bool:
    """Return whether the run records its steps: by default those of a small network of this package on one GPU.

    A network of the user's own may read numbers from the device. Gradient checkpointing saves the generator's state in
    the pass, and anomaly detection reads every gradient.
    """
    if config.cuda_graph == "false" or device.type != "cuda" or world_size > 1 or config.trainer.strategy == "fsdp":
        return False
    if not isinstance(config.model, ModelConfig) or config.model.gradient_checkpointing:
        return False
    return not config.trainer.detect_anomaly and (
        config.cuda_graph == "true" or config.model.hidden_size <= LARGEST_HIDDEN_SIZE
    )


class RecordingFailed(RuntimeError):
    """Reports a pass that cannot be recorded, for example because it reads a number from the device."""


class GraphedStep:
    """The forward and backward pass over a batch, recorded at the first call after `FIRST_STEPS`.

    Args:
        loss_of: maps a batch, int64 (B, T + 1), to its loss.
        model: its parameters get the gradients.
        num_batches: batches of an optimizer step, whose mean the gradients are of.
        dtype: autocast's dtype; None for no autocast.
    """

    def __init__(
        self, loss_of: Callable[[Tensor], Tensor], model: nn.Module, num_batches: int, dtype: torch.dtype | None
    ) -> None:
        self._loss_of, self._num_batches, self._dtype = loss_of, num_batches, dtype
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._graph: torch.cuda.CUDAGraph | None = None
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

    def __call__(self, batch: Tensor, is_first: bool) -> Tensor:
        """Compute the loss of a batch, float32 (), and add its gradients to the parameters.

        The loss is overwritten at the next call.

        Args:
            is_first: whether this is the first batch of an optimizer step, at which the gradients start at zero.

        Raises:
            RecordingFailed: the pass cannot be recorded. Nothing has been computed.
        """
        if self._graph is None:
            try:
                self._graph = self._record(batch)
            except RuntimeError as error:
                raise RecordingFailed(one_line(error, 300)) from error
        self._batch.copy_(batch)
        if is_first:
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient  # a validation takes the gradients away
            torch._foreach_zero_(self._gradients)
        self._graph.replay()
        return self._loss

    def _record(self, batch: Tensor) -> torch.cuda.CUDAGraph:
        self._batch = batch.clone()
        # Made before the recording, so that no memory of the graph's own holds them.
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        graph = torch.cuda.CUDAGraph()
        # Autocast's cache of weights in bfloat16 must not outlive the recording.
        autocast = torch.autocast("cuda", dtype=self._dtype, enabled=self._dtype is not None, cache_enabled=False)
        # The thread that reads batches goes on with its own CUDA calls meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"), autocast:
            loss = self._loss_of(self._batch)
            (loss / self._num_batches).backward()
            self._loss = loss.detach()
        return graph
