"""Steps over 8-bit state and half-precision parameters, whatever runs them and however they lie."""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from block_reference import (
    BLOCK,
    HALVES,
    Float32,
    chance_codes,
    decode,
    exact_place,
    rounding_keys,
    steps_of,
    unpacked,
)
from cases import case_id
from engine_steps import HYPERPARAMETERS, SIGNS, Engine, Rounding, floats, rule
from flatstep import _ext
from reference import RULES, total

HALF_DTYPES = [half.dtype for half in HALVES.values()]
every_dtype = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=case_id)


pytestmark = pytest.mark.usefixtures("restored_settings")


# ---- However leaves lie ----

Lie = Callable[[mx.array], mx.array]


def transposed(a: mx.array) -> mx.array:
    return mx.contiguous(a.T).T


def sliced(a: mx.array) -> mx.array:
    """Every other column of a wider array."""
    wide = mx.repeat(a, 2, axis=-1)
    return mx.contiguous(wide)[..., ::2]


def as_it_is(a: mx.array) -> mx.array:
    return a


def first_row(a: mx.array) -> mx.array:
    return mx.broadcast_to(a[:1], a.shape)


def first_column(a: mx.array) -> mx.array:
    return mx.broadcast_to(a[:, :1], a.shape)


# Of a leaf the shape, and how its gradient and its parameter lie.
LEAVES: list[tuple[tuple[int, ...], Lie, Lie]] = [
    ((65, 130), transposed, as_it_is),
    ((3, 1030), transposed, as_it_is),
    ((1030, 3), transposed, transposed),
    ((128, 192), transposed, as_it_is),
    ((70, 1088), transposed, as_it_is),
    ((129, 1100), transposed, transposed),
    ((90, 700), transposed, as_it_is),
    ((66, 1030), as_it_is, transposed),
    ((67, 129), sliced, as_it_is),
    ((5, 1031), sliced, sliced),
    ((33, 1027), first_row, as_it_is),
    ((1027, 33), first_column, as_it_is),
    ((2, 3, 517), transposed, as_it_is),
    ((7,), as_it_is, as_it_is),
    ((4097,), sliced, sliced),
    ((), as_it_is, as_it_is),
    ((0, 3), as_it_is, as_it_is),
]


def random_leaves(seed: int, dtypes: list[mx.Dtype], size: float) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    leaves = {}
    for i, (shape, *_) in enumerate(LEAVES):
        values = (rng.normal(size=shape) * size * np.exp(rng.normal(size=shape))).astype(np.float32)
        leaves[str(i)] = mx.array(values).astype(dtypes[i % len(dtypes)])
    return leaves


def lying(leaves: Mapping[str, mx.array], *, are_gradients: bool) -> dict[str, mx.array]:
    result = {}
    for name, leaf in leaves.items():
        _, of_gradient, of_parameter = LEAVES[int(name)]
        result[name] = (of_gradient if are_gradients else of_parameter)(leaf)
    return result


def contiguous(leaves: Mapping[str, mx.array]) -> dict[str, mx.array]:
    return {name: mx.array(floats(a)).astype(a.dtype) for name, a in leaves.items()}


def three_steps(
    engine: Engine, gradients: list[dict[str, mx.array]], *, is_held: bool
) -> list[bytes]:
    """The second brings gradients for a part of the leaves, some of each bucket.

    What is held, as a snapshot holds it, is not written in place.
    """
    part = {name: g for name, g in gradients[1].items() if int(name) % 3}
    held = []
    for given in (gradients[0], part, gradients[2]):
        if is_held:
            held.append((dict(engine.parameters), list(engine.state)))
        engine.step(given)
    return engine.bits()


CONFIGURATIONS = [
    (name, has_codes, rounding)
    for name, has_codes, rounding in product(HYPERPARAMETERS, (False, True), Rounding)
    if has_codes <= bool(SIGNS[name])
]


def configuration_id(value: Any) -> str:
    return value.name.lower() if isinstance(value, Rounding) else case_id(value) or str(value)


@every_dtype
@pytest.mark.parametrize(("name", "has_codes", "rounding"), CONFIGURATIONS, ids=configuration_id)
def test_every_layout_instruction_set_and_number_of_threads_gives_the_same_bits(
    name: str, has_codes: bool, rounding: Rounding, dtype: mx.Dtype
) -> None:
    dtypes = [dtype, mx.float32, *HALF_DTYPES]
    gradients = [lying(random_leaves(seed, dtypes, 0.1), are_gradients=True) for seed in range(3)]
    parameters = random_leaves(9, [dtype], 1.0)
    copies = [contiguous(g) for g in gradients]
    mx.eval(gradients, copies, parameters)

    def run(
        given: list[dict[str, mx.array]], starts: dict[str, mx.array], *, is_held: bool = False
    ) -> list[bytes]:
        # Leaves share a bucket, but not all of them one.
        made = Engine(
            rule(name),
            starts,
            has_codes=has_codes,
            rounding=rounding,
            seed=5,
            bucket_bytes=1 << 19,
        )
        assert len(made.layout.bucket_blocks) > 1
        return three_steps(made, given, is_held=is_held)

    _ext.set_cpu_loops("baseline")
    _ext.set_num_threads(1)
    expected = run(copies, parameters)
    settings = [(loops, 2) for loops in _ext.available_cpu_loops()]
    for loops, threads in [*settings, (_ext.cpu_loops(), 1), (settings[-1][0], 7)]:
        _ext.set_cpu_loops(loops)
        _ext.set_num_threads(threads)
        starts = lying(parameters, are_gradients=False)
        got = run(gradients, starts, is_held=threads == 7)
        assert got == expected, (
            loops,
            threads,
            [a == b for a, b in zip(got, expected, strict=True)],
        )


@pytest.mark.parametrize("rounding", [Rounding.KEEP_8_BITS, Rounding.NEAREST], ids=configuration_id)
def test_float32_state_that_is_not_contiguous_is_read_as_its_copy(rounding: Rounding) -> None:
    rng = np.random.default_rng(8)
    parameters = {"w": mx.array(rng.normal(size=(130, 70)).astype(np.float32)).astype(mx.bfloat16)}
    gradients = {"w": mx.array(rng.normal(size=(130, 70)).astype(np.float32))}
    results = []
    for has_pieces in (False, True):
        engine = Engine(rule("adam"), parameters, rounding=rounding)
        for _ in range(2):
            engine.step(gradients)
            if has_pieces:
                for k in range(2):
                    wide = mx.concatenate([engine.state[k][0]] * 2, axis=1)
                    engine.state[k] = [mx.contiguous(wide)[:, :BLOCK]]
                    tall = mx.contiguous(engine.state[k][0].T)
                    engine.state[k] = [tall.T if k else engine.state[k][0]]
                mx.eval(engine.state)
        engine.step(gradients)
        results.append(engine.bits())
    assert results[0] == results[1]


# ---- What a step over codes computes ----

# A rule's formula in float64, its arguments there, and its state by number.
FORMULAS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "momentum": (
        "SGD",
        {"weight_decay": 0.01, "momentum": 0.9, "dampening": 0.1, "nesterov": True},
        ["v"],
    ),
    "adam": ("AdamW", {"bias_correction": True}, ["m", "v"]),
    "lion": ("Lion", {"weight_decay": 0.01}, ["m"]),
}


def spread(seed: int, size: int = 40 * BLOCK) -> Float32:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=size) * np.exp(2 * rng.normal(size=size)), np.float32)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [mx.float32, *HALF_DTYPES], ids=case_id)
def test_a_step_over_codes_is_one_over_what_they_stand_for(name: str, dtype: mx.Dtype) -> None:
    seed, buckets = 11, 2
    # Two leaves in one bucket, so that an element's number is that in its bucket, and one apart.
    sizes = {"a": 3 * BLOCK, "b": 40 * BLOCK, "c": 40 * BLOCK}
    members = [["a", "b"], ["c"]]
    leaves = {
        leaf: mx.array(spread(i, n)).astype(dtype) for i, (leaf, n) in enumerate(sizes.items())
    }
    bucket_bytes = 45 * BLOCK * dtype.size
    coded = Engine(rule(name), leaves, has_codes=True, seed=seed, bucket_bytes=bucket_bytes)
    exact = Engine(rule(name), leaves, seed=seed, bucket_bytes=bucket_bytes)
    assert coded.layout.bucket_blocks == [43, 40]
    formula, arguments, keys = FORMULAS[name]
    for step in range(4):
        gradients = {
            leaf: mx.array(spread(10 * step + i, n)) for i, (leaf, n) in enumerate(sizes.items())
        }
        before = [
            [decode(coded.codes(k, b), has_sign) for k, has_sign in enumerate(SIGNS[name])]
            for b in range(buckets)
        ]
        exact.parameters = dict(coded.parameters)
        exact.state = [[mx.array(before[b][k]) for b in range(buckets)] for k in range(len(keys))]
        starts = dict(coded.parameters)
        coded.step(gradients)
        exact.step(gradients)
        for leaf in leaves:
            assert mx.array_equal(coded.parameters[leaf], exact.parameters[leaf])
        for b, names in enumerate(members):
            arrays = {
                "p": np.concatenate([floats(starts[leaf]) for leaf in names]),
                "g": np.concatenate([floats(gradients[leaf]) for leaf in names]),
                **{key: old.reshape(-1) for key, old in zip(keys, before[b], strict=True)},
            }
            in_float64 = {key: values.astype(np.float64) for key, values in arrays.items()}
            expected = RULES[formula](in_float64, 1e-3, step + 1, **arguments)
            for k, has_sign in enumerate(SIGNS[name]):
                codes, scales = unpacked(coded.codes(k, b))
                number = np.abs(steps_of(codes)) if has_sign else codes.astype(np.int64)
                values = np.array(exact.state[k][b])
                drawn = np.concatenate(
                    [rounding_keys(sizes[leaf], step, seed, leaf, 1 + k) for leaf in names]
                )
                low, high = chance_codes(values, scales, has_sign, drawn)
                assert ((low <= number) & (number <= high)).all()
                assert (low == high).mean() > 0.999
                if has_sign:
                    np.testing.assert_array_equal(codes > 127, np.signbit(values))
                whole = np.asarray(total(expected[keys[k]])).reshape(values.shape)
                place = exact_place(whole.astype(np.float32), scales, has_sign)
                assert (np.abs(number - place) < 1.001).all()


@every_dtype
@pytest.mark.parametrize("gradient_dtype", [mx.float32, *HALF_DTYPES], ids=case_id)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_step_drops_the_rests_of_blocks_whose_parameters_are_others(
    bits: int, gradient_dtype: mx.Dtype, dtype: mx.Dtype
) -> None:
    rounding = Rounding.KEEP_8_BITS if bits == 8 else Rounding.KEEP_16_BITS
    size, replaced = 5 * BLOCK + 7, [1, 5]
    parameters = {"w": mx.array(spread(1, size)).astype(dtype)}
    gradients = {"w": mx.array(spread(2, size)).astype(gradient_dtype)}
    results = []
    for rests_are_zeroed in (False, True):
        engine = Engine(rule("adam"), parameters, rounding=rounding)
        engine.step(gradients)
        values = floats(engine.parameters["w"])
        values[[BLOCK + 3, size - 1]] *= 2
        engine.parameters = {"w": mx.array(values).astype(dtype)}
        rests = np.array(engine.state[2][0])
        assert rests[:, : BLOCK * bits // 8].any(axis=1).all()
        if rests_are_zeroed:
            rests[replaced] = 0
            engine.state[2] = [mx.array(rests)]
        engine.step(gradients)
        results.append(engine.bits())
    assert results[0] == results[1]
