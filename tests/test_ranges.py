"""Every number of the schema has a range, and no value of any kind comes through to where it would break something."""

import dataclasses
import math
import typing

import pytest

from bitnet_lit import config as schema
from bitnet_lit.cli import compose
from bitnet_lit.composed_config import SCHEMAS
from bitnet_lit.config import AdamWConfig, ModelConfig, MuonConfig, TrainConfig
from bitnet_lit.config.checks import Checked, Range
from bitnet_lit.config.slots import Custom
from bitnet_lit.errors import UserError
from bitnet_lit.training.plan import check_memory, world_size

CLASSES = [cls for cls in vars(schema).values() if isinstance(cls, type) and dataclasses.is_dataclass(cls)]
ABSURD = [math.nan, math.inf, -math.inf, -1, 0, 1e300, 2**63, 2**70, -(2**70), 1e-320, True]


def numeric_fields(cls):
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if {int, float} & {hint, *typing.get_args(hint)} and typing.get_origin(hint) is not tuple:
            yield field


FIELDS = [(cls, field) for cls in CLASSES for field in numeric_fields(cls)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_numeric_field_has_a_range_and_every_range_a_field(cls):
    names = {field.name for field in numeric_fields(cls)}
    assert names == set(getattr(cls, "RANGES", {}))
    assert not names or issubclass(cls, Checked)


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=lambda value: getattr(value, "name", value.__class__.__name__))
def test_a_number_is_taken_or_refused_in_one_line(cls, field):
    for value in ABSURD:
        try:
            target = {"_target_": "my.Class"} if issubclass(cls, Custom) else {}
            taken = getattr(cls(**target, **{field.name: value}), field.name)
        except UserError as error:
            assert "\n" not in str(error) and f"={value}" in str(error) and "must" in str(error)
        else:
            assert math.isfinite(taken) and abs(taken) <= 2**128 and taken is not True


@pytest.mark.parametrize("value", ["nan", "-inf", "0", "1e300", "9223372036854775808", "x", "{}"])
@pytest.mark.parametrize("key", ["optim.learning_rate", "model.initializer_range", "trainer.max_steps", "optim.betas"])
def test_the_same_through_the_command_line(key, value):
    try:
        compose("train", ["run_dir=unused", f"{key}={value}"])
    except UserError as error:
        assert "\n" not in str(error) and key in str(error)
    else:
        assert value == "9223372036854775808" and key in ("optim.learning_rate", "model.initializer_range")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=-1"], "seed=-1: must be 0 or more"),
        (["seed=99999999999"], "seed=99999999999: must be at most 4294967295"),
        (["optim.betas=[0.9,1.0]"], r"optim.betas\[1\]=1.0: must lie in \[0, 1\)"),
        (["optim.betas=[0.9]"], "must be two numbers"),
        (["optim.betas=[0.9,nan]"], r"must be a finite number"),
        (["optim.learning_rate=nan"], "optim.learning_rate=nan: must be greater than zero, and finite"),
        (["model.initializer_range=nan"], "must be greater than zero, and finite"),
        (["model.max_position_embeddings=1"], "leaves no room"),
    ],
)
def test_values_that_users_gave(overrides, message):
    with pytest.raises(UserError, match=message):
        compose("train", ["run_dir=unused", *overrides])


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("[0]", "on a CPU give a number"),
        ("[]", "give a number, a list of indices, or auto"),
        ("100000", "more processes"),
        ("0", "give a number"),
    ],
)
def test_devices_of_a_cpu(devices, message):
    config = compose("train", ["run_dir=unused", "trainer.accelerator=cpu", f"trainer.devices={devices}"])
    with pytest.raises(UserError, match=message):
        world_size(config.trainer)


def test_a_model_that_no_machine_holds_is_refused_before_it_is_made():
    config = TrainConfig(model=ModelConfig(hidden_size=2**24, vocab_size=2**20), optim=AdamWConfig())
    with pytest.raises(UserError, match="takes .* GiB at least; this machine has"):
        check_memory(config)
    check_memory(TrainConfig(model=ModelConfig(vocab_size=512), optim=MuonConfig()))


def test_a_range_says_what_is_wrong():
    assert Range(0, 1, open_left=True).check("a", 1) is None
    for value, words in ((0, r"a=0: must lie in \(0, 1\]"), ("x", "must be a number"), (True, "must be a number")):
        with pytest.raises(UserError, match=words):
            Range(0, 1, open_left=True).check("a", value)


def test_defaults_are_in_range():
    for command in sorted(set(SCHEMAS) - {"train"}):
        compose(command)
