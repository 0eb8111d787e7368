"""This module has the options of all commands but `train`: a dataclass for each `python -m bitnet_lit.<command>`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bitnet_lit.config.checks import SIZE, Checked, Range, not_empty, one_of, written
from bitnet_lit.config.inference import CheckpointConfig, EngineConfig, GenerationConfig
from bitnet_lit.errors import UserError

if TYPE_CHECKING:
    from bitnet_lit.checkpoints.formats.format import Format

ANY_SEED = Range(-(2**64), 2**64)


@dataclass
class PrepareConfig(Checked):
    """`python -m bitnet_lit.prepare` turns text into shards of token ids, in llama2.c's format."""

    source: list[str] = field(default_factory=lambda: ["demo"])
    """demo, tinystories, or a file, folder or glob of .json, .jsonl, .txt (also .gz or .zst), .parquet or .arrow, or a
    list of these: [a.txt,b]."""
    column: str | None = None
    """The column of a table, or the key of a JSON record, that has the text. null: text, story or content."""
    out: str | None = None
    """The folder to write. null: data/<source>; for files of your own, data/<name of the file or folder>."""
    tokenizer: str | None = None
    """An existing tokenizer: its file, or its folder. null: train a SentencePiece model of vocab_size pieces."""
    vocab_size: int | None = None
    """Pieces of the tokenizer to train. null: 1024 for the demo corpus, 4096 otherwise."""
    num_workers: int | None = None
    """Processes that encode text. null: as many as there are processors that it may use."""
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
        given: object = self.source
        self.source = [given] if isinstance(given, str) else self.source  # in Python a text may be given
        not_empty("out", self.out)
        if len(self.source) > 1 and self.out is None:
            raise UserError(f"{self.typed_source}: several sources have no name: give out=<folder>")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise UserError(
                f"tokenizer={self.tokenizer} and vocab_size={self.vocab_size}: give one, an existing tokenizer or the "
                "size of a new one"
            )

    @property
    def typed_source(self) -> str:
        """`source` as a user types it, for messages."""
        several = ",".join(self.source)
        return f"source=[{several}]" if len(self.source) > 1 else f"source={several}"

    @property
    def folder(self) -> Path:
        """`out`, or its default where it is None."""
        if self.out is not None:
            return Path(self.out)
        source = Path("".join(self.source))  # the only one
        while any(sign in source.name for sign in "*?["):
            source = source.parent
        if source.name in ("", ".."):
            source = source.resolve()
        return Path("data") / (source.name if source.is_dir() else source.stem)


@dataclass
class InferConfig(GenerationConfig, EngineConfig, CheckpointConfig):
    """`python -m bitnet_lit.infer` generates text from one prompt or from several."""

    prompt: str = "Once upon a time"
    """The text to go on from. Empty: the model starts from nothing."""
    prompts: str | None = None
    """A text file with a prompt on each line, in place of `prompt`; - is standard input. Several texts are generated at
    the same time."""
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
class TextFilesConfig(Checked):
    """TextFilesConfig names text files to evaluate on: `data=my.txt` is `data.files=my.txt`."""

    files: list[str] = field(default_factory=list)
    """Files, folders and globs of .txt, .jsonl and .json files, read as prepare reads them; - is standard input."""


@dataclass
class EvaluateConfig(CheckpointConfig):
    """`python -m bitnet_lit.evaluate` measures a model in one deterministic pass over a validation split, or over text.

    Text is read in windows that slide over each document (inference/evaluation_text.py).
    """

    data: TextFilesConfig = field(default_factory=TextFilesConfig)
    """Text to evaluate on, in place of a validation split."""
    column: str | None = None
    """For text: the column of a table, or the key of a JSON record, that has it. null: text, story or content."""
    data_dir: str | None = None
    """The folder of shards to evaluate on. null: the folder that the model was trained on."""
    allow: list[str] = field(default_factory=list)
    """Modules and classes of your own that the config.yaml of the run may name (my_project). Evaluation needs its data
    module."""
    networks: list[str] = field(default_factory=list)
    """Networks of your own that the model folder may name, <module>.<class>."""
    batch_size: int = 32
    """Sequences per forward pass. It changes the speed, and the result only by float rounding."""
    sequence_length: int | None = None
    """Tokens of a sequence, or of a window of text. null: as in training."""
    stride: int | None = None
    """Tokens by which a window of text moves on. Each token has at least sequence_length - stride tokens before it,
    except at the start of a document. null: half of sequence_length."""
    accelerator: str = "auto"
    """auto, cpu, gpu (or cuda) or mps, Lightning's names. auto: a GPU where there is one."""

    RANGES: ClassVar[dict[str, Range]] = {"batch_size": SIZE, "sequence_length": SIZE, "stride": SIZE}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.files and self.data_dir is not None:
            raise UserError(f"data={self.data.files[0]} and data_dir={self.data_dir}: give one, text or shards")
        if self.stride is not None and not self.data.files:
            raise UserError(f"stride={self.stride}: windows slide over text: give data=<text file>")
        if self.column is not None and not self.data.files:
            raise UserError(f"column={self.column}: is of text files: give data=<text file>")
        one_of("accelerator", self.accelerator, ("auto", "cpu", "gpu", "cuda", "mps"))


@dataclass
class ExportConfig(CheckpointConfig):
    """`python -m bitnet_lit.export` writes a model for other tools, and compares it with the original."""

    format: str = "packed"
    """latent (full precision), packed (2-bit codes for transformers), gguf (llama.cpp), llama2c (run.c), or the name of
    a format of your own."""
    formats: list[str] = field(default_factory=list)
    """Export formats of your own, <module>.<class>: subclasses of bitnet_lit.checkpoints.formats.format.Format."""
    out: str | None = None
    """The folder to write, or the file for a format that is one file (gguf). null: beside the model."""
    type: str = "tq2_0"
    """For gguf, the type of the projections: tq2_0 (2.06 bits per weight), tq1_0 (1.69 bits, slower) or f16."""
    embeddings: str = "q8_0"
    """For gguf, the type of the embedding and the head: q8_0 (8.5 bits per weight), q6_k (6.6 bits) or f16."""
    dtype: str = "float32"
    """For latent and packed, the dtype of every tensor that does not hold packed codes: float32 or bfloat16."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further options of a format of your own."""
    verify: bool = True
    """Read the exported model back and compare it with the original. An export that differs is removed."""
    share: str | None = None
    """A repository of the Hugging Face hub (owner/name) to which the folder is uploaded, with a model card."""

    FORMAT_OPTIONS: ClassVar[tuple[str, ...]] = ("type", "embeddings", "dtype")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.chosen_format  # making the format checks its options

    @property
    def chosen_format(self) -> Format:
        """The format as an object.

        Raises:
            UserError: the name is unknown, the format has no such option, or a value is refused.
        """
        from bitnet_lit.checkpoints.formats.format import (  # imported here, because that module imports configs
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
        """The options that differ from their defaults and that the format does not have, as key=value."""
        has = {option.name for option in fields(self.chosen_format)}
        chosen = {key: getattr(self, key) for key in self.FORMAT_OPTIONS if key not in has}
        return [f"{key}={written(value)}" for key, value in chosen.items() if value != getattr(ExportConfig, key)]


@dataclass
class PlotConfig:
    """`python -m bitnet_lit.plot` draws the curves of runs into a PNG file."""

    runs: list[str] = field(default_factory=lambda: ["outputs"])
    """A run folder, a folder with runs at any depth, or a list of such folders: [a,b]."""
    metric: str = "val/loss"
    """The column of metrics.csv to plot."""
    label: str = "quant"
    """The config group (quant, model, optim) or the key (seed) that colours stand for, and that the legend names."""
    out: str = "outputs/curves.png"
    """The PNG file to write."""

    def __post_init__(self) -> None:
        not_empty("out", self.out)


@dataclass
class ReportConfig(Checked):
    """`python -m bitnet_lit.report` compares runs: means with intervals over seeds, and gaps to the dense model."""

    runs: list[str] = field(default_factory=lambda: ["outputs"])
    """A run folder, a folder with runs at any depth, a glob of them, or a list of these: [a,b]."""
    by: list[str] = field(default_factory=list)
    """The keys and groups of the config that name the rows: quant,model. Empty: those that tell the runs apart."""
    over: list[str] = field(default_factory=lambda: ["seed"])
    """The keys in which the runs of a row differ. The mean is taken over them."""
    metric: str = "val/loss"
    """The column of metrics.csv that is compared."""
    dense_bits: int = 16
    """Bits of a weight that is not quantized, for the bytes of a model: 16 as models are shipped, 32 as trained."""
    schemes: list[str] = field(default_factory=list)
    """Quantization schemes of your own that the runs have, <module>.<class>."""
    out: str | None = None
    """The folder to write. null: the folder that `runs` names, or the one that all runs lie in."""

    RANGES: ClassVar[dict[str, Range]] = {"dense_bits": Range(1, 64)}

    def __post_init__(self) -> None:
        super().__post_init__()
        not_empty("out", self.out)


@dataclass
class BenchConfig(Checked):
    """`python -m bitnet_lit.bench` compares our speed with that of other software. Its last line is JSON."""

    suite: str = "data"
    """data: encoding text, and loading batches. cpu: decode and prefill of the native engine. cpu_train: training on
    the CPU. gpu_train: training on one GPU. gpu_decode: generation on one GPU."""
    rounds: int = 7
    """Measurements of each program, interleaved (ours, theirs, ours, ...). The table shows medians."""
    threads: int | None = None
    """For the suites of the CPU, the threads of every program. null: one on each physical core."""

    RANGES: ClassVar[dict[str, Range]] = {"rounds": SIZE, "threads": SIZE}
    SUITES: ClassVar[dict[str, str]] = {
        "data": "bitnet_lit.data.benchmark.data_rows",
        "cpu": "bitnet_lit.inference.benchmark.cpu_rows",
        "cpu_train": "bitnet_lit.training.cpu_benchmark.cpu_train_rows",
        "gpu_train": "bitnet_lit.training.benchmark.gpu_train_rows",
        "gpu_decode": "bitnet_lit.inference.gpu_benchmark.gpu_decode_rows",
    }
    """The function that measures each suite: it takes this config and returns the rows of the table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("suite", self.suite, tuple(self.SUITES))
