"""This module has the keys of distillation: what a trained teacher adds to the loss of the model in training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from bitnet_lit.config.checks import FACTOR, POSITIVE, SIZE, Checked, Range, written
from bitnet_lit.errors import UserError


@dataclass
class DistillConfig(Checked):
    """DistillConfig names a trained model that teaches the one in training, and weighs what is learned from it.

    The loss is cross_entropy_weight * cross-entropy + logits_weight * KL of the logits + attention_weight * KL of the
    attention relations, as in BitNet Distillation (arXiv 2510.13998, equation 13).
    """

    teacher: str | None = None
    """The teacher: any model that `infer` can open as its checkpoint, with the tokenizer of the data. null: no
    distillation."""
    cross_entropy_weight: float = 1.0
    """The weight of the next-token loss of the text itself."""
    logits_weight: float = 1.0
    """The weight of T^2 * KL(teacher || student), in nats per token, where both distributions are those of temperature
    T. T^2 keeps the size of the gradient (Hinton, Vinyals and Dean, arXiv 1503.02531, section 2); a weight of a paper
    that leaves it out is divided by it."""
    temperature: float = 1.0
    """T: logits are divided by it before the softmax of the KL. Above 1, unlikely tokens count more."""
    attention_weight: float = 0.0
    """The weight of KL(teacher || student) of the attention relations of one layer, in nats per position, summed over
    queries, keys and values (MiniLMv2, arXiv 2012.15828). 0: they are not computed."""
    attention_layer: int = -1
    """The layer whose relations are compared, in both networks. Negative numbers count from the last layer, -1."""
    attention_heads: int | None = None
    """Relation heads: queries, keys and values are each cut into that many vectors. null: the largest number of
    key/value heads that divides those of both networks."""

    OWNER: ClassVar[str] = "distill."
    RANGES: ClassVar[dict[str, Range]] = {
        "cross_entropy_weight": FACTOR,
        "logits_weight": FACTOR,
        "temperature": POSITIVE,
        "attention_weight": FACTOR,
        "attention_layer": Range(-(2**31), 2**31 - 1),
        "attention_heads": SIZE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None:
            for field in fields(self):
                if (value := getattr(self, field.name)) != field.default:
                    raise UserError(
                        f"distill.teacher must be given with distill.{field.name}={written(value)}: add "
                        "distill.teacher=<run or model folder>, or leave out experiment=distill and this key"
                    )
        elif not self.teacher:
            raise UserError("distill.teacher= is empty: give a run or model folder")
        elif not self.attention_weight and (self.attention_layer != -1 or self.attention_heads is not None):
            raise UserError(
                f"distill.attention_layer={self.attention_layer} and distill.attention_heads={self.attention_heads} "
                "need distill.attention_weight, which is 0: give it, or leave them out"
            )
        elif not (self.logits_weight or self.attention_weight):
            raise UserError(
                f"distill.teacher={self.teacher}: distill.logits_weight and distill.attention_weight are 0, so nothing "
                "is learned from it: raise one of them, or leave the teacher out"
            )
