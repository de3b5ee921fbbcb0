"""Every two of what a step does besides its rule, with every rule, against float64."""

from itertools import combinations, product
from typing import Any

import flatstep as optim
import mlx.core as mx
import numpy as np
import pytest
from cases import FULLEST, Case, random_tree
from mlx.utils import tree_map
from pass_reference import Parameters, PassReference, Training

SHAPES = {"w": (65, 70), "b": (70,), "deep": [{"weight": (64, 3)}, {"scale": ()}]}
# What is other in a group.
OTHERS: dict[str, dict[str, Any]] = {
    "SGD": {"weight_decay": 0.3, "momentum": 0.0},
    "Adam": {"betas": (0.5, 0.7), "eps": 1e-2},
    "AdamW": {"weight_decay": 0.3},
    "Lion": {"betas": (0.5, 0.7), "weight_decay": 0.0},
}
GROUPS = [
    Parameters("deep.*", ("cosine_decay", 3e-3, 5, 1e-4), 0.5),
    Parameters(lambda path, p: p.ndim < 2, 4e-3),
]
FROZEN = [Parameters("b", frozen=True), Parameters("deep.1.*", scale=3.0)]
# What each is made with. Its own are what the two of a pair don't share.
FEATURES: dict[str, dict[str, Any]] = {
    "max_grad_norm": {"max_grad_norm": 0.5},
    "clip_value": {"clip_value": 0.3},
    "skip_nonfinite": {"skip_nonfinite": True},
    "grad_scale": {"grad_scale": 0.3},
    "DynamicLossScale": {"grad_scale": optim.DynamicLossScale(4.0, growth_interval=2)},
    "accumulate": {"accumulate_dtype": mx.bfloat16},
    "accumulate_steps": {"accumulate_steps": 2},
    "ema": {"ema": 0.9},
    "ema_every": {"ema": 0.9, "ema_start": 1, "ema_every": 2, "ema_dtype": mx.bfloat16},
    "groups": {"groups": GROUPS},
    "frozen": {"groups": FROZEN},
    "schedule": {"rate": ("linear_schedule", 1e-3, 3e-3, 4)},
}
# One argument at a time.
EXCLUDED = [{"grad_scale", "DynamicLossScale"}, {"ema", "ema_every"}, {"groups", "frozen"}]
PAIRS = [pair for pair in combinations(FEATURES, 2) if set(pair) not in EXCLUDED]
# Dtypes of parameters and gradients, and how they and the state are stored.
STORAGES: list[tuple[mx.Dtype, mx.Dtype, dict[str, Any]]] = [
    (mx.float32, mx.float32, {}),
    (mx.bfloat16, mx.bfloat16, {}),
    (mx.float32, mx.bfloat16, {"state_dtype": mx.int8}),
    (mx.bfloat16, mx.float32, {"master_weight_bits": 24, "state_dtype": mx.int8}),
    (mx.float16, mx.float16, {"master_weight_bits": 32}),
    (mx.bfloat16, mx.float32, {"stochastic_rounding": True, "state_dtype": mx.bfloat16}),
]
# Each pair and rule with one of the storages; over all of them, every storage with every pair.
ROWS = [
    (pair, case, (i + 2 * k) % len(STORAGES))
    for (i, pair), (k, case) in product(enumerate(PAIRS), enumerate(FULLEST))
]


def train(names: tuple[str, ...], case: Case, storage: int, compiled: bool) -> None:
    of_parameters, of_gradients, stored = STORAGES[storage]
    options: dict[str, Any] = {}
    for name in names:
        options |= FEATURES[name]
    if "groups" in names:
        options["groups"] = [GROUPS[0]._replace(arguments=OTHERS[case.rule]), GROUPS[1]]
    if {"accumulate", "accumulate_steps"} <= set(names):
        options["accumulate_dtype"] = mx.float32  # chance would decide between two calls
    rng = np.random.default_rng(len(str(case)) + storage)
    training = Training(
        PassReference(case, **options),
        random_tree(SHAPES, rng, of_parameters),
        compiled,
        **stored,
    )
    skips = {"skip_nonfinite", "DynamicLossScale"} & set(names)
    for step in range(4):
        gradients = random_tree(SHAPES, rng, of_gradients)
        if step == 2 and skips:
            gradients["w"] = mx.where(mx.arange(70) == 69, float("nan"), gradients["w"])
        if "accumulate" in names:
            training.accumulate(tree_map(lambda g: 0.5 * g, gradients))
        if "accumulate" in names and "accumulate_steps" not in names:
            training.accumulate(gradients)
            training.update()
        else:
            training.update(gradients)
    steps = 2 if "accumulate_steps" in names and "accumulate" not in names else 4
    assert training.optimizer.step.item() == steps - bool(skips)


def names_of(value: Any) -> str:
    if isinstance(value, Case):
        return value.rule
    return " and ".join(value) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("pair", "case", "storage"), ROWS, ids=names_of)
def test_every_pair_is_near_float64(pair: tuple[str, str], case: Case, storage: int) -> None:
    train(pair, case, storage, compiled=storage % 2 == 1)


EVERYTHING = tuple(name for name in FEATURES if name not in ("grad_scale", "ema", "frozen"))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("storage", range(len(STORAGES)))
@pytest.mark.parametrize("case", FULLEST, ids=lambda case: case.rule)
def test_everything_at_once_is_near_float64(case: Case, storage: int, compiled: bool) -> None:
    for other in ("accumulate", "accumulate_steps"):
        train(tuple(name for name in EVERYTHING if name != other), case, storage, compiled)
