"""A training run: data, optimizer, schedule, trainer, callbacks, loggers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from bitnet_lit.config.checks import COUNT, FACTOR, LENGTH, POSITIVE, SHARE, SIZE, Checked, Range, one_of
from bitnet_lit.config.network import ModelConfig, QuantConfig, import_schemes
from bitnet_lit.errors import UserError


@dataclass
class DataConfig(Checked):
    """llama2.c shards and how batches are cut from them."""

    dir: str | None = None
    """A folder of llama2.c shards. null: the demo corpus, written to data/demo when it is not there yet."""
    tokenizer: str | None = None
    """SentencePiece model of shards that come without one."""
    sequence_length: int | None = None
    """Tokens a sequence predicts. null: the model's context."""
    batch_size: int = 32
    """Sequences per device and forward pass; times devices times trainer.accumulate_grad_batches is one step."""
    num_workers: int = 0
    """Processes that read batches. Reading takes microseconds a sequence; 0 is right unless the disk is slow."""
    max_train_sequences: int | None = None
    """Train on the first n sequences of the shuffled corpus only. null: all. mode=overfit sets one batch."""

    OWNER: ClassVar[str] = "data."
    RANGES: ClassVar[dict[str, Range]] = {
        "sequence_length": SIZE,
        "batch_size": SIZE,
        "num_workers": Range(0, 1024),
        "max_train_sequences": LENGTH,
    }


@dataclass
class OptimConfig(Checked):
    """What every optimizer has; `learning_rate` is the peak that the schedule scales."""

    name: str = "adamw"
    learning_rate: float = 1e-3
    """Peak; of the hidden matrices where an optimizer treats them apart."""
    weight_decay: float = 0.1
    """On matrices only: never on norms."""
    betas: tuple[float, float] = (0.9, 0.95)  # BitNet's Training Tips, table 2
    eps: float = 1e-8

    OWNER: ClassVar[str] = "optim."
    RANGES: ClassVar[dict[str, Range]] = {"learning_rate": POSITIVE, "weight_decay": FACTOR, "eps": POSITIVE}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("optim.name", self.name, ("adamw", "muon"))
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
    max_time: str | None = None
    """Stop after DD:HH:MM:SS, wherever the run is; a resumed run has that time anew."""
    val_check_interval: int | None = None
    """Optimizer steps between validations (Lightning counts batches: ours is multiplied by the accumulation).
    null: twenty validations in a run."""
    limit_val_batches: int | None = None
    """Batches of a validation inside the run. null: all. The last validation always takes all."""
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

    OWNER: ClassVar[str] = "trainer."
    RANGES: ClassVar[dict[str, Range]] = {
        "num_nodes": SIZE,
        "max_steps": LENGTH,
        "max_tokens": LENGTH,
        "val_check_interval": LENGTH,
        "limit_val_batches": LENGTH,
        "accumulate_grad_batches": SIZE,
        "gradient_clip_val": FACTOR,
        "log_every_n_steps": LENGTH,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
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


EXPORT_TARGETS = ("hf", "packed", "gguf_tq2_0", "gguf_tq1_0", "gguf_f16", "llama2c")


@dataclass
class ExportTargetsConfig:
    """What the model is trained for: asked before the first step."""

    targets: list[str] = field(default_factory=list)
    """hf, packed, gguf_tq2_0, gguf_tq1_0, gguf_f16, llama2c: a model that cannot be exported to one is refused."""

    def __post_init__(self) -> None:
        for target in self.targets:
            one_of("export.targets", target, EXPORT_TARGETS)


@dataclass
class TrainConfig(Checked):
    """`python -m bitnet_lit.train`: shards to a run folder with a model folder in it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: Any = field(default_factory=OptimConfig)
    """AdamWConfig or MuonConfig, as the group says."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    export: ExportTargetsConfig = field(default_factory=ExportTargetsConfig)
    seed: int = 1
    """Of the weights, the order of the data and dropout."""
    compile: str = "auto"
    """torch.compile: auto (on for CUDA), true or false."""
    resume: str | None = None
    """A run folder to go on with, in place."""
    init_from: str | None = None
    """A trained model to start from, ours or another's (see infer's checkpoint); its sizes replace `model`."""
    schemes: list[str] = field(default_factory=list)
    """Quantization schemes of one's own that the model of init_from may name, <module>.<class>."""
    init_optimizer: bool = False
    """Keep the optimizer's state too, where init_from is a run of ours."""
    init_sub_norm: bool = False
    """Add sub-norms to a model of init_from that has none; their gains are measured on a batch."""
    run_dir: str = "outputs/manual"
    """The run folder; the door sets it to Hydra's."""

    RANGES: ClassVar[dict[str, Range]] = {"seed": Range(0, 2**32 - 1)}

    def __post_init__(self) -> None:
        super().__post_init__()
        import_schemes(self.schemes)
        self.compile = str(self.compile).lower()
        one_of("compile", self.compile, ("auto", "true", "false"))
        if self.model.max_position_embeddings < 2:
            raise UserError("model.max_position_embeddings=1: leaves no room for a token and its successor: take more")
        if self.quant.lambda_warmup_steps and not self.quant.scheme.quantizes:
            raise UserError(
                "quant.lambda_warmup_steps needs a scheme that rounds: the dense twin has nothing to warm up"
            )
        if self.init_from is None and (self.init_optimizer or self.init_sub_norm):
            raise UserError("init_optimizer and init_sub_norm need init_from=<a trained model>")
        if self.init_optimizer and (self.init_sub_norm or self.trainer.strategy == "fsdp"):
            raise UserError("init_optimizer=true: fits the same parameters on one device only: take it back")
        if self.optim.name == "muon" and self.trainer.strategy == "fsdp":
            raise UserError(
                "optim=muon with trainer.strategy=fsdp: Muon needs whole matrices: take trainer=ddp or optim=adamw"
            )
