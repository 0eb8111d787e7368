"""A job's folder is named by its overrides: the same job always has the same name, and two jobs never have one."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_lit.config import TrainConfig
from bitnet_lit.overrides import as_typed, quoted
from bitnet_lit.runs.job_names import LONGEST_JOB, asks_for_dry_run, identity, job_name, sweep_name, swept_keys


@pytest.mark.parametrize(
    ("overrides", "swept", "name"),
    [
        (["quant=b158", "seed=1"], {"quant", "seed"}, "quant=b158__seed=1"),
        (["seed=1", "quant=b158"], {"quant", "seed"}, "quant=b158__seed=1"),
        (["experiment=demo", "seed=1"], {"seed"}, "seed=1"),
        (["optim.learning_rate=1e-2"], {"optim.learning_rate"}, "optim.learning_rate=0.01"),
        (["optim.learning_rate=0.01"], {"optim.learning_rate"}, "optim.learning_rate=0.01"),
        (["optim.learning_rate=1e-5"], {"optim.learning_rate"}, "optim.learning_rate=1e-05"),
        (["data.dir=null", "trainer.deterministic=True"], {"trainer.deterministic"}, "trainer.deterministic=true"),
        (["++quant.settings.group_size=32"], {"quant.settings.group_size"}, "quant.settings.group_size=32"),
        (["seed=1", "launcher=joblib", "sweep.n_trials=3"], set(), "seed=1"),
        ([], set(), "job"),
    ],
)
def test_names_are_readable(overrides, swept, name):
    assert job_name(overrides, swept) == name


def test_what_a_name_cannot_hold_is_in_a_hash():
    paths = [
        as_typed(TrainConfig, [f"data.dir={path}"]) for path in ("data/A", "data/a", "data\\a", "data-a", "x" * 300)
    ]
    names = [job_name(path, {"data.dir"}) for path in paths]
    assert names[3] == "data.dir=data-a"
    assert len({name.lower() for name in names}) == 5
    assert all(name.startswith("data.dir=") and len(name) <= LONGEST_JOB for name in names)
    # A hash is the same on every machine and in every version, or a sweep would begin anew.
    assert names[0] == "data.dir=data-A-2d881611c4"


def test_a_number_that_a_search_drew_is_shown_with_four_digits():
    rates = ["0.01577026248478398", "0.01577026248478399", "1.5770262484783e-05", "0.123456", "1.10"]
    names = [job_name([f"optim.learning_rate={rate}", "seed=1"], {"optim.learning_rate"}) for rate in rates]
    assert names[0] == "optim.learning_rate=0.01577-c73856bbf0"
    assert names[1].startswith("optim.learning_rate=0.01577-") and names[1] != names[0]
    assert names[2].startswith("optim.learning_rate=1.577e-05-")
    assert names[3:] == ["optim.learning_rate=0.123456", "optim.learning_rate=1.1"]
    assert identity([f"optim.learning_rate={rates[0]}"]) == {"optim.learning_rate": rates[0]}


VALUES = st.one_of(
    st.integers(),
    st.floats(allow_nan=False),
    st.booleans(),
    st.none(),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200),
    st.sampled_from(["a", "A", "a__seed=1", "a-0123456789", "_", ".", "con", "a.", "CON", " "]),
)
JOBS = st.dictionaries(st.sampled_from(["seed", "quant", "data.dir", "optim.learning_rate"]), VALUES, min_size=1)


def spelled(job):
    return [f"{key}={quoted(value) if isinstance(value, str) else json.dumps(value)}" for key, value in job.items()]


@settings(max_examples=150, deadline=None)
@given(JOBS, JOBS)
def test_two_jobs_never_share_a_folder_and_names_are_safe(first, second):
    """Also on file systems that ignore case, and where Windows drops a dot or a space at the end."""
    names = [job_name(spelled(job), job.keys()) for job in (first, second)]
    for name in names:
        assert 0 < len(name.encode()) <= LONGEST_JOB and not set(name) - set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-="
        )
        assert name[-1] not in ". " and name[0] != "."
    if identity(spelled(first)) != identity(spelled(second)):
        assert names[0].lower() != names[1].lower()
    assert job_name(spelled(dict(reversed(first.items()))), first.keys()) == names[0]


def test_the_folder_of_a_sweep_depends_on_what_is_fixed_and_on_which_keys_vary():
    name = sweep_name(["experiment=demo", "quant=b158,none", "seed=1,2"], {})
    assert name.startswith("quant-seed-")
    same = [
        ["seed=2,1", "experiment=demo", "quant=none,b158"],
        ["experiment=demo", "quant=b158,none", "seed=1,2,3"],  # a sweep that is extended goes on in its folder
        ["experiment=demo", "quant=b158,none", "seed=1,2", "launcher=joblib", "sweep.dry_run=true"],
        ["experiment=demo", "quant=b158,none", "seed=range(1,9)"],
    ]
    assert {sweep_name(overrides, {}) for overrides in same} == {name}
    other = [
        ["experiment=demo", "quant=b158,none", "seed=1,2", "optim.learning_rate=1e-2"],
        ["quant=b158,none", "seed=1,2"],
        ["experiment=demo", "quant=b158", "seed=1,2"],
    ]
    assert len({name, *(sweep_name(overrides, {}) for overrides in other)}) == 4


def test_keys_of_a_sweep_file_vary_unless_one_value_was_typed():
    params = {"quant": "b158,none", "optim.learning_rate": "1e-2,2e-2"}
    assert swept_keys(["sweep=lr", "seed=1"], params) == {"quant", "optim.learning_rate"}
    assert swept_keys(["quant=b158", "seed=1,2"], params) == {"optim.learning_rate", "seed"}


@pytest.mark.parametrize("typed", ["sweep.dry_run=true", "sweep.dry_run=True", "+sweep.dry_run=1"])
def test_a_dry_run_is_asked_for(typed):
    assert asks_for_dry_run(["seed=1", typed]) and not asks_for_dry_run(["seed=1", typed, "sweep.dry_run=false"])
