"""What is easily passed by mistake: the message says what came and what is allowed."""

import math
from functools import partial
from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.nn as nn
import pytest
from cases import Case
from models import batch, every_rule, loss, new_model
from shadow import fails


class Customised(optim.SGD):
    """Goes through MLX's loop."""

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        return super().apply_single(gradient, parameter, state)


@every_rule
@pytest.mark.parametrize("initialised", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_is_not_part_of_the_gradients(
    case: Case, initialised: bool, compiled: bool
) -> None:
    optimizer, model = case.make(optim), new_model()
    if initialised:
        optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def step(x: mx.array) -> None:
        optimizer.update(model, nn.value_and_grad(model, loss)(model, x))

    if compiled:
        step = partial(mx.compile, inputs=state, outputs=state)(step)
    fails(lambda: step(batch(0)), TypeError, "a tuple", "(loss, gradients)", "pass the second")
    assert compiled or optimizer.step.item() == 0


NO_TREES: list[tuple[Any, str]] = [(None, "None"), (3, "an int"), (mx.ones(3), "an array")]
NO_TREES += [([mx.ones(3)], "a list"), (({"w": mx.ones(3)},), "a tuple"), ("w", "a str")]


@pytest.mark.parametrize(("value", "kind"), NO_TREES, ids=[kind for _, kind in NO_TREES])
@pytest.mark.parametrize("make", [optim.SGD, optim.AdamW, Customised])
def test_what_is_no_tree_is_named(make: Any, value: Any, kind: str) -> None:
    tree = {"w": mx.ones(3)}
    fresh, used = make(0.1), make(0.1)
    used.apply_gradients(tree, tree)
    for optimizer in (fresh, used):
        message = f"should be a dict (or an mlx.nn.Module), {kind} was provided"
        calls: list[tuple[str, Any]] = [
            ("gradients", partial(optimizer.apply_gradients, value, tree)),
            ("gradients", partial(mx.compile(optimizer.apply_gradients), value, tree)),
            ("parameters", partial(optimizer.apply_gradients, tree, value)),
            ("parameters", partial(optimizer.init, value)),
            ("parameters", partial(optimizer.is_flat, value)),
        ]
        for name, call in calls:
            fails(call, TypeError, f"{name} {message}")


def test_a_leaf_that_is_no_array_is_named_by_is_flat_and_by_a_customised_step() -> None:
    tree = {"deep": [mx.ones(3)]}
    optimizer = optim.SGD(0.1)
    for _ in range(2):
        fails(lambda: optimizer.is_flat({"deep": [None]}), TypeError, "deep.0", "array", "None")
        optimizer.init(tree)
    assert optimizer.is_flat(optimizer.apply_gradients(tree, tree))
    bad = {"deep": [3]}
    fails(lambda: Customised(0.1).apply_gradients(bad, tree), TypeError, "array", "3")
    fails(lambda: Customised(0.1).apply_gradients(tree, bad), TypeError, "array", "3")


@pytest.mark.parametrize("make", [optim.SGD, Customised])
@pytest.mark.parametrize(
    ("state", "exception", "parts"),
    [
        ({}, ValueError, ("'step' and 'learning_rate'", "set to {}")),
        ({"step": 3}, ValueError, ("'learning_rate'", "set to a dict of 'step'")),
        ([], TypeError, ("should be a dict", "set to a list")),
        (None, TypeError, ("should be a dict", "set to None")),
    ],
    ids=str,
)
def test_a_state_that_is_none_says_what_it_was_set_to(
    make: Any, state: Any, exception: type[Exception], parts: tuple[str, ...]
) -> None:
    tree = {"w": mx.ones(3)}
    optimizer = make(0.1)
    optimizer.state = state
    for call in (partial(optimizer.apply_gradients, tree, tree), partial(optimizer.init, tree)):
        fails(call, exception, "optimizer.state", *parts)


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("linear_schedule", (1e39, 0.1, 5), ("init", "1e+39")),
        ("linear_schedule", (0.1, -math.inf, 5), ("end", "-inf")),
        ("linear_schedule", (-3e38, 3e38, 5), ("end - init", "6e+38")),
        ("cosine_decay", (mx.array(math.nan), 5), ("init", "nan")),
        ("cosine_decay", (0.1, 5, 1e39), ("end", "1e+39")),
        ("cosine_decay", (3e38, 5, -3e38), ("end - init", "-6e+38")),
        ("exponential_decay", (math.inf, 0.9), ("init", "inf")),
        ("exponential_decay", (0.1, 10**400), ("decay_rate", "inf")),
        ("step_decay", (0.1, 1e39, 5), ("decay_rate", "1e+39")),
        ("step_decay", (math.inf, 0.9, 5), ("init", "inf")),
    ],
)
def test_a_rate_that_float32_has_not_is_named(
    name: str, arguments: tuple[Any, ...], parts: tuple[str, ...]
) -> None:
    make = getattr(optim, name)
    fails(lambda: make(*arguments), ValueError, f"{name}: ", "finite in float32", *parts)
