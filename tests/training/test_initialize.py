"""Runs that start from trained weights: dense to 1.58 bit, the optimizer's state, added sub-norms."""

import json

import pytest
import torch
import yaml

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.pretrained import from_pretrained
from bitnet_lit.cli import compose
from bitnet_lit.config import MuonConfig, QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.training.checkpoint_file import write_checkpoint
from bitnet_lit.training.initialize import calibrate_sub_norms, check_typed_network, optimizer_state, sizes_are_given
from bitnet_lit.training.optimizers import build_optimizer, restore_optimizer
from bitnet_lit.training.quantization_start import warmup_strength
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN, run_command, tiny_model

SMALL = [
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=128",
    "model.max_position_embeddings=64",
    "data.batch_size=8",
    "trainer.accelerator=cpu",
    "callbacks=quiet",
    "trainer.val_check_interval=1000",
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory, shards):
    """A dense run, long enough to have something to lose."""
    run = tmp_path_factory.mktemp("dense") / "run"
    overrides = [f"run_dir={run}", f"data.dir={shards}", *SMALL, "quant=none", "trainer.max_steps=200"]
    return run, train(compose("train", overrides))["val/loss"]


def converted(dense, shards, run, *overrides):
    return train(
        compose(
            "train",
            [
                f"run_dir={run}",
                "experiment=convert_dense",
                f"init_from={dense}",
                f"data.dir={shards}",
                *SMALL[5:],
                "trainer.max_steps=60",
                "optim.learning_rate=5e-3",
                "optim.adamw_learning_rate=1e-3",
                *overrides,
            ],
        )
    )["val/loss"]


@pytest.mark.slow
def test_a_warm_up_ends_below_the_abrupt_switch(tmp_path, dense, shards):
    """Equal steps, data and rates; only lambda's way from 0 to 1 differs."""
    run, dense_loss = dense
    abrupt = converted(run, shards, tmp_path / "abrupt", "quant.lambda_warmup_steps=0")
    linear = converted(run, shards, tmp_path / "linear", "quant.lambda_warmup_steps=40")
    assert dense_loss < linear < abrupt
    config = json.loads((tmp_path / "linear" / "model" / "config.json").read_text())
    assert config["quantization_config"]["quantization_mode"] == "online"


def test_the_optimizers_state_comes_along_where_it_fits(dense):
    run, _ = dense
    state = optimizer_state(str(run))
    from_model_folder = optimizer_state(str(run / "model"))
    assert state is not None and from_model_folder is not None and state.keys() == from_model_folder.keys()
    trained = from_pretrained(run)
    fresh = build_optimizer(trained.model, MuonConfig(learning_rate=0.5))
    restore_optimizer(fresh, state)
    muon, adamw = fresh.parts
    assert muon.param_groups[0]["lr"] == 0.5, "rates are the new run's"
    momentum = next(iter(muon.state.values()))["momentum_buffer"]
    assert momentum.abs().sum() > 0
    assert all(entry["step"] == 200 for entry in adamw.state.values())
    with pytest.raises(UserError, match="other parameters"):
        restore_optimizer(build_optimizer(tiny_model(num_hidden_layers=1), MuonConfig()), state)
    wider = build_optimizer(tiny_model(), MuonConfig())  # as many parameters, of other sizes
    with pytest.raises(UserError, match=r"momentum_buffer of parameter 0 is .* in init_from's run and .* here"):
        restore_optimizer(wider, state)


def test_sub_norms_are_added_without_changing_what_the_network_does(tmp_path, tokenizer):
    plain = tiny_model("none", sub_norm=False)
    normed = tiny_model("b158", seed=1)
    normed.load_state_dict(plain.state_dict(), strict=False)
    ids = torch.randint(0, 512, (4, 60), generator=torch.Generator().manual_seed(0))
    calibrate_sub_norms(normed, ids)
    gains = [p for name, p in normed.named_parameters() if "sub_norm" in name]
    assert len(gains) == 4 and all(len(gain.unique()) == 1 for gain in gains)
    unrounded = tiny_model("none", seed=1)
    unrounded.load_state_dict(normed.state_dict())
    uncalibrated = tiny_model("none", seed=1)
    uncalibrated.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        expected, calibrated, bare = (model(ids) for model in (plain, unrounded, uncalibrated))
    # A norm makes every token equally large, so single tokens move: about 0.15 of the spread here; uncalibrated, 1.2.
    spread = expected.std()
    assert (calibrated - expected).abs().mean() < 0.4 * spread < (bare - expected).abs().mean()


def test_init_sub_norm_through_training(tmp_path, shards, tokenizer):
    plain = tiny_model("none", sub_norm=False, vocab_size=tokenizer.vocab_size)
    save_model_folder(tmp_path / "plain", plain, QuantConfig(name="none"), tokenizer)
    overrides = [f"run_dir={tmp_path / 'run'}", f"init_from={tmp_path / 'plain'}", "init_sub_norm=true"]
    train(compose("train", [*overrides, f"data.dir={shards}", *TINY_RUN]))
    assert from_pretrained(tmp_path / "run").config.sub_norm


def test_a_scheme_with_parameters_of_its_own_goes_on_from_one_without(tmp_path, shards, plain):
    def run(name, init_from, quant):
        sizes = [f"run_dir={tmp_path / name}", f"init_from={init_from}", f"data.dir={shards}", *TINY_RUN]
        return train(compose("train", [*sizes, f"quant={quant}", "init_optimizer=false", "trainer.max_steps=2"]))

    assert run("learned", plain, "b158_learned")["steps"] == 2
    with pytest.raises(UserError, match=r"has model.layers.0.*scale_gain, which quant=b158 would leave out"):
        run("left_out", tmp_path / "learned", "b158")
    with pytest.raises(UserError, match="trained with quant=none, and quant=bitnet_v2 transforms inputs"):
        run("transformed", plain, "bitnet_v2")


@pytest.fixture
def plain(tmp_path, tokenizer):
    """A dense model folder without sub-norms, trained with dropout."""
    model = tiny_model("none", sub_norm=False, vocab_size=tokenizer.vocab_size, dropout=0.3)
    save_model_folder(tmp_path / "plain", model, QuantConfig(name="none"), tokenizer)
    return tmp_path / "plain"


def test_the_network_is_the_trained_models_and_how_it_is_trained_is_the_runs(tmp_path, shards, plain):
    run = tmp_path / "run"
    overrides = ["model.gradient_checkpointing=true", "model.dropout=0.1", "quant=none", "trainer.max_steps=2"]
    train(compose("train", [f"run_dir={run}", f"init_from={plain}", f"data.dir={shards}", *TINY_RUN, *overrides]))
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert (saved["gradient_checkpointing"], saved["dropout"], saved["initializer_range"]) == (True, 0.1, 0.02)
    assert (saved["num_attention_heads"], saved["sub_norm"]) == (4, False), "TINY_RUN says 2, and sub-norms"
    resumed = resume_config(str(run), ["model.dropout=0.2", "model.gradient_checkpointing=false"])
    assert (resumed.model.dropout, resumed.model.gradient_checkpointing) == (0.2, False)
    changed = ["trainer.max_steps=3", "schedule.total_steps=2", "model.dropout=0.2"]
    assert train(resume_config(str(run), changed))["steps"] == 3


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "model.hidden_size=96",
            r"^model.hidden_size=96 with init_from=.*with hidden_size=32: leave model.hidden_size=",
        ),
        ("model.sub_norm=true", "model.sub_norm=true with init_from"),
        ("model.head_dim=10", "with head_dim=8"),
        ("model.name=mine", "with name=custom"),
        ("model=15m", r"^model=15m \(model.hidden_size=256\) with init_from=.*leave model= out"),
    ],
)
def test_a_typed_network_that_is_another_one_is_refused(plain, typed, message):
    config = compose("train", ["run_dir=x", f"init_from={plain}", typed])
    with pytest.raises(UserError, match=message):
        check_typed_network(config, [typed.partition("=")[0]])


def test_sizes_that_contradict_each_other_are_left_out_too():
    """Their own error asks for other sizes."""
    wrong, typed = ["run_dir=x", "model.hidden_size=999"], ["seed", "model.hidden_size"]
    given = pytest.raises(UserError, match=r"^init_from=run with model.hidden_size=: .*: leave model.hidden_size= out")
    with given, sizes_are_given("init_from=run", typed):
        compose("train", [*wrong, "init_from=run"])
    with pytest.raises(UserError, match="does not divide .*: change one of them"), sizes_are_given(None, typed):
        compose("train", wrong)


def test_a_typed_network_that_is_the_trained_one_is_taken(plain):
    typed = [
        "model.hidden_size=32",
        "model.num_attention_heads=4",
        "model.num_key_value_heads=null",
        "model.dropout=0.5",
    ]
    typed += ["model.num_key_value_heads=4", "model.head_dim=8", "model.vocab_size=null", "data.batch_size=3"]
    for item in typed:
        config = compose("train", ["run_dir=x", f"init_from={plain}", item])
        check_typed_network(config, [item.partition("=")[0]])
    config = compose("train", ["run_dir=x", f"init_from={plain}", "init_sub_norm=true", "model.sub_norm=true"])
    check_typed_network(config, ["init_sub_norm", "model.sub_norm"])


def test_the_command_refuses_it_before_anything_is_trained(plain, shards):
    tried = run_command(
        "train", f"init_from={plain}", f"data.dir={shards}", "model.hidden_size=96", cwd=plain.parent, check=False
    )
    assert tried.returncode == 2 and "model.hidden_size=96 with init_from" in tried.stderr
    assert len(tried.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential"])
def test_every_shape_goes_from_0_to_1_without_a_step_back(shape):
    values = [warmup_strength(shape, step / 100) for step in range(101)]
    assert values[0] == 0 and values[-1] == pytest.approx(1) and values == sorted(values)


def test_mistakes_are_named(tmp_path, shards):
    with pytest.raises(UserError, match="need init_from"):
        compose("train", ["run_dir=x", "experiment=convert_dense"])
    with pytest.raises(UserError, match="must be one of"):
        compose("train", ["run_dir=x", "quant.lambda_warmup_shape=sudden"])
    save_model_folder(tmp_path / "small", tiny_model("none", vocab_size=300), QuantConfig(name="none"), None)
    started = [f"run_dir={tmp_path / 'run'}", f"data.dir={shards}", *TINY_RUN, "quant=none"]
    for key, says in (
        (
            f"init_from={tmp_path / 'small'}",
            r" .of init_from=\S+small., .* below 512: prepare .* tokenizer of that model$",
        ),
        ("model.vocab_size=300", ", .* below 512: leave model.vocab_size at null to follow the data$"),
    ):
        with pytest.raises(UserError, match=f"^model.vocab_size=300{says}"):
            train(compose("train", [*started, key]))


def test_the_last_validation_is_of_the_fully_quantized_model(tmp_path, shards):
    """Also where the warm-up outlasts the run: what is measured is what is shipped."""
    overrides = [f"run_dir={tmp_path / 'run'}", f"data.dir={shards}", *TINY_RUN, "quant.lambda_warmup_steps=100"]
    metrics = train(compose("train", overrides))
    from bitnet_lit.config import EvaluateConfig
    from bitnet_lit.inference.evaluation import evaluate

    folder = tmp_path / "run" / ("model_last" if (tmp_path / "run" / "model_last").exists() else "model")
    # the same sums in batches of another size: float rounding only
    assert evaluate(EvaluateConfig(checkpoint=str(folder)))["loss"] == pytest.approx(metrics["val/loss"], abs=1e-5)


def test_the_optimizers_state_is_that_of_the_step_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for folder, checkpoint, step in (("model", "best.ckpt", 3), ("model_last", "last.ckpt", 5)):
        save_model_folder(run / folder, tiny_model(), QuantConfig(), None, {"step": step})
        parts = {"state_dict": {}, "lr_schedulers": [], "loops": {}, "callbacks": {}, "pytorch-lightning_version": "2"}
        state = {"optimizer_states": [{"of_step": step}], "global_step": step}
        write_checkpoint({**parts, **state}, run / "checkpoints" / checkpoint)
    for typed, step in ((run, 3), (run / "model", 3), (run / "model_last", 5), ("~/run", 3)):
        assert optimizer_state(str(typed)) == {"of_step": step}
    save_model_folder(run / "model", tiny_model(), QuantConfig(), None, {"step": 4})  # it is of no checkpoint
    assert optimizer_state(str(run)) is None
