"""What is wrong with a model whose logits are no numbers.

A NaN or an infinity in one weight reaches every logit, and so does an activation that grows beyond float32. Looking for
it reads every weight; so it is done only when logits were seen to be no numbers.
"""

from __future__ import annotations

import numpy as np

from bitnet_lit.artifacts.source import Source


def find_damage(source: Source) -> str:
    """The first tensor of `source` that is not finite, as the end of a line."""
    for name in source.tensors:
        # Codes are whole numbers, and their scale was checked when it was read.
        if not source.holds_codes(name) and not np.isfinite(source.array(name)).all():
            return f": tensor {name} of {source.path} holds a number that is not finite: copy or train it again"
    return f": every weight of {source.path} is finite, and what they compute overflows: train it again"
