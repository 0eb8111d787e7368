"""This module has the config of a network of the user's own (`model._target_=<module>.<class>`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitnet_lit.config.checks import SIZE, Range
from bitnet_lit.config.slots import Custom
from bitnet_lit.errors import UserError


@dataclass
class CustomNetwork(Custom):
    """CustomNetwork configures an `nn.Module` from token ids to logits. model/custom.py says what it must do.

    The class gets every other key of the group, and `vocab_size` and `max_position_embeddings` if its constructor has
    arguments with these names.
    """

    vocab_size: int | None = None
    """Logits of a position. null: the vocabulary of the data."""
    max_position_embeddings: int = 256
    """The context, in tokens; also the length of a training sequence unless data.sequence_length is shorter."""

    OWNER: ClassVar[str] = "model."
    RANGES: ClassVar[dict[str, Range]] = {"vocab_size": SIZE, "max_position_embeddings": SIZE}

    @property
    def vocabulary(self) -> int:
        """`vocab_size` as a number.

        Raises:
            UserError: `vocab_size` is None, so it is the vocabulary of the data, which is not known here.
        """
        if self.vocab_size is None:
            raise UserError("model.vocab_size=null: it follows the data, and must be given where there is none")
        return self.vocab_size
