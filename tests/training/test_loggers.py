"""The loggers that conf/logger/ names, and the hyperparameters that TensorBoard gets."""

import sys
import types

import pytest

from bitnet_lit.cli import compose
from bitnet_lit.errors import UserError
from bitnet_lit.instantiate import locate
from bitnet_lit.training.loggers import CsvLogger, build_loggers, log_hyperparams
from bitnet_lit.training.trackio_logger import TrackioLogger


@pytest.fixture
def trackio(monkeypatch):
    """A stand-in for the package, which notes what it is asked to do."""
    asked = []

    class Run:
        def log(self, metrics, step):
            asked.append(("log", metrics, step))

        def finish(self):
            asked.append(("finish",))

    module = types.ModuleType("trackio")
    module.init = lambda project, **options: (asked.append(("init", project, options)), Run())[1]
    monkeypatch.setitem(sys.modules, "trackio", module)
    return asked


def test_trackio_gets_the_config_and_the_metrics(trackio):
    logger = TrackioLogger(name="runs/a", space_id="me/space")
    logger.log_hyperparams({"quant": {"name": "b158"}, "seed": 1})
    assert not trackio  # the run begins with the first row
    logger.log_metrics({"val/loss": 2.0}, step=3)
    logger.log_metrics({"val/loss": 1.0}, step=7)
    logger.finalize("success")
    options = {"config": {"quant.name": "b158", "seed": 1}, "resume": "allow", "embed": False, "space_id": "me/space"}
    assert trackio == [
        ("init", "bitnet-lit", {"name": "runs/a", **options}),
        ("log", {"val/loss": 2.0}, 3),
        ("log", {"val/loss": 1.0}, 7),
        ("finish",),
    ]


def test_trackio_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"^logger=trackio: needs the package trackio: pip install trackio$"):
        TrackioLogger()


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_each_tracker_is_a_class_and_knows_the_run(name):
    (values,) = compose("train", [f"logger={name}", "run_dir=outputs/mine"]).logger.extra.values()
    assert locate(values["_target_"], "logger.extra") is not None
    assert "outputs/mine" in (values.get("name"), values.get("run_name"))


def test_tensorboard_gets_the_config(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    config = compose("train", ["logger=tensorboard", "optim.learning_rate=0.125", f"run_dir={tmp_path}"])
    for resume_step in (0, 5):  # a resumed run has written it already
        loggers = build_loggers(config, tmp_path, CsvLogger(tmp_path), resume_step)
        if not resume_step:
            log_hyperparams(loggers, config)
        tensorboard = loggers[-1]
        tensorboard.log_metrics({"val/loss": 2.0}, step=resume_step)
        tensorboard.finalize("success")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["optim.learning_rate"].number_value == 0.125 and values["quant.name"].string_value == "b158"
    assert events.Tags()["scalars"] == ["val/loss"]
    assert [each.value for each in events.Scalars("val/loss")] == [2.0, 2.0]  # no value that nobody measured
