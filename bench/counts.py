"""The instructions of a step around its kernels: callgrind's parts as phases of a step.

Main thread and stream thread apart, and by library.
"""

import json
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .callgrind import CallgrindError, Part, count
from .host_path import FIRST_STEPS

ROOT = Path(__file__).resolve().parent.parent
STEPS = 10
# On the main thread, in this order; and the kernels' thread.
MAIN_PARTS = ("python", "graph", "free", "eval")
STREAM = "stream"
LIBRARIES = {
    r"_ext\..*": "flatstep",
    r"libmlx\..*": "MLX",
    r"core\..*": "mlx.core",
    r"(libpython|python).*": "Python",
    r"libc[.-].*": "malloc, libc",
    r"(libstdc\+\+|libgcc).*": "libstdc++",
}


@dataclass
class Counted:
    """The instructions of one case for each tensor and step, by part and then by library."""

    name: str
    parts: dict[str, Counter[str]]
    tensors: int

    def __post_init__(self) -> None:
        if not self.parts["graph"]:
            raise CallgrindError("the step did not call flatstep._ext.step: see host_path.py")

    def part(self, name: str) -> float:
        return self.parts[name].total() / self.tensors

    @property
    def totals(self) -> dict[str, float]:
        return {name: self.part(name) for name in self.parts}

    def library(self, name: str) -> float:
        """Of the main thread."""
        return sum(self.parts[part][name] for part in MAIN_PARTS) / self.tensors


def count_case(tensors: int, mode: str) -> tuple[Counted, dict[str, Any]]:
    """Count one case; also returns what the process that took the steps says of itself."""
    command = [sys.executable, "-m", "bench.host_path", str(tensors), mode, str(STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        parts, output = count(command, "getppid", Path(folder) / "profile", ROOT)
    report = json.loads(output)
    main = [part for part in parts if part.thread == 1]
    steps = steps_of(report["phases"], main[1:])[-STEPS:]
    stream_thread = max(part.thread for part in parts)
    assert stream_thread != 1
    stream: Counter[str] = Counter()
    for part in parts:
        if part.thread == stream_thread:
            stream.update(by_library(part))
    taken = FIRST_STEPS + STEPS
    return Counted(
        f"{tensors:,} {mode}",
        {
            **{name: mean_step(steps, name) for name in MAIN_PARTS},
            STREAM: Counter({name: number // taken for name, number in stream.items()}),
        },
        tensors,
    ), report


def steps_of(phases: list[str], parts: list[Part]) -> list[dict[str, Counter[str]]]:
    """What each step executed in each of its phases; marking them is not counted.

    A phase "nothing" begins a step and contains only what a mark itself costs.
    """
    steps: list[dict[str, Counter[str]]] = []
    marking: Counter[str] = Counter()
    for phase, part in zip(phases, parts, strict=True):
        libraries = by_library(part)
        if phase == "nothing":
            marking = libraries
            steps.append({})
            continue
        libraries.subtract(marking)
        steps[-1].setdefault(phase, Counter()).update(libraries)
    return steps


def mean_step(steps: list[dict[str, Counter[str]]], phase: str) -> Counter[str]:
    """A phase of a step. Not the median's: malloc takes turns between a dear and a cheap step."""
    total: Counter[str] = Counter()
    for step in steps:
        total.update(step.get(phase, Counter()))
    return Counter({library: number // len(steps) for library, number in total.items()})


def by_library(part: Part) -> Counter[str]:
    libraries: Counter[str] = Counter()
    for path, number in part.instructions.items():
        file = path.rpartition("/")[2]
        name = next(
            (name for pattern, name in LIBRARIES.items() if re.fullmatch(pattern, file)), ""
        )
        libraries[name or "other"] += number
    return libraries
