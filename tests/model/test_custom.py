"""A network of a user's own: trained, rounded, resumed, written, evaluated; what other formats say about it."""

import json

import pytest
import torch
from torch import nn

from bitnet_lit.checkpoints.custom_folder import open_custom_folder, save_custom_folder
from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.cli import compose
from bitnet_lit.config import CustomNetwork, EvaluateConfig, QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.inference.evaluation import evaluate
from bitnet_lit.model.custom import build_custom_network, count
from bitnet_lit.quant import BitLinear
from bitnet_lit.training.checkpoint_file import read_checkpoint
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN, Killed, kill_at

HERE = "tests.model.test_custom"
SHORT = [item for item in TINY_RUN if not item.startswith("model.")]


class Mixer(nn.Module):
    """Each token sees the mean of those before it; dropout, a norm of another name, and a head that stays dense."""

    def __init__(self, vocab_size, width=16, dropout=0.1):
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)
        self.ln = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        seen = torch.arange(1, ids.shape[1] + 1, device=ids.device)[:, None]
        x = x + self.ln(x.cumsum(1) / seen)
        return self.lm_head(x + self.dropout(self.down(self.up(x).relu())))


class Short(Mixer):
    def forward(self, ids):
        return super().forward(ids)[..., :-1]


class Plain(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, ids):
        return self.table(ids)


class Narrow(Mixer):
    def __init__(self, vocab_size, hidden_size=16):
        super().__init__(vocab_size, hidden_size)


def options(shards, *overrides):
    mine = [f"model._target_={HERE}.Mixer", "model.width=24", "model.max_position_embeddings=32"]
    return [*SHORT, "callbacks.progress_bar=false", f"data.dir={shards}", *mine, *overrides]


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_a_run_is_resumed_exactly_written_and_evaluated(tmp_path, shards, monkeypatch, optim):
    overrides = options(shards, f"optim={optim}")
    metrics = train(compose("train", [f"run_dir={tmp_path}/whole", *overrides]))
    kill_at(monkeypatch, 6)
    with pytest.raises(Killed):
        train(compose("train", [f"run_dir={tmp_path}/broken", *overrides]))
    monkeypatch.undo()
    with pytest.raises(UserError, match=rf"names the class {HERE}.Mixer, .* 'allow=\[{HERE}.Mixer\]'"):
        resume_config(str(tmp_path / "broken"))
    with pytest.raises(UserError, match="model.arguments was .* when the run began"):
        train(resume_config(str(tmp_path / "broken"), [f"allow=[{HERE}]", "model.width=16"]))
    train(resume_config(str(tmp_path / "broken"), [f"allow=[{HERE}]"]))
    whole, resumed = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "broken"))
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name])
    if optim == "adamw":
        groups = whole["optimizer_states"][0]["param_groups"]
        assert [len(group["params"]) for group in groups] == [4, 3]  # two norms' vectors and a bias do not decay
    folder = tmp_path / "whole" / ("model_last" if (tmp_path / "whole" / "model_last").exists() else "model")
    with pytest.raises(UserError, match=rf"names the class {HERE}.Mixer, .*checkpoint=.* 'networks=\[{HERE}.Mixer\]'"):
        evaluate(EvaluateConfig(checkpoint=str(folder), accelerator="cpu"))
    asked = EvaluateConfig(checkpoint=str(folder), data_dir=str(shards), accelerator="cpu", networks=[f"{HERE}.Mixer"])
    assert evaluate(asked)["loss"] == pytest.approx(metrics["val/loss"], rel=1e-5)
    with pytest.raises(UserError, match=rf"a network of its user's own \({HERE}.Mixer\): formats and engines"):
        open_stored(folder)


def test_a_folder_with_another_class_inside_the_arguments_is_refused(tmp_path, shards):
    train(compose("train", [f"run_dir={tmp_path}/run", *options(shards, "trainer.max_steps=1")]))
    path = tmp_path / "run" / "model" / "config.json"
    raw = json.loads(path.read_text())
    raw["bitnet_lit"]["network"]["width"] = {"_target_": "os.getpid"}
    path.write_text(json.dumps(raw))
    config = EvaluateConfig(checkpoint=str(path.parent), accelerator="cpu", networks=[f"{HERE}.Mixer"])
    with pytest.raises(UserError, match=r"names the class os.getpid"):
        evaluate(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"info": {"sequence_length": "64"}}, "bitnet_lit.info.sequence_length: must be a whole number"),
        ({"network": {"_target_": 5}}, "bitnet_lit.network._target_: must be text"),
        ({"network": {"_target_": f"{HERE}.Mixer", "vocab_size": "x"}}, "config.json: model.vocab_size='x'"),
        ({"quant": []}, "bitnet_lit.quant: must be an object"),
        ({"quant": {"name": "b9", "skip": []}}, "config.json: quant.name=b9"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, change, message):
    config = CustomNetwork(f"{HERE}.Mixer", vocab_size=50)
    state = build_custom_network(config, QuantConfig()).state_dict()
    save_custom_folder(tmp_path / "model", config, QuantConfig(), None, {}, state)
    path = tmp_path / "model" / "config.json"
    raw = json.loads(path.read_text())
    raw["bitnet_lit"] |= change
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message) as error:
        open_custom_folder(path.parent, [HERE])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_is_rounded_and_counted():
    network = build_custom_network(CustomNetwork(f"{HERE}.Mixer", vocab_size=50), QuantConfig())
    rounded = [name for name, module in network.named_modules() if isinstance(module, BitLinear)]
    assert rounded == ["up", "down"]
    counted = count(network, QuantConfig())
    assert (counted.projections, counted.embedding) == (2 * 16 * 32, 50 * 16)
    assert counted.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert counted.forward_flops_per_token == 2 * (2 * 16 * 32 + 50 * 16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"model._target_={HERE}.Short"], r"gives torch.float32 \(1, 2, \d+\) .* it must give logits \(1, 2, 512\)"),
        (["model._target_=builtins.dict"], "dict: is no network"),
        ([f"model._target_={HERE}.Plain", "~model.width"], r"has no nn.Linear to round .* take quant=none"),
        (["model.widht=3"], "did you mean width"),
        (["export.targets=[packed]"], "Mixer is saved as a model folder only"),
        (["trainer.strategy=fsdp", "optim=adamw"], "take trainer=ddp"),
        (["init_from=x"], "leave one of them out"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, shards, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        train(compose("train", [f"run_dir={tmp_path}/run", *options(shards, *overrides)]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "width"), [([], 64), (["model.hidden_size=24"], 24)], ids=["the mode's size", "a typed size"]
)
def test_a_mode_sets_the_sizes_that_the_network_has(overrides, width):
    """mode=smoke sets seven sizes of this package's network."""
    config = compose("train", ["run_dir=unused", "mode=smoke", f"model._target_={HERE}.Narrow", *overrides])
    assert config.model.arguments == {"hidden_size": width} and config.model.max_position_embeddings == 64
    config = compose("train", ["run_dir=unused", "mode=smoke", f"model._target_={HERE}.Mixer", "model.width=8"])
    assert config.model.arguments == {"width": 8}
    config = compose("train", ["run_dir=unused", "mode=smoke", "data._target_=tests.data.test_custom.Squares"])
    assert "max_val_sequences" not in config.data.arguments
    with pytest.raises(UserError, match="hidden_size=24: .* has no such argument"):  # typed, so it is not left out
        typed = [f"model._target_={HERE}.Mixer", "model.hidden_size=24", "model.vocab_size=64"]
        config = compose("train", ["run_dir=unused", "mode=smoke", *typed])
        build_custom_network(config.model, config.quant)
