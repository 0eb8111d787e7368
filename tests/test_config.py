"""The schema and what users hear of it: every file in conf composes, every mistake is one line with a remedy."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bitnet_lit.cli import compose
from bitnet_lit.composed_config import CONF_DIR, SCHEMAS
from bitnet_lit.config import MuonConfig, PrepareConfig, QuantConfig, TrainConfig, training
from bitnet_lit.errors import UserError

GROUPS = ("model", "quant", "data", "trainer", "mode", "optim", "schedule", "callbacks", "logger", "experiment")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted(Path(CONF_DIR, group).glob("*.yaml"))]


def train(*overrides):
    return compose("train", ["run_dir=unused", *overrides])


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_of_every_group_composes(group, option):
    beside = {  # what they cannot do without
        "convert_dense": ["init_from=x"],
        "distill": ["distill.teacher=x"],
        "custom": [f"{group}._target_=a.B"],
    }.get(option, [])
    assert isinstance(train(f"{group}={option}", *beside), TrainConfig)


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("demo", "data/demo"),
        ("texts/mine.jsonl", "data/mine"),
        ("texts/*.json", "data/texts"),
        ("a/b/**/*.txt", "data/b"),
        ("texts/", "data/texts"),
        ("texts.v2", "data/texts.v2"),
        ("texts.v2/*.txt", "data/texts.v2"),
    ],
)
def test_prepare_names_its_folder_after_the_source(source, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts.v2").mkdir()
    assert compose("prepare", [f"source={source}"]).folder == Path(folder) == PrepareConfig(source=source).folder


@pytest.mark.parametrize("command", sorted(set(SCHEMAS) - {"train"}))
def test_every_command_composes(command):
    assert isinstance(compose(command), SCHEMAS[command])


def test_a_training_config_made_in_python_has_a_run_folder():
    assert compose("train", ["seed=2"]).run_dir == TrainConfig.run_dir
    assert compose("train", ["run_dir=mine"]).run_dir == "mine"


def test_a_text_in_a_group_without_a_schema_is_not_resolved_again():
    group = training.GROUPS["data"].filled("data", {"dir": "a${b}", "batch_size": 4})
    assert (group.dir, group.batch_size) == ("a${b}", 4)
    with pytest.raises(UserError, match=r"data.batch_size='\${b}': must be a whole number"):
        training.GROUPS["data"].filled("data", {"batch_size": "${b}"})


def test_a_group_selects_its_own_schema():
    assert isinstance(train("optim=muon").optim, MuonConfig)
    assert type(train("optim=adamw").optim).__name__ == "AdamWConfig"


def test_overrides_win_over_modes_and_experiments():
    config = train("mode=smoke", "experiment=demo", "trainer.max_steps=3", "model.hidden_size=48")
    assert config.trainer.max_steps == 3 and config.model.hidden_size == 48


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_step=3", "unknown key 'trainer.max_step': did you mean 'trainer.max_steps'?"),
        ("modle=15m", "unknown key 'modle': did you mean 'model'?"),
        ("lr=1", "did you mean 'optim.learning_rate'?"),
        ("batch_size=3", "did you mean 'data.batch_size'?"),
        ("model=15mm", "unknown model=15mm: did you mean '15m'?"),
        ("quant=b159", "did you mean 'b158'?"),
        ("trainer.max_steps=many", "Value 'many' of type 'str' could not be converted to Integer"),
        ("model.tie_word_embeddings=3.5", "could not be converted|not a valid bool"),
        ("+anything=1", "unknown key 'anything': nothing reads it"),
        ("+model.widht=1", "unknown key 'model.widht'"),
        ("model.hidden_size=130", "does not divide by model.num_attention_heads=4"),
        ("model.num_key_value_heads=3", "choose a divisor"),
        ("model.hidden_act=gelu", "must be one of silu, relu2"),
        ("model.dropout=1", r"must lie in \[0, 1\)"),
        ("quant.activation_bits=16", "must lie in 2..8"),
        ("trainer.precision=16-mixed", "must be one of auto"),
        ("trainer.max_steps=0", "must be greater than zero"),
        ("data.batch_size=-1", "must be greater than zero"),
        ("optim.learning_rate=0", "must be greater than zero"),
        ("schedule.switch_at=2", r"must lie in \[0, 1\]"),
        ("compile=maybe", "must be one of auto, true, false"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(override, message):
    with pytest.raises(UserError, match=message) as error:
        train(override)
    assert "\n" not in str(error.value)


def test_a_key_of_another_optimizer_is_named_as_such():
    with pytest.raises(UserError, match=r"optim.momentum belongs to optim=muon, not to optim=adamw"):
        train("optim=adamw", "optim.momentum=1")
    assert train("optim=muon", "optim.momentum=0.9").optim.momentum == 0.9


def test_a_config_survives_being_written(tmp_path):
    from bitnet_lit.training.resume import save_config

    config = train("model=15m", "optim=muon", "data.dir=x")
    save_config(config, tmp_path)
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"))["model"]["hidden_size"] == 256


CHOSEN_BY_DEFAULT = {"model.name", "callbacks.sample_prompts"}  # conf/train.yaml chooses a size, and has a sample told
NAMED = [(group, name) for group, name in OPTIONS if group in ("quant", "optim", "schedule") and name != "custom"]


@pytest.mark.parametrize(("group", "name"), NAMED)
def test_a_name_means_the_same_in_yaml_and_in_python(group, name):
    composed = getattr(compose("train", ["run_dir=x", f"{group}={name}"]), group)
    made = type(composed)(name=name)
    if group == "quant":
        assert composed.scheme == made.scheme
    different = {
        each.name for each in fields(made) if plain(getattr(composed, each.name)) != plain(getattr(made, each.name))
    }
    assert different <= {"settings"}  # a file names them; `scheme` has compared them


def test_groups_without_names_have_the_same_defaults_in_yaml_and_in_python():
    composed = compose("train", ["run_dir=x"])
    groups = ("model", "data", "trainer", "callbacks", "logger", "sweep", "distill", "export")
    parts = {group: getattr(composed, group) for group in groups}
    different = {
        f"{group}.{key.name}"
        for group, part in parts.items()
        for key in fields(part)
        if plain(getattr(part, key.name)) != plain(getattr(type(part)(), key.name))
    }
    assert different == CHOSEN_BY_DEFAULT


@pytest.mark.parametrize("command", sorted(set(SCHEMAS) - {"train"}))
def test_a_command_has_the_same_defaults_in_yaml_and_in_python(command):
    composed = compose(command, [])
    assert composed == type(composed)()


def plain(value):
    return list(value) if isinstance(value, tuple) else value


def test_the_bits_of_activations_are_those_of_the_scheme_unless_typed():
    assert QuantConfig(name="bitnet_v2").bits == 4 and QuantConfig(name="b158").bits == 8
    assert QuantConfig(name="bitnet_v2", activation_bits=8).scheme.activation_bits == 8
    assert compose("train", ["run_dir=x", "quant.name=bitnet_v2"]).quant.scheme.activation_bits == 4
    assert replace(QuantConfig(), name="bitnet_v2").scheme.activation_bits == 4
    assert replace(QuantConfig(name="bitnet_v2"), name="b158").scheme.activation_bits == 8
    assert replace(QuantConfig(activation_bits=6), name="bitnet_v2").scheme.activation_bits == 6
