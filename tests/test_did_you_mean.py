"""What is said about a key that does not exist: the right word, a near one, or where all of them are listed."""

import pytest

from bitnet_lit import __version__
from bitnet_lit.cli import _divide, compose
from bitnet_lit.composed_config import register_schemas
from bitnet_lit.did_you_mean import nearest_key
from bitnet_lit.errors import UserError


@pytest.fixture(autouse=True, scope="module")
def schemas():
    """As a command does before it reads its flags."""
    register_schemas()


def answer(override, command="train"):
    with pytest.raises(UserError) as error:
        compose(command, [*(["run_dir=unused"] if command == "train" else []), override])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("ckpt_path=a/last.ckpt", "resume=<run folder>"),
        ("debug=default", "mode=smoke"),
        ("trainer.fast_dev_run=true", "mode=smoke"),
        ("+trainer.overfit_batches=1", "mode=overfit"),
        ("trainer.limit_train_batches=10", "trainer.max_steps="),
        ("trainer.min_steps=10", "trainer.max_steps="),
        ("trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=1.0"),
        ("paths.data_dir=data", "data.dir="),
        ("data.data_dir=data", "did you mean 'data.dir'"),
        ("task_name=try", "hydra.run.dir="),
        ("tags=[a,b]", "hydra.run.dir="),
        ("hparams_search=optuna", "sweep="),
        ("callbacks=early_stopping", "callbacks.extra.early._target_=lightning.pytorch.callbacks.EarlyStopping"),
        ("callbacks.early_stopping.patience=3", "callbacks.extra.early._target_"),
        ("callbacks.model_checkpoint.save_top_k=3", "callbacks.checkpoint_every_n_steps"),
        ("logger.mlflow.experiment_name=mine", "logger=mlflow"),
        ("logger=comet", "logger.extra.comet._target_=lightning.pytorch.loggers.CometLogger"),
        ("test=false", "python -m bitnet_lit.evaluate"),
        ("lr=1", "'optim.learning_rate'"),
        ("wd=1", "'optim.weight_decay'"),
        ("epochs=3", "'trainer.max_epochs'"),
        ("batch-size=8", "'data.batch_size'"),
        ("data.bs=8", "'data.batch_size'"),
        ("block_size=64", "'model.max_position_embeddings'"),
        ("optimizer=adamw", "'optim'"),
        ("quant.group_size=64", "'quant.settings.group_size'"),
        ("quant.activation_bit=4", "'quant.activation_bits'"),
        ("trainer.profiler=simple", "trainer.extra.<flag>="),
    ],
)
def test_words_of_other_trainers_are_answered_with_ours(override, word):
    assert word in answer(override)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--quiet", "callbacks=quiet"),
        ("-q", "callbacks=quiet"),
        ("--verbose", "metrics.csv"),
        ("-vv", "metrics.csv"),
        ("--silent", "callbacks=quiet"),
        ("--debug", "mode=smoke"),
        ("--seed 3", ": seed=3"),
        ("--lr 1e-3", ": optim.learning_rate=1e-3"),
        ("--lr=1e-3", ": optim.learning_rate=1e-3"),
        ("--epochs 3", ": trainer.max_epochs=3"),
        ("--batch-size 8", ": data.batch_size=8"),
        ("--device cuda", "trainer.accelerator=gpu, cpu or mps"),
        ("--gpus 2", ": trainer.devices=2"),
        ("--nodes 2", ": trainer.num_nodes=2"),
        ("--data DIR", ": data.dir=DIR"),
        ("--model NAME", ": model=NAME"),
        ("--output DIR", ": hydra.run.dir=DIR"),
        ("--out DIR", ": hydra.run.dir=DIR"),
        ("--config c.yaml", "--config-dir <folder> experiment=<name>"),
        ("-c c.yaml", "--config-dir <folder> experiment=<name>"),
        ("--dry-run", "sweep.dry_run=true"),
        ("--resume", ": resume=<value>"),
        ("--resume seed=2", ": resume=<value>"),
        ("--name mine", "hydra.run.dir=outputs/<name>"),
        ("--no-compile", ": compile=false"),
        ("--init-optimizer", ": init_optimizer=true"),
        ("--max-tokens 9", ": trainer.max_tokens=9"),
        ("--max_step 5", ": trainer.max_steps=5"),
        ("--force", "never replaces another one"),
        ("--temperature 1", "bitnet_lit.infer has temperature="),  # not that of a teacher
        ("--format gguf", "bitnet_lit.export format=<format>"),  # not classes of formats
        ("--scheme b1", ": quant=b1"),  # not classes of schemes
        ("--fp32", "trainer.precision=32-true"),
        ("--run-name a", "hydra.run.dir=outputs/<name>"),
        ("--report-to none", "--help lists flags and keys"),
        ("-n 100", "--help lists flags and keys"),
        ("-p hi", "--help lists flags and keys"),
        ("--json", "--help lists flags and keys"),
        ("-Q", "--help lists flags and keys"),
    ],
)
def test_flags_of_other_tools_are_answered_with_keys(typed, words):
    with pytest.raises(UserError) as error:
        _divide("train", typed.split())
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("command", "typed", "words"),
    [
        ("infer", "--quiet", ": quiet=true"),
        ("infer", "--model runs/a", ": checkpoint=runs/a"),
        ("infer", "--max-tokens 30", ": max_new_tokens=30"),
        ("infer", "-n 30", ": max_new_tokens=30"),
        ("infer", "--n-predict 30", ": max_new_tokens=30"),
        ("infer", "-p hi", ": prompt=hi"),
        ("infer", "-i hi", ": prompt=hi"),
        ("evaluate", "-i a.txt", ": data=a.txt"),
        ("infer", "--temp 0", ": temperature=0"),
        ("infer", "-c 512", "the context is the model's own"),
        ("evaluate", "--file a.txt", ": data=a.txt"),
        ("evaluate", "-c a.yaml", "only train reads a file of them"),
        ("evaluate", "--device cuda", "accelerator=cpu or gpu"),
        ("evaluate", "--num-workers 2", "--help lists"),
        ("export", "-o out.gguf", ": out=out.gguf"),
        ("export", "--verbose", "a command says all that it does"),
        ("prepare", "--loglevel", "a command says all that it does"),
        ("infer", "--silent", "quiet=true"),
        ("prepare", "--input a.txt", ": source=a.txt"),
        ("prepare", "--force", "no command asks"),
        ("prepare", "--max-steps 5", "--help lists"),
        ("report", "--logdir outputs", ": runs=outputs"),
        ("plot", "--output-dir a", ": out=a"),
        ("bench", "--quiet", "2>/dev/null"),
        ("infer", "--num-beams 4", "no beam search: temperature=0"),
    ],
)
def test_each_command_has_answers_of_its_own(command, typed, words):
    with pytest.raises(UserError) as error:
        _divide(command, typed.split())
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("override", "command", "words"),
    [
        ("quiet=true", "train", "callbacks=quiet"),
        ("output=x", "train", "did you mean 'hydra.run.dir'"),
        ("model=x", "infer", "did you mean 'checkpoint'"),
        ("device=cuda", "train", "trainer.accelerator"),
        ("do_sample=false", "infer", "temperature=0 takes the likeliest token"),
        ("vocab=300", "prepare", "did you mean 'vocab_size'"),
        ("callbacks.mine._target_=a.B", "train", "did you mean 'callbacks.extra.mine._target_'"),
        ("logger.mine.save_dir=x", "train", "did you mean 'logger.extra.mine.save_dir'"),
        ("sweep=x", "report", "did you mean 'runs'"),
    ],
)
def test_the_same_names_typed_as_keys_have_the_same_answers(override, command, words):
    assert words in answer(override, command)


def test_the_version_is_that_of_this_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        _divide("train", ["--version"])
    assert capsys.readouterr().out == f"bitnet-lit {__version__}\n"


def test_a_key_of_another_optimizer_is_answered_with_its_optimizer_and_the_experiment_that_sets_it():
    options = ["run_dir=unused", "optim=adamw"]
    with pytest.raises(UserError, match="^optim.normuon belongs to optim=muon, not to optim=adamw$"):
        compose("train", [*options, "optim.normuon=true"])
    with pytest.raises(UserError, match="^experiment=demo sets optim.adamw_learning_rate, .*: leave out optim=adamw"):
        compose("train", [*options, "experiment=demo"])


def test_a_command_is_answered_with_words_of_its_own():
    assert "resume=<run folder>" in answer("+ckpt_path=x")
    assert "it is checkpoint=<run or model folder>" in answer("+ckpt_path=x", "infer")
    assert "nothing reads it" in answer("+test=x", "infer")  # the words for `test` are those of `train`


@pytest.mark.parametrize(
    ("override", "command"),
    [("xyzzy=1", "train"), ("model.flux_capacitor=1", "train"), ("beam_width=3", "infer"), ("color=blue", "prepare")],
)
def test_what_is_like_nothing_is_sent_to_the_list(override, command):
    text = answer(override, command)
    assert f"python -m bitnet_lit.{command} --cfg job" in text and "did you mean" not in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model=xl", "unknown model=xl: must be one of 1.3b, 110m"),
        ("optim=adam", "unknown optim=adam: did you mean 'adamw'? (adamw, custom, muon)"),
        ("schedule=onecycle", "unknown schedule=onecycle: must be one of cosine, custom, two_stage, wsd"),
        ("data=data/mine", "unknown data=data/mine: did you mean data.dir=data/mine?"),
        ("data=/my data", "unknown data=/my data: did you mean data.dir='/my data'?"),
        ("data=README.md", "written first: python -m bitnet_lit.prepare source=README.md"),  # a file that is there
        ("data=src", "unknown data=src: did you mean data.dir=src?"),  # a folder that is there
        ("model=outputs/mine", "unknown model=outputs/mine: did you mean init_from=outputs/mine?"),
        ("quant=my_project.Threshold", "a class of your own is quant._target_=my_project.Threshold"),
        ("optim=torch.optim.SGD", "a class of your own is optim._target_=torch.optim.SGD"),
        ("callbacks=mine.Early", "a class of your own is callbacks.extra.mine._target_=mine.Early"),
        ("quant=1.58", "unknown quant=1.58: did you mean 'b158'?"),
        ("model=15", "unknown model=15: did you mean '15m'?"),
        ("quant=ternary", "unknown quant=ternary: quant=b158 is BitNet b1.58"),  # and not sherry
        ("quant=bf16", "unknown quant=bf16: quant=none trains the dense twin"),  # and not b1
        ("quant=false", "unknown quant=false: quant=none trains the dense twin"),
        ("logger=null", "unknown logger=null: metrics.csv is always written"),
        ("mode=true", "unknown mode=true: must be one of full, overfit"),
        ("experiment=smoke", "unknown experiment=smoke: it is mode=smoke"),
        (
            "data=tinystories",
            "data.dir=<folder of shards>, which python -m bitnet_lit.prepare source=tinystories writes",
        ),
        ("export=gguf", "export=gguf: export has keys of its own: export.targets, export.formats"),
    ],
)
def test_options_are_guessed_only_when_near_and_no_schema_is_one(override, words):
    assert words in answer(override)


def test_a_key_of_the_same_name_in_its_own_group_comes_first():
    known = ["model.name", "optim.name", "optim.learning_rate", "trainer.max_steps", "schedule.warmup_steps"]
    assert nearest_key("optim.nam", known) == "optim.name"
    assert nearest_key("trainer.warmup_steps", known) == "schedule.warmup_steps"
    assert nearest_key("trainer.max_step", known) == "trainer.max_steps"
    assert nearest_key("trainer.something_else", known) is None
