"""Run folders as training leaves them, for the tests of reports."""

import csv
import json

import yaml

MODELS = {
    "small": {"hidden_size": 32, "intermediate_size": 96},
    "large": {"hidden_size": 128, "intermediate_size": 384},
}


def config_of(quant="b158", seed=1, model="small", **changes):
    """The config.yaml of a run; `changes` are further top-level keys."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320, "max_position_embeddings": 32}
    return {
        "model": {"name": model, **sizes, **MODELS[model]},
        "quant": {"name": quant, "weight_scale": "absmean", "activation_bits": 8, "skip": ["lm_head"]},
        "data": {"dir": "data/demo", "sequence_length": None, "batch_size": 4},
        "optim": {"name": "muon", "learning_rate": 0.02},
        "trainer": {"devices": 1, "num_nodes": 1, "accumulate_grad_batches": 1, "max_steps": 40},
        "seed": seed,
        "run_dir": "outputs/x",
        **changes,
    }


def make_run(folder, losses=((20, 3.0), (40, 2.0)), done=True, error=None, config=None, speed=1280.0, final=None, **of):
    """Write a run folder. A step has 4 * 32 = 128 tokens, so a second has ten steps.

    Args:
        losses: steps and validation losses.
        config: the whole config in place of `config_of(**of)`; {} for none.
        final: val/loss of metrics.json, where it is not the last one.
    """
    folder.mkdir(parents=True)
    config = config_of(**of) if config is None else config
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    columns = ["step", "train/loss", "perf/tokens_per_s", "val/loss"]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for step, loss in losses:
            writer.writerow([step, loss + 0.1, speed, ""])
            writer.writerow([step, "", "", loss])
    if done:
        last = losses[-1]
        figures = {"val/loss": last[1] if final is None else final, "steps": last[0], "tokens": last[0] * 128}
        (folder / "metrics.json").write_text(json.dumps(figures))
    if error is not None:
        (folder / "error.txt").write_text(error)
    return folder
