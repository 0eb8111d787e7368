"""python -m bitnet_lit.train: shards to a run folder with a model folder in it.

A sweep (`-m`) gives the final validation loss to Hydra's sweeper, so an optimizing one can use it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bitnet_lit.cli import run_door
from bitnet_lit.config import TrainConfig


def _train(config: TrainConfig) -> float:
    from hydra.core.hydra_config import HydraConfig

    from bitnet_lit.training.resume import resume_config
    from bitnet_lit.training.run import train

    if config.resume is not None:
        overrides = [item for item in HydraConfig.get().overrides.task if not item.startswith("resume=")]
        config = resume_config(config.resume, overrides)
    return float(train(config)["val/loss"])


def main() -> None:
    """Entry point."""
    for argument in sys.argv[1:]:
        key, _, folder = argument.partition("=")
        if key == "resume" and Path(folder).is_dir():
            # The run goes on in place; Hydra's own record of this call goes beside the first one's.
            sys.argv += [f"hydra.run.dir='{folder}'", "hydra.output_subdir=.hydra_resume"]
    run_door("train", _train)


if __name__ == "__main__":
    main()
