"""`bitnet-lit <command> [key=value ...]` does the same as `python -m bitnet_lit.<command> [key=value ...]`.

The module of the command runs under the name `__main__`, as with `python -m`. Lightning needs that: it starts the other
ranks of a distributed run with the module that it finds under that name.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import runpy
import sys

COMMANDS = {
    "prepare": "text to shards of token ids and a tokenizer",
    "train": "shards to a run folder with a model folder in it; sweeps with -m",
    "evaluate": "loss, perplexity, bits per byte and accuracy on the validation split or on text",
    "lm_eval": "tasks of the lm-evaluation-harness, with its own flags",
    "infer": "a model continues a prompt",
    "export": "packed codes, GGUF and other formats, each compared with the model",
    "report": "runs compared: mean and interval over seeds, gap to the dense model; a table and a page",
    "plot": "loss curves of runs, as a PNG",
    "bench": "speed beside PyTorch, transformers and llama.cpp, with JSON in the last line",
}
"""Each command is the module of that name in this package. They are listed in the order in which they are used."""

_HELP = """\
Train, study and ship 1.58-bit language models: bitnet-lit <command> [key=value ...]

{commands}

bitnet-lit <command> --help lists the keys of a command. python -m bitnet_lit.<command> is the same.
"""


def _import_from_here() -> None:
    """Make modules of the current folder importable. `python -m` does that by itself, a console script does not."""
    with contextlib.suppress(OSError):  # a folder that has been removed; the command says so
        if os.getcwd() not in sys.path and not getattr(sys.flags, "safe_path", False):  # safe_path: Python 3.11's -P
            sys.path.insert(0, os.getcwd())


def _print_help() -> None:
    width = max(map(len, COMMANDS))
    print(_HELP.format(commands="\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())), end="")


def _print_version() -> None:
    from bitnet_lit import __version__

    print(f"bitnet-lit {__version__}")


def _refuse(command: str) -> None:
    from bitnet_lit.errors import UserError

    begin_so = [name for name in COMMANDS if command and name.startswith(command)]
    near = begin_so or difflib.get_close_matches(command, COMMANDS, n=1)
    remedy = f"did you mean '{near[0]}'?" if near else f"take one of {', '.join(COMMANDS)}"
    raise UserError(f"unknown command '{command}': {remedy}")


def main() -> None:
    """Run the command that was typed. The console script `bitnet-lit` and `python -m bitnet_lit` call this function."""
    from bitnet_lit.entry_point import leave

    command, *arguments = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        sys.argv[1:] = arguments
        _import_from_here()
        runpy.run_module(f"bitnet_lit.{command}", run_name="__main__", alter_sys=True)
    elif command in ("-h", "--help", "help"):
        leave(_print_help)
    elif command == "--version":
        leave(_print_version)
    else:
        leave(lambda: _refuse(command))


if __name__ == "__main__":
    main()
