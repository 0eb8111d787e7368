"""A strategy says how several devices train one model. Lightning runs it; this module has those of `trainer.strategy`.

`ddp`   Every rank has the whole model and averages the gradients with the others, while its backward pass still runs.
`fsdp`  Every rank has a part of each parameter, of its gradient and of its optimizer state: FSDP2, PyTorch's
        `fully_shard`. A decoder layer is gathered before it computes, forward and backward, and freed afterwards.

Under FSDP2 parameters are gathered in float32, also in bf16-mixed: a matrix is rounded to codes with the scale of the
whole float32 matrix, so the codes are those of a run on one device. Gathering bfloat16 would halve the traffic and
round other weights than the optimizer has.

A checkpoint of either strategy holds whole tensors, as that of a run on one device does. So each of them resumes what
another one began, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bitnet_lit.config import ModelConfig, TrainConfig
from bitnet_lit.model import CausalLM, build_model
from bitnet_lit.model.layers import DecoderLayer
from bitnet_lit.training.module import BitNetModule
from bitnet_lit.training.optimizers import sharded_state
from bitnet_lit.training.plan import world_size
from bitnet_lit.training.sharing import whole


def strategy_of(config: TrainConfig) -> str | Strategy:
    """Return the strategy for Lightning's Trainer."""
    if config.trainer.strategy == "fsdp":
        return FullyShardStrategy()
    if config.trainer.strategy == "ddp" or world_size(config.trainer) > 1:
        # The only buffers are constant tables, so they need not be broadcast before each forward pass.
        return DataParallelStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    return "auto"


class DataParallelStrategy(DDPStrategy):
    """Runs DDP with layers that are compiled one by one."""

    def configure_ddp(self) -> None:
        """Wrap the module, and let Dynamo compile each layer as a whole.

        A gradient is sent as soon as its layer's backward pass is done. Dynamo would cut a graph wherever a bucket of
        gradients is full, so that a network that is compiled as a whole has such places too.
        """
        module = self.lightning_module
        if self.root_device.type == "cuda" and isinstance(module, BitNetModule) and isinstance(module.model, CausalLM):
            import torch._dynamo

            torch._dynamo.config.optimize_ddp = False
        super().configure_ddp()


class FullyShardStrategy(DDPStrategy):
    """Shards the network of a `BitNetModule` by FSDP2. Processes start and meet as under DDP."""

    def model_to_device(self) -> None:
        """Do nothing: `configure_ddp` moves the model layer by layer, because it may be larger than a device."""

    def configure_ddp(self) -> None:
        """Shard the network, in place of DDP's wrapper."""
        module = self.lightning_module
        assert isinstance(module, BitNetModule)
        shard_model(module.model, self.root_device, self.world_size)
        module.to(self.root_device)  # sets module.device, and moves what is no part of the network

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights on rank 0, and a useless dictionary elsewhere. Every rank must call this method."""
        assert self.lightning_module is not None
        return whole_tensors(self.lightning_module.state_dict(keep_vars=True), self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state on rank 0, and a useless dictionary elsewhere. Every rank must call this method."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return whole_tensors(optimizer.state_dict(), self.is_global_zero)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the whole states of a checkpoint: each rank takes its part of them."""
        states = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        super().load_optimizer_state_dict({"optimizer_states": [sharded_state(*each) for each in states]})


def shard_model(model: nn.Module, device: torch.device, world_size: int) -> None:
    """Give each rank its part of every parameter, in place. Names and the type of a module's class stay.

    Each decoder layer is gathered as one, and the rest of the network (embedding, last norm, head) as another. A
    parameter of M rows is split into parts of ceil(M / world_size) rows.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            fully_shard(module, mesh=mesh)
            register_fsdp_forward_method(module, "projected_heads")
    fully_shard(model, mesh=mesh)


def whole_tensors(state: Any, keep: bool) -> Any:
    """Return a state with whole tensors, in main memory, in place of shards. Every rank must call this function.

    Args:
        state: tensors in dictionaries, lists and tuples. Shards that occur twice (tied weights) stay one tensor.
        keep: False returns None for each shard, on ranks that have no use for it.
    """
    seen: dict[int, Tensor | None] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(convert, value))
        if not isinstance(value, DTensor):
            return value.detach() if isinstance(value, Tensor) else value
        if id(value) not in seen:
            tensor = whole(value.detach())
            seen[id(value)] = tensor.cpu() if keep else None
        return seen[id(value)]

    return convert(state)


def whole_copy(module: BitNetModule, keep: bool) -> CausalLM | None:
    """Return a copy of a sharded network that is whole and on the same device. Every rank must call this function.

    Args:
        keep: False returns None, on ranks that have no use for the copy.
    """
    weights = whole_tensors(module.model.state_dict(keep_vars=True), keep)
    if not keep:
        return None
    assert isinstance(module.config.model, ModelConfig)
    model = build_model(module.config.model, module.config.quant, "meta")
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.model.reset_rotary()
    return model.to(module.device)


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 shards the network."""
    return isinstance(model, FSDPModule)
