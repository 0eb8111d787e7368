"""`find_damage` says what is wrong with a model whose logits are NaN or infinite.

One such weight is enough: it reaches every logit. A model that has one is refused when it is opened, so here either
the file was written over since, or the weights are finite and an activation grows beyond float32.
"""

from __future__ import annotations

from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.errors import UserError


def find_damage(stored: StoredModel) -> str:
    """Read the weights again, and return the end of an error line: the first tensor that is not finite."""
    try:
        for name in stored.tensors:
            if not stored.holds_codes(name):  # codes are integers, and their scale was checked when they were read
                stored.array(name)
    except UserError as error:
        return f": {error}"
    return f": every weight of {stored.path} is finite, and what they compute overflows: train it again"
