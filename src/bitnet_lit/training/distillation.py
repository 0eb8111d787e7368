"""Distillation: a trained teacher adds to the loss of the model in training, its student (`distill.teacher`).

A 1.58-bit student learns from its dense twin, as in BitNet Distillation (arXiv 2510.13998). Each batch goes through
both networks. The loss is a weighted sum of the cross-entropy of the text, the divergence of the logits, and the
divergence of the attention relations of one layer (distillation_loss.py).

The teacher is frozen and in eval mode. It is no part of the LightningModule, so neither the optimizer nor a checkpoint
knows it, and every rank holds all of it, also under FSDP. Its linear weights are kept in the dtype of the products, so
that autocast does not convert them at each step. A checkpoint has the hash of its weights, and a run goes on with the
same teacher only.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitnet_lit.checkpoints.locate import find_model, open_stored
from bitnet_lit.checkpoints.pretrained import build_pretrained
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import DistillConfig, ModelConfig, TrainConfig
from bitnet_lit.config.held import network_values
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.model import CausalLM
from bitnet_lit.model.accounting import Accounting, account
from bitnet_lit.model.layers import DecoderLayer
from bitnet_lit.model.loss import linear_loss
from bitnet_lit.training.compile import undo_compile
from bitnet_lit.training.distillation_loss import DistillationGradient, chunked_relation_loss
from bitnet_lit.training.figures import Figure

PARTS = ("train/ce", "train/kd", "train/kd_attention")
"""Names of the parts of the loss, without their weights: cross-entropy, logits, attention relations."""


class Teacher:
    """The teacher of a run as it lies on the disk.

    Args:
        config: of the run; `distill.teacher` names the teacher.

    Raises:
        UserError: there is no such model, or it is damaged.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.name = config.teacher
        self.stored: StoredModel = open_stored(find_model(config.teacher, "distill.teacher"))

    @cached_property
    def sha256(self) -> str:
        """The hash of its network's description and of all of its weights, in hex. A copy has the same."""
        stored = self.stored
        # Only what differs from the defaults, so that a key that a later version adds does not change the hash.
        default = network_values(ModelConfig())
        network = {key: value for key, value in network_values(stored.config).items() if value != default[key]}
        facts = {"network": network, "quant": stored.quant.describe()}
        sha256 = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name in sorted(stored.reader.shapes()):
            sha256.update(name.encode())
            sha256.update(stored.reader.read(name).tobytes())
        return sha256.hexdigest()

    def accounting(self, sequence_length: int) -> Accounting:
        """Return the counts of its network."""
        return account(self.stored.config, self.stored.quant, sequence_length)

    def check(self, config: TrainConfig, tokenizer: Tokenizer | None, sequence_length: int) -> None:
        """Make sure that it can teach the student.

        Args:
            config: of the student, with every size filled in.
            tokenizer: of the data.

        Raises:
            UserError: it has another tokenizer, another vocabulary, too short a context, or no such layer or heads.
        """
        assert isinstance(config.model, ModelConfig)  # the schema refuses a teacher of another network
        theirs, ours, what = self.stored.config, config.model, f"distill.teacher={self.name}"
        own = self.stored.tokenizer
        sha256 = self.stored.tokenizer_sha256 if own is None else own.sha256
        if tokenizer is not None and sha256 is not None and sha256 != tokenizer.sha256:
            raise UserError(
                f"{what}: was trained with another tokenizer than that of the data, so its tokens mean other text: "
                "prepare the text with the teacher's tokenizer (tokenizer=<its file>)"
            )
        if theirs.vocabulary != ours.vocabulary:
            raise UserError(
                f"{what}: has {theirs.vocabulary} tokens, and the student {ours.vocabulary}: take "
                f"model.vocab_size={theirs.vocabulary}"
            )
        if theirs.max_position_embeddings < sequence_length:
            raise UserError(
                f"{what}: its context is {theirs.max_position_embeddings} tokens, and a sequence has "
                f"{sequence_length}: take data.sequence_length={theirs.max_position_embeddings}"
            )
        if config.distill.attention_weight:
            self._check_relations(config.distill, ours)

    def _check_relations(self, distill: DistillConfig, ours: ModelConfig) -> None:
        networks, layer = {"teacher": self.stored.config, "student": ours}, distill.attention_layer
        heads = relation_heads(distill, self.stored.config, ours)
        for name, network in networks.items():
            count = network.num_hidden_layers
            if not -count <= layer < count:
                raise UserError(
                    f"distill.attention_layer={layer}: the {name} has {count} layers: take a number from {-count} to "
                    f"{count - 1}"
                )
            if network.attention_size % heads or network.kv_size % heads:
                raise UserError(
                    f"distill.attention_heads={heads}: must divide the {name}'s queries ({network.attention_size}) and "
                    f"keys ({network.kv_size}): leave it out for {relation_heads(DistillConfig(), *networks.values())}"
                )


def relation_heads(distill: DistillConfig, teacher: ModelConfig, student: ModelConfig) -> int:
    """Return the number of relation heads: the one that was asked for, or one that divides every size."""
    return distill.attention_heads or math.gcd(teacher.num_kv_heads, student.num_kv_heads)


def teacher_of(config: TrainConfig) -> Teacher | None:
    """Return the teacher of a run; None where it has none.

    Raises:
        UserError: there is no such model, or it is damaged.
    """
    return None if config.distill.teacher is None else Teacher(config.distill)


class Distillation:
    """Computes the loss of a batch from the student and the teacher.

    Attributes:
        teacher: the teacher's network.
        parts: the parts of the last loss, without their weights, float32 (3,), in the order of `PARTS`. It is always
            the same memory, so that a CUDA graph writes to it too.
    """

    def __init__(self, config: TrainConfig, teacher: Teacher) -> None:
        assert isinstance(config.model, ModelConfig)
        self.config = distill = config.distill
        self.teacher = build_pretrained(teacher.stored).model.requires_grad_(False)
        self.heads = relation_heads(distill, teacher.stored.config, config.model)
        self.gradient = DistillationGradient(distill.cross_entropy_weight, distill.logits_weight, distill.temperature)
        self.parts = torch.zeros(len(PARTS))

    def to(self, device: torch.device, precision: str) -> None:
        """Move the teacher to a device, and convert its weights to what they are multiplied in.

        Args:
            precision: the Trainer's precision. In bf16-mixed norms and the embedding stay in float32, as autocast has
                them.
        """
        if precision == "bf16-true":
            self.teacher.to(torch.bfloat16)
        elif precision == "bf16-mixed":
            for module in self.teacher.modules():
                if type(module) is nn.Linear and module.weight is not self.teacher.model.embed_tokens.weight:
                    module.to(torch.bfloat16)
        self.teacher.to(device)
        self.parts = self.parts.to(device)

    def compile(self) -> None:
        """Compile the loss at its first call. The teacher's network is compiled by `compile_networks`."""
        self.gradient.compile(dynamic=False)

    def undo_compile(self) -> None:
        """Let the teacher and the loss run as plain PyTorch."""
        undo_compile(self.teacher)
        undo_compile(self.gradient)

    def figures(self, parts: Tensor) -> dict[str, Figure]:
        """Return the parts of a loss that are computed, by their names."""
        computed = (True, bool(self.config.logits_weight), bool(self.config.attention_weight))
        return {name: part for name, part, is_on in zip(PARTS, parts.unbind(), computed, strict=True) if is_on}

    def __call__(self, student: nn.Module, ids: Tensor) -> Tensor:
        """Return the loss of a batch, float32 (), and keep its parts.

        Args:
            student: a `CausalLM`.
            ids: int64 (B, T + 1).
        """
        loss: Tensor = student(ids[:, :-1], criterion=partial(self._criterion, ids[:, 1:]))
        return loss

    def _criterion(self, targets: Tensor, student: CausalLM, ids: Tensor) -> Tensor:
        self.parts.zero_()
        with torch.no_grad():
            expected, expected_heads = self._run(self.teacher, ids)
        found, found_heads = self._run(student, ids)
        loss = self._logits_loss(student.lm_head, found.flatten(0, 1), expected.flatten(0, 1), targets.flatten())
        if self.config.attention_weight:
            pairs = zip(found_heads, expected_heads, strict=True)  # of queries, of keys, of values
            relations = torch.stack([chunked_relation_loss(*pair, self.heads) for pair in pairs]).sum()
            self.parts[2] += relations.detach()
            loss = loss + self.config.attention_weight * relations
        return loss

    def _run(self, network: CausalLM, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what the final norm puts out, and queries, keys and values of the layer that is compared."""
        decoder = network.model
        if not self.config.attention_weight:
            return decoder(ids), ()
        number = self.config.attention_layer % len(decoder.layers)
        inputs: dict[int, tuple[Tensor, Tensor | None]] = {number: (torch.empty(0), None)}
        hidden_BTD = decoder.norm(decoder.last_layer(ids, inputs=inputs))
        # The layer projects its input once more here, so the kernels that fuse its projections stay as they are.
        return hidden_BTD, cast(DecoderLayer, decoder.layers[number]).projected_heads(*inputs[number])

    def _logits_loss(self, head: nn.Module, hidden_ND: Tensor, teacher_ND: Tensor, targets: Tensor) -> Tensor:
        def gradient_of(logits_RV: Tensor, rows: slice, scale: float) -> tuple[Tensor, Tensor]:
            # Where logits are not compared, the student's own stand for the teacher's, and differ by nothing.
            teacher_RV = self.teacher.lm_head(teacher_ND[rows]) if self.config.logits_weight else logits_RV
            entropies, divergences, gradient = self.gradient(logits_RV, teacher_RV, targets[rows], scale)
            self.parts[:2] += torch.stack([entropies.sum(), divergences.sum()]) * scale
            weighted = self.config.cross_entropy_weight * entropies + self.config.logits_weight * divergences
            return weighted, gradient

        if type(head) is nn.Linear:
            return linear_loss(hidden_ND, head.weight, gradient_of)
        logits_NV = head(hidden_ND)  # a quantized head has no such product, and its logits are held whole
        loss: Tensor = _GivenGradient.apply(logits_NV, gradient_of)
        return loss


class _GivenGradient(torch.autograd.Function):
    """Makes a loss of logits that are held whole from a `LogitsGradient`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient_of: Any) -> Tensor:
        losses, gradient = gradient_of(logits, slice(0, len(logits)), 1.0 / len(logits))
        ctx.save_for_backward(gradient)
        return losses.sum() / len(logits)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None
