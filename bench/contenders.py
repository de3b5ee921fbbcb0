"""Who is measured beside flatstep and mlx.optimizers: torch and optax.

Peers store the state in the dtype of the parameters: with bfloat16 they move fewer bytes than the
floor and flatstep do, at the price of a `v` that can't decay.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from flatstep.benchmark import contenders as package
from flatstep.benchmark.cases import RULES, Setting
from flatstep.benchmark.contenders import LEARNING_RATE, Contender, random_values

from .memory import resident_bytes_above

# By process, each with a floor of its own. torch's and XLA's threads spin while they wait for work,
# and two pools that spin in one process spoil each other's figures.
GROUPS = package.GROUPS | {
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


def make_contenders(setting: Setting, names: tuple[str, ...]) -> dict[str, Contender]:
    """Contenders of one group, on the same initial values."""
    make: dict[str, Callable[[Setting, tuple[str, ...]], dict[str, Contender]]] = {
        "torch": _make_torch,
        "optax": _make_optax,
    }
    return make.get(group_of(names[0]), package.make_contenders)(setting, names)


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
