"""A run starts from random weights, or from the weights of a trained model, dense or BitNet (`init_from`).

A dense model becomes a BitNet by further training with quantized projections. Lambda rises from 0 (full precision) to 1
(fully quantized) over `quant.lambda_warmup_steps`, because switching at once loses most of what was learned.

Two things may be added. If the trained model belongs to a run of ours, the optimizer's state is taken over too: its
moments fit the weights, and new moments would cost the first steps. If the dense model has no sub-norms, they can be
inserted. A sub-norm divides its input by the input's RMS, so its gain starts at that RMS, measured on a batch. The
network then computes nearly what it did before.

The trained model decides what the network is. The run decides how it is trained (dropout, gradient checkpointing). A
key of the network that was typed and contradicts the trained model is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from bitnet_lit.checkpoints.formats.model_folder import trained_step
from bitnet_lit.checkpoints.locate import find_model, open_stored
from bitnet_lit.checkpoints.pretrained import PretrainedModel, from_pretrained
from bitnet_lit.config import CustomNetwork, ModelConfig, TrainConfig
from bitnet_lit.config.checks import written
from bitnet_lit.config.held import network_values
from bitnet_lit.errors import UserError
from bitnet_lit.exports.targets import check_targets
from bitnet_lit.model import CausalLM, build_model
from bitnet_lit.model.accounting import Accounting
from bitnet_lit.model.custom import build_custom_network
from bitnet_lit.model.tensors import own_tensors
from bitnet_lit.quant.bit_linear import set_strength
from bitnet_lit.quant.convert import check_skip
from bitnet_lit.quant.try_rules import try_rules
from bitnet_lit.runs.folder import BEST, CHECKPOINTS, LAST
from bitnet_lit.training.checkpoint_file import read_checkpoint
from bitnet_lit.training.data import RunData
from bitnet_lit.training.plan import check_memory

CALIBRATION_SEQUENCES = 8
SUB_NORMS = ("attn_sub_norm.weight", "ffn_sub_norm.weight")


def fill_in_sizes(config: TrainConfig, data: RunData) -> PretrainedModel | None:
    """Fill in what `config.model` leaves open, and return the trained model of `init_from` (None without it).

    The vocabulary size comes from the data, and with `init_from` the sizes come from the trained model.

    Raises:
        UserError: the vocabulary is too small for the data, or the trained model cannot be trained further.
    """
    # The weights of a resumed run come from its checkpoint, and its sizes come from its config.
    trained = None if config.init_from is None or config.resume is not None else _trained(config)
    if config.model.vocab_size is None:
        config.model.vocab_size = data.vocab_size
    if config.model.vocab_size < data.vocab_size:
        if trained is None:
            typed, remedy = "", "leave model.vocab_size at null to follow the data"
        else:
            typed, remedy = f" (of init_from={config.init_from})", "prepare the text with the tokenizer of that model"
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}{typed}, but the data ({data.name}) holds ids below "
            f"{data.vocab_size}: {remedy}"
        )
    theirs = trained.tokenizer_sha256 if trained is not None else None
    if theirs and data.tokenizer and data.tokenizer.sha256 != theirs:
        rank_zero_warn(
            f"init_from={config.init_from}: was trained with another tokenizer than the one of the data "
            f"({data.name}): its embedding means other tokens, unless the two are one vocabulary in two files"
        )
    return trained


def build_network(config: TrainConfig, on_meta: bool = False, teacher: Accounting | None = None) -> nn.Module:
    """Return the network with random weights.

    Args:
        config: with every size filled in.
        on_meta: whether to build it on the meta device, where it takes no memory. A network of the user's own is always
            really built.
        teacher: the counts of the network that teaches this one, which needs memory too.

    Raises:
        UserError: this machine has too little memory for the network, quant.skip names a layer that does not exist, or
            a scheme of the user's own does not round as it says.
    """
    L.seed_everything(config.seed, verbose=False)
    if isinstance(config.model, CustomNetwork):
        network: nn.Module = build_custom_network(config.model, config.quant)
    else:
        check_memory(config, teacher)
        with torch.device("meta") if on_meta else contextlib.nullcontext():
            network = build_model(config.model, config.quant)
    _check_skip(network, config)
    if config.quant._target_ is not None:
        try_rules(network, f"quant._target_={config.quant._target_}")
    return network


def initial_model(config: TrainConfig, data: RunData, teacher: Accounting | None = None) -> nn.Module:
    """Return the network with its first weights, and fill in what `config.model` leaves open.

    Args:
        teacher: the counts of the network that teaches this one.

    Raises:
        UserError: see `fill_in_sizes` and `build_network`.
    """
    trained = fill_in_sizes(config, data)
    model = build_network(config, teacher=teacher)
    if trained is not None:
        assert isinstance(config.model, ModelConfig) and isinstance(model, CausalLM)
        adds_norms = config.model.sub_norm and not trained.config.sub_norm
        missing, unexpected = model.load_state_dict(trained.model.state_dict(), strict=False)
        own = own_tensors(config.model, config.quant)  # they begin as they are made
        left = [name for name in missing if name not in own and not (adds_norms and name.endswith(SUB_NORMS))]
        assert not left and not unexpected, f"init_from: {[*left, *unexpected]}"
        if adds_norms:
            length = min(config.model.max_position_embeddings, config.data.sequence_length or 256)
            calibrate_sub_norms(model, data.rows(CALIBRATION_SEQUENCES, length)[:, :-1])
    return model


def _check_skip(network: nn.Module, config: TrainConfig) -> None:
    """Refuse an entry of `quant.skip` that no linear layer has.

    `lm_head`, the default, may be missing. A resumed run goes on with what it began with.
    """
    if config.resume is None:
        check_skip(network, [entry for entry in config.quant.skip if entry != "lm_head"], "quant.skip")


def _trained(config: TrainConfig) -> PretrainedModel:
    """Load the model of `init_from` and make its network the run's, except for how the run trains it."""
    trained = from_pretrained(config.init_from, "init_from")
    if trained.packed:
        raise UserError(f"init_from={config.init_from}: packed codes cannot be trained: give the latent weights")
    _check_scheme(config, trained)
    sub_norm = trained.config.sub_norm or config.init_sub_norm
    assert isinstance(config.model, ModelConfig)  # the schema refuses init_from beside a network of the user's own
    config.model = replace(trained.config.trained_as(config.model), sub_norm=sub_norm)
    check_targets(config.export.targets, config.model, config.quant)
    return trained


def _check_scheme(config: TrainConfig, trained: PretrainedModel) -> None:
    """Refuse weights of a scheme that another one cannot go on with."""
    theirs, ours, what = trained.quant.scheme, config.quant.scheme, f"init_from={config.init_from}"
    if theirs.transforms_inputs != ours.transforms_inputs:
        transforming, plain = (theirs, ours) if theirs.transforms_inputs else (ours, theirs)
        raise UserError(
            f"{what}: was trained with quant={theirs.name}, and quant={transforming.name} transforms inputs where "
            f"quant={plain.name} does not, so its weights would compute nonsense: take quant={theirs.name}"
        )
    lost = own_tensors(trained.config, trained.quant).keys() - own_tensors(trained.config, config.quant).keys()
    if lost:
        raise UserError(
            f"{what}: has {min(lost)}, which quant={ours.name} would leave out: take quant={theirs.name}, or begin "
            "with a model that was trained without it"
        )


@contextlib.contextmanager
def sizes_are_given(source: str | None, keys: Collection[str]) -> Iterator[None]:
    """Give the right remedy for sizes that were typed beside a trained model and contradict each other in the block.

    Their own error asks for other sizes. But the trained model has the sizes, so none may be typed.

    Args:
        source: what names the trained model, such as "init_from=outputs/run"; None where there is none.
        keys: the keys that were typed.

    Raises:
        UserError: an error of the block, with this remedy where it is about a key that was typed.
    """
    try:
        yield
    except UserError as error:
        for key in keys if source else ():
            if key.startswith("model.") and f"{key}=" in str(error) and key[6:] not in ModelConfig.TRAINING:
                text = f"{source} with {key}=: the sizes of the network are those of its weights: leave {key}= out"
                raise UserError(text) from None
        raise


def check_typed_network(config: TrainConfig, keys: Collection[str]) -> None:
    """Refuse a key of the network that was typed beside `init_from` and contradicts the trained model.

    Without this check the typed value would be replaced silently.

    Args:
        keys: the keys and groups that were typed.

    Raises:
        UserError: a key asks for another network. The text names the first such key.
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
                shown = written(value)
                typed = f"{key}={shown}" if name else f"model={config.model.name} (model.{field}={shown})"
                raise UserError(
                    f"{typed} with init_from={config.init_from}: the weights are of a network with {field}="
                    f"{written(has.get(field))}: leave {key}= out, or train a new network without init_from"
                )


def _resolved(config: ModelConfig) -> dict[str, Any]:
    """Return the values that define a network, with the sizes that follow from others filled in."""
    sizes = {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_size}
    return {**network_values(config), **sizes}


@torch.no_grad()
def calibrate_sub_norms(model: CausalLM, ids: Tensor) -> None:
    """Set each sub-norm's gain to the RMS of its input, so that the norm changes nothing on average.

    Args:
        model: a network with dense weights. It runs here without quantization.
        ids: int64 (B, T), token ids of real text.
    """

    def measure(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        norm.weight.fill_(inputs[0].float().square().mean(-1).sqrt().mean())  # type: ignore[operator]

    # A pre-hook sets the gain before the norm runs, so that the layers after it get calibrated input.
    hooks = [
        module.register_forward_pre_hook(measure)
        for name, module in model.named_modules()
        if f"{name}.weight".endswith(SUB_NORMS)
    ]
    set_strength(model, torch.zeros(()))
    training = model.training
    model.eval()(ids)
    model.train(training)
    set_strength(model, None)
    for hook in hooks:
        hook.remove()


def optimizer_state(init_from: str) -> dict[str, Any] | None:
    """Return the state of the optimizer after the step of the model of `init_from`; None where no checkpoint has it.

    A run writes model/ from best.ckpt, and model_last/ from last.ckpt.

    Args:
        init_from: a run folder, or a model folder in one.
    """
    model = find_model(init_from, "init_from")
    step = trained_step(model)
    for name in (BEST, LAST):
        path = model.parent / CHECKPOINTS / name
        if path.is_file() and (checkpoint := read_checkpoint(path))["global_step"] == step:
            return dict(checkpoint["optimizer_states"][0])
    return None
