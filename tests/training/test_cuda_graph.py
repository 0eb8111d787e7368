"""A replayed step is the same step: losses of runs with and without the graph. And when steps are recorded."""

import contextlib
import csv
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from bitnet_lit.cli import compose
from bitnet_lit.config import ModelConfig, TrainConfig
from bitnet_lit.config.trainer import TrainerConfig
from bitnet_lit.errors import UserError
from bitnet_lit.model import batch_loss
from bitnet_lit.training import cuda_graph, module, run
from bitnet_lit.training.callbacks import build_callbacks
from bitnet_lit.training.cuda_graph import GraphedStep, _aliases, _together, records_graph
from bitnet_lit.training.plan import make_plan
from bitnet_lit.training.run import train
from tests.support import TINY_RUN, start_command, tiny_model

LARGE = ModelConfig(hidden_size=8192, num_attention_heads=64, num_hidden_layers=64, vocab_size=512)


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ({}, "cuda", True),
        ({"cuda_graph": "false"}, "cuda", False),
        ({}, "cpu", False),
        ({"model": ModelConfig(gradient_checkpointing=True, vocab_size=512), "cuda_graph": "true"}, "cuda", False),
        ({"trainer": TrainerConfig(detect_anomaly=True)}, "cuda", False),
        ({"trainer": TrainerConfig(strategy="fsdp"), "cuda_graph": "true"}, "cuda", False),
        ({"model": LARGE}, "cuda", False),
        ({"model": LARGE, "cuda_graph": "true"}, "cuda", True),
    ],
)
def test_steps_are_recorded_where_nothing_forbids_it_and_memory_is_plenty(monkeypatch, options, device, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    config = TrainConfig(**{"model": ModelConfig(vocab_size=512), **options})
    assert records_graph(config, make_plan(config, 64, 1000), torch.device(device)) is expected


def test_gradients_lie_together_each_where_kernels_can_read_it_fast():
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (64,), (1,))]
    memory, gradients = _together(parameters)
    for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        assert gradient.shape == parameter.shape and gradient.storage_offset() % 64 == 0
        gradient.fill_(number + 1.0)
    assert memory.sum() == 1 * 15 + 2 * 64 + 3 * 1


@pytest.mark.parametrize("given", [True, False])
def test_aliases_get_the_gradients_and_the_network_keeps_its_parameters(given):
    model = tiny_model()
    before = dict(model.named_parameters())
    parameters = list(before.values())
    gradients = [torch.zeros_like(parameter) if given else None for parameter in parameters]
    ids = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    with _aliases(model, parameters, gradients) as aliases:
        assert model.lm_head.weight is model.model.embed_tokens.weight  # tied, as before
        batch_loss(model, ids).backward()
    assert all(after is before[name] and after.grad is None for name, after in model.named_parameters())
    batch_loss(model, ids).backward()
    assert all(torch.equal(alias.grad, parameter.grad) for parameter, alias in zip(parameters, aliases, strict=True))
    assert not given or all(alias.grad is gradient for alias, gradient in zip(aliases, gradients, strict=True))


class Emulated:
    """A graph without a GPU: it fills what the step holds of the recorded pass, its loss and gradients, in place."""

    def replay(self):
        step = self.step()
        parameters = [parameter for parameter, _ in step._gradients]
        with torch.enable_grad():
            loss = step._loss_of(step._batch)
            computed = torch.autograd.grad(loss / step._num_batches, parameters)
        step._loss.copy_(loss.detach())
        for (_, gradient), value in zip(step._gradients, computed, strict=True):
            gradient.copy_(value) if step._memory is None else gradient.add_(value)


@pytest.fixture
def graphs(monkeypatch):
    """Let runs on a CPU record their steps, and return what was recorded: the graphs, as weak references, and where."""
    recorded = []

    @contextlib.contextmanager
    def recording(graph, *, stream, capture_error_mode):
        recorded.append((weakref.ref(graph), stream))
        yield

    def record(self, batch, original=GraphedStep._record):
        graph = original(self, batch)
        graph.step = weakref.ref(self)
        return graph

    monkeypatch.setattr(module, "records_graph", lambda *run: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Emulated)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: (device, object()))
    monkeypatch.setattr(GraphedStep, "_record", record)
    return recorded


@pytest.mark.parametrize("options", [[], ["trainer.accumulate_grad_batches=3"], ["quant.start_at=0.5"]], ids=" ".join)
def test_a_run_goes_on_from_what_a_replay_leaves(tmp_path, shards, monkeypatch, graphs, options):
    options = [*options, "trainer.accelerator=cpu", "callbacks=quiet"]
    replayed = losses(tmp_path / "replayed", shards, *options)
    assert len(graphs) == 1 + ("quant.start_at=0.5" in options)
    monkeypatch.setattr(module, "records_graph", lambda *run: False)
    # The same sums, but that a replay here has the gradients of all parameters at once.
    assert replayed == pytest.approx(losses(tmp_path / "plain", shards, *options), rel=1e-5)


def test_each_run_of_a_process_records_on_a_stream_of_its_own_and_leaves_no_graph(tmp_path, shards, graphs):
    gc.disable()  # Lightning's trainer is in a cycle
    try:
        for name in ("first", "second"):
            losses(tmp_path / name, shards, "trainer.accelerator=cpu", "callbacks=quiet", "quant.start_at=0.5")
        assert [graph() for graph, _ in graphs] == [None] * 4
    finally:
        gc.enable()
    streams = [stream for _, stream in graphs]
    assert streams[0] is streams[1] and streams[2] is streams[3] and streams[0] is not streams[2]
    assert all(device == torch.device("cpu") for device, _ in streams)  # that of the run, not the current one


class Watching(Callback):
    """Counts the calls of a hook, and the steps of a run."""

    def __init__(self, kind):
        self.kind, self.calls, self.steps = kind, 0, 0

    def on_train_start(self, trainer, pl_module):
        layer = pl_module.model.model.layers[0].mlp.down_proj
        watched = layer if self.kind == "register_forward_hook" else layer.weight
        getattr(watched, self.kind)(self.count)

    def count(self, *given):
        self.calls += torch.is_grad_enabled() or self.kind != "register_forward_hook"

    def on_train_batch_end(self, *given):
        self.steps += 1


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_is_called_in_every_step(tmp_path, shards, monkeypatch, graphs, capsys, kind):
    watching = Watching(kind)
    monkeypatch.setattr(run, "build_callbacks", lambda *given: [*build_callbacks(*given), watching])
    losses(tmp_path / "run", shards, "trainer.accelerator=cpu", "callbacks=quiet")
    assert watching.calls == watching.steps == 12 and not graphs
    assert "note: no CUDA graph, so steps are slower: a hook watches the network" in capsys.readouterr().err


def test_a_graph_that_was_asked_for_and_cannot_be_is_one_line(tmp_path, shards, monkeypatch, graphs):
    def fails(*given):
        raise RuntimeError("no such pass")

    monkeypatch.setattr(GraphedStep, "_record", fails)
    monkeypatch.setattr(cuda_graph, "_reset_generator", lambda device: None)
    message = "^cuda_graph=true: the pass cannot be recorded: no such pass: cuda_graph=auto goes on without"
    with pytest.raises(UserError, match=message):
        losses(tmp_path / "run", shards, "trainer.accelerator=cpu", "callbacks=quiet", "cuda_graph=true")


def losses(folder, shards, *options):
    overrides = [*TINY_RUN, "trainer.accelerator=gpu", "trainer.max_steps=12", "trainer.val_check_interval=6"]
    train(compose("train", [f"run_dir={folder}", f"data.dir={shards}", *overrides, "compile=false", *options]))
    return logged_losses(folder)


def logged_losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [float(row["train/loss"] or row["val/loss"]) for row in csv.DictReader(file)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["model.dropout=0.1"],
        ["trainer.accumulate_grad_batches=3"],
        ["quant=none", "trainer.precision=32-true"],
        ["quant.lambda_warmup_steps=5"],
        ["quant.start_at=0.5", "trainer.max_steps=16"],
        ["model.hidden_size=64", "model.num_attention_heads=2"],  # wide enough for kernels
    ],
    ids=" ".join,
)
def test_a_replayed_step_is_the_same_step(tmp_path, shards, options):
    plain = losses(tmp_path / "plain", shards, *options, "cuda_graph=false")
    replayed = losses(tmp_path / "replayed", shards, *options, "cuda_graph=true")
    # The embedding's gradient is summed by atomic operations, in another order at each step. Batches differ by 0.5 %.
    assert replayed == pytest.approx(plain, rel=1e-3)


@pytest.mark.gpu
def test_a_compiled_step_is_recorded_too(tmp_path, shards):
    wide = ["model.hidden_size=64", "compile=true"]
    plain = losses(tmp_path / "plain", shards, *wide, "cuda_graph=false")
    assert losses(tmp_path / "replayed", shards, *wide, "cuda_graph=true") == pytest.approx(plain, rel=1e-3)


TWO = ["trainer.accelerator=gpu", "trainer.devices=2", "compile=false"]


@pytest.mark.gpu(count=2)
def test_ranks_that_replay_average_their_gradients(tmp_path, shards):
    common = [f"data.dir={shards}", *TINY_RUN, "trainer=ddp", *TWO, "model.dropout=0.1"]
    for name in ("false", "true"):  # through the command, which Lightning starts again for the second rank
        start_command("train", *common, f"cuda_graph={name}", f"hydra.run.dir={name}", cwd=tmp_path)
    plain, replayed = (logged_losses(tmp_path / name) for name in ("false", "true"))
    assert len(plain) > 8 and replayed == pytest.approx(plain, rel=1e-3)


@pytest.mark.gpu
def test_a_pass_that_reads_the_device_is_not_recorded_and_the_run_goes_on(tmp_path, shards, monkeypatch, capsys):
    original = module.batch_loss

    def reading(model, batch):
        loss = original(model, batch)
        assert loss.item() > 0
        return loss

    plain = losses(tmp_path / "plain", shards, "model.dropout=0.1", "cuda_graph=false")
    monkeypatch.setattr(module, "batch_loss", reading)
    assert losses(tmp_path / "run", shards, "model.dropout=0.1") == pytest.approx(plain, rel=1e-3)
    assert capsys.readouterr().err.count("note: no CUDA graph, so steps are slower") == 1
