"""PyTorch's threads do not wait busily in a process that trains with the C++, however PyTorch was imported."""

import os
import subprocess
import sys

import pytest

from bitnet_lit.native import library

# After each parallel operation the other threads have nothing to do for 10 ms. GNU's OpenMP spins for 3 ms of them by
# default. The processor time of the other threads is counted, which does not depend on what else the machine does.
SCRIPT = """
import os, time, torch
torch.set_num_threads(len(os.sched_getaffinity(0)))
from bitnet_lit.native import library
if {rests}: library.functions()
x = torch.randn(2**20)
def others(): return time.process_time() - time.thread_time()
for _ in range(5): x * 2
before = others()
for _ in range(40):
    x * 2
    time.sleep(0.01)
print(others() - before)
"""


def busy_seconds(rests):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(rests=rests)], env=environment, capture_output=True, text=True, check=True
    )
    return float(result.stdout)


def test_threads_sleep_between_operations():
    if not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("the processors of this process are counted on Linux, and there must be two")
    if not library.is_available():
        pytest.skip("no C++ compiler")
    as_it_is, resting = busy_seconds(False), busy_seconds(True)
    if as_it_is < 0.05:
        pytest.skip("PyTorch's threads do not spin here")
    assert resting < as_it_is / 2
