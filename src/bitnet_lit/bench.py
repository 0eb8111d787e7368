"""`python -m bitnet_lit.bench` measures speeds. It prints a table, and the same figures as JSON in the last line."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitnet_lit.entry_point import run_command
from bitnet_lit.errors import UserError

if TYPE_CHECKING:
    from bitnet_lit.config import BenchConfig


def _machine() -> dict[str, Any]:
    """Return what a figure depends on: the processor, the GPU and the version of torch."""
    import torch

    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _rows_of(suite: str) -> Callable[[BenchConfig], list[dict[str, Any]]]:
    """Return the function that measures a suite. It is imported only now, with the packages that it needs."""
    from bitnet_lit.config import BenchConfig
    from bitnet_lit.extras import needs

    module, _, name = BenchConfig.SUITES[suite].rpartition(".")
    with needs("triton", f"suite={suite}"):
        function: Callable[[BenchConfig], list[dict[str, Any]]] = getattr(import_module(module), name)
    return function


def _bench(config: BenchConfig) -> None:
    import torch
    from rich.table import Table

    from bitnet_lit.terminal import wide_console

    if config.suite.startswith("gpu") and not torch.cuda.is_available():
        raise UserError(f"suite={config.suite}: this machine has no CUDA device: take suite=data, cpu or cpu_train")
    rows = _rows_of(config.suite)(config)
    table = Table(title=f"suite={config.suite}, medians of interleaved rounds (rounds={config.rounds})")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*[f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values()])
    wide_console(160).print(table)
    print(json.dumps({"suite": config.suite, "machine": _machine(), "rows": rows}))


def main() -> None:
    """Run the command with the arguments in `sys.argv`."""
    run_command("bench", _bench)


if __name__ == "__main__":
    main()
