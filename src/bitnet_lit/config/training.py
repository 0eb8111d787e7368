"""A training run: network, quantization, data, optimizer, schedule, trainer, callbacks, loggers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from bitnet_lit.config.checks import Checked, Range, one_of
from bitnet_lit.config.custom_network import CustomNetwork
from bitnet_lit.config.data import CustomData, DataConfig
from bitnet_lit.config.network import ModelConfig, QuantConfig, import_schemes
from bitnet_lit.config.optim import CustomOptim, CustomSchedule, OptimConfig, ScheduleConfig, optim_schema
from bitnet_lit.config.slots import Group
from bitnet_lit.config.trainer import CallbacksConfig, LoggerConfig, TrainerConfig
from bitnet_lit.errors import UserError

if TYPE_CHECKING:
    AnyModel = ModelConfig | CustomNetwork
    AnyData = DataConfig | CustomData
    AnyOptim = OptimConfig | CustomOptim
    AnySchedule = ScheduleConfig | CustomSchedule
else:  # OmegaConf: whatever the group's file says
    AnyModel = AnyData = AnyOptim = AnySchedule = Any

GROUPS = {
    "model": Group(lambda values: ModelConfig, CustomNetwork),
    "data": Group(lambda values: DataConfig, CustomData),
    "optim": Group(optim_schema, CustomOptim),
    "schedule": Group(lambda values: ScheduleConfig, CustomSchedule),
}
"""The groups that take a class of the user's own."""


@dataclass
class ExportTargetsConfig:
    """What the model is trained for: asked before the first step."""

    targets: list[str] = field(default_factory=list)
    """latent (or hf), packed, gguf_tq2_0, gguf_tq1_0, gguf_f16, llama2c, or a format of your own. A model that cannot
    be exported to one of them, or that the tool it is for would not run, is refused."""

    formats: list[str] = field(default_factory=list)
    """Export formats of your own that `targets` may name, <module>.<class>."""

    def __post_init__(self) -> None:
        from bitnet_lit.checkpoints.formats.format import formats, target_named  # these modules read configs

        for name in self.formats:
            formats().imported(name, f"export.formats=[{name}]")
        for name in self.targets:
            target_named(name)


@dataclass
class TrainConfig(Checked):
    """`python -m bitnet_lit.train`: shards to a run folder with a model folder in it."""

    model: AnyModel = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    data: AnyData = field(default_factory=DataConfig)
    optim: AnyOptim = field(default_factory=OptimConfig)
    """AdamWConfig or MuonConfig, as the group says, or a class of the user's own."""
    schedule: AnySchedule = field(default_factory=ScheduleConfig)
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
    allow: list[str] = field(default_factory=list)
    """With resume: modules and classes of one's own that its config.yaml may name (my_project, my_project.Watch)."""
    schemes: list[str] = field(default_factory=list)
    """Quantization schemes of one's own that the model of init_from may name, <module>.<class>."""
    init_optimizer: bool = False
    """Keep the optimizer's state too, where init_from is a run of ours."""
    init_sub_norm: bool = False
    """Add sub-norms to a model of init_from that has none; their gains are measured on a batch."""
    run_dir: str = "outputs/manual"
    """The run folder; the command sets it to Hydra's."""

    RANGES: ClassVar[dict[str, Range]] = {"seed": Range(0, 2**32 - 1)}

    def __post_init__(self) -> None:
        for name, group in GROUPS.items():
            setattr(self, name, group.filled(name, getattr(self, name)))
        super().__post_init__()
        if not self.run_dir:
            raise UserError("run_dir= is empty: give a folder")
        import_schemes(self.schemes)
        self.compile = str(self.compile).lower()
        one_of("compile", self.compile, ("auto", "true", "false"))
        if self.model.max_position_embeddings < 2:
            raise UserError("model.max_position_embeddings=1: leaves no room for a token and its successor: take more")
        if self.quant.lambda_warmup_steps and not self.quant.scheme.quantizes:
            raise UserError(
                "quant.lambda_warmup_steps needs a scheme that rounds: the dense twin has nothing to warm up"
            )
        if isinstance(self.model, CustomNetwork):
            if self.init_from is not None:
                raise UserError(
                    f"init_from={self.init_from} with model._target_={self.model._target_}: the weights of a trained "
                    "model are of a network of this package: leave one of them out"
                )
            if self.trainer.strategy == "fsdp":
                raise UserError("trainer.strategy=fsdp: cuts the layers of this package: take trainer=ddp")
            if self.export.targets:
                raise UserError(
                    f"export.targets={list(self.export.targets)}: formats describe the network of this package: "
                    f"{self.model.name} has its model folder alone"
                )
        if self.init_from is None and (self.init_optimizer or self.init_sub_norm):
            raise UserError("init_optimizer and init_sub_norm need init_from=<a trained model>")
        if self.init_optimizer and (self.init_sub_norm or self.trainer.strategy == "fsdp"):
            raise UserError("init_optimizer=true: fits the same parameters on one device only: take it back")
        if self.optim.WHOLE_MATRICES and self.trainer.strategy == "fsdp":
            raise UserError(
                f"optim={self.optim.name} with trainer.strategy=fsdp: Muon needs whole matrices: take trainer=ddp or "
                "optim=adamw"
            )
