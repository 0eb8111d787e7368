"""`bench suite=gpu_train`: training through the `train` command, beside a bare PyTorch loop, on one GPU.

The bare loop is what an expert writes without a framework: the network below compiled, bf16 autocast, fused AdamW,
gradients clipped at norm 1, and a batch that already lies on the GPU. It logs nothing, saves nothing and never
validates. A small network is one compiled graph, because starting kernels is what its steps wait for. The layers of
larger ones are compiled each by itself: whole, they take minutes to compile. The network is that of this package,
written plainly: dense, or with weights and activations that are rounded in place ("fake quantization", the usual way to
train BitNet).

Batches are random tokens, which take as long as text. The command trains on a folder of shards with the same ones. Each
round measures every program once, so that a GPU that slows down slows all of them. Another round of a shape begins only
if the last one took no longer than what is left of its time (`SECONDS`).
"""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_lit.cli import compose
from bitnet_lit.config import BenchConfig, ModelConfig, QuantConfig
from bitnet_lit.data.shard_folder import shard_path, write_meta
from bitnet_lit.errors import one_line
from bitnet_lit.extras import installed
from bitnet_lit.model.accounting import account
from bitnet_lit.runs.folder import CSV_NAME
from bitnet_lit.terminal import console
from bitnet_lit.training.callbacks.throughput import peak_flops
from bitnet_lit.training.run import train

VOCABULARY = 32000
WARM_UP, WINDOW, WINDOWS = 10, 10, 3  # steps before, steps of a measurement, measurements of a round
SECONDS = 180  # of a shape: ten minutes for the suite
WHOLE_GRAPH = 6  # the largest number of layers that are compiled as one graph


class Shape(NamedTuple):
    """The sizes of a network and of its batches."""

    hidden: int
    layers: int
    feed_forward: int
    heads: int
    batch: int
    length: int

    @property
    def name(self) -> str:
        """Return the sizes as the first column of the table."""
        return f"{self.hidden}/{self.layers}/{self.feed_forward}/{self.heads}, {self.batch} x {self.length}"

    @property
    def model(self) -> ModelConfig:
        """Return the network as this package describes it."""
        return ModelConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.feed_forward,
            vocab_size=VOCABULARY,
            max_position_embeddings=self.length,
        )


SHAPES = (
    Shape(288, 6, 768, 6, 128, 256),
    Shape(768, 12, 2048, 12, 32, 1024),
    Shape(2048, 16, 5632, 16, 8, 2048),
)


TORCHAO = "bare loop, torchao bitnet_training"
"""It is a prototype there, so a version of torchao may lack it, or have it in another form."""


class Speed(NamedTuple):
    """Speed holds the figures of one program in one round of the benchmark."""

    tokens_per_s: float
    peak_gib: float


class FakeQuantLinear(nn.Linear):
    """A linear layer whose input and weight are rounded as b1.58 rounds them, with straight-through gradients."""

    def forward(self, x: Tensor) -> Tensor:
        values, weight = x.float(), self.weight
        scale = 127 / values.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        values = values + ((values * scale).round().clamp(-128, 127) / scale - values).detach()
        mean = weight.abs().mean().clamp(min=1e-5)
        weight = weight + ((weight / mean).round().clamp(-1, 1) * mean - weight).detach()
        return F.linear(values, weight)


class BareLayer(nn.Module):
    """A decoder layer of BareNetwork, with a norm before every projection."""

    def __init__(self, shape: Shape, linear: type[nn.Linear]) -> None:
        super().__init__()
        hidden, wide = shape.hidden, shape.feed_forward
        self.heads = shape.heads
        self.q, self.k, self.v, self.o = (linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (linear(hidden, wide, bias=False) for _ in range(2))
        self.down = linear(wide, hidden, bias=False)
        sizes = {"attention_norm": hidden, "o_norm": hidden, "mlp_norm": hidden, "down_norm": wide}
        self.norms = nn.ModuleDict({name: nn.RMSNorm(size, eps=1e-5) for name, size in sizes.items()})

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def rotate(y: Tensor) -> Tensor:
            first, second = y.chunk(2, dim=-1)
            return (y * cos + torch.cat([-second, first], dim=-1) * sin).to(y.dtype)

        h = self.norms["attention_norm"](x)
        q, k, v = (part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.o(self.norms["o_norm"](y))
        h = self.norms["mlp_norm"](x)
        return x + self.down(self.norms["down_norm"](F.silu(self.gate(h)) * self.up(h)))


class MeanLoss(nn.Module):
    """Maps logits (B, T, V) and targets (B, T) to the mean loss."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class BareNetwork(nn.Module):
    """A decoder with tied embeddings; ids (B, T) and targets (B, T) -> the mean loss."""

    def __init__(self, shape: Shape, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, shape.hidden)
        self.layers = nn.ModuleList(BareLayer(shape, linear) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.loss = MeanLoss()
        frequency = 10000.0 ** (-torch.arange(0, shape.hidden // shape.heads, 2) / (shape.hidden // shape.heads))
        angles = torch.outer(torch.arange(shape.length), frequency).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.loss(F.linear(self.norm(x), self.embed.weight), targets)

    def compile_parts(self) -> None:
        """Compile the network whole, or where it has many layers each of them and the loss."""
        if len(self.layers) <= WHOLE_GRAPH:
            self.compile(dynamic=False)
            return
        for part in (*self.layers, self.loss):
            part.compile(dynamic=False)


def bare_loop(
    shape: Shape, linear: type[nn.Linear] = nn.Linear, prepare: Callable[[nn.Module], None] | None = None
) -> Speed:
    """Train BareNetwork in a plain loop.

    Args:
        linear: the class of the projections.
        prepare: changes the network before it is compiled.
    """
    network = BareNetwork(shape, linear).cuda()
    if prepare is not None:
        prepare(network)
    torch.compiler.reset()  # PyTorch keeps eight variants of a function, and the rounds come to more
    network.compile_parts()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(VOCABULARY, (shape.batch, shape.length + 1), device="cuda")
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def steps(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = network(ids, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    steps(WARM_UP)
    seconds = statistics.median(steps(WINDOW) for _ in range(WINDOWS))
    return Speed(shape.batch * shape.length / seconds, torch.cuda.max_memory_allocated() / 2**30)


def through_the_command(shape: Shape, quant: str, data: Path) -> Speed:
    """Train with the config that `python -m bitnet_lit.train` composes."""
    sizes = {
        "model.hidden_size": shape.hidden,
        "model.num_hidden_layers": shape.layers,
        "model.num_attention_heads": shape.heads,
        "model.intermediate_size": shape.feed_forward,
        "model.max_position_embeddings": shape.length,
        "data.batch_size": shape.batch,
        "trainer.max_steps": WARM_UP + WINDOWS * WINDOW,
        "trainer.log_every_n_steps": WINDOW,
        "trainer.val_check_interval": WARM_UP + WINDOWS * WINDOW,
        "trainer.limit_val_batches": 1,
    }
    with tempfile.TemporaryDirectory() as run_dir, contextlib.redirect_stderr(io.StringIO()):
        overrides = [f"{key}={value}" for key, value in sizes.items()]
        overrides += [f"run_dir={run_dir}/run", f"data.dir={data}"]
        train(compose("train", [f"quant={quant}", "optim=adamw", "trainer.accelerator=gpu", *overrides]))
        with (Path(run_dir) / "run" / CSV_NAME).open() as file:
            rows = [row for row in csv.DictReader(file) if row["perf/tokens_per_s"] and int(row["step"]) > WARM_UP]
    tokens_per_s = statistics.median(float(row["perf/tokens_per_s"]) for row in rows)
    return Speed(tokens_per_s, max(float(row["perf/peak_memory_gib"]) for row in rows))


def _torchao(network: nn.Module) -> None:
    from torchao.prototype.quantized_training import bitnet_training
    from torchao.quantization import quantize_

    quantize_(network.get_submodule("layers"), bitnet_training())


def _measured(measure: Callable[[], Speed]) -> Speed:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return measure()


def gpu_train_rows(config: BenchConfig) -> list[dict[str, Any]]:
    """Measure all rows of `bench suite=gpu_train`.

    Each row compares two programs: tokens/s, MFU (PaLM's definition) and peak memory in GiB of both.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        for name, count in (("data00", 2**16), ("data01", 2**22)):  # the first is validated on as a whole at the end
            np.random.default_rng(0).integers(0, VOCABULARY, count, dtype=np.uint16).tofile(shard_path(data, name))
        write_meta(data, {"dtype": "uint16", "vocab_size": VOCABULARY})
        for shape in SHAPES:
            rows += _rows_of(shape, data, config.rounds)
    return rows


def _rows_of(shape: Shape, data: Path, rounds: int) -> list[dict[str, Any]]:
    programs: dict[str, Callable[[], Speed]] = {
        "train, b158": lambda: through_the_command(shape, "b158", data),
        "train, none": lambda: through_the_command(shape, "none", data),
        "bare loop, dense": lambda: bare_loop(shape),
        "bare loop, fake quantization": lambda: bare_loop(shape, FakeQuantLinear),
    }
    if installed("torchao"):
        programs[TORCHAO] = lambda: bare_loop(shape, prepare=_torchao)
    speeds: dict[str, list[Speed]] = {name: [] for name in programs}
    start = time.perf_counter()
    for _ in range(rounds):
        before = time.perf_counter()
        for name, program in [*programs.items()]:
            try:
                speed = _measured(program)
            except Exception as error:
                if name != TORCHAO:
                    raise
                console(stderr=True).print(f"note: left out: {name}: {one_line(error, 200)}", markup=False)
                del programs[name]
                continue
            speeds[name].append(speed)
            text = f"{shape.name}: {name}: {speed.tokens_per_s:,.0f} tokens/s, {speed.peak_gib:.2f} GiB"
            console(stderr=True).print(text, highlight=False)
        now = time.perf_counter()
        if now + (now - before) > start + SECONDS:
            break
    flops = account(shape.model, QuantConfig("none"), shape.length).training_flops_per_token
    peak = peak_flops(torch.device("cuda"), "bf16-mixed")
    compared = [("train, b158", peer) for peer in programs if peer not in ("train, b158", "bare loop, dense")]
    compared.append(("train, none", "bare loop, dense"))
    rows = []
    for ours, theirs in compared:
        mine, their = (statistics.median(speed.tokens_per_s for speed in speeds[name]) for name in (ours, theirs))
        memory = [max(speed.peak_gib for speed in speeds[name]) for name in (ours, theirs)]
        rows.append(
            {
                "shape": shape.name,
                "what": ours,
                "ours": mine,
                "peer": theirs,
                "theirs": their,
                "unit": "tokens/s",
                "ratio": mine / their,
                "mfu": round(mine * flops / peak, 3),
                "their mfu": round(their * flops / peak, 3),
                "peak GiB": f"{memory[0]:.2f} / {memory[1]:.2f}",
                "rounds": len(speeds[ours]),
            }
        )
    return rows
