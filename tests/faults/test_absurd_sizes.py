"""Models that claim sizes no model has: each is refused in one line, in little time and memory.

They are opened in a process of its own whose address space is limited, so that a size that a file claims ends in a
MemoryError, not in a machine that swaps. What the process says of each comes back as a line of JSON.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from tests.fuzz.originals import make_models
from tests.parity.test_imports import llama2c_weights, write_pt
from tests.support import REPOSITORY, needs_proc

pytestmark = needs_proc
SECONDS_EACH = 5  # a damaged file is opened in milliseconds; anything near this is a loop over a size it claims
MEMORY = 400 * 2**20  # beyond what the imports and the model itself take
HUGE = [10**12, 2**31, 2**63, -1, 0, 1e308, 10**400]

OPEN_ALL = textwrap.dedent("""
    import json, os, resource, signal, sys, time, traceback
    import torch
    torch.set_num_threads(1)
    import safetensors, sentencepiece, tokenizers
    from bitnet_lit.checkpoints.pretrained import from_pretrained
    from bitnet_lit.checkpoints.locate import find_model, open_stored
    from bitnet_lit.checkpoints.pretrained import build_pretrained
    from bitnet_lit.errors import UserError
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])

    def opened(path):
        model = build_pretrained(open_stored(find_model(path)))
        ids = torch.zeros(1, min(4, model.config.max_position_embeddings), dtype=torch.long)
        with torch.no_grad():
            logits = model.model(ids)
        assert logits.shape == (1, ids.shape[1], model.config.vocab_size)
        if model.tokenizer is not None:
            text = model.tokenizer.decode(model.tokenizer.encode("Once upon a time"))
            assert isinstance(text, str)
        return "works"

    opened(sys.argv[3])  # whatever loads lazily is loaded before memory is measured
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))

    def hangs(*_):
        raise TimeoutError("hangs")

    signal.signal(signal.SIGALRM, hangs)
    for line in sys.stdin:
        path = line.rstrip("\\n")
        started = time.perf_counter()
        signal.alarm(seconds)
        try:
            result = opened(path)
        except UserError as error:
            result = f"UserError: {error}"
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f"{frame.filename}:{frame.lineno}" for frame in frames if "bitnet_lit" in frame.filename]
            result = f"ESCAPED {type(error).__name__}: {str(error)[:120]!r} at {ours[-1:]}"
        signal.alarm(0)
        print(json.dumps([path, result, time.perf_counter() - started]), flush=True)
""")


@pytest.fixture(scope="module")
def originals(tmp_path_factory, tokenizer):
    """One small model of each kind that can be opened, by name: what to open, and which file of it is damaged."""
    root = tmp_path_factory.mktemp("originals")
    make_models(root, tokenizer)
    return root


SIZES = [
    *("num_hidden_layers", "hidden_size", "intermediate_size", "max_position_embeddings", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "sliding_window"),
]


def open_all(paths, original):
    """What a process says of each path; a process that died says nothing of the last one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", OPEN_ALL, str(SECONDS_EACH), str(MEMORY), str(original)],
        input="".join(f"{path}\n" for path in paths),
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPOSITORY,
        timeout=200,
    )
    said = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(said) == len(paths), (paths[len(said)] if len(said) < len(paths) else "", result.stderr[-2000:])
    return said


def judge(said):
    """Nothing escaped, no message is longer than a line that a user reads, nothing took long."""
    bad = [
        f"{path}: {seconds:.1f} s: {result[:300]!r}"
        for path, result, seconds in said
        if not (result == "works" or result.startswith("UserError: "))
        or "\n" in result
        or len(result) > 600
        or seconds > SECONDS_EACH
    ]
    assert not bad, f"{len(bad)}:\n" + "\n".join(bad[:20])


def copy_of(originals, target, model):
    original = originals / model
    if original.is_file():
        target.mkdir()
        shutil.copyfile(original, target / original.name)
        return target / original.name
    shutil.copytree(original, target)
    return target


@pytest.mark.parametrize("model", ["latent", "packed", "hub", "hub_bitnet"])
def test_absurd_sizes_in_a_config_cost_nothing(originals, tmp_path, model):
    paths = []
    for key in SIZES:
        for value in HUGE:
            path = copy_of(originals, tmp_path / f"{key}={str(value)[:20]}", model)
            raw = json.loads((path / "config.json").read_text())
            raw[key] = value
            if key == "rope_theta":
                raw["rope_parameters"] = {"rope_type": "default", "rope_theta": value}
            (path / "config.json").write_text(json.dumps(raw))
            paths.append(path)
    said = open_all(paths, originals / model)
    judge(said)
    for path, result, _ in said:
        if any(size in path for size in ("layers=", "hidden_size=", "intermediate_size=", "vocab_size=")):
            assert result != "works", path


@pytest.mark.parametrize("position", range(7))
def test_absurd_sizes_in_a_bin_cost_nothing(originals, tmp_path, position):
    paths = []
    for value in (0, -1, -(2**31), 2**31 - 1, 2**24, 10**6):
        path = copy_of(originals, tmp_path / str(value), "stories.bin")
        content = path.read_bytes()
        path.write_bytes(
            content[: 4 * position] + value.to_bytes(4, "little", signed=True) + content[4 * position + 4 :]
        )
        paths.append(path)
    said = open_all(paths, originals / "stories.bin")
    judge(said)
    assert all(result.startswith("UserError") for _, result, _ in said)


def test_absurd_sizes_in_a_pt_cost_nothing(originals, tmp_path):
    weights, arguments = llama2c_weights(2, tied=False)
    paths = []
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len"):
        for value in (10**12, 2**63, 0, -1, "x", None, [], float("nan"), float("inf")):
            path = tmp_path / f"{key}={value}.pt"
            write_pt(path, weights, {**arguments, key: value})
            paths.append(path)
    odd = {
        "no_model": lambda state: state.pop("model"),
        "list": lambda state: state.update(model=[]),
        "scalar": lambda state: state["model"].update({"_orig_mod.norm.weight": 3}),
        "integers": lambda state: state["model"].update({"_orig_mod.norm.weight": torch.zeros(48, dtype=torch.int64)}),
        "names": lambda state: state.update(model={1: torch.zeros(2)}),
        "meta": lambda state: state["model"].update({"_orig_mod.norm.weight": torch.zeros(48, device="meta")}),
        "sparse": lambda state: state["model"].update({"_orig_mod.norm.weight": torch.zeros(48).to_sparse()}),
    }
    for name, change in odd.items():
        state = torch.load(originals / "stories.pt", weights_only=True)
        change(state)
        torch.save(state, tmp_path / f"{name}.pt")
        paths.append(tmp_path / f"{name}.pt")
    judge(open_all(paths, originals / "stories.pt"))


def test_the_limit_itself_is_one(originals, tmp_path):
    """The harness sees what it is for: an allocation beyond the limit, and a loop without an end."""
    script = OPEN_ALL.replace("result = opened(path)", "result = str(eval(path))")
    result = subprocess.run(
        [sys.executable, "-c", script, "1", str(MEMORY), str(originals / "latent")],
        input="1 + 1\nlen(bytearray(10**9))\nsum(1 for _ in iter(int, 1))\n",
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=100,
    )
    said = [json.loads(line)[1] for line in result.stdout.splitlines()]
    assert said[0] == "2" and said[1].startswith("ESCAPED MemoryError") and said[2].startswith("ESCAPED TimeoutError")
