"""What is evaluated already is no input of an update's node, each operand by itself."""

import io
import re
from collections.abc import Callable
from typing import Any

import flatstep as optim
import mlx.core as mx
import numpy as np
import pytest
from cases import DTYPES, case_id, random_array
from flatstep import _ext
from models import assert_trees_equal

SHAPES = {"a": (100,), "b": (3, 4), "empty": (0, 2), "c": (65, 70)}


def new_tree(seed: int, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    tree = {name: random_array(shape, rng, dtype) for name, shape in SHAPES.items()}
    mx.eval(tree)
    return tree


def trained(
    learning_rate: Any, steps: int = 2, dtype: mx.Dtype = mx.float32
) -> tuple[Any, dict[str, mx.array]]:
    optimizer, parameters = optim.AdamW(learning_rate), new_tree(0, dtype)
    for seed in range(steps):
        parameters = optimizer.apply_gradients(new_tree(seed, dtype), parameters)
        mx.eval(parameters, optimizer.state)
    return optimizer, parameters


def inputs_of_update(parameters: dict[str, mx.array]) -> int:
    """How many inputs the one update has that gives these parameters."""
    text = io.StringIO()
    mx.export_to_dot(text, *parameters.values())
    graph = text.getvalue()
    (node,) = re.findall(r'(\d+) \[label ="FlatstepUpdate"', graph)
    return len(re.findall(rf'^"\w+" -> {node}$', graph, re.MULTILINE))


def lazy(gradients: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name: 2.0 * gradient for name, gradient in gradients.items()}


def rate_of(step: mx.array) -> mx.array:
    return 1e-3 / (1.0 + step)


@pytest.mark.parametrize(
    ("learning_rate", "make_gradients", "inputs"),
    [
        (1e-3, dict, 0),
        (optim.cosine_decay(1e-3, 10), dict, 0),
        (rate_of, dict, 0),
        (1e-3, lazy, len(SHAPES)),
        (rate_of, lazy, len(SHAPES)),
    ],
    ids=["constant", "schedule", "callable", "lazy gradients", "callable, lazy gradients"],
)
def test_only_constants_and_what_is_not_evaluated_are_inputs(
    learning_rate: Any, make_gradients: Callable[[Any], Any], inputs: int
) -> None:
    optimizer, parameters = trained(learning_rate)
    updated = optimizer.apply_gradients(make_gradients(new_tree(2)), parameters)
    assert inputs_of_update(updated) == 1 + inputs


def in_one_buffer(optimizer: Any, leaves: dict[str, mx.array]) -> dict[str, mx.array]:
    """The same values as views of one buffer, where the optimizer has its parameters."""
    layout, dtype = optimizer.layout, leaves["a"].dtype
    blocks = -(-max(s.offset + s.size for s in layout) // 64)
    flat = mx.zeros((blocks * 64,), dtype)
    for leaf, s in zip(leaves.values(), layout, strict=True):
        flat = flat.at[s.offset : s.offset + s.size].add(leaf.reshape(-1))
    flat = flat.reshape(blocks, 64)
    mx.eval(flat)
    views = [mx.as_strided(flat, list(s.shape), offset=s.offset) for s in layout]
    mx.eval(views)
    return dict(zip(leaves, views, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("gradient_dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("has_two_dtypes", [False, True], ids=["one dtype", "two dtypes"])
def test_gradients_in_one_buffer_are_what_they_are_apart(
    dtype: mx.Dtype, gradient_dtype: mx.Dtype, has_two_dtypes: bool
) -> None:
    results = []
    for are_flat in (False, True):
        optimizer, parameters = trained(1e-3, dtype=dtype)
        gradients = in_one_buffer(optimizer, new_tree(5, gradient_dtype))
        if has_two_dtypes and gradient_dtype != mx.float32:
            other = mx.bfloat16 if gradient_dtype == mx.float16 else mx.float16
            gradients["c"] = gradients["c"].view(other)
            mx.eval(gradients)
        else:
            assert dtype != gradient_dtype or optimizer.is_flat(gradients)
        if not are_flat:
            gradients = {name: gradient * 1 for name, gradient in gradients.items()}
            mx.eval(gradients)
        before = _ext.reuse_counters()["state_in_place"]
        updated = optimizer.apply_gradients(gradients, parameters)
        mx.eval(updated, optimizer.state)
        results.append({"parameters": updated, "state": dict(optimizer.state)})
        assert _ext.reuse_counters()["state_in_place"] == before + 2
    assert_trees_equal(*results)
