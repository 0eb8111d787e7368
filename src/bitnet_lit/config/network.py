"""The network: its sizes, and what its projections are rounded to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from bitnet_lit.config.checks import COUNT, POSITIVE, SIZE, Checked, Range, one_of
from bitnet_lit.errors import UserError
from bitnet_lit.quant.scheme import Scheme
from bitnet_lit.quant.schemes import SCHEMES, register
from bitnet_lit.registry import with_settings


@dataclass
class ModelConfig(Checked):
    """A Llama-shaped decoder, and how it is trained. Field names are Hugging Face's, units are elements.

    The fields in `TRAINING` say how the network is trained: they are the run's own, also where its weights come from
    another model. All other fields say what the network is: they are saved with its weights, and whatever reads them
    refuses a field that it does not know (`held.py`).
    """

    name: str = "custom"
    """The name of the size, for tables. Nothing depends on it."""
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    """Grouped-query attention: heads of keys and values. null: as many as attention heads."""
    head_dim: int | None = None
    """Elements of one attention head. null: hidden_size / num_attention_heads."""
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
    qkv_bias: bool = False
    """Biases on q_proj, k_proj and v_proj, for dense models that come with them (Qwen 2)."""
    qk_norm: bool = False
    """A norm on each head's query and key, for dense models that come with it (Qwen 3)."""
    dropout: float = 0.0
    """On the embedding, the attention weights and both residual branches; as in llama2.c."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    initializer_range: float = 0.02
    """Standard deviation of every matrix; o_proj and down_proj are divided by sqrt(2 * layers) as in GPT-2."""

    OWNER: ClassVar[str] = "model."
    TRAINING: ClassVar[frozenset[str]] = frozenset({"dropout", "gradient_checkpointing", "initializer_range"})
    RANGES: ClassVar[dict[str, Range]] = {
        "hidden_size": SIZE,
        "num_hidden_layers": SIZE,
        "num_attention_heads": SIZE,
        "num_key_value_heads": SIZE,
        "head_dim": SIZE,
        "intermediate_size": SIZE,
        "vocab_size": SIZE,
        "max_position_embeddings": SIZE,
        "rope_theta": POSITIVE,
        "rms_norm_eps": POSITIVE,
        "dropout": Range(0, 1, open_right=True),
        "initializer_range": POSITIVE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("model.hidden_act", self.hidden_act, ("silu", "relu2"))
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.hidden_size={self.hidden_size} does not divide by "
                f"model.num_attention_heads={self.num_attention_heads}: change one of them"
            )
        if self.head_size % 2:
            raise UserError(
                f"model.hidden_size / model.num_attention_heads = {self.head_size} is odd, and rotary positions turn "
                "pairs: choose sizes whose quotient is even"
            )
        if self.num_attention_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_key_value_heads={self.num_key_value_heads} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}: choose a divisor"
            )

    def trained_as(self, run: ModelConfig) -> ModelConfig:
        """This network, trained as `run` says."""
        return replace(self, **{key: getattr(run, key) for key in self.TRAINING})

    @property
    def head_size(self) -> int:
        """head_dim with its default filled in."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding, where they must be known.

        Raises:
            UserError: they follow the data, and no data was named.
        """
        if self.vocab_size is None:
            raise UserError("model.vocab_size=null: it follows the data, and must be given where there is none")
        return self.vocab_size

    @property
    def attention_size(self) -> int:
        """Elements of all heads side by side: what enters o_proj; hidden_size unless head_dim says otherwise."""
        return self.num_attention_heads * self.head_size

    @property
    def num_kv_heads(self) -> int:
        """num_key_value_heads with its default filled in."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def kv_size(self) -> int:
        """Elements of all key heads side by side: the rows of k_proj and v_proj."""
        return self.num_kv_heads * self.head_size


@dataclass
class QuantConfig(Checked):
    """How the seven projections are quantized, as the command line says it.

    Three things in one group: the scheme (`name`, `weight_scale`, `activation_bits`, `settings`), which `scheme` gives
    as the object that everyone asks; the layers that it leaves alone (`skip`); and how training leads over to it
    (`lambda_warmup_*`).
    """

    name: str = "b158"
    """b158: weights in {-1, 0, +1}, one scale for the matrix. b158_row: a scale for each row. b158_group: a scale for
    each quant.settings.group_size inputs. b1: weights in {-1, +1}. none: the dense twin. Or a registered scheme."""
    weight_scale: str = "absmean"
    """absmean (BitNet b1.58) or absmedian (BitNet b1.58 Reloaded, arXiv 2407.09527); ternary schemes only."""
    activation_bits: int = 8
    """Bits of the activations that enter a quantized projection, 2 to 8."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of a scheme, such as group_size of b158_group."""
    _target_: str | None = None
    """A scheme of one's own, <module>.<class>: a subclass of bitnet_lit.quant.Scheme."""
    lambda_warmup_steps: int = 0
    """Optimizer steps over which weights and activations go linearly from full precision to quantized (for training
    that starts from a dense model). 0: quantized from the first step."""
    lambda_warmup_shape: str = "linear"
    """linear, cosine (slow at both ends) or exponential (most of the way early)."""
    skip: list[str] = field(default_factory=lambda: ["lm_head"])
    """Linear layers that stay dense: a name, or the last part of a dotted name."""

    OWNER: ClassVar[str] = "quant."
    RANGES: ClassVar[dict[str, Range]] = {
        "activation_bits": Range(2, 8, must="lie in 2..8 (codes are stored as int8)"),
        "lambda_warmup_steps": COUNT,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._target_ is not None:
            self.name = SCHEMES.imported(self._target_, f"quant._target_={self._target_}").name
        self.describe()  # makes the scheme, which checks its values
        one_of("quant.lambda_warmup_shape", self.lambda_warmup_shape, ("linear", "cosine", "exponential"))

    @property
    def scheme(self) -> Scheme:
        """The scheme as an object.

        Raises:
            UserError: an unknown name, or a setting that it does not have.
        """
        cls, settings = SCHEMES.named(self.name), dict(self.settings)
        has = {setting.name for setting in fields(cls)}
        for key, default in (("weight_scale", "absmean"), ("activation_bits", 8)):
            if key in settings:
                raise UserError(f"quant.settings.{key}={settings[key]}: has a key of its own: set quant.{key}")
            value = getattr(self, key)  # always has one: a scheme without the setting refuses what somebody chose
            if key in has or (value != default and key not in cls.ignores):
                settings[key] = value
        return with_settings(cls, settings, f"quant={cls.name}")

    def describe(self) -> dict[str, Any]:
        """Plain data to save with a model: the scheme's name and settings, and the layers it leaves alone."""
        return {**self.scheme.describe(), "skip": list(self.skip)}

    @classmethod
    def described(cls, saved: Mapping[str, Any]) -> QuantConfig:
        """The config of a saved description, those of the first version included, which held the warm-up too.

        Nothing that `saved` names is imported: a scheme is looked up among those that are known.

        Raises:
            UserError: an unknown scheme, or a setting that it does not have.
        """
        own = {"name", "weight_scale", "activation_bits", "skip"}
        training = {"lambda_warmup_steps", "lambda_warmup_shape"}
        skip = saved["skip"]
        if not (isinstance(skip, list) and all(isinstance(name, str) for name in skip)):
            raise UserError(f"skip={skip!r}: must be a list of names")
        settings = {key: value for key, value in saved.items() if key not in own | training}
        return cls(**{key: value for key, value in saved.items() if key in own}, settings=settings)


def import_schemes(targets: Sequence[str | type[Scheme]]) -> None:
    """Make the schemes known that a user allows the model to name: <module>.<class>, or in Python the class itself.

    Raises:
        UserError: one that cannot be imported, or is no scheme.
    """
    if isinstance(targets, str):
        raise UserError(f"schemes={targets}: must be a list: schemes=[{targets}]")
    for target in targets:
        if isinstance(target, str):
            SCHEMES.imported(target, f"schemes=[{target}]")
        else:
            register(target)
