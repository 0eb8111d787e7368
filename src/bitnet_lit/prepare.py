"""`python -m bitnet_lit.prepare` writes a text corpus as llama2.c shards of token ids, with their tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnet_lit.entry_point import run_command

if TYPE_CHECKING:
    from bitnet_lit.config import PrepareConfig


def _prepare(config: PrepareConfig) -> None:
    import shlex

    from bitnet_lit.data.prepare import prepare
    from bitnet_lit.terminal import console

    prepare(config)
    command = shlex.join(["python", "-m", "bitnet_lit.train", f"data.dir={config.folder}"])
    console(stderr=True).print(f"next: {command}")


def main() -> None:
    """Run the command with the arguments in `sys.argv`."""
    run_command("prepare", _prepare)


if __name__ == "__main__":
    main()
