"""Runs with a teacher: what they compute, what they refuse, and that they go on as they began."""

import contextlib
import csv
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.pretrained import from_pretrained
from bitnet_lit.cli import compose
from bitnet_lit.config import DistillConfig, QuantConfig
from bitnet_lit.config.held import network_values
from bitnet_lit.errors import UserError
from bitnet_lit.model import batch_loss
from bitnet_lit.quant import convert_linears
from bitnet_lit.training import distillation
from bitnet_lit.training import run as training_run
from bitnet_lit.training.checkpoint_file import read_checkpoint
from bitnet_lit.training.distillation import Distillation, Teacher
from bitnet_lit.training.distillation_loss import logits_loss, relation_loss
from bitnet_lit.training.preview import check_run
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from bitnet_lit.training.sharing import whole
from bitnet_lit.training.strategies import shard_model
from tests.support import TINY_RUN, Killed, kill_at, tiny_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer):
    """A dense model with the sizes of nobody's student: three layers, wider, with fewer key/value heads."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_key_value_heads": 2, "vocab_size": tokenizer.vocab_size}
    save_model_folder(folder, tiny_model("none", seed=5, **sizes), QuantConfig(name="none"), tokenizer)
    return folder


def config_of(teacher, *overrides):
    return compose("train", [f"distill.teacher={teacher}", *TINY_RUN, *overrides])


def student_of(config, quant="b158", **sizes):
    teacher = Teacher(config.distill)
    config.model.vocab_size = teacher.stored.config.vocab_size
    sizes = {"num_attention_heads": 2, "vocab_size": config.model.vocab_size, **sizes}
    return tiny_model(quant, **sizes).train(), Distillation(config, teacher)


def a_batch(vocabulary):
    return torch.randint(0, vocabulary, (3, 17), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("quant", ["b158", "none"])
@pytest.mark.parametrize("skip", [["lm_head"], []])  # a dense head, whose logits come in chunks, and a rounded one
def test_the_loss_is_the_weighted_sum_of_its_definitions(teacher, quant, skip):
    config = config_of(teacher, "distill.temperature=2", "distill.logits_weight=0.5", "distill.attention_weight=3")
    student, distillation = student_of(config, quant)
    if not skip:
        convert_linears(student, QuantConfig(name=quant, skip=[]))
    ids, states = a_batch(config.model.vocab_size), {}
    loss = distillation(student, ids)
    gradients = torch.autograd.grad(loss, list(student.parameters()))

    def keep(network, number):
        for name in ("q_proj", "k_proj", "v_proj"):
            layer = getattr(network.model.layers[number].self_attn, name)
            layer.register_forward_hook(lambda _, __, x, key=(network is student, name): states.update({key: x}))

    keep(student, 1), keep(distillation.teacher, 2)
    logits = student(ids[:, :-1]).flatten(0, 1)
    with torch.no_grad():
        expected = distillation.teacher(ids[:, :-1]).flatten(0, 1)
    entropy = F.cross_entropy(logits, ids[:, 1:].flatten())
    divergence = logits_loss(logits, expected, 2.0).mean()
    names = ("q_proj", "k_proj", "v_proj")
    relations = sum(relation_loss(states[True, name], states[False, name], 2) for name in names)
    wanted = entropy + 0.5 * divergence + 3 * relations
    # Kernels and the reference may round an activation at a border to two neighbouring codes.
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=0)
    torch.testing.assert_close(distillation.parts, torch.stack([entropy, divergence, relations]), rtol=1e-3, atol=0)
    for got, reference in zip(gradients, torch.autograd.grad(wanted, list(student.parameters())), strict=True):
        assert F.cosine_similarity(got.flatten(), reference.flatten(), 0) > 0.999


def test_a_teacher_that_is_the_student_teaches_nothing(tmp_path, tokenizer):
    student = tiny_model("none", vocab_size=tokenizer.vocab_size)
    save_model_folder(tmp_path / "twin", student, QuantConfig(name="none"), tokenizer)
    config = config_of(tmp_path / "twin", "distill.attention_weight=1")
    config.model = student.config
    distillation = Distillation(config, Teacher(config.distill))
    ids = a_batch(tokenizer.vocab_size)
    loss = distillation(student, ids)
    torch.testing.assert_close(loss, batch_loss(student, ids), rtol=1e-5, atol=1e-5)
    assert distillation.parts[1:].abs().max() < 1e-5


def test_weights_that_fsdp_shards_are_whole_where_the_loss_is_computed(teacher):
    config = config_of(teacher, "distill.attention_weight=3")
    student, distillation = student_of(config)
    ids = a_batch(config.model.vocab_size)
    expected = distillation(student, ids)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard_model(student, torch.device("cpu"), 1)
        loss = distillation(student, ids)
        loss.backward()
        found = {name: whole(parameter.grad) for name, parameter in student.named_parameters()}
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(loss, expected)
    assert gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_a_teacher_in_bfloat16_computes_what_autocast_computes(teacher):
    distillation = student_of(config_of(teacher))[1]
    ids = a_batch(distillation.teacher.config.vocab_size)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = distillation.teacher(ids)
        distillation.to(torch.device("cpu"), "bf16-mixed")
        after = distillation.teacher(ids)
    stored = [parameter.dtype for name, parameter in distillation.teacher.named_parameters() if "proj" in name]
    assert set(stored) == {torch.bfloat16} and torch.equal(before, after)


def rows_of(run):
    with (run / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


def test_a_run_learns_from_its_teacher_and_keeps_it_to_itself(tmp_path, shards, teacher, monkeypatch):
    calls, original = [], Distillation.__call__
    monkeypatch.setattr(Distillation, "__call__", lambda *given: calls.append(1) or original(*given))
    run = tmp_path / "run"
    overrides = [f"run_dir={run}", f"data.dir={shards}", "distill.logits_weight=2", "distill.attention_weight=0.5"]
    train(config_of(teacher, *overrides))
    for row in rows_of(run):
        parts = [float(row[name]) for name in ("train/ce", "train/kd", "train/kd_attention")]
        assert float(row["train/loss"]) == pytest.approx(parts[0] + 2 * parts[1] + 0.5 * parts[2], rel=1e-5)
    assert float(rows_of(run)[-1]["train/kd"]) < float(rows_of(run)[0]["train/kd"])
    assert len(calls) == 8, "validation is without the teacher"
    student = from_pretrained(run)
    assert student.config.num_hidden_layers == 2
    saved = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert set(saved["state_dict"]) == {f"model.{name}" for name in student.model.state_dict()}
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["distill"]["teacher"] == str(teacher)


def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, shards, teacher, monkeypatch):
    more = [
        f"data.dir={shards}",
        "trainer.accumulate_grad_batches=2",
        "model.dropout=0.1",
        "distill.attention_weight=1",
        "callbacks.checkpoint_every_n_steps=2",
        "callbacks=quiet",
        "trainer.max_steps=4",
    ]
    train(config_of(teacher, f"run_dir={tmp_path / 'whole'}", *more))
    with monkeypatch.context() as patched:
        kill_at(patched, 3)
        with pytest.raises(Killed):
            train(config_of(teacher, f"run_dir={tmp_path / 'cut'}", *more))
    train(resume_config(str(tmp_path / "cut")))
    whole, cut = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "cut"))
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, cut["state_dict"][name]), name
    assert [row["train/kd"] for row in rows_of(tmp_path / "whole")] == [
        row["train/kd"] for row in rows_of(tmp_path / "cut")
    ]


def test_a_run_goes_on_with_its_own_teacher_only(tmp_path, shards, teacher, tokenizer, monkeypatch):
    own = tmp_path / "own"
    shutil.copytree(teacher, own)
    run = tmp_path / "run"
    train(config_of(own, f"run_dir={run}", f"data.dir={shards}", "callbacks=quiet"))
    moved = own.rename(tmp_path / "moved")
    longer = ["trainer.max_steps=9", "schedule.total_steps=9"]
    check_run(resume_config(str(run), [f"distill.teacher={moved}", *longer]))
    with pytest.raises(UserError, match=r"distill.teacher=.*own: no such file or folder"):
        check_run(resume_config(str(run), longer))
    with pytest.raises(UserError, match=r"distill.teacher's sha256 was .* when the run began, and is None now"):
        check_run(resume_config(str(run), ["distill.teacher=null", *longer]))
    other = tiny_model("none", seed=6, vocab_size=tokenizer.vocab_size)
    save_model_folder(own, other, QuantConfig(name="none"), tokenizer)
    told = []

    @contextlib.contextmanager
    def meeting(number, num_nodes, what):
        try:
            yield
        except UserError as error:
            told.append(str(error))
            raise

    monkeypatch.setattr(training_run, "all_or_none", meeting)
    with pytest.raises(UserError, match="distill.teacher's sha256 was"):
        train(resume_config(str(run), longer))
    assert len(told) == 1, "the other ranks, which did not read the teacher, must not wait for this one"


def test_a_key_of_a_later_version_does_not_make_another_teacher(teacher, monkeypatch):
    config = config_of(teacher, "run_dir=x").distill
    before = Teacher(config).sha256
    monkeypatch.setattr(distillation, "network_values", lambda model: {**network_values(model), "later": 1.0})
    assert Teacher(config).sha256 == before
    monkeypatch.setattr(distillation, "network_values", lambda model: {**network_values(model), "later": id(model)})
    assert Teacher(config).sha256 != before


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (
            ["model.vocab_size=600"],
            "distill.teacher=.*: has 512 tokens, and the student 600: take model.vocab_size=512",
        ),
        (["model.max_position_embeddings=128"], "its context is 64 tokens, and a sequence has 128"),
        (["distill.attention_weight=1", "distill.attention_layer=2"], "the student has 2 layers: .* from -2 to 1"),
        (["distill.attention_weight=1", "distill.attention_heads=3"], "must divide the teacher's queries .* out for 2"),
        (["distill.logits_weight=0"], "nothing is learned from it"),
        (["distill.temperature=0"], "distill.temperature=0"),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_line(tmp_path, shards, teacher, overrides, what):
    with pytest.raises(UserError, match=what) as caught:
        check_run(config_of(teacher, f"run_dir={tmp_path / 'run'}", f"data.dir={shards}", *overrides))
    assert "\n" not in str(caught.value)


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path, shards, tokenizer):
    class Other:
        sha256 = "0" * 64

    model = tiny_model("none", vocab_size=tokenizer.vocab_size)
    save_model_folder(tmp_path / "model", model, QuantConfig(name="none"), tokenizer)
    config = config_of(tmp_path / "model")
    config.model.vocab_size = tokenizer.vocab_size
    Teacher(config.distill).check(config, tokenizer, 32)
    with pytest.raises(UserError, match="was trained with another tokenizer than that of the data"):
        Teacher(config.distill).check(config, Other(), 32)


def test_keys_without_a_teacher_are_refused():
    with pytest.raises(
        UserError, match=r"^distill.teacher must be given with distill.temperature=2.0: add distill.teacher="
    ):
        DistillConfig(temperature=2.0)
