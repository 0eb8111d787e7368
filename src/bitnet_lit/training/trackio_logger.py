"""`TrackioLogger` logs a run to Trackio, a tracker of Hugging Face that keeps its data on this machine.

Lightning has no logger for it. `logger=trackio` selects this one (conf/logger/trackio.yaml).
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from bitnet_lit.extras import needs
from bitnet_lit.runs.config_keys import flat


class TrackioLogger(Logger):
    """Logs metrics and hyperparameters with `trackio`. A run that is resumed goes on under its name.

    Args:
        project: the project that the run is listed in.
        name: the run's name; None lets Trackio choose one.
        options: further arguments of `trackio.init`, such as space_id="owner/name" to send the run to a Space.

    Raises:
        UserError: trackio is not installed.
    """

    def __init__(self, project: str = "bitnet-lit", name: str | None = None, **options: Any) -> None:
        super().__init__()
        with needs("trackio", "logger=trackio"):
            import trackio  # noqa: F401  reported here, before any data is read
        self._project, self._name, self._options = project, name, options
        self._config: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The run's name."""
        return self._name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of Trackio. It begins when something is logged for the first time."""
        if self._run is None:
            import trackio

            options = {"resume": "allow", "embed": False, **self._options}
            self._run = trackio.init(self._project, name=self._name, config=self._config, **options)
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep the hyperparameters. Trackio takes them when the run begins."""
        self._config |= flat(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log a row of metrics."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Wait until everything is written, and end the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
