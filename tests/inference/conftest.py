"""A model that was trained, for tests to whom the numbers of a random one say nothing."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The run folder of a b158 model of 0.1 M parameters after 150 steps: a loss below 4, a context of 256."""
    from bitnet_lit.cli import compose
    from bitnet_lit.training.run import train

    folder = tmp_path_factory.mktemp("trained")
    sizes = ["model.hidden_size=64", "model.num_hidden_layers=2", "model.intermediate_size=128"]
    run = [f"run_dir={folder}", f"data.dir={shards}", *sizes, "data.batch_size=8", "callbacks=quiet"]
    rates = ["optim.learning_rate=4e-2", "optim.adamw_learning_rate=1.6e-2", "trainer.val_check_interval=1000"]
    train(compose("train", [*run, *rates, "trainer.max_steps=150", "trainer.accelerator=cpu"]))
    return folder
