"""The machine and the versions that a figure belongs to, and who else keeps the machine busy."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import flatstep
from flatstep import _ext


def describe() -> dict[str, str]:
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.1f} GiB",
        "system": platform.platform(),
        "load when started": load,
        "vector loops": _ext.cpu_loops(),
        "python": platform.python_version(),
        "flatstep": flatstep.__version__,
        **{name: version(name) for name in ("mlx", "torch", "jax", "optax")},
    }


def cpu_model() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


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
