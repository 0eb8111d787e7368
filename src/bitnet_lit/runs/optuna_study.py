"""The study of a search is a SQLite file of Optuna: what is searched, and the trials with their values and results.

A search that was killed goes on with its study. A study of another search is refused, because its results would mislead
the sampler. Trials whose process died are taken up again, and the values of failed trials are tried again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from bitnet_lit.config import SweepConfig
from bitnet_lit.errors import UserError

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

STUDY_NAME = "study.db"
_SPACE = "space"  # the user attribute of the study that says what it searches
_KEYS = "keys"  # the same by key, each with the value as it was typed; studies of earlier versions have none


def distribution(override: Override) -> optuna.distributions.BaseDistribution:
    """Return the values that a swept override allows: `a,b`, `range(1,9)`, `interval(0,1)`, `tag(log, interval(...))`.

    An interval of whole numbers is `int(interval(1,8))`.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    swept = override.value()
    if isinstance(swept, IntervalSweep):
        low, high, log = swept.start, swept.end, "log" in swept.tags
        if low is None or high is None or not low <= high or (log and low <= 0):
            raise UserError(f"{override.input_line}: give two numbers, the smaller one first, above 0 where log is")
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(float(low), float(high), log=log)
    if isinstance(swept, RangeSweep) and isinstance(values := swept.range(), range) and len(values):
        return IntDistribution(min(values), max(values), step=abs(values.step))
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def has_result(study: optuna.Study) -> bool:
    """Return whether a trial has a value."""
    return any(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False))


def _differences(was: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    """Return what two searches have of the keys in which they differ, as it was typed.

    Args:
        was, now: what is searched, and the value as it was typed, by key.
    """
    keys = [key for key in dict.fromkeys([*was, *now]) if list(was.get(key, ())[:1]) != list(now.get(key, ())[:1])]
    was_typed, now_typed = (
        " ".join(f"{key}={each[key][1]}" if key in each else f"(no {key})" for key in keys) for each in (was, now)
    )
    return was_typed, now_typed


def open_study(
    path: Path, config: SweepConfig, keys: Mapping[str, Sequence[str]], may_replace: bool = True
) -> optuna.Study:
    """Open the study of a sweep's folder, or make it.

    Args:
        keys: what is searched, and the value as it was typed, by key.
        may_replace: whether a study of something else that has no result yet, as after a mistake in the command, is
            replaced.

    Raises:
        UserError: the study is that of another search, or cannot be read.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    remedy = "give another hydra.sweep.dir"
    storage = f"sqlite:///{path.absolute()}"
    space = ", ".join(f"{key}={searched}" for key, (searched, _) in keys.items())

    def opened() -> optuna.Study:
        return optuna.create_study(
            storage=storage,
            study_name="sweep",
            direction=cast(Any, config.direction),
            load_if_exists=True,
            pruner=optuna.pruners.NopPruner(),
        )

    try:
        study = opened()
        known = study.user_attrs.get(_SPACE)
        if known not in (None, space) and may_replace and not has_result(study):
            optuna.delete_study(study_name="sweep", storage=storage)  # nothing is lost: it has no result
            study, known = opened(), None
        if known is None:
            study.set_user_attr(_SPACE, space)
            study.set_user_attr(_KEYS, keys)
    except Exception as error:
        raise UserError(f"{path}: no study that Optuna can open ({type(error).__name__}: {error}): {remedy}") from None
    if known not in (None, space):
        recorded = study.user_attrs.get(_KEYS)
        was, now = (known, space) if recorded is None else _differences(recorded, keys)
        raise UserError(f"{path}: its study has {was}, and this search has {now}: {remedy}")
    study.sampler = sampler_of(config, len(study.get_trials(deepcopy=False)))
    return study


def sampler_of(config: SweepConfig, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler. A study that goes on must not draw the values of its first trials again.

    Args:
        number: of trials that the study has.
    """
    import optuna

    seed = (config.seed + number) % 2**32
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # jobs side by side do not get the same values


def interrupted_trials(
    study: optuna.Study, trials: Sequence[FrozenTrial], keys: Set[str]
) -> list[tuple[int, dict[str, Any]]]:
    """Return number and values of the trials whose process died. One that died before it had values fails.

    Args:
        trials: those of the study, none of which runs now.
        keys: what is searched.
    """
    from optuna.trial import TrialState

    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    lost = [trial for trial in running if trial.params.keys() != keys]
    for trial in lost:
        study.tell(trial.number, state=TrialState.FAIL)
    return [(trial.number, trial.params) for trial in running if trial not in lost]


def enqueue_failed(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Put the values of failed trials into the queue again, where no other trial has them.

    Args:
        trials: those of the study.
    """
    from optuna.trial import TrialState

    has_value = [trial.params for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.RUNNING)]
    # An earlier start has put these into the queue, and ended before their turn came.
    in_queue = [trial.system_attrs for trial in trials if trial.state == TrialState.WAITING]
    has_value += [attributes["fixed_params"] for attributes in in_queue if "fixed_params" in attributes]
    for trial in trials:
        if trial.state == TrialState.FAIL and trial.params and trial.params not in has_value:
            study.enqueue_trial(trial.params, skip_if_exists=False)
            has_value.append(trial.params)
