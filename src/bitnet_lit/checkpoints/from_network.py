"""A network in memory can be read as a `StoredModel`, so that an engine runs a model that is still being trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.checkpoints.tensor_reader import TensorReader
from bitnet_lit.config import QuantConfig
from bitnet_lit.model import CausalLM


class _NetworkReader(TensorReader):
    def __init__(self, network: CausalLM) -> None:
        self._tensors = network.state_dict()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = self._tensors[name].detach().cpu().float().numpy().copy()
        return array


def from_network(network: CausalLM, quant: QuantConfig, path: Path) -> StoredModel:
    """Return the latent weights of a network as a model without a tokenizer.

    Each tensor is copied when it is read. A model that keeps no copy would change with the next training step.

    Args:
        path: what messages call the model.

    Raises:
        UserError: sizes are beyond those that a stored model may have.
    """
    return StoredModel(path, network.config, quant, None, {}, _NetworkReader(network))
