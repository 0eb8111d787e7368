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
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
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
        if self.num_attention_heads % self.num_key_value_heads:
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
            raise UserError(f"quant.activation_bits={self.activation_bits}: must lie in 2..8 (codes are stored as int8)")
        if self.lambda_warmup_steps < 0:
            raise UserError(f"quant.lambda_warmup_steps={self.lambda_warmup_steps}: must be 0 or more")


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
    """Entries of the tokenizer to train. null: 512 for the demo corpus, 4096 otherwise; with `tokenizer`, unused."""
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
