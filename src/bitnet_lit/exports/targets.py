"""Export targets: which formats a model can reach, asked before the first training step.

A target is a format with those of its options that decide what it can hold (`gguf_tq2_0`), and the tool that it is for:
a model reaches it when it can be written and when that tool computes it. The conditions stand in each format's file.
"""

from __future__ import annotations

from rich.table import Table

from bitnet_lit.checkpoints.formats.format import Format, all_targets, target_named
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.terminal import console


def problems(format: Format, config: ModelConfig, quant: QuantConfig) -> list[str]:
    """Why a model does not reach a target, each with its remedy; empty when it does."""
    return [*format.problems(config, quant), *format.tool_problems(config, quant)]


def check_targets(targets: list[str], config: ModelConfig, quant: QuantConfig) -> None:
    """Refuse a model that cannot reach the targets it names.

    Raises:
        UserError: every reason, with its remedy, in one line.
    """
    found = [f"{target}: {problem}" for target in targets for problem in problems(target_named(target), config, quant)]
    if found:
        raise UserError("export.targets: " + "; ".join(found))


def print_advice(config: ModelConfig, quant: QuantConfig) -> None:
    """A table of all targets: reachable, or what to change."""
    table = Table(title=f"{config.name}, {quant.name}")
    for column in ("target", "reachable", "what to change"):
        table.add_column(column)
    for format in all_targets():
        found = problems(format, config, quant)
        table.add_row(format.target, "no" if found else "yes", "\n".join(found))
    console().print(table)
