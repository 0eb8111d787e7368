"""The commands beside training: one dataclass for each `python -m bitnet_lit.<command>`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bitnet_lit.config.checks import SIZE, Checked, Range, one_of
from bitnet_lit.config.inference import CheckpointConfig, EngineConfig, GenerationConfig
from bitnet_lit.errors import UserError

if TYPE_CHECKING:
    from bitnet_lit.checkpoints.formats.format import Format

ANY_SEED = Range(-(2**64), 2**64)


@dataclass
class PrepareConfig(Checked):
    """`python -m bitnet_lit.prepare`: text to shards of token ids, in llama2.c's format."""

    source: str = "demo"
    """demo, tinystories, or a file, folder or glob of .json, .jsonl or .txt files."""
    out: str | None = None
    """The folder to write. null: data/<source>, or for files data/<the name of the file or folder>."""
    tokenizer: str | None = None
    """An existing tokenizer: its file, or a folder with one. null: train a SentencePiece model of vocab_size pieces."""
    vocab_size: int | None = None
    """Pieces of the tokenizer to train. null: 1024 for the demo corpus, 4096 otherwise."""
    num_workers: int | None = None
    """Processes that encode text. null: as many as there are cores."""
    seed: int = 0
    """source=demo: the seed of the stories."""
    num_stories: int = 20000
    """source=demo: the number of stories."""
    download_dir: str | None = None
    """source=tinystories: the folder that keeps the archive and the text. null: the folder `out`."""

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
class InferConfig(GenerationConfig, EngineConfig, CheckpointConfig):
    """`python -m bitnet_lit.infer`: a model goes on from a prompt, or from several."""

    prompt: str = "Once upon a time"
    """The text to go on from. Empty: the model begins by itself."""
    prompts: str | None = None
    """A text file with a prompt on each line, which replaces `prompt`; several texts are generated at once."""
    num_samples: int = 1
    """Texts to generate from each prompt."""
    interactive: bool = False
    """Ask for prompts until an empty line or the end of the input."""
    quiet: bool = False
    """Print nothing but the text and warnings, on a terminal too."""
    tokenizer: str | None = None
    """A SentencePiece model or a tokenizer.json, for a checkpoint that comes without a tokenizer."""

    RANGES: ClassVar[dict[str, Range]] = {**GenerationConfig.RANGES, **EngineConfig.RANGES, "num_samples": SIZE}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interactive and self.prompts is not None:
            raise UserError(f"interactive=true and prompts={self.prompts}: give one, typed prompts or a file of them")


@dataclass
class EvaluateConfig(CheckpointConfig):
    """`python -m bitnet_lit.evaluate`: one deterministic pass over a validation split."""

    data_dir: str | None = None
    """The folder of shards to evaluate on. null: the one that the model was trained on."""
    allow: list[str] = field(default_factory=list)
    """Modules and classes of one's own that the run's config.yaml may name: its data module (my_project)."""
    networks: list[str] = field(default_factory=list)
    """Networks of one's own that the model folder may name, <module>.<class>."""
    batch_size: int = 32
    """Sequences per forward pass. It changes the speed, and the result only by float rounding."""
    sequence_length: int | None = None
    """Tokens of a sequence. null: as in training."""
    accelerator: str = "auto"
    """auto, cpu, gpu (or cuda) or mps, Lightning's names. auto: a GPU where there is one."""

    RANGES: ClassVar[dict[str, Range]] = {"batch_size": SIZE, "sequence_length": SIZE}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("accelerator", self.accelerator, ("auto", "cpu", "gpu", "cuda", "mps"))


@dataclass
class ExportConfig(CheckpointConfig):
    """`python -m bitnet_lit.export`: a model for other tools, compared with the original before it is called done."""

    format: str = "packed"
    """latent (full precision), packed (2-bit codes for transformers), gguf (llama.cpp), llama2c (run.c), or the name of
    a format of your own."""
    formats: list[str] = field(default_factory=list)
    """Export formats of your own, <module>.<class>: subclasses of bitnet_lit.checkpoints.formats.format.Format."""
    out: str | None = None
    """The folder to write; for a format that is one file (gguf), the file. null: beside the model."""
    type: str = "tq2_0"
    """gguf: tq2_0 (2.06 bits a projection weight), tq1_0 (1.69 bits, slower) or f16."""
    embeddings: str = "q8_0"
    """gguf: q8_0 (8.5 bits), q6_k (6.6 bits) or f16."""
    dtype: str = "float32"
    """latent, packed: float32 or bfloat16, the type of everything that is no packed code."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further options of a format of your own."""
    verify: bool = True
    """Read the exported model back and compare; leave nothing where it differs."""
    share: str | None = None
    """Upload the folder with a model card to this repository of the Hugging Face hub (owner/name)."""

    FORMAT_OPTIONS: ClassVar[tuple[str, ...]] = ("type", "embeddings", "dtype")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.chosen_format  # makes it, which checks its options

    @property
    def chosen_format(self) -> Format:
        """The format as an object.

        Raises:
            UserError: an unknown name, an option that it does not have, or a value that does not fit.
        """
        from bitnet_lit.checkpoints.formats.format import (  # these modules read configs
            format_class,
            formats,
            make_format,
        )

        for target in self.formats:
            formats().imported(target, f"formats=[{target}]")
        has = {option.name for option in fields(format_class(self.format))}
        options = dict(self.settings)
        for key in self.FORMAT_OPTIONS:
            if key in options:
                raise UserError(f"settings.{key}={options[key]}: has a key of its own: set {key}")
            if key in has:
                options[key] = getattr(self, key)
        return make_format(self.format, options)

    @property
    def unused_options(self) -> list[str]:
        """Options that were set and that the format does not have, as key=value."""
        has = {option.name for option in fields(self.chosen_format)}
        chosen = {key: getattr(self, key) for key in self.FORMAT_OPTIONS if key not in has}
        return [f"{key}={value}" for key, value in chosen.items() if value != getattr(ExportConfig, key)]


@dataclass
class PlotConfig:
    """`python -m bitnet_lit.plot`: the curves of runs, as a PNG."""

    runs: list[str] = field(default_factory=lambda: ["outputs"])
    """A run folder, a folder with runs somewhere below it, or a list of such folders: [a,b]."""
    metric: str = "val/loss"
    """The column of metrics.csv to plot."""
    label: str = "quant"
    """What the legend shows of each run: a config group (quant, model, optim) or seed."""
    out: str = "outputs/curves.png"
    """The picture to write."""


@dataclass
class BenchConfig(Checked):
    """`python -m bitnet_lit.bench`: speed, beside other software's; the last line is JSON."""

    suite: str = "data"
    """data: encoding text, and loading batches. cpu: decode and prefill of the native engine."""
    rounds: int = 7
    """Measurements of each, interleaved (ours, theirs, ours, ...); the table shows medians."""
    threads: int | None = None
    """suite=cpu: threads of every engine. null: one on each physical core."""

    RANGES: ClassVar[dict[str, Range]] = {"rounds": SIZE, "threads": SIZE}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("suite", self.suite, ("data", "cpu"))
