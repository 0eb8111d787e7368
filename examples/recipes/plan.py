"""The plan of the study: study.yaml becomes a list of sweeps, the most telling first.

Each sweep is one command `python -m bitnet_lit.train -m ...` in a folder of its own, `<recipe>/<twin>/<what>`:

    gutenberg_5m/b158/search       trials that Optuna chooses; gutenberg_5m/none/search has as many
    gutenberg_5m/b158/base         the best trial again, with each seed
    gutenberg_5m/b158/qk_norm      the best trial with one option more, with each seed
    gutenberg_5m/b158/wide         the best trial with twice the width, with each seed
    gutenberg_5m/b158/equal_bytes  the best trial so wide that its weights take the bytes of the dense twin's
    gutenberg_5m/b158/speed        the best trial alone on the machine, some hundred steps, for its tokens/s
    gutenberg_5m/b158/same_time    the best trial for as long as the dense twin takes, with each seed
    gutenberg_5m/b158/combined     the best trial with all options that helped, with each seed
    gutenberg_5m/b158/same_options the best trial with the options of the dense twin's combination, with each seed
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitnet_lit.errors import UserError, one_line
from bitnet_lit.runs.job_names import identity

TWINS = ("b158", "none")
SEARCH, BASE, WIDE, EQUAL_BYTES = "search", "base", "wide", "equal_bytes"
SPEED, SAME_TIME, COMBINED, SAME_OPTIONS = "speed", "same_time", "combined", "same_options"
NO_OPTIONS = (SEARCH, BASE, WIDE, EQUAL_BYTES, SPEED, SAME_TIME, COMBINED, SAME_OPTIONS)
SPEED_STEPS = 300
DENSE_RUN = "{dense_run}"  # in an option's override: the folder of the dense twin's first seed


@dataclass(frozen=True)
class Sweep:
    """A sweep of the study.

    Attributes:
        recipe, quant, what: where it belongs; together they are its name.
        fixed: overrides of every job, by key. The values of the best trial come between `experiment` and these.
        space: what a search chooses from; empty for a grid over seeds.
        sampler_seed: of a search's random points. Twins have the same, so that the same points are tried with both.
        seeds: of a grid.
        jobs: how many runs it has.
        tokens, tokens_per_s: of one run; the speed is an assumption.
        needs: sweeps that must be done before it begins.
        is_alone: whether nothing else may run on the machine: the host's other work slows a small model too.
    """

    recipe: str
    quant: str
    what: str
    fixed: dict[str, str]
    space: dict[str, str]
    seeds: tuple[int, ...]
    jobs: int
    tokens: float
    tokens_per_s: float
    needs: tuple[str, ...] = ()
    is_alone: bool = False
    sampler_seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.recipe}/{self.quant}/{self.what}"

    @property
    def best_of(self) -> str | None:
        """The search whose best trial this sweep begins from."""
        return None if self.what == SEARCH else f"{self.recipe}/{self.quant}/{SEARCH}"

    @property
    def options_of(self) -> str | None:
        """The combination whose options this sweep has."""
        return {COMBINED: self.name, SAME_OPTIONS: f"{self.recipe}/none/{COMBINED}"}.get(self.what)

    def gpu_seconds(self, startup_seconds: float) -> float:
        """Return the time of the sweep on one GPU, one run after the other.

        Start-up costs the GPU little, so a quarter of it counts: several runs share a GPU.
        """
        return self.jobs * (self.tokens / self.tokens_per_s + startup_seconds / 4)


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """Return overrides by key; the last one of a key counts."""
    return dict(override.partition("=")[::2] for override in overrides)


def read_settings(typed: list[str], default: Path) -> DictConfig:
    """Read study.yaml, changed by what was typed (`key=value`).

    Raises:
        UserError: a key is unknown, or a value has no such form.
    """
    settings = OmegaConf.load(default)
    OmegaConf.set_struct(settings, True)
    for item in typed:
        key, sign, value = item.partition("=")
        if not sign or key not in settings:
            raise UserError(f"{item}: give key=value with one of {', '.join(map(str, settings))}")
        try:
            settings[key] = OmegaConf.from_dotlist([f"value={value}"]).value
        except (OmegaConfBaseException, ValueError) as error:
            raise UserError(f"{item}: {' '.join(str(error).split())}") from None
    assert isinstance(settings, DictConfig)
    for key, least in (("trials", 1), ("jobs_per_gpu", 1), ("gpus", 0), ("budget_minutes", 0)):
        value = settings[key]
        is_number = isinstance(value, (int, float) if key == "budget_minutes" else int) and not isinstance(value, bool)
        if not (is_number and value >= least) and not (value is None and key in ("gpus", "budget_minutes")):
            number = "number" if key == "budget_minutes" else "whole number"
            raise UserError(f"{key}={value}: must be a {number}, at least {least}")
    _check_shapes(settings)
    return settings


def _check_shapes(settings: DictConfig) -> None:
    for key in ("data", "recipes", "space", "options", WIDE, EQUAL_BYTES):
        if not isinstance(settings[key], DictConfig):
            raise UserError(f"{key}={settings[key]}: must be a mapping, as in study.yaml")
    for key, kind, example in (("seeds", int, "[1,2,3]"), ("overrides", str, "[a.key=1]"), ("order", str, "[a step]")):
        _check_list(key, settings[key], kind, example)
    if not isinstance(settings.dry_run, bool):
        raise UserError(f"dry_run={settings.dry_run}: must be true or false")
    if not settings.seeds:
        raise UserError("seeds=[] is empty: give at least one, such as seeds=[1,2,3]")
    try:
        identity(settings.overrides)
    except Exception as error:  # no override in Hydra's grammar
        raise UserError(f"overrides={settings.overrides}: {one_line(error)}") from None
    for name, option in settings.options.items():
        for key, example in (("overrides", "[a.key=1]"), ("twins", "[b158]")):
            _check_list(
                f"options.{name}.{key}", option.get(key) if isinstance(option, DictConfig) else None, str, example
            )


def _check_list(key: str, value: Any, kind: type, example: str) -> None:
    if not isinstance(value, ListConfig) or not all(type(item) is kind for item in value):
        raise UserError(f"{key}={value}: must be a list such as {example}")


class Plan:
    """The sweeps of the study, in order."""

    def __init__(self, settings: DictConfig) -> None:
        self.settings: dict[str, Any] = OmegaConf.to_container(settings, resolve=True)  # type: ignore[assignment]
        self.typed = by_key(self.settings["overrides"])
        found: dict[str, Sweep] = {}
        for step in self.settings["order"]:
            kind, recipe, *twins = [*step.split(), ""] if step.count(" ") == 0 else step.split()
            if not set(twins) <= set(TWINS):
                raise UserError(f"order: {step}: its twins are {' and '.join(TWINS)}")
            for sweep in self._step(kind, recipe):
                if not twins or sweep.quant in twins:
                    found.setdefault(sweep.name, sweep)
        self.sweeps = list(found.values())
        self.by_name = found

    def check_needs(self) -> None:
        """Refuse an order in which a sweep could never begin.

        Raises:
            UserError: a sweep needs another that no step makes.
        """
        for sweep in self.sweeps:
            for need in sweep.needs:
                if need not in self.by_name:
                    raise UserError(f"order: {sweep.name} needs {need}: add its step")

    def option(self, name: str) -> list[str]:
        """Return the overrides of an option."""
        return [str(override) for override in self.settings["options"][name]["overrides"]]

    def _step(self, kind: str, recipe: str) -> list[Sweep]:
        kinds = {
            "search": lambda: [self._search(recipe, quant) for quant in TWINS],
            "seeds": lambda: [self._grid(recipe, quant, BASE, {}) for quant in TWINS],
            "options": lambda: self._options(recipe),
            "combined": lambda: [self._combined(recipe, quant) for quant in TWINS],
            WIDE: lambda: [self._wider(recipe, WIDE)],
            EQUAL_BYTES: lambda: [self._wider(recipe, EQUAL_BYTES)],
            SAME_OPTIONS: lambda: [self._same_options(recipe)],
            SAME_TIME: lambda: [*(self._speed(recipe, quant) for quant in TWINS), self._same_time(recipe)],
        }
        if kind not in kinds or recipe not in self.settings["recipes"]:
            raise UserError(
                f"order: {kind} {recipe}: give one of {', '.join(kinds)} and one of "
                f"{', '.join(self.settings['recipes'])}"
            )
        return kinds[kind]()

    def _sweep(self, recipe: str, quant: str, what: str, overrides: Iterable[str], cost: float, **rest: Any) -> Sweep:
        has = self.settings["recipes"][recipe]
        start = {"experiment": f"recipes/{recipe}", "quant": quant, "callbacks": "quiet"}
        text = recipe.partition("_")[0]
        if not isinstance(folder := self.settings["data"].get(text), str):
            raise UserError(f"data: no folder for {text}, the text of {recipe}")
        start |= {"data.dir": str(Path(folder).absolute())}
        fixed = start | by_key(overrides) | self.typed
        typed = self.typed.get("trainer.max_tokens", "null")
        try:
            tokens = float(has["tokens"] if typed == "null" else typed)
        except ValueError:
            raise UserError(f"overrides: trainer.max_tokens={typed}: must be a number of tokens") from None
        rest = {"space": {}, "seeds": tuple(self.settings["seeds"]), "jobs": len(self.settings["seeds"])} | rest
        return Sweep(recipe, quant, what, fixed, tokens=tokens, tokens_per_s=float(has["tokens_per_s"]) / cost, **rest)

    def _search(self, recipe: str, quant: str) -> Sweep:
        space = {key: str(values) for key, values in self.settings["space"].items()}
        trials = int(self.settings["trials"])
        drawn = self.settings["recipes"][recipe].get("sampler_seed", zlib.crc32(recipe.encode()))
        rest = {"space": space, "seeds": (), "jobs": trials, "sampler_seed": int(drawn)}
        return self._sweep(recipe, quant, SEARCH, ["sweep=optuna_lr"], 1, **rest)

    def _grid(self, recipe: str, quant: str, what: str, option: dict[str, Any], *needs: str) -> Sweep:
        has_teacher = any(DENSE_RUN in override for override in option.get("overrides", ()))
        needed = [f"{recipe}/{quant}/{SEARCH}", *needs, *([f"{recipe}/none/{BASE}"] if has_teacher else [])]
        overrides, cost = option.get("overrides", ()), float(option.get("cost", 1))
        return self._sweep(recipe, quant, what, overrides, cost, needs=tuple(needed))

    def _options(self, recipe: str) -> list[Sweep]:
        return [
            self._grid(recipe, quant, name, option)
            for quant in TWINS  # first all that are tried with b158
            for name, option in self.settings["options"].items()
            if quant in option["twins"] and recipe in option.get("recipes", [recipe])
        ]

    def _combined(self, recipe: str, quant: str) -> Sweep:
        """Make the sweep with all options that helped, measured with the recipe of the plan's first `options`."""
        measured = next((step.split()[1] for step in self.settings["order"] if step.startswith("options ")), None)
        if measured is None:
            raise UserError(f"order: combined {recipe}: needs a step options <recipe>")
        options = [sweep for sweep in self._options(measured) if sweep.quant == quant]
        has_teacher = any(DENSE_RUN in override for each in options for override in self.option(each.what))
        needs = [f"{measured}/{quant}/{BASE}", *(sweep.name for sweep in options)]
        needs += [f"{recipe}/none/{BASE}"] if has_teacher else []
        return self._grid(recipe, quant, COMBINED, {}, *needs)

    def _same_options(self, recipe: str) -> Sweep:
        """Make the sweep of b158 with the options of the dense twin's combination, a teacher perhaps among them."""
        return self._grid(recipe, TWINS[0], SAME_OPTIONS, {}, *(f"{recipe}/none/{what}" for what in (COMBINED, BASE)))

    def portable(self, option: str, recipe: str) -> bool:
        """Return whether an option is not made for another recipe's sizes."""
        return recipe in self.settings["options"][option].get("recipes", [recipe])

    def _wider(self, recipe: str, what: str) -> Sweep:
        if recipe not in self.settings[what]:
            raise UserError(f"order: {what} {recipe}: its overrides are missing in {what}")
        return self._grid(recipe, TWINS[0], what, self.settings[what][recipe])

    def _speed(self, recipe: str, quant: str) -> Sweep:
        overrides = [f"trainer.max_steps={SPEED_STEPS}", "trainer.max_tokens=null", "trainer.limit_val_batches=1"]
        sweep = self._sweep(recipe, quant, SPEED, overrides, 1, seeds=(1,), jobs=1, is_alone=True)
        return Sweep(**{**vars(sweep), "tokens": 5e6, "needs": (f"{recipe}/{quant}/{SEARCH}",)})

    def _same_time(self, recipe: str) -> Sweep:
        return self._grid(recipe, TWINS[0], SAME_TIME, {}, *(f"{recipe}/{quant}/{SPEED}" for quant in TWINS))
