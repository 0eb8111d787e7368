"""This module has the config of a training run: all groups, and the keys of the command itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from bitnet_lit.config.checks import Checked, Range, one_of
from bitnet_lit.config.custom_network import CustomNetwork
from bitnet_lit.config.data import CustomData, DataConfig
from bitnet_lit.config.distill import DistillConfig
from bitnet_lit.config.network import ModelConfig, QuantConfig, import_schemes
from bitnet_lit.config.optim import CustomOptim, CustomSchedule, OptimConfig, ScheduleConfig, optim_schema
from bitnet_lit.config.slots import Group
from bitnet_lit.config.sweep import SweepConfig
from bitnet_lit.config.trainer import CallbacksConfig, LoggerConfig, TrainerConfig
from bitnet_lit.errors import UserError

if TYPE_CHECKING:
    AnyModel = ModelConfig | CustomNetwork
    AnyData = DataConfig | CustomData
    AnyOptim = OptimConfig | CustomOptim
    AnySchedule = ScheduleConfig | CustomSchedule
else:  # OmegaConf sees these: Any lets the file of the group choose the dataclass
    AnyModel = AnyData = AnyOptim = AnySchedule = Any

GROUPS = {
    "model": Group(lambda values: ModelConfig, CustomNetwork),
    "data": Group(lambda values: DataConfig, CustomData),
    "optim": Group(optim_schema, CustomOptim),
    "schedule": Group(lambda values: ScheduleConfig, CustomSchedule),
}
"""The groups that may name a class of the user's own."""


@dataclass
class ExportTargetsConfig:
    """ExportTargetsConfig lists the formats that the trained model must fit. This is checked before the first step."""

    targets: list[str] = field(default_factory=list)
    """latent (or hf), packed, gguf_tq2_0, gguf_tq1_0, gguf_f16, llama2c, or a format of your own. A run is refused if
    its model cannot be exported to one of them, or if the tool for that format could not run it."""

    formats: list[str] = field(default_factory=list)
    """Export formats of your own that `targets` may name, <module>.<class>."""

    def __post_init__(self) -> None:
        # Imported here, because that module imports configs.
        from bitnet_lit.checkpoints.formats.format import formats, target_named

        for name in self.formats:
            formats().imported(name, f"export.formats=[{name}]")
        for name in self.targets:
            target_named(name)


@dataclass
class TrainConfig(Checked):
    """`python -m bitnet_lit.train` trains a model, and writes a run folder with a model folder in it."""

    model: AnyModel = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    data: AnyData = field(default_factory=DataConfig)
    optim: AnyOptim = field(default_factory=OptimConfig)
    """AdamWConfig, MuonConfig, or a class of the user's own (CustomOptim)."""
    schedule: AnySchedule = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    export: ExportTargetsConfig = field(default_factory=ExportTargetsConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    seed: int = 1
    """The seed of the initial weights, of the order of the data and of dropout."""
    compile: str = "auto"
    """torch.compile: auto (on for CUDA), true or false."""
    cuda_graph: str = "auto"
    """Record the kernels of a step once and replay them: auto (on GPUs, where memory is plenty), true or false."""
    resume: str | None = None
    """The folder of a run that was stopped. The run goes on in the same folder."""
    init_from: str | None = None
    """A trained model to start from: any that `infer` can open as its checkpoint. Its sizes replace `model`."""
    allow: list[str] = field(default_factory=list)
    """With resume, modules and classes of your own that the config.yaml of the run may name (my_project,
    my_project.Watch)."""
    schemes: list[str] = field(default_factory=list)
    """Quantization schemes of your own that the model of init_from may name, <module>.<class>."""
    init_optimizer: bool = False
    """Start from the optimizer's state of init_from too, which must be a run of this package."""
    init_sub_norm: bool = False
    """Add sub-norms to a model of init_from that has none. Their gains are measured on a batch."""
    run_dir: str = "outputs/manual"
    """The run folder. The command sets it to hydra.run.dir."""

    RANGES: ClassVar[dict[str, Range]] = {"seed": Range(0, 2**32 - 1)}

    def __post_init__(self) -> None:
        for name, group in GROUPS.items():
            setattr(self, name, group.filled(name, getattr(self, name)))
        super().__post_init__()
        if not self.run_dir:
            raise UserError("run_dir= is empty: give a folder")
        import_schemes(self.schemes)
        for key in ("compile", "cuda_graph"):
            setattr(self, key, str(getattr(self, key)).lower())
            one_of(key, getattr(self, key), ("auto", "true", "false"))
        if self.model.max_position_embeddings < 2:
            raise UserError("model.max_position_embeddings=1: leaves no room for a token and the next: take 2 or more")
        for key in ("start_at", "lambda_warmup_steps"):
            if (value := getattr(self.quant, key)) and not self.quant.scheme.quantizes:
                raise UserError(
                    f"quant.{key}={value} needs a scheme that rounds, and quant={self.quant.name} does not: leave it "
                    "out, or take quant=b158"
                )
        if self.quant.start_at and self.quant.scheme.transforms_inputs:
            raise UserError(
                f"quant.start_at={self.quant.start_at}: quant={self.quant.name} transforms inputs, and a layer in full "
                "precision does not, so what it learns would be lost: take quant.settings.hadamard=false, or "
                "quant.start_at=0"
            )
        if isinstance(self.model, CustomNetwork):
            if self.init_from is not None:
                raise UserError(
                    f"init_from={self.init_from} with model._target_={self.model._target_}: init_from reads weights of "
                    "this package's own network: leave one of them out"
                )
            if self.distill.teacher is not None:
                raise UserError(
                    f"distill.teacher={self.distill.teacher} with model._target_={self.model._target_}: distillation "
                    "reads parts of this package's own network: leave one of them out"
                )
            if self.trainer.strategy == "fsdp":
                raise UserError("trainer.strategy=fsdp: shards only this package's own network: take trainer=ddp")
            if self.export.targets:
                raise UserError(
                    f"export.targets={list(self.export.targets)}: formats describe this package's own network, and "
                    f"{self.model.name} is saved as a model folder only: leave export.targets out"
                )
        if self.init_from is None and (self.init_optimizer or self.init_sub_norm):
            raise UserError("init_optimizer and init_sub_norm need init_from=<a trained model>")
        if self.init_optimizer and self.init_sub_norm:
            raise UserError(
                "init_optimizer=true: the optimizer's state must have the same parameters: leave it out with "
                "init_sub_norm=true"
            )
