"""The ternary health of a run over time: shares of the codes, flips, and the weight scale of each matrix.

Means over all matrices are in metrics.csv, as ternary/*. `read_matrices` reads ternary_health.csv, which has a row for
each matrix at each validation.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitnet_lit.runs.folder import HEALTH_NAME

FIGURES = ("zero", "flip_rate", "weight_scale")


@dataclass(frozen=True)
class Matrices:
    """Figures of each quantized matrix over time.

    Attributes:
        steps: optimizer steps of the validations, int64 (T,).
        names: short names of the matrices, such as "0 q_proj", L of them.
        figures: float64 (L, T) for each of FIGURES; NaN where there is none.
    """

    steps: np.ndarray
    names: list[str]
    figures: dict[str, np.ndarray]


def short_name(layer: str) -> str:
    """Return "3 q_proj" for "model.layers.3.self_attn.q_proj", and other names as they are."""
    found = re.search(r"(?:layers|blocks|h)\.(\d+)\..*?(\w+)$", layer)
    return f"{found[1]} {found[2]}" if found else layer


def read_matrices(folder: Path, most_steps: int) -> Matrices | None:
    """Read a run's ternary_health.csv; None where there is none. Lines that are not whole are left out.

    Args:
        most_steps: where there are more validations, so many are taken at even distances, with the first and the last.
    """
    cells: dict[tuple[str, int], tuple[float, ...]] = {}
    try:
        with (folder / HEALTH_NAME).open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                try:
                    key = str(row["layer"]), int(np.int64(row["step"]))
                    cells[key] = tuple(float(row[name]) for name in FIGURES)
                except (KeyError, TypeError, ValueError, OverflowError):
                    continue  # half a line of a run that is on its way
    except (OSError, csv.Error):
        return None
    if not cells:
        return None
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    steps = np.array(sorted({step for _, step in cells}), np.int64)
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, min(most_steps, len(steps))).round().astype(int))]
    nothing = (float("nan"),) * len(FIGURES)
    values = np.array([[cells.get((layer, int(step)), nothing) for step in steps] for layer in layers])
    return Matrices(steps, [short_name(layer) for layer in layers], {f: values[..., i] for i, f in enumerate(FIGURES)})
