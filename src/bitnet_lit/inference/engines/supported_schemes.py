"""The engines with kernels of their own multiply ternary codes. This is what they ask of a scheme, in one place.

Nothing here knows a scheme by its name: an engine says which scales and which rounding of activations it computes.
"""

from __future__ import annotations

from collections.abc import Sequence

from bitnet_lit.config import QuantConfig
from bitnet_lit.quant.activations import ActivationRule
from bitnet_lit.quant.weights import Granularity

DENSE_LAYERS = ["lm_head"]


def refused_scheme(
    quant: QuantConfig, engine: str, granularities: Sequence[Granularity], activations: Sequence[ActivationRule]
) -> list[str]:
    """Return why an engine cannot run the scheme of a model, a reason for each property; an empty list if it can.

    Args:
        engine: its name in a sentence, such as "native engine".
        granularities: the scales of weights that its kernels have.
        activations: the rules by which its kernels round activations; the usual one last.
    """
    scheme = quant.scheme
    if not scheme.quantizes:
        return []
    name, found = f"quant={quant.name}", []
    if not scheme.is_plain:
        found.append(f"{name}: its layer computes more than a product of codes")
    if not scheme.is_ternary:
        found.append(f"{name}: its codes are {', '.join(map(str, scheme.levels))}, the kernels' are -1, 0 and +1")
    if scheme.granularity not in granularities:
        scales = " or ".join(map(str, granularities))
        found.append(f"{name}: its scales are {scheme.granularity}, the kernels have {scales}")
    if scheme.activations not in activations:
        found.append(f"{name}: it rounds activations by {scheme.activations}, the kernels by {activations[-1]}")
    if quant.skip != DENSE_LAYERS:
        found.append(f"quant.skip={quant.skip}: in the {engine} the output head alone is dense")
    return found
