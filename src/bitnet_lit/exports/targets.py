"""Before the first training step, this module checks which export targets a model can reach.

A target is a format together with the options that decide which models it can hold, such as `gguf_tq2_0`. A model
reaches a target if the format can hold it and the tool that the format is for computes it correctly. Each format's own
file states the conditions.
"""

from __future__ import annotations

from rich.table import Table

from bitnet_lit.checkpoints.formats.format import Format, all_targets, target_named
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.terminal import console


def problems(format: Format, config: ModelConfig, quant: QuantConfig) -> list[str]:
    """List why a model does not reach a target, each reason with its remedy; the list is empty if it does."""
    return [*format.problems(config, quant), *format.tool_problems(config, quant)]


def check_targets(targets: list[str], config: ModelConfig, quant: QuantConfig) -> None:
    """Refuse a model that cannot reach all of `targets`.

    Raises:
        UserError: the model cannot reach a target; the message gives all reasons with their remedies.
    """
    found = [f"{target}: {problem}" for target in targets for problem in problems(target_named(target), config, quant)]
    if found:
        raise UserError("export.targets: " + "; ".join(found))


def print_advice(config: ModelConfig, quant: QuantConfig) -> None:
    """Print a table of all targets: whether the model reaches each, and otherwise what to change."""
    table = Table(title=f"{config.name}, {quant.name}")
    for column in ("target", "reachable", "what to change"):
        table.add_column(column)
    for format in all_targets():
        found = problems(format, config, quant)
        table.add_row(format.target, "no" if found else "yes", "\n".join(found))
    console().print(table)
