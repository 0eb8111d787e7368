"""Where a run's weights come from: drawn, or from a trained model (`init_from`), dense or BitNet.

A dense model becomes a BitNet by training on with its projections rounded; lambda of `quant.lambda_warmup_steps` leads
over from the one to the other, because switching at once throws most of what was learned away. Two things can come
along: the optimizer's state, where the trained model is a run of ours (its moments fit the weights, and beginning them
anew costs the first steps), and sub-norms that the dense model does not have. A new sub-norm divides by the size of its
input, so its gain starts at that size, measured on a batch: the network then computes nearly what it did.

The trained model says what the network is; how it is trained (dropout, gradient checkpointing) is the run's own. Keys
of the network that were typed and say something else are refused.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from bitnet_lit.checkpoints.locate import find_model, open_stored
from bitnet_lit.checkpoints.pretrained import PretrainedModel, from_pretrained
from bitnet_lit.config import CustomNetwork, ModelConfig, TrainConfig
from bitnet_lit.config.held import network_values
from bitnet_lit.errors import UserError
from bitnet_lit.exports.targets import check_targets
from bitnet_lit.model import CausalLM, build_model
from bitnet_lit.model.custom import build_custom_network
from bitnet_lit.quant.bit_linear import set_strength
from bitnet_lit.runs.folder import BEST, CHECKPOINTS
from bitnet_lit.training.checkpoint_file import read_checkpoint
from bitnet_lit.training.data import RunData
from bitnet_lit.training.plan import check_memory

CALIBRATION_SEQUENCES = 8


def initial_model(config: TrainConfig, data: RunData) -> nn.Module:
    """The network with its first weights; fills in what `config.model` leaves to the data or to the trained model.

    Raises:
        UserError: a vocabulary that is too small, or a model that cannot be trained further.
    """
    # The weights of a resumed run come from its checkpoint, and the sizes stand in its config.
    trained = None if config.init_from is None or config.resume is not None else _trained(config)
    if config.model.vocab_size is None:
        config.model.vocab_size = data.vocab_size
    if config.model.vocab_size < data.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}, but the data ({data.name}) holds ids below "
            f"{data.vocab_size}: leave model.vocab_size at null to follow the data, or prepare the text with the "
            "tokenizer of init_from"
        )
    theirs = trained.tokenizer_sha256 if trained is not None else None
    if theirs and data.tokenizer and data.tokenizer.sha256 != theirs:
        rank_zero_warn(
            f"init_from={config.init_from}: was trained with another tokenizer than the one of the data "
            f"({data.name}): its embedding means other tokens, unless the two are one vocabulary in two files"
        )
    if isinstance(config.model, CustomNetwork):
        L.seed_everything(config.seed, verbose=False)
        return build_custom_network(config.model, config.quant)
    check_memory(config)
    L.seed_everything(config.seed, verbose=False)
    model = build_model(config.model, config.quant)
    if trained is not None:
        adds_norms = config.model.sub_norm and not trained.config.sub_norm
        model.load_state_dict(trained.model.state_dict(), strict=not adds_norms)
        if adds_norms:
            length = min(config.model.max_position_embeddings, config.data.sequence_length or 256)
            calibrate_sub_norms(model, data.rows(CALIBRATION_SEQUENCES, length)[:, :-1])
    return model


def _trained(config: TrainConfig) -> PretrainedModel:
    """The model of `init_from`; its network becomes the run's, which keeps its own way to train it."""
    trained = from_pretrained(config.init_from, "init_from")
    if trained.packed:
        raise UserError(f"init_from={config.init_from}: packed codes cannot be trained: give the latent weights")
    sub_norm = trained.config.sub_norm or config.init_sub_norm
    assert isinstance(config.model, ModelConfig)  # the schema refuses init_from beside a network of the user's own
    config.model = replace(trained.config.trained_as(config.model), sub_norm=sub_norm)
    check_targets(config.export.targets, config.model, config.quant)
    return trained


def check_typed_network(config: TrainConfig, keys: Collection[str]) -> None:
    """Refuse a network that was typed beside `init_from` and is not the one of the trained model.

    Without this, what was typed would be replaced without a word.

    Args:
        keys: the keys and groups that were typed.

    Raises:
        UserError: the first key that asks for another network.
    """
    assert config.init_from is not None and isinstance(config.model, ModelConfig)
    trained = open_stored(find_model(config.init_from, "init_from")).config
    trained = replace(trained, sub_norm=trained.sub_norm or config.init_sub_norm)
    has = {"name": trained.name, **_resolved(trained)}
    for key in keys:
        group, _, name = key.partition(".")
        if group != "model" or name in config.model.TRAINING:
            continue
        wanted = {name: getattr(config.model, name)} if name else _resolved(config.model)  # a key, or a whole group
        for field, value in wanted.items():
            if value not in (None, has.get(field)):
                typed = f"{key}={value}" if name else f"model={config.model.name} (model.{field}={value})"
                raise UserError(
                    f"{typed} with init_from={config.init_from}: the weights are of a network with {field}="
                    f"{has.get(field)}: leave {key}= out, or train a new network without init_from"
                )


def _resolved(config: ModelConfig) -> dict[str, Any]:
    """What a network is, with the sizes filled in that follow from others."""
    sizes = {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_size}
    return {**network_values(config), **sizes}


@torch.no_grad()
def calibrate_sub_norms(model: CausalLM, ids: Tensor) -> None:
    """Set each sub-norm's gain to the RMS of what enters it, so that on average it changes nothing.

    Args:
        model: with dense weights; run unrounded here.
        ids: int64 (B, T), real text.
    """

    def measure(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        norm.weight.fill_(inputs[0].float().square().mean(-1).sqrt().mean())  # type: ignore[operator]

    # Before each norm runs, so that the layers behind it see it calibrated.
    hooks = [
        module.register_forward_pre_hook(measure)
        for name, module in model.named_modules()
        if name.endswith(("attn_sub_norm", "ffn_sub_norm"))
    ]
    set_strength(model, torch.zeros(()))
    training = model.training
    model.eval()(ids)
    model.train(training)
    set_strength(model, None)
    for hook in hooks:
        hook.remove()


def optimizer_state(init_from: str) -> dict[str, Any] | None:
    """The optimizer's state beside the model folder of a run of ours; None where there is none."""
    folder = Path(init_from)
    for run in (folder, folder.parent):
        path = run / CHECKPOINTS / BEST  # model/ is the best model, so this is its state
        if path.is_file():
            return dict(read_checkpoint(path)["optimizer_states"][0])
    return None
