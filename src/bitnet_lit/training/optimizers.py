"""Optimizers: AdamW, Muon with AdamW beside it, and classes of the user's own.

Weight decay acts on matrices only. Muon replaces each hidden matrix's momentum by the nearest orthogonal matrix
(Newton-Schulz; Jordan et al. 2024), so every direction of the matrix moves at the same rate; embeddings, head and
norms are no maps between hidden spaces and stay with AdamW. For ternary weights a step of equal size everywhere is
what moves codes: at small scale it gains more than any other choice in the recipe (docs/results.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import AdamW, Muon, Optimizer

from bitnet_lit.config import CustomOptim, MuonConfig, OptimConfig
from bitnet_lit.errors import UserError
from bitnet_lit.instantiate import instantiate, locate, takes


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz in the dtype of `matrix` (M, N): its singular values come near to 1, its directions stay."""
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller Gram matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Float32Muon(Muon):
    """`torch.optim.Muon` with Newton-Schulz in float32 instead of bfloat16, for CPUs.

    Most CPUs have no bfloat16 arithmetic, and PyTorch's products of it are then plain loops: on AVX2 a step of a small
    model took ten times as long. State and results are Muon's up to that rounding: checkpoints serve both.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step. `MuonAdamW` has called the closure."""
        assert closure is None
        for group in self.param_groups:
            lr, momentum = float(group["lr"]), group["momentum"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                direction = gradient.lerp(average, momentum) if group["nesterov"] else average
                update = orthogonalize(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * math.sqrt(max(1.0, parameter.shape[0] / parameter.shape[1])))


class MuonAdamW(Optimizer):
    """Muon and AdamW behind one `Optimizer`, so that a training loop, a schedule and a checkpoint see one."""

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.parts: tuple[Optimizer, ...] = (muon, adamw)
        # The very group dictionaries of the parts: a schedule that writes a rate here writes it there.
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; `closure` recomputes the loss once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both parts."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def _vectors(model: nn.Module) -> set[str]:
    """Names of norms, biases, and what a scheme's layer has of its own: all that is no weight of a linear layer.

    Under FSDP every parameter is a flat shard: there the name alone says it.
    """
    is_sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    return {
        name
        for name, parameter in model.named_parameters()
        if name.endswith("norm.weight") or not name.endswith(".weight") or (parameter.ndim < 2 and not is_sharded)
    }


def _outer(model: nn.Module) -> set[str]:
    """Names of embeddings and of the head, which are no maps between hidden spaces."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, parameter in model.named_parameters()
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) or id(parameter) in embeddings
    }


Named = list[tuple[str, nn.Parameter]]


def _groups(named: Named, vectors: set[str], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices, which decay, and vectors, which do not."""
    groups = [
        {"params": [p for name, p in named if name not in vectors], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in vectors], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig | CustomOptim) -> Optimizer:
    """The optimizer of `config` over all parameters of `model`; matrices decay, vectors do not.

    Raises:
        UserError: a class of the user's own that cannot be made, or is no optimizer.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    vectors = _vectors(model)
    if isinstance(config, CustomOptim):
        return _custom_optimizer(_groups(named, vectors, config.weight_decay), config)
    fused = all(parameter.device.type in ("cpu", "cuda", "mps") for _, parameter in named)

    def adamw(parameters: Named, learning_rate: float) -> AdamW:
        groups = _groups(parameters, vectors, config.weight_decay)
        return AdamW(groups, lr=learning_rate, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=fused)

    if not isinstance(config, MuonConfig):
        return adamw(named, config.learning_rate)
    no_maps = vectors | _outer(model)
    hidden = [p for name, p in named if name not in no_maps]
    others = [(name, p) for name, p in named if name in no_maps]
    on_cpu = all(parameter.device.type == "cpu" for parameter in hidden)
    muon = (Float32Muon if on_cpu else Muon)(
        hidden,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
    )
    return MuonAdamW(muon, adamw(others, config.adamw_learning_rate))


def _custom_optimizer(groups: list[dict[str, Any]], config: CustomOptim) -> Optimizer:
    if config.weight_decay and not takes(locate(config._target_, "optim"), "weight_decay"):
        raise UserError(f"optim.weight_decay={config.weight_decay}: {config._target_} has none: leave it out")
    optimizer = instantiate(config.call, "optim", groups, lr=config.learning_rate)
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"optim._target_={config._target_}: is no optimizer: derive it from torch.optim.Optimizer")
    return optimizer


def _check_shapes(part: Optimizer, saved: dict[int, dict[str, Any]]) -> None:
    """Refuse moments of other shapes than the parameters': `load_state_dict` takes them, and the first step fails."""
    parameters = [parameter for group in part.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        for name, value in saved.get(number, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise UserError(
                    f"init_optimizer=true: {name} of parameter {number} is {tuple(value.shape)} in init_from's run "
                    f"and {tuple(parameter.shape)} here: take init_optimizer=false"
                )


def restore_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Give a new optimizer the moments of `saved`; rates and decay stay its own.

    Raises:
        UserError: another optimizer, or one of other parameters.
    """
    parts: list[Any] = [*optimizer.parts] if isinstance(optimizer, MuonAdamW) else [optimizer]
    states = saved.get("parts", [saved])
    groups = [[len(group["params"]) for group in part.state_dict()["param_groups"]] for part in parts]
    if groups != [[len(group["params"]) for group in state["param_groups"]] for state in states]:
        raise UserError(
            "init_optimizer=true: the run of init_from had another optimizer or other parameters: take its optim=, or "
            "init_optimizer=false"
        )
    for part, state in zip(parts, states, strict=True):
        _check_shapes(part, state["state"])
        part.load_state_dict({"state": state["state"], "param_groups": part.state_dict()["param_groups"]})
