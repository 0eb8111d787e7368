"""The gap of a row of runs to the dense model: a mean of differences, one for each run, with its interval.

Each difference is the loss of a run minus that of a dense run with the same seed. What the two share (the order of the
data) drops out of it, so the interval of the gap is narrower than those of the two means. The gap is measured twice:

- **at equal tokens**: the dense twin is the run whose config is the same in every key that decides what a run learns,
  but for `quant`. All pairs are compared at one number of tokens, the largest that all of them have reached.
- **at equal bytes**: the loss of a dense model whose weights take as many bytes as those of the row. It is
  interpolated, linear in the logarithm of bytes, between dense runs of other sizes. Outside of them nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitnet_lit.reports.measures import at_equal_tokens
from bitnet_lit.reports.statistics import Estimate, interpolate
from bitnet_lit.reports.units import megabytes
from bitnet_lit.reports.weight_sizes import WeightSizes
from bitnet_lit.runs.config_keys import value_of
from bitnet_lit.runs.history import Run


@dataclass(frozen=True)
class Gap:
    """A row's loss minus the dense model's.

    Attributes:
        estimate: the mean of the differences; None where there are none.
        why_not: why there are none.
        tokens: the number of tokens at which the losses were compared.
        notes: what a reader should know about the pairs.
    """

    estimate: Estimate | None = None
    why_not: str = ""
    tokens: float | None = None
    notes: tuple[str, ...] = ()


def _agree(run: Run, other: Run, keys: Sequence[str]) -> bool:
    return all(value_of(run.config, key) == value_of(other.config, key) for key in keys)


def _twin(run: Run, dense: Sequence[Run], keys: Sequence[str]) -> tuple[Run | None, str]:
    """Return the dense twin of a run, and a note where it differs in more than `quant`.

    A dense run that differs in further keys, such as the learning rate, is taken where it is the only one that agrees
    in `keys`.
    """
    for other in dense:
        if run.learned_from("quant") == other.learned_from("quant"):
            return other, ""
    near = [other for other in dense if _agree(run, other, keys)]
    if len(near) != 1:
        return None, ""
    unlike = sorted({key for key, _ in run.learned_from("quant") ^ near[0].learned_from("quant")})
    return near[0], f"the dense twin differs in {', '.join(unlike[:4])}{' and more' if len(unlike) > 4 else ''} too"


def gap_at_equal_tokens(runs: Sequence[Run], dense: Sequence[Run], keys: Sequence[str], metric: str) -> Gap:
    """Compare runs with their dense twins.

    Args:
        runs: the runs of a row.
        dense: all dense runs.
        keys: the `by` and `over` keys.
    """
    keys = [key for key in keys if key.partition(".")[0] != "quant"]
    found = {run: _twin(run, dense, keys) for run in runs}
    pairs = {run: twin for run, (twin, _) in found.items() if twin is not None}
    if not pairs:
        return Gap(why_not="no dense twin (quant=none with every other key equal)")
    measured = at_equal_tokens(list(dict.fromkeys([*pairs, *pairs.values()])), metric)
    losses = measured.values
    differences = [losses[run] - losses[twin] for run, twin in pairs.items() if run in losses and twin in losses]
    if not differences:
        return Gap(why_not="the validation curves of the pairs do not overlap")
    notes = dict.fromkeys(note for _, note in found.values() if note)
    if len(differences) < len(runs):
        notes[f"{len(differences)} of {len(runs)} runs have a dense twin"] = None
    if measured.is_interpolated:
        notes[f"gap at {measured.tokens:,.0f} tokens, which all pairs reached; losses are interpolated there"] = None
    return Gap(Estimate.of(differences), tokens=measured.tokens, notes=tuple(notes))


def _sizes_like(run: Run, dense: Mapping[Run, WeightSizes | None], over: Sequence[str]) -> dict[float, Run]:
    """Return dense runs of different sizes that are otherwise like a run, by the logarithm of their bytes.

    Where the config differs in more than the size, such as a learning rate for each size, runs that agree in the `over`
    keys are taken. Several runs of one size are refused: which of them to take is not known.
    """
    alike = [each for each in dense if run.learned_from("quant", "model") == each.learned_from("quant", "model")]
    if len(alike) < 2:
        alike = [each for each in dense if _agree(run, each, over)]
    by_size = {math.log(sizes.num_bytes): each for each in alike if (sizes := dense[each]) is not None}
    return dict(sorted(by_size.items())) if 2 <= len(by_size) == len(alike) else {}


def gap_at_equal_bytes(
    runs: Sequence[Run],
    sizes: WeightSizes | None,
    dense: Mapping[Run, WeightSizes | None],
    over: Sequence[str],
    metric: str,
) -> Gap:
    """Compare runs with a dense model whose weights take as many bytes.

    Args:
        runs: the runs of a row.
        sizes: those of the row's model.
        dense: all dense runs, with their sizes.
    """
    if sizes is None:
        return Gap(why_not="the bytes of its weights are not known here")
    families = {run: family for run in runs if (family := _sizes_like(run, dense, over))}
    if not families:
        return Gap(why_not="it takes dense models of two sizes or more, with the same seed")
    log_bytes = math.log(sizes.num_bytes)
    low, high = max(map(min, families.values())), min(map(max, families.values()))
    if not low <= log_bytes <= high:
        measured_sizes = f"{megabytes(math.exp(low))} to {megabytes(math.exp(high))}"
        return Gap(why_not=f"its weights take {megabytes(sizes.num_bytes)}, those of the dense models {measured_sizes}")
    measured = at_equal_tokens([*families, *{each: None for f in families.values() for each in f.values()}], metric)
    losses, differences = measured.values, []
    for run, family in families.items():
        known = {size: losses[each] for size, each in family.items() if each in losses}
        theirs = interpolate(log_bytes, np.array([*known]), np.array([*known.values()]))
        if theirs is not None and run in losses:
            differences.append(losses[run] - theirs)
    if not differences:
        return Gap(why_not="the validation curves of the dense models do not overlap")
    note = f"gap at equal bytes: interpolated between {max(map(len, families.values()))} sizes of the dense model"
    if measured.is_interpolated:
        note += f", at {measured.tokens:,.0f} tokens"
    return Gap(Estimate.of(differences), tokens=measured.tokens, notes=(note,))
