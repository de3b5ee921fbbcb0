"""The machine and the versions that a figure belongs to."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import flatstep
from flatstep import _ext
from flatstep.benchmark.memory import total_bytes


def describe() -> dict[str, str]:
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return {
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "memory": f"{total_bytes() / 2**30:.1f} GiB",
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
