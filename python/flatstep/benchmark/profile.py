"""Where the time of a step goes: ``python -m flatstep.benchmark.profile``.

Prints the medians of a step's parts, in microseconds and for each tensor. On the main thread a step
is Python, the building of the graph, the freeing of the old tree, and `mx.eval`, one after the
other; their times add up to the step's. While `mx.eval` hands out work and frees what is done,
which takes processor time, the kernels run already on MLX's stream thread. Then it waits for them,
which takes none. So the main thread's own clock of processor time divides `mx.eval` into
bookkeeping and waiting, and the stream thread's own clock is what the kernels took.
"""

import argparse
import gc
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

import flatstep
from flatstep import _ext

from .._command_line import print_environment, print_table, print_wrapped
from .cases import CASES, Setting
from .contenders import FLATSTEP, MLXContender, bytes_needed, random_tree, usable_bytes
from .floor import floor_for
from .measure import Bystanders, noise, quartiles, timed
from .worker import set_up

# What the main thread does, in the table's order.
PARTS = ("python", "graph", "free", "eval", "wait")
WARM_UP = 4
MIN_STEPS = 10
MAX_STEPS = 1_000


@dataclass
class Profile:
    """Seconds of each step, by part; of whole steps that nobody looked into; and of the floor."""

    parts: dict[str, list[float]]
    plain: list[float] = field(default_factory=list)
    kernel: list[float] = field(default_factory=list)  # empty where the system doesn't tell
    floor: list[float] = field(default_factory=list)
    other_cores: float | None = None

    @property
    def medians(self) -> list[float]:
        return [quartiles(seconds)[1] for seconds in self.parts.values()]

    @property
    def coverage(self) -> float:
        """The sum of the parts, as a part of a step that was only timed as a whole."""
        return sum(self.medians) / quartiles(self.plain)[1]

    def rows(self, name: str, tensors: int) -> list[list[str]]:
        """A row of microseconds, and the same for each tensor."""
        kernel = quartiles(self.kernel)[1] if self.kernel else None
        values = [sum(self.medians), *self.medians, kernel, quartiles(self.floor)[1]]
        return [
            [label, *("-" if v is None else _microseconds(v / divisor) for v in values)]
            for label, divisor in ((name, 1), ("  a tensor", tensors))
        ]

    def remarks(self, name: str) -> list[str]:
        doubt = noise("whole steps", self.plain, self.other_cores)
        said = f"the parts are {self.coverage:.1%} of a whole step"
        return [f"{name}: {said}, medians of {len(self.plain)} steps", *([doubt] if doubt else [])]


def _microseconds(seconds: float) -> str:
    value = 1e6 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


class PartedStep(MLXContender):
    """A contender that can take a step part by part."""

    def __init__(self, setting: Setting, name: str, stream_time: Callable[[], float]) -> None:
        parameters, gradients = random_tree(setting, 0), random_tree(setting, 1)
        super().__init__(flatstep, name.endswith("compiled"), setting, parameters, gradients)
        self._stream_time = stream_time

    def parted_step(self) -> tuple[dict[str, float], float]:
        """Take a step; return the seconds of each part, and of the stream thread."""
        clock, own = time.perf_counter, time.thread_time
        inner: Callable[..., Any] = _ext.step
        in_extension = 0.0

        def timed_step(*arguments: Any) -> Any:
            nonlocal in_extension
            begin = clock()
            result = inner(*arguments)
            in_extension += clock() - begin
            return result

        hook: Callable[..., Any] = timed_step
        _ext.step = hook
        try:
            stream_before = self._stream_time()
            start = clock()
            updated = self._update(self._gradients, self._parameters)
            called = clock()
            self._parameters = updated
            freed = clock()
            own_before = own()
            mx.eval(updated, self._optimizer.state)
            own_after = own()
            end = clock()
        finally:
            _ext.step = inner
        # A compiled function replays the graph: no Python runs in it.
        graph = in_extension or called - start
        seconds = {
            "python": called - start - graph,
            "graph": graph,
            "free": freed - called,
            "eval": own_after - own_before,
            "wait": end - freed - (own_after - own_before),
        }
        return seconds, self._stream_time() - stream_before


def stream_clock(stream: mx.Stream) -> Callable[[], float] | None:
    """A clock of the processor time of a new stream's thread; None where the system has none."""
    if sys.platform != "linux":
        return None
    before = set(os.listdir("/proc/self/task"))
    with mx.stream(stream):
        mx.eval(mx.zeros(1) + 1)
    after = set(os.listdir("/proc/self/task")) - before
    if len(after) != 1:
        return None
    # As glibc's pthread_getcpuclockid() makes it of a thread's number.
    clock = (~int(after.pop()) << 3) | 6
    return lambda: time.clock_gettime(clock)


def profile(setting: Setting, name: str, seconds: float) -> Profile:
    """Take steps for some seconds. Meant for a process of its own."""
    mx.set_default_device(mx.cpu)
    set_up(setting)
    result = Profile({part: [] for part in PARTS})
    stream = mx.new_stream(mx.cpu)
    stream_time = stream_clock(stream)
    floor = floor_for(setting, mx.Device(mx.cpu))
    step = PartedStep(setting, name, stream_time or (lambda: 0.0))
    order = random.Random(0)

    def plain_step() -> None:
        result.plain.append(timed(step.step))

    def parted_step() -> None:
        parts, kernel = step.parted_step()
        for part, value in parts.items():
            result.parts[part].append(value)
        if stream_time:
            result.kernel.append(kernel)

    with mx.stream(stream):
        for _ in range(WARM_UP):
            step.step()
            floor()
        gc.collect()
        gc.disable()
        bystanders = Bystanders()
        end = time.perf_counter() + seconds
        while len(result.plain) < MIN_STEPS or (
            time.perf_counter() < end and len(result.plain) < MAX_STEPS
        ):
            result.floor.append(timed(floor))
            step.step()  # finds what the floor has left in the caches
            for function in order.sample([plain_step, parted_step], 2):
                function()
        result.other_cores = bystanders.cores()
        gc.enable()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="make profile", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each mode of each case")
    options = parser.parse_args()
    print_environment(None)
    for setting in (Setting(case, threads=n) for case in options.case for n in (1, None)):
        rows, remarks = [], []
        for name in FLATSTEP:
            if bytes_needed(setting, (name,)) > usable_bytes():
                remarks.append(f"{name}: too little memory")
                continue
            # In a process of its own, which leaves nothing on the other's heap.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                result = pool.apply(profile, (setting, name, options.seconds))
            rows += result.rows(name.split()[1], len(setting.shapes))
            remarks += result.remarks(name.split()[1])
        print_table(setting.label, ("microseconds", "step", *PARTS, "kernels", "floor"), rows)
        for remark in remarks:
            print_wrapped(remark)


if __name__ == "__main__":
    main()
