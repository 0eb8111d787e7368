"""The blocks of code in README.md and docs/ run: commands with sizes that take a second, Python as it stands.

Each page has a folder of its own, as a reader of the page has it: a few texts, shards, a trained run, and the files
that the blocks of any page show. The first line of such a block is the name of its file: `# my_data.py`. A comment
behind print(...) is what it must print.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.docs.pages import BLOCKS, command_of
from tests.forked import ForkServer, call_command
from tests.support import REPOSITORY

RUN_ELSEWHERE = {"examples/my_project/README.md"}  # tests/examples/test_my_project.py
NAMES = ("Lily", "Tom", "Mia", "Ben")
THINGS = ("ball", "cake", "doll", "boat", "shell")
SIZES = ("big", "small", "red")
TINY = {
    "prepare": ["num_stories=120", "num_workers=1"],
    "train": [
        *("model.hidden_size=256", "model.intermediate_size=256", "model.num_hidden_layers=1"),
        *("model.num_attention_heads=4", "model.num_key_value_heads=null", "model.max_position_embeddings=32"),
        *("data.batch_size=2", "trainer.accelerator=cpu", "trainer.precision=32-true", "compile=false"),
        *("trainer.max_tokens=null", "trainer.max_steps=2", "trainer.val_check_interval=2"),
        "trainer.limit_val_batches=1",
        *("callbacks.sample_max_new_tokens=2", "quant.skip=[lm_head]"),
    ],
    "evaluate": [],
    "infer": ["max_new_tokens=3"],
    "export": [],
    "plot": [],
    "report": [],
}


def run_small(name: str, arguments: list[str]) -> None:
    """A command with small sizes, in a child of the fork server; modules of the current folder are found."""
    sys.path.insert(0, "")
    small = [] if "--advise" in arguments else TINY[name]
    if resumed := [Path(word.partition("=")[2]) for word in arguments if word.startswith("resume=")]:
        run = next(folder for folder in [resumed[0], *resumed[0].parents] if (folder / "metrics.json").exists())
        steps = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["steps"] + 1
        small = [f"trainer.max_steps={steps}", f"schedule.total_steps={steps}"]
    if any(word.startswith("model._target_=") for word in arguments):  # it has no sizes of ours
        small = [word for word in small if not word.startswith("model.") or "max_position" in word]
    if name == "prepare" and not any(word.startswith("tokenizer=") for word in arguments):
        small = [*small, "vocab_size=400" if "source=demo" in arguments else "vocab_size=300"]
    call_command(name, [*arguments, *small])


def run_python(code: str) -> None:
    exec(compile(code, "block", "exec"), {"__name__": "block"})


def prepare_reader(folder: Path, server: ForkServer) -> None:
    """Fill a folder with what a reader of the pages has."""
    texts = folder / "texts"
    texts.mkdir()
    stories = [f"One day {name} saw a {thing}. It was {size}." for name in NAMES for thing in THINGS for size in SIZES]
    lines = "".join(f'{{"story": "{story}"}}\n' for story in stories)
    (texts / "a.jsonl").write_text(lines, encoding="utf-8")
    (texts / "b.jsonl").write_text(lines, encoding="utf-8")
    (folder / "prompts.txt").write_text("Once upon a time\nOne day\n", encoding="utf-8")
    for block in BLOCKS:
        if name := re.match(r"# ([\w/]+\.(?:py|yaml))\n", block.code):
            (folder / name[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / name[1]).write_text(block.code, encoding="utf-8")
    for name, arguments in (
        ("prepare", ["source=demo"]),
        ("prepare", ["source=texts/*.jsonl", "out=data/mine"]),
        ("train", ["hydra.run.dir=outputs/2026-01-31/12-00-00"]),
    ):
        result = server.run(run_small, name, arguments, cwd=folder)
        assert result.status == 0, result


def problems_of(page: str, folder: Path, server: ForkServer) -> list[str]:
    """What goes wrong when the blocks of a page are run in order; the first failure ends it."""
    prepared = r"^python -m bitnet_lit.prepare .*\bout=(\S+)"
    for made in re.findall(prepared, (REPOSITORY / page).read_text(encoding="utf-8"), re.M):
        shutil.rmtree(folder / made, ignore_errors=True)  # the reader of this page does not have it yet
    for block in BLOCKS:
        if block.page != page or block.not_run:
            continue
        if block.language == "python":
            result = server.run(run_python, block.code, cwd=folder)
            expected = re.findall(r"^print\(.*\)  # (.+)$", block.code, re.M)
            if result.status or not all(f"{line}\n" in result.output for line in expected):
                return [f"{block}: {result}"]
        elif block.language == "sh":
            for name, arguments in filter(None, map(command_of, block.commands)):
                result = server.run(run_small, name, arguments, cwd=folder)
                if result.status:
                    return [f"{block}: {name} {' '.join(arguments)}: {result}"]
    return []


@pytest.mark.slow
@pytest.mark.timeout(900)  # forty commands, a second or two each where nothing else runs
def test_the_blocks_of_all_pages_run(tmp_path):
    """One test, so that one process prepares the reader's folder and the imports."""
    pages = sorted({block.page for block in BLOCKS if block.language in ("sh", "python")} - RUN_ELSEWHERE)
    reader, problems = tmp_path / "reader", []
    reader.mkdir()
    with ForkServer(imports=["transformers", "peft"]) as server:
        prepare_reader(reader, server)
        for number, page in enumerate(pages):
            shutil.copytree(reader, tmp_path / str(number))
            problems += problems_of(page, tmp_path / str(number), server)
    assert problems == []
