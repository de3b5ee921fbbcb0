"""A process that measures some contenders in one setting: its two ends.

The parent writes one JSON job to its standard input; it answers with JSON lines, for its progress
and at last for its result.
"""

import contextlib
import faulthandler
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from .. import _ext
from ..diagnosis.environment import DEVICES
from .cases import Setting
from .contenders import TORCH, make_contenders
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
    device: str = "cpu"


def run_worker(job: Job, report: Callable[[float], None]) -> dict[str, Series]:
    """Measure in a process of its own; `report` is told what part is done.

    Raises:
        WorkerError: when the process fails; with the last line that it wrote.
    """
    series = ask(__name__, asdict(job), report).get("series", {})
    return {name: Series(**runs) for name, runs in series.items()}


def ask(module: str, job: dict[str, Any], report: Callable[[float], None]) -> dict[str, Any]:
    """The last message of a process that runs this module.

    Raises:
        WorkerError: when the process fails; with the last line that it wrote.
    """
    with tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        with worker:
            assert worker.stdin and worker.stdout
            with contextlib.suppress(BrokenPipeError):  # it says why when it has ended
                worker.stdin.write(json.dumps(job))
                worker.stdin.close()
            message: dict[str, Any] = {}
            for line in worker.stdout:
                message = json.loads(line)
                report(message.get("done", 1.0))
        if worker.returncode != 0:
            errors.seek(0)
            last = errors.read().strip().rpartition("\n")[2]
            raise WorkerError(f"exit code {worker.returncode}: {last}")
    return message


def serve() -> None:
    """The worker's end."""
    fields = json.load(sys.stdin)
    setting, names = Setting(**fields["setting"]), tuple(fields["contenders"])
    device = DEVICES[fields["device"]]
    mx.set_default_device(device)
    set_up(setting)
    contenders = make_contenders(setting, names)
    floor = floor_for(setting, device)
    if device.type == mx.DeviceType.gpu:
        start = time.perf_counter()
        while time.perf_counter() - start < GPU_WARM_UP:
            floor()
    budget = Budget(**fields["budget"])
    spins = names == TORCH
    series = measure(contenders, floor, budget, spins, lambda done: write({"done": done}))
    write({"series": {name: asdict(runs) for name, runs in series.items()}})


def set_up(setting: Setting) -> None:
    """Gives the engine a setting's threads and loops."""
    if setting.threads is not None:
        _ext.set_num_threads(setting.threads)
    if setting.loops is not None:
        _ext.set_cpu_loops(setting.loops)


def write(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    # A crash in a kernel then says at least where Python was.
    faulthandler.enable()
    serve()
