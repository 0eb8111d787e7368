"""What README.md and docs/ say is so: links lead somewhere; files, keys, commands and targets that they name exist."""

import re
from pathlib import Path

import pytest

from bitnet_lit.__main__ import COMMANDS
from bitnet_lit.cli import compose
from bitnet_lit.composed_config import CONF_DIR, SCHEMAS
from tests.docs.pages import BLOCKS, PAGES, command_of, prose
from tests.support import REPOSITORY

SOURCE = REPOSITORY / "src" / "bitnet_lit"
ELSEWHERE = {".", "bash", "cd", "git", "make", "pip", "pytest", "python3", "sbatch"}
"""Programs of a block that are no command of ours: what they name is looked at, and they are not run."""
NOT_KEYS = {"hydra.run.dir", "hydra.sweep.dir", "group", "key", "weights_only"}
"""What stands before a = in a sentence and is no key of a schema."""


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
            group = key and key[1].partition(".")[0]
            if key and "(" not in span and not (f"{group}._target_=" in span and "_target_" not in key[1]):
                typed = re.split(r"\._target_|\.extra\.|\.settings\.", key[1])[0]  # what is behind it is the user's own
                assert typed in known_keys, f"{path.name}: `{span}`"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "sh"], ids=str)
def test_commands_and_flags_of_a_block_exist(block):
    """Of blocks that are not run too: a command composes, and another program is one that is known."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for words in block.commands:
        if command := command_of(words):
            name, arguments = command
            assert name in COMMANDS, f"{block}: {words}"
            if block.not_run and name in SCHEMAS:  # lm_eval has flags of its own
                composed_config(name, [word.partition(",")[0] for word in arguments if "=" in word])
        elif words[0] == "make":
            assert all(re.search(rf"^{target}:", makefile, re.M) for target in words[1:]), f"{block}: {words}"
        else:
            program = Path(words[0]).name if words[0].startswith(".venv/") else words[0]
            assert program in ELSEWHERE | {"pre-commit"}, f"{block}: {words}"
            for word in words[1:]:
                if word.startswith("tests/"):
                    assert (REPOSITORY / word.partition("::")[0]).exists(), f"{block}: {word}"


def test_the_readme_leads_to_every_page():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in REPOSITORY.glob("docs/*.md") if f"](docs/{path.name})" not in text]
    pictures = {path.name for path in REPOSITORY.glob("docs/*.png")}
    shown = {Path(name).name for page in PAGES for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", prose(page))}
    assert shown == pictures


def test_the_readme_is_short_and_draws_the_tree():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    layout = text[text.index("## Layout") :]
    modules = [path for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    names = [path.name + "/" * path.is_dir() for path in modules if path.name != "__init__.py"]
    assert not [name for name in names if not re.search(rf"(?<![\w/]){re.escape(name)}", layout)]
