"""The dense runs that teach: `{dense_run}` in an option is the run of the dense twin's best with the first seed.

results.jsonl travels to another machine alone. There the run is missing, so it is trained once more, with the same
seed, before the sweeps that need it. Its result stays the one that is there.
"""

from __future__ import annotations

from pathlib import Path

from plan import BASE, DENSE_RUN, Plan, Sweep
from results import Record, Results, seed_of

from bitnet_lit.runs.folder import MODEL
from bitnet_lit.runs.job_folder import job_folders


class Teachers:
    """Finds the dense runs of a study."""

    def __init__(self, plan: Plan, results: Results) -> None:
        self.plan, self.results = plan, results

    def folder(self, recipe: str) -> Path | None:
        """Return the run that teaches a recipe; None where it is not on this machine."""
        record = self._first(recipe)
        if record is None:
            return None
        here = job_folders(self.results.out / record["sweep"])  # a sweep of one seed names its job otherwise
        folders = [folder for folder, overrides in here if overrides and seed_of(overrides) == record["seed"]]
        return next((folder for folder in [Path(record["folder"]), *folders] if (folder / MODEL).is_dir()), None)

    def again(self, sweep: Sweep) -> list[int]:
        """Return the seed of a teacher that must be trained once more by this sweep; [] if there is none."""
        record = self._first(sweep.recipe)
        if record is None or record["sweep"] != sweep.name or self.folder(sweep.recipe) is not None:
            return []
        has_pupils = any(
            DENSE_RUN in value
            for other in self.plan.sweeps
            if other.recipe == sweep.recipe and not self.results.is_complete(other)
            for value in (other.fixed | self.results.combination(self.plan, other)).values()
        )
        return [record["seed"]] if has_pupils else []

    def _first(self, recipe: str) -> Record | None:
        records = self.results.of(f"{recipe}/none/{BASE}")
        return min(records, key=lambda record: record["seed"], default=None)
