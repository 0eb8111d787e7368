"""The pages of the repository, README.md and docs/, as tests read them: sentences and blocks of code.

A block that cannot run in a test has a comment above it, which a reader of the page does not see::

    <!-- not run: needs a GPU -->
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.support import REPOSITORY

PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "examples/*/*.md") for path in REPOSITORY.glob(pattern))


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        page: the page's path in the repository.
        line: where the block begins in it.
        not_run: why it is not run; None where it is.
    """

    page: str
    line: int
    language: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a shell block, each in words."""
        found: list[list[str]] = []
        for line in self.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):  # a variable for this command
                words = words[1:]
            while "&&" in words:
                found.append(words[: words.index("&&")])
                words = words[words.index("&&") + 1 :]
            found += [words] if words else []
        return found


def command_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Name and arguments, where the words are a command of ours: in its long form, its short one, or by torchrun."""
    if words[0] in ("python", "torchrun") and "-m" in words:
        module = words.index("-m") + 1
        if words[module].startswith("bitnet_lit."):
            return words[module].removeprefix("bitnet_lit."), words[module + 1 :]
    return (words[1], words[2:]) if words[0] == "bitnet-lit" else None


def blocks(path: Path) -> list[Block]:
    """The blocks of a page, in order."""
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


BLOCKS = [block for path in PAGES for block in blocks(path)]
