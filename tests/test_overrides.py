"""What is typed behind `key=` arrives as typed: through Hydra's grammar, OmegaConf, and what is written of them."""

import json
import re
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from bitnet_lit import cli
from bitnet_lit.cli import compose
from bitnet_lit.composed_config import SCHEMAS, to_object
from bitnet_lit.config import InferConfig, TrainConfig
from bitnet_lit.errors import UserError
from bitnet_lit.files.plain_yaml import dump_yaml
from bitnet_lit.key_types import PATHS, text_keys
from bitnet_lit.overrides import as_typed, quoted, readable, shortest
from tests.support import run_command

# What people typed, and what Hydra or OmegaConf would read otherwise.
PROMPTS = [
    "Once upon a time, there was",
    "Lily's ball",
    "Wow! A dog",
    '"Hi" she said',
    "'Hi' and 'there'",
    "a (b) c",
    "x=y",
    "costs ${5}",
    "1e5",
    "true",
    "null",
    "???",
    "",
    " a ",
    "# no comment; & ^ < > ~ `",
    "[a, b]",
    "[/b]",
    "{a: b}",
    "choice(a, b)",
    "C:\\new\\${x}\\\\${y}",
    "\\",
    "a\nb\tc\r\x00\x1b\x7f\x85\u2028\ufeff",
    'He said, "hi" = {x}, [y] $z \\n \u00e9 \u65e5\u672c \U0001f642',
]

# Text as it may be typed, rich in the signs that the grammars know.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text("\\'\"${}5a:, ?=()[]#\n", max_size=12),
)


def is_hydras_string(text):
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


def read(override):
    """What Hydra's grammar and OmegaConf make of an override of infer, and of the record that Hydra keeps of it."""
    parsed = OverridesParser.create().parse_override(override)
    cfg = OmegaConf.structured(InferConfig)
    OmegaConf.update(cfg, parsed.key_or_group, parsed.value())
    record = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create([override]))))
    assert record == [override]
    config = to_object(cfg)
    written = yaml.safe_load(dump_yaml(asdict(config)))
    assert (written["prompt"], written["stop"]) == (config.prompt, config.stop)
    return config


@settings(max_examples=150, deadline=None)
@given(TEXTS.filter(lambda text: not is_hydras_string(text)))
@example("???")
@example("'a' b 'c'")
def test_any_text_arrives_as_typed(text):
    (override,) = as_typed(InferConfig, [f"prompt={text}"])
    assert read(override).prompt == text
    assert readable(override) == ("prompt", text)
    assert shortest(InferConfig, override) == f"prompt={text}"


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXTS, max_size=4))
def test_any_list_of_texts_arrives(texts):
    assert read(f"stop=[{','.join(map(quoted, texts))}]").stop == texts
    (typed,) = as_typed(InferConfig, [f"stop={json.dumps(texts)}"])
    assert read(typed).stop == texts
    if "\x7f" not in "".join(texts):  # which YAML refuses and JSON does not escape
        assert as_typed(InferConfig, [shortest(InferConfig, typed)]) == [typed]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_text_arrives_through_hydra_itself(prompt):
    """The whole way of the command line, in this process; with Hydra's own flags and prefixes beside it."""
    seen = []
    cli.run("infer", seen.append, [f"++prompt={prompt}", "--run", "seed=1"])
    assert [(config.prompt, config.seed) for config in seen] == [(prompt, 1)]


def test_a_path_begins_at_home_where_the_shell_leaves_that_to_us(monkeypatch):
    """A folder of the name ~ would be made otherwise."""
    monkeypatch.setenv("HOME", "/home/me")
    assert compose("prepare", ["out=~/data", "source=~x"]).folder == Path("/home/me/data")
    assert compose("plot", ["runs=[~/a, b, '~/c d']"]).runs == ["/home/me/a", "b", "/home/me/c d"]
    assert compose("infer", ["prompt=~/x"]).prompt == "~/x"
    typed = ["hydra.run.dir=~/${seed}", "resume=~/run", "data.dir=~/a,b", "~model.dropout"]
    assert as_typed(TrainConfig, typed) == [
        "hydra.run.dir='/home/me/${seed}'",
        "resume='/home/me/run'",
        "data.dir='/home/me/a,b'",
        "~model.dropout",
    ]
    assert as_typed(TrainConfig, ["data.dir=~/a"], sweep=True) == ["data.dir='/home/me/a'"]


def test_a_whole_number_may_have_an_exponent():
    typed = ["run_dir=unused", "trainer.max_tokens=33e6", "schedule.total_steps=1.5E+3", "++trainer.max_steps=1_0e1"]
    config = compose("train", typed)
    assert (config.trainer.max_tokens, config.schedule.total_steps, config.trainer.max_steps) == (33_000_000, 1500, 100)
    assert compose("train", ["run_dir=unused", "optim.learning_rate=1e0"]).optim.learning_rate == 1.0
    assert as_typed(TrainConfig, ["seed=1e1,choice(2e1,3)"], sweep=True) == ["seed=10,choice(20,3)"]
    assert as_typed(TrainConfig, ["run_dir=1e3"]) == ["run_dir='1e3'"]
    for value in ("1.55e1", "1e-3", "-1e3", "1e400"):  # no whole number, none that may be, and none that is meant
        with pytest.raises(UserError, match=re.escape(f"trainer.max_steps={value}")):
            compose("train", ["run_dir=unused", f"trainer.max_steps={value}"])


def test_every_path_is_a_key_of_some_command():
    known = {key for schema in SCHEMAS.values() for key in text_keys(schema)}
    assert known >= PATHS


def test_a_text_arrives_from_python():
    assert compose("infer", ["prompt=a, b = ${x}"]).prompt == "a, b = ${x}"


def test_every_text_key_of_every_command_takes_text():
    text = "a, b = ${x} \u00e9"
    for schema in SCHEMAS.values():
        keys = {key: how for key, how in text_keys(schema).items() if not key.startswith("hydra.")}
        for field in fields(schema):
            assert (field.name in keys) == (field.type in ("str", "str | None", "list[str]")), field.name
        for key in keys:
            (override,) = as_typed(schema, [f"{key}={text}"])
            value = OverridesParser.create().parse_override(override).value()
            value = value[0] if keys[key].is_list else value
            assert OmegaConf.to_container(OmegaConf.create({"a": value}), resolve=True) == {"a": text}
    assert {"data.dir", "resume", "init_from", "run_dir", "optim.name", "callbacks.sample_prompts"} <= set(
        text_keys(TrainConfig)
    )


def test_keys_of_an_open_slot_need_no_plus():
    """What a scheme has to set, only the scheme knows."""
    for sign in ("", "+", "++"):
        quant = compose("train", ["run_dir=x", "quant=b158_group", f"{sign}quant.settings.group_size=64"]).quant
        assert quant.scheme.group_size == 64
    with pytest.raises(UserError, match="quant=b158: has no setting group_size"):
        compose("train", ["run_dir=x", "quant.settings.group_size=64"])
    with pytest.raises(UserError, match=r"unknown key 'quant.setting.group_size'"):
        compose("train", ["run_dir=x", "quant.setting.group_size=64"])


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("the end", ["the end"]),
        ("", []),
        ("[]", []),
        (r'["\n"]', ["\n"]),
        ("['Once, there', b, 1e5, true, null]", ["Once, there", "b", "1e5", "true", "null"]),
        ("[costs ${5}, x]", ["costs ${5}", "x"]),
        (r'["C:\Users"]', [r"C:\Users"]),  # no escape in YAML: Hydra's grammar reads it
        ('["a\nb", c]', ["a\nb", "c"]),
        (r'["\ud83d\ude42"]', ["\U0001f642"]),
        ("[END", ["[END"]),
        ("'[END]'", ["'[END]'"]),
    ],
)
def test_a_list_of_texts(typed, texts):
    assert compose("infer", [f"stop={typed}"]).stop == texts


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("prompt='a, b'", "a, b"),
        ('prompt="it\'s \\"so\\""', 'it\'s "so"'),
        ("prompt='${seed}'", "7"),  # Hydra's quotes: Hydra's interpolations
        ("checkpoint=null", None),
        ("checkpoint=NULL", None),
        ("checkpoint='null'", "null"),
    ],
)
def test_quoting_that_hydra_understands_goes_on_working(override, value):
    key = override.partition("=")[0]
    assert getattr(compose("infer", ["seed=7", override]), key) == value


def test_hydras_own_paths_keep_their_interpolations():
    (override,) = as_typed(TrainConfig, ["hydra.run.dir=runs/${now:%Y}/a, b"])
    assert override == "hydra.run.dir='runs/${now:%Y}/a, b'"


@pytest.mark.parametrize(
    ("typed", "spelled"),
    [
        ("a,b", "'a','b'"),
        ("1e5, true,null", "'1e5','true','null'"),
        ("'a, b',c", "'a, b','c'"),
        ("a\\, b", "'a, b'"),
        ("\u00e9", "'\u00e9'"),
        ("choice(a,b)", "choice(a,b)"),
        ("${x}", "'\\${x}'"),
    ],
)
def test_in_a_sweep_lists_stay_lists(typed, spelled):
    assert as_typed(InferConfig, [f"prompt={typed}"], sweep=True) == [f"prompt={spelled}"]


def test_a_rank_that_lightning_starts_has_the_run_folder_of_the_first():
    """Lightning puts the name between two quotes, whatever signs it has."""
    name = 'out, "x" ${y}'
    typed = [f"hydra.run.dir={name}", f'hydra.run.dir="{name}"', "hydra.job.name=train_ddp_process_1"]
    last = as_typed(TrainConfig, cli._from_lightning(typed))[1]
    value = OverridesParser.create().parse_override(last).value()
    assert OmegaConf.to_container(OmegaConf.create({"a": value}), resolve=True) == {"a": name}


def test_a_sweep_says_the_quoting_that_works():
    with pytest.raises(UserError, match="a comma divides values") as error:
        as_typed(InferConfig, ["prompt=\u00e9, b"], sweep=True)
    working = str(error.value).rpartition('"prompt=')[2].rstrip('"')
    (override,) = as_typed(InferConfig, [f"prompt={working}"], sweep=True)
    assert read(override).prompt == "\u00e9, b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt=Once", "upon"], "'upon' is no key=value; .* quote both: \"prompt=Once upon\"$"),
        (["stop=Once", "upon"], 'quote both: "stop=Once upon", or give a list: stop=\\[Once,upon\\]$'),
        (["hello", "there"], "'hello there' is no key=value: did you mean prompt='hello there'\\?$"),
        (["hello", "seed=1"], r"'hello' is no key=value: did you mean prompt=hello\?$"),
        (["."], r"'\.' is no key=value: did you mean checkpoint=\.\?$"),
        (["~seed"], "seed"),
        (["--prompt", "Once upon"], "unrecognized arguments: --prompt: a key has no dashes: prompt='Once upon'$"),
        (["--num-samples=3"], "unrecognized arguments: --num-samples=3: a key has no dashes: num_samples=3$"),
        (["--quiet", "seed=1"], "unrecognized arguments: --quiet: a key has no dashes: quiet=true$"),
        (["--quiet", "--help"], "unrecognized arguments: --quiet: a key has no dashes: quiet=true$"),
        (["=x"], "no key=value|without a key"),
        (["promt=Once, there"], "unknown key 'promt': did you mean 'prompt'"),
        (["seed=#5"], "seed='#5': Value '#5' of type 'str' could not be converted to Integer"),
        (["seed=1,2"], "seed takes one value$"),
        (["seed=???"], "give a value"),
        (["seed=${x}"], "seed: Interpolation key 'x' not found"),
        (["prompt='${x}'"], "prompt: Interpolation key 'x' not found"),
        ([r'stop=["\ud83d"]'], "a list that cannot be read"),
        (["stop=[a, [b]]"], "a list that cannot be read"),
        (["prompt=\udcff"], "not a text in UTF-8"),
        (["--foo"], "unrecognized arguments: --foo: --help lists flags and keys$"),
        (["--cfg"], "expected one argument"),
        (["--config-dir", "nowhere"], "--config-dir .*nowhere: no such folder"),
        (["--run", "--multirun"], "Only one of"),
        (["--experimental-rerun", "x"], "unpickles a file"),
        (["+hydra.data.dir=[]"], "unknown key 'hydra.data'"),
        (["hydra/launcher=nope"], "must be one of basic, joblib"),
        (["hydra.job.env_copy=[NO_SUCH_NAME]"], "Hydra cannot read these options"),
        (["--help", "x="], "unknown key 'x'"),
    ],
)
def test_what_cannot_be_read_is_one_line(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ran = []
    with pytest.raises(UserError, match=message):
        cli.run("infer", ran.append, arguments)
    assert not ran and not list(tmp_path.iterdir())


def test_a_list_is_offered_only_where_a_key_takes_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for key, has_list in (("seed=1,2", False), ("optim.betas=0.9,0.95", True), ("trainer.devices=0,1", True)):
        listed = r" a list is \S+=\[\S+\], and" if has_list else ""
        with pytest.raises(UserError, match=rf"takes one value;{listed} a sweep over them needs -m$"):
            cli.run("train", print, [key])


def test_a_folder_without_a_key_is_what_the_command_takes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\nrun_dir: run\n")
    for command, word, meant in (
        ("train", "run", "resume=run"),
        ("train", "texts", "data.dir=texts"),
        ("infer", "run", "checkpoint=run"),
        ("export", "run", "checkpoint=run"),
        ("prepare", "texts", "source=texts"),
        ("report", "run", "runs=run"),
    ):
        with pytest.raises(UserError, match=rf"'{word}' is no key=value: did you mean {meant}\?$"):
            cli.run(command, print, [word])
    for command, words, meant in (
        ("train", "resume run", "resume=run"),
        ("train", "lr 1e-3", "optim.learning_rate=1e-3"),
        ("train", "model 15m", "model=15m"),
        ("train", "max-steps", "trainer.max_steps=<value>"),
        ("export", "run gguf", "checkpoint=run format=gguf"),
        ("export", "run nonsense", "checkpoint=run"),
        ("train", "texts b158", "data.dir=texts quant=b158"),
        ("export", "format gguf", "format=gguf"),
        ("export", "packed out=x", "format=packed"),
        ("train", "b158", "quant=b158"),
        ("train", "15m data.dir=texts", "model=15m"),
        ("infer", "run Once upon", "checkpoint=run prompt='Once upon'"),
        ("infer", "prompt Once upon", "prompt='Once upon'"),
        ("infer", "temperature", "prompt=temperature"),
        ("report", "run texts", "runs='[run,texts]'"),
        ("prepare", "texts run", "source='[texts,run]'"),
        ("evaluate", "run a.txt", "checkpoint=run data=a.txt"),
        ("evaluate", "texts missing", "checkpoint=texts data=missing"),
    ):
        with pytest.raises(UserError, match=rf" is no key=value: did you mean {re.escape(meant)}\?$") as error:
            cli.run(command, print, words.split())
        if "<" not in meant:  # what is printed can be pasted
            pasted = shlex.split(str(error.value).partition("did you mean ")[2].removesuffix("?"))
            assert len(as_typed(SCHEMAS[command], pasted)) == meant.count("=")
    with pytest.raises(UserError, match="'gpu' is no key=value: it is trainer.accelerator=gpu, cpu or mps$"):
        cli.run("train", print, ["gpu"])
    for command, word in (
        ("train", "fast"),
        ("train", "auto.yaml"),
        ("train", "demo"),
        ("export", "nowhere"),
        ("bench", "cpu"),
    ):
        with pytest.raises(UserError, match=f"'{word}' is no key=value$"):
            cli.run(command, print, [word])
    for command, flag, word, meant in (
        ("infer", "-m", "a.gguf", "checkpoint=a.gguf"),  # not a sweep
        ("infer", "-s", "7", "seed=7"),  # not the start of -sc
        ("evaluate", "-m", "run", "checkpoint=run"),
    ):
        with pytest.raises(UserError, match=f"a key has no dashes: {meant}$"):
            cli.run(command, print, [flag, word, "top_k=3"])
    with pytest.raises(UserError, match="'1.1' is no key=value$"):
        cli.run("infer", print, ["-r", "1.1"])  # a penalty in llama.cpp, and no prompt
    with pytest.raises(UserError, match="--resume: a key has no dashes: resume=outputs/demo$"):
        cli.run("train", print, ["--resume", "outputs/demo", "seed=1"])
    with pytest.raises(UserError, match="unknown key 'engine': evaluate has no engine=: .* accelerator=cpu or gpu"):
        cli.run("evaluate", print, ["engine=torch"])


@pytest.mark.parametrize("option", ["model=", "model=../../etc/passwd", "optim=x", "-m model=demo,nope"])
def test_options_of_groups_that_do_not_exist(option, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = "did you mean init_from=" if "/" in option else "must be one of (?!.*_schema)"
    with pytest.raises(UserError, match=f"unknown (model|optim)=.*: {words}"):
        cli.run("train", print, option.split(" "))


def test_the_command_line_is_as_it_was_afterwards(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["infer", "as it was"])
    seen = []
    cli.run("infer", lambda config: seen.append(list(sys.argv)), ["prompt=a, b"])
    assert seen == [["infer", "as it was"]] and sys.argv == ["infer", "as it was"]


def test_the_prompts_of_people_through_the_real_command(tmp_path):
    """Without a model the command ends after it has read its options, in which the prompt is repeated by none."""
    for prompt in ('He said, "hi" = {x}, [y] $z', "costs ${5} \u00e9"):
        result = run_command("infer", f"prompt={prompt}", "checkpoint=no, model=${x}", cwd=tmp_path, check=False)
        assert result.returncode == 2 and result.stderr.startswith("error: checkpoint=no, model=${x}: ")
