"""Full precision first, then quantized: which layers compute how, what is validated, and how it is resumed."""

import csv
import json

import pytest
import torch
from torch import nn

from bitnet_lit.cli import compose
from bitnet_lit.config import EvaluateConfig, ExportConfig, InferConfig, QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.exports.write import export
from bitnet_lit.inference.evaluation import evaluate
from bitnet_lit.inference.print_texts import infer
from bitnet_lit.model import build_model
from bitnet_lit.quant import BitLinear
from bitnet_lit.training.checkpoint_file import read_checkpoint
from bitnet_lit.training.quantization_start import QuantizationStart
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN, tiny_config


def network(quant, **options):
    torch.manual_seed(0)
    sizes = tiny_config(initializer_range=0.2, num_hidden_layers=1)
    return build_model(sizes, QuantConfig(name=quant, kernel="reference", **options))


@pytest.fixture
def ids():
    return torch.arange(64).view(2, 32)


def test_a_network_is_its_dense_twin_first_and_quantized_then(ids):
    model, dense, quantized = network("b158"), network("none")(ids), network("b158")(ids)
    parameters = dict(model.named_parameters())
    start = QuantizationStart(model, QuantConfig(), 2)
    for step, expected, changes in ((0, dense, False), (1, dense, False), (2, quantized, True), (3, quantized, False)):
        assert start.begin(step) is changes
        assert torch.equal(model(ids), expected)
        start.quantize()
        assert torch.equal(model(ids), quantized)
        start.go_on()
        assert torch.equal(model(ids), expected)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


def test_lambda_rises_after_the_start(ids):
    model = network("b158")
    start = QuantizationStart(model, QuantConfig(lambda_warmup_steps=4), 3)
    found = []
    for step in range(9):
        start.begin(step)
        found.append((start.is_dense, None if start.strength is None else float(start.strength)))
    assert found == [*[(True, None)] * 3, *[(False, share) for share in (0, 0.25, 0.5, 0.75)], *[(False, None)] * 2]
    start.begin(4)
    assert all(layer.strength is start.strength for layer in model.modules() if isinstance(layer, BitLinear))


def test_compiled_layers_follow(ids, monkeypatch):
    """Each class is a variant of its own: a change of the class takes the other one, and compiles nothing again."""
    model, dense, quantized = network("b158"), network("none")(ids), network("b158")(ids)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # it is traced, and no compiler runs
    graphs = []

    def eager(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(dynamic=False, fullgraph=True, backend=eager)
    start, counts = QuantizationStart(model, QuantConfig(), 1), []
    for step, expected in ((0, dense), (1, quantized), (0, dense), (1, quantized)):
        start.begin(step)
        assert torch.allclose(model(ids), expected, atol=1e-4)  # other sums; the two differ by far more
        counts.append(len(graphs))
    assert counts == [1, 2, 2, 2] and not torch.allclose(dense, quantized, atol=0.1)


def test_a_custom_layer_is_dense_too():
    class Doubling(BitLinear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Doubling(8, 8, quant="b158"))
    start = QuantizationStart(model, QuantConfig(), 1)
    x = torch.randn(3, 8)
    start.begin(0)
    assert torch.equal(model(x), x @ model[0].weight.T)
    start.begin(1)
    assert type(model[0]) is Doubling


def options(folder, shards, *more):
    return [f"run_dir={folder}", f"data.dir={shards}", *TINY_RUN, *more]


def losses(folder, column):
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


def test_a_run_begins_as_its_dense_twin_and_stays_quantized(tmp_path, shards, capsys):
    run, dense = tmp_path / "run", tmp_path / "dense"
    train(compose("train", options(run, shards, "quant.start_at=0.55")))  # step 4.4 of 8
    printed = " ".join(capsys.readouterr().err.split())
    assert "from step 5 on; before that in full precision" in printed and "quantized network in every phase" in printed
    assert "step 5: the network is quantized from here on" in printed
    train(compose("train", options(dense, shards, "quant=none")))
    mine, its = losses(run, "train/loss"), losses(dense, "train/loss")
    assert [step for step in mine if mine[step] == its[step]] == [1, 2, 3, 4, 5]
    assert losses(run, "val/loss")[4] != losses(dense, "val/loss")[4]  # the same weights, quantized
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["quantized_since"] == 5
    longer = ["trainer.max_steps=24", "schedule.total_steps=24"]  # 0.55 of which is behind the step where it stands
    train(resume_config(str(run), [*longer, "trainer.max_steps=10"]))
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["quantized_since"] == 5
    printed = " ".join(capsys.readouterr().err.split())
    assert "quantized from here on" not in printed and "from step 5 on; before that in full precision" in printed
    assert '"quantization": "from step 5 on"' in (run / "model/config.json").read_text()
    with pytest.raises(UserError, match=r"quant.start_at was 0.55 when the run began, and is 0.9 now"):
        train(resume_config(str(run), [*longer, "quant.start_at=0.9"]))


def test_an_export_from_full_precision_is_quantized_and_says_so(tmp_path, shards, capsys):
    run = tmp_path / "run"
    short = ["quant.start_at=0.02", "trainer.max_steps=2", "trainer.val_check_interval=2", "schedule.total_steps=100"]
    train(compose("train", options(run, shards, *short)))
    assert "from step 2 on, which this run does not reach" in " ".join(capsys.readouterr().err.split())
    assert (
        "in full precision only" in json.loads((run / "model/config.json").read_text())["bitnet_lit"]["info"]["warning"]
    )
    export(ExportConfig(checkpoint=str(run), format="packed", out=str(tmp_path / "packed")))
    assert f"warning: {run / 'model'}: trained in full precision only" in capsys.readouterr().err
    infer(InferConfig(checkpoint=str(run), prompt="a", max_new_tokens=1))
    assert capsys.readouterr().err.count(f"note: {run / 'model'}: trained in full precision only") == 1
    with pytest.warns(UserWarning, match="trained in full precision only"):
        evaluate(EvaluateConfig(checkpoint=str(run), data_dir=str(shards)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quant.start_at=1"], r"quant.start_at=1.0: "),
        (["quant=none", "quant.start_at=0.5"], "quant.start_at=0.5 needs a scheme that rounds"),
        (["quant=bitnet_v2", "quant.start_at=0.5"], "quant.start_at=0.5: quant=bitnet_v2 transforms inputs"),
    ],
)
def test_mistakes_are_one_line(overrides, message):
    with pytest.raises(UserError, match=message):
        compose("train", ["run_dir=x", *overrides])
