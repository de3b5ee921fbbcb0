"""What the tests run over: update rules with their arguments, shapes, dtypes, and random trees.

The rules and their arguments are those of the doctor's table, which a new optimizer adds to, and
some that only the tests need.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from flatstep.diagnosis.cases import ADAMW, LEARNING_RATE, RULES, Case
from mlx.utils import tree_flatten, tree_map
from numpy.typing import NDArray

__all__ = ["ADAMW", "LEARNING_RATE", "RULES", "Case"]

# Beside RULES, what each argument does by itself.
MORE = [
    Case("SGD", {"dampening": 0.1}),
    Case("SGD", {"momentum": 0.9}),
    Case("SGD", {"momentum": 0.9, "weight_decay": 0.01}),
    Case("SGD", {"momentum": 0.9, "nesterov": True}),
    Case("Adam", {"bias_correction": True}),
    Case("AdamW", {"weight_decay": 0.0}),
    Case("AdamW", {"weight_decay": 0.0, "bias_correction": True}),
]
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
CASES = [*RULES, *MORE, *UNUSUAL]


def _uses(case: Case) -> int:
    return sum(map(bool, case.arguments.values()))


# Of each rule the case that uses the most of its arguments.
FULLEST = [
    max((case for case in RULES if case.rule == rule), key=_uses)
    for rule in dict.fromkeys(case.rule for case in RULES)
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
