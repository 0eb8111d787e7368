"""What the lengths of a config come to, in optimizer steps and tokens, and what the plan says of them."""

import re
from datetime import timedelta

import pytest
import torch

from bitnet_lit.config import (
    DataConfig,
    ModelConfig,
    MuonConfig,
    QuantConfig,
    ScheduleConfig,
    TrainConfig,
    TrainerConfig,
)
from bitnet_lit.errors import UserError
from bitnet_lit.model import build_model
from bitnet_lit.model.accounting import account
from bitnet_lit.training import plan as plan_module
from bitnet_lit.training.plan import (
    check_memory,
    make_plan,
    memory_estimate_bytes,
    time_limit,
    world_size,
)
from bitnet_lit.training.plan_table import print_plan

SEQUENCE_LENGTH, TRAIN_SEQUENCES = 64, 1000


def config(trainer=None, schedule=None, batch_size=8, **sizes):
    return TrainConfig(
        model=ModelConfig(**{"vocab_size": 512, **sizes}),
        data=DataConfig(batch_size=batch_size),
        optim=MuonConfig(),
        schedule=ScheduleConfig(**(schedule or {})),
        trainer=TrainerConfig(accelerator="cpu", **(trainer or {})),
    )


def plan(**options):
    return make_plan(config(**options), SEQUENCE_LENGTH, TRAIN_SEQUENCES)


def test_a_step_counts_every_device_node_and_accumulated_batch(monkeypatch):
    assert plan().tokens_per_step == 8 * 64
    assert plan(trainer={"devices": 2, "accumulate_grad_batches": 3}).tokens_per_step == 2 * 3 * 8 * 64
    monkeypatch.setenv("MASTER_ADDR", "first-node")
    assert plan(trainer={"devices": 2, "num_nodes": 4}).tokens_per_step == 2 * 4 * 8 * 64


def test_one_node_asks_no_environment_for_others(monkeypatch):
    """Asking for MPI's starts it, where mpi4py is installed."""
    monkeypatch.setattr(plan_module.MPIEnvironment, "detect", lambda: pytest.fail("it was asked"))
    assert world_size(TrainerConfig(accelerator="cpu", devices=2)) == 2


def test_gradients_and_moments_count_wherever_the_cpu_trains(monkeypatch):
    """accelerator=auto on a machine without a GPU trains on the CPU too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    tiny = config()
    parameters = sum(parameter.numel() for parameter in build_model(tiny.model, tiny.quant).parameters())
    monkeypatch.setattr(plan_module, "_machine_memory_bytes", lambda: 5.0 * parameters)  # the weights take 4
    for accelerator in ("cpu", "auto"):
        tiny.trainer.accelerator = accelerator
        with pytest.raises(UserError, match="training it takes"):
            check_memory(tiny)
    tiny.trainer.accelerator = "gpu"
    check_memory(tiny)
    with pytest.raises(UserError, match=f"holding it beside a teacher with {parameters:,} takes"):
        check_memory(tiny, account(tiny.model, tiny.quant))


def test_tokens_take_the_place_of_steps_and_the_last_step_is_a_whole_one():
    assert plan(trainer={"max_steps": 7}).steps == 7
    assert plan(trainer={"max_steps": 7, "max_tokens": 512 * 20}).steps == 20
    assert plan(trainer={"max_tokens": 512 * 20 + 1}).steps == 21


def test_tokens_and_epochs_of_the_run():
    found = plan(trainer={"max_steps": 250})
    assert found.tokens == 250 * 512
    assert found.epochs == 250 * 8 / TRAIN_SEQUENCES


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({}, 400 // 20),
        ({"warmup_steps": 0}, 0),
        ({"warmup_steps": 31}, 31),
        ({"warmup_tokens": 512 * 9 + 1, "warmup_steps": 31}, 10),
        ({"total_steps": 1000}, 1000 // 20),
    ],
)
def test_warm_up(schedule, steps):
    found = plan(trainer={"max_steps": 400}, schedule=schedule)
    assert (found.warmup_steps, found.schedule_steps) == (steps, schedule.get("total_steps", 400))


def test_a_warm_up_longer_than_the_run_is_refused():
    assert plan(trainer={"max_steps": 10}, schedule={"warmup_steps": 10}).warmup_steps == 10
    with pytest.raises(UserError, match=r"schedule\.warmup_steps=11 is longer than the run \(10 steps\): shorten it"):
        plan(trainer={"max_steps": 10}, schedule={"warmup_steps": 11})


@pytest.mark.parametrize(("steps", "validations"), [(400, 20), (350, 18), (39, 2), (20, 1), (19, 1), (1, 1)])
def test_a_run_is_validated_twenty_times_unless_it_is_shorter(steps, validations):
    assert plan(trainer={"max_steps": steps, "limit_val_batches": 1}).validation_steps == validations


def test_time_limit():
    assert time_limit(None) is None
    assert time_limit("01:02:03:04") == timedelta(days=1, hours=2, minutes=3, seconds=4)


def test_the_memory_estimate_holds_weights_gradients_and_moments():
    """Measured with one batch of no tokens to speak of: what is left is 4 bytes a value."""
    small = config(batch_size=1, max_position_embeddings=2, hidden_size=256, intermediate_size=512)
    parameters = sum(p.numel() for p in build_model(small.model, QuantConfig(), device="meta").parameters())
    estimate = memory_estimate_bytes(small, make_plan(small, 1, 10))
    assert 3 * 4 * parameters < estimate < 3.5 * 4 * parameters  # weights, gradients, and 1.3 moments of Muon and AdamW


def test_gradient_checkpointing_and_smaller_batches_need_less():
    def estimate(**options):
        chosen = config(**options)
        return memory_estimate_bytes(chosen, make_plan(chosen, SEQUENCE_LENGTH, TRAIN_SEQUENCES))

    assert estimate(batch_size=64, gradient_checkpointing=True) < estimate(batch_size=64)
    assert estimate(batch_size=8) < estimate(batch_size=64)


def test_the_table_says_the_lengths_and_prints_what_it_is_given_as_it_stands(capsys):
    chosen = config(trainer={"max_steps": 250})
    print_plan(chosen, make_plan(chosen, SEQUENCE_LENGTH, TRAIN_SEQUENCES, (10, 10)), {"data": "data/[/b]{x}"})
    printed = " ".join(re.sub(r"\s+", " ", capsys.readouterr().err).split())
    assert "data data/[/b]{x}" in printed
    for part in ("250 of 512 tokens", "(8 x 64 x 1 batches)", "128,000 in all, 2.00 epochs", "every 13 steps"):
        assert part in printed


@pytest.mark.parametrize(
    ("sequences", "said", "warned"),
    [
        (None, "every 12 steps compute", False),
        ((10, 10), "every 12 steps, on 640 tokens compute", False),
        ((10, 10**6), "every 12 steps, on 640 tokens, at the end on 64,000,000 compute", False),
        ((12 * 8 * 30,) * 2, "every 12 steps, on 184,320 tokens, about 10 times the work of the steps", True),
    ],
    ids=str,
)
def test_validations_that_outweigh_the_training_are_told(capsys, sequences, said, warned):
    """A validation after every 12 steps of 8 sequences: 30 times the tokens, at a third of the work of a token."""
    chosen = config(trainer={"max_steps": 250, "val_check_interval": 12})
    print_plan(chosen, make_plan(chosen, SEQUENCE_LENGTH, TRAIN_SEQUENCES, sequences), {})
    printed = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert said in printed
    assert ("about 10 times the work of the steps between: trainer.limit_val_batches=" in printed) is warned


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        (1, "every step, on 640 tokens, at the end on 6,400"),
        (249, "every 249 steps, on 640 tokens, at the end on 6,400"),
        (250, "at the end, on 6,400 tokens"),
        (300, "at the end, on 6,400 tokens"),
    ],
)
def test_the_table_says_when_the_run_validates(capsys, interval, said):
    chosen = config(trainer={"max_steps": 250, "val_check_interval": interval})
    print_plan(chosen, make_plan(chosen, SEQUENCE_LENGTH, TRAIN_SEQUENCES, (10, 100)), {})
    assert f"validation {said} compute" in re.sub(r"\s+", " ", capsys.readouterr().err)


@pytest.mark.parametrize("limit", [16, 0.5, None], ids=str)
@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("steps", [1, 40, 60, 350, 2000])
@pytest.mark.parametrize("sequences", [(3, 3), (128, 9000), (9000, 9000)], ids=str)
def test_validations_of_a_run_that_names_no_interval_take_a_third_of_the_training_at_most(
    capsys, steps, accumulated, limit, sequences
):
    """The work of a validation is that of its forward passes, a third of what its tokens cost in training."""
    trainer = {"max_steps": steps, "accumulate_grad_batches": accumulated, "limit_val_batches": limit}
    chosen = config(trainer=trainer)
    made = make_plan(chosen, SEQUENCE_LENGTH, TRAIN_SEQUENCES, sequences)
    count = made.validations_before_last(0)
    assert count <= 20 and count * sequences[0] / 3 <= steps * made.samples_per_step / 3
    assert count >= min(19, steps - 1, steps * made.samples_per_step // sequences[0] - 1)  # and no fewer than that
    print_plan(chosen, made, {})
    assert "times the work" not in capsys.readouterr().err


def test_without_a_known_split_a_validation_is_taken_to_have_as_many_batches_as_it_may():
    """As with a data module of the user's own."""
    assert plan(trainer={"max_steps": 50}).validation_steps == 17  # the third is the last step
    assert plan(trainer={"max_steps": 50, "accumulate_grad_batches": 4}).validation_steps == 5
    assert plan(trainer={"max_steps": 50, "limit_val_batches": None}).validation_steps == 3


def test_the_work_that_is_left_counts_validations():
    """Ten steps of 8 sequences, validations after every third one on 6 sequences, and at the end on 60."""
    chosen = config(trainer={"max_steps": 10, "val_check_interval": 3})
    made = make_plan(chosen, SEQUENCE_LENGTH, TRAIN_SEQUENCES, (6, 60))
    for done, steps, validated in ((0, 10, 3 * 6 + 60), (3, 7, 2 * 6 + 60), (8, 2, 6 + 60), (9, 1, 60), (10, 0, 60)):
        passes = 3 * 8 * steps + validated  # forward passes of a sequence; a step costs three
        expected = passes * SEQUENCE_LENGTH * made.accounting.forward_flops_per_token
        assert made.flops_after(done) == pytest.approx(expected, rel=1e-12), done


def test_the_phases_of_quantization_are_told(capsys):
    """250 steps: full precision for 100, then lambda rises for 20."""
    chosen = config(trainer={"max_steps": 250})
    chosen.quant = QuantConfig(start_at=0.4, lambda_warmup_steps=20, lambda_warmup_shape="cosine")
    print_plan(chosen, make_plan(chosen, SEQUENCE_LENGTH, TRAIN_SEQUENCES), {})
    printed = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "quantized from step 100 on; before that in full precision" in printed
    assert "lambda rises from 0 to 1 (cosine) over 20 steps: fully quantized from step 120 on" in printed


@pytest.mark.parametrize(("skip", "said"), [(["q_proj"], True), (["q_proj", "lm_head"], False)], ids=str)
def test_a_head_that_is_rounded_is_told(capsys, skip, said):
    chosen = config()
    chosen.quant = QuantConfig(skip=skip)
    print_plan(chosen, make_plan(chosen, SEQUENCE_LENGTH, TRAIN_SEQUENCES), {})
    assert ("rounded too: add it to quant.skip=['q_proj']" in re.sub(r"\s+", " ", capsys.readouterr().err)) is said
