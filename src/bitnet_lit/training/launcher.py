"""torchrun and srun start every rank of a run. Their number must be the one that the config asks for.

Lightning takes the number of ranks from what the launcher says, and the plan of a run takes it from `trainer.devices`
and `trainer.num_nodes`. If the two differ, the ranks wait for others that never come.
"""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import TorchElasticEnvironment

from bitnet_lit.config import TrainerConfig
from bitnet_lit.errors import UserError
from bitnet_lit.runs.ranks import in_slurm_job


def check_launcher(trainer: TrainerConfig, ranks: int) -> None:
    """Compare the processes that a launcher has started with those of the config.

    Args:
        ranks: devices of a node times nodes.

    Raises:
        UserError: they differ.
    """
    asked = f"trainer.devices={trainer.devices} trainer.num_nodes={trainer.num_nodes}"
    if TorchElasticEnvironment.detect():
        started = int(os.environ["WORLD_SIZE"])
        if started != ranks:
            each = int(os.environ.get("LOCAL_WORLD_SIZE", started))
            raise UserError(
                f"{asked}: that is {_count(ranks, 'process', 'processes')}, and torchrun has started {started}: "
                f"give trainer.devices={each} trainer.num_nodes={started // each}"
            )
    elif in_slurm_job():
        started, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
        each = int(os.environ.get("SLURM_NTASKS_PER_NODE", "0"))
        if started > 1 and not each:
            raise UserError(
                f"SLURM has {started} tasks, and does not say how many on a node: give --ntasks-per-node to sbatch or "
                "srun, in place of --ntasks"
            )
        if started != ranks or nodes != trainer.num_nodes:
            each = each or started // nodes
            raise UserError(
                f"{asked}: that is {_count(ranks, 'process', 'processes')}, and SLURM has "
                f"{_count(started, 'task', 'tasks')} on {_count(nodes, 'node', 'nodes')}: start it with srun "
                f"--ntasks-per-node={ranks // trainer.num_nodes} --nodes={trainer.num_nodes}, or give "
                f"trainer.devices={each} trainer.num_nodes={nodes}"
            )


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
