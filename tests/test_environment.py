"""How many threads the CPU's updates get when flatstep is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from flatstep._environment import cgroup_quotas

V2 = {"proc/self/cgroup": "0::/user.slice/job\n"}
V1 = {"proc/self/cgroup": "5:cpuset:/\n4:cpu,cpuacct:/docker/a1\n3:memory:/docker/a1\n0::/x\n"}
QUOTAS: dict[str, tuple[dict[str, str], list[int]]] = {
    "none there": ({}, []),
    "no quota": ({**V2, "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000\n"}, []),
    "a quota": ({**V2, "sys/fs/cgroup/user.slice/job/cpu.max": "200000 100000\n"}, [2]),
    "rounded up": ({**V2, "sys/fs/cgroup/user.slice/job/cpu.max": "150000 100000\n"}, [2]),
    "of a group above": (
        {
            **V2,
            "sys/fs/cgroup/user.slice/job/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/user.slice/cpu.max": "300000 100000\n",
        },
        [4, 3],
    ),
    "in a container": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
        [1],
    ),
    "version 1": (
        {
            **V1,
            "sys/fs/cgroup/cpu,cpuacct/docker/a1/cpu.cfs_quota_us": "600000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/a1/cpu.cfs_period_us": "100000\n",
        },
        [6],
    ),
    "version 1 in a container": (
        {
            **V1,
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        [1],
    ),
    "version 1 without a quota": (
        {
            **V1,
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        [],
    ),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_quotas_of_control_groups(case: str, tmp_path: Path) -> None:
    files, expected = QUOTAS[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(cgroup_quotas(tmp_path)) == expected


def threads_at_import(prelude: str = "", **variables: str) -> int:
    program = f"{prelude}\nfrom flatstep import _ext\nprint(_ext.num_threads())"
    environment = {k: v for k, v in os.environ.items() if k != "FLATSTEP_NUM_THREADS"}
    command = [sys.executable, "-c", program]
    environment |= variables
    return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinities")
def test_a_process_takes_no_more_threads_than_the_cores_it_may_run_on() -> None:
    assert threads_at_import() <= len(os.sched_getaffinity(0))
    core = min(os.sched_getaffinity(0))
    assert threads_at_import(f"import os; os.sched_setaffinity(0, [{core}])") == 1


def test_the_variable_decides_where_it_is_set() -> None:
    assert threads_at_import(FLATSTEP_NUM_THREADS="7") == 7
