"""Who is measured: each contender holds its own parameters and state, and takes a step when asked.

A step is what a training loop pays once the gradients are there: new parameters and state from
given gradients, evaluated, the old ones let go. All start from random values of the case's shapes.

Peers store the state in the dtype of the parameters: with bfloat16 they move fewer bytes than the
floor and flatstep do, at the price of a `v` that can't decay.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

from .cases import ITEMSIZE, RULES, Setting, Shape
from .floor import MAX_BYTES
from .memory import resident_bytes_above

FLATSTEP = ("flatstep eager", "flatstep compiled")
# By process, each with a floor of its own. torch's and XLA's threads spin while they wait for work,
# and two pools that spin in one process spoil each other's figures. A step of mlx.optimizers leaves
# tens of thousands of freed nodes on the heap, which slow the allocations of whoever comes next.
GROUPS = {
    "flatstep": FLATSTEP,
    "mlx": ("mlx eager", "mlx compiled"),
    "torch": ("torch fused", "torch foreach"),
    "optax": ("optax jit",),
}
SPINNING = ("torch", "optax")
MODULES = {
    "flatstep": ("flatstep",),
    "mlx": ("flatstep",),
    "torch": ("torch",),
    "optax": ("jax", "optax"),
}
LEARNING_RATE = 1e-3
BLOCK = 2**20


class Contender(Protocol):
    def step(self) -> None: ...

    def extra_bytes(self) -> int | None:
        """Take a step; return its peak memory above what is held, or None where unknown."""


def group_of(name: str) -> str:
    return next(group for group, names in GROUPS.items() if name in names)


def groups_for(setting: Setting) -> list[str]:
    """The groups that are installed; XLA's threads can't be counted out."""
    return [
        group
        for group, modules in MODULES.items()
        if all(map(importlib.util.find_spec, modules))
        and not (group == "optax" and setting.threads is not None)
    ]


def bytes_needed(setting: Setting, names: tuple[str, ...]) -> int:
    """An estimate of the most memory that these contenders need, the floor included."""
    item, elements = ITEMSIZE[setting.dtype], setting.elements
    peer = elements * item * (1 + setting.slots)
    held = [elements * item + setting.state_bytes if name in FLATSTEP else peer for name in names]
    # While it starts, a contender's first parameters are there too; a peer writes all anew.
    transient = max(elements * item if name in FLATSTEP else peer for name in names)
    return elements * item + sum(held) + transient + min(MAX_BYTES, setting.step_bytes)


def make_contenders(setting: Setting, names: tuple[str, ...]) -> dict[str, Contender]:
    """Contenders of one group, on the same initial values."""
    make: dict[str, Callable[[Setting, tuple[str, ...]], dict[str, Contender]]] = {
        "flatstep": _make_mlx,
        "mlx": _make_mlx,
        "torch": _make_torch,
        "optax": _make_optax,
    }
    return make[group_of(names[0])](setting, names)


def random_values(
    shape: Shape, draw: Callable[[int], Any], concatenate: Callable[[list[Any]], Any]
) -> Any:
    """Values that repeat after 2^20: to draw a billion would take longer than to measure."""
    whole, rest = divmod(math.prod(shape), BLOCK)
    if whole == 0:
        return draw(rest).reshape(shape)
    block = draw(BLOCK)
    return concatenate([block] * whole + [block[:rest]]).reshape(shape)


def rule_arguments(setting: Setting) -> dict[str, Any]:
    return {"momentum": 0.9} if setting.rule == "sgd" else {"bias_correction": True}


# flatstep and mlx.optimizers


class MLXContender:
    def __init__(
        self, optim: ModuleType, compiled: bool, setting: Setting, parameters: Any, gradients: Any
    ) -> None:
        import mlx.core as mx

        self._mx = mx
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
        self._mx.eval(self._parameters, self._optimizer.state)

    def extra_bytes(self) -> int | None:
        self._mx.reset_peak_memory()
        held = self._mx.get_active_memory()
        self.step()
        return self._mx.get_peak_memory() - held


def _make_mlx(setting: Setting, names: tuple[str, ...]) -> dict[str, Contender]:
    import flatstep
    import mlx.core as mx
    import mlx.optimizers
    from mlx.utils import tree_unflatten

    dtype = {"fp32": mx.float32, "bf16": mx.bfloat16}[setting.dtype]

    def draw(size: int) -> mx.array:
        return mx.random.uniform(-0.05, 0.05, (size,), dtype)

    def random_tree(seed: int) -> Any:
        mx.random.seed(seed)
        tree = tree_unflatten(
            [
                (path, random_values(shape, draw, mx.concatenate))
                for path, shape in setting.shapes.items()
            ]
        )
        mx.eval(tree)
        return tree

    parameters, gradients = random_tree(0), random_tree(1)
    contenders: dict[str, Contender] = {}
    for name in names:
        library, mode = name.split()
        optim = {"flatstep": flatstep, "mlx": mlx.optimizers}[library]
        contenders[name] = MLXContender(optim, mode == "compiled", setting, parameters, gradients)
    return contenders


# torch


class TorchContender:
    def __init__(self, optimizer: Any) -> None:
        self.step = optimizer.step

    def extra_bytes(self) -> int | None:
        return resident_bytes_above(self.step)


def _make_torch(setting: Setting, names: tuple[str, ...]) -> dict[str, Contender]:
    import torch

    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setting.dtype]
    arguments = {"momentum": 0.9} if setting.rule == "sgd" else {}
    make = getattr(torch.optim, RULES[setting.rule].label)
    torch.manual_seed(0)

    def draw(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype).uniform_(-0.05, 0.05)

    def random_tensors() -> list[torch.Tensor]:
        return [random_values(shape, draw, torch.cat) for shape in setting.shapes.values()]

    gradients = random_tensors()
    contenders: dict[str, Contender] = {}
    for name in names:
        parameters = [torch.nn.Parameter(values) for values in random_tensors()]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        mode = name.split()[1]
        contenders[name] = TorchContender(
            make(parameters, lr=LEARNING_RATE, **arguments, **{mode: True})
        )
    return contenders


# optax


class OptaxContender:
    def __init__(self, jax: Any, optax: Any, rule: Any, parameters: Any, gradients: Any) -> None:
        def update(gradients: Any, state: Any, parameters: Any) -> Any:
            updates, state = rule.update(gradients, state, parameters)
            return optax.apply_updates(parameters, updates), state

        self._jax = jax
        self._parameters, self._gradients = parameters, gradients
        self._state = rule.init(parameters)
        self._update = jax.jit(update, donate_argnums=(1, 2))

    def step(self) -> None:
        self._parameters, self._state = self._update(self._gradients, self._state, self._parameters)
        self._jax.block_until_ready((self._parameters, self._state))

    def extra_bytes(self) -> int | None:
        return resident_bytes_above(self.step)


def _make_optax(setting: Setting, names: tuple[str, ...]) -> dict[str, Contender]:
    jax: Any = importlib.import_module("jax")
    optax: Any = importlib.import_module("optax")
    dtype = {"fp32": jax.numpy.float32, "bf16": jax.numpy.bfloat16}[setting.dtype]

    def random_tree(seed: int) -> Any:
        def draw(size: int) -> Any:
            return jax.random.uniform(jax.random.key(seed), (size,), dtype, -0.05, 0.05)

        return {
            path: random_values(shape, draw, jax.numpy.concatenate)
            for path, shape in setting.shapes.items()
        }

    arguments = {"momentum": 0.9} if setting.rule == "sgd" else {}
    arguments |= {"weight_decay": 0.01} if setting.rule == "adamw" else {}  # as in MLX and torch
    rule = getattr(optax, setting.rule)(LEARNING_RATE, **arguments)
    return {
        name: OptaxContender(jax, optax, rule, random_tree(0), random_tree(1)) for name in names
    }
