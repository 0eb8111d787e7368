"""This module builds a network of the user's own, quantizes it and counts its parameters.

The network is an `nn.Module` whose `forward` takes token ids, int64 (B, T), and returns logits, (B, T, V). The logits
of a token must not depend on later tokens; this is not checked. The `nn.Linear` layers of the network become BitLinear,
except those that `quant.skip` names (`lm_head` by default). Embeddings and vectors stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitnet_lit.config.custom_network import CustomNetwork
from bitnet_lit.config.network import QuantConfig
from bitnet_lit.errors import UserError, one_line
from bitnet_lit.instantiate import instantiate, locate, takes
from bitnet_lit.model.accounting import Accounting
from bitnet_lit.quant import BitLinear, convert_linears


def build_custom_network(config: CustomNetwork, quant: QuantConfig) -> nn.Module:
    """Build the network of `config` and apply the quantization pass.

    Raises:
        UserError: the class cannot be made or is not an `nn.Module`, its output is not logits, or it has no `nn.Linear`
            to round.
    """
    given = {"vocab_size": config.vocabulary, "max_position_embeddings": config.max_position_embeddings}
    target = locate(config._target_, "model")
    network = instantiate(config.call, "model", **{key: value for key, value in given.items() if takes(target, key)})
    if not isinstance(network, nn.Module):
        raise UserError(f"model._target_={config._target_}: is no network: derive it from torch.nn.Module")
    if not convert_linears(network, quant) and quant.scheme.quantizes:
        raise UserError(
            f"model._target_={config._target_}: has no nn.Linear to round (quant.skip={quant.skip}): take quant=none"
        )
    _check_logits(network, config)
    return network


@torch.no_grad()
def _check_logits(network: nn.Module, config: CustomNetwork) -> None:
    """Run the network on two tokens, and check that it returns logits.

    Raises:
        UserError: the network raises an error, or its output is not floating-point (1, 2, vocab_size).
    """
    training = network.training
    try:
        logits = network.eval()(torch.zeros(1, 2, dtype=torch.int64))
    except Exception as error:  # the user's network can raise anything
        text = one_line(error)
        raise UserError(
            f"model._target_={config._target_}: fails on ids of shape (1, 2) ({type(error).__name__}: {text})"
        ) from error
    finally:
        network.train(training)
    wanted = (1, 2, config.vocabulary)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted or not logits.is_floating_point():
        got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"model._target_={config._target_}: gives {got} for ids of shape (1, 2): it must give logits {wanted}, of "
            "model.vocab_size tokens"
        )


def count(network: nn.Module, quant: QuantConfig) -> Accounting:
    """Count a network that is built. FLOPs are those of its linear layers only, because the rest is not known."""
    linears = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    rounded = [layer for layer in linears if isinstance(layer, BitLinear)]
    embeddings = [layer for layer in network.modules() if isinstance(layer, nn.Embedding)]
    projections = sum(layer.weight.numel() for layer in rounded)
    embedding = sum({id(layer.weight): layer.weight.numel() for layer in embeddings}.values())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    bits = sum(layer.weight.numel() * quant.scheme.bits_per_weight(*layer.weight.shape) for layer in rounded)
    return Accounting(
        embedding=embedding,
        projections=projections,
        norms=parameters - embedding - projections,
        forward_flops_per_token=2.0 * sum(layer.weight.numel() for layer in linears),
        bits_per_weight=bits / projections if projections else 32.0,
    )
