"""How it is measured: each timed step is paired with a run of the floor just before it."""

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .bystanders import Bystanders
from .contenders import Contender

WARM_UP = 2
PAUSE = 0.02  # longer than idle OpenMP threads spin, which is some 10 ms
# A contender this many times slower than the floor sits out rounds, so that its peers get more.
SLOW = 4
MAX_ROUNDS_OUT = 8
PATIENCE = 4


@dataclass(frozen=True)
class Budget:
    """When to stop: after `seconds` but not before `min_pairs`, or after `max_pairs`.

    A machine that is busy with something else can't be waited for: `PATIENCE` times `seconds` ends
    it as well, once everybody has run. Where `seconds` is None there are `max_pairs`, of everybody.
    """

    seconds: float | None
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
    def quartiles(self) -> tuple[float, float, float]:
        """Quartiles of the time in seconds; the second is the median."""
        return quartiles(self.seconds)

    @property
    def ratio_quartiles(self) -> tuple[float, float, float]:
        """Quartiles of the ratios of each step to the floor before it."""
        return quartiles([a / b for a, b in zip(self.seconds, self.floor_seconds, strict=True)])

    @property
    def ratio(self) -> float:
        return self.ratio_quartiles[1]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, second, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, second, third


def spread(values: list[float]) -> float:
    """How wide their middle half is, as a part of the median."""
    first, median, third = quartiles(values)
    return (third - first) / median


def timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


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
        seconds = [timed(contender.step) for _ in range(WARM_UP)]
        floors = [timed(floor) for _ in range(WARM_UP)]
        rounds_out[name] = int(min(seconds) / min(floors) / SLOW) if budget.seconds else 0
    order = random.Random(0)
    names = list(contenders)
    gc.collect()
    gc.disable()
    bystanders = Bystanders()
    start = time.perf_counter()
    for number in range(budget.max_pairs):
        if budget.seconds is None:
            report(number / budget.max_pairs)
        else:
            elapsed = time.perf_counter() - start
            done = min(elapsed / budget.seconds, 1.0)
            report(done)
            fewest = min(len(runs.seconds) for runs in series.values())
            impatient = elapsed > PATIENCE * budget.seconds
            if done == 1.0 and fewest >= (1 if impatient else budget.min_pairs):
                break
        order.shuffle(names)
        for name in names:
            if number % min(MAX_ROUNDS_OUT, rounds_out[name] + 1) == 0:
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
