"""This module counts the parameters, floating-point operations and bytes of a model without building it.

It counts from the table of tensors (`tensors.py`). A multiplication and an addition count as two FLOPs. Training costs
three times the forward pass: the backward pass multiplies by each matrix twice, once for the gradient of the input and
once for that of the matrix (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.model.tensors import Kind, network_tensors, own_tensors, quantized_names

DENSE_BITS = 32.0


@dataclass(frozen=True)
class Accounting:
    """An Accounting holds the counts of one model.

    Attributes:
        embedding: parameters of embed_tokens, of lm_head where it is not tied, and of value embeddings.
        projections: parameters of the seven projections of all layers, which a scheme quantizes but for `quant.skip`.
        norms: all other parameters: norms, biases of q, k and v, scales and gates of a layer, and the further tensors
            of a scheme's own layer.
        forward_flops_per_token: FLOPs of the forward pass at a given sequence length; a token attends to half of the
            sequence on average.
        bits_per_weight: mean bits of a projection weight: the information of its code (log2(3) for b158) and its share
            of the scales; 32, or `dense_bits`, for a weight that stays dense.
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
        """FLOPs of the forward and the backward pass."""
        return 3 * self.forward_flops_per_token

    def training_bytes(self, optimizer_states_per_parameter: float = 2.0) -> float:
        """Return the bytes of float32 weights, gradients and optimizer states. Activations come on top."""
        return 4 * self.parameters * (2 + optimizer_states_per_parameter)


def account(
    config: ModelConfig, quant: QuantConfig, sequence_length: int | None = None, dense_bits: float = DENSE_BITS
) -> Accounting:
    """Count the model that `build_model(config, quant)` would build.

    Args:
        sequence_length: tokens of a sequence, for the FLOPs of attention. None: the whole context.
        dense_bits: bits of a projection weight that stays dense.

    Raises:
        UserError: the group size of the scheme does not divide in_features of a projection.
    """
    length = sequence_length or config.max_position_embeddings
    layers, head = config.num_hidden_layers, config.vocabulary * config.hidden_size
    tensors = network_tensors(config)

    def sizes(*kinds: Kind) -> int:
        return sum(tensor.size for tensor in tensors if tensor.kind in kinds)

    weights, embedding = sizes(Kind.PROJECTION), sizes(Kind.EMBEDDING)
    own = sum(math.prod(shape) for shape in own_tensors(config, quant).values())
    quantized = quantized_names(config, quant)
    bits = sum(
        tensor.size * (quant.scheme.bits_per_weight(*tensor.shape) if tensor.name in quantized else dense_bits)
        for tensor in tensors
        if tensor.kind is Kind.PROJECTION
    )
    # The scores and the weighted sum of the values are two products of head_dim, for each head and each visible
    # position. A causal token sees (length + 1) / 2 positions on average.
    attention_flops = layers * 2 * 2 * config.attention_size * (length + 1) / 2
    return Accounting(
        embedding=embedding,
        projections=weights,
        norms=sizes(*Kind) - weights - embedding + own,
        forward_flops_per_token=2 * (weights + sizes(Kind.GATE) + head) + attention_flops,
        bits_per_weight=bits / weights,
    )
