"""These are the figures that a run writes to metrics.json by itself, so that a search knows them before its first run.

A callback of the user's own may log others. They are kept if their names begin as `KEPT` says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from bitnet_lit.errors import UserError, nearest

KEPT = ("val/", "train/loss", "perf/", "ternary/")
"""How the names of logged figures begin that metrics.json has."""

_VALIDATION = ("val/loss", "val/perplexity", "val/accuracy", "val/bits_per_byte")
_OTHERS = (
    "val/best_loss",
    "train/loss",
    "perf/tokens_per_s",
    "perf/mfu",
    "perf/data_wait_share",
    "perf/peak_memory_gib",
    "ternary/minus",
    "ternary/zero",
    "ternary/plus",
    "ternary/weight_scale",
    "ternary/flip_rate",
    "steps",
    "tokens",
    "parameters",
)


def metric_names(corpora: Iterable[str] = ()) -> list[str]:
    """Return the names of the figures of a run.

    Args:
        corpora: the names of `data.mix`, each of which has validation figures of its own.
    """
    return [*_VALIDATION, *(f"{name}_{corpus}" for corpus in corpora for name in _VALIDATION), *_OTHERS]


def check_metric(metric: str, corpora: Collection[str], has_callbacks: bool) -> None:
    """Refuse a `sweep.metric` that no job will have.

    Args:
        corpora: the names of `data.mix`.
        has_callbacks: whether callbacks of the user's own may log it.

    Raises:
        UserError: no run writes such a figure.
    """
    names = metric_names(corpora)
    if metric in names or (has_callbacks and metric.startswith(KEPT)):
        return
    near = nearest(metric, names)
    words = f"did you mean '{near}'?" if near else f"give one of {', '.join(names)}"
    if has_callbacks:
        words += f" What your callbacks log is kept if its name begins with {', '.join(KEPT)}"
    raise UserError(f"sweep.metric={metric}: no run writes this figure: {words}")
