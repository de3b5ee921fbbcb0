"""A process that measures some contenders in one setting: its two ends.

The parent writes one JSON job to its standard input; it answers with JSON lines, for its progress
and at last for its result.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..diagnosis.environment import DEVICES
from .cases import Setting
from .contenders import Contender
from .floor import floor_for
from .measure import Budget, Series, measure

# A GPU that was idle runs slowly at first.
GPU_WARM_UP = 1.0


class WorkerError(Exception):
    pass


@dataclass(frozen=True)
class Job:
    setting: Setting
    contenders: tuple[str, ...]
    budget: Budget
    floor_bytes: int  # what the floor may hold
    device: str = "cpu"


def run_worker(
    module: str, job: Job, report: Callable[[float], None], folder: Path | None = None
) -> dict[str, Series]:
    """Measure in a process of its own, which runs a module from a folder.

    Raises:
        WorkerError: when the process fails; with the last line that it wrote.
    """
    environment = dict(os.environ)
    if job.setting.threads is not None:
        environment["FLATSTEP_NUM_THREADS"] = str(job.setting.threads)
    with tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        with worker:
            assert worker.stdin and worker.stdout
            with contextlib.suppress(BrokenPipeError):  # it says why when it has ended
                worker.stdin.write(json.dumps(asdict(job)))
                worker.stdin.close()
            series = {}
            for line in worker.stdout:
                message = json.loads(line)
                report(message.get("done", 1.0))
                series = message.get("series", {})
        if worker.returncode != 0:
            errors.seek(0)
            last = errors.read().strip().rpartition("\n")[2]
            raise WorkerError(f"exit code {worker.returncode}: {last}")
    return {name: Series(**runs) for name, runs in series.items()}


def serve(
    make: Callable[[Setting, tuple[str, ...]], dict[str, Contender]],
    spins: Callable[[tuple[str, ...]], bool],
) -> None:
    """The worker's end: `make` contenders by their names; whether their threads spin."""
    fields = json.load(sys.stdin)
    setting, names = Setting(**fields["setting"]), tuple(fields["contenders"])
    device = DEVICES[fields["device"]]
    mx.set_default_device(device)
    contenders = make(setting, names)
    floor = floor_for(setting, device, fields["floor_bytes"])
    if device.type == mx.DeviceType.gpu:
        start = time.perf_counter()
        while time.perf_counter() - start < GPU_WARM_UP:
            floor()
    series = measure(
        contenders,
        floor,
        Budget(**fields["budget"]),
        spins(names),
        lambda done: _write({"done": done}),
    )
    _write({"series": {name: asdict(runs) for name, runs in series.items()}})


def _write(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)
