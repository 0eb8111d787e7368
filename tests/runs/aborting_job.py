"""A job for processes of joblib: it imports nothing, so that each of them begins at once."""

import os
import time

GPU_ERROR = "CUDA error: unspecified launch failure"


def run(folder):
    """End the process by a GPU error in the folder `a`, as std::terminate does, while the job of `b` runs."""
    began = folder.parent / "b" / "began"
    folder.mkdir(exist_ok=True)
    (folder / "error.txt").unlink(missing_ok=True)  # as a run that goes on does
    if folder.name == "a":
        while not began.exists():
            time.sleep(0.05)
        (folder / "error.txt").write_text(f"GpuError: {GPU_ERROR}\n")
        os.abort()
    if folder.name == "b" and not began.exists():
        began.write_text("")
        time.sleep(60.0)  # until joblib ends this process
    (folder / "metrics.json").write_text("{}")
