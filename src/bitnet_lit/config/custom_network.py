"""A network of the user's own, as the command line says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitnet_lit.config.checks import SIZE, Range
from bitnet_lit.config.slots import Custom
from bitnet_lit.errors import UserError


@dataclass
class CustomNetwork(Custom):
    """An `nn.Module` from ids to logits (model/custom.py says what it must be).

    It gets further keys, and `vocab_size` and `max_position_embeddings` where it has arguments of these names.
    """

    vocab_size: int | None = None
    """Logits of a position. null: follows the data."""
    max_position_embeddings: int = 256
    """The context, in tokens; also the length of a training sequence unless data.sequence_length says less."""

    OWNER: ClassVar[str] = "model."
    RANGES: ClassVar[dict[str, Range]] = {"vocab_size": SIZE, "max_position_embeddings": SIZE}

    @property
    def vocabulary(self) -> int:
        """`vocab_size`, where it must be known.

        Raises:
            UserError: it follows the data, and no data was named.
        """
        if self.vocab_size is None:
            raise UserError("model.vocab_size=null: it follows the data, and must be given where there is none")
        return self.vocab_size
