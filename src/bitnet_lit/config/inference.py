"""These options say how a model is opened and run, by `infer` and by `bitnet_lit.load` and `generate` in Python.

Each option is declared here once, with its type, default, range and meaning. `InferConfig` inherits the fields, so on
the command line they are plain keys (`temperature=0.7`, `threads=2`). The signatures in inference/language_model.py
repeat the options, so that editors show them, and a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from bitnet_lit.config.checks import SIZE, Checked, Range, list_of_texts, one_of
from bitnet_lit.config.network import import_schemes
from bitnet_lit.errors import UserError

ENGINES = ("auto", "cpu", "cuda", "torch")
HEADS = ("auto", "int8", "int4", "float")
KV_CACHES = ("half", "float", "int8")
CUDA_HEADS = ("auto", "int8", "float")
CUDA_KV_CACHES = ("half", "float")
DEVICES = ("cpu", "cuda", "mps")

MANY = Range(0, 1e30)  # a number above the number of tokens means all tokens


@dataclass
class CheckpointConfig(Checked):
    """CheckpointConfig says which model a command opens."""

    checkpoint: str | None = None
    """A run folder, a model folder, a .pt or .bin file of llama2.c, or a model of the Hugging Face hub (owner/name).
    null: the newest run in outputs/."""
    schemes: list[str] = field(default_factory=list)
    """Quantization schemes of your own that the model may name, <module>.<class>. A scheme that is named only by a
    model folder is never imported."""

    def __post_init__(self) -> None:
        import_schemes(self.schemes)
        super().__post_init__()


@dataclass
class EngineConfig(Checked):
    """EngineConfig says what computes the logits. `threads` is for the native engine only, `head` and `kv_cache` for it
    and the CUDA engine.

    Raises:
        UserError: a name is unknown, a number is outside its range, or an engine is set with a device of another kind.
    """

    engine: str = "auto"
    """cpu: the native engine, C++ compiled for this machine. cuda: the CUDA engine, kernels for NVIDIA GPUs. torch:
    PyTorch. auto: the native engine on a CPU and the CUDA engine on a GPU where they can run the model, and PyTorch
    otherwise, with a note that says why."""
    device: str = "cpu"
    """cpu, cuda or mps; cuda:1 is the second GPU. engine=cuda alone means device=cuda."""
    threads: int | None = None
    """Threads of the native engine. null: one on each physical core."""
    head: str = "auto"
    """How an engine stores the rows of the output head: int8, int4 (with int8 for the likeliest tokens; the native
    engine only), float (as in the model folder; exact and slower), or auto: int8, and in the native engine int4 where
    int8 rows are larger than the processor's caches."""
    kv_cache: str = "half"
    """How an engine stores keys and values: half (float16), float (float32), or, in the native engine only, int8 with
    one scale for each head and token."""

    RANGES: ClassVar[dict[str, Range]] = {"threads": SIZE}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("engine", self.engine, ENGINES)
        one_of("head", self.head, HEADS)
        one_of("kv_cache", self.kv_cache, KV_CACHES)
        kind, colon, index = str(self.device).partition(":")
        if kind not in DEVICES or (colon and not (kind == "cuda" and index.isdecimal())):
            raise UserError(f"device={self.device}: must be one of {', '.join(DEVICES)}, or cuda:<number of the GPU>")
        if self.engine == "cuda":
            self.device = "cuda" if self.device == "cpu" else self.device  # cpu is the default, not what a user meant
            if not self.device.startswith("cuda"):
                raise UserError(
                    f"engine=cuda and device={self.device}: the CUDA engine runs on NVIDIA GPUs alone: take "
                    "engine=torch, or device=cuda"
                )
            for key, value, held in (("head", self.head, CUDA_HEADS), ("kv_cache", self.kv_cache, CUDA_KV_CACHES)):
                if value not in held:
                    raise UserError(f"engine=cuda and {key}={value}: the CUDA engine has {key}={'|'.join(held)}")
        if self.engine == "cpu" and self.device != "cpu":
            raise UserError(
                f"engine=cpu and device={self.device}: the native engine runs on the CPU alone: take engine=torch, or "
                "device=cpu"
            )


@dataclass
class GenerationConfig(Checked):
    """GenerationConfig says how tokens are sampled. inference/sampling.py has the order in which the options apply.

    Raises:
        UserError: a value has another type, or is outside its range.
    """

    max_new_tokens: int = 256
    """The most tokens to generate. The text also ends at EOS, at a stop text, and where the context ends."""
    temperature: float = 0.8
    """Divides the logits. 0: always the likeliest token (greedy). 1: the model's own distribution."""
    top_k: int = 0
    """Sample from the k likeliest tokens. 0: from all."""
    top_p: float = 0.95
    """Sample from the fewest likeliest tokens whose probabilities add up to this. 1: from all."""
    min_p: float = 0.0
    """Leave out tokens whose probability is below this share of the likeliest token's. 0: none."""
    repeat_penalty: float = 1.0
    """Divide positive logits of recent tokens by this, and multiply negative ones. 1: off."""
    repeat_last_n: int = 64
    """How many of the last tokens repeat_penalty counts as recent."""
    seed: int | None = None
    """The seed of the sampling: the same seed gives the same text. null: another text each time. It may be any integer
    from -2**128 to 2**128. (The seed of a training run is Lightning's, from 0 to 2**32 - 1.)"""
    stop: list[str] = field(default_factory=list)
    """Texts that end the generated text. They are not part of it."""

    # Temperature and penalty are computed in float32. A number below 1e-30 could become zero, one above 1e30 infinite.
    RANGES: ClassVar[dict[str, Range]] = {
        "max_new_tokens": Range(0, 2**31 - 1),
        "temperature": Range(1e-30, 1e30, also=(0,), must="be 0 (greedy) or 1e-30 to 1e+30"),
        "top_k": MANY,
        "top_p": Range(0, 1, open_left=True),
        "min_p": Range(0, 1, open_right=True),
        "repeat_penalty": Range(1e-30, 1e30, must="be 1 (off), or 1e-30 to 1e+30"),
        "repeat_last_n": MANY,
        "seed": Range(-(2**128), 2**128),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stop = list_of_texts("stop", self.stop)
