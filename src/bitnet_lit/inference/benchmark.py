"""`bench suite=cpu` measures decode and prefill of the native engine, beside llama.cpp, PyTorch and transformers.

All of them run the same model. The shapes (hidden/layers/feed-forward/heads) are those of models with 15, 110 and 700
million parameters; the weights are random, because speed does not depend on their values. Rounds are interleaved (ours,
theirs, ours, ...), so that other work on the machine slows both. A decode step reads every weight once, so the memory
bandwidth, measured in the same run, is its limit.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitnet_lit.checkpoints.formats.gguf import Gguf
from bitnet_lit.checkpoints.pretrained import build_pretrained
from bitnet_lit.config import BenchConfig
from bitnet_lit.data.sources.demo import demo_stories
from bitnet_lit.data.tokenizers.train_sentencepiece import TRAINED_NAME, train_tokenizer
from bitnet_lit.extras import installed
from bitnet_lit.inference.benchmark_rows import Timed, compared, interleaved, shape_config
from bitnet_lit.inference.engines import Engine
from bitnet_lit.inference.engines.cpu import native
from bitnet_lit.inference.engines.cpu.cores import allowed_threads
from bitnet_lit.inference.engines.cpu.engine import CpuEngine, NativeModel
from bitnet_lit.inference.engines.torch_engine import TorchEngine
from bitnet_lit.inference.random_weights import random_folder

SHAPES = ((256, 6, 768, 8), (768, 12, 2048, 12), (1536, 24, 4096, 16))
VOCABULARY = 32000
PROMPT = NEW = 128  # tokens
CONTEXT = 2 * (PROMPT + NEW)
PAUSE = 0.3  # seconds; for a while after its work an engine's threads spin, and take a core from the other engine
NEW_OF_SLOW = 8  # tokens that slow engines decode: enough for their rate
BANDWIDTH_BYTES = 2**30  # larger than any cache


def _rate(tokens: int, run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return tokens / (time.perf_counter() - start)


def _engine_pair(engine: Engine, new: int) -> tuple[Timed, Timed]:
    """Return two functions that measure decode and prefill once, in tokens/s.

    Args:
        new: tokens to decode.
    """
    prompt = list(range(3, 3 + PROMPT))

    def prefill() -> float:
        cache = engine.new_cache()
        return _rate(PROMPT, lambda: engine.forward([prompt], [cache]))

    def decode() -> float:
        cache = engine.new_cache()
        engine.forward([prompt], [cache])

        def run() -> None:
            for token in range(new):
                engine.forward([[3 + token]], [cache])

        return _rate(new, run)

    return decode, prefill


def _llama_cpp_pair(path: Path, threads: int) -> tuple[Timed, Timed]:
    """Return them for llama.cpp, by calls of its C functions: no more Python between two tokens than for our engine."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    context = model.ctx
    prompt = (ctypes.c_int32 * PROMPT)(*range(3, 3 + PROMPT))
    single = (ctypes.c_int32 * 1)()

    def feed(tokens: Any, count: int) -> None:
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, count)):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_get_logits_ith(context, -1)  # waits for the result

    def clear() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    def prefill() -> float:
        clear()
        return _rate(PROMPT, lambda: feed(prompt, PROMPT))

    def decode() -> float:
        clear()
        feed(prompt, PROMPT)

        def run() -> None:
            for token in range(NEW):
                single[0] = 3 + token
                feed(single, 1)

        return _rate(NEW, run)

    prefill.keep = decode.keep = model  # type: ignore[attr-defined]  # the context dies with the object
    return decode, prefill


def _transformers_pair(folder: Path) -> tuple[Timed, Timed]:
    """Return them for `transformers` on the packed folder; it unpacks each matrix whenever it is used."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.arange(3, 3 + PROMPT)[None]

    @torch.inference_mode()
    def prefill() -> float:
        return _rate(PROMPT, lambda: model(prompt, logits_to_keep=1))

    @torch.inference_mode()
    def decode() -> float:
        past = model(prompt, logits_to_keep=1).past_key_values

        def run() -> None:
            for token in range(NEW_OF_SLOW):
                model(torch.tensor([[3 + token]]), past_key_values=past)

        return _rate(NEW_OF_SLOW, run)

    return decode, prefill


def _rows(shape: str, peer: str, ours: tuple[Timed, Timed], theirs: tuple[Timed, Timed], rounds: int) -> list[dict]:
    rows = []
    for what, run, other in zip(("decode", "prefill"), ours, theirs, strict=True):
        rates = interleaved(run, other, rounds, PAUSE)
        rows.append(compared(shape, what, peer, rates, "tokens/s"))
    return rows


def cpu_rows(config: BenchConfig) -> list[dict[str, Any]]:
    """Return the rows of `bench suite=cpu`: shape, what is measured, ours, the peer, theirs, unit, ratio, spread.

    llama.cpp and transformers are left out where they are not installed.
    """
    rows: list[dict[str, Any]] = []
    rounds, threads = config.rounds, allowed_threads(config.threads)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = train_tokenizer(demo_stories(2000), 1024, Path(scratch) / TRAINED_NAME)
        for shape in SHAPES:
            stored = random_folder(Path(scratch) / "model", shape_config(shape, VOCABULARY, CONTEXT), tokenizer)
            name = stored.config.name
            model = NativeModel(stored, threads=threads)
            ours = _engine_pair(CpuEngine(model), NEW)
            if installed("llama_cpp", "gguf"):
                path = Path(scratch) / "model.gguf"
                Gguf().write(stored, path)
                rows += _rows(name, "llama.cpp TQ2_0", ours, _llama_cpp_pair(path, threads), rounds)
                path.unlink()
            few = max(1, rounds // 3)
            torch_engine = TorchEngine(build_pretrained(stored).model)
            rows += _rows(name, "PyTorch, eager", ours, _engine_pair(torch_engine, NEW_OF_SLOW), few)
            del torch_engine
            if installed("transformers", "accelerate"):
                rows += _rows(name, "transformers, eager", ours, _transformers_pair(stored.path), few)
            bandwidth = [
                native.library().bitnet_read_bandwidth(BANDWIDTH_BYTES, threads, 3) / 1e9 for _ in range(rounds)
            ]
            per_token = model.bytes_per_token(PROMPT + NEW // 2)  # on average half of the new tokens are in the cache
            moved = [ours[0]() * per_token / 1e9 for _ in range(rounds)]
            what, peer = f"decode reads {per_token / 1e6:,.1f} MB a token", "memory, read by as many threads"
            rows.append(compared(name, what, peer, (moved, bandwidth), "GB/s", digits=1))
            shutil.rmtree(Path(scratch) / "model")
    return rows
