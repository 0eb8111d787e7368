"""A run trains with AdamW, with Muon for hidden matrices and AdamW for the rest, or with a class of the user's own.

Weight decay acts on matrices only. Muon replaces the momentum of each hidden matrix by the nearest (semi-)orthogonal
matrix, computed by Newton-Schulz iterations (Jordan et al. 2024), so every direction of the matrix moves at the same
rate. Embeddings, the head and norms do not map one hidden space to another, and stay with AdamW. A step of the same
size in all directions flips more ternary codes: at small scale Muon gains more than any other choice in the recipe
(docs/results.md).
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
    """Bring the singular values of a matrix near to 1 by Newton-Schulz iterations, and keep its singular vectors.

    Args:
        matrix: (M, N); its dtype is the dtype of the computation and of the result.
        coefficients: of the polynomial a x + b x^3 + c x^5 that each iteration applies to the singular values.
        steps: number of iterations.
        eps: smallest norm to divide by.

    Returns:
        (M, N).
    """
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # so that the Gram matrix is the smaller one
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Float32Muon(Muon):
    """Runs `torch.optim.Muon` on CPUs, with Newton-Schulz in float32 instead of bfloat16.

    Most CPUs have no bfloat16 arithmetic, and PyTorch then multiplies bfloat16 matrices in plain loops: on AVX2 a step
    of a small model took ten times as long. The results differ from Muon's only by rounding. The state is the same, so
    a checkpoint fits both classes.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Do one optimizer step. `closure` must be None, because `MuonAdamW` has already called it."""
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
    """Combines Muon and AdamW, so that a training loop, a schedule and a checkpoint see one optimizer."""

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.parts: tuple[Optimizer, ...] = (muon, adamw)
        # These are the same dictionaries as in the parts, so a learning rate that a schedule sets here is set there.
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step of both optimizers. `closure` is called once, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both optimizers."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of both optimizers."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def _vectors(model: nn.Module) -> set[str]:
    """Return the names of norms, biases and a scheme's own parameters: all but the weight matrices.

    Under FSDP every parameter is a flat shard, so only the name decides.
    """
    is_sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    return {
        name
        for name, parameter in model.named_parameters()
        if name.endswith("norm.weight") or not name.endswith(".weight") or (parameter.ndim < 2 and not is_sharded)
    }


def _outer(model: nn.Module) -> set[str]:
    """Return the names of embeddings and of the head, which do not map one hidden space to another."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, parameter in model.named_parameters()
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) or id(parameter) in embeddings
    }


Named = list[tuple[str, nn.Parameter]]


def _groups(named: Named, vectors: set[str], weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups: matrices with weight decay, and vectors without it."""
    groups = [
        {"params": [p for name, p in named if name not in vectors], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in vectors], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig | CustomOptim) -> Optimizer:
    """Return the optimizer of `config` for all trainable parameters of `model`. Weight decay acts on matrices only.

    Raises:
        UserError: a class of the user's own cannot be made, or is no optimizer.
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
    """Refuse moments with other shapes than the parameters: `load_state_dict` accepts them, but a step would fail."""
    parameters = [parameter for group in part.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        for name, value in saved.get(number, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise UserError(
                    f"init_optimizer=true: {name} of parameter {number} is {tuple(value.shape)} in init_from's run "
                    f"and {tuple(parameter.shape)} here: take init_optimizer=false"
                )


def restore_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load the moments of `saved` into a new optimizer, which keeps its own learning rates and weight decay.

    Args:
        saved: the `state_dict` of the optimizer of another run.

    Raises:
        UserError: `saved` comes from another optimizer, or from one with other parameters.
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
