"""This module says which models and machines the CUDA engine can run.

The kernels multiply ternary codes with a scale for the matrix or for each row, and compute the network of
model/transformer.py. The lists of fields and of tensors are allow-lists, as the native engine's are.
"""

from __future__ import annotations

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.config.held import ANY, SIZES, refused_fields
from bitnet_lit.extras import installed
from bitnet_lit.inference.engines.supported_schemes import refused_scheme
from bitnet_lit.model.tensors import EMBEDDING, FINAL_NORM, HEAD, unnamed_tensors
from bitnet_lit.quant.activations import AbsMax
from bitnet_lit.quant.weights import PerRow, PerTensor

COMPUTED = {
    **SIZES,
    "rope_theta": ANY,
    "rms_norm_eps": ANY,
    "hidden_act": ANY,  # silu and relu2, below
    "tie_word_embeddings": ANY,
    "sub_norm": ANY,
    "qkv_bias": ANY,
    "qk_norm": ANY,
}
MATRICES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]
MATRICES += ["mlp.up_proj", "mlp.down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
NORMS += ["self_attn.attn_sub_norm", "mlp.ffn_sub_norm"]
TENSORS = {EMBEDDING, FINAL_NORM, HEAD, *(f"{name}.weight" for name in (*MATRICES, *NORMS))}
TENSORS |= {f"{name}.bias" for name in MATRICES[:3]}
ACTIVATIONS = ("silu", "relu2")
LONGEST_ROW = 2**15  # inputs of a matrix: a program holds a rounded token in its registers
LARGEST_HEAD = 256  # elements: a program holds a block of keys and one of values
OLDEST = (8, 0)  # Ampere: products of bytes on the tensor cores


class NoKernelsError(Exception):
    """Triton cannot compile kernels on this machine; the message is the end of a sentence that says why."""


def why_unsupported(config: ModelConfig, quant: QuantConfig) -> str | None:
    """Return why the CUDA engine cannot run a model, naming the field or the scheme; None if it can."""
    unplaced = [f"tensor {name}: the CUDA engine has no place for it" for name in unnamed_tensors(config, TENSORS)]
    found = refused_fields(config, COMPUTED) or unplaced  # a refused field explains the tensors that it adds
    if config.hidden_act not in ACTIVATIONS:
        found.append(f"model.hidden_act={config.hidden_act}: the CUDA engine computes {' and '.join(ACTIVATIONS)}")
    longest = max(config.hidden_size, config.intermediate_size, config.attention_size)
    if longest > LONGEST_ROW:
        found.append(f"a matrix has {longest} inputs: the CUDA engine takes {LONGEST_ROW} at most")
    if config.head_size > LARGEST_HEAD:
        found.append(f"an attention head has {config.head_size} elements: the CUDA engine takes {LARGEST_HEAD} at most")
    found += refused_scheme(quant, "CUDA engine", [PerTensor(), PerRow()], [AbsMax(bits) for bits in range(2, 9)])
    return "; ".join(found) or None


def why_unusable(device: str) -> str | None:
    """Return why the CUDA engine cannot run on a device of this machine, whatever the model; None if it can."""
    import torch

    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    if torch.cuda.get_device_capability(device) < OLDEST:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, the kernels need 8.0"
    if not installed("triton"):
        return "triton is not installed: pip install triton"
    return None
