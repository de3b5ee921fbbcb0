"""Who is measured: each contender holds its own parameters and state, and takes a step when asked.

A step is what a training loop pays once the gradients are there: new parameters and state from
given gradients, evaluated, the old ones let go. All start from random values of the case's shapes.

mlx.optimizers stores the state in the dtype of the parameters: with bfloat16 it moves fewer bytes
than the floor and flatstep do, at the price of a `v` that can't decay.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers
from mlx.utils import tree_unflatten

import flatstep

from .cases import DTYPES, ITEMSIZE, RULES, Setting, Shape
from .floor import MAX_BYTES

FLATSTEP = ("flatstep eager", "flatstep compiled")
MLX = ("mlx eager", "mlx compiled")
# By process, each with a floor of its own: a step of mlx.optimizers leaves tens of thousands of
# freed nodes on the heap, which slow the allocations of whoever comes next.
GROUPS: dict[str, tuple[str, ...]] = {"flatstep": FLATSTEP, "mlx": MLX}
LEARNING_RATE = 1e-3
BLOCK = 2**20


class Contender(Protocol):
    def step(self) -> None: ...

    def extra_bytes(self) -> int | None:
        """Take a step; return its peak memory above what is held, or None where unknown."""


def bytes_needed(setting: Setting, names: tuple[str, ...], floor_bytes: int = MAX_BYTES) -> int:
    """An estimate of the most memory that these contenders need, the floor included."""
    item, elements = ITEMSIZE[setting.dtype], setting.elements
    peer = elements * item * (1 + setting.slots)
    held = [elements * item + setting.state_bytes if name in FLATSTEP else peer for name in names]
    # While it starts, a contender's first parameters are there too; a peer writes all anew.
    transient = max(elements * item if name in FLATSTEP else peer for name in names)
    return elements * item + sum(held) + transient + min(floor_bytes, setting.step_bytes)


def fitting(
    setting: Setting,
    names: tuple[str, ...],
    usable_bytes: float,
    floor_bytes: int = MAX_BYTES,
) -> list[tuple[str, ...]]:
    """Contenders together if they fit in memory, else one by one, and none that doesn't fit."""
    if bytes_needed(setting, names, floor_bytes) <= usable_bytes:
        return [names]
    return [(n,) for n in names if bytes_needed(setting, (n,), floor_bytes) <= usable_bytes]


def random_values(
    shape: Shape, draw: Callable[[int], Any], concatenate: Callable[[list[Any]], Any]
) -> Any:
    """Values that repeat after 2^20: to draw a billion would take longer than to measure."""
    whole, rest = divmod(math.prod(shape), BLOCK)
    if whole == 0:
        return draw(rest).reshape(shape)
    block = draw(BLOCK)
    return concatenate([block] * whole + [block[:rest]]).reshape(shape)


def random_tree(setting: Setting, seed: int) -> Any:
    """The case's tree of MLX arrays, evaluated."""
    mx.random.seed(seed)

    def draw(size: int) -> mx.array:
        return mx.random.uniform(-0.05, 0.05, (size,), DTYPES[setting.dtype])

    tree = tree_unflatten(
        [
            (path, random_values(shape, draw, mx.concatenate))
            for path, shape in setting.shapes.items()
        ]
    )
    mx.eval(tree)
    return tree


def rule_arguments(setting: Setting) -> dict[str, Any]:
    return {"momentum": 0.9} if setting.rule == "sgd" else {"bias_correction": True}


class MLXContender:
    """flatstep or mlx.optimizers, on MLX's default device."""

    def __init__(
        self, optim: ModuleType, compiled: bool, setting: Setting, parameters: Any, gradients: Any
    ) -> None:
        self._parameters, self._gradients = parameters, gradients
        make = getattr(optim, RULES[setting.rule].label)
        self._optimizer = make(learning_rate=LEARNING_RATE, **rule_arguments(setting))
        self._optimizer.init(parameters)
        state = self._optimizer.state
        mx.eval(state)
        self._update = self._optimizer.apply_gradients
        if compiled:
            self._update = mx.compile(self._update, inputs=state, outputs=state)

    def step(self) -> None:
        self._parameters = self._update(self._gradients, self._parameters)
        mx.eval(self._parameters, self._optimizer.state)

    def extra_bytes(self) -> int | None:
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        self.step()
        return mx.get_peak_memory() - held


def make_contenders(setting: Setting, names: tuple[str, ...]) -> dict[str, Contender]:
    """Contenders of flatstep or mlx.optimizers, on the same initial values."""
    parameters, gradients = random_tree(setting, 0), random_tree(setting, 1)
    contenders: dict[str, Contender] = {}
    for name in names:
        library, mode = name.split()
        optim = {"flatstep": flatstep, "mlx": mlx.optimizers}[library]
        contenders[name] = MLXContender(optim, mode == "compiled", setting, parameters, gradients)
    return contenders
