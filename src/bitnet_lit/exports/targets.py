"""What each way out can hold: asked before the first training step, and again before a file is written.

A target is what an export is for. Its conditions come from the graph that will run the file:

- hf, packed: stock `transformers`, from latent weights or from packed codes.
- gguf_tq2_0, gguf_tq1_0, gguf_f16: llama.cpp. Its `bitnet` graph has both sub-norms, silu and no head of its own;
  without sub-norms its `llama` graph runs the network. Ternary types pack blocks of 256 inputs with a scale each; a row
  that is no multiple of 256 is what makes other converters fall back to 4 bits without a word.
- llama2c: run.c, whose graph is a Llama with silu, RoPE theta 10000 and norms with eps 1e-5.
"""

from __future__ import annotations

from rich.table import Table

from bitnet_lit.checkpoints.formats.model_folder import network_type, transformers_runs
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.config.training import EXPORT_TARGETS as TARGETS
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.data.tokenizers.tokenizer import PieceKind
from bitnet_lit.errors import UserError
from bitnet_lit.quant.weights import Granularity, PerGroup, PerRow, PerTensor
from bitnet_lit.terminal import console

TERNARY_BLOCK = 256
FIRST_BYTE = 3  # run.c takes the piece of byte b for number b + 3


def packed_problems(config: ModelConfig, quant: QuantConfig) -> list[str]:
    """Why a packed model folder cannot hold this model, whoever reads it; empty when it can."""
    found, scheme = _plain_numbers(quant), quant.scheme
    if not scheme.quantizes:
        found.append(f"quant={scheme.name}: a dense model has no codes to pack: take quant=b158, or format=latent")
    if scheme.is_ternary:
        kv_size = config.num_kv_heads * config.head_size
        rows = {
            "model.hidden_size": config.hidden_size,
            "model.intermediate_size": config.intermediate_size,
            "num_attention_heads * head_dim": config.attention_size,
            "num_key_value_heads * head_dim": kv_size,
        }
        found += [
            f"{key}={size}: four rows share a byte: take a multiple of 4" for key, size in rows.items() if size % 4
        ]
    if config.qkv_bias and scheme.quantizes:
        found.append(
            "model.qkv_bias=true: transformers multiplies the bias by the scale of packed codes too: take format=latent"
        )
    return found


def _transformers(config: ModelConfig, quant: QuantConfig, packed: bool) -> list[str]:
    found = packed_problems(config, quant) if packed else []
    if not transformers_runs(quant, packed):
        knows = "ternary codes with one scale for the matrix" if packed else "absmean with one scale for the matrix"
        remedy = "take quant=b158, activation_bits=8 and skip=[lm_head]"
        if transformers_runs(quant, True):
            remedy = "packed codes run there"
        found.append(
            f"quant={quant.scheme}, skip={quant.skip}: transformers knows {knows}, activations of 8 bits, and a dense "
            f"lm_head: {remedy}"
        )
    if network_type(config) == "bitnet_lit":
        found.append("model.sub_norm=true with qkv_bias, qk_norm or head_dim: no such network in transformers")
    return found


def _gguf(config: ModelConfig, quant: QuantConfig, ternary: bool) -> list[str]:
    found, scheme = [], quant.scheme
    if scheme.quantizes and not scheme.is_ternary:
        found.append(
            f"quant={scheme.name}: its codes are {', '.join(map(str, scheme.levels))}, and what is written there is "
            "checked by codes -1, 0 and +1: take format=packed or llama2c"
        )
    if config.hidden_act != "silu":
        found.append(f"model.hidden_act={config.hidden_act}: llama.cpp's graph computes silu: take hidden_act=silu")
    if config.sub_norm and not config.tie_word_embeddings:
        found.append(
            "model.tie_word_embeddings=false: llama.cpp's bitnet graph has no head of its own: take true, or "
            "sub_norm=false"
        )
    if config.qkv_bias or config.qk_norm:
        found.append("qkv_bias or qk_norm: written for the bitnet and llama graphs only, which have neither")
    if config.attention_size != config.hidden_size:
        found.append(f"model.head_dim={config.head_dim}: heads must add up to hidden_size")
    if not ternary:
        return found
    if not scheme.quantizes:
        found.append(f"quant={scheme.name}: dense weights are no ternary codes: take type=f16, or quant=b158")
    if not _fills_blocks(scheme.granularity):
        found.append(
            f"quant={scheme}: its scales are {scheme.granularity}, and a ternary block of {TERNARY_BLOCK} inputs has "
            f"one: take quant=b158_row, groups of a multiple of {TERNARY_BLOCK}, or type=f16"
        )
    rows = {"model.hidden_size": config.hidden_size, "model.intermediate_size": config.intermediate_size}
    for key, size in rows.items():
        if size % TERNARY_BLOCK:
            near = max(TERNARY_BLOCK, round(size / TERNARY_BLOCK) * TERNARY_BLOCK)
            found.append(f"{key}={size}: ternary blocks hold 256 inputs: take {near}, or type=f16")
    return found


def _fills_blocks(granularity: Granularity) -> bool:
    """Whether all weights of a ternary block share a scale."""
    if isinstance(granularity, PerGroup):
        return granularity.group_size % TERNARY_BLOCK == 0
    return granularity in (PerTensor(), PerRow())


def _plain_numbers(quant: QuantConfig) -> list[str]:
    """Conditions of the formats that store codes and scales, or their products, and a dense head."""
    found = []
    if not quant.scheme.is_plain:
        found.append(f"quant={quant.scheme.name}: its layer computes more than codes and scales: take format=latent")
    if quant.scheme.quantizes and "lm_head" not in quant.skip:
        found.append(f"quant.skip={quant.skip}: the head is dense there: add lm_head")
    return found


def _llama2c(config: ModelConfig) -> list[str]:
    fixed = {
        "sub_norm": (False, "run.c's graph has no sub-norms: train with model.sub_norm=false"),
        "hidden_act": ("silu", "run.c computes silu: take hidden_act=silu"),
        "rope_theta": (10000.0, "run.c turns by theta 10000: take rope_theta=10000"),
        "rms_norm_eps": (1e-5, "run.c's norms have eps 1e-5: take rms_norm_eps=1e-5"),
        "qkv_bias": (False, "run.c has no biases"),
        "qk_norm": (False, "run.c has no norms on queries and keys"),
    }
    found = [
        f"model.{key}={getattr(config, key)}: {remedy}"
        for key, (value, remedy) in fixed.items()
        if getattr(config, key) != value
    ]
    if config.attention_size != config.hidden_size:
        found.append(f"model.head_dim={config.head_dim}: run.c's heads add up to hidden_size")
    return found


def problems(target: str, config: ModelConfig, quant: QuantConfig) -> list[str]:
    """Why `target` cannot hold this model, each with its remedy; empty when it can.

    Raises:
        UserError: a target that is none.
    """
    if target not in TARGETS:
        raise UserError(f"export target {target}: must be one of {', '.join(TARGETS)}")
    if target == "llama2c":
        return _plain_numbers(quant) + _llama2c(config)
    if target.startswith("gguf"):
        return _plain_numbers(quant) + _gguf(config, quant, ternary=target != "gguf_f16")
    return _transformers(config, quant, packed=target == "packed")


def tokenizer_problem(target: str, tokenizer: Tokenizer | None) -> str | None:
    """Why the reader of `target` cannot encode text with this tokenizer as it was trained; None where it can.

    llama.cpp and run.c merge the pair of pieces with the best score, which is SentencePiece's BPE and no other of its
    models, and read the text as it is. run.c takes BOS for number 1, EOS for 2 and byte b for b + 3.
    """
    if target not in ("llama2c", *(name for name in TARGETS if name.startswith("gguf"))):
        return None
    vocabulary = None if tokenizer is None else tokenizer.sentencepiece_vocabulary()
    if tokenizer is None or vocabulary is None:
        return "no SentencePiece tokenizer.model"
    if not vocabulary.is_bpe:
        return "its SentencePiece model is no BPE"
    if vocabulary.normalizes:
        return "its SentencePiece model normalizes the text"
    if target != "llama2c":
        return None
    bytes_ = vocabulary.pieces[FIRST_BYTE : FIRST_BYTE + 256]
    has_bytes = len(bytes_) == 256 and all(piece.kind is PieceKind.BYTE for piece in (bytes_[0], bytes_[-1]))
    return (
        None if (tokenizer.bos_id, has_bytes) == (1, True) else "its BOS is not piece 1, or its bytes do not begin at 3"
    )


def check_targets(targets: list[str], config: ModelConfig, quant: QuantConfig) -> None:
    """Refuse a model that cannot reach the targets it names.

    Raises:
        UserError: every reason, with its remedy, in one line.
    """
    found = [f"{target}: {problem}" for target in targets for problem in problems(target, config, quant)]
    if found:
        raise UserError("export.targets: " + "; ".join(found))


def print_advice(config: ModelConfig, quant: QuantConfig) -> None:
    """A table of all targets: reachable, or what to change."""
    table = Table(title=f"{config.name}, {quant.name}")
    for column in ("target", "reachable", "what to change"):
        table.add_column(column)
    for target in TARGETS:
        found = problems(target, config, quant)
        table.add_row(target, "no" if found else "yes", "\n".join(found))
    console().print(table)
