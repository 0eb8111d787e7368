"""llama.cpp computes a network by the graph of its architecture, whose name a GGUF file has.

With sub-norms the graph is `bitnet`, which has both sub-norms and a tied head. With norms of queries and keys it is
`qwen3`. With neither it is `llama`, which rotates the pairs (2i, 2i + 1) of a head, so the rows of q and k are
reordered there. All three compute silu.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_lit.config import ModelConfig


@dataclass(frozen=True)
class Graph:
    """A Graph is an architecture of llama.cpp.

    Attributes:
        name: its name in a file.
        rotates_neighbours: whether it rotates the pairs (2i, 2i + 1) of a head; otherwise (i, i + head_dim / 2).
        any_head_dim: whether heads need not add up to hidden_size. Their size is then in the file.
    """

    name: str
    rotates_neighbours: bool = False
    any_head_dim: bool = False


def graph_of(config: ModelConfig) -> Graph:
    """Return the graph for a network; `Gguf.problems` says what it does not compute."""
    if config.sub_norm:
        return Graph("bitnet")
    return Graph("qwen3", any_head_dim=True) if config.qk_norm else Graph("llama", rotates_neighbours=True)
