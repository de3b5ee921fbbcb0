"""Who is measured: each contender holds its own parameters and state, and takes a step when asked.

A step is what a training loop pays once the gradients are there: new parameters and state from
given gradients, evaluated, the old ones let go. All start from random values of the case's shapes.

Peers store the state in the dtype of the parameters: with bfloat16 they move fewer bytes than the
floor and flatstep do, at the price of a `v` that can't decay.
"""

import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers
from mlx.utils import tree_unflatten

import flatstep

from .cases import DTYPES, RULES, Setting, Shape
from .floor import MAX_BYTES

FLATSTEP = ("flatstep eager", "flatstep compiled")
MLX = ("mlx eager", "mlx compiled")
TORCH = ("torch fused",)
LEARNING_RATE = 1e-3
BLOCK = 2**20
MOST_MEMORY = 0.5  # of the machine's
MOST_AVAILABLE = 0.85  # of what is free of it


class Contender(Protocol):
    def step(self) -> None: ...

    def extra_bytes(self) -> int | None:
        """Take a step; return its peak memory above what is held, or None where unknown."""


def groups(setting: Setting, device: str) -> list[tuple[str, ...]]:
    """Who is measured, by process, each with a floor of its own.

    A step of mlx.optimizers leaves tens of thousands of freed nodes on the heap, which slow the
    allocations of whoever comes next, and torch's threads spin while they wait for work.
    """
    found: list[tuple[str, ...]] = [FLATSTEP]
    if setting.has_peers:
        found.append(MLX)
        if device == "cpu" and importlib.util.find_spec("torch"):
            found.append(TORCH)
    return found


def bytes_needed(setting: Setting, names: tuple[str, ...]) -> int:
    """An estimate of the most memory that these contenders need, the floor included."""
    parameters = setting.elements * setting.itemsize
    peer = parameters * (1 + setting.slots)
    held = [parameters + setting.state_bytes if name in FLATSTEP else peer for name in names]
    # While it starts, a contender's first parameters are there too; a peer writes all anew.
    transient = max(parameters if name in FLATSTEP else peer for name in names)
    return parameters + sum(held) + transient + min(MAX_BYTES, setting.step_bytes)


def usable_bytes() -> float:
    """Memory that a measurement may take."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform != "linux":
        return MOST_MEMORY * total
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kib,) = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min(MOST_MEMORY * total, MOST_AVAILABLE * 1024 * kib)


def fitting(setting: Setting, names: tuple[str, ...], usable: float) -> list[tuple[str, ...]]:
    """Contenders together if they fit in memory, else one by one, and none that doesn't fit."""
    if bytes_needed(setting, names) <= usable:
        return [names]
    return [(name,) for name in names if bytes_needed(setting, (name,)) <= usable]


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


class MLXContender:
    """flatstep or mlx.optimizers, on MLX's default device."""

    def __init__(
        self, optim: ModuleType, compiled: bool, setting: Setting, parameters: Any, gradients: Any
    ) -> None:
        self._parameters, self._gradients = parameters, gradients
        arguments = {"momentum": 0.9} if setting.rule == "sgd" else {"bias_correction": True}
        make = getattr(optim, RULES[setting.rule][0])
        self._optimizer = make(learning_rate=LEARNING_RATE, **arguments)
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


class TorchContender:
    """torch's fused optimizer, which does not count what it allocates."""

    def __init__(self, setting: Setting) -> None:
        import torch

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setting.dtype]
        arguments = {"momentum": 0.9} if setting.rule == "sgd" else {}
        torch.manual_seed(0)

        def draw(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype).uniform_(-0.05, 0.05)

        parameters = []
        for shape in setting.shapes.values():
            parameter = torch.nn.Parameter(random_values(shape, draw, torch.cat))
            parameter.grad = random_values(shape, draw, torch.cat)
            parameters.append(parameter)
        make = getattr(torch.optim, RULES[setting.rule][0])
        self.step = make(parameters, lr=LEARNING_RATE, fused=True, **arguments).step

    def extra_bytes(self) -> int | None:
        return None


def make_contenders(setting: Setting, names: tuple[str, ...]) -> dict[str, Contender]:
    """Contenders of one group, on the same initial values."""
    if names == TORCH:
        return {name: TorchContender(setting) for name in names}
    parameters, gradients = random_tree(setting, 0), random_tree(setting, 1)
    contenders: dict[str, Contender] = {}
    for name in names:
        library, mode = name.split()
        optim = {"flatstep": flatstep, "mlx": mlx.optimizers}[library]
        contenders[name] = MLXContender(optim, mode == "compiled", setting, parameters, gradients)
    return contenders
