"""What a model costs: parameters, floating-point operations, bytes. Counted from the table of its tensors
(`tensors.py`), without building it.

FLOPs count a multiply and an add as two. Training is three times the forward pass: the backward pass multiplies
each matrix twice, once for the input's gradient and once for its own (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.model.tensors import Kind, layer_tensors, outer_tensors, own_tensors


@dataclass(frozen=True)
class Accounting:
    """Counts of one model.

    Attributes:
        embedding: parameters of embed_tokens, plus lm_head when it is not tied.
        projections: parameters of the seven projections of all layers: what a scheme quantizes.
        norms: parameters of all norms, of the biases of q, k and v where there are any, and what the layers of a scheme
            have of their own.
        forward_flops_per_token: at a given sequence length, causal attention counted at its mean span.
        bits_per_weight: of a projection weight, mean over all: its code's information (log2(3) for b158) and its share
            of the scales; 32 for a dense model.
    """

    embedding: int
    projections: int
    norms: int
    forward_flops_per_token: float
    bits_per_weight: float

    @property
    def parameters(self) -> int:
        """All trainable parameters, a tied matrix counted once."""
        return self.embedding + self.projections + self.norms

    @property
    def training_flops_per_token(self) -> float:
        """Forward and backward."""
        return 3 * self.forward_flops_per_token

    def training_bytes(self, optimizer_states_per_parameter: float = 2.0) -> float:
        """Float32 weights, gradients and optimizer states; activations come on top."""
        return 4 * self.parameters * (2 + optimizer_states_per_parameter)


def account(config: ModelConfig, quant: QuantConfig, sequence_length: int | None = None) -> Accounting:
    """Count the model that `build_model(config, quant)` would build.

    Args:
        sequence_length: tokens of a sequence, for the attention FLOPs; null: the whole context.

    Raises:
        UserError: groups of inputs that do not fill the rows of a projection.
    """
    length = sequence_length or config.max_position_embeddings
    layers, head = config.num_hidden_layers, config.vocabulary * config.hidden_size
    in_a_layer = layer_tensors(config)
    matrices = [tensor for tensor in in_a_layer if tensor.kind is Kind.PROJECTION]
    weights = sum(tensor.size for tensor in matrices)
    own = sum(math.prod(shape) for shape in own_tensors(config, quant).values())
    bits = sum(tensor.size * quant.scheme.bits_per_weight(*tensor.shape) for tensor in matrices)
    outer = outer_tensors(config)
    vectors = layers * (sum(tensor.size for tensor in in_a_layer) - weights)
    # Scores and their sum over values: two products of head_dim per head for each of the (length + 1) / 2 visible
    # positions that a causal token sees on average.
    attention_flops = layers * 2 * 2 * config.attention_size * (length + 1) / 2
    return Accounting(
        embedding=sum(tensor.size for tensor in outer if tensor.kind is Kind.EMBEDDING),
        projections=layers * weights,
        norms=vectors + own + sum(tensor.size for tensor in outer if tensor.kind is not Kind.EMBEDDING),
        forward_flops_per_token=2 * (layers * weights + head) + attention_flops,
        bits_per_weight=bits / weights,
    )
