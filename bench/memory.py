"""How much memory a step takes for a while."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

from flatstep.benchmark.memory import read_kib

PROCESS = Path("/proc/self")


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
    held = read_kib(PROCESS / "status", "VmRSS")
    step()
    return max(0, read_kib(PROCESS / "status", "VmHWM") - held)
