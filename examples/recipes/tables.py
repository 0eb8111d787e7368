"""The tables of docs/recipes.md, made from results.jsonl.

A loss is a mean over seeds with half of its 95 % interval. A difference is the mean of the differences between runs of
the same seed, which share the order of their data, so its interval is usually the narrower one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from plan import BASE, COMBINED, EQUAL_BYTES, NO_OPTIONS, SAME_OPTIONS, SAME_TIME, SEARCH, TWINS, WIDE, Plan, Sweep
from results import DIVERGED, Record, Results

from bitnet_lit.errors import UserError
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.reports.gaps import megabytes
from bitnet_lit.reports.statistics import Estimate
from bitnet_lit.reports.tables import amount, with_interval

BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
LOSS, BITS = "loss", "bits_per_byte"


def mean(records: Iterable[Record], figure: str) -> str:
    """Return the mean of a figure over seeds with half of its 95 % interval."""
    values = [record[figure] for record in records if record.get(figure) is not None]
    return with_interval(Estimate.of(values) if values else None)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return ["", "No run yet.", ""]
    lines = [f"| {' | '.join(headings)} |", "|--" + "|--:" * (len(headings) - 1) + "|"]
    return ["", *lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _parameters(*twins: Sequence[Record]) -> str:
    """Return the parameters of the twins: once if they are equal, since value embeddings give a twin more."""
    return ", ".join(dict.fromkeys(amount(records[0].get("parameters")) for records in twins if records))


def _count(records: Sequence[Record]) -> str:
    failed = sum(record["state"] == DIVERGED for record in records)
    return f"{len(records)}" + (f" ({failed} diverged)" if failed else "")


class Tables:
    """Makes the tables of a plan from what is there."""

    def __init__(self, plan: Plan, results: Results) -> None:
        self.plan, self.results = plan, results
        self.recipes = list(dict.fromkeys(sweep.recipe for sweep in plan.sweeps))

    def _of(self, recipe: str, quant: str, what: str) -> list[Record]:
        return self.results.of(f"{recipe}/{quant}/{what}")

    def _difference(self, one: str, other: str, figure: str) -> str:
        return with_interval(self.results.change(one, other, figure), signed=True)

    def twins(self, what: str) -> list[str]:
        """Each twin at equal tokens: the best trials, or these with all options that helped."""
        rows = []
        for recipe in self.recipes:
            b158, dense = (self._of(recipe, quant, what) for quant in TWINS)
            names = [f"{recipe}/{quant}/{what}" for quant in TWINS]
            if b158 or dense:
                tokens = amount((b158 or dense)[0].get("tokens"))
                figures = [_parameters(b158, dense), tokens, f"{len(b158)}, {len(dense)}"]
                losses = [mean(b158, LOSS), mean(dense, LOSS), self._difference(*names, LOSS)]
                bits = [mean(b158, BITS), mean(dense, BITS), self._difference(*names, BITS)]
                rows.append([recipe, *figures, *losses, *bits])
        names = ("b158", "dense", "gap", "b158, bits/byte", "dense, bits/byte", "gap, bits/byte")
        return _table(["recipe", "parameters", "tokens", "seeds", *names], rows)

    def against_dense(self, what: str) -> list[str]:
        """b158 with another width, or trained for the same time, against the dense base run."""
        rows = []
        for recipe in self.recipes:
            b158, dense = self._of(recipe, TWINS[0], what), self._of(recipe, "none", BASE)
            if b158 and dense:
                sizes = [megabytes(each[0]["bytes"]) if each[0].get("bytes") else "-" for each in (b158, dense)]
                tokens = [amount(each[0].get("tokens")) for each in (b158, dense)]
                names = f"{recipe}/{TWINS[0]}/{what}", f"{recipe}/none/{BASE}"
                losses = [mean(b158, LOSS), mean(dense, LOSS), self._difference(*names, LOSS)]
                rows.append([recipe, *sizes, *tokens, *losses, self._difference(*names, BITS)])
        names = ("b158, weights", "dense, weights", "b158, tokens", "dense, tokens")
        return _table(["recipe", *names, "b158", "dense", "gap", "gap, bits/byte"], rows)

    def speeds(self) -> list[str]:
        """Tokens/s of each twin alone on a GPU."""
        rows = []
        for recipe in self.recipes:
            b158, dense = (self.results.speed(recipe, quant) for quant in TWINS)
            if b158 and dense:
                rows.append([recipe, amount(b158), amount(dense), f"{b158 / dense:.3f}"])
        return _table(["recipe", "b158, tokens/s", "dense, tokens/s", "ratio"], rows) if rows else []

    def options(self) -> list[str]:
        """Each option against the base run of its twin."""
        rows = []
        for sweep in self.plan.sweeps:
            records = self.results.of(sweep.name)
            if sweep.what in NO_OPTIONS or not records:
                continue
            base, dense = (f"{sweep.recipe}/{quant}/{BASE}" for quant in (sweep.quant, "none"))
            typed = " ".join(f"`{item}`" for item in self.plan.option(sweep.what))
            figures = [_count(records), mean(records, LOSS), self._difference(sweep.name, base, LOSS)]
            gap = self._difference(sweep.name, dense, LOSS)
            rows.append([sweep.recipe, sweep.quant, f"{sweep.what}: {typed}", *figures, gap])
        return _table(["recipe", "twin", "option", "seeds", "loss", "change", "gap to dense"], rows)

    def combinations(self) -> list[str]:
        """The options of each combination."""
        rows = []
        for sweep in self.plan.sweeps:
            if sweep.what == COMBINED and self.results.of(sweep.name):
                chosen = self.results.combination(self.plan, sweep)
                change = self._difference(sweep.name, f"{sweep.recipe}/{sweep.quant}/{BASE}", LOSS)
                gap = self._difference(sweep.name, f"{sweep.recipe}/none/{BASE}", LOSS)
                rows.append([sweep.recipe, sweep.quant, " ".join(f"`{k}={v}`" for k, v in chosen.items()), change, gap])
        return _table(["recipe", "twin", "options", "change", "gap to dense without options"], rows) if rows else []

    def same_options(self) -> list[str]:
        """b158 with the options of the dense twin's combination, against that combination and its own base run."""
        rows = []
        for recipe in self.recipes:
            names = f"{recipe}/{TWINS[0]}/{SAME_OPTIONS}", f"{recipe}/none/{COMBINED}"
            b158, dense = map(self.results.of, names)
            if b158:
                losses = [mean(b158, LOSS), mean(dense, LOSS), self._difference(*names, LOSS)]
                change = self._difference(names[0], f"{recipe}/{TWINS[0]}/{BASE}", LOSS)
                rows.append([recipe, _parameters(b158, dense), *losses, change])
        return _table(["recipe", "parameters", "b158", "dense", "gap", "change of b158 by the options"], rows)

    def searches(self) -> list[str]:
        """Each search, and the command of its best trial."""
        rows = []
        for sweep in self.plan.sweeps:
            records = self.results.of(sweep.name)
            if sweep.what == SEARCH and (best := self.results.best(sweep.name)) is not None:
                rows.append([sweep.recipe, sweep.quant, _count(records), f"{best['loss']:.4f}", self._command(sweep)])
        return _table(["recipe", "twin", "trials", "best loss", "command of the best"], rows)

    def _command(self, search: Sweep) -> str:
        values = self.results.best_values(search.name) or {}
        typed = [f"experiment={search.fixed['experiment']}", f"quant={search.quant}"]
        return f"`{' '.join([*typed, *(f'{key}={value}' for key, value in values.items()), 'seed=1,2,3'])}`"

    def text(self) -> str:
        """Return all tables, with headings."""
        parts = {
            "The twins at equal tokens": self.twins(BASE),
            "b158 with twice the width": self.against_dense(WIDE),
            "At equal bytes: b158 so wide that its weights take as much": self.against_dense(EQUAL_BYTES),
            "At equal training time": [*self.speeds(), *self.against_dense(SAME_TIME)],
            "Options, one at a time": self.options(),
            "With all options that helped": [*self.twins(COMBINED), *self.combinations()],
            "Both twins with the dense twin's options": self.same_options(),
            "Searches": self.searches(),
        }
        machines = Counter(record["machine"] for record in self.results.records.values() if record.get("machine"))
        runs = [f"{count} runs on {machine}." for machine, count in machines.items()]
        lines = [*runs, *([""] if runs else [])]
        lines += [line for heading, table in parts.items() for line in (f"### {heading}", *table)]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the study's two marks in a page.

    Raises:
        UserError: the page is missing, or has no marks.
    """
    try:
        whole = page.read_text(encoding="utf-8")
        before, rest = whole.split(BEGIN)
        _, after = rest.split(END)
    except (OSError, ValueError):
        raise UserError(f"into={page}: no page with one {BEGIN} and one {END} behind it") from None
    with atomic_file(page) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
