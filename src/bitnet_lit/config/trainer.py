"""This module has the configs of Lightning's Trainer, of callbacks and of loggers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from bitnet_lit.config.checks import COUNT, FACTOR, LENGTH, POSITIVE, SIZE, Checked, Range, one_of
from bitnet_lit.errors import UserError


class CountOrShare(Range):
    """CountOrShare accepts an integer, which is a number of steps or batches, or a float, which is a share of all."""

    def check(self, key: str, value: Any) -> None:
        if isinstance(value, float):
            super().check(key, value)
        else:
            LENGTH.check(key, value)


COUNT_OR_SHARE = CountOrShare(0, 1, open_left=True, must="be a whole number, or a share in (0, 1]")


@dataclass
class TrainerConfig(Checked):
    """TrainerConfig has options of Lightning's Trainer under Lightning's names. Lengths are in optimizer steps."""

    accelerator: str = "auto"
    """auto, cpu, gpu or mps."""
    devices: Any = 1
    """The number of devices, a list of their indices, or auto."""
    num_nodes: int = 1
    strategy: str = "auto"
    """How several devices train one model: ddp (each holds all of it), fsdp (each holds a part of each parameter, by
    FSDP2), or auto (ddp where there are several devices)."""
    precision: str = "auto"
    """auto, 32-true, bf16-mixed or bf16-true. auto: bf16-mixed on GPUs that have bfloat16, elsewhere 32-true."""
    max_steps: int = 1000
    """Optimizer steps of the run."""
    max_tokens: int | None = None
    """Tokens of the run on all devices together, in place of max_steps."""
    max_epochs: float | None = None
    """Passes over the training split (0.5 is half a pass), in place of max_steps."""
    max_time: str | None = None
    """The longest time that the run may take, as DD:HH:MM:SS. A resumed run starts to count again."""
    val_check_interval: int | float | None = None
    """Optimizer steps between validations, or as a float (0.5, 1.0) a share of an epoch. null: twenty validations in a
    run, or fewer where they would take more than a third of the training's time. (Lightning itself counts batches; they
    are converted.)"""
    limit_val_batches: int | float | None = 16
    """Batches of each device that a validation takes, spread evenly over the split, or as a float (0.5) a share of all.
    null: all. Losses on them choose the best model. The last validation of a run takes the other batches too, and
    metrics.json has its figures on all."""
    accumulate_grad_batches: int = 1
    """Forward passes per optimizer step."""
    gradient_clip_val: float = 1.0
    """The largest norm of the gradient; a larger one is scaled down. 0: no clipping."""
    log_every_n_steps: int = 10
    deterministic: bool = False
    """Use deterministic operations only, and refuse the others (CUDA)."""
    benchmark: bool | None = None
    """Let cuDNN measure its algorithms and choose the fastest."""
    detect_anomaly: bool = False
    """Turn on autograd's anomaly detection, which checks every backward operation and is slow."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further flags of Lightning's Trainer, such as trainer.extra.profiler=simple."""

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
        one_of("trainer.precision", self.precision, ("auto", "32-true", "bf16-mixed", "bf16-true"))


@dataclass
class CallbacksConfig(Checked):
    """CallbacksConfig chooses the callbacks of a run. Checkpoints and the model folder are always written."""

    checkpoint_every_n_steps: int | None = None
    """Optimizer steps between further checkpoints. null: checkpoints at each validation only."""
    progress_bar: bool = True
    throughput: bool = True
    """Log tokens/s, MFU (model FLOPs utilization), the share of time spent waiting for data, and peak memory."""
    ternary_health: bool = True
    """Log the shares of -1, 0 and +1, the flip rate and the scales of the quantized matrices at each validation."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts from which texts are generated at each validation. The texts are written to samples.txt."""
    sample_max_new_tokens: int = 100
    profile_steps: int = 0
    """Steps that PyTorch's profiler records, in the folder profile/ (mode=profile). 0: none."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Callbacks of Lightning or of your own. Each has a name that you choose, and a `_target_`."""

    OWNER: ClassVar[str] = "callbacks."
    RANGES: ClassVar[dict[str, Range]] = {
        "checkpoint_every_n_steps": LENGTH,
        "sample_max_new_tokens": SIZE,
        "profile_steps": COUNT,
    }


@dataclass
class LoggerConfig:
    """LoggerConfig says where metrics are logged. metrics.csv in the run folder is always written."""

    tensorboard: bool = False
    wandb: bool = False
    """Log to Weights & Biases: online after `wandb login`, otherwise offline (`wandb sync` uploads the run later)."""
    wandb_project: str = "bitnet-lit"
    wandb_group: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Loggers of Lightning or of your own. Each has a name that you choose, and a `_target_`."""
