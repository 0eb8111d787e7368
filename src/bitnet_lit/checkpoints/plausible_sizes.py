"""Sizes that no model has are refused before memory is allocated for them: a damaged file may ask for any amount.

Every field of the config must be in its range. Two products are limited too: the size of all heads together, and that
of a rotary table, which is computed for the whole context.
"""

from __future__ import annotations

from pathlib import Path

from bitnet_lit.checkpoints.config_json import LARGEST_SIZE, field_shapes
from bitnet_lit.config import ModelConfig
from bitnet_lit.errors import UserError
from bitnet_lit.files.json_shapes import Mismatch

LONGEST_CONTEXT = 2**17  # positions
LARGEST_TABLE = 2**26  # elements of a rotary table, positions times head_dim; real models have 2**24


def check_sizes(path: Path, config: ModelConfig) -> None:
    """Refuse sizes beyond those of any model, before memory is allocated for them.

    Args:
        path: the file that has the sizes, for the error message.

    Raises:
        UserError: a size is too large or too small; the message names the first one.
    """
    shapes = field_shapes(type(config))  # type: ignore[arg-type]  # classes are hashable
    for key, shape in shapes.items():
        try:
            shape.check(getattr(config, key), key)
        except Mismatch as error:
            raise UserError(f"{path}: {error}: copy it again") from None
    if config.max_position_embeddings < 2:
        raise UserError(f"{path}: max_position_embeddings=1: no room for a token and the one after it: copy it again")
    table = config.head_size * config.max_position_embeddings
    if (
        config.attention_size > LARGEST_SIZE
        or config.max_position_embeddings > LONGEST_CONTEXT
        or table > LARGEST_TABLE
    ):
        raise UserError(
            f"{path}: {config.num_attention_heads} heads of {config.head_size}, a context of "
            f"{config.max_position_embeddings}: beyond what a model has: copy it again"
        )
