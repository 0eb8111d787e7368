"""Hydra finds the sweepers of bitnet_lit here: plugins must lie in the namespace package `hydra_plugins`.

Hydra imports this module at the start of every command, so the work is done elsewhere.
"""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore


class GridSweeper(BasicSweeper):
    """Runs every combination of the swept values that is not done yet (see bitnet_lit/runs/grid.py).

    `train` takes it in place of Hydra's default sweeper (bitnet_lit/runs/own_folder.py).
    """

    job: Any

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.job = task_function  # a bitnet_lit.runs.job.Job

    def sweep(self, arguments: list[str]) -> Any:
        from bitnet_lit.runs.grid import sweep

        return sweep(self, self.job, arguments)


class OptunaSweeper(GridSweeper):
    """Lets Optuna choose the values of each job (see bitnet_lit/runs/search.py)."""

    def sweep(self, arguments: list[str]) -> Any:
        from bitnet_lit.runs.search import search

        return search(self, self.job, arguments)


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="bitnet_optuna",
    node=BasicSweeperConf(_target_=f"{__name__}.OptunaSweeper"),
    provider="bitnet_lit",
)
