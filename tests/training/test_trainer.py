"""What `build_trainer` changes in Lightning's Trainer must not be seen by a callback of the user's own."""

import torch
from lightning.pytorch.callbacks import Callback

from bitnet_lit.cli import compose
from bitnet_lit.training.checkpoint_file import read_checkpoint
from bitnet_lit.training.run import train
from tests.support import TINY_RUN

OF_A_STEP = [
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
]
calls = []


class Hooks(Callback):
    """Notes the hooks of a step, and the name under which Lightning knows the one that runs."""

    def on_train_batch_start(self, trainer, pl_module, *arguments):
        calls.append(pl_module._current_fx_name)

    on_before_zero_grad = on_before_backward = on_after_backward = on_before_optimizer_step = on_train_batch_start
    on_train_batch_end = on_train_batch_start


def test_a_callback_gets_every_hook_with_and_without_a_profiler(tmp_path, shards):
    weights = []
    for profiler in ("null", "simple"):
        calls.clear()
        overrides = [
            f"run_dir={tmp_path}/{profiler}",
            f"data.dir={shards}",
            *TINY_RUN,
            "callbacks=quiet",
            "callbacks.sample_prompts=[]",
            "trainer.max_steps=3",
            f"callbacks.extra.hooks._target_={__name__}.Hooks",
            *([] if profiler == "null" else [f"trainer.extra.profiler={profiler}"]),
        ]
        train(compose("train", overrides))
        assert calls == OF_A_STEP * 3
        weights.append(read_checkpoint(tmp_path / profiler / "checkpoints" / "last.ckpt")["state_dict"])
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
