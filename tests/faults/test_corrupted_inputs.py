"""A thousand damaged models: each opens to a working model or to one line for the user, in little time and memory.

The damage is drawn from fixed seeds. It is opened in a process of its own whose address space is limited, so that a
size that a damaged file asks for ends in a MemoryError, not in a machine that swaps. One process opens all of a kind:
what it says of each comes back as a line of JSON.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import BitNetConfig, LlamaConfig, LlamaForCausalLM

from bitnet_lit.artifacts.save import save_model_folder
from bitnet_lit.config import QuantConfig
from tests.artifacts.exporting import export_to, leave_out_other_tools
from tests.data.test_json_tokenizer import byte_level, metaspace
from tests.parity.test_imports import llama2c_weights, write_bin, write_pt
from tests.support import REPOSITORY, tiny_model

SECONDS_EACH = 5  # a damaged file is opened in milliseconds; anything near this is a loop over a size it claims
MEMORY = 400 * 2**20  # beyond what the imports and the model itself take
HUGE = [10**12, 2**31, 2**63, -1, 0, 1e308, 10**400]

OPEN_ALL = textwrap.dedent("""
    import json, os, resource, signal, sys, time, traceback
    import torch
    torch.set_num_threads(1)
    import safetensors, sentencepiece, tokenizers
    from bitnet_lit.artifacts.load import load_model
    from bitnet_lit.artifacts.locate import find_model, open_source
    from bitnet_lit.artifacts.load import load
    from bitnet_lit.errors import UserError
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])

    def opened(path):
        model = load(open_source(find_model(path)))
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


def flipped(content, draw):
    """A few bits."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def flipped_early(content, draw):
    """A few bits of the header, where the sizes stand."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        content[draw.randrange(min(len(content), 400))] ^= 1 << draw.randrange(8)
    return bytes(content)


def truncated(content, draw):
    return content[: draw.choice([0, 1, 7, 8, 28, draw.randrange(len(content)), len(content) - 1])]


def spliced(content, draw):
    """Some bytes from elsewhere, put in or written over."""
    start, length = draw.randrange(len(content)), draw.randrange(1, 200)
    other = draw.choice([content[start : start + length], draw.randbytes(length), b"\0" * length, b"\xff" * length])
    at = draw.randrange(len(content))
    return content[:at] + other + content[at + draw.choice([0, len(other)]) :]


def appended(content, draw):
    return content + draw.randbytes(draw.randrange(1, 1000))


BYTES = [flipped, flipped_early, truncated, spliced, appended]


def nodes(value, found):
    """Every place of a JSON document where a value stands."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        found.append((value, key))
        nodes(below, found)
    return found


def changed_json(content, draw):
    """Another type or an absurd size for one or two values; or one left out."""
    document = json.loads(content)
    for _ in range(draw.choice([1, 1, 2])):
        places = nodes(document, [])
        if not places:
            break
        owner, key = draw.choice(places)
        if draw.random() < 0.15:
            del owner[key]
            continue
        others = [None, True, "x", "", [], {}, [[]], {"a": 1}, 0.5, float("nan"), "1" * 5000, [owner[key]], *HUGE]
        owner[key] = draw.choice(others)
    return json.dumps(document).encode()


@pytest.fixture(scope="module")
def originals(tmp_path_factory, tokenizer):
    """One small model of each kind that can be opened, by name: what to open, and which file of it is damaged."""
    root = tmp_path_factory.mktemp("originals")
    small = {"num_hidden_layers": 1, "vocab_size": 512}
    save_model_folder(root / "latent", tiny_model(**small), QuantConfig(), tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        leave_out_other_tools(patch)
        export_to(root / "packed", root / "latent", format="packed")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 64,
    }
    for name, options in (("hub", {}), ("sharded", {"max_shard_size": "60KB"})):
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(root / name, **options)
    # Same tensors, other configs: what opens first is config.json.
    raw = json.loads((root / "latent" / "config.json").read_text())
    hub_bitnet = {**BitNetConfig(**{**sizes, "num_key_value_heads": 4}).to_dict(), "tie_word_embeddings": True}
    shutil.copytree(root / "latent", root / "hub_bitnet")
    hub_bitnet |= {"quantization_config": raw["quantization_config"], "bos_token_id": 1, "eos_token_id": 2}
    hub_bitnet |= {"hidden_act": "silu"}
    (root / "hub_bitnet" / "config.json").write_text(json.dumps(hub_bitnet))
    for name, build in (("byte_level", byte_level), ("metaspace", metaspace)):
        shutil.copytree(root / "hub", root / name)
        built, names = build()
        built.save(str(root / name / "tokenizer.json"))
        (root / name / "tokenizer_config.json").write_text(json.dumps(names))
    weights, arguments = llama2c_weights(2, tied=False)
    write_bin(root / "stories.bin", weights, arguments, tied=False)
    write_pt(root / "stories.pt", weights, arguments)
    return root


# The model, the file of it that is damaged, how many times, and how.
KINDS = {
    "latent weights": ("latent", "model.safetensors", 110, BYTES),
    "packed weights": ("packed", "model.safetensors", 110, BYTES),
    "weights of transformers": ("hub", "model.safetensors", 60, BYTES),
    "our config": ("latent", "config.json", 110, [changed_json, changed_json, changed_json, *BYTES]),
    "packed config": ("packed", "config.json", 60, [changed_json, changed_json, changed_json, *BYTES]),
    "config of transformers": ("hub", "config.json", 110, [changed_json, changed_json, changed_json, *BYTES]),
    "config of BitNet": ("hub_bitnet", "config.json", 110, [changed_json, changed_json, changed_json, *BYTES]),
    "tokenizer.model": ("latent", "tokenizer.model", 60, BYTES),
    "tokenizer.json, byte level": ("byte_level", "tokenizer.json", 50, [changed_json, *BYTES]),
    "tokenizer.json, metaspace": ("metaspace", "tokenizer.json", 50, [changed_json, *BYTES]),
    "tokenizer_config.json": ("byte_level", "tokenizer_config.json", 20, [changed_json, *BYTES]),
    "index": ("sharded", "model.safetensors.index.json", 60, [changed_json, changed_json, *BYTES]),
    "shard": ("sharded", "model-00001-of-*.safetensors", 30, BYTES),
    "bin": ("stories.bin", "", 80, BYTES),
    "pt": ("stories.pt", "", 80, BYTES),
}
assert sum(kind[2] for kind in KINDS.values()) >= 1000

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


def damage(path, changes, seed):
    draw = random.Random(seed)
    content = path.read_bytes()
    path.write_bytes(draw.choice(changes)(content, draw))


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_in_one_line_or_harmless(originals, tmp_path, kind):
    model, name, count, changes = KINDS[kind]
    paths = []
    for seed in range(count):
        path = copy_of(originals, tmp_path / str(seed), model)
        (damaged,) = path.glob(name) if name else [path]
        damage(damaged, changes, f"{kind} {seed}")
        paths.append(path)
    said = open_all(paths, originals / model)
    judge(said)
    refused = sum(result != "works" for _, result, _ in said)
    if kind != "tokenizer_config.json":  # config.json names the tokens a second time
        assert refused > count / 10, "the damage does none"


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
