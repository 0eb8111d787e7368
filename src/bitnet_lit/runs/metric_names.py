"""These are the figures that a run writes to metrics.json by itself, so that a search knows them before its first run.

`larger_is_better` and `smaller_is_better` name those of which a report may say which run is best.

A callback of the user's own may log others. They are kept if their names begin as `KEPT` says.
"""

from __future__ import annotations

import re
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


def larger_is_better(metric: str) -> bool:
    """Return whether more of a figure is better, as of a speed or an accuracy (of a corpus: `val/accuracy_<name>`)."""
    return metric.startswith("val/accuracy") or metric in ("perf/tokens_per_s", "perf/mfu")


def smaller_is_better(metric: str) -> bool:
    """Return whether less of a figure is better, as of a loss (of a corpus: `val/loss_<name>`).

    Neither holds of a figure such as `ternary/zero`, nor of what a callback of the user's own logs: its direction is
    not known.
    """
    return re.fullmatch(r"(train|val|val_whole_split)/(loss|perplexity|bits_per_byte)(_.*)?", metric) is not None


def check_metric(metric: str, direction: str, corpora: Collection[str], has_callbacks: bool) -> None:
    """Refuse a `sweep.metric` that no job will have, or a `sweep.direction` that searches the worst of it.

    Args:
        direction: minimize or maximize.
        corpora: the names of `data.mix`.
        has_callbacks: whether callbacks of the user's own may log it.

    Raises:
        UserError: no run writes such a figure, or more of it is better and it would be minimized.
    """
    if direction == "minimize" and larger_is_better(metric):
        raise UserError(f"sweep.metric={metric}: more of it is better: take sweep.direction=maximize")
    names = metric_names(corpora)
    if metric in names or (has_callbacks and metric.startswith(KEPT)):
        return
    near = nearest(metric, names)
    words = f"did you mean '{near}'?" if near else f"give one of {', '.join(names)}"
    if has_callbacks:
        words += f" What your callbacks log is kept if its name begins with {', '.join(KEPT)}"
    raise UserError(f"sweep.metric={metric}: no run writes this figure: {words}")
