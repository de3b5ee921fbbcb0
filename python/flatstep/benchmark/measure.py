"""How it is measured: each timed step is paired with a run of the floor just before it."""

import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .contenders import Contender

WARM_UP = 2
PAUSE = 0.02  # longer than idle OpenMP threads spin, which is some 10 ms
# A contender this many times slower than the floor sits out rounds, so that its peers get more.
SLOW = 4
MAX_ROUNDS_OUT = 8
PATIENCE = 4
# Figures are doubtful where the middle half of the times is wider than this part of their median,
# or where other processes kept this many cores busy.
WIDE = 0.1
BUSY = 0.1


@dataclass(frozen=True)
class Budget:
    """When to stop: after `seconds` but not before `min_pairs`, or after `max_pairs`.

    A machine that is busy with something else can't be waited for: `PATIENCE` times `seconds` ends
    it as well, once everybody has run.
    """

    seconds: float
    min_pairs: int
    max_pairs: int


FULL = Budget(seconds=3.0, min_pairs=4, max_pairs=60)
QUICK = Budget(seconds=1.0, min_pairs=3, max_pairs=30)


@dataclass
class Series:
    """The runs of one contender: seconds of each step and of the floor before it.

    None stands for what the system doesn't tell.
    """

    seconds: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None  # peak memory of a step above what is held before it
    other_cores: float | None = None  # kept busy by other processes meanwhile

    @property
    def ratio(self) -> float:
        """The median of the ratios of each step to the floor before it."""
        return statistics.median(
            step / floor for step, floor in zip(self.seconds, self.floor_seconds, strict=True)
        )


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The second is the median."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, second, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, second, third


def spread(values: list[float]) -> float:
    """How wide their middle half is, as a part of the median."""
    first, median, third = quartiles(values)
    return (third - first) / median


def noise(what: str, values: list[float], other_cores: float | None) -> str | None:
    """Why figures are doubtful, or None: by times that should be the same."""
    if spread(values) <= WIDE and (other_cores or 0.0) <= BUSY:
        return None
    others = f", others used {other_cores:.1f} cores" if round(other_cores or 0.0, 1) else ""
    return f"too noisy to tell: the middle half of {what} is {spread(values):.0%} wide{others}"


def timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


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


def measure(
    contenders: dict[str, Contender],
    floor: Callable[[], None],
    budget: Budget,
    spins: bool,
    report: Callable[[float], None],
) -> dict[str, Series]:
    """Time all contenders in rounds, in a new order each round, and then their memory.

    Where threads spin after a step, the floor has to wait until they sleep. A pause slows down what
    comes after it, so the contender then takes a step that is not timed before the one that is.

    Python's garbage collector is off meanwhile, else one contender would pay for the garbage of
    another.

    Args:
        contenders: what to time, by name.
        floor: a run of the floor.
        budget: when to stop.
        spins: whether the contenders' threads spin for a while after a step.
        report: called after each round with the part of the work that is done, from 0 to 1.
    """
    series = {name: Series() for name in contenders}
    rounds_out = {}
    for name, contender in contenders.items():
        seconds = min(timed(contender.step) for _ in range(WARM_UP))
        floors = min(timed(floor) for _ in range(WARM_UP))
        rounds_out[name] = min(MAX_ROUNDS_OUT - 1, int(seconds / floors / SLOW))
    order = random.Random(0)
    names = list(contenders)
    gc.collect()
    gc.disable()
    bystanders = Bystanders()
    start = time.perf_counter()
    for number in range(budget.max_pairs):
        elapsed = time.perf_counter() - start
        done = min(elapsed / budget.seconds, 1.0)
        report(done)
        fewest = min(len(runs.seconds) for runs in series.values())
        impatient = elapsed > PATIENCE * budget.seconds
        if done == 1.0 and fewest >= (1 if impatient else budget.min_pairs):
            break
        order.shuffle(names)
        for name in names:
            if number % (rounds_out[name] + 1) == 0:
                if spins:
                    time.sleep(PAUSE)
                series[name].floor_seconds.append(timed(floor))
                if spins:
                    contenders[name].step()
                series[name].seconds.append(timed(contenders[name].step))
    gc.enable()
    other_cores = bystanders.cores()
    for name, contender in contenders.items():
        series[name].extra_bytes = contender.extra_bytes()
        series[name].other_cores = other_cores
    return series
