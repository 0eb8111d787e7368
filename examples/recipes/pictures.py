"""The pictures of docs/recipes.md, made from results.jsonl: what each option changes, and the loss against the bytes.

Points are means over seeds, and bars are their 95 % intervals.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from plan import BASE, COMBINED, EQUAL_BYTES, NO_OPTIONS, TWINS, WIDE, Plan
from results import Record, Results

from bitnet_lit.errors import UserError
from bitnet_lit.extras import needs
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.reports.statistics import Estimate

OPTIONS, BYTES = "recipes_options.png", "recipes_bytes.png"
FARTHEST = 0.3  # nats: what changes more is written at the edge
BITNET, DENSE = "#1f6feb", "#444444"
NAMES = {
    BASE: "b158",
    WIDE: "b158, twice the width",
    EQUAL_BYTES: "b158, wider, at equal bytes",
    COMBINED: "b158, with the options that helped",
}
DENSE_NAMES = {BASE: "dense", COMBINED: "dense, with the options that helped"}
MARKERS = dict(zip(NAMES, "osD^", strict=True))
PLACES = {BASE: (-24, -9), WIDE: (-10, -18), EQUAL_BYTES: (25, -6)}  # of a label of b158, in points from its marker
DENSE_PLACE = (20, 4)


def _bar(estimate: Estimate) -> float:
    return estimate.half_width or 0.0


def _losses(records: list[Record]) -> list[float]:
    return [record["loss"] for record in records if record["loss"] is not None]


class Pictures:
    """Draws the pictures of a plan from what is there."""

    def __init__(self, plan: Plan, results: Results) -> None:
        self.plan, self.results = plan, results

    def write(self, folder: Path) -> list[Path]:
        """Write the pictures that have something to show, and return their paths.

        Raises:
            UserError: matplotlib is not installed, or the folder cannot be written.
        """
        drawn = {OPTIONS: self._options(), BYTES: self._bytes()}
        paths = [folder / name for name, figure in drawn.items() if figure is not None]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in paths:
                content = io.BytesIO()
                drawn[path.name].savefig(content, format="png", dpi=110)
                with atomic_file(path) as temporary:
                    temporary.write_bytes(content.getvalue())
        except OSError as error:
            raise UserError(f"pictures={folder}: cannot be written ({error.strerror}): give another folder") from None
        return paths

    def _options(self) -> Any:
        """Return each option's change of the loss of b158 in the recipe that was tried first, the best at the top."""
        changes: list[tuple[Estimate, str]] = []
        recipe = next((step.split()[1] for step in self.plan.settings["order"] if step.startswith("options ")), "")
        for sweep in self.plan.sweeps:
            if (sweep.recipe, sweep.quant) == (recipe, TWINS[0]) and sweep.what not in NO_OPTIONS:
                change = self.results.change(sweep.name, f"{recipe}/{TWINS[0]}/{BASE}")
                if change is not None:
                    changes.append((change, sweep.what))
        if not changes:
            return None
        changes.sort(key=lambda each: -each[0].mean)
        figure, axes = _axes(8, 1.2 + 0.24 * len(changes))
        edge = max(change.mean + _bar(change) for change, _ in changes if change.mean <= FARTHEST)
        for place, (change, _) in enumerate(changes):
            if change.mean > FARTHEST:
                axes.text(
                    edge, place, f"+{change.mean:.2f} \N{RIGHTWARDS ARROW}", ha="right", va="center", color=BITNET
                )
            else:
                axes.errorbar(change.mean, place, xerr=_bar(change), fmt="o", color=BITNET, capsize=2, markersize=4)
        axes.axvline(0, color=DENSE, linewidth=1)
        axes.set_yticks(range(len(changes)), [name for _, name in changes])
        axes.set_ylim(-0.8, len(changes) - 0.2)
        axes.set_xlabel(f"change of the validation loss of b158, nats per token ({recipe}); left is better")
        return figure

    def _bytes(self) -> Any:
        """Return the loss of every twin, width and combination on the first recipe's text, against its megabytes.

        A line joins the sizes of a twin, so that the twins can be compared at equal bytes.
        """
        figure, axes = _axes(8, 5.5)
        labels: set[str] = set()
        sizes: dict[str, list[tuple[float, float]]] = {}
        text = _text_of(self.plan.sweeps[0].recipe) if self.plan.sweeps else ""
        for sweep in self.plan.sweeps:
            records = self.results.of(sweep.name)
            losses = _losses(records)
            is_dense = sweep.quant != TWINS[0]
            names, color = (DENSE_NAMES, DENSE) if is_dense else (NAMES, BITNET)
            if sweep.what not in names or _text_of(sweep.recipe) != text or not losses or not records[0].get("bytes"):
                continue
            label, estimate = names[sweep.what], Estimate.of(losses)
            shown = {"color": color, "fmt": MARKERS[sweep.what], "capsize": 2, "markersize": 6}
            x = records[0]["bytes"] / 1e6
            axes.errorbar(x, estimate.mean, yerr=_bar(estimate), label=None if label in labels else label, **shown)
            labels |= {label}
            if sweep.what == BASE:
                sizes.setdefault(color, []).append((x, estimate.mean))
            if sweep.what != COMBINED:  # the page says how large these are
                size = f"{(records[0].get('parameters') or 0) / 1e6:.1f} M"
                place = {"xytext": DENSE_PLACE if is_dense else PLACES[sweep.what], "ha": "center", "color": color}
                axes.annotate(size, (x, estimate.mean), textcoords="offset points", fontsize=9, **place)
        if not labels:
            return None
        for color, places in sizes.items():
            axes.plot(*zip(*sorted(places), strict=True), color=color, linewidth=1, alpha=0.5)
        axes.set_xscale("log")
        ticks = [0.5, 1, 2, 5, 10, 20, 50, 100]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.margins(0.1, 0.08)
        axes.set_xlabel("weights, MB (2 bits for a ternary weight, 16 for others)")
        axes.set_ylabel("validation loss, nats per token")
        axes.legend(frameon=False)
        return figure


def _text_of(recipe: str) -> str:
    return recipe.partition("_")[0]


def _axes(width: float, height: float) -> tuple[Any, Any]:
    with needs("matplotlib", "pictures="):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
