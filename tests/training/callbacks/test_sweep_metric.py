"""A search of a figure that only a callback of the user's own logs."""

from types import SimpleNamespace

import pytest
import torch

from bitnet_lit.config import TrainConfig
from bitnet_lit.config.sweep import SweepConfig
from bitnet_lit.config.trainer import CallbacksConfig
from bitnet_lit.errors import UserError
from bitnet_lit.training.callbacks.sweep_metric import SweepMetric

OWN = {"mine": {"_target_": "my_project.Bleu"}}


@pytest.mark.parametrize(
    ("metric", "extra", "is_needed"),
    [("val/bleu", OWN, True), ("val/bleu", {}, False), ("val/loss", OWN, False), ("val/best_loss", OWN, False)],
)
def test_it_is_there_where_only_the_users_callbacks_can_log_the_metric(metric, extra, is_needed):
    config = TrainConfig(sweep=SweepConfig(metric=metric), callbacks=CallbacksConfig(extra=extra))
    assert [callback.metric for callback in SweepMetric.needed(config)] == [metric] * is_needed


def test_the_first_validation_ends_a_job_that_does_not_log_it():
    logged = {"val/loss": torch.tensor(1.0), "val/bleu": torch.tensor(2.0), "train/grad_norm": torch.tensor(3.0)}
    alone = SimpleNamespace(broadcast=lambda names: names)
    trainer = SimpleNamespace(callback_metrics=logged, strategy=alone, sanity_checking=False)
    once = SweepMetric("val/bleu")
    once.on_validation_end(trainer, None)
    once.on_validation_end(SimpleNamespace(callback_metrics={}, strategy=alone, sanity_checking=False), None)
    with pytest.raises(UserError, match="^sweep.metric=val/blue: not logged at the first validation.*val/bleu, val/lo"):
        SweepMetric("val/blue").on_validation_end(trainer, None)
    with pytest.raises(UserError, match="sweep.metric=train/grad_norm"):  # metrics.json does not have it
        SweepMetric("train/grad_norm").on_validation_end(trainer, None)


def test_every_rank_decides_by_what_the_first_one_has_logged():
    first = SimpleNamespace(broadcast=lambda names: ["val/bleu"])
    trainer = SimpleNamespace(callback_metrics={}, strategy=first, sanity_checking=False)
    SweepMetric("val/bleu").on_validation_end(trainer, None)
    with pytest.raises(UserError, match="give one of val/bleu"):
        SweepMetric("val/blue").on_validation_end(trainer, None)
