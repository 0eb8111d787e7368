"""The commands whose runs are broken at every file operation, and what a folder looks like when nothing is missing.

A scenario is a folder, a command that writes into it, and the command that a user gives after the first one was
broken. Whatever happened in between, the folder must then hold what an unbroken command leaves: byte for byte, but for
what measures time.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import QuantConfig
from bitnet_lit.data.tokenizers import open_tokenizer
from tests.faults.fault_layer import Fault, Faults, Operation
from tests.forked import Result, call_command
from tests.support import TINY_RUN, tiny_model

OLD_MODEL, MODEL = "old", "model"
NOTES = "what the user wrote beside it\n"


@dataclass(frozen=True)
class Scenario:
    """A command and its surroundings.

    Attributes:
        name: of the test.
        command, arguments: the command line.
        resumes: a broken run goes on with resume=run; other commands are given again.
        older: the arguments of an export that was there before, of another model; the user has put a file into it.
        target: below the folder, what an older export wrote; "" without one.
        sampled: how many points CI tries.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    resumes: bool = False
    older: tuple[str, ...] = ()
    target: str = ""
    sampled: int = 8


def _train(name: str, *arguments: str, sampled: int) -> Scenario:
    small = ("trainer.max_steps=6", "trainer.val_check_interval=2", "model.num_hidden_layers=1")
    run = ("data.dir=data", *TINY_RUN, *small, "hydra.run.dir=run", *arguments)
    return Scenario(name, "train", run, resumes=True, sampled=sampled)


def _export(name: str, target: str, *arguments: str) -> list[Scenario]:
    made, older = ((f"checkpoint={model}", f"out={target}", "verify=false", *arguments) for model in (MODEL, OLD_MODEL))
    return [
        Scenario(name, "export", made, sampled=5),
        Scenario(f"{name}-again", "export", made, older=older, target=target, sampled=8),
    ]


SCENARIOS = [
    _train("train", "callbacks.checkpoint_every_n_steps=1", sampled=12),
    # The first validation is the best one: what comes after it only has to keep it.
    _train("train-worse", "optim.learning_rate=3", "schedule=wsd", "seed=3", sampled=8),
    Scenario("prepare", "prepare", ("source=texts", "out=data", "vocab_size=300", "num_workers=1"), sampled=10),
    # Its processes write the shards; the one that is killed is their parent, which notes them.
    Scenario(
        "prepare-processes", "prepare", ("source=texts", "out=data", "vocab_size=300", "num_workers=2"), sampled=2
    ),
    Scenario("plot", "plot", ("runs=run", "out=curves.png"), sampled=4),
    *_export("latent", "exported", "format=latent"),
    *_export("packed", "exported", "format=packed"),
    *_export("gguf", "exported.gguf", "format=gguf", "type=f16", "embeddings=f16"),
    *_export("llama2c", "exported", "format=llama2c"),
]


def fill(folder: Path, scenario: Scenario, shards: Path, faults: Faults) -> None:
    """What the command of a scenario finds."""
    folder.mkdir(parents=True)
    tokenizer = open_tokenizer(shards / "tokenizer.model")
    if scenario.command == "train":
        shutil.copytree(shards, folder / "data")
    elif scenario.command == "prepare":
        (folder / "texts").mkdir()
        for name in "abc":
            stories = [f"Story {number} of {name}. Once upon a time there was a cat." for number in range(60)]
            (folder / "texts" / f"{name}.txt").write_text("\n<|endoftext|>\n".join(stories))
    elif scenario.command == "plot":
        (folder / "run").mkdir()
        (folder / "run" / "metrics.csv").write_text("step,val/loss\n1,3.5\n2,3.25\n")
        (folder / "run" / "config.yaml").write_text("quant:\n  name: b158\n")
        (folder / "curves.png").write_bytes(b"the curves of yesterday")
    else:
        for seed, name in enumerate((MODEL, OLD_MODEL)):
            model = tiny_model(seed=seed, sub_norm=False, num_hidden_layers=1)
            save_model_folder(folder / name, model, QuantConfig(), tokenizer, {"step": seed})
        if scenario.older:
            result = faults.server.run(call_command, scenario.command, scenario.older, cwd=folder)
            assert result.status == 0, result
            if (folder / scenario.target).is_dir():
                (folder / scenario.target / "NOTES.txt").write_text(NOTES)


def finish(faults: Faults, scenario: Scenario, folder: Path, fault: Fault | None = None) -> list[Result]:
    """What a user does after a command was broken: resume the run, or give the command again.

    Of a run that was killed before its first checkpoint, `resume` says that there is nothing to go on with; then the
    same command starts it afresh, in the same folder.
    """
    commands: list[Sequence[str]] = [scenario.arguments]
    if scenario.resumes and (folder / "run").is_dir():
        commands.insert(0, ["resume=run"])
    results = []
    for arguments in commands:
        if fault is None:
            result = faults.server.run(call_command, scenario.command, arguments, cwd=folder)
        else:
            result, _ = faults.run(fault, folder, call_command, scenario.command, arguments, cwd=folder)
        results.append(result)
        nothing_yet = arguments is not scenario.arguments and result.status == 2 and "start" in result.output
        if not nothing_yet:
            break
    return results


def _figures(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.startswith("perf/")}


def _plain(value: Any) -> Any:
    """A checkpoint's content without storages and addresses."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.flatten().view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {key: _plain(below) for key, below in value.items() if not str(key).startswith("perf/")}
    if isinstance(value, list | tuple):
        return [_plain(below) for below in value]
    return value


def _content(path: Path) -> Any:
    """What a file holds, without what measures time."""
    if path.name == "metrics.csv":
        return [_figures(row) for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))]
    if path.name == "metrics.json":
        return _figures(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".ckpt":
        return _plain(torch.load(path, weights_only=True))
    return path.read_bytes()


def holds(folder: Path) -> dict[str, Any]:
    """Everything in a folder, hidden and temporary files included, but Hydra's records of the single commands."""
    return {
        str(path.relative_to(folder)): _content(path) if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".hydra") for part in path.relative_to(folder).parts)
    }


def _difference(now: Any, expected: Any, where: str) -> list[str]:
    if isinstance(now, dict) and isinstance(expected, dict):
        found = []
        for key in sorted({*now, *expected}, key=str):
            if key not in now:
                found.append(f"{where}{key}: is missing")
            elif key not in expected:
                found.append(f"{where}{key}: is too much")
            else:
                found += _difference(now[key], expected[key], f"{where}{key}: ")
        return found
    if isinstance(now, list) and isinstance(expected, list):
        if len(now) != len(expected):
            return [f"{where}{len(now)} entries for {len(expected)}"]
        return [
            line
            for i, (a, b) in enumerate(zip(now, expected, strict=True))
            for line in _difference(a, b, f"{where}[{i}] ")
        ]
    if now == expected:
        return []
    if isinstance(now, bytes) and isinstance(expected, bytes):
        same = next((i for i, (a, b) in enumerate(zip(now, expected, strict=False)) if a != b), 0)
        at = max(0, same - 40)
        now, expected = now[at : at + 100], expected[at : at + 100]
    return [f"{where}{now!r} for {expected!r}"]


def differences(now: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What is missing, too much, or other than it should be; a line each, at most five."""
    found = _difference(now, expected, "")
    folders = [line.partition(": ")[0] + "/" for line in found]
    return [line for line in found if not line.startswith(tuple(folders))][:5]


def not_flushed(operations: list[Operation]) -> list[str]:
    """Renames whose content could be lost with the power: a file in it was written and not flushed before.

    A kill of a process loses nothing that it wrote; a power cut does. There the name may be on the disk and the bytes
    not: an empty file where a checkpoint was.
    """
    unsafe, written = [], set()
    for operation in operations:
        if operation.name in ("create", "write", "truncate"):
            written.add(operation.path)
        elif operation.name == "fsync":
            written.discard(operation.path)
        elif operation.name in ("rename", "exchange"):
            if lost := [path for path in sorted(written) if (path + "/").startswith(operation.source + "/")]:
                unsafe.append(f"{operation}: {lost[0]} was not flushed")
            written -= set(lost)
    return unsafe
