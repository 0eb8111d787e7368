"""This module has the configs of optimizers and schedules: those of this package, and classes of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitnet_lit.config.checks import COUNT, FACTOR, LENGTH, POSITIVE, SHARE, Checked, Range, one_of
from bitnet_lit.config.slots import Custom
from bitnet_lit.errors import UserError


@dataclass
class OptimConfig(Checked):
    """OptimConfig has the options that AdamW and Muon share."""

    name: str = "adamw"
    learning_rate: float = 1e-3
    """The peak of the learning rate, which the schedule scales. For Muon it is the peak of the hidden matrices."""
    weight_decay: float = 0.1
    """Weight decay of matrices. Norms and biases have none."""
    cautious_weight_decay: bool = False
    """Let weight decay act only on the weights that the step moves towards zero: where update and weight have the same
    sign (Cautious Weight Decay, arXiv 2510.12402)."""
    betas: tuple[float, float] = (0.9, 0.95)  # BitNet's Training Tips, table 2
    eps: float = 1e-8

    OWNER: ClassVar[str] = "optim."
    RANGES: ClassVar[dict[str, Range]] = {"learning_rate": POSITIVE, "weight_decay": FACTOR, "eps": POSITIVE}
    STATES: ClassVar[float] = 2.0
    """Elements of optimizer state for each parameter, for the estimate of memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("optim.name", self.name, tuple(OPTIMIZERS))
        if len(self.betas) != 2:
            raise UserError(f"optim.betas={list(self.betas)}: must be two numbers: optim.betas=[0.9,0.95]")
        for number, beta in enumerate(self.betas):
            Range(0, 1, open_right=True).check(f"optim.betas[{number}]", beta)


@dataclass
class AdamWConfig(OptimConfig):
    """AdamWConfig chooses torch.optim.AdamW for all parameters, fused where the device supports it."""

    name: str = "adamw"
    learning_rate: float = 1.5e-3
    """The peak of the learning rate (Training Tips, table 2: 700M)."""


@dataclass
class MuonConfig(OptimConfig):
    """MuonConfig chooses Muon for the hidden matrices, and AdamW for embeddings, head and norms.

    `betas` and `eps` are those of AdamW.
    """

    name: str = "muon"
    learning_rate: float = 2e-2
    adamw_learning_rate: float = 2e-3
    """The peak of the learning rate of all parameters that AdamW trains."""
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    """Newton-Schulz iterations that orthogonalize an update."""
    normuon: bool = False
    """Divide each row of an orthogonalized update, which is one neuron, by the running root mean square of that row,
    and give the whole update its norm back (NorMuon, arXiv 2510.05491)."""
    normuon_beta2: float = 0.95
    """For normuon, the decay of the running mean of a row's squares, as betas[1] is for AdamW."""

    RANGES: ClassVar[dict[str, Range]] = {
        **OptimConfig.RANGES,
        "adamw_learning_rate": POSITIVE,
        "momentum": Range(0, 1, open_right=True),
        "ns_steps": Range(1, 99),  # torch.optim.Muon refuses more
        "normuon_beta2": Range(0, 1, open_right=True),
    }
    STATES: ClassVar[float] = 1.3


OPTIMIZERS: dict[str, type[OptimConfig]] = {"adamw": AdamWConfig, "muon": MuonConfig}


def optim_schema(values: Mapping[str, Any]) -> type[OptimConfig]:
    """Return the dataclass of the optimizer that the values of the group name.

    Raises:
        UserError: the name is unknown.
    """
    name = values.get("name", "adamw")
    one_of("optim.name", name, tuple(OPTIMIZERS))
    return OPTIMIZERS[name]


@dataclass
class CustomOptim(Custom):
    """CustomOptim names an optimizer of torch.optim, or one of the user's own.

    It is made with two groups of parameters, matrices and vectors. Every other key is passed to it:
    `optim._target_=torch.optim.SGD optim.momentum=0.9`.
    """

    learning_rate: float = 1e-3
    """The peak of the learning rate, which the schedule scales. The class gets it as `lr`."""
    weight_decay: float = 0.0
    """Weight decay of matrices. Norms and biases have none."""

    OWNER: ClassVar[str] = "optim."
    RANGES: ClassVar[dict[str, Range]] = {"learning_rate": POSITIVE, "weight_decay": FACTOR}
    RENAMED: ClassVar[dict[str, str]] = {"lr": "learning_rate"}
    STATES: ClassVar[float] = 2.0


@dataclass
class ScheduleConfig(Checked):
    """ScheduleConfig says how learning rate and weight decay change over a run, relative to the optimizer's values."""

    name: str = "cosine"
    """cosine; two_stage (BitNet: in the second stage the rate is lower and weight decay is 0); wsd (warm-up, stable,
    decay)."""
    warmup_steps: int | None = None
    """Optimizer steps of linear warm-up. null: a twentieth of the run."""
    warmup_tokens: int | None = None
    """Tokens of linear warm-up, in place of warmup_steps."""
    final_factor: float = 0.0
    """The learning rate at the end of the run, as a share of the peak."""
    switch_at: float = 0.5
    """For two_stage, the share of the run after which the second stage begins."""
    second_stage_factor: float = 0.6667
    """For two_stage, the share of the peak to which the rate drops (BitNet 700M: 1.5e-3 to 1e-3)."""
    decay_share: float = 0.2
    """For wsd, the share of the run, at its end, over which the rate falls linearly."""
    weight_decay: str = "constant"
    """How weight decay changes over the run: constant, or to_zero, which falls linearly from optim.weight_decay at the
    first step to 0 behind the last (nanochat). The second stage of two_stage has none in either case."""
    total_steps: int | None = None
    """The number of steps after which the curve ends. null: the length of the run. A resumed run with another length
    must set it."""

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
        one_of("schedule.weight_decay", self.weight_decay, ("constant", "to_zero"))


@dataclass
class CustomSchedule(Custom):
    """CustomSchedule names a schedule of the user's own: a scheduler of PyTorch, or a function of the step.

    A subclass of `torch.optim.lr_scheduler.LRScheduler` is made with the optimizer. Any other callable gets the
    optimizer step, from 0, and returns the learning rate as a factor of its peak. Both get every other key of the
    group, and `warmup_steps` and `total_steps` if they have arguments with these names.
    """

    warmup_steps: int | None = None
    """Optimizer steps of warm-up. null: a twentieth of the run."""
    warmup_tokens: int | None = None
    """Tokens of warm-up, in place of warmup_steps."""
    total_steps: int | None = None
    """The number of steps after which the curve ends. null: the length of the run."""

    OWNER: ClassVar[str] = "schedule."
    RANGES: ClassVar[dict[str, Range]] = {"warmup_steps": COUNT, "warmup_tokens": COUNT, "total_steps": LENGTH}
