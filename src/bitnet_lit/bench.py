"""`python -m bitnet_lit.bench` measures speeds. It prints a table, and the same figures as JSON in the last line."""

from __future__ import annotations

import json
import os
import platform
from typing import TYPE_CHECKING

from bitnet_lit.entry_point import run_command

if TYPE_CHECKING:
    from bitnet_lit.config import BenchConfig


def _bench(config: BenchConfig) -> None:
    import torch
    from rich.table import Table

    from bitnet_lit.terminal import wide_console

    if config.suite == "data":
        from bitnet_lit.data.benchmark import data_rows

        rows = data_rows(config.rounds)
    else:
        from bitnet_lit.inference.benchmark import cpu_rows
        from bitnet_lit.inference.engines.cpu.cores import allowed_threads

        rows = cpu_rows(config.rounds, allowed_threads(config.threads))
    table = Table(title=f"suite={config.suite}, median of {config.rounds} interleaved rounds")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*[f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values()])
    wide_console(160).print(table)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({"suite": config.suite, "machine": machine, "rows": rows}))


def main() -> None:
    """Run the command with the arguments in `sys.argv`."""
    run_command("bench", _bench)


if __name__ == "__main__":
    main()
