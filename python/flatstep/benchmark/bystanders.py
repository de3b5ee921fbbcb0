"""Who else keeps the machine busy while something is measured."""

import os
import sys
import time
from pathlib import Path


class Bystanders:
    """How many cores other processes have kept busy since this was made; Linux tells."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), self._seconds()

    def cores(self) -> float | None:
        if sys.platform != "linux":
            return None
        started, before = self._start
        return max(0.0, self._seconds() - before) / (time.perf_counter() - started)

    @staticmethod
    def _seconds() -> float:
        """The time of all cores that was neither idle nor this process's."""
        if sys.platform != "linux":
            return 0.0
        fields = [int(text) for text in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        user, nice, system, _, _, irq, softirq, steal = fields[:8]
        busy = user + nice + system + irq + softirq + steal
        return busy / os.sysconf("SC_CLK_TCK") - time.process_time()
