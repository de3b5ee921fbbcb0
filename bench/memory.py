"""How much memory there is, and how much a step takes for a while."""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

PROCESS = Path("/proc/self")


def available_bytes() -> int:
    """Memory that can be had without swapping; a guess of two thirds of all where unknown."""
    if sys.platform == "linux":
        return _read_kib(Path("/proc/meminfo"), "MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 2 // 3


def resident_bytes_above(step: Callable[[], None]) -> int | None:
    """The peak of resident memory in `step` above that before it, where the system tells.

    For libraries that don't count what they allocate. Memory that malloc keeps after it was freed
    is given back first, else a step would find there what it needs and seem to take nothing.
    """
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    try:
        (PROCESS / "clear_refs").write_text("5")  # the peak so far is forgotten
    except OSError:
        return None
    held = _read_kib(PROCESS / "status", "VmRSS")
    step()
    return max(0, _read_kib(PROCESS / "status", "VmHWM") - held)


def _read_kib(path: Path, key: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{path} has no {key}")
