"""Finding what is wrong with a model whose logits are no numbers.

A NaN or an infinity in one weight reaches every logit; a model with one is refused when it is opened, as are those
whose file was written over since. An activation that grows beyond float32 shows in the logits alone.
"""

from __future__ import annotations

from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.errors import UserError


def find_damage(stored: StoredModel) -> str:
    """The first tensor of `stored` that is not finite, as the end of a line."""
    try:
        for name in stored.tensors:
            if not stored.holds_codes(name):  # codes are whole numbers, and their scale was checked
                stored.array(name)
    except UserError as error:
        return f": {error}"
    return f": every weight of {stored.path} is finite, and what they compute overflows: train it again"
