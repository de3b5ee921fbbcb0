"""What is read from the environment when flatstep is imported: how many threads the CPU gets."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def num_threads() -> int:
    """FLATSTEP_NUM_THREADS, or as many threads as this process may keep busy.

    Raises:
        ValueError: FLATSTEP_NUM_THREADS is set to something that is no thread count.
    """
    text = os.environ.get("FLATSTEP_NUM_THREADS")
    if not text:
        return min(usable_cores(), 1024)
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1024):
        raise ValueError(
            f"FLATSTEP_NUM_THREADS should be a whole number from 1 to 1024, {text!r} was found in "
            "the environment"
        )
    return int(text)


def usable_cores() -> int:
    """The cores that the process may run on; fewer where a control group has a quota of time."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([cores, *cgroup_quotas(Path("/"))]))


def cgroup_quotas(root: Path) -> Iterator[int]:
    """In cores, rounded up: the quotas of the process's control groups and those above them."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        is_v2 = controllers == ""
        if not is_v2 and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        # In a container the path may be the host's; its root is then the container's own group.
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents[: len(Path(path).parts) - 1]):
            if is_v2:
                words = " ".join(_lines(folder / "cpu.max")).split()
            else:
                files = (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
                words = [line for file in files for line in _lines(file)]
            if len(words) == 2 and all(word.isdigit() and int(word) for word in words):
                yield math.ceil(int(words[0]) / int(words[1]))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
