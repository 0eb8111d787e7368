"""A task that stands for training in sweeps, so that each start takes as long as Hydra takes."""

from pathlib import Path

from bitnet_lit import cli, train
from bitnet_lit.runs.job import ResumableTask


class StandIn:
    """Notes what a sweep asks of it; a class that derives from it says what a job does, in `__call__(config)`.

    Attributes:
        ran: what `__call__` notes of the jobs since the last start.
        resumed: names of the folders that the sweep went on with since the last start.
        shown: the jobs of dry runs.
    """

    def __init__(self):
        self.ran, self.resumed, self.shown = [], [], []

    def resume(self, folder, config):
        self.resumed.append(Path(folder).name)
        return config, ["resume=x"]

    def start(self, *arguments):
        """Start a sweep, and return its exit status."""
        self.ran.clear()
        self.resumed.clear()
        resumable = ResumableTask(self.resume, self.shown.extend)
        try:
            cli.run("train", self, arguments, defaults=train._place, configure=train._configure, resumable=resumable)
        except SystemExit as end:
            return end.code
        return 0
