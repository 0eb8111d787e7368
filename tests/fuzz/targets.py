"""What the fuzzer does with a damaged thing: what a user does with a whole one.

A kind is an original, the file of it that is damaged, and the commands that are tried on it, one for each input. All of
an input is drawn from its name, "<seed> <kind> <number>", so the same name is the same input on every machine.

A command may do its work, or say in one line what is wrong. Everything else is a fault: a traceback, a second line, a
crash, a number that is none, more than SECONDS or more than MEMORY.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from bitnet_lit.config import EvaluateConfig, ExportConfig, InferConfig, PrepareConfig, TrainConfig
from bitnet_lit.errors import LONGEST_LINE
from tests.forked import call_command
from tests.fuzz.mutators import NUMBERS, TEXTS, damage, value
from tests.fuzz.originals import TRAIN

SECONDS, MEMORY = 60, 4 * 2**30
TOO_LATE = 75  # an exit status that nothing else has
Target = Callable[[str, Random], None]


def _through(work: Callable[[], Any]) -> None:
    """Do the work of a command, without Hydra, and end as a command ends."""
    from bitnet_lit.entry_point import leave

    leave(work)


def infer(path: str, draw: Random, engine: str = "cpu") -> None:
    from bitnet_lit.inference.print_texts import infer

    options = {"engine": engine, "threads": 1, "max_new_tokens": 6, "prompt": "Once upon a time", "seed": 1}
    options |= draw.choice(
        [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}, {"kv_cache": "int8"}, {"head": "int4"}]
    )
    _through(lambda: infer(InferConfig(checkpoint=path, **options)))


def infer_torch(path: str, draw: Random) -> None:
    infer(path, draw, engine="torch")


def infer_prompts(path: str, draw: Random) -> None:
    from bitnet_lit.inference.print_texts import infer

    _through(lambda: infer(InferConfig(checkpoint="latent", prompts=path, max_new_tokens=3, threads=1)))


def evaluate(path: str, draw: Random) -> None:
    from bitnet_lit.inference.evaluation import evaluate

    _through(lambda: print(evaluate(EvaluateConfig(checkpoint=path, data_dir="data", sequence_length=31))))


def export(path: str, draw: Random) -> None:
    from bitnet_lit.exports.write import export

    options = {"format": draw.choice(["latent", "packed", "llama2c", "gguf"])}
    options |= {"gguf": {"type": "f16"}, "latent": {"dtype": draw.choice(["float32", "bfloat16"])}}.get(
        options["format"], {}
    )
    # transformers and llama.cpp take seconds: the export's own tests run them
    _through(lambda: export(ExportConfig(checkpoint=path, out="exported", verify=False, **options)))


def export_verified(path: str, draw: Random) -> None:
    from bitnet_lit.exports import compare
    from bitnet_lit.exports.write import export

    compare._run_tool = lambda *_: "left out"
    _through(lambda: export(ExportConfig(checkpoint=path, out="exported", format=draw.choice(["latent", "packed"]))))


def evaluate_on(path: str, draw: Random) -> None:
    from bitnet_lit.inference.evaluation import evaluate

    _through(lambda: print(evaluate(EvaluateConfig(checkpoint="latent", data_dir=path, sequence_length=31))))


def train_on(path: str, draw: Random) -> None:
    call_command("train", [f"data.dir={path}", *TRAIN, "trainer.max_steps=1", "hydra.run.dir=trained"])


def prepare_again(path: str, draw: Random) -> None:
    from bitnet_lit.data.prepare import prepare

    options = {"source": "demo", "num_stories": 60, "vocab_size": 512, "num_workers": 1}
    _through(lambda: prepare(PrepareConfig(out=path, **options)))


def prepare_from(path: str, draw: Random) -> None:
    from bitnet_lit.data.prepare import prepare

    _through(lambda: prepare(PrepareConfig(source=path, out="prepared", vocab_size=270, num_workers=1)))


def resume(path: str, draw: Random) -> None:
    call_command("train", [f"resume={path}/run", "trainer.max_steps=4", "schedule.total_steps=4"])


def init_from(path: str, draw: Random) -> None:
    overrides = [*TRAIN, "trainer.max_steps=1", "hydra.run.dir=trained"]
    call_command(
        "train",
        ["data.dir=data", *overrides, f"init_from={path}", draw.choice(["init_optimizer=false", "compile=auto"])],
    )


def plot(path: str, draw: Random) -> None:
    call_command("plot", [f"runs={path}", "out=curves.png"])


def report(path: str, draw: Random) -> None:
    call_command("report", [f"runs={path}", "out=report"])


def infer_run(path: str, draw: Random) -> None:
    infer(f"{path}/run", draw)


COMMANDS = {"infer": InferConfig, "evaluate": EvaluateConfig, "export": ExportConfig, "prepare": PrepareConfig}
UNENDING = (
    "max_steps",
    "max_tokens",
    "accumulate",
    "num_workers",
    "val_check_interval",
    "limit_val_batches",
    "devices",
)


def _keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema."""
    for field in dataclasses.fields(schema):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
        if dataclasses.is_dataclass(default):
            yield from _keys(default, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _typed(draw: Random) -> str:
    """A value as it could be typed."""
    what = value(draw)
    if draw.random() < 0.2:
        what = "".join(draw.choice("[]{}()'\"$,:=\\ \n\t.-+~!#&*?<>|^%@`é日0aZ") for _ in range(draw.randrange(1, 12)))
    text = what if isinstance(what, str) else json.dumps(what)
    return text.replace("\0", "").encode("utf-8", "replace").decode()[:3000]


def overrides(path: str, draw: Random) -> None:
    """A command line with garbage in it; what it would do is left out."""
    from bitnet_lit.entry_point import run_command

    name = draw.choice([*COMMANDS, "train", "train"])
    keys = list(_keys(COMMANDS.get(name, TrainConfig)))
    groups = [
        "model",
        "quant",
        "optim",
        "schedule",
        "trainer",
        "mode",
        "logger",
        "callbacks",
        "experiment",
        "hydra.run.dir",
    ]
    arguments = []
    for _ in range(draw.choice([1, 1, 2])):
        key = draw.choice(
            [draw.choice(keys), draw.choice(keys), draw.choice(groups), draw.choice(TEXTS), "hydra.job.name"]
        )
        sign = draw.choice(["", "", "", "+", "++", "~"])
        arguments.append(draw.choice([f"{sign}{key}={_typed(draw)}", f"{sign}{key}={_typed(draw)}", f"{sign}{key}"]))
    if draw.random() < 0.1:
        arguments.append(
            draw.choice(["-m", "--cfg=job", "--foo", "--help", "-x", "--info", "--resolve", "--config-name=x"])
        )
    sys.argv = [name, *(argument.replace("\0", "") for argument in arguments)]
    print(sys.argv)
    run_command(name, lambda config: print(config))


def values(path: str, draw: Random) -> None:
    """A training run of a step with an absurd value of one key."""
    keys = [key for key in _keys(TrainConfig) if not any(part in key for part in UNENDING) and "dir" not in key]
    key = draw.choice([key for key in keys if key not in ("resume", "init_from")])
    typed = draw.choice([json.dumps(draw.choice(NUMBERS)), json.dumps(draw.choice(NUMBERS)), _typed(draw)])
    print(f"{key}={typed}")
    call_command("train", ["data.dir=data", *TRAIN, "trainer.max_steps=1", "hydra.run.dir=trained", f"{key}={typed}"])


def prompts(path: str, draw: Random) -> None:
    """A story from anything, with any options."""
    prompt = draw.choice([_typed(draw), "".join(chr(draw.randrange(1, 0x110000)) for _ in range(draw.randrange(30)))])
    prompt = prompt.encode("utf-8", "surrogateescape" if draw.random() < 0.1 else "replace").decode(
        "utf-8", "surrogateescape"
    )
    arguments = [
        "checkpoint=latent",
        "threads=1",
        "max_new_tokens=3",
        f"prompt={prompt}",
        f"engine={draw.choice(['cpu', 'torch'])}",
    ]
    numeric = ["temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "seed"]
    for _ in range(draw.choice([0, 0, 1, 2])):
        arguments.append(f"{draw.choice(numeric)}={json.dumps(draw.choice(NUMBERS))}")
    if draw.random() < 0.3:
        arguments.append(f"stop={_typed(draw)}")
    print(arguments)
    call_command("infer", arguments)


@dataclass(frozen=True)
class Kind:
    """What is damaged, and what is tried on it.

    Attributes:
        original: below the folder of originals; "" for none.
        damaged: a glob below it; "" where the original is a file.
        targets: one of them is drawn for each input.
        needs: other originals that the targets read, whole.
    """

    original: str
    damaged: str
    targets: tuple[Target, ...]
    needs: tuple[str, ...] = ()


MODEL: tuple[Target, ...] = (infer, infer, infer_torch, evaluate, export, export_verified)
KINDS = {
    "weights": Kind("latent", "model.safetensors", (*MODEL, init_from), ("data",)),
    "packed-weights": Kind("packed", "model.safetensors", MODEL, ("data",)),
    "hub-weights": Kind("hub", "model.safetensors", MODEL, ("data",)),
    "config": Kind("latent", "config.json", (*MODEL, init_from), ("data",)),
    "packed-config": Kind("packed", "config.json", MODEL, ("data",)),
    "hub-config": Kind("hub", "config.json", MODEL, ("data",)),
    "bitnet-config": Kind("hub_bitnet", "config.json", MODEL, ("data",)),
    "generation-config": Kind("latent", "generation_config.json", (infer, export)),
    "tokenizer-model": Kind("latent", "tokenizer.model", (infer, infer, evaluate, export), ("data",)),
    "tokenizer-json": Kind("byte_level", "tokenizer.json", (infer, infer, infer_torch, export)),
    "tokenizer-json-metaspace": Kind("metaspace", "tokenizer.json", (infer, infer, infer_torch, export)),
    "tokenizer-config": Kind("byte_level", "tokenizer_config.json", (infer, export)),
    "index": Kind("sharded", "model.safetensors.index.json", (infer, export)),
    "part": Kind("sharded", "model-00001-of-*.safetensors", (infer, export)),
    "bin": Kind("stories.bin", "", (infer, infer, infer_torch, export)),
    "pt": Kind("stories.pt", "", (infer, infer, infer_torch, export)),
    "shard": Kind("data", "data0[01].bin", (evaluate_on, evaluate_on, train_on, prepare_again), ("latent",)),
    "meta": Kind("data", "meta.json", (evaluate_on, evaluate_on, prepare_again, train_on), ("latent",)),
    "data-tokenizer": Kind("data", "tokenizer.model", (evaluate_on, prepare_again, train_on), ("latent",)),
    "text": Kind("texts", "*.*", (prepare_from,)),
    "run-config": Kind("run", "run/config.yaml", (resume, resume, plot, report, infer_run)),
    "run-metrics": Kind("run", "run/metrics.*", (resume, plot, report, report)),
    "run-health": Kind("run", "run/*_health.csv", (resume, report)),
    "run-checkpoint": Kind("run", "run/checkpoints/last.ckpt", (resume,)),
    "prompts-file": Kind("prompts.txt", "", (infer_prompts,), ("latent",)),
    "prompts": Kind("", "", (prompts,), ("latent",)),
    "overrides": Kind("", "", (overrides,)),
    "values": Kind("", "", (values,), ("data",)),
}

# The native engine alone, for a library that was compiled with sanitizers.
ENGINE_KINDS = {
    f"engine-{name}": dataclasses.replace(kind, targets=(infer,), needs=())
    for name, kind in KINDS.items()
    if infer in kind.targets
}


@contextlib.contextmanager
def _captured(path: str) -> Iterator[None]:
    """Stdout and stderr of this process go to a file inside the block; it is there also when the process ends in it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    kept = [os.dup(1), os.dup(2)]
    for number in (1, 2):
        os.dup2(descriptor, number)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, OSError):
                stream.flush()
        for number, original in zip((1, 2), kept, strict=True):
            os.dup2(original, number)
            os.close(original)
        os.close(descriptor)


def _wrong(status: int, output: str) -> str:
    """What is wrong with how a command ended; "" for nothing."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if "Traceback (most recent call last)" in output or "Exception ignored" in output:
        return "traceback"
    if "AddressSanitizer" in output or "runtime error: " in output:
        return "undefined behaviour"
    if status not in (0, 1, 2):
        return f"status {status}"
    if status == 0 and errors:
        return "an error with status 0"
    if status and len(errors) != 1:
        return f"status {status} with {len(errors)} lines of errors"
    if errors and len(errors[0]) > len("error: ") + LONGEST_LINE:
        return f"a line of {len(errors[0])} characters"
    if status == 0 and "'loss': nan" in output:
        return "a loss that is no number"
    return ""


def attempt(name: str, originals: str, folder: str) -> dict[str, Any]:
    """Make an input, try it, and judge; in a process of its own.

    Args:
        name: "<seed> <kind> <number>".
        folder: where the input is made; what was there goes. What is said goes to <folder>.output.

    Returns:
        input, done (what was damaged, what was tried), status, wrong, output, seconds.
    """
    kind, draw, work = {**KINDS, **ENGINE_KINDS}[name.split()[1]], Random(name), Path(folder)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.chdir(work)
    for needed in kind.needs:
        os.symlink(Path(originals) / needed, needed)
    done = ""
    if kind.original:
        source = Path(originals) / kind.original
        copied = Path(source.name)
        if source.is_dir():
            shutil.copytree(source, copied)
        else:
            shutil.copyfile(source, copied)
        damaged = sorted(copied.glob(kind.damaged)) if kind.damaged else [copied]
        done = damage(draw.choice(damaged), draw)
    target = draw.choice(kind.targets)
    started, status = time.monotonic(), 0
    faulthandler.dump_traceback_later(SECONDS - 5, file=2)
    signal.alarm(SECONDS)
    said = f"{folder}.output"
    with _captured(said):
        try:
            target(Path(kind.original).name, draw)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            status = 1
            traceback.print_exc()
    text = Path(said).read_text(encoding="utf-8", errors="replace")
    signal.alarm(0)
    faulthandler.cancel_dump_traceback_later()
    return {
        "input": name,
        "done": f"{done}, {target.__name__}",
        "status": status,
        "wrong": _wrong(status, text),
        "output": text[-2500:],
        "seconds": time.monotonic() - started,
    }


def batch(names: list[str], originals: str, folder: str, results: str, until: float) -> None:
    """Try inputs one after the other in this process, the first in any case; a line of `results` for each.

    Raises:
        SystemExit: TOO_LATE, with inputs left that were not tried.
    """
    for name in names:
        found = attempt(name, originals, folder)
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        if time.time() > until:
            sys.exit(TOO_LATE)
