"""The schema: every key a user can set, with its type, its unit and its default meaning.

Hydra composes YAML from `conf/` onto these dataclasses, so an unknown key or a wrong type is refused before
anything runs. YAML selects values, these classes validate them (`__post_init__`, with a remedy in the message), and
the code below the doors sees only these objects, never a dictionary.

Names follow Hugging Face for models (`hidden_size`, `num_key_value_heads`), PyTorch and Lightning for training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bitnet_lit.errors import UserError


def _positive(owner: str, **values: float | None) -> None:
    for key, value in values.items():
        if value is not None and value <= 0:
            raise UserError(f"{owner}.{key}={value}: must be greater than zero")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value}: must be one of {', '.join(allowed)}")


@dataclass
class ModelConfig:
    """The sizes of a Llama-shaped decoder. Field names are Hugging Face's, units are elements."""

    name: str = "custom"
    """The name of the size, for tables. Nothing depends on it."""
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    """Grouped-query attention: heads of keys and values. null: as many as attention heads."""
    intermediate_size: int = 384
    """Width of the feed-forward layer."""
    vocab_size: int | None = None
    """Rows of the embedding. null: follows the data."""
    max_position_embeddings: int = 256
    """The context, in tokens; also the length of a training sequence unless data.sequence_length says less."""
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    """silu (llama.cpp's graph can run it) or relu2 (BitNet b1.58 2B4T, bitnet.cpp)."""
    tie_word_embeddings: bool = True
    """One matrix for embed_tokens and lm_head."""
    sub_norm: bool = True
    """A norm before o_proj and before down_proj, so that every quantized projection has one (BitNet b1.58 2B4T).
    false with quant=none: exactly a Llama."""
    dropout: float = 0.0
    """On the embedding, the attention weights and both residual branches; as in llama2.c."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    initializer_range: float = 0.02
    """Standard deviation of every matrix; o_proj and down_proj are divided by sqrt(2 * layers) as in GPT-2."""

    def __post_init__(self) -> None:
        _positive(
            "model",
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            rope_theta=self.rope_theta,
            rms_norm_eps=self.rms_norm_eps,
            initializer_range=self.initializer_range,
        )
        _one_of("model.hidden_act", self.hidden_act, ("silu", "relu2"))
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.hidden_size={self.hidden_size} does not divide by "
                f"model.num_attention_heads={self.num_attention_heads}: change one of them"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model.hidden_size / model.num_attention_heads = {self.head_dim} is odd, and rotary positions turn "
                "pairs: choose sizes whose quotient is even"
            )
        if self.num_attention_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_key_value_heads={self.num_key_value_heads} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}: choose a divisor"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout}: must lie in [0, 1)")

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """num_key_value_heads with its default filled in."""
        return self.num_key_value_heads or self.num_attention_heads


@dataclass
class QuantConfig:
    """What the weights and activations of the seven projections are rounded to."""

    name: str = "b158"
    """b158: weights in {-1, 0, +1}. b1: weights in {-1, +1}. none: the dense twin."""
    weight_scale: str = "absmean"
    """absmean (BitNet b1.58) or absmedian (BitNet b1.58 Reloaded, arXiv 2407.09527); b158 only."""
    activation_bits: int = 8
    """Bits of the activations that enter a quantized projection, 2 to 8."""
    lambda_warmup_steps: int = 0
    """Optimizer steps over which weights and activations go linearly from full precision to quantized (for training
    that starts from a dense model). 0: quantized from the first step."""
    skip: list[str] = field(default_factory=lambda: ["lm_head"])
    """Linear layers that stay dense: a name, or the last part of a dotted name."""

    def __post_init__(self) -> None:
        _one_of("quant.name", self.name, ("b158", "b1", "none"))
        _one_of("quant.weight_scale", self.weight_scale, ("absmean", "absmedian"))
        if self.name == "b1" and self.weight_scale != "absmean":
            raise UserError(f"quant.weight_scale={self.weight_scale}: b1 knows absmean only")
        if not 2 <= self.activation_bits <= 8:
            raise UserError(
                f"quant.activation_bits={self.activation_bits}: must lie in 2..8 (codes are stored as int8)"
            )
        if self.lambda_warmup_steps < 0:
            raise UserError(f"quant.lambda_warmup_steps={self.lambda_warmup_steps}: must be 0 or more")


@dataclass
class DataConfig:
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
    """Processes that read batches. Reading is a memory-mapped gather; 0 is right unless the disk is slow."""
    max_train_sequences: int | None = None
    """Train on the first n sequences of the shuffled corpus only. null: all. mode=overfit sets one batch."""

    def __post_init__(self) -> None:
        _positive(
            "data",
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            max_train_sequences=self.max_train_sequences,
        )
        if self.num_workers < 0:
            raise UserError(f"data.num_workers={self.num_workers}: must be 0 or more")


@dataclass
class OptimConfig:
    """What every optimizer has; `learning_rate` is the peak that the schedule scales."""

    name: str = "adamw"
    learning_rate: float = 1e-3
    """Peak; of the hidden matrices where an optimizer treats them apart."""
    weight_decay: float = 0.1
    """On matrices only: never on norms."""
    betas: tuple[float, float] = (0.9, 0.95)  # BitNet's Training Tips, table 2
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _one_of("optim.name", self.name, ("adamw", "muon"))
        _positive("optim", learning_rate=self.learning_rate, eps=self.eps)
        if self.weight_decay < 0:
            raise UserError(f"optim.weight_decay={self.weight_decay}: must be 0 or more")


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

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("optim", adamw_learning_rate=self.adamw_learning_rate, ns_steps=self.ns_steps)


@dataclass
class ScheduleConfig:
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

    def __post_init__(self) -> None:
        _one_of("schedule.name", self.name, ("cosine", "two_stage", "wsd"))
        _positive("schedule", total_steps=self.total_steps, decay_share=self.decay_share)
        for key in ("final_factor", "switch_at", "second_stage_factor", "decay_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"schedule.{key}={getattr(self, key)}: must lie in [0, 1]")


@dataclass
class TrainerConfig:
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
    """Stop after DD:HH:MM:SS, wherever the run is."""
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

    def __post_init__(self) -> None:
        _one_of("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu", "cuda", "mps"))
        _one_of("trainer.strategy", self.strategy, ("auto", "ddp", "fsdp"))
        _one_of("trainer.precision", self.precision, ("32-true", "bf16-mixed", "bf16-true"))
        if self.gradient_clip_val < 0:
            raise UserError(f"trainer.gradient_clip_val={self.gradient_clip_val}: must be 0 (off) or more")
        _positive(
            "trainer",
            max_steps=self.max_steps,
            max_tokens=self.max_tokens,
            val_check_interval=self.val_check_interval,
            limit_val_batches=self.limit_val_batches,
            accumulate_grad_batches=self.accumulate_grad_batches,
            num_nodes=self.num_nodes,
            log_every_n_steps=self.log_every_n_steps,
        )


@dataclass
class CallbacksConfig:
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


@dataclass
class LoggerConfig:
    """Where metrics go. metrics.csv in the run folder is always written."""

    tensorboard: bool = False
    wandb: bool = False
    """Online where `wandb login` was done, offline otherwise (`wandb sync` uploads it later)."""
    wandb_project: str = "bitnet-lit"
    wandb_group: str | None = None


@dataclass
class TrainConfig:
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
    seed: int = 1
    """Of the weights, the order of the data and dropout."""
    compile: str = "auto"
    """torch.compile: auto (on for CUDA), true or false."""
    resume: str | None = None
    """A run folder to go on with, in place."""
    init_from: str | None = None
    """A model folder to start from; its sizes replace `model`."""
    run_dir: str = "outputs/manual"
    """The run folder; the door sets it to Hydra's."""

    def __post_init__(self) -> None:
        self.compile = str(self.compile).lower()
        _one_of("compile", self.compile, ("auto", "true", "false"))
        if self.quant.name == "none" and self.quant.lambda_warmup_steps:
            raise UserError("quant.lambda_warmup_steps needs quant=b158 or b1: the dense twin has nothing to warm up")
        if self.optim.name == "muon" and self.trainer.strategy == "fsdp":
            raise UserError(
                "optim=muon with trainer.strategy=fsdp: Muon needs whole matrices: take trainer=ddp or optim=adamw"
            )


@dataclass
class PrepareConfig:
    """`python -m bitnet_lit.prepare`: text to llama2.c shards."""

    source: str = "demo"
    """demo, tinystories, or a file, folder or glob of .json, .jsonl or .txt files."""
    out: str = "data/${.source}"
    """The folder to write."""
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
    download_dir: str = "${.out}"
    """Where source=tinystories keeps the archive and the text."""

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.vocab_size is not None:
            raise UserError(
                f"tokenizer={self.tokenizer} and vocab_size={self.vocab_size}: give one, an existing tokenizer or the "
                "size of a new one"
            )
        _positive("prepare", vocab_size=self.vocab_size, num_workers=self.num_workers, num_stories=self.num_stories)


@dataclass
class InferConfig:
    """`python -m bitnet_lit.infer`: a model folder tells a story."""

    prompt: str = "Once upon a time"
    """The text to go on from. Empty: the model starts a story by itself."""
    checkpoint: str | None = None
    """Run folder, model folder, or a file in one. null: the newest run below outputs/."""
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
    """Texts to generate from the prompt."""
    interactive: bool = False
    """Ask for prompts until an empty line or end of input."""
    quiet: bool = False
    """Print nothing but the text, on a terminal too."""
    device: str = "cpu"
    """cpu, cuda or mps."""

    def __post_init__(self) -> None:
        _positive(
            "infer",
            max_new_tokens=self.max_new_tokens,
            num_samples=self.num_samples,
            repeat_penalty=self.repeat_penalty,
        )
        _one_of("device", self.device, ("cpu", "cuda", "mps"))
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must lie in (0, 1]")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p={self.min_p}: must lie in [0, 1)")
        if self.top_k < 0 or self.repeat_last_n < 0:
            raise UserError(f"top_k={self.top_k}, repeat_last_n={self.repeat_last_n}: must be 0 (off) or more")


@dataclass
class EvaluateConfig:
    """`python -m bitnet_lit.evaluate`: a deterministic pass over a validation split."""

    checkpoint: str | None = None
    """Run folder, model folder, or a file in one. null: the newest run below outputs/."""
    data_dir: str | None = None
    """Shards to evaluate on. null: those the model was trained on."""
    batch_size: int = 32
    """Sequences per forward pass; changes speed, and the result only by float rounding."""
    sequence_length: int | None = None
    """Tokens of a sequence. null: as in training."""
    accelerator: str = "auto"
    """auto, cpu, gpu or mps."""

    def __post_init__(self) -> None:
        _positive("evaluate", batch_size=self.batch_size, sequence_length=self.sequence_length)
        _one_of("accelerator", self.accelerator, ("auto", "cpu", "gpu", "mps"))


@dataclass
class PlotConfig:
    """`python -m bitnet_lit.plot`: curves of runs, as a PNG."""

    runs: Any = "outputs"
    """A run folder, a folder with runs somewhere below, or a list of them: [a,b]."""
    metric: str = "val/loss"
    """A column of metrics.csv."""
    label: str = "quant"
    """What tells the curves apart: any key of config.yaml that is a group's name (quant, model, optim), or seed."""
    out: str = "outputs/curves.png"
    """The picture to write."""

    def __post_init__(self) -> None:
        self.runs = [self.runs] if isinstance(self.runs, str) else [str(run) for run in self.runs]


@dataclass
class BenchConfig:
    """`python -m bitnet_lit.bench`: speed, beside what it is compared to; the last line is JSON."""

    suite: str = "data"
    """data: encoding text to tokens, and the loader."""
    rounds: int = 7
    """Interleaved measurements (ours, theirs, ours, ...); medians are shown."""

    def __post_init__(self) -> None:
        _one_of("suite", self.suite, ("data",))
        _positive("bench", rounds=self.rounds)
