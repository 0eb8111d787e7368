"""Limits of containers and batch jobs, from the files that the kernel shows."""

import math

import pytest

from bitnet_lit import control_groups
from bitnet_lit.control_groups import cpu_quota, memory_limit, processors

V2_NESTED = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/b/cpu.max": "max 100000",
    "sys/fs/cgroup/a/cpu.max": "300000 100000",
    "sys/fs/cgroup/cpu.max": "400000 100000",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/memory.max": "2000000\n",
    "sys/fs/cgroup/memory.max": "3000000\n",
}
V1 = {
    "proc/self/cgroup": "9:name=systemd:/\n4:cpu,cpuacct:/docker/x\n3:cpuset:/\n2:memory:/docker/x\n",
    "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "50000\n",
    "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000\n",
}
V2 = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/memory.max": "5000000\n",
}
UNLIMITED = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/cpu.max": "max 100000\n",
    "sys/fs/cgroup/memory.max": "max\n",
}
NONSENSE = {
    "proc/self/cgroup": "0::/\nnonsense\n",
    "sys/fs/cgroup/cpu.max": "a b\n",
    "sys/fs/cgroup/memory.max": "\n",
}
OUTSIDE = {"proc/self/cgroup": "0::/../..\n", "sys/fs/cgroup/cpu.max": "0 0"}


@pytest.mark.parametrize(
    ("files", "processors", "memory"),
    [
        ({}, math.inf, math.inf),
        (V2, 1.5, 5e6),
        (UNLIMITED, math.inf, math.inf),
        (V2_NESTED, 3, 2e6),
        (V1, 0.5, 4e6),
        (NONSENSE, math.inf, math.inf),
        (OUTSIDE, math.inf, math.inf),
    ],
    ids=["none", "v2", "unlimited", "nested", "v1", "nonsense", "outside"],
)
def test_the_smallest_limit_of_the_groups_counts(tmp_path, files, processors, memory):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == processors
    assert memory_limit(tmp_path) == memory


def test_a_quota_limits_the_processors(monkeypatch):
    monkeypatch.setattr(control_groups, "usable_cpus", lambda: set(range(8)))
    for quota, expected in ((math.inf, 8), (2.5, 3), (0.1, 1), (64, 8)):
        monkeypatch.setattr(control_groups, "cpu_quota", lambda quota=quota: quota)
        assert processors() == expected
