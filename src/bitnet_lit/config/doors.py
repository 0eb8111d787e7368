"""The doors beside training: one dataclass for each `python -m bitnet_lit.<door>`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from bitnet_lit.config.checks import SIZE, Checked, Range, one_of
from bitnet_lit.config.network import import_schemes
from bitnet_lit.errors import UserError

ANY_SEED = Range(-(2**64), 2**64)

# What a sampler can compute with: temperatures and penalties are used as float32, in which less would be zero and more
# infinite.
SAMPLING = {
    "temperature": Range(1e-30, 1e30, also=(0,), must="be 0 (greedy) or 1e-30 to 1e+30"),
    "top_k": Range(0, 1e30),  # more than there are tokens means all of them
    "top_p": Range(0, 1, open_left=True),
    "min_p": Range(0, 1, open_right=True),
    "repeat_penalty": Range(1e-30, 1e30, must="be 1 (off), or 1e-30 to 1e+30"),
    "repeat_last_n": Range(0, 1e30),
}


@dataclass
class PrepareConfig(Checked):
    """`python -m bitnet_lit.prepare`: text to llama2.c shards."""

    source: str = "demo"
    """demo, tinystories, or a file, folder or glob of .json, .jsonl or .txt files."""
    out: str | None = None
    """The folder to write. null: data/<source>, for files data/<their name, or their folder's>."""
    tokenizer: str | None = None
    """An existing SentencePiece model. null: train one with vocab_size entries."""
    vocab_size: int | None = None
    """Entries of the tokenizer to train. null: 1024 for the demo corpus, 4096 otherwise; with `tokenizer`, unused."""
    num_workers: int | None = None
    """Processes that encode. null: all cores."""
    seed: int = 0
    """Of the demo corpus."""
    num_stories: int = 20000
    """Of the demo corpus."""
    download_dir: str | None = None
    """Where source=tinystories keeps the archive and the text. null: in out."""

    RANGES: ClassVar[dict[str, Range]] = {
        "vocab_size": SIZE,
        "num_workers": Range(1, 2**16, must="be 1 to 65536"),
        "seed": ANY_SEED,
        "num_stories": SIZE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is not None and self.vocab_size is not None:
            raise UserError(
                f"tokenizer={self.tokenizer} and vocab_size={self.vocab_size}: give one, an existing tokenizer or the "
                "size of a new one"
            )

    @property
    def folder(self) -> Path:
        """`out` with its default filled in."""
        if self.out is not None:
            return Path(self.out)
        source = Path(self.source)
        while any(sign in source.name for sign in "*?["):
            source = source.parent
        return Path("data") / (source.resolve() if source.name in ("", "..") else source).stem


@dataclass
class InferConfig(Checked):
    """`python -m bitnet_lit.infer`: a model folder tells a story."""

    prompt: str = "Once upon a time"
    """The text to go on from. Empty: the model starts a story by itself."""
    prompts: str | None = None
    """A text file with a prompt on each line, in place of `prompt`; several are generated at once."""
    checkpoint: str | None = None
    """Run folder, model folder, .pt or .bin of llama2.c, or a model of the Hugging Face hub (owner/name). null: the
    newest run below outputs/."""
    schemes: list[str] = field(default_factory=list)
    """Quantization schemes of one's own that the model may name, <module>.<class>. What a folder names is never
    imported by itself."""
    tokenizer: str | None = None
    """Of a checkpoint that comes without one: a SentencePiece model or a tokenizer.json."""
    max_new_tokens: int = 256
    """At most; the context ends a text too."""
    temperature: float = 0.8
    """0 always takes the likeliest token; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Sample from the k likeliest tokens. 0: from all."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that together have this probability. 1: from all."""
    min_p: float = 0.0
    """Leave out tokens below this share of the likeliest one's probability."""
    repeat_penalty: float = 1.0
    """Divide (multiply, if negative) the logits of recent tokens by this. 1: off."""
    repeat_last_n: int = 64
    """How many recent tokens repeat_penalty looks at."""
    seed: int | None = None
    """Of the sampling; the same seed gives the same text. null: another text each time."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a sample; they are not printed."""
    num_samples: int = 1
    """Texts to generate from each prompt."""
    interactive: bool = False
    """Ask for prompts until an empty line or end of input."""
    quiet: bool = False
    """Print nothing but the text, on a terminal too."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    engine: str = "auto"
    """cpu (compiled code), torch, or auto: cpu where it can run the model."""
    threads: int | None = None
    """Of the cpu engine. null: one on each physical core."""
    head: str = "auto"
    """Of the cpu engine: rows of int8, of int4 (and int8 for likely tokens), of float (exact, slower), or auto: int4
    where int8 rows are larger than caches are."""
    kv_cache: str = "half"
    """Of the cpu engine: keys and values as half (float16), as float, or as int8 with a scale each."""

    RANGES: ClassVar[dict[str, Range]] = {
        "max_new_tokens": SIZE,
        **SAMPLING,
        "seed": ANY_SEED,
        "num_samples": SIZE,
        "threads": SIZE,
    }

    def __post_init__(self) -> None:
        import_schemes(self.schemes)
        super().__post_init__()
        one_of("engine", self.engine, ("auto", "cpu", "torch"))
        one_of("head", self.head, ("auto", "int8", "int4", "float"))
        one_of("kv_cache", self.kv_cache, ("half", "float", "int8"))
        one_of("device", self.device, ("cpu", "cuda", "mps"))


@dataclass
class EvaluateConfig(Checked):
    """`python -m bitnet_lit.evaluate`: a deterministic pass over a validation split."""

    checkpoint: str | None = None
    """Run folder, model folder, .pt or .bin of llama2.c, or a model of the Hugging Face hub (owner/name). null: the
    newest run below outputs/."""
    schemes: list[str] = field(default_factory=list)
    """Quantization schemes of one's own that the model may name, <module>.<class>. What a folder names is never
    imported by itself."""
    data_dir: str | None = None
    """Shards to evaluate on. null: those the model was trained on."""
    batch_size: int = 32
    """Sequences per forward pass; changes speed, and the result only by float rounding."""
    sequence_length: int | None = None
    """Tokens of a sequence. null: as in training."""
    accelerator: str = "auto"
    """auto, cpu, gpu or mps."""

    RANGES: ClassVar[dict[str, Range]] = {"batch_size": SIZE, "sequence_length": SIZE}

    def __post_init__(self) -> None:
        import_schemes(self.schemes)
        super().__post_init__()
        one_of("accelerator", self.accelerator, ("auto", "cpu", "gpu", "mps"))


@dataclass
class ExportConfig:
    """`python -m bitnet_lit.export`: a model for other tools, compared with the original before it is called done."""

    checkpoint: str | None = None
    """Run folder, model folder, .pt or .bin of llama2.c, or a model of the Hugging Face hub (owner/name). null: the
    newest run below outputs/."""
    schemes: list[str] = field(default_factory=list)
    """Quantization schemes of one's own that the model may name, <module>.<class>. What a folder names is never
    imported by itself."""
    format: str = "packed"
    """latent (full precision), packed (2-bit codes for transformers), gguf (llama.cpp) or llama2c (run.c)."""
    out: str | None = None
    """The folder to write, for gguf the file. null: beside the model."""
    type: str = "tq2_0"
    """gguf: tq2_0 (2.06 bits a projection weight), tq1_0 (1.69 bits, slower) or f16."""
    embeddings: str = "q8_0"
    """gguf: q8_0 (8.5 bits), q6_k (6.6 bits) or f16."""
    dtype: str = "float32"
    """latent, packed: float32 or bfloat16, of everything that is no packed code."""
    verify: bool = True
    """Read the artefact back and compare; leave nothing where it differs."""
    share: str | None = None
    """Upload a folder with a model card to this repository of the Hugging Face hub (owner/name)."""

    def __post_init__(self) -> None:
        import_schemes(self.schemes)
        one_of("format", self.format, ("latent", "packed", "gguf", "llama2c"))
        one_of("type", self.type, ("tq2_0", "tq1_0", "f16"))
        one_of("embeddings", self.embeddings, ("q8_0", "q6_k", "f16"))
        one_of("dtype", self.dtype, ("float32", "bfloat16"))


@dataclass
class PlotConfig:
    """`python -m bitnet_lit.plot`: curves of runs, as a PNG."""

    runs: list[str] = field(default_factory=lambda: ["outputs"])
    """A run folder, a folder with runs somewhere below, or a list of them: [a,b]."""
    metric: str = "val/loss"
    """A column of metrics.csv."""
    label: str = "quant"
    """What tells the curves apart: any key of config.yaml that is a group's name (quant, model, optim), or seed."""
    out: str = "outputs/curves.png"
    """The picture to write."""


@dataclass
class BenchConfig(Checked):
    """`python -m bitnet_lit.bench`: speed, beside what it is compared to; the last line is JSON."""

    suite: str = "data"
    """data: encoding text to tokens, and the loader. cpu: decode and prefill of the native engine."""
    rounds: int = 7
    """Interleaved measurements (ours, theirs, ours, ...); medians are shown."""
    threads: int | None = None
    """suite=cpu: of every engine. null: one on each physical core."""

    RANGES: ClassVar[dict[str, Range]] = {"rounds": SIZE, "threads": SIZE}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("suite", self.suite, ("data", "cpu"))
