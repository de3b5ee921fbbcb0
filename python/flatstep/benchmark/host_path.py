"""A process that takes steps whose kernels hardly count, for `instructions.py` to run in callgrind.

Prints as JSON the names of its phases, in the order in which callgrind writes them out, and what
only this process knows of the counts' environment.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx

import flatstep
from flatstep import _ext

ELEMENTS = 16
# Python rewrites its bytecode while it warms up. A small tree does for that, and takes less time.
WARM_UP_TENSORS = 4
WARM_UP_STEPS = 40
# A compiled function is traced first, and malloc's lists fill up.
FIRST_STEPS = 3
STEPS = 10

phases: list[str] = []


def mark(phase: str) -> None:
    """Begin a phase. callgrind writes what it counted at getppid, which nobody else calls."""
    phases.append(phase)
    os.getppid()


def split_call(step: Callable[..., Any]) -> Callable[..., Any]:
    """The extension's step, as a phase of its own within Python's."""

    def marked_step(*arguments: Any) -> Any:
        mark("graph")
        result = step(*arguments)
        mark("python")
        return result

    return marked_step


def tree(tensors: int) -> dict[str, Any]:
    # Not mx.full, whose arrays are one number with strides of zero.
    leaves = [{"weight": mx.random.uniform(shape=(ELEMENTS,))} for _ in range(tensors)]
    mx.eval(leaves)
    return {"layers": leaves}


class HostPath:
    def __init__(self, tensors: int, compiled: bool) -> None:
        self._parameters, self._gradients = tree(tensors), tree(tensors)
        self._optimizer = flatstep.AdamW(learning_rate=1e-3, bias_correction=True)
        self._update = self._optimizer.apply_gradients
        # The first step, which packs the parameters, is on another thread than those that count.
        self.unmarked_step()
        self._in_call = "graph" if compiled else "python"
        if compiled:
            state = self._optimizer.state
            self._update = mx.compile(self._update, inputs=state, outputs=state)

    def unmarked_step(self) -> None:
        self._parameters = self._update(self._gradients, self._parameters)
        mx.eval(self._parameters, self._optimizer.state)

    def step(self) -> None:
        mark("nothing")
        mark(self._in_call)
        updated = self._update(self._gradients, self._parameters)
        mark("free")
        self._parameters = updated
        mark("eval")
        mx.eval(updated, self._optimizer.state)
        mark("between")


def main() -> None:
    tensors, compiled = int(sys.argv[1]), sys.argv[2] == "compiled"
    mx.set_default_device(mx.cpu)

    warm_up = HostPath(WARM_UP_TENSORS, compiled)
    path = HostPath(tensors, compiled)
    gc.collect()
    gc.disable()
    if not compiled:
        _ext.step = split_call(_ext.step)
    for _ in range(WARM_UP_STEPS):
        warm_up.step()
    # A stream of its own has a thread of its own, all of whose instructions are these steps'.
    with mx.stream(mx.new_stream(mx.cpu)):
        for _ in range(FIRST_STEPS + STEPS):
            path.step()
    print(json.dumps({"phases": phases, "vector loops": _ext.cpu_loops()}))


if __name__ == "__main__":
    main()
