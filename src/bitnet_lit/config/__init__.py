"""The schema has every key that a user can set, with its type, its unit, its default and its meaning.

Hydra composes the YAML files of `conf/` onto these dataclasses, so an unknown key or a wrong type is refused before
anything runs. YAML selects values, and these classes validate them in `__post_init__`, with a remedy in the message.
All other code gets these objects and never a dictionary.

The names of keys are Hugging Face's for models (`hidden_size`, `num_key_value_heads`), and those of PyTorch and
Lightning for training.
"""

from bitnet_lit.config.commands import (
    BenchConfig,
    EvaluateConfig,
    ExportConfig,
    InferConfig,
    PlotConfig,
    PrepareConfig,
    ReportConfig,
)
from bitnet_lit.config.custom_network import CustomNetwork
from bitnet_lit.config.data import CustomData, DataConfig
from bitnet_lit.config.distill import DistillConfig
from bitnet_lit.config.inference import CheckpointConfig, EngineConfig, GenerationConfig
from bitnet_lit.config.network import ModelConfig, QuantConfig
from bitnet_lit.config.optim import (
    AdamWConfig,
    CustomOptim,
    CustomSchedule,
    MuonConfig,
    OptimConfig,
    ScheduleConfig,
)
from bitnet_lit.config.sweep import SweepConfig
from bitnet_lit.config.trainer import CallbacksConfig, LoggerConfig, TrainerConfig
from bitnet_lit.config.training import ExportTargetsConfig, TrainConfig

__all__ = [
    "AdamWConfig",
    "BenchConfig",
    "CallbacksConfig",
    "CheckpointConfig",
    "CustomData",
    "CustomNetwork",
    "CustomOptim",
    "CustomSchedule",
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ExportTargetsConfig",
    "GenerationConfig",
    "InferConfig",
    "LoggerConfig",
    "ModelConfig",
    "MuonConfig",
    "OptimConfig",
    "PlotConfig",
    "PrepareConfig",
    "QuantConfig",
    "ReportConfig",
    "ScheduleConfig",
    "SweepConfig",
    "TrainConfig",
    "TrainerConfig",
]
