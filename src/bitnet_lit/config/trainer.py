"""Lightning's Trainer, what watches a run, and where metrics go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from bitnet_lit.config.checks import COUNT, FACTOR, LENGTH, POSITIVE, SIZE, Checked, Range, one_of
from bitnet_lit.errors import UserError


class CountOrShare(Range):
    """A whole number of steps or batches, or as a float a share of all of them."""

    def check(self, key: str, value: Any) -> None:
        if isinstance(value, float):
            super().check(key, value)
        else:
            LENGTH.check(key, value)


COUNT_OR_SHARE = CountOrShare(0, 1, open_left=True, must="be a whole number, or a share in (0, 1]")


@dataclass
class TrainerConfig(Checked):
    """Lightning's Trainer, in its own words; lengths are optimizer steps."""

    accelerator: str = "auto"
    """auto, cpu, gpu or mps."""
    devices: Any = 1
    """How many, a list of indices, or auto."""
    num_nodes: int = 1
    strategy: str = "auto"
    """auto, ddp or fsdp."""
    precision: str = "32-true"
    """32-true, bf16-mixed or bf16-true."""
    max_steps: int = 1000
    """Optimizer steps of the run."""
    max_tokens: int | None = None
    """Tokens of the run, over all devices; takes the place of max_steps."""
    max_epochs: float | None = None
    """Passes over the training split (0.5 is half of one); takes the place of max_steps."""
    max_time: str | None = None
    """Stop after DD:HH:MM:SS, wherever the run is; a resumed run has that time anew."""
    val_check_interval: int | float | None = None
    """Optimizer steps between validations (Lightning counts batches: ours is multiplied by the accumulation), or as
    0.5 or 1.0 a share of an epoch. null: twenty validations in a run."""
    limit_val_batches: int | float | None = None
    """Batches of a validation inside the run, or as 0.5 a share of them. null: all. The last validation always takes
    all."""
    accumulate_grad_batches: int = 1
    """Forward passes per optimizer step."""
    gradient_clip_val: float = 1.0
    """Largest norm of the gradient. 0: no clipping."""
    log_every_n_steps: int = 10
    deterministic: bool = False
    """Refuse operations that are not reproducible (CUDA)."""
    benchmark: bool | None = None
    """Let cuDNN choose algorithms by trial."""
    detect_anomaly: bool = False
    """Autograd's own check of every backward operation; slow."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further flags of Lightning's Trainer: trainer.extra.profiler=simple."""

    OWNER: ClassVar[str] = "trainer."
    RANGES: ClassVar[dict[str, Range]] = {
        "num_nodes": SIZE,
        "max_steps": LENGTH,
        "max_tokens": LENGTH,
        "max_epochs": POSITIVE,
        "val_check_interval": COUNT_OR_SHARE,
        "limit_val_batches": COUNT_OR_SHARE,
        "accumulate_grad_batches": SIZE,
        "gradient_clip_val": FACTOR,
        "log_every_n_steps": LENGTH,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None and self.max_epochs is not None:
            raise UserError(
                f"trainer.max_tokens={self.max_tokens} and trainer.max_epochs={self.max_epochs}: give one of them"
            )
        one_of("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu", "cuda", "mps"))
        one_of("trainer.strategy", self.strategy, ("auto", "ddp", "fsdp"))
        one_of("trainer.precision", self.precision, ("32-true", "bf16-mixed", "bf16-true"))


@dataclass
class CallbacksConfig(Checked):
    """What watches a run. Checkpoints and the model folder are always written."""

    checkpoint_every_n_steps: int | None = None
    """Optimizer steps between checkpoints besides those at each validation. null: only those."""
    progress_bar: bool = True
    throughput: bool = True
    """Log tokens/s, MFU, the share of time spent waiting for data, and peak memory."""
    ternary_health: bool = True
    """Log the shares of -1, 0 and +1, the flip rate and the scales of the quantized matrices at each validation."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts to go on from at each validation; the stories go to samples.txt."""
    sample_max_new_tokens: int = 100
    profile_steps: int = 0
    """Steps to trace into profile/ (mode=profile)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Callbacks of Lightning or of one's own, by names of one's own, each with its `_target_`."""

    OWNER: ClassVar[str] = "callbacks."
    RANGES: ClassVar[dict[str, Range]] = {
        "checkpoint_every_n_steps": LENGTH,
        "sample_max_new_tokens": SIZE,
        "profile_steps": COUNT,
    }


@dataclass
class LoggerConfig:
    """Where metrics go. metrics.csv in the run folder is always written."""

    tensorboard: bool = False
    wandb: bool = False
    """Online where `wandb login` was done, offline otherwise (`wandb sync` uploads it later)."""
    wandb_project: str = "bitnet-lit"
    wandb_group: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Loggers of Lightning or of one's own, by names of one's own, each with its `_target_`."""
