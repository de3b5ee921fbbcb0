"""How arrays lie in memory, and what the Metal backend's host code makes of it.

Run as on_standin.py is.
"""

from typing import Any

import flatstep as optim
import mlx.core as mx
import numpy as np
import pytest
from cases import random_array
from mlx.utils import tree_flatten
from reference import to_float64
from standin_plugin import StandIn


# Trees whose arrays lie in memory in ways that the host has to notice.
def _sliced(dtype: mx.Dtype, rng: np.random.Generator) -> Any:
    big = random_array((2100,), rng, dtype)
    mx.eval(big)
    sizes = [(1, 1001), (2, 902), (3, 503), (4, 404), (5, 25), (8, 68)]
    gradients = {f"at {first}": big[first:last] for first, last in sizes}
    return gradients, {k: random_array(v.shape, rng) for k, v in gradients.items()}


def _many_dimensions(rng: np.random.Generator) -> Any:
    # No two of the 15 dimensions can be merged; 19 such leaves do not fit one dispatch.
    shape = (2,) * 15
    order = [*range(0, 15, 2), *range(1, 15, 2)]
    gradients = {str(i): random_array(shape, rng).transpose(order) for i in range(19)}
    return gradients, {k: random_array(shape, rng) for k in gradients}


def _transposed_matrices(rng: np.random.Generator) -> Any:
    gradients = {"w": random_array((3, 40, 70), rng).swapaxes(1, 2)}
    return gradients, {"w": random_array((3, 70, 40), rng)}


def _empty(rng: np.random.Generator) -> Any:
    shapes = {"a": (0,), "b": (3, 0), "c": (0, 2)}
    return tuple({k: random_array(s, rng) for k, s in shapes.items()} for _ in range(2))


def _some_empty(rng: np.random.Generator) -> Any:
    shapes = {"a": (0,), "b": (3, 5), "c": (0, 2), "d": (7,)}
    return tuple({k: random_array(s, rng) for k, s in shapes.items()} for _ in range(2))


UNUSUAL_TREES = {
    "slices, float32": lambda rng: _sliced(mx.float32, rng),
    "slices, float16": lambda rng: _sliced(mx.float16, rng),
    "slices, bfloat16": lambda rng: _sliced(mx.bfloat16, rng),
    "several transposed matrices in a leaf": _transposed_matrices,
    "more dimensions than a dispatch describes": _many_dimensions,
    "nothing": _empty,
    "nothing here and there": _some_empty,
}


@pytest.mark.parametrize("tree", UNUSUAL_TREES)
def test_the_host_notices_how_arrays_lie(tree: str, standin: StandIn) -> None:
    gradients, start = UNUSUAL_TREES[tree](np.random.default_rng(12))
    mx.eval(gradients, start)
    results = []
    for on_gpu in (False, True):
        standin.use_gpu(on_gpu)
        optimizer = optim.AdamW(1e-2, bias_correction=True)
        parameters = {k: mx.array(v) for k, v in start.items()}
        for _ in range(3):
            parameters = optimizer.apply_gradients(gradients, parameters)
            mx.eval(parameters, optimizer.state)
        mx.synchronize()
        results.append(tree_flatten((parameters, dict(optimizer.state)), destination={}))
    for name, value in results[0].items():
        np.testing.assert_array_equal(to_float64(value), to_float64(results[1][name]), err_msg=name)


@pytest.mark.parametrize("name", ["p", "m", "v"])
@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_a_flat_array_may_start_anywhere(
    name: str, first: int, dtype: mx.Dtype, standin: StandIn
) -> None:
    results = []
    for on_gpu in (False, True):
        standin.use_gpu(on_gpu)
        rng = np.random.default_rng(13)
        arrays = {k: random_array((1000,), rng, dtype) for k in ("p", "g", "m", "v")}
        arrays["v"] = mx.abs(arrays["v"])
        # Nobody else holds what the slice is a part of.
        arrays[name] = mx.concatenate([mx.zeros(first, dtype), arrays[name]])[first:]
        mx.eval(arrays)
        optimizer = optim.Adam(1e-2)
        flat = optimizer.flat_update(
            arrays.pop("p"), arrays.pop("g"), arrays.pop("m"), arrays.pop("v"), step=3
        )
        mx.eval(flat.parameter, flat.state)
        mx.synchronize()
        results.append([to_float64(a) for a in (flat.parameter, *flat.state)])
    for cpu, gpu in zip(*results, strict=True):
        np.testing.assert_array_equal(cpu, gpu)


def test_dimensions_of_one_element_take_no_room_in_the_tables(standin: StandIn) -> None:
    shape = (2,) * 2 + (1,) * 300
    gradients = {"w": mx.ones(shape)}
    optimizer = optim.SGD(1e-2)
    updated = optimizer.apply_gradients(gradients, {"w": mx.zeros(shape)})
    mx.eval(updated)
    assert updated["w"].shape == shape
