"""A search goes on with its study, takes up the trials that died, and learns from runs that diverged."""

import json
import math
from pathlib import Path

import pytest

from bitnet_lit.errors import Diverged, TrainingStopped, UserError
from bitnet_lit.runs.folder import locked
from bitnet_lit.runs.job_names import job_name
from bitnet_lit.runs.optuna_study import STUDY_NAME
from tests.runs.stand_in import StandIn
from tests.support import Killed

optuna = pytest.importorskip("optuna", reason="sweep=optuna_lr needs the package optuna")

SEARCH = ["-m", "sweep=optuna_lr", "mode=smoke", "sweep.n_trials=4", "hydra.sweep.dir=s"]


class Objective(StandIn):
    """Stands for training: the loss is the distance of the learning rate from 0.02. It can die, diverge and fail."""

    def __init__(self):
        super().__init__()
        self.dies_in = self.diverges_in = self.fails_in = None
        self.loss_is = {}

    def __call__(self, config):
        rate, number = config.optim.learning_rate, len(self.ran)
        self.ran.append(rate)
        folder = Path(config.run_dir)
        (folder / "config.yaml").write_text(f"seed: {config.seed}\nrun_dir: {folder}\n")
        if number == self.dies_in:
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.ckpt").write_text("x")
            raise Killed
        if number == self.diverges_in:
            raise Diverged("step 3: the output of lm_head is not finite")
        if number == self.fails_in:
            raise OSError("the disk is gone")
        loss = abs(math.log(rate / 0.02))
        (folder / "metrics.json").write_text(
            json.dumps({"val/loss": self.loss_is.get(number, loss), "val/best_loss": loss + 1})
        )
        return loss


@pytest.fixture
def objective(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Objective()


def trials(path):
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{path / 's' / STUDY_NAME}").get_trials()


def test_a_search_that_was_killed_goes_on(objective, tmp_path, capsys):
    objective.dies_in = 1
    with pytest.raises(Killed):
        objective.start(*SEARCH)
    first, second = objective.ran
    assert [trial.state.name for trial in trials(tmp_path)] == ["COMPLETE", "RUNNING"]
    objective.dies_in = None
    assert objective.start(*SEARCH) == 0
    assert "1 of 4 trials done, 1 to go on with" in capsys.readouterr().err
    assert objective.ran[0] == second and objective.resumed == [job_name([f"optim.learning_rate={second}"], ())]
    assert len(objective.ran) == 3 and len({first, *objective.ran}) == 4  # no value is drawn again
    found = trials(tmp_path)
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 4
    assert all(trial.value == abs(math.log(trial.params["optim.learning_rate"] / 0.02)) for trial in found)
    assert objective.start(*SEARCH) == 0 and not objective.ran  # all trials are done
    out = capsys.readouterr().out
    assert f"best of 4 trials: val/loss={min(trial.value for trial in found):.4f}" in out
    assert objective.start(*SEARCH, "sweep.n_trials=5") == 0 and len(objective.ran) == 1
    for other, was, now in [  # what is the same in both searches is not told
        (
            "optim.learning_rate=interval(1e-3,1e-2)",
            "optim.learning_rate=tag(log, interval(2e-3, 1e-1))",
            "optim.learning_rate=interval(1e-3,1e-2)",
        ),
        ("quant=b158,none", "(no quant)", "quant=b158,none"),
        ("seed=2", "(no seed)", "seed=2"),
        ("sweep.metric=val/best_loss", "metric=val/loss", "metric=val/best_loss"),
        ("sweep.direction=maximize", "direction=minimize", "direction=maximize"),
    ]:
        with pytest.raises(UserError) as refused:
            objective.start(*SEARCH, other)
        assert str(refused.value) == (
            f"s/study.db: its study has {was}, and this search has {now}: give another hydra.sweep.dir"
        )
    assert objective.start(*SEARCH) == 0
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 's' / STUDY_NAME}")
    study.set_user_attr("keys", None)  # of an earlier version
    with pytest.raises(UserError, match=r"its study has optim.*metric=val/loss.*this search has optim.*val/best_loss"):
        objective.start(*SEARCH, "sweep.metric=val/best_loss")


def test_values_that_failed_wait_once_in_the_queue(objective, tmp_path):
    objective.fails_in = 0
    assert objective.start(*SEARCH, "sweep.n_trials=1") == 1
    objective.fails_in = objective.dies_in = None
    waiting = {"fixed_params": trials(tmp_path)[0].params}
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 's' / STUDY_NAME}")
    study.enqueue_trial(waiting["fixed_params"])  # as a start does that ends before its first trial
    assert objective.start(*SEARCH, "sweep.n_trials=3") == 0
    assert len({*objective.ran}) == len(objective.ran) == 3


def test_a_run_that_diverges_is_a_bad_result_and_a_failure_is_tried_again(objective, tmp_path, capsys):
    objective.diverges_in, objective.fails_in = 0, 2
    assert objective.start(*SEARCH) == 1
    printed = capsys.readouterr().err
    assert "1 of 3 jobs of" in printed  # the run that diverged is none of them
    diverged, _, failed, _ = objective.ran
    found = trials(tmp_path)
    assert found[0].value == math.inf and [trial.state.name for trial in found] == [
        "COMPLETE",
        "COMPLETE",
        "FAIL",
        "COMPLETE",
    ]
    objective.diverges_in = objective.fails_in = None
    assert objective.start(*SEARCH) == 0 and objective.ran == [failed] and failed != diverged
    assert len(trials(tmp_path)) == 5


def test_a_search_in_which_one_run_diverged_has_succeeded(objective):
    objective.diverges_in = 0
    assert objective.start(*SEARCH, "sweep.n_trials=2") == 0 and len(objective.ran) == 2


def test_values_to_choose_from(objective, tmp_path):
    """Names, whole numbers and ranges; the figure and its direction are chosen too."""
    space = ["quant=b158,none", "seed=int(interval(1,5))", "data.batch_size=range(4,13,4)"]
    more = ["sweep.n_trials=5", "sweep.metric=val/best_loss", "sweep.direction=maximize", "sweep.sampler=random"]
    assert objective.start(*SEARCH, *space, *more, "optim.learning_rate=1e-2") == 0
    found = trials(tmp_path)
    assert {trial.params["quant"] for trial in found} <= {"b158", "none"}
    assert {trial.params["data.batch_size"] for trial in found} <= {4, 8, 12}
    assert {trial.params["seed"] for trial in found} <= {1, 2, 3, 4, 5}
    assert all(trial.value == abs(math.log(0.5)) + 1 for trial in found)


def test_a_typing_error_in_the_metric_is_found_before_the_first_trial(objective, tmp_path):
    for wrong, words in [
        ("val/los", r"sweep.metric=val/los: no run writes this figure: did you mean 'val/loss'\?"),
        ("bleu", "sweep.metric=bleu: no run writes this figure: give one of val/loss, .*ternary/flip_rate"),
    ]:
        for more in ([], ["sweep.dry_run=true"]):
            with pytest.raises(UserError, match=words):
                objective.start(*SEARCH, f"sweep.metric={wrong}", *more)
    with pytest.raises(UserError, match="data.batch_size=0: must be"):
        objective.start(*SEARCH, "data.batch_size=0")
    assert not objective.ran and not list(tmp_path.iterdir())  # so the line, when it is right, finds no other study
    own = "callbacks.extra.mine._target_=my_project.Bleu"
    with pytest.raises(UserError, match="What your callbacks log is kept if its name begins with val/, train/loss"):
        objective.start(*SEARCH, own, "sweep.metric=bleu")
    # What a callback logs is known when the first job has run. Its result counts for the metric that is right.
    with pytest.raises(
        UserError, match="sweep.metric=val/bleu: not in .*give one of val/loss, val/best_loss; the same"
    ):
        objective.start(*SEARCH, own, "sweep.metric=val/bleu")
    first = objective.ran.copy()
    assert objective.start(*SEARCH, own, "sweep.metric=val/loss") == 0
    assert len(objective.ran) == 3 and [trials(tmp_path)[0].params["optim.learning_rate"]] == first


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_is_a_bad_result(objective, tmp_path, figure):
    objective.loss_is = {0: figure}
    assert objective.start(*SEARCH, "sweep.n_trials=2") == 0
    assert [math.isinf(trial.value) and trial.value > 0 for trial in trials(tmp_path)] == [True, False]


def test_a_search_in_which_all_runs_diverged_has_failed(objective, tmp_path):
    objective.diverges_in = 0
    with pytest.raises(TrainingStopped, match="s: no trial has a result"):
        objective.start(*SEARCH, "sweep.n_trials=1")


def test_a_trial_of_another_process_is_left_alone(objective, tmp_path, capsys):
    """The first process of a search was killed alone: its jobs go on in processes of joblib or SLURM."""
    objective.dies_in = 0
    with pytest.raises(Killed):
        objective.start(*SEARCH, "sweep.n_trials=2")
    (job,) = (tmp_path / "s").glob("optim*")
    objective.dies_in = None
    with locked(job):
        assert objective.start(*SEARCH, "sweep.n_trials=2") == 1
    assert len(objective.ran) == 1 and not objective.resumed and not (job / "error.txt").exists()
    assert "s run in other processes (optim.learning_rate=" in capsys.readouterr().err
    assert [trial.state.name for trial in trials(tmp_path)] == ["RUNNING", "COMPLETE"]
    assert objective.start(*SEARCH, "sweep.n_trials=2") == 0 and objective.resumed == [job.name]


def test_a_dry_run_of_a_search_shows_an_example(objective, tmp_path, capsys):
    assert objective.start(*SEARCH, "sweep.dry_run=true") == 0
    assert len(objective.shown) == 1 and not objective.ran and not list(tmp_path.iterdir())
    assert "A search of 4 trials, of which 0 are done." in capsys.readouterr().out


def test_mistakes_are_one_line(objective, monkeypatch):
    for wrong, words in [
        ("optim.learning_rate=interval(2,1)", "give two numbers, the smaller one first"),
        ("optim.learning_rate=1e-2", "a search needs values to choose from"),
        ("sweep.direction=down", "sweep.direction=down: must be one of minimize, maximize"),
        ("sweep.n_trials=0", "sweep.n_trials=0: must be"),
        ("sweep.metric=val/accuracy", "sweep.metric=val/accuracy: more of it is better: take sweep.direction=maximize"),
    ]:
        with pytest.raises(UserError, match=words):
            objective.start(*SEARCH, wrong)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="a search under torchrun or srun"):
        objective.start(*SEARCH)
