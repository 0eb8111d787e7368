"""Curves at the points that define them, and the weight decay's switch."""

import pytest
import torch

from bitnet_lit.config import ScheduleConfig
from bitnet_lit.errors import UserError
from bitnet_lit.training.schedule import build_schedule, learning_rate_factor, weight_decay_factor


def factors(name, warmup=10, total=110, **options):
    schedule = ScheduleConfig(name=name, **options)
    return [learning_rate_factor(step, schedule, warmup, total) for step in range(total + 1)]


@pytest.mark.parametrize("name", ["cosine", "two_stage", "wsd"])
def test_warm_up_is_linear_and_the_end_is_zero(name):
    curve = factors(name)
    assert curve[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert curve[-1] == pytest.approx(0) and max(curve) <= 1 and min(curve) >= 0


def test_cosine_is_half_way_in_the_middle_and_ends_at_final_factor():
    assert factors("cosine")[60] == pytest.approx(0.5)
    assert factors("cosine", final_factor=0.1)[-1] == pytest.approx(0.1)


def test_two_stage_drops_at_the_switch_and_goes_on_falling():
    curve = factors("two_stage", warmup=0, total=100)
    assert curve[49] == pytest.approx(0.51)
    assert curve[50] == pytest.approx(0.6667 * 0.5)
    assert curve[75] == pytest.approx(0.6667 * 0.25)


def test_wsd_stays_and_then_falls_linearly():
    curve = factors("wsd", warmup=0, total=100, decay_share=0.2)
    assert curve[5:81] == [1.0] * 76
    assert curve[90] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cosine", [1, 0.75, 0.5, 0.25, 0, 0]), ("wsd", [1, 0.75, 0.5, 0.25, 0, 0]), ("two_stage", [1, 0.75, 0, 0, 0, 0])],
)
def test_weight_decay_falls_to_zero_at_the_end_of_the_curve(name, expected):
    schedule = ScheduleConfig(name=name, weight_decay="to_zero")
    assert [weight_decay_factor(step, schedule, 100) for step in (0, 25, 50, 75, 100, 120)] == expected


def test_weight_decay_that_falls_is_known():
    with pytest.raises(UserError, match=r"schedule.weight_decay=linear: must be one of constant, to_zero"):
        ScheduleConfig(weight_decay="linear")


def test_rates_and_decay_reach_the_groups_and_resume():
    def build():
        parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        optimizer = torch.optim.AdamW(
            [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}], lr=2.0
        )
        return optimizer, build_schedule(optimizer, ScheduleConfig(name="two_stage"), 0, 100)

    def advance(optimizer, schedule, steps):
        history = []
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            history.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
        return history

    optimizer, schedule = build()
    whole = advance(optimizer, schedule, 80)
    assert whole[48][0] == (pytest.approx(2 * 0.51), 0.1) and whole[49][0] == (pytest.approx(2 * 0.33335), 0.0)
    assert all(step[1][1] == 0.0 for step in whole)
    first, second = build(), build()
    advance(*first, 60)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    assert advance(*second, 20) == whole[60:]
