"""Stands for `python -m bitnet_lit.train -m` in tests of examples/recipes: it leaves at once what a sweep leaves.

A loss is the distance of the learning rate from 2e-2, and a little more for each seed and for b158; stand_in.gain and
the like lower it. With STAND_IN_JOBS in the environment a sweep ends with status 1 after that many jobs; with
STAND_IN_SECONDS each job first waits so long; with STAND_IN_DIES the process is killed once, behind its first job, and
leaves a file of that name.
"""

import json
import math
import os
import signal
import sys
import time
import zlib
from pathlib import Path


def main(typed):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    given = dict(item.partition("=")[::2] for item in typed if "=" in item)
    sweep = Path(given.pop("hydra.sweep.dir").strip("'"))
    fixed = {key: value for key, value in given.items() if not key.startswith(("hydra.", "sweep", "launcher"))}
    if "sweep" in given:
        done = int(given["sweep.seed"]) - zlib.crc32(given["experiment"].removeprefix("recipes/").encode())
        rates = [0.01 * 2 ** (number + done) for number in range(int(given["sweep.n_trials"]))]
        jobs = [{"optim.learning_rate": f"{rate:.5f}"} for rate in rates]
    else:
        jobs = [{"seed": seed} for seed in given["seed"].split(",")]
        fixed |= jobs[0] if len(jobs) == 1 else {}
    for number, values in enumerate(jobs):
        if number == int(os.environ.get("STAND_IN_JOBS", "1000")):
            sys.exit("error: as the test wants it")
        if number == 1 and (died := os.environ.get("STAND_IN_DIES")) and not os.path.exists(died):
            Path(died).write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
        named = fixed if fixed.items() >= values.items() else values  # what varies; of one job, everything
        name = "__".join(f"{key}={value}" for key, value in named.items()).replace("/", "-")
        write(sweep / f"{name[:80]}{zlib.crc32(name.encode()) if len(name) > 80 else ''}", fixed | values)


def write(folder, overrides):
    rate, seed = float(overrides["optim.learning_rate"]), int(overrides.get("seed", "1"))
    if (folder / "metrics.json").exists():
        return
    for name in (".hydra", "checkpoints", "model"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    typed = [f"{key}='{value}'" if "=" in value else f"{key}={value}" for key, value in overrides.items()]
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(typed))
    (folder / "config.yaml").write_text(f"quant:\n  name: {overrides['quant']}\nmodel:\n  vocab_size: 64\nrun_dir: x\n")
    loss = abs(math.log(rate / 0.02)) + 0.01 * seed + (0.1 + 0.001 * seed if overrides["quant"] != "none" else 0)
    loss -= sum(float(value) for key, value in overrides.items() if key.endswith("gain"))
    speed = os.environ.get("STAND_IN_SPEED", "1000" if overrides["quant"] == "none" else "1100")
    (folder / "metrics.csv").write_text(f"step,val/loss,perf/tokens_per_s\n10,{loss},{speed}\n")
    if rate > 0.1:
        (folder / "error.txt").write_text("Diverged: loss is nan at step 7\n")
        return
    figures = {"val/loss": loss, "val/bits_per_byte": loss / 2, "tokens": 640, "steps": 10}
    (folder / "metrics.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
