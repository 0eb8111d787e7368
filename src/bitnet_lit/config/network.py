"""This module has the configs of the network: its sizes, and how its projections are quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from bitnet_lit.config.checks import COUNT, POSITIVE, SIZE, Checked, Range, one_of
from bitnet_lit.errors import UserError
from bitnet_lit.quant.scheme import Scheme
from bitnet_lit.quant.schemes import SCHEMES, activation_bits_of, register
from bitnet_lit.registry import with_settings

KERNELS = ("auto", "reference", "triton", "native")
"""The values of `quant.kernel`."""


@dataclass
class ModelConfig(Checked):
    """ModelConfig describes a decoder of Llama's architecture. Field names are Hugging Face's, sizes are in elements.

    The fields in `TRAINING` say how the network is trained. A run always uses its own, even if its weights come from
    another model. All other fields say what the network is. They are saved with its weights, and a format or an engine
    refuses a field that it does not support (`held.py`).
    """

    name: str = "custom"
    """The name of the size, for tables only."""
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    """Heads of keys and values, for grouped-query attention. null: num_attention_heads."""
    head_dim: int | None = None
    """Elements of one attention head. null: hidden_size / num_attention_heads."""
    intermediate_size: int = 384
    """Width of the feed-forward layer."""
    vocab_size: int | None = None
    """Rows of the embedding. null: the vocabulary of the data."""
    max_position_embeddings: int = 256
    """The context, in tokens; also the length of a training sequence unless data.sequence_length is shorter."""
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    """silu (llama.cpp can run it) or relu2 (BitNet b1.58 2B4T, bitnet.cpp)."""
    tie_word_embeddings: bool = True
    """Whether embed_tokens and lm_head are one matrix."""
    sub_norm: bool = True
    """A norm before o_proj and before down_proj, so that every quantized projection has one (BitNet b1.58 2B4T).
    With false and quant=none the network is a Llama."""
    qkv_bias: bool = False
    """Biases on q_proj, k_proj and v_proj, for dense models that come with them (Qwen 2)."""
    qk_norm: bool = False
    """A norm on each head's query and key, for dense models that come with it (Qwen 3)."""
    residual_scales: bool = False
    """A learned number for each layer multiplies what enters it: x = r * x. It starts at 1, where it changes nothing
    (nanochat's resid_lambdas)."""
    x0_scales: bool = False
    """A learned number for each layer adds the embedding x0 to what enters it: x = x + s * x0. It starts at 0, where it
    changes nothing (nanochat's x0_lambdas, which start at 0.1)."""
    value_embeddings: bool = False
    """Every other layer, the last one included, has a further embedding whose rows are added to the values of its
    attention: v + 2 * sigmoid(gate(x)) * row, a gate for each key/value head (nanochat; ResFormer, arXiv 2410.17897).
    Rows start at 0, where they change nothing. Each such layer has vocab_size * key/value size parameters more."""
    dropout: float = 0.0
    """The probability of dropout on the embedding, the attention weights and both residual branches, as in llama2.c."""
    gradient_checkpointing: bool = False
    """Recompute the activations of each layer in the backward pass: less memory, about a third more time."""
    initializer_range: float = 0.02
    """The standard deviation of initial weights. For o_proj and down_proj it is divided by sqrt(2 * layers), as in
    GPT-2."""

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
        """Return this network with the `TRAINING` fields of `run`."""
        return replace(self, **{key: getattr(run, key) for key in self.TRAINING})

    @property
    def head_size(self) -> int:
        """`head_dim`, or its default where it is None."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def vocabulary(self) -> int:
        """`vocab_size` as a number.

        Raises:
            UserError: `vocab_size` is None, so it is the vocabulary of the data, which is not known here.
        """
        if self.vocab_size is None:
            raise UserError("model.vocab_size=null: it follows the data, and must be given where there is none")
        return self.vocab_size

    @property
    def attention_size(self) -> int:
        """Elements of all attention heads together: in_features of o_proj. It is hidden_size unless head_dim is set."""
        return self.num_attention_heads * self.head_size

    @property
    def num_kv_heads(self) -> int:
        """`num_key_value_heads`, or its default where it is None."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def value_gate_inputs(self) -> int:
        """Elements of a token that the gate of value embeddings reads: the first 32, as in nanochat."""
        return min(32, self.hidden_size)

    def has_value_embedding(self, layer: int) -> bool:
        """Return whether a layer has a value embedding: every other one, counted back from the last."""
        return self.value_embeddings and (self.num_hidden_layers - 1 - layer) % 2 == 0

    @property
    def kv_size(self) -> int:
        """Elements of all key heads together: out_features of k_proj and v_proj."""
        return self.num_kv_heads * self.head_size


@dataclass
class QuantConfig(Checked):
    """QuantConfig has the keys of the group `quant`, which say how the seven projections are quantized.

    The keys are of four kinds. `name`, `weight_scale`, `activation_bits` and `settings` choose the scheme, which the
    property `scheme` returns as an object. `skip` lists the layers that stay dense. `start_at` and `lambda_warmup_*`
    say how training goes from full precision to quantized. `kernel` and `grad` say how it is computed; they are not
    saved with a model.
    """

    name: str = "b158"
    """b158: weights in {-1, 0, +1}, one scale for the matrix. b158_row: a scale for each row. b158_group: a scale for
    each quant.settings.group_size inputs. b158_learned: the scale is trained. sherry: three of four weights are not 0.
    tequila: a bias of the weights that are. bitnet_v2: Hadamard transforms, and 4-bit activations. b1: weights in
    {-1, +1}. none: the dense twin. Other names: a scheme that is registered."""
    weight_scale: str = "absmean"
    """absmean (BitNet b1.58) or absmedian (BitNet b1.58 Reloaded, arXiv 2407.09527); ternary schemes only."""
    activation_bits: int | None = None
    """Bits of the activations that enter a quantized projection, 2 to 8. null: those of the scheme, which are 4 for
    bitnet_v2 and 8 for the others."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of a scheme, such as group_size of b158_group."""
    _target_: str | None = None
    """A scheme of your own, <module>.<class>: a subclass of bitnet_lit.quant.Scheme."""
    start_at: float = 0.0
    """The share of the run (of schedule.total_steps) that is trained in full precision before quantization begins; the
    optimizer goes on (ParetoQ, arXiv 2502.02631: 0.9). Validation is of the quantized network throughout."""
    lambda_warmup_steps: int = 0
    """Optimizer steps over which lambda rises from 0 (full precision) to 1 (quantized), counted from start_at, for
    training that starts from a dense model. 0: quantized at once."""
    lambda_warmup_shape: str = "linear"
    """The curve of lambda: linear, cosine (slow at both ends) or exponential (fast at the beginning)."""
    skip: list[str] = field(default_factory=lambda: ["lm_head"])
    """Linear layers that stay dense: a name, or the last part of a dotted name."""
    kernel: str = "auto"
    """The kernels that compute the quantized projections. auto: the fastest ones that can. reference: none, plain
    PyTorch. triton: int8 products on a GPU of the Hopper generation. native: C++ on a CPU. All compute the same
    integers. The last two compute parts of a dense network too (quant=none)."""
    grad: str = "auto"
    """How kernels on a GPU compute gradients, in runs in bfloat16. fp8: for the gradient of the input, each row of the
    output gradient is rounded to FP8 (e4m3); weight codes are exact there. fp8_all: the gradient of the weights is an
    FP8 product too, in which activation codes are rounded. bf16: neither is. auto: what is fastest for a matrix of its
    size; the plan of a run says it."""

    OWNER: ClassVar[str] = "quant."
    RANGES: ClassVar[dict[str, Range]] = {
        "activation_bits": Range(2, 8, must="lie in 2..8 (codes are stored as int8)"),
        "start_at": Range(0, 1, open_right=True),
        "lambda_warmup_steps": COUNT,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._target_ is not None:
            self.name = SCHEMES.imported(self._target_, f"quant._target_={self._target_}").name
        self.describe()  # makes the scheme, which checks its settings
        one_of("quant.lambda_warmup_shape", self.lambda_warmup_shape, ("linear", "cosine", "exponential"))
        one_of("quant.kernel", self.kernel, KERNELS)
        one_of("quant.grad", self.grad, ("auto", "fp8", "fp8_all", "bf16"))

    @property
    def bits(self) -> int:
        """`activation_bits`, or those of the scheme where it is None."""
        return activation_bits_of(self.name) if self.activation_bits is None else self.activation_bits

    @property
    def scheme(self) -> Scheme:
        """The scheme as an object.

        Raises:
            UserError: the name is unknown, or the scheme has no such setting.
        """
        cls, settings = SCHEMES.named(self.name), dict(self.settings)
        has = {setting.name for setting in fields(cls)}
        for key, value, default in (("weight_scale", self.weight_scale, "absmean"), ("activation_bits", self.bits, 8)):
            if key in settings:
                raise UserError(f"quant.settings.{key}={settings[key]}: has a key of its own: set quant.{key}")
            # A scheme without this setting accepts the default, and refuses other values.
            if key in has or (value != default and key not in cls.ignores):
                settings[key] = value
        return with_settings(cls, settings, f"quant={cls.name}")

    def describe(self) -> dict[str, Any]:
        """Return plain data to save with a model: the scheme's name and settings, and the layers that stay dense."""
        return {**self.scheme.describe(), "skip": list(self.skip)}

    @classmethod
    def described(cls, saved: Mapping[str, Any]) -> QuantConfig:
        """Make the config from a description that `describe` returned.

        Descriptions of the first version have the keys of the warm-up too; they are ignored. Nothing that `saved` names
        is imported: the scheme must be known already.

        Raises:
            UserError: the scheme is unknown, or it has no such setting.
        """
        own = {"name", "weight_scale", "activation_bits", "skip"}
        training = {"lambda_warmup_steps", "lambda_warmup_shape"}
        skip = saved["skip"]
        if not (isinstance(skip, list) and all(isinstance(name, str) for name in skip)):
            raise UserError(f"skip={skip!r}: must be a list of names")
        settings = {key: value for key, value in saved.items() if key not in own | training}
        return cls(**{key: value for key, value in saved.items() if key in own}, settings=settings)


def import_schemes(targets: Sequence[str | type[Scheme]]) -> None:
    """Register the schemes that the user allows a model to name.

    Args:
        targets: <module>.<class> of each scheme, or in Python the class itself.

    Raises:
        UserError: one of them cannot be imported, or is not a scheme.
    """
    if isinstance(targets, str):
        raise UserError(f"schemes={targets}: must be a list: schemes=[{targets}]")
    for target in targets:
        if isinstance(target, str):
            SCHEMES.imported(target, f"schemes=[{target}]")
        else:
            register(target)
