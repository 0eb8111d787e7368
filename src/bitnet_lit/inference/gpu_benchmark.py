"""`bench suite=gpu_decode` measures decode on a GPU, beside our dense twin and PyTorch without graphs.

The weights are random, because speed does not depend on their values. Rounds are interleaved (ours, theirs, ours, ...).
`decode` measures steps of the engine that draw their tokens on the GPU, greedily, without anybody looking at them;
`generate` measures what `infer` does, from prompts to text. The dense twin is the same engine without quantization:
bfloat16 matrices by cuBLAS in the same CUDA graphs. A step of one text reads every weight once, so the bandwidth of the
memory, measured in the same run by copying, is its limit.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from bitnet_lit.checkpoints.pretrained import build_pretrained
from bitnet_lit.config import BenchConfig, GenerationConfig, ModelConfig, QuantConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.inference.benchmark_rows import Timed, compared, interleaved, shape_config
from bitnet_lit.inference.engines.cuda.engine import CudaEngine
from bitnet_lit.inference.engines.cuda.sampling import Variant
from bitnet_lit.inference.engines.torch_engine import TorchEngine
from bitnet_lit.inference.generator import Generator
from bitnet_lit.inference.random_weights import random_model
from bitnet_lit.model.tensors import tensor_shapes
from bitnet_lit.terminal import console

OF_2B4T = (2560, 30, 6912, 20)
"""BitNet b1.58 2B4T (conf/model/2b4t.yaml); its other sizes are taken too."""
SHAPES = ((288, 6, 768, 6), (768, 12, 2048, 12), (2048, 16, 5632, 16), OF_2B4T)
VOCABULARY = 32000
CONTEXT = 1024
PROMPT = NEW = 128  # tokens
NEW_OF_SLOW = 8  # tokens that PyTorch decodes: enough for its rate
MOST_OF_SLOW = 2**30  # parameters: PyTorch has them in float32, and making those of 2B4T takes half a minute
GENERATED = {"greedily": GenerationConfig(temperature=0), "by the defaults": GenerationConfig(seed=0)}
BATCHES = (1, 64)
COPIED_BYTES = 2**30  # larger than any cache


class NumberTokenizer(Tokenizer):
    """Has a word for each token of a vocabulary of any size: its number. No token ends a text."""

    bos_id = eos_id = -1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """See `Tokenizer`; the text is numbers."""
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return b"".join(map(self.piece_bytes, ids)).decode()

    def piece_bytes(self, token: int) -> bytes:
        """See `Tokenizer`."""
        return b" %d" % token


def _config(shape: tuple[int, int, int, int]) -> ModelConfig:
    config = shape_config(shape, VOCABULARY, CONTEXT)
    if shape != OF_2B4T:
        return config
    return replace(config, num_key_value_heads=5, hidden_act="relu2", vocab_size=128256, rope_theta=5e5)


def _rate(tokens: int, run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return tokens / (time.perf_counter() - start)


@torch.inference_mode()
def _decode(engine: CudaEngine, batch: int) -> Timed:
    """Return a function that measures decode steps in tokens/s: tokens are drawn on the GPU, and nobody reads them."""
    caches = [engine.new_cache() for _ in range(batch)]
    engine.forward([list(range(3, 3 + PROMPT))] * batch, caches)
    variant = Variant.of(GenerationConfig(temperature=0), engine.network.config.vocabulary)

    @torch.inference_mode()
    def steps() -> None:
        for _ in range(NEW):
            rows.place(caches)
            rows.run(variant)
            for cache in caches:
                cache.length += 1

    def measure() -> float:
        for cache in caches:
            cache.truncate(PROMPT)
        return _rate(batch * NEW, steps)

    rows = engine.take_rows(batch)
    return measure


def _generate(engine: CudaEngine, batch: int, options: GenerationConfig) -> Timed:
    """Return a function that measures what `infer` does behind the prompts, in tokens/s."""
    generator = Generator(engine, NumberTokenizer(engine.network.config.vocabulary))
    prompts = [" ".join(str(3 + text + i) for i in range(PROMPT)) for text in range(batch)]
    options = replace(options, max_new_tokens=NEW)

    def measure() -> float:
        generator.generate_batch(prompts, options)
        return generator.statistics.new_tokens / generator.statistics.new_seconds

    return measure


def _pytorch(engine: TorchEngine, batch: int) -> Timed:
    """Return the same for the PyTorch engine, which runs the texts of a batch one after the other."""

    def measure() -> float:
        caches = [engine.new_cache() for _ in range(batch)]
        engine.forward([list(range(3, 3 + PROMPT))] * batch, caches)

        def run() -> None:
            for token in range(NEW_OF_SLOW):
                engine.forward([[3 + token]] * batch, caches)

        return _rate(batch * NEW_OF_SLOW, run)

    return measure


def _copy_bandwidth() -> float:
    """Return the bytes/s of the memory, read and written by a copy."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _rate(8 * COPIED_BYTES, lambda: [target.copy_(source) for _ in range(8)])


def bytes_per_token(engine: CudaEngine, length: int) -> int:
    """Return how many bytes a step of one text reads behind `length` tokens: matrices, head, keys and values."""
    config, network = engine.network.config, engine.network
    matrices = [one for layer in network.layers for one in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    cache = 2 * config.num_hidden_layers * config.kv_size * length * 2
    return sum(matrix.nbytes for matrix in matrices) + network.head.nbytes + cache


def _row(shape: str, what: str, peer: str, rates: tuple[list[float], list[float]], unit: str) -> dict[str, Any]:
    row = compared(shape, what, peer, rates, unit)
    # The table comes at the end, minutes later.
    line = f"{shape}: {what}: {row['ours']:,.0f} {unit}; {peer}: {row['theirs']:,.0f}"
    console(stderr=True).print(line, highlight=False)
    return row


def gpu_decode_rows(config: BenchConfig) -> list[dict[str, Any]]:
    """Return the rows of `bench suite=gpu_decode`: shape, what is measured, ours, peer, theirs, unit, ratio, spread."""
    rows: list[dict[str, Any]] = []
    for sizes in SHAPES:
        shape = _config(sizes)
        stored = random_model(shape, QuantConfig())
        ours = CudaEngine(stored, "cuda")
        dense = CudaEngine(random_model(shape, QuantConfig(name="none")), "cuda")
        for batch in BATCHES:
            decode = _decode(ours, batch)
            pair = interleaved(decode, _decode(dense, batch), config.rounds)
            rows.append(_row(shape.name, f"decode, batch {batch}", "dense twin, bfloat16", pair, "tokens/s"))
            for how, options in GENERATED.items():
                pair = interleaved(_generate(ours, batch, options), decode, config.rounds)
                rows.append(_row(shape.name, f"generate {how}, batch {batch}", "the engine's decode", pair, "tokens/s"))
        per_token = bytes_per_token(ours, PROMPT + NEW // 2)  # on average half of the new tokens are in the cache
        steps, copies = interleaved(_decode(ours, 1), _copy_bandwidth, config.rounds)
        moved = [rate * per_token / 1e9 for rate in steps], [rate / 1e9 for rate in copies]
        what = f"decode reads {per_token / 1e6:,.1f} MB a token"
        rows.append(_row(shape.name, what, "memory, by a copy", moved, "GB/s"))
        del dense
        gc.collect()
        torch.cuda.empty_cache()
        if sum(map(math.prod, tensor_shapes(shape).values())) <= MOST_OF_SLOW:
            eager = TorchEngine(build_pretrained(stored).model.cuda())
            pair = interleaved(_decode(ours, 1), _pytorch(eager, 1), max(1, config.rounds // 3))
            rows.append(_row(shape.name, "decode, batch 1", "PyTorch, eager", pair, "tokens/s"))
            del eager
        del ours, decode, pair
        gc.collect()
        torch.cuda.empty_cache()
    return rows
