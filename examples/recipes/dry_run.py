"""What dry_run=true prints: the sweeps that are left."""

from __future__ import annotations

from collections.abc import Callable

from plan import Plan, Sweep
from rich.table import Table

from bitnet_lit.terminal import wide_console


def show(plan: Plan, jobs_left: Callable[[Sweep], int]) -> None:
    """Print the sweeps that are left, with runs, tokens and minutes on one GPU."""
    table = Table()
    for column in ("sweep", "runs", "tokens a run", "tokens", "minutes", "minutes so far"):
        table.add_column(column, justify="left" if column == "sweep" else "right")
    minutes = tokens = runs = 0.0
    for sweep in plan.sweeps:
        left = jobs_left(sweep)
        if left <= 0:
            continue
        each = sweep.gpu_seconds(float(plan.settings["startup_seconds"])) / 60 / sweep.jobs * left
        minutes, tokens, runs = minutes + each, tokens + left * sweep.tokens, runs + left
        total = f"{left * sweep.tokens / 1e6:,.0f} M"
        table.add_row(sweep.name, str(left), f"{sweep.tokens / 1e6:,.1f} M", total, f"{each:.1f}", f"{minutes:.1f}")
    wide_console(120).print(table)
    print(f"{runs:.0f} runs, {tokens / 1e9:.2f} G tokens, about {minutes:.0f} minutes on one GPU (assumed speeds)")
