"""The README and docs/ say what is so: links lead somewhere, names exist, and the blocks of code run.

A block that cannot run here has a comment above it, which a reader of the page does not see:

    <!-- not run: needs a GPU -->

The others run one after the other in a folder that holds a small corpus and a trained model, with sizes that take a
second. Where a line ends in a comment behind print(...), the comment is what it must print.
"""

import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bitnet_lit.__main__ import COMMANDS
from bitnet_lit.cli import CONF_DIR, SCHEMAS, compose
from tests.forked import ForkServer, call_command
from tests.support import REPOSITORY

PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "examples/*/*.md") for path in REPOSITORY.glob(pattern))
SOURCE = REPOSITORY / "src" / "bitnet_lit"
ELSEWHERE = {".", "cd", "git", "make", "pip", "pytest", "python3"}
"""Programs of a block that are no command of ours: what they name is looked at, and they are not run."""
NOT_KEYS = {"hydra.run.dir", "hydra.sweep.dir", "group", "key", "weights_only"}
"""What stands before a = in a sentence and is no key of a schema."""
TINY = {
    "prepare": ["num_stories=120", "num_workers=1"],
    "train": [
        *("model.hidden_size=256", "model.intermediate_size=256", "model.num_hidden_layers=1"),
        *("model.num_attention_heads=4", "model.num_key_value_heads=null", "model.max_position_embeddings=32"),
        *("data.batch_size=2", "trainer.accelerator=cpu", "trainer.precision=32-true", "compile=false"),
        *(
            "trainer.max_tokens=null",
            "trainer.max_steps=2",
            "trainer.val_check_interval=2",
            "trainer.limit_val_batches=1",
        ),
        *("callbacks.sample_max_new_tokens=2", "quant.skip=[lm_head]"),
    ],
    "evaluate": [],
    "infer": ["max_new_tokens=3"],
    "export": [],
    "plot": [],
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and why it is not run, where it is not."""

    page: str
    line: int
    language: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> list[Block]:
    found = []
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"(?:^<!-- not run: (.+) -->\n)?^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        reason, language, code = match.groups()
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(str(path.relative_to(REPOSITORY)), line, language, code, reason))
    return found


def prose(path: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


RUN_ELSEWHERE = {"examples/my_project/README.md"}  # tests/examples/test_my_project.py
BLOCKS = [block for path in PAGES for block in blocks(path)]
SHELL = [block for block in BLOCKS if block.language == "sh"]


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, in words."""
    lines = [shlex.split(line, comments=True) for line in block.code.replace("\\\n", " ").splitlines()]
    found: list[list[str]] = []
    for words in lines:
        while "&&" in words:
            found.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        found += [words] if words else []
    return found


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """Command and arguments of a line, where it is one of ours; variables and taskset before it are left out."""
    if words[0] == "taskset":
        words = words[3:]
    return (words[1], words[2:]) if words[0] == "bitnet-lit" else None


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), f"{path.name}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_that_a_page_names_are_there(path):
    roots = [REPOSITORY, SOURCE, path.parent]
    for name in re.findall(
        r"`([\w./-]+/[\w./-]*\.(?:py|h|cpp|yaml|md)|(?:tests|docs|conf|examples)/[\w/]*)`", prose(path)
    ):
        assert any((root / name).exists() for root in roots), f"{path.name}: {name}"


def keys_of(config: object, prefix: str = "") -> set[str]:
    """Every dotted key of a dataclass."""
    keys = set()
    for name, value in vars(config).items():
        keys.add(prefix + name)
        if hasattr(value, "__dataclass_fields__"):
            keys |= keys_of(value, f"{prefix}{name}.")
    return keys


def composed_config(command: str, overrides: list[str]) -> object:
    return compose(command, ["run_dir=unused", *overrides] if command == "train" else overrides)


@pytest.fixture(scope="module")
def known_keys() -> set[str]:
    composed = [composed_config(command, []) for command in SCHEMAS]
    keys = set().union(*map(keys_of, composed)) | NOT_KEYS
    return keys | {folder.name for folder in Path(CONF_DIR).iterdir() if folder.is_dir()}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_keys_that_a_sentence_names_exist(path, known_keys):
    for span in re.findall(r"`([^`\n]+)`", prose(path)):
        for word in span.split():
            key = re.fullmatch(r"'?\+?([a-z_]+(?:\.[a-z_]+)*)=.*", word)
            if key and "(" not in span:
                typed = re.split(r"\._target_|\.extra\.|\.settings\.", key[1])[0]  # what is behind it is the user's own
                assert typed in known_keys, f"{path.name}: `{span}`"


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_and_flags_of_a_block_exist(block):
    """Of blocks that are not run too: a command composes, and another program is one that is known."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for words in commands(block):
        if command := ours(words):
            name, arguments = command
            assert name in COMMANDS, f"{block}: {words}"
            if block.not_run:
                composed_config(name, [word.partition(",")[0] for word in arguments if "=" in word])
        elif words[0] == "make":
            assert all(re.search(rf"^{target}:", makefile, re.M) for target in words[1:]), f"{block}: {words}"
        else:
            program = Path(words[0]).name if words[0].startswith(".venv/") else words[0]
            assert program in ELSEWHERE | {"pre-commit"}, f"{block}: {words}"
            for word in words[1:]:
                if word.startswith("tests/"):
                    assert (REPOSITORY / word.partition("::")[0]).exists(), f"{block}: {word}"


def run_command(name: str, arguments: list[str]) -> None:
    """A command with small sizes, in a child of the fork server; modules of the current folder are found."""
    sys.path.insert(0, "")
    small = [] if "--advise" in arguments else TINY[name]
    if resumed := [Path(word.partition("=")[2]) for word in arguments if word.startswith("resume=")]:
        run = next(folder for folder in [resumed[0], *resumed[0].parents] if (folder / "metrics.json").exists())
        steps = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["steps"] + 1
        small = [f"trainer.max_steps={steps}", f"schedule.total_steps={steps}"]
    if name == "prepare" and not any(word.startswith("tokenizer=") for word in arguments):
        small = [*small, "vocab_size=400" if "source=demo" in arguments else "vocab_size=300"]
    call_command(name, [*arguments, *small])


def run_python(code: str) -> None:
    exec(compile(code, "block", "exec"), {"__name__": "block"})


@pytest.fixture(scope="module")
def server():
    with ForkServer(imports=["transformers", "peft"]) as started:
        yield started


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, server):
    """A folder as a reader of the pages has it: texts, shards, a run."""
    folder = tmp_path_factory.mktemp("reader")
    texts = folder / "texts"
    texts.mkdir()
    stories = [f"One day {name} saw a {thing}. It was {size}." for name in NAMES for thing in THINGS for size in SIZES]
    lines = "".join(f'{{"story": "{story}"}}\n' for story in stories)
    (texts / "a.jsonl").write_text(lines, encoding="utf-8")
    (texts / "b.jsonl").write_text(lines, encoding="utf-8")
    (folder / "prompts.txt").write_text("Once upon a time\nOne day\n", encoding="utf-8")
    for page in PAGES:
        for block in blocks(page):
            if name := re.match(r"# ([\w/]+\.(?:py|yaml))\n", block.code):  # a file of the reader's own
                (folder / name[1]).parent.mkdir(parents=True, exist_ok=True)
                (folder / name[1]).write_text(block.code, encoding="utf-8")
    for name, arguments in (
        ("prepare", ["source=demo"]),
        ("prepare", ["source=texts/*.jsonl", "out=data/mine"]),
        ("train", ["hydra.run.dir=outputs/2026-01-31/12-00-00"]),
    ):
        result = server.run(run_command, name, arguments, cwd=folder)
        assert result.status == 0, result
    return folder


NAMES = ("Lily", "Tom", "Mia", "Ben")
THINGS = ("ball", "cake", "doll", "boat", "shell")
SIZES = ("big", "small", "red")


@pytest.mark.parametrize(
    "page", sorted({block.page for block in BLOCKS if block.language in ("sh", "python")} - RUN_ELSEWHERE)
)
def test_the_blocks_of_a_page_run(page, server, corpus, tmp_path):
    """In order, as a reader types them, in a folder of the page's own."""
    folder = tmp_path / "reader"
    shutil.copytree(corpus, folder)
    for made in re.findall(r"^bitnet-lit prepare .*\bout=(\S+)", (REPOSITORY / page).read_text("utf-8"), re.M):
        shutil.rmtree(folder / made, ignore_errors=True)  # the reader of this page does not have it yet
    for block in (block for block in BLOCKS if block.page == page and not block.not_run):
        if block.language == "python":
            result = server.run(run_python, block.code, cwd=folder)
            assert result.status == 0, f"{block}: {result}"
            for printed in re.findall(r"^print\(.*\)  # (.+)$", block.code, re.M):
                assert f"{printed}\n" in result.output, f"{block}: {result}"
        elif block.language == "sh":
            for words in commands(block):
                if command := ours(words):
                    result = server.run(run_command, *command, cwd=folder)
                    assert result.status == 0, f"{block}: {words}: {result}"


def test_the_readme_is_short_and_draws_the_tree():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    layout = text[text.index("## Layout") :]
    modules = [path for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    names = [path.name + "/" * path.is_dir() for path in modules if path.name != "__init__.py"]
    assert not [name for name in names if not re.search(rf"(?<![\w/]){re.escape(name)}", layout)]
