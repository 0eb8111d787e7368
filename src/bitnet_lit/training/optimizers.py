"""A run trains with AdamW, with Muon for hidden matrices and AdamW for the rest, or with a class of the user's own.

Weight decay acts on matrices only. Muon (`muon.py`) moves every direction of a hidden matrix at the same rate.
Embeddings, the head and norms do not map one hidden space to another, and stay with AdamW. A step of the same size in
all directions flips more ternary codes: at small scale Muon gains more than any other choice in the recipe
(docs/results.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from bitnet_lit.config import CustomOptim, MuonConfig, OptimConfig
from bitnet_lit.errors import UserError
from bitnet_lit.instantiate import instantiate, locate, takes
from bitnet_lit.training.cautious_decay import CautiousAdamW
from bitnet_lit.training.muon import Muon


class MuonAdamW(Optimizer):
    """Combines Muon and AdamW, so that a training loop, a schedule and a checkpoint see one optimizer.

    Attributes:
        found_inf: float32, (), on the device: where it is 1, a step changes no parameter; None is 0. It is the protocol
            of PyTorch's fused optimizers (`_step_supports_amp_scaling`).
        gradients_stay: see `Muon`.
    """

    gradients_stay = False

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.parts: tuple[Muon, AdamW] = (muon, adamw)
        self.found_inf: Tensor | None = None
        self._step_supports_amp_scaling = bool(getattr(adamw, "_step_supports_amp_scaling", False))
        # These are the same dictionaries as in the parts, so a learning rate that a schedule sets here is set there.
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step of both optimizers. `closure` is called once, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.parts[0].gradients_stay = self.gradients_stay
        for part in self.parts:
            part.found_inf = self.found_inf  # type: ignore[union-attr]  # AdamW looks for the attribute
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
    """Return the names of norms, biases and a scheme's own parameters: all but the weight matrices."""
    return {
        name
        for name, parameter in model.named_parameters()
        if name.endswith("norm.weight") or not name.endswith(".weight") or parameter.ndim < 2
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
        chosen = CautiousAdamW if config.cautious_weight_decay else AdamW
        return chosen(groups, lr=learning_rate, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=fused)

    if not isinstance(config, MuonConfig):
        return adamw(named, config.learning_rate)
    no_maps = vectors | _outer(model)
    hidden = [p for name, p in named if name not in no_maps]
    others = [(name, p) for name, p in named if name in no_maps]
    muon = Muon(
        hidden,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        row_beta2=config.normuon_beta2 if config.normuon else None,
        is_cautious=config.cautious_weight_decay,
    )
    return MuonAdamW(muon, adamw(others, config.adamw_learning_rate))


def _custom_optimizer(groups: list[dict[str, Any]], config: CustomOptim) -> Optimizer:
    if config.weight_decay and not takes(locate(config._target_, "optim"), "weight_decay"):
        raise UserError(f"optim.weight_decay={config.weight_decay}: {config._target_} has none: leave it out")
    optimizer = instantiate(config.call, "optim", groups, lr=config.learning_rate)
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"optim._target_={config._target_}: is no optimizer: derive it from torch.optim.Optimizer")
    return optimizer


def _parts(optimizer: Optimizer) -> list[Optimizer]:
    return [*optimizer.parts] if isinstance(optimizer, MuonAdamW) else [optimizer]


def _parameters(part: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in part.param_groups for parameter in group["params"]]


def _keys(state: dict[str, Any]) -> list[Any]:
    """Return the keys of a state's parameters in the order of its groups. FSDP1 did not number them in this order."""
    return [key for group in state["param_groups"] for key in group["params"]]


def _fits(moment: Tensor, parameter: Tensor) -> bool:
    """Return whether a moment has a value for each element of a parameter, or one for each row (NorMuon)."""
    return moment.shape in (parameter.shape, (*parameter.shape[:1], 1))


def sharded_state(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state for an optimizer whose parameters are sharded: of each moment, this rank's part.

    Args:
        optimizer: its DTensors say which part. Moments of other parameters stay as they are.
        saved: the `state_dict` of an optimizer like it, with whole tensors. It is not changed.
    """
    if "parts" in saved:
        parts = zip(_parts(optimizer), saved["parts"], strict=True)
        return {"parts": [sharded_state(part, state) for part, state in parts]}
    states = dict(saved["state"])
    for key, parameter in zip(_keys(saved), _parameters(optimizer), strict=True):
        if isinstance(parameter, DTensor) and key in states:
            mesh, placements = parameter.device_mesh, parameter.placements
            states[key] = {
                name: distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
                if isinstance(value, Tensor) and _fits(value, parameter)
                else value
                for name, value in states[key].items()
            }
    return {**saved, "state": states}


def _check_shapes(part: Optimizer, saved: dict[str, Any]) -> None:
    """Refuse moments with other shapes than the parameters: `load_state_dict` accepts them, but a step would fail."""
    for number, (key, parameter) in enumerate(zip(_keys(saved), _parameters(part), strict=True)):
        for name, value in saved["state"].get(key, {}).items():
            if isinstance(value, Tensor) and value.ndim and not _fits(value, parameter):
                raise UserError(
                    f"init_optimizer=true: {name} of parameter {number} is {tuple(value.shape)} in init_from's run "
                    f"and {tuple(parameter.shape)} here: take init_optimizer=false"
                )


def restore_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load the moments of `saved` into a new optimizer, which keeps its own learning rates and weight decay.

    Args:
        saved: the `state_dict` of the optimizer of another run, with whole tensors.

    Raises:
        UserError: `saved` comes from another optimizer, or from one with other parameters.
    """
    parts, states = _parts(optimizer), saved.get("parts", [saved])
    groups = [[len(group["params"]) for group in part.param_groups] for part in parts]
    if groups != [[len(group["params"]) for group in state["param_groups"]] for state in states]:
        raise UserError(
            "init_optimizer=true: the run of init_from had another optimizer or other parameters: take its optim=, or "
            "init_optimizer=false"
        )
    for part, state in zip(parts, states, strict=True):
        _check_shapes(part, state)
        keys = iter(_keys(state))
        own = [group | {"params": [next(keys) for _ in group["params"]]} for group in part.state_dict()["param_groups"]]
        part.load_state_dict({"state": sharded_state(part, state)["state"], "param_groups": own})
