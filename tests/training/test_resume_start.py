"""What a run goes on from: its config as plain data, a whole checkpoint, the same data and the same network."""

import csv
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from bitnet_lit.cli import compose
from bitnet_lit.config import EvaluateConfig, PrepareConfig
from bitnet_lit.data.prepare import prepare
from bitnet_lit.errors import UserError
from bitnet_lit.inference.evaluation import evaluate
from bitnet_lit.training.callbacks.checkpoints import Checkpoints
from bitnet_lit.training.checkpoint_file import read_checkpoint
from bitnet_lit.training.plan import world_size
from bitnet_lit.training.resume import resume_config, save_config
from bitnet_lit.training.run import train
from bitnet_lit.training.start import read_start
from tests.support import TINY_RUN

# The last validation is not the best one.
WORSE = [
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "optim=adamw",
    "optim.learning_rate=3",
    "schedule=wsd",
    "schedule.decay_share=0.1",
    "schedule.warmup_steps=2",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory, shards):
    """A finished run, and the shards that it has to itself."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(shards, root / "data")
    train(compose("train", [f"run_dir={root}/run", f"data.dir={root}/data", *TINY_RUN, *WORSE]))
    return root


@pytest.fixture
def run(made, tmp_path):
    """A copy of it, to break."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


LONGER = ["trainer.max_steps=5", "schedule.total_steps=5"]


def validation_losses(run):
    """Return the logged val/loss of each step that has one."""
    with (run / "metrics.csv").open() as file:
        losses = {int(row["step"]): row["val/loss"] for row in csv.DictReader(file) if row["val/loss"]}
    return {step: pytest.approx(float(loss), rel=1e-8) for step, loss in losses.items()}  # 9 digits


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink()
    path.write_bytes(raw)


def test_a_damaged_last_checkpoint_offers_the_best_one(run):
    best = run / "checkpoints" / "best.ckpt"
    flip(run / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=f"last.ckpt: damaged.*best.ckpt is whole.*step 2: resume={best}"):
        train(resume_config(str(run), LONGER))
    (run / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(UserError, match=f"last.ckpt: no such file.*resume={best}"):
        train(resume_config(str(run), LONGER))
    metrics = train(resume_config(str(best)))
    assert metrics["steps"] == 4 and metrics["run_dir"] == str(run)
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 4
    steps = [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == ["1", "2", "2", "3", "4", "4"]
    flip(best)
    flip(run / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="best.ckpt cannot be read either"):
        read_start(str(run))


def test_a_damaged_last_checkpoint_of_a_complete_run_is_made_again_from_the_best(made, tmp_path):
    run = tmp_path / "run"
    good = [item for item in WORSE if "learning_rate" not in item]
    train(compose("train", [f"run_dir={run}", f"data.dir={made}/data", *TINY_RUN, *good]))
    best = run / "checkpoints" / "best.ckpt"
    assert read_checkpoint(best)["global_step"] == 4
    with pytest.raises(UserError, match="complete at step 4"):
        train(resume_config(str(best)))
    flip(run / "checkpoints" / "last.ckpt")
    train(resume_config(str(best)))
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 4
    with pytest.raises(UserError, match="complete at step 4"):
        train(resume_config(str(run)))


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WRONG = [
    ("+logger.extra.mine._target_=lightning.pytorch.loggers.CSVLogger", "logger.extra.mine"),  # without its save_dir
    ("+callbacks.extra.mine._target_=lightning.pytorch.callbacks.EarlyStopping", "callbacks.extra.mine"),
    ("+trainer.extra.strateg=ddp", "trainer.extra.strateg"),
]


@pytest.mark.parametrize(("override", "named"), WRONG, ids=[named for _, named in WRONG])
def test_a_resume_that_is_refused_changes_no_file(run, override, named):
    """Neither the figures of the run nor the rows and the checkpoint behind the one that it would go on from."""
    before = content(run)
    with pytest.raises(UserError, match=named):
        train(resume_config(str(run / "checkpoints" / "best.ckpt"), [*LONGER, override.lstrip("+")]))
    assert content(run) == before


@pytest.mark.parametrize(("override", "named"), WRONG, ids=[named for _, named in WRONG])
def test_a_new_run_that_is_refused_changes_no_file(run, made, override, named):
    """The run there has no checkpoint yet, and the next new run replaces what it wrote."""
    shutil.rmtree(run / "checkpoints")
    for name in ("model", "model_last"):
        shutil.rmtree(run / name)
    (run / "metrics.json").unlink()
    before = content(run)
    start = [
        "train",
        [f"run_dir={run}", f"data.dir={made}/data", *TINY_RUN, "trainer.max_steps=1", "logger=tensorboard"],
    ]
    with pytest.raises(UserError, match=named):
        train(compose(start[0], [*start[1], override]))
    assert content(run) == before
    assert train(compose(*start))["steps"] == 1
    assert len((run / "metrics.csv").read_text().splitlines()) < 5 and list((run / "tensorboard").iterdir())


def test_what_the_best_model_was_is_exported_again(run):
    expected = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "model_last")
    (run / "metrics.json").unlink()
    metrics = train(resume_config(str(run)))
    assert {path.name: path.read_bytes() for path in (run / "model").iterdir()} == expected
    assert (run / "model_last" / "model.safetensors").exists()
    assert metrics["val/best_loss"] == validation_losses(run)[2]
    with pytest.raises(UserError, match="complete at step 4"):
        train(resume_config(str(run)))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.hidden_size=64", "model.hidden_size was 32 when the run began, and is 64 now"),
        ("model.rope_theta=500", "model.rope_theta was"),
        ("quant.activation_bits=4", "quant.activation_bits was 8"),
        ("seed=7", "seed was 1"),
        ("data.sequence_length=16", "data.sequence_length was 32"),
    ],
)
def test_another_network_or_order_is_refused(run, override, named):
    with pytest.raises(UserError, match=f"resume={run}: {named}.*init_from={run}"):
        train(resume_config(str(run), [override, *LONGER]))


def test_other_data_is_refused(run, made, tmp_path):
    other = tmp_path / "other"
    prepare(PrepareConfig(source="demo", out=str(other), num_stories=300, vocab_size=512, num_workers=1, seed=5))
    with pytest.raises(UserError, match=r"the tokenizer in data.dir is not the one that the run began with"):
        train(resume_config(str(run), [f"data.dir={other}", *LONGER]))
    changed = tmp_path / "changed"
    shutil.copytree(made / "data", changed)
    shard = changed / "data01.bin"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-2] + raw[:2])
    with pytest.raises(UserError, match=r"the shard data01.bin in data.dir is not the one"):
        train(resume_config(str(run), [f"data.dir={changed}", *LONGER]))
    moved = tmp_path / "moved"
    shutil.copytree(made / "data", moved)
    assert train(resume_config(str(run), [f"data.dir={moved}", *LONGER]))["steps"] == 5


def test_a_checkpoint_of_another_size_is_refused(run):
    config = (run / "config.yaml").read_text()
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    (run / "checkpoints" / "last.ckpt").unlink()
    del checkpoint["callbacks"]["Checkpoints"]["identity"], checkpoint["sealed"]
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    (run / "config.yaml").write_text(config.replace("intermediate_size: 64", "intermediate_size: 128"))
    with pytest.raises(UserError, match=r"last.ckpt: does not fit .*\(64, 32\) there, and \(128, 32\)"):
        train(resume_config(str(run), LONGER))


def test_a_run_of_an_earlier_version_goes_on(run):
    """Its checkpoints say nothing but the best loss, and its model folder where the data lay."""
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = torch.load(run / "checkpoints" / name, weights_only=True)
        state = checkpoint["callbacks"]
        checkpoint["callbacks"] = {"Checkpoints": {"best_loss": state["Checkpoints"]["best_loss"]}}
        del checkpoint["sealed"]
        (run / "checkpoints" / name).unlink()
        torch.save(checkpoint, run / "checkpoints" / name)
    with pytest.raises(UserError, match="complete at step 4"):
        train(resume_config(str(run)))
    assert train(resume_config(str(run), LONGER))["steps"] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it holds no keys and values"),
        ("- 1\n", "it holds no keys and values"),
        ("seed: [1\n", "damaged"),
        ("optim: !!python/object/apply:os.system [id]\n", "damaged"),
        ("optim: !mine {}\n", "damaged"),
        ("seed: !!int 1\n", r"tags \(!name\) are not allowed"),
        ("seed: !!binary aGVsbG8=\n", r"tags \(!name\) are not allowed"),
        ("a: &a [x]\nb: *a\n", r"aliases \(\*name\) are not allowed"),
        ("[" * 10000, "damaged"),
        ("seed: 1\n", "optim.name is None"),
        ("optim: {name: sgd}\n", "optim.name is 'sgd'"),
        ("optim: {name: muon}\nnonsense: 1\n", "nonsense"),
        ("optim: {name: muon}\nseed: x\n", "seed"),
        ("optim: {name: muon}\nmodel: 7\n", "ModelConfig"),
        ("\x00\xff", "damaged"),
    ],
)
def test_a_damaged_config_is_one_line(run, text, message):
    (run / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        train(resume_config(str(run)))
    assert "\n" not in str(error.value)


def test_a_length_in_tokens_is_compared_as_such(run):
    """Steps say nothing there, and they are not the length of the curve."""
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("max_tokens: null", "max_tokens: 512"))
    assert resume_config(str(run), ["trainer.max_steps=9"]).trainer.max_tokens == 512
    message = r"another length than trainer.max_tokens=512: .* schedule.total_steps=<the steps that its plan printed>"
    with pytest.raises(UserError, match=message):
        resume_config(str(run), ["trainer.max_tokens=1024"])


def test_values_of_a_config_are_plain_text(run, monkeypatch):
    """A foreign folder's config asks for the environment: it gets its own words back."""
    monkeypatch.setenv("SECRET", "swordfish")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    prompts = ["costs ${5}", "${oc.env:SECRET}", "???", "a: b #c", "1e5", "true", "é ☃ \\${x}", "two\nlines "]
    saved["logger"]["wandb_project"] = "${oc.env:SECRET}"
    saved["callbacks"]["sample_prompts"] = prompts
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    config = resume_config(str(run), ["callbacks.sample_max_new_tokens=7"])
    assert config.callbacks.sample_prompts == prompts
    assert config.logger.wandb_project == "${oc.env:SECRET}"
    save_config(config, run)
    assert "swordfish" not in (run / "config.yaml").read_text()
    again = resume_config(str(run))
    assert asdict(again) == asdict(config)


@pytest.mark.parametrize("key", ["quant._target_", "schemes"])
def test_no_class_that_a_folder_names_is_imported(run, tmp_path, monkeypatch, key):
    """Importing it would run it."""
    (tmp_path / "hostile.py").write_text("open('was_run', 'w').close()\nclass Scheme: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    if key == "schemes":
        saved["schemes"] = ["hostile.Scheme"]
    else:
        saved["quant"] |= {"_target_": "hostile.Scheme", "name": "hostile"}
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    if key == "schemes":
        before = (run / "config.yaml").read_text()
        save_config(resume_config(str(run)), tmp_path)
        after = yaml.safe_load((tmp_path / "config.yaml").read_text())
        assert after == yaml.safe_load(before) | {"run_dir": str(run)}  # it keeps the name
    else:
        with pytest.raises(UserError, match=r"names the class hostile\.Scheme"):
            resume_config(str(run))
    assert not (tmp_path / "was_run").exists()


def test_the_class_beside_a_scheme_that_is_known_is_not_imported_while_the_run_goes_on(run, tmp_path, monkeypatch):
    """The scheme is looked up by its name; its class stays in config.yaml as text."""
    (tmp_path / "hostile.py").write_text("open('was_run', 'w').close()\nclass Scheme: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    saved["quant"]["_target_"] = "hostile.Scheme"
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    assert train(resume_config(str(run), LONGER))["steps"] == 5
    assert not (tmp_path / "was_run").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["quant"]["_target_"] == "hostile.Scheme"


@pytest.mark.parametrize("devices", ["null", "[]", "{a: 1}"])
def test_devices_that_are_none_are_one_line(run, devices):
    with pytest.raises(UserError, match=r"trainer\.devices=.*: give a number, a list|on a CPU give a number"):
        world_size(resume_config(str(run), [f"trainer.devices={devices}"]).trainer)


def test_another_number_of_devices_keeps_the_sequences_of_a_step(run, monkeypatch):
    def sizes(*typed):
        config = resume_config(str(run), [*typed])
        return config.data.batch_size, config.trainer.accumulate_grad_batches

    assert sizes() == (4, 1)
    assert sizes("trainer.devices=2") == (2, 1)
    assert sizes("trainer.devices=2", "data.batch_size=1") == (1, 2)
    assert sizes("trainer.accumulate_grad_batches=3") == (4, 3)  # larger steps on as many devices: as the user types it
    with pytest.raises(UserError, match="its steps have 4 sequences, which 3 ranks cannot share"):
        sizes("trainer.devices=3")
    path = run / "config.yaml"
    path.write_text(
        path.read_text().replace("devices: 1\n", "devices: auto\n").replace("accelerator: cpu", "accelerator: gpu")
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpus, expected in {1: (4, 1), 2: (2, 1), 4: (1, 1)}.items():  # nothing is typed: another machine
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert sizes() == expected
    # As many GPUs as before, with devices=auto: the user wants steps of another size, as with devices=1.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert sizes("data.batch_size=2") == (2, 1) and sizes("trainer.accumulate_grad_batches=3") == (4, 3)


def test_a_saved_config_says_the_same_wherever_it_is_resumed_from(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    config = resume_config("run")
    save_config(config, tmp_path)
    assert (tmp_path / "config.yaml").read_bytes() == (made / "run" / "config.yaml").read_bytes()
    assert config.resume == "run"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"garbage\n" + raw, "its first column is not step"),
        (lambda raw: raw.replace(b"\r\n2,", b"\r\nx,", 1), "line 3 is no row"),
        (lambda raw: raw.replace(b"\r\n2,", b"\r\n2,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1", 1), "line 3 is no row"),
        (lambda raw: b"\xff\xfe" + raw, "damaged"),
        (lambda raw: b"step\n\0\n", "damaged"),
    ],
)
def test_a_damaged_metrics_csv_is_one_line(run, damage, message):
    path = run / "metrics.csv"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"metrics.csv: .*{message}"):
        train(resume_config(str(run), LONGER))


def test_half_a_last_row_is_mended(run):
    path = run / "metrics.csv"
    whole = path.read_bytes()
    path.write_bytes(whole + b"5,1.25")
    train(resume_config(str(run), LONGER))
    assert path.read_bytes().startswith(whole)


def test_a_stop_where_a_validation_is_due_is_made_up_for(tmp_path, made, monkeypatch):
    """Asked to stop in the step before a validation, and in the last step: the resumed run validates first."""
    for step in (2, 4):
        original = Checkpoints.on_train_batch_end

        def on_train_batch_end(self, trainer, *arguments, step=step, original=original):
            if trainer.global_step == step:
                self.signals.number = 15
            original(self, trainer, *arguments)

        folder = tmp_path / str(step)
        monkeypatch.setattr(Checkpoints, "on_train_batch_end", on_train_batch_end)
        with pytest.raises(RuntimeError, match=rf"SIGTERM at step {step} of 4: saved; go on with .*resume={folder}"):
            train(compose("train", [f"run_dir={folder}", f"data.dir={made}/data", *TINY_RUN, *WORSE]))
        monkeypatch.undo()
        train(resume_config(str(folder)))
        whole, resumed = (json.loads((run / "metrics.json").read_text()) for run in (made / "run", folder))
        for key in ("val/loss", "val/best_loss", "train/loss", "ternary/flip_rate", "steps"):
            assert whole[key] == resumed[key], key
        counts = [read_checkpoint(run / "checkpoints" / "last.ckpt")["loops"] for run in (made / "run", folder)]
        assert counts[0] == counts[1]
        steps = [
            [row.split(",")[0] for row in (run / "metrics.csv").read_text().splitlines()]
            for run in (made / "run", folder)
        ]
        assert steps[0] == steps[1]
        for name in ("ternary_health.csv", "samples.txt"):
            assert (folder / name).read_bytes() == (made / "run" / name).read_bytes()


def test_a_run_that_lost_its_best_model_takes_the_last_one(run, capsys):
    """best.ckpt is damaged and model/ is gone; model_last/ has a file of the user's own."""
    flip(run / "checkpoints" / "best.ckpt")
    shutil.rmtree(run / "model")
    (run / "model_last" / "notes.md").write_text("mine")
    metrics = train(resume_config(str(run)))
    assert "the best model, of step 2, is lost" in capsys.readouterr().err
    assert metrics["val/best_loss"] == validation_losses(run)[4] and metrics["steps"] == 4
    assert read_checkpoint(run / "checkpoints" / "best.ckpt")["global_step"] == 4
    assert (run / "model" / "model.safetensors").is_file()
    assert [path.name for path in (run / "model_last").iterdir()] == ["notes.md"]


@pytest.mark.parametrize("limit", ["1", "null"])
def test_another_part_of_the_split_chooses_the_best_model_anew(run, capsys, limit):
    """Step 2 was the best, over other batches."""
    metrics = train(resume_config(str(run), [*LONGER, f"trainer.limit_val_batches={limit}"]))
    taken = {"1": "1 batch of 4 sequences", "null": "the whole split"}[limit]
    assert f"note: validations take {taken} from here on: " in capsys.readouterr().err
    assert metrics["val/best_loss"] == validation_losses(run)[5]
    assert read_checkpoint(run / "checkpoints" / "best.ckpt")["global_step"] == 5 and not (run / "model_last").exists()


def test_the_same_part_of_the_split_keeps_the_best_model(run, capsys):
    metrics = train(resume_config(str(run), LONGER))
    assert "validations take" not in capsys.readouterr().err
    assert metrics["val/best_loss"] == validation_losses(run)[2]


def test_a_model_folder_says_on_which_part_its_loss_was_measured(run):
    best, last = (
        json.loads((run / name / "config.json").read_text())["bitnet_lit"]["info"] for name in ("model", "model_last")
    )
    assert best["step"] == 2 and best["recipe"]["validated on"] == "2 batches of 4 sequences"
    assert best["metrics"]["val/loss"] == validation_losses(run)[2]
    assert last["step"] == 4 and "validated on" not in last["recipe"]
    assert last["metrics"]["val/loss"] == json.loads((run / "metrics.json").read_text())["val/loss"]


def test_a_resumed_run_holds_no_old_checkpoint(run):
    """It would stay on the disk, whole and without a name, for as long as the run goes on."""
    start = read_start(str(run))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells which files a process maps")
    assert start.step == 4 and str(run / "checkpoints") not in maps.read_text()


def test_no_path_of_this_machine_in_a_model_folder(made):
    for folder in ("model", "model_last"):
        text = (made / "run" / folder / "config.json").read_text()
        assert str(made) not in text and "data_dir" not in text
    assert yaml.safe_load((made / "run" / "config.yaml").read_text())["data"]["dir"] == str(made / "data")
    result = evaluate(EvaluateConfig(checkpoint=str(made / "run"), accelerator="cpu"))
    assert result["data_dir"] == str(made / "data")
