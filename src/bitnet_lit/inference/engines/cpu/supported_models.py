"""This module says which models the native engine can run.

The kernels multiply ternary codes with one scale for the matrix by 8-bit activations, and compute the network of
model/transformer.py. The lists of fields and of tensors are allow-lists: a part of the network that was added since is
refused by its name, and so is a scheme with any other property. Nothing here knows a scheme by its name.
"""

from __future__ import annotations

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.config.held import ANY, SIZES, Only, refused_fields
from bitnet_lit.inference.engines.cpu.native import PROJECTIONS, VALUE_TABLE, VECTORS
from bitnet_lit.inference.engines.supported_schemes import refused_scheme
from bitnet_lit.model.tensors import EMBEDDING, FINAL_NORM, HEAD, unnamed_tensors
from bitnet_lit.quant.activations import AbsMax
from bitnet_lit.quant.weights import PerTensor

COMPUTED = {
    **SIZES,
    "rope_theta": ANY,
    "rms_norm_eps": ANY,
    "hidden_act": ANY,  # silu and relu2, below
    "tie_word_embeddings": ANY,
    "sub_norm": ANY,
    "qkv_bias": Only(False, "the native engine has no biases"),
    "qk_norm": ANY,
    "residual_scales": ANY,
    "x0_scales": ANY,
    "value_embeddings": ANY,
}
TENSORS = {EMBEDDING, *VECTORS.values(), VALUE_TABLE, *PROJECTIONS.values(), FINAL_NORM, HEAD}
ACTIVATIONS = ("silu", "relu2")
LONGEST_ROW = 2**18  # inputs of a matrix: 63 * 127 times as much fits the 32 bits in which products are added up


def why_unsupported(config: ModelConfig, quant: QuantConfig) -> str | None:
    """Say why the native engine cannot run a model, naming the field or the scheme; return None if it can."""
    unplaced = [f"tensor {name}: the native engine has no place for it" for name in unnamed_tensors(config, TENSORS)]
    found = refused_fields(config, COMPUTED) or unplaced  # a refused field explains the tensors that it adds
    if config.hidden_act not in ACTIVATIONS:
        found.append(f"model.hidden_act={config.hidden_act}: the native engine computes {' and '.join(ACTIVATIONS)}")
    longest = max(config.hidden_size, config.intermediate_size, config.attention_size)
    if longest > LONGEST_ROW:
        found.append(f"a matrix has {longest} inputs: the native engine takes {LONGEST_ROW} at most")
    found += refused_scheme(quant, "native engine", [PerTensor()], [AbsMax(8)])
    return "; ".join(found) or None
