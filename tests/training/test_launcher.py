"""The number of processes that a launcher has started, against the number that the config asks for."""

import pytest

from bitnet_lit.config.trainer import TrainerConfig
from bitnet_lit.errors import UserError
from bitnet_lit.training.launcher import check_launcher

TORCHRUN = {
    "RANK": "0",
    "GROUP_RANK": "0",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "x",
}
SRUN = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train"}


def checked(devices, nodes):
    check_launcher(TrainerConfig(accelerator="cpu", devices=devices, num_nodes=nodes), devices * nodes)


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_what_the_launcher_started_is_what_the_config_must_say(monkeypatch, environment):
    checked(4, 1)  # no launcher
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    checked(2, 2)
    with pytest.raises(UserError, match="trainer.devices=1 trainer.num_nodes=1: that is 1 process, and ") as refused:
        checked(1, 1)
    assert str(refused.value).endswith("give trainer.devices=2 trainer.num_nodes=2")


def test_a_job_of_one_task_says_how_to_start_its_ranks(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    checked(1, 1)
    with pytest.raises(UserError, match=r"SLURM has 1 task on 1 node: start it with srun --ntasks-per-node=4"):
        checked(4, 1)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # Lightning starts the ranks, as on any machine
    checked(4, 1)


def test_tasks_without_a_number_on_each_node_are_one_line(monkeypatch):
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(UserError, match="give --ntasks-per-node to sbatch or srun, in place of --ntasks"):
        checked(2, 2)
