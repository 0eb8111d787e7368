"""The study of recipes: does a 1.58-bit model lose anything to its dense twin, and which options help?

    python3 examples/recipes/study.py dry_run=true              # the sweeps, their runs, tokens and minutes
    python3 examples/recipes/study.py budget_minutes=28         # on all GPUs; the same line again goes on

Each twin of a recipe gets a search with the same number of trials, then several seeds of its best trial; options are
tried one at a time on top of it (plan.py). Every sweep is an ordinary `python -m bitnet_lit.train -m`, printed as it
begins. Results are lines of results.jsonl as the runs end, and tables.md has the tables of docs/recipes.md.
"""

from __future__ import annotations

import platform
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
from dry_run import show
from pictures import Pictures
from plan import DENSE_RUN, NO_OPTIONS, SAME_TIME, SEARCH, TWINS, Plan, Sweep, read_settings
from pool import Pool, Running
from results import Results
from tables import Tables, put_into
from teachers import Teachers

import bitnet_lit
from bitnet_lit.cli import compose
from bitnet_lit.data.shard_folder import is_complete
from bitnet_lit.errors import UserError
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.overrides import quoted
from bitnet_lit.runs.devices import visible_gpus
from bitnet_lit.runs.folder import locked

SETTINGS = Path(__file__).with_name("study.yaml")
POLL_SECONDS = 1.0
LEAST_SECONDS = 60.0  # a sweep that would have less before the end of the budget does not begin


class Study:
    """Runs the sweeps of a plan in order, as GPUs have room.

    Args:
        command: what a sweep's overrides are given to.
        machine: where it runs, for the results.
    """

    def __init__(self, plan: Plan, command: list[str], machine: str) -> None:
        self.plan, self.command = plan, command
        self.out = Path(plan.settings["out"]).absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        self.results = Results(self.out, machine)
        self.tables = Tables(plan, self.results)
        self.teachers = Teachers(plan, self.results)
        self.failed: dict[str, str] = {}
        self.again: set[str] = set()  # sweeps that were started once more
        self.is_stopped = False

    def overrides(self, sweep: Sweep, jobs: int) -> list[str]:
        """Return the overrides of a sweep, with the values of the best trial that it begins from.

        Args:
            jobs: how many of its runs go side by side.
        """
        fixed = dict(sweep.fixed)
        if sweep.best_of is not None:
            values = self.results.best_values(sweep.best_of)
            assert values is not None, "a sweep begins when its search is done"
            fixed = {key: fixed.pop(key) for key in ("experiment", "quant")} | values | fixed
        fixed |= self.results.combination(self.plan, sweep)
        if sweep.what == SAME_TIME:
            fixed["trainer.max_tokens"] = str(self._tokens_in_the_same_time(sweep))
        if any(DENSE_RUN in value for value in fixed.values()):
            dense = self.teachers.folder(sweep.recipe)
            fixed = {key: value.replace(DENSE_RUN, str(dense)) for key, value in fixed.items()}
        start = [
            f"hydra.sweep.dir={quoted(str(self.out / sweep.name))}",
            "launcher=joblib",
            f"hydra.launcher.n_jobs={jobs}",
        ]
        if sweep.what == SEARCH:
            elsewhere = self.results.elsewhere(sweep)
            varied = [*(f"{key}={values}" for key, values in sweep.space.items())]
            seed = sweep.sampler_seed + elsewhere  # a study that goes on without its folder draws other points
            varied += [f"sweep.n_trials={sweep.jobs - elsewhere}", f"sweep.seed={seed}", "sweep.metric=val/loss"]
        else:
            varied = [f"seed={','.join(map(str, self._seeds_left(sweep)))}"]
        return [*(f"{key}={value}" for key, value in fixed.items()), *varied, *start]

    def _tokens_in_the_same_time(self, sweep: Sweep) -> int:
        b158, dense = (self.results.speed(sweep.recipe, quant) for quant in TWINS)
        assert b158 and dense, "a sweep of the same time begins when the speeds are known"
        return round(sweep.tokens * b158 / dense)

    def _is_ready(self, sweep: Sweep, running: set[str]) -> bool:
        if sweep.name in {*running, *self.failed} or self.is_done(sweep):
            return False
        if not all(self._is_over(need) for need in sweep.needs):
            return False
        if sweep.best_of is not None and self.results.best(sweep.best_of) is None:
            self.failed[sweep.name] = f"no trial of {sweep.best_of} has a loss"
            return False
        if sweep.what == SAME_TIME and not all(self.results.speed(sweep.recipe, quant) for quant in TWINS):
            self.failed[sweep.name] = "the runs for the speed logged no tokens/s: they were too short"
            return False
        folder = self.out / sweep.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                return True
        except UserError:  # processes of a killed study still save
            return False

    def _is_over(self, name: str) -> bool:
        """Return whether a sweep that is needed is done, or failed if it is an option: combinations leave it out."""
        needed = self.plan.by_name.get(name)
        may_fail = needed is not None and needed.what not in NO_OPTIONS
        return needed is not None and (self.is_done(needed) or (may_fail and name in self.failed))

    def _has_nothing_to_combine(self, sweep: Sweep) -> bool:
        """Return whether no option helped of those that a sweep would have together: its result is that of base."""
        is_combination = sweep.options_of is not None and all(self._is_over(need) for need in sweep.needs)
        return is_combination and not self.results.combination(self.plan, sweep)

    def run(self, pool: Pool, budget_seconds: float | None) -> None:
        """Run until all is done, the time is up, or a signal comes."""
        deadline = None if budget_seconds is None else time.monotonic() + budget_seconds
        for sweep in self.plan.sweeps:
            self._collect(sweep)
        while not self.is_stopped and (deadline is None or time.monotonic() < deadline):
            for one in list(pool.running):
                self._collect(one.sweep)
            for one in pool.ended():
                self._collect(one.sweep)
                if not self.is_done(one.sweep):
                    self._note_failure(one)
            has_time = deadline is None or time.monotonic() < deadline - min(LEAST_SECONDS, (budget_seconds or 0) / 4)
            names = {one.sweep.name for one in pool.running}
            ready = [sweep for sweep in self.plan.sweeps if self._is_ready(sweep, names)] if has_time else []
            if ready:
                self._start(ready[0], pool)
            elif not pool.running and not self._is_waiting():
                break
            time.sleep(0 if ready and pool.place_for(ready[0], self.jobs_left(ready[0])) else POLL_SECONDS)
        for one in pool.stop():
            self._collect(one.sweep)

    def _note_failure(self, one: Running) -> None:
        """Let a sweep begin once more, since a process may have died; its finished runs are kept.

        A sweep whose input was wrong, or that has begun twice, has failed.
        """
        name, why = one.sweep.name, self._why(one)
        is_first = one.process.returncode != UserError.status and name not in self.again
        if is_first:
            self.again.add(name)
        else:
            self.failed[name] = why
        print(f"{'once more' if is_first else 'failed'}: {name}: {why}", file=sys.stderr, flush=True)

    def _why(self, one: Running) -> str:
        """Return why a sweep has ended before its time: the last error that its log has."""
        log = self._log(one.sweep)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = next((line for line in reversed(lines) if line.startswith("error: ")), "")
        return f"exit status {one.process.returncode}, {said or 'no error'} (see {log})"

    def check(self, gpus: list[str]) -> None:
        """Refuse to begin without GPUs or data, or with results of another plan.

        Raises:
            UserError: what is missing, and how to get it.
        """
        wanted = self.plan.settings["gpus"]
        if wanted is None and not gpus:
            raise UserError("no GPU is visible: on a CPU the study takes months; gpus=0 runs it there, for small sizes")
        if len(gpus) < (wanted or 0):
            raise UserError(f"gpus={wanted}: this machine shows {len(gpus)}")
        for folder in dict.fromkeys(sweep.fixed["data.dir"] for sweep in self.plan.sweeps):
            if not is_complete(Path(folder)):
                raise UserError(f"{folder}: no shards there: docs/recipes.md has the commands that prepare them")
        self.results.check(self.plan)

    def _is_waiting(self) -> bool:
        """Return whether a folder that a sweep needs is still locked by a process of a killed study."""
        for sweep in self.plan.sweeps:
            folder = self.out / sweep.name
            if sweep.name not in self.failed and not self.is_done(sweep) and folder.is_dir():
                try:
                    with locked(folder):
                        pass
                except UserError:
                    return True
        return False

    def is_done(self, sweep: Sweep) -> bool:
        """Return whether nothing of a sweep is left to do."""
        return self.jobs_left(sweep) <= 0

    def jobs_left(self, sweep: Sweep) -> int:
        """Return how many runs of a sweep are left."""
        if sweep.what == SEARCH:
            return sweep.jobs - len(self.results.of(sweep.name))
        left = len(self._seeds_left(sweep))
        return 0 if left and self._has_nothing_to_combine(sweep) else left

    def _seeds_left(self, sweep: Sweep) -> list[int]:
        return self.results.missing_seeds(sweep) or self.teachers.again(sweep)

    def _log(self, sweep: Sweep) -> Path:
        return self.out / "logs" / f"{sweep.name.replace('/', '_')}.log"

    def _start(self, sweep: Sweep, pool: Pool) -> None:
        room = pool.place_for(sweep, self.jobs_left(sweep))
        if room is None:
            return
        place, jobs = room
        overrides = self.overrides(sweep, jobs)
        gpu = f"GPU {pool.gpus[place]}" if pool.gpus else "the CPU"
        shown = shlex.join(["python", "-m", "bitnet_lit.train", "-m", *overrides])
        print(f"{time.strftime('%H:%M:%S')} {sweep.name} on {gpu}: {shown}", flush=True)
        pool.start(sweep, [*self.command, *overrides], place, jobs, self._log(sweep))

    def _collect(self, sweep: Sweep) -> None:
        new = self.results.collect(sweep)
        for record in new:
            loss = "diverged" if record["loss"] is None else f"{record['loss']:.4f}"
            print(f"{time.strftime('%H:%M:%S')} {sweep.name} {record['job']}: {loss}", flush=True)
        if new:
            with atomic_file(self.out / "tables.md") as temporary:
                temporary.write_text(self.tables.text(), encoding="utf-8")


def check_overrides(plan: Plan) -> None:
    """Compose a run with the overrides that were typed, before any run begins.

    Raises:
        UserError: a run would refuse them.
    """
    sweep = plan.sweeps[0] if plan.sweeps else None
    if plan.typed and sweep is not None:
        fixed = {key: value for key, value in sweep.fixed.items() if key != "sweep" and DENSE_RUN not in value}
        try:
            compose("train", [f"{key}={value}" for key, value in fixed.items()])
        except UserError as error:
            raise UserError(f"overrides={plan.settings['overrides']}: {error}") from None


def usage() -> str:
    """Return what `--help` prints: what the study does, and the keys with their values and meaning."""
    keys = [line for line in SETTINGS.read_text(encoding="utf-8").splitlines() if line[:1].isalpha()]
    title = f"Keys, as key=value ({SETTINGS.name} has them in full):"
    return "\n".join([(__doc__ or "").strip(), "", title, "", *keys])


def machine(has_gpus: bool) -> str:
    """Return what a result depends on: the GPU or the processor, and the versions."""
    is_cuda = has_gpus and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}, bitnet_lit {bitnet_lit.__version__}"


def main(typed: list[str], command: list[str]) -> int:
    """Run the study, and return the exit status: 0 all is done, 1 sweeps failed, 2 a mistake, 3 the time is up."""
    if {"-h", "--help"} & {*typed}:
        print(usage())
        return 0
    try:
        settings = read_settings(typed, SETTINGS)
        study = Study(Plan(settings), command, machine(settings.gpus != 0))
        if settings.budget_minutes != 0:  # 0: only the tables
            study.plan.check_needs()
            check_overrides(study.plan)
        if settings.dry_run:
            show(study.plan, study.jobs_left)
            return 0
        gpus = visible_gpus() if settings.gpus != 0 else []
        if settings.budget_minutes != 0:
            study.check(gpus)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(study, "is_stopped", True))
        budget = settings.budget_minutes
        pool = Pool(gpus[: settings.gpus], settings.jobs_per_gpu)
        study.run(pool, None if budget is None else budget * 60)
        text = study.tables.text()
        print(text)
        if settings.into is not None:
            put_into(Path(settings.into), text)
        if settings.pictures is not None:
            Pictures(study.plan, study.results).write(Path(settings.pictures))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.status
    left = [sweep for sweep in study.plan.sweeps if not study.is_done(sweep)]
    for name, why in study.failed.items():
        print(f"error: {name}: {why}", file=sys.stderr)
    if left:
        print(f"{len(left)} sweeps are left; the same command goes on", file=sys.stderr)
    return 1 if study.failed else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], [sys.executable, "-m", "bitnet_lit.train", "-m"]))
