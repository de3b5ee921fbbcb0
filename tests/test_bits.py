"""Every instruction set and every number of threads gives the same bits."""

import os
import subprocess
import sys
from itertools import product
from typing import Any

import flatstep as optim
import mlx.core as mx
import numpy as np
import pytest
from cases import CASES, DTYPES, EXTREME, Case, case_id, random_array
from flatstep import _ext
from mlx.utils import tree_flatten
from numpy.typing import NDArray

SIZES = [0, 1, 2, 3, 7, 8, 9, 15, 17, 31, 33, 63, 64, 65, 127, 1000, 1023, 1025, 4097]
BITS = {4: mx.uint32, 2: mx.uint16}
# What hardware and compilers treat differently: zeros, subnormals, the largest, infinities, NaN.
SPECIAL = np.array(
    [
        *[0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1e-38, 1.2e-38],
        *[6e-8, 6.1e-5, 65504, 3.4e38, np.inf, -np.inf, np.nan, -np.nan],
    ],
    np.float32,
)


pytestmark = pytest.mark.usefixtures("restored_settings")


def any_floats(size: int, dtype: mx.Dtype, rng: np.random.Generator) -> mx.array:
    """Random bits, so values of every exponent, with special values among them."""
    unsigned: Any = np.uint32 if dtype.size == 4 else np.uint16
    values = mx.array(rng.integers(0, 2 ** (8 * dtype.size), size).astype(unsigned)).view(dtype)
    special = mx.array(rng.choice(SPECIAL, size)).astype(dtype)
    return mx.where(mx.array(rng.random(size) < 0.3), special, values)


def comparable(array: mx.array) -> bytes:
    """The bits of an array, with one pattern for every NaN: which one arises is left open."""
    raw: NDArray[Any] = np.array(array.view(BITS[array.dtype.size]))
    raw[np.array(mx.isnan(array))] = 0x7FC0
    return raw.tobytes()


def inputs(dtypes: tuple[mx.Dtype, ...]) -> list[list[mx.array]]:
    """A parameter, a gradient and two state arrays for each size."""
    rng = np.random.default_rng(13)
    return [[any_floats(size, dtype, rng) for dtype in dtypes] for size in SIZES]


def flat_steps(case: Case, rate: Any, arrays: list[list[mx.array]]) -> list[bytes]:
    optimizer = case.make(optim, rate)
    slots = optimizer.rule().num_states
    results = [
        optimizer.flat_update(*given[: 2 + slots], step=97 * i) for i, given in enumerate(arrays)
    ]
    flat = [array for new in results for array in (new.parameter, *new.state, new.learning_rate)]
    mx.eval(flat)
    return [comparable(array) for array in flat]


# Parameter, gradient, state, state: every pair of dtypes meets.
MIXES = [
    (DTYPES[i], DTYPES[j], DTYPES[(i + j) % 3], DTYPES[(i + j) % 3])
    for i, j in product(range(3), range(3))
]


@pytest.mark.parametrize("case", [*CASES, *EXTREME], ids=str)
def test_every_instruction_set_gives_the_same_bits(case: Case) -> None:
    for number, dtypes in enumerate(MIXES):
        rate = optim.cosine_decay(0.1, 2000) if number % 2 else 0.01
        arrays = inputs(dtypes)
        results = {}
        for loops in _ext.available_cpu_loops():
            _ext.set_cpu_loops(loops)
            results[loops] = flat_steps(case, rate, arrays)
        for loops, result in results.items():
            assert result == results["baseline"], (loops, [case_id(d) for d in dtypes])


def large_step(case: Case, dtype: mx.Dtype) -> list[bytes]:
    """Three steps of a tree that is large enough to be shared among threads."""
    rng = np.random.default_rng(17)
    shapes: dict[str, tuple[int, ...]] = {"long": (300_001,), "wide": (257, 513), "three": (3,)}
    params: Any = {name: random_array(shape, rng, dtype) for name, shape in shapes.items()}
    params["many"] = [random_array((n,), rng, dtype) for n in range(1, 2000, 97)]
    gradients: Any = {
        "long": any_floats(300_001, dtype, rng),
        "wide": random_array((513, 257), rng).T,
        "three": random_array((3,), rng, mx.bfloat16),
        "many": [mx.broadcast_to(mx.array(0.5), p.shape) for p in params["many"]],
    }
    optimizer = case.make(optim, optim.linear_schedule(0.1, 0.01, 10))
    for _ in range(3):
        params = optimizer.apply_gradients(gradients, params)
        mx.eval(params, optimizer.state)
    arrays = [*tree_flatten(params), *tree_flatten({"s": [optimizer.state[k] for k in shapes]})]
    return [comparable(array) for _, array in arrays]


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_every_number_of_threads_gives_the_same_bits(case: Case, dtype: mx.Dtype) -> None:
    results = []
    for threads in (1, 2, 3, 7, 16):
        _ext.set_num_threads(threads)
        assert _ext.num_threads() == threads
        results.append(large_step(case, dtype))
    assert all(result == results[0] for result in results)


PRINT_DIGEST = """
import hashlib
from cases import CASES
from flatstep import _ext
from test_bits import large_step, mx
digest = hashlib.sha256(b"".join(large_step(CASES[-1], mx.bfloat16))).hexdigest()
print(_ext.num_threads(), digest)
"""


def test_the_environments_number_of_threads_is_used_and_gives_the_same_bits() -> None:
    digests = set()
    for threads in (1, 5):
        environment = {
            **os.environ,
            "FLATSTEP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        output = subprocess.run(
            [sys.executable, "-c", PRINT_DIGEST],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        number, digest = output.split()
        assert int(number) == threads
        digests.add(digest)
    assert len(digests) == 1
