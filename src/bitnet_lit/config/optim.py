"""Optimizers and schedules: ours, and classes of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitnet_lit.config.checks import COUNT, FACTOR, LENGTH, POSITIVE, SHARE, Checked, Range, one_of
from bitnet_lit.config.slots import Custom
from bitnet_lit.errors import UserError


@dataclass
class OptimConfig(Checked):
    """What every optimizer of ours has; `learning_rate` is the peak that the schedule scales."""

    name: str = "adamw"
    learning_rate: float = 1e-3
    """Peak; of the hidden matrices where an optimizer treats them apart."""
    weight_decay: float = 0.1
    """On matrices only: never on norms."""
    betas: tuple[float, float] = (0.9, 0.95)  # BitNet's Training Tips, table 2
    eps: float = 1e-8

    OWNER: ClassVar[str] = "optim."
    RANGES: ClassVar[dict[str, Range]] = {"learning_rate": POSITIVE, "weight_decay": FACTOR, "eps": POSITIVE}
    STATES: ClassVar[float] = 2.0
    """Elements of state for each parameter, for the estimate of the memory."""
    WHOLE_MATRICES: ClassVar[bool] = False
    """Whether it needs a matrix as a whole, which FSDP does not give it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("optim.name", self.name, tuple(OPTIMIZERS))
        if len(self.betas) != 2:
            raise UserError(f"optim.betas={list(self.betas)}: must be two numbers: optim.betas=[0.9,0.95]")
        for number, beta in enumerate(self.betas):
            Range(0, 1, open_right=True).check(f"optim.betas[{number}]", beta)


@dataclass
class AdamWConfig(OptimConfig):
    """torch.optim.AdamW for everything, fused where the device can."""

    name: str = "adamw"


@dataclass
class MuonConfig(OptimConfig):
    """torch.optim.Muon for the hidden matrices, AdamW (betas, eps) for embeddings, head and norms."""

    name: str = "muon"
    learning_rate: float = 2e-2
    adamw_learning_rate: float = 2e-3
    """Peak for everything that is no hidden matrix."""
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    """Newton-Schulz iterations that orthogonalize an update."""

    RANGES: ClassVar[dict[str, Range]] = {
        **OptimConfig.RANGES,
        "adamw_learning_rate": POSITIVE,
        "momentum": Range(0, 1, open_right=True),
        "ns_steps": Range(1, 99),  # torch's Muon refuses more
    }
    STATES: ClassVar[float] = 1.3
    WHOLE_MATRICES: ClassVar[bool] = True


OPTIMIZERS: dict[str, type[OptimConfig]] = {"adamw": AdamWConfig, "muon": MuonConfig}


def optim_schema(values: Mapping[str, Any]) -> type[OptimConfig]:
    """The dataclass of the optimizer that a group's values name."""
    name = values.get("name", "adamw")
    one_of("optim.name", name, tuple(OPTIMIZERS))
    return OPTIMIZERS[name]


@dataclass
class CustomOptim(Custom):
    """A class of torch.optim, or one of the user's own: made with two groups of parameters, matrices and vectors.

    Further keys are passed to it: `optim._target_=torch.optim.SGD optim.momentum=0.9`.
    """

    learning_rate: float = 1e-3
    """Peak that the schedule scales; the class gets it as `lr`."""
    weight_decay: float = 0.0
    """On matrices only: never on norms."""

    OWNER: ClassVar[str] = "optim."
    RANGES: ClassVar[dict[str, Range]] = {"learning_rate": POSITIVE, "weight_decay": FACTOR}
    RENAMED: ClassVar[dict[str, str]] = {"lr": "learning_rate"}
    STATES: ClassVar[float] = 2.0
    WHOLE_MATRICES: ClassVar[bool] = False


@dataclass
class ScheduleConfig(Checked):
    """Learning rate and weight decay over the run, as factors of the optimizer's peaks."""

    name: str = "cosine"
    """cosine; two_stage (BitNet: at the switch the rate drops and weight decay ends); wsd (warm-up, stable, decay)."""
    warmup_steps: int | None = None
    """Optimizer steps of linear warm-up. null: a twentieth of the run."""
    warmup_tokens: int | None = None
    """Tokens of linear warm-up; takes the place of warmup_steps."""
    final_factor: float = 0.0
    """Share of the peak that is left at the end."""
    switch_at: float = 0.5
    """two_stage: share of the run after which the second stage begins."""
    second_stage_factor: float = 0.6667
    """two_stage: the rate drops to this share of the peak (BitNet 700M: 1.5e-3 to 1e-3)."""
    decay_share: float = 0.2
    """wsd: share of the run, at its end, over which the rate falls linearly."""
    total_steps: int | None = None
    """The length that the curve is drawn for. null: the run's; a resumed run that got longer must say."""

    OWNER: ClassVar[str] = "schedule."
    RANGES: ClassVar[dict[str, Range]] = {
        "warmup_steps": COUNT,
        "warmup_tokens": COUNT,
        "final_factor": SHARE,
        "switch_at": SHARE,
        "second_stage_factor": SHARE,
        "decay_share": Range(0, 1, open_left=True),
        "total_steps": LENGTH,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("schedule.name", self.name, ("cosine", "two_stage", "wsd"))


@dataclass
class CustomSchedule(Custom):
    """A schedule of the user's own: a learning rate scheduler of PyTorch, or a function of the step.

    A subclass of `torch.optim.lr_scheduler.LRScheduler` is made with the optimizer. Anything else that can be called
    gets the optimizer step (0 is the first) and returns the factor of the peak learning rate. Both get further keys,
    and `warmup_steps` and `total_steps` where they have arguments of these names.
    """

    warmup_steps: int | None = None
    """Optimizer steps of warm-up. null: a twentieth of the run."""
    warmup_tokens: int | None = None
    """Tokens of warm-up; takes the place of warmup_steps."""
    total_steps: int | None = None
    """The length that the curve is drawn for. null: the run's."""

    OWNER: ClassVar[str] = "schedule."
    RANGES: ClassVar[dict[str, Range]] = {"warmup_steps": COUNT, "warmup_tokens": COUNT, "total_steps": LENGTH}
