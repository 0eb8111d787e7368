"""What users write in Python: signatures, their documentation, their errors, and what a type checker says of them."""

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args

import pytest

import bitnet_lit
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.cli import compose
from bitnet_lit.config import EngineConfig, GenerationConfig, InferConfig, QuantConfig
from bitnet_lit.config.inference import ENGINES, HEADS, KV_CACHES
from bitnet_lit.errors import UserError
from bitnet_lit.inference.language_model import LanguageModel
from tests.support import tiny_model

SOURCES = Path(bitnet_lit.__file__).parents[1]
METHODS = [LanguageModel.generate, LanguageModel.stream, LanguageModel.generate_batch, LanguageModel.stream_batch]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("public") / "model"
    save_model_folder(folder, tiny_model(), QuantConfig(), tokenizer)
    return folder


def declared(cls):
    """Name to (type as it is written, default) of a dataclass's fields; an empty list is the same as no texts."""
    fields = {}
    for field in dataclasses.fields(cls):
        if field.default_factory is list:
            fields[field.name] = ("str | Sequence[str]", ())
        else:
            fields[field.name] = (field.type, field.default)
    return fields


def keywords(function, leave_out):
    """The same of a function's keywords; a Literal is the `str` of the schema."""
    parameters = inspect.signature(function).parameters.values()
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return {
        parameter.name: ("str" if "Literal" in parameter.annotation else parameter.annotation, parameter.default)
        for parameter in parameters
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name not in leave_out
    }


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_signatures_of_generation_are_the_declared_options(method):
    assert keywords(method, leave_out=("index",)) == declared(GenerationConfig)


def test_the_signature_of_load_is_the_declared_options():
    assert keywords(bitnet_lit.load, leave_out=("tokenizer", "schemes")) == declared(EngineConfig)
    annotations = {name: each.annotation for name, each in inspect.signature(bitnet_lit.load).parameters.items()}
    for name, allowed in (("engine", ENGINES), ("head", HEADS), ("kv_cache", KV_CACHES)):
        assert get_args(eval(annotations[name], {"Literal": Literal})) == allowed


def test_the_command_line_has_all_options_as_plain_keys():
    keys = declared(InferConfig)
    assert keys.items() >= (declared(GenerationConfig) | declared(EngineConfig)).items()
    options = {"checkpoint": "path", "schemes": "schemes", "tokenizer": "tokenizer"}
    assert (
        options.keys() <= keys.keys() and set(options.values()) <= inspect.signature(bitnet_lit.load).parameters.keys()
    )


def test_every_argument_is_documented():
    for function in (LanguageModel.generate, bitnet_lit.load):
        documented = inspect.getdoc(function)
        for name in inspect.signature(function).parameters.keys() - {"self"}:
            assert f"    {name}: " in documented, f"{function.__name__}: {name}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 1.0),
        ("repeat_penalty", 0.0),
        ("repeat_last_n", -5),
        ("max_new_tokens", -1),
        ("seed", 2**200),
    ],
    ids=str,
)
def test_a_wrong_value_is_the_line_of_the_command_line(folder, key, value):
    with pytest.raises(UserError) as typed:
        compose("infer", [f"{key}={value}"])
    model = bitnet_lit.load(folder, engine="torch")
    for method in (model.generate, model.stream):
        with pytest.raises(UserError) as given:
            method("Lily", **{key: value})
        assert str(given.value) == str(typed.value) and key in str(typed.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 1.5),
        ("max_new_tokens", None),
        ("top_k", True),
        ("temperature", "0.5"),
        ("seed", 0.5),
        ("stop", [1]),
        ("stop", 5),
        ("stop", b"x"),
        ("index", -1),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_one_line(folder, key, value):
    with pytest.raises(UserError, match=rf"^{key}=.*: must ") as error:
        bitnet_lit.load(folder, engine="torch").generate("Lily", **{key: value})
    assert "\n" not in str(error.value)


def test_wrong_keywords_are_type_errors(folder):
    model = bitnet_lit.load(folder, engine="torch")
    for call in (lambda: bitnet_lit.load(folder, motor="cpu"), lambda: bitnet_lit.load(folder, "cpu")):
        with pytest.raises(TypeError):
            call()
    for method in (model.generate, model.stream, model.generate_batch, model.stream_batch):
        with pytest.raises(TypeError, match="temprature"):
            method("Lily", temprature=0.5)


def test_several_prompts_go_to_the_methods_for_several(folder):
    model = bitnet_lit.load(folder, engine="torch")
    with pytest.raises(UserError, match=r"prompt=\['Lily'\]: must be a text; generate_batch"):
        model.generate(["Lily"])
    for prompts in ("Lily", 5, [5]):
        with pytest.raises(UserError, match="prompts=.*: must be a list of texts"):
            model.generate_batch(prompts)


def test_a_stop_text_alone_or_in_any_sequence(folder):
    model = bitnet_lit.load(folder, engine="torch")
    whole = model.generate("Lily", seed=3, max_new_tokens=20)
    stop = whole[len("Lily") + 3 :][:4]
    texts = {model.generate("Lily", seed=3, max_new_tokens=20, stop=each) for each in (stop, [stop], (stop, stop))}
    assert texts == {"Lily" + whole.removeprefix("Lily").split(stop)[0]}


USER = """
import bitnet_lit

model: bitnet_lit.LanguageModel = bitnet_lit.load("model", engine="cpu", threads=2, kv_cache="int8")
text: str = model.generate("Once", max_new_tokens=10, temperature=0.5, stop="x")
pieces = [piece.upper() for piece in model.stream("Once", seed=1)]
texts: list[str] = model.generate_batch(["a", "b"], stop=["x", "y"])
number, piece = next(iter(model.stream_batch(("a", "b"), top_k=5)))
rate: float = model.statistics.new_tokens / model.statistics.new_seconds
size: int = model.config.hidden_size
name: str = model.engine.name
try:
    bitnet_lit.load("nowhere")
except bitnet_lit.UserError as error:
    print(error)

model.generate("x", temprature=1)  # error: Unexpected keyword argument "temprature"
model.generate("x", temperature="1")  # error: incompatible type "str"; expected "float"
model.generate("x", 100)  # error: Too many positional arguments
model.generate(["x"])  # error: incompatible type "list[str]"; expected "str"
model.stream("x", seed=0.5)  # error: incompatible type "float"; expected "int | None"
model.generate_batch(["x"], top_n=3)  # error: Unexpected keyword argument "top_n"
bitnet_lit.load("model", engine="gpu")  # error: incompatible type
bitnet_lit.load("model", engines="cpu")  # error: Unexpected keyword argument "engines"
bitnet_lit.laod("model")  # error: Module has no attribute "laod"
"""

# torch and numpy are large, and none of their types matters here.
MYPY = """
[mypy]
strict = True
cache_dir = cache
[mypy-bitnet_lit.*]
follow_imports = silent
[mypy-torch.*,numpy.*]
follow_imports = skip
"""


@pytest.mark.slow
def test_a_type_checker_finds_wrong_arguments_and_nothing_else(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(MYPY)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-error-summary", "user.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(SOURCES), "PATH": ""},
        capture_output=True,
        text=True,
    )
    expected = {
        number: line.split("# error: ")[1] for number, line in enumerate(USER.splitlines(), 1) if "# error" in line
    }
    found = {}
    for line in result.stdout.splitlines():
        file, number, kind, message = line.split(":", 3)
        assert file == "user.py", line
        if kind.strip() == "error":
            found.setdefault(int(number), message)
    assert found.keys() == expected.keys(), result.stdout + result.stderr
    assert not [number for number, message in found.items() if expected[number] not in message], result.stdout


def test_the_package_names_what_it_offers():
    assert {"load", "LanguageModel", "UserError", "ModelError"} <= set(dir(bitnet_lit))
    assert bitnet_lit.UserError is UserError and bitnet_lit.LanguageModel is LanguageModel
    with pytest.raises(AttributeError, match="laod"):
        bitnet_lit.laod  # noqa: B018
    assert (SOURCES / "bitnet_lit" / "py.typed").is_file()
