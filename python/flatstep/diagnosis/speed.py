"""How much of the memory's speed AdamW in float32 reaches, against copies of as many bytes."""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

import flatstep

from ..benchmark.floor import Floor, Sum
from ..benchmark.measure import WIDE, spread, timed

SIZE, QUICK_SIZE = 16 << 20, 4 << 20
ROUNDS, QUICK_ROUNDS = 15, 7
# Of an element: p, g, m and v are read; p, m and v are written.
STEP_BYTES = 28

STEP = "flatstep's AdamW"


@dataclass(frozen=True)
class Speed:
    """What was measured on a device. Each run moves the same number of bytes."""

    elements: int
    bytes: int
    rounds: int
    seconds: dict[str, float]  # medians
    spread: dict[str, float]  # of the middle half of the runs, as a part of the median
    held_bytes: int  # by the step's parameters, gradients and state
    extra_bytes: int  # peak memory of a step above everything that is held
    load: float

    @property
    def share(self) -> float:
        """Of the fastest copy's speed: the median time of that copy over the step's."""
        copies = [seconds for name, seconds in self.seconds.items() if name != STEP]
        return min(copies) / self.seconds[STEP]

    @property
    def is_noisy(self) -> bool:
        return max(self.spread.values()) > WIDE or self.load > 1 + (os.cpu_count() or 1) / 4


class _Step:
    """AdamW of one flat array in place."""

    def __init__(self, elements: int) -> None:
        self.parameters = {"flat": mx.full((elements,), 0.5)}
        self.gradients = {"flat": mx.contiguous(mx.full((elements,), 1e-3))}
        self.optimizer = flatstep.AdamW(1e-5, bias_correction=True)
        self.optimizer.init(self.parameters)

    def __call__(self) -> None:
        self.parameters = self.optimizer.apply_gradients(self.gradients, self.parameters)
        mx.eval(self.parameters, self.optimizer.state)


def measure(device: mx.Device, quick: bool) -> Speed:
    elements = QUICK_SIZE if quick else SIZE
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with mx.stream(device):
        step = _Step(elements)
        runs: dict[str, Callable[[], None]] = {
            STEP: step,
            "MLX's a + b": Sum(elements * STEP_BYTES),
        }
        if device.type == mx.cpu:
            runs["the floor"] = Floor(elements, slots=2)
        for run in runs.values():
            for _ in range(3):
                _timed(run)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(_timed(run))
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        _timed(step)
        extra = mx.get_peak_memory() - held
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Speed(
        elements,
        elements * STEP_BYTES,
        rounds,
        medians,
        {name: spread(values) for name, values in times.items()},
        4 * 4 * elements,
        extra,
        os.getloadavg()[0],
    )


def _timed(run: Callable[[], None]) -> float:
    """With all that was queued before done, and all that the run queues."""

    def whole() -> None:
        run()
        mx.synchronize()

    mx.synchronize()
    return timed(whole)
