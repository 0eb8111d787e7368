"""Rules that hold for the whole package: imports run one way, and each thing has one place that knows it.

Inside data/ imports run from tokenizers to the shard folder to sources.
"""

import ast
import re
from graphlib import TopologicalSorter

import pytest

from tests.support import REPOSITORY

SOURCE = REPOSITORY / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((SOURCE / "bitnet_lit").rglob("*.py"))
}


def imported_at_start(module):
    """The project's modules that a module imports when it is imported itself; not those inside functions."""
    names = []
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    found = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return {name for name in found if name in MODULES and name != module}


def test_no_circle_of_imports():
    order = list(TopologicalSorter({module: imported_at_start(module) for module in MODULES}).static_order())
    assert (
        order.index("bitnet_lit.errors")
        < order.index("bitnet_lit.data.prepare")
        < order.index("bitnet_lit.training.run")
    )


@pytest.mark.parametrize("start", ["inference.evaluation", "inference.language_model", "exports.write", "data.prepare"])
def test_a_command_that_trains_nothing_does_not_import_lightning(start):
    """The import takes seconds."""
    pending, seen = [f"bitnet_lit.{start}"], set()
    while pending:
        module = pending.pop()
        seen.add(module)
        pending += imported_at_start(module) - seen
    importing = [name for name in seen if re.search(r"^(import|from) lightning", MODULES[name].read_text(), re.M)]
    assert not importing


@pytest.mark.parametrize(
    ("room", "below"),
    [
        ("bitnet_lit.data.tokenizers", ()),
        ("bitnet_lit.data.shard_folder", ("tokenizers",)),
        ("bitnet_lit.data.sources", ("tokenizers", "shard_folder", "exclusive_folder")),
    ],
)
def test_rooms_of_data_import_those_below_them(room, below):
    modules = [module for module in MODULES if module == room or module.startswith(f"{room}.")]
    imported = {name for module in modules for name in imported_at_start(module) if name.startswith("bitnet_lit.data.")}
    above = [name for name in imported if not name.startswith((room, *(f"bitnet_lit.data.{name}" for name in below)))]
    assert modules and not above


def test_nobody_asks_which_kind_a_tokenizer_is():
    """A kind that is added later must not have to be added elsewhere: the interface answers."""
    asked = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                kinds = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                asked += [f"{module}: {kind}" for kind in kinds if kind in ("SentencePieceTokenizer", "JsonTokenizer")]
    assert not asked


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("meta.json", "bitnet_lit.data.shard_folder"),
        ("tokenizer.model", "bitnet_lit.data.tokenizers.sentencepiece"),
        ("tokenizer.json", "bitnet_lit.data.tokenizers.tokenizer_json"),
        ("tokenizer_config.json", "bitnet_lit.data.tokenizers.tokenizer_json"),
    ],
)
def test_the_name_of_a_file_stands_in_one_place(name, owner):
    knowing = [
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value == name
    ]
    assert knowing == [owner]
