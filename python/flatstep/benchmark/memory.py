"""How much memory there is."""

import os
import sys
from pathlib import Path

USABLE = 0.85  # of the memory that is available


def usable_bytes() -> float:
    """Memory that a measurement may take."""
    return USABLE * available_bytes()


def total_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """Memory that can be had without swapping; a guess of two thirds of all where unknown."""
    if sys.platform == "linux":
        return read_kib(Path("/proc/meminfo"), "MemAvailable")
    return total_bytes() * 2 // 3


def read_kib(path: Path, key: str) -> int:
    """The bytes that a line of a file in Linux's /proc names."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{path} has no {key}")
