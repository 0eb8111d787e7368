"""metrics.csv through new columns and resumes; which other loggers a config makes."""

import csv

import pytest

from bitnet_lit.config import LoggerConfig, TrainConfig
from bitnet_lit.config.slots import as_values
from bitnet_lit.errors import UserError
from bitnet_lit.runs.metrics_csv import read_metrics
from bitnet_lit.training.loggers import CsvLogger, build_loggers


def rows(folder):
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_holds_the_number_of_steps_done(tmp_path):
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"train/loss": 6.25, "epoch": 0}, step=0)
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss\n1,6.25\n"


def test_a_new_column_is_empty_in_the_rows_before_it(tmp_path):
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"train/loss": 6.0}, step=0)
    logger.log_metrics({"val/loss": 5.0}, step=1)
    logger.log_metrics({"train/loss": 4.0}, step=2)
    assert rows(tmp_path) == [
        {"step": "1", "train/loss": "6", "val/loss": ""},
        {"step": "2", "train/loss": "", "val/loss": "5"},
        {"step": "3", "train/loss": "4", "val/loss": ""},
    ]
    assert read_metrics(tmp_path / "metrics.csv")[1] == {"step": "2", "val/loss": "5"}


def test_nothing_but_an_epoch_is_no_row_and_one_row_is_not_written_twice(tmp_path):
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"epoch": 0}, step=0)
    assert logger.num_rows == 0 and not (tmp_path / "metrics.csv").exists()
    logger.log_metrics({"val/loss": 5.0}, step=0)
    logger.log_metrics({"val/loss": 5.0}, step=0)
    assert logger.num_rows == 1
    logger.log_metrics({"train/loss": 5.0}, step=0)  # of the same step, but another one
    assert logger.num_rows == 2


def test_nine_digits_and_what_is_no_number(tmp_path):
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"a": 1 / 3, "b": float("nan"), "c": float("-inf"), "d": 1e-30}, step=9)
    assert rows(tmp_path) == [{"step": "10", "a": "0.333333333", "b": "nan", "c": "-inf", "d": "1e-30"}]


def test_a_resumed_run_goes_on_behind_the_rows_of_its_checkpoint(tmp_path):
    unbroken = CsvLogger(tmp_path)
    for step in range(6):
        unbroken.log_metrics({"train/loss": 6.0 - step}, step=step)
        unbroken.log_metrics({"val/loss": 6.5 - step}, step=step)
    expected = (tmp_path / "metrics.csv").read_bytes()

    resumed = CsvLogger(tmp_path, resume_step=3, num_rows=5)  # the checkpoint knew of one row of step 3
    assert [row["step"] for row in rows(tmp_path)] == ["1", "1", "2", "2", "3"]
    resumed.log_metrics({"val/loss": 4.5}, step=2)
    for step in range(3, 6):
        resumed.log_metrics({"train/loss": 6.0 - step}, step=step)
        resumed.log_metrics({"val/loss": 6.5 - step}, step=step)
    assert (tmp_path / "metrics.csv").read_bytes() == expected


def test_a_checkpoint_that_counted_no_rows_keeps_those_up_to_its_step(tmp_path):
    logger = CsvLogger(tmp_path)
    for step in range(4):
        logger.log_metrics({"train/loss": 1.0}, step=step)
    CsvLogger(tmp_path, resume_step=2)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"]


def test_weights_and_biases_gets_the_config(tmp_path):
    config = TrainConfig(logger=LoggerConfig(wandb=True))
    wandb = build_loggers(config, tmp_path, CsvLogger(tmp_path), resume_step=0)[1]
    assert wandb._wandb_init["config"] == as_values(config)


def test_a_resumed_run_goes_on_under_its_id_and_a_new_one_gets_another(tmp_path):
    config = TrainConfig(logger=LoggerConfig(wandb=True))
    for folder in ("offline-run-20260131_120000-abc-1", "debug.log", "latest-run"):
        (tmp_path / "wandb" / folder).mkdir(parents=True)
    for resume_step, expected in ((0, None), (5, "abc-1")):
        wandb = build_loggers(config, tmp_path, CsvLogger(tmp_path), resume_step)[1]
        assert wandb._wandb_init["id"] == expected


def test_half_a_last_line_is_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,6.25\n2,6.")
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": "1", "train/loss": "6.25"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"time,loss\n1,2\n", "not the metrics.csv of a run"),
        (b"step,loss\n1,2,3\n", "line 2 is no row of 2 cells"),
        (b"step,loss\n1,2\nx,3\n", "line 3 is no row"),
        (b"step,loss\n\xff,2\n", "damaged"),
        (b'step,loss\n"1,2\n3,4\n', "damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, reason):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_metrics(tmp_path / "metrics.csv")
    assert str(tmp_path / "metrics.csv") in str(caught.value) and "\n" not in str(caught.value)
