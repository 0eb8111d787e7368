"""The CUDA engine has 2-bit weights, 8-bit activations, and a decode step that is one launch.

It computes what the PyTorch engine computes, with exact integers in every product of codes. An activation that lies at
the border of two codes may get the other one: the factor of a norm is applied after rounding. Keys and values are
float16 or float32, and the output head is int8 with exact logits for the likeliest tokens, or float. A dense model runs
in bfloat16.

forward() serves any set of texts. drawing() is for texts that are generated: the GPU draws their tokens too.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.inference.drawing import read_prompts
from bitnet_lit.inference.engines import check_step
from bitnet_lit.inference.engines.cuda.cache import CudaCache
from bitnet_lit.inference.engines.cuda.drawing import CudaDrawing
from bitnet_lit.inference.engines.cuda.gpu_features import early
from bitnet_lit.inference.engines.cuda.kernels.elementwise import embed
from bitnet_lit.inference.engines.cuda.network import Network, Stretch, Texts
from bitnet_lit.inference.engines.cuda.sampling import Variant
from bitnet_lit.inference.engines.cuda.step import MOST_ROWS, Rows, round_up
from bitnet_lit.inference.engines.cuda.supported_models import NoKernelsError
from bitnet_lit.inference.sampling import Sampler
from bitnet_lit.quant.kernels.triton.kernels import BUILD_REFUSAL

PREFILL_TOKENS = 4096
"""Tokens of a prefill step; longer prompts are several steps, so that activations take little memory."""


def _check_compiler() -> None:
    """Compile the smallest kernel: Triton needs a C compiler for the function that launches it.

    Raises:
        NoKernelsError: it cannot.
    """
    table = torch.zeros(1, 1, device="cuda")
    try:
        embed[(1,)](
            table, torch.zeros(1, dtype=torch.int64, device="cuda"), table, K=1, BLOCK_K=1, **early(table.device)
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise NoKernelsError(BUILD_REFUSAL or f"Triton cannot compile its kernels: {reason:.200}") from None


def _graph_memory(device: torch.device) -> tuple[Any, torch.cuda.CUDAGraph]:
    """Return memory that graphs share, and a graph that keeps it.

    PyTorch gives the memory up with the last graph in it, and could not capture another one there.
    """
    pool, graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        torch.zeros(1, device=device)
    return pool, graph


class CudaEngine:
    """Is an `inference.engines.Engine` on an NVIDIA GPU.

    Args:
        stored: a model that `supported_models.why_unsupported` has nothing against.
        device: cuda, or cuda:<number>.
        head: how the output head is computed: "auto" and "int8", or "float".
        kv_cache: how keys and values are kept: "half" (float16) or "float".

    Raises:
        NoKernelsError: Triton cannot compile kernels here.
        UserError: the stored weights are damaged.
        ModelError: not enough memory on the GPU.
    """

    texts_at_once = MOST_ROWS

    def __init__(self, stored: StoredModel, device: str, head: str = "auto", kv_cache: str = "half") -> None:
        named = device if ":" in device else f"{device}:{torch.cuda.current_device()}"
        self.device = torch.device(named)
        self.max_length = stored.config.max_position_embeddings
        self._dtype = torch.float16 if kv_cache == "half" else torch.float32
        with torch.cuda.device(self.device):
            _check_compiler()
            self.network = Network(stored, self.device, "float" if head == "float" else "int8", kv_cache == "half")
        self.name = f"CUDA, {torch.cuda.get_device_name(self.device)}"
        self.lock = threading.RLock()
        self._pool, self._kept = _graph_memory(self.device)
        self._free_rows: dict[int, list[Rows]] = defaultdict(list)

    def __str__(self) -> str:
        return self.name

    def new_cache(self) -> CudaCache:
        """Return an empty cache."""
        return CudaCache(self.network.config, self.device, self._dtype)

    def take_rows(self, size: int) -> Rows:
        """Return rows for a batch, which nobody else uses until they are given back."""
        with self.lock:
            free = self._free_rows[size]
            return free.pop() if free else Rows(self.network, size, self._pool)

    def give_rows(self, rows: Rows) -> None:
        """Give back what `take_rows` gave."""
        self._free_rows[rows.size].append(rows)

    @torch.inference_mode()
    def forward(self, ids: Sequence[Sequence[int]], caches: Sequence[CudaCache]) -> NDArray[np.float32]:
        """Return the logits of the token after each text: float32 (len(ids), V).

        Raises:
            UserError: a token or a position that the model does not have.
            ModelError: not enough memory.
        """
        check_step(ids, [cache.length for cache in caches], self.network.config.vocabulary, self.max_length)
        with self.lock, torch.cuda.device(self.device):
            if all(len(row) == 1 for row in ids):
                parts = [
                    self._decode([row[0] for row in ids[i : i + MOST_ROWS]], caches[i : i + MOST_ROWS])
                    for i in range(0, len(ids), MOST_ROWS)
                ]
                return np.concatenate(parts)
            return self._prefill(ids, caches).cpu().numpy()

    def _decode(self, tokens: Sequence[int], caches: Sequence[CudaCache]) -> NDArray[np.float32]:
        rows = self.take_rows(round_up(len(tokens)))
        try:
            rows.sampling.token[: len(tokens)] = torch.tensor(tokens).to(self.device)
            rows.place(caches)
            rows.run(None)
            for cache in caches:
                cache.length += 1
            return rows.logits[: len(tokens)].cpu().numpy()
        finally:
            self.give_rows(rows)

    def _prefill(self, ids: Sequence[Sequence[int]], caches: Sequence[CudaCache]) -> Tensor:
        """Return the logits on the GPU, float32 (len(ids), V), of texts with any number of new tokens."""
        last: dict[int, Tensor] = {}  # the hidden state of the last token of each text
        step: list[tuple[int, int, int]] = []  # text, and its tokens from one to another

        def run() -> None:
            tokens = [token for text, start, end in step for token in ids[text][start:end]]
            where: list[tuple[int, int, int]] = []
            stretches = []
            for text, start, end in step:
                cache = caches[text]
                stretches.append(Stretch(len(where), end - start, cache.length, cache.memory))
                places = range(cache.length, cache.length + end - start)
                where += [(cache.address, cache.room, position) for position in places]
                cache.length += end - start
            texts = Texts(*torch.tensor(where).T.contiguous().to(self.device))
            hidden = self.network.prefill(torch.tensor(tokens).to(self.device), texts, stretches)
            for (text, _, end), stretch in zip(step, stretches, strict=True):
                if end == len(ids[text]):
                    last[text] = hidden[stretch.start + stretch.count - 1]
            step.clear()

        for row, cache in zip(ids, caches, strict=True):
            cache.reserve(cache.length + len(row))
        room = PREFILL_TOKENS
        for text, row in enumerate(ids):
            start = 0
            while start < len(row):
                end = min(len(row), start + room)
                step.append((text, start, end))
                room -= end - start
                start = end
                if not room:
                    run()
                    room = PREFILL_TOKENS
        if step:
            run()
        states = torch.stack([last[text] for text in range(len(ids))])
        logits = torch.empty(len(ids), self.network.config.vocabulary, dtype=torch.float32, device=self.device)
        for state, out in zip(states.split(MOST_ROWS), logits.split(MOST_ROWS), strict=True):
            self.network.head(state, out)
        return logits

    @torch.inference_mode()
    def drawing(
        self, ids: Sequence[list[int]], samplers: Sequence[Sampler], pieces: int, max_new_tokens: int
    ) -> CudaDrawing | None:
        """Read prompts, and go on with them on the GPU; see `inference.drawing.start_drawing`.

        Returns:
            None where the host has to draw: more texts than a step takes, or a repeat_last_n beyond what is kept here.
        """
        variant = Variant.of(samplers[0].options, pieces)
        if variant is None or len(ids) > MOST_ROWS:
            return None
        with self.lock, torch.cuda.device(self.device):

            def forward(prompts: list[Sequence[int]], caches: list[CudaCache]) -> Sequence[Tensor]:
                check_step(prompts, [0] * len(prompts), self.network.config.vocabulary, self.max_length)
                return list(self._prefill(prompts, caches))

            caches, logits = read_prompts(ids, self.new_cache, forward)
            return CudaDrawing(self, caches, logits, ids, samplers, variant, max_new_tokens)
