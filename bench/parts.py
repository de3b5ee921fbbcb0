"""The parts of a step, timed one by one.

On the main thread a step is Python, the building of the graph, the freeing of the old tree, and
`mx.eval`, one after the other; their times add up to the step's. While `mx.eval` hands out work and
frees what is done, which takes processor time, the kernels run already on MLX's stream thread. Then
it waits for them, which takes none. So the main thread's own clock of processor time divides
`mx.eval` into bookkeeping and waiting, and the stream thread's own clock is what the kernels took.
"""

import gc
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flatstep
import mlx.core as mx
from flatstep import _ext
from flatstep.benchmark.bystanders import Bystanders
from flatstep.benchmark.cases import Setting
from flatstep.benchmark.contenders import MLXContender, random_tree
from flatstep.benchmark.floor import MAX_BYTES, floor_for
from flatstep.benchmark.measure import quartiles, spread, timed
from flatstep.benchmark.results import BUSY, WIDE

# What the main thread does, in the table's order.
PARTS = ("python", "graph", "free", "eval", "wait")
WARM_UP = 4
MIN_STEPS = 10
MAX_STEPS = 1_000


@dataclass
class Profile:
    """Seconds of each step, by part; of whole steps that nobody looked into; and of the floor."""

    setting: Setting
    mode: str
    threads: int
    parts: dict[str, list[float]]
    plain: list[float] = field(default_factory=list)
    kernel: list[float] = field(default_factory=list)  # empty where the system doesn't tell
    floor: list[float] = field(default_factory=list)
    other_cores: float | None = None

    @property
    def tensors(self) -> int:
        return len(self.setting.shapes)

    def median(self, part: str) -> float:
        return quartiles(self.parts[part])[1]

    @property
    def sum(self) -> float:
        return sum(map(self.median, self.parts))

    @property
    def coverage(self) -> float:
        """The sum of the parts, as a part of a step that was only timed as a whole."""
        return self.sum / quartiles(self.plain)[1]

    @property
    def spread(self) -> float:
        return spread(self.plain)

    @property
    def is_noisy(self) -> bool:
        return self.spread > WIDE or (self.other_cores or 0.0) > BUSY


class PartedStep(MLXContender):
    """A contender that can take a step part by part."""

    def __init__(self, setting: Setting, mode: str, stream_time: Callable[[], float]) -> None:
        parameters, gradients = random_tree(setting, 0), random_tree(setting, 1)
        super().__init__(flatstep, mode == "compiled", setting, parameters, gradients)
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


def profile(setting: Setting, mode: str, seconds: float) -> Profile:
    """Take steps for some seconds. Meant for a process of its own."""
    mx.set_default_device(mx.cpu)
    if setting.threads is not None:
        _ext.set_num_threads(setting.threads)
    result = Profile(setting, mode, _ext.num_threads(), {part: [] for part in PARTS})
    stream = mx.new_stream(mx.cpu)
    stream_time = stream_clock(stream)
    floor = floor_for(setting, mx.Device(mx.cpu), MAX_BYTES)
    step = PartedStep(setting, mode, stream_time or (lambda: 0.0))
    order = random.Random(0)

    def plain_step() -> None:
        result.plain.append(timed(step.step))

    def parted_step() -> None:
        parts, kernel = step.parted_step()
        for name, value in parts.items():
            result.parts[name].append(value)
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
