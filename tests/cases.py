"""What the tests run over: update rules with their arguments, shapes, dtypes, and random trees.

A new optimizer is one function in reference.py and its rows here.
"""

from itertools import product
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from numpy.typing import NDArray

# At this rate float32 holds 1 - learning_rate * weight_decay well for the decays below. Elsewhere
# the rounding of that one factor moves MLX's weights by up to 3e-5 in 1,000 steps.
LEARNING_RATE = 2.2e-3

# The arrays that a rule keeps for each parameter.
SLOTS = {"SGD": ("v",), "Adam": ("m", "v"), "AdamW": ("m", "v")}


class Case(NamedTuple):
    """An update rule and the arguments that it is made with."""

    rule: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return "-".join([self.rule, *(f"{k}={v}" for k, v in self.arguments.items())])

    @property
    def slots(self) -> tuple[str, ...]:
        return SLOTS[self.rule]

    def make(self, module: Any, learning_rate: Any = LEARNING_RATE) -> Any:
        """The optimizer from flatstep or from mlx.optimizers."""
        return getattr(module, self.rule)(learning_rate, **self.arguments)


def _sgd() -> list[Case]:
    cases = [
        Case("SGD", {"momentum": momentum, "weight_decay": decay, "dampening": dampening})
        for momentum, decay, dampening in product((0.0, 0.9), (0.0, 0.01), (0.0, 0.1))
    ]
    nesterov = [
        Case("SGD", {"momentum": 0.9, "weight_decay": decay, "nesterov": True})
        for decay in (0.0, 0.01)
    ]
    return cases + nesterov


def _adam() -> list[Case]:
    cases = [Case("Adam", {"bias_correction": correct}) for correct in (False, True)]
    for decay, correct in product((0.0, 0.1), (False, True)):
        cases.append(Case("AdamW", {"weight_decay": decay, "bias_correction": correct}))
    return cases


UNUSUAL = [
    Case("SGD", {"momentum": 0.5, "weight_decay": 0.3, "dampening": 0.7}),
    Case("SGD", {"momentum": 0.0, "weight_decay": 2.0}),
    # Zero in float32, but not to MLX, which keeps a v.
    Case("SGD", {"momentum": 1e-50, "weight_decay": 1e-50}),
    Case("SGD", {"momentum": 1e-50, "nesterov": True}),
    Case("Adam", {"betas": [0.0, 0.0], "eps": 1e-3, "bias_correction": True}),
    Case("Adam", {"betas": [0.0, 0.999], "bias_correction": True}),
    Case("Adam", {"betas": [0.99, 0.9], "eps": 1.0}),
    Case("Adam", {"betas": [0.9, 0.99], "eps": 0.0, "bias_correction": True}),
    Case("Adam", {"betas": (0.3, 0.98), "eps": 1e-15, "bias_correction": True}),
    Case("AdamW", {"betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 5.0}),
    Case("AdamW", {"betas": [0.95, 0.98], "eps": 1e-5, "bias_correction": True}),
]
CASES = [*_sgd(), *_adam(), *UNUSUAL]


def _uses(case: Case) -> int:
    return sum(map(bool, case.arguments.values()))


# For what takes long: of each rule the case that uses the most of its arguments.
FULLEST = [
    max((case for case in CASES if case.rule == rule and case not in UNUSUAL), key=_uses)
    for rule in SLOTS
]

# Betas so close to 1 that MLX's float32 can't follow float64: only for the reference.
EXTREME = [
    Case("Adam", {"betas": [0.9999999, 0.99999999], "bias_correction": True}),
    Case("AdamW", {"betas": [0.999, 0.99999], "bias_correction": True}),
    Case("SGD", {"momentum": 0.99999999, "dampening": 0.99999999}),
]

SHAPES = [(1,), (3,), (63,), (64,), (65,), (4097,), (5, 7), (), (2, 3, 4)]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def case_id(value: Any) -> str | None:
    """A readable name for a parametrized case, dtype or schedule."""
    if isinstance(value, mx.Dtype):
        return str(value).removeprefix("mlx.core.")
    return str(value) if isinstance(value, Case | tuple) else None


def random_shapes(shapes: list[tuple[int, ...]] = SHAPES) -> dict[str, Any]:
    """A tree with these shapes as leaves, some of them deeper in it."""
    half = len(shapes) // 2
    return {"first": list(shapes[:half]), "second": {"deep": list(shapes[half:])}}


def random_values(
    shape: int | tuple[int, ...],
    rng: np.random.Generator,
    exponents: tuple[float, float] = (-3, 1),
) -> NDArray[np.float64]:
    """Values of either sign over orders of magnitude, so that either term of a sum leads."""
    magnitude: NDArray[np.float64] = 10.0 ** rng.uniform(*exponents, shape)
    return magnitude * rng.choice([-1.0, 1.0], shape)


def random_array(
    shape: tuple[int, ...],
    rng: np.random.Generator,
    dtype: mx.Dtype = mx.float32,
    exponents: tuple[float, float] = (-3, 1),
) -> mx.array:
    return mx.array(np.asarray(random_values(shape, rng, exponents), np.float32), dtype)


def random_tree(shapes: Any, rng: np.random.Generator, dtype: mx.Dtype = mx.float32) -> Any:
    return tree_map(
        lambda shape: random_array(shape, rng, dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def leaves(tree: Any) -> dict[str, mx.array]:
    """The leaves of a tree by their paths, in its order."""
    flat: Any = tree_flatten(tree, destination={})
    return flat
