"""A run that goes on with another number of ranks keeps the sequences of a step."""

import pytest

from bitnet_lit.config import CustomData, DataConfig, TrainConfig
from bitnet_lit.config.trainer import TrainerConfig
from bitnet_lit.errors import UserError
from bitnet_lit.training.elastic import ACCUMULATION, BATCH, keep_step
from bitnet_lit.training.plan import world_size


def resumed(devices, batch, accumulate, data=DataConfig):
    trainer = TrainerConfig(accelerator="cpu", devices=devices, accumulate_grad_batches=accumulate)
    options = {"batch_size": batch}
    return TrainConfig(
        data=CustomData("my.Data", **options) if data is CustomData else data(**options), trainer=trainer
    )


@pytest.mark.parametrize(
    ("sequences", "devices", "batch", "accumulate", "typed", "expected"),
    [
        (64, 1, 32, 1, (), (32, 2)),  # two ranks before
        (64, 4, 32, 1, (), (16, 1)),
        (64, 2, 32, 1, (), (32, 1)),
        (96, 4, 32, 3, (), (24, 1)),
        (96, 2, 32, 1, (), (24, 2)),  # 48 each: not more than 32 at once
        (64, 8, 16, 4, (), (8, 1)),
        (64, 1, 16, 1, (BATCH,), (16, 4)),
        (64, 2, 32, 4, (ACCUMULATION,), (8, 4)),
        (64, 4, 32, 1, (BATCH, ACCUMULATION), (32, 1)),  # the user wants larger steps
        (None, 4, 32, 1, (), (32, 1)),  # an old checkpoint
    ],
)
def test_batch_and_accumulation_follow(sequences, devices, batch, accumulate, typed, expected):
    config = resumed(devices, batch, accumulate)
    kept = keep_step(config, sequences, typed)
    assert (kept.data.batch_size, kept.trainer.accumulate_grad_batches) == expected
    assert (config.data.batch_size, config.trainer.accumulate_grad_batches) == (batch, accumulate)
    if sequences is not None and len(typed) < 2:
        assert kept.data.batch_size * kept.trainer.accumulate_grad_batches * world_size(kept.trainer) == sequences


def test_a_module_of_the_users_own_keeps_its_batch():
    kept = keep_step(resumed(1, 4, 1, CustomData), 16, ())
    assert (kept.data.batch_size, kept.trainer.accumulate_grad_batches) == (4, 4)


@pytest.mark.parametrize(
    ("sequences", "config", "typed", "message"),
    [
        (8, resumed(3, 4, 1), (), "its steps have 8 sequences, which 3 ranks cannot share: take a number of ranks"),
        (64, resumed(2, 24, 1), (BATCH,), "which 2 ranks cannot share with data.batch_size=24: "),
        (64, resumed(2, 8, 5), (ACCUMULATION,), "cannot share with trainer.accumulate_grad_batches=5: "),
        (8, resumed(4, 4, 1, CustomData), (), "which 4 ranks cannot share with data.batch_size=4: "),
    ],
)
def test_a_step_that_cannot_be_shared_is_one_line(sequences, config, typed, message):
    with pytest.raises(UserError, match=message) as refused:
        keep_step(config, sequences, typed)
    assert "\n" not in str(refused.value)
