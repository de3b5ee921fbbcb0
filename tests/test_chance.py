"""What is rounded by chance is right in the mean, and chance differs wherever it should."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from block_reference import BLOCK, HALVES, Float64, Half, decode, random_bits, rounding_keys
from engine_steps import SIGNS, Engine, Rounding, floats, one_leaf, rule
from flatstep import _ext
from reference import relative_distance

SIZE, STEPS = 1 << 14, 64  # a million draws
every_half = pytest.mark.parametrize("name", HALVES)
PLAIN = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": 0.0}
# Rules whose state is the gradient, or the gradient and its square.
FORGETFUL = {"momentum": PLAIN, "adam": {"beta1": 0.0, "beta2": 0.0}}


def assert_unbiased(draws: Float64, exact: float, step: float) -> None:
    """Draws, one row each time, of a value between two that are a step apart."""
    position = (exact - draws.min()) / step
    part = position - np.floor(position)
    deviation = step * (part * (1 - part)) ** 0.5
    n = draws.size
    assert abs(draws.mean() - exact) <= 4 * deviation / n**0.5 + 1e-9 * step
    # Each element by itself too, not only all together. In a step the elements' numbers depend on
    # each other: what they are off by in the mean is 1, but for 0.7.
    z = (draws.mean(axis=0) - exact) / (deviation / len(draws) ** 0.5)
    assert np.mean(z**2) < 4
    if min(part, 1 - part) * len(draws) > 5:
        assert np.abs(z).max() < 6.5


def steps_between(draws: Float64) -> float:
    """How far apart the two values are that are drawn."""
    values = np.unique(draws)
    assert len(values) == 2, values
    return float(values[1] - values[0])


def coded_states(rule_name: str, gradient: Any, seed: int = 0, first: int = 0) -> Engine:
    """After one step from nothing."""
    made = Engine(
        rule(rule_name, **FORGETFUL[rule_name]),
        one_leaf(np.zeros(len(gradient))),
        has_codes=True,
        seed=seed,
    )
    made.steps_taken = first
    made.step(one_leaf(gradient))
    return made


# The largest of a block is 1; of squares, what lies half a scale or more above zero.
RELATIVE = {
    "momentum": [0.0007, 0.0031, 0.0109, 0.093, 0.241, 0.61, 0.949],
    "adam": [0.0031, 0.0047, 0.0109, 0.093, 0.241, 0.61, 0.951],
}


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e15])
@pytest.mark.parametrize(
    ("rule_name", "relative"), [(name, x) for name in RELATIVE for x in RELATIVE[name]]
)
def test_codes_are_unbiased(rule_name: str, relative: float, scale: float) -> None:
    k = len(SIGNS[rule_name]) - 1
    gradient = np.full(SIZE, -relative * scale, np.float32)
    gradient[::BLOCK] = scale
    drawn = [
        decode(coded_states(rule_name, gradient, first=t).codes(k), SIGNS[rule_name][k])
        for t in range(STEPS)
    ]
    draws = np.delete(np.array(drawn, np.float64), 0, axis=2).reshape(STEPS, -1)
    exact = np.float32(gradient[1]) if k == 0 else np.float32(gradient[1]) ** 2
    assert_unbiased(draws, float(exact), steps_between(draws))


# Of a parameter, and how much of the distance to the next number below it is taken away.
STARTS = {"one": 1.0, "small": -0.001953125, "large": 320.0, "least": 2.0**-22}
PARTS = [0.004, 0.25, 0.5, 0.83]


def drawn_parameters(
    half: Half, start: float, update: float, seed: int = 0, steps: int = STEPS
) -> Float64:
    draws = []
    for t in range(steps):
        made = Engine(
            rule("sgd", weight_decay=0.0),
            one_leaf(np.full(SIZE, start), half.dtype),
            rounding=Rounding.STOCHASTIC,
            seed=seed,
        )
        made.steps_taken = t
        made.step(one_leaf(np.full(SIZE, update)), 1.0)
        draws.append(floats(made.parameters["w"]).astype(np.float64))
    return np.array(draws)


@every_half
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("part", PARTS)
def test_stochastic_parameters_are_unbiased(name: str, start: str, part: float) -> None:
    half, p = HALVES[name], STARTS[start]
    spacing = float(half.spacing(np.array(abs(p))))
    update = np.float32(-np.sign(p) * part * spacing)
    exact = float(np.float32(p) - update)
    draws = drawn_parameters(half, p, float(update))
    assert_unbiased(draws, exact, steps_between(draws))
    # And each is the one that its own random number says.
    keys = rounding_keys(SIZE, 5, 0, "w", 0)
    beyond = (exact - p) / np.sign(p) / spacing
    is_further = np.floor(beyond * 2**16) + (random_bits(keys) >> 16) >= 2**16
    np.testing.assert_array_equal(np.abs(draws[5]) > abs(p), is_further)


def up_or_down(*, seed: int = 0, step: int = 0, leaf: int = 0, array: int = 0) -> Any:
    """Whether each element is rounded up, of those half-way between two."""
    if array == 0:
        made = Engine(
            rule("sgd", weight_decay=0.0),
            {str(b): one_leaf(np.ones(SIZE), mx.bfloat16)["w"] for b in range(3)},
            rounding=Rounding.STOCHASTIC,
            seed=seed,
            bucket_bytes=1,
        )
        given = {str(b): mx.full((SIZE,), -(2.0**-8)) for b in range(3)}
        made.steps_taken = step
        made.step(given, 1.0)
        return floats(made.parameters[str(leaf)]) > 1
    made = Engine(
        rule("adam", beta1=0.0, beta2=0.0),
        {str(b): mx.zeros((SIZE,)) for b in range(3)},
        has_codes=True,
        seed=seed,
        bucket_bytes=1,
    )
    gradient = np.full(SIZE, 0.3955, np.float32)  # half-way between codes, and so is its square
    gradient[::BLOCK] = 1
    made.steps_taken = step
    made.step({str(b): mx.array(gradient) for b in range(3)})
    codes = made.codes(array - 1, leaf)[:, 1:BLOCK]
    assert len(np.unique(codes)) == 2
    return codes == codes.max()


def agreement(a: Any, b: Any) -> float:
    return float(np.mean(a == b))


WHERE: dict[str, dict[str, int]] = {
    "here": {},
    "next step": {"step": 1},
    "much later": {"step": 2**32 - 1},
    "next seed": {"seed": 1},
    "another seed": {"seed": 2**32 - 1},
    "next leaf": {"leaf": 1},
    "the leaf after it": {"leaf": 2},
    "next step and leaf": {"step": 1, "leaf": 1},
}


@pytest.mark.parametrize("array", [0, 1, 2])
def test_chance_differs_between_steps_seeds_and_leaves_and_not_between_runs(array: int) -> None:
    drawn = {where: up_or_down(array=array, **values) for where, values in WHERE.items()}
    for where, values in WHERE.items():
        np.testing.assert_array_equal(up_or_down(array=array, **values), drawn[where])
        assert 0.3 < drawn[where].mean() < 0.7
        for other in WHERE:
            if other != where:
                # Two sequences of equal steps agree in anything between none and all.
                assert agreement(drawn[where], drawn[other]) < 0.999, (where, other)


def test_chance_differs_between_the_arrays_of_a_step() -> None:
    m, v = up_or_down(array=1), up_or_down(array=2)
    assert agreement(m, v) < 0.95


def test_neighbours_are_rounded_independently() -> None:
    ups = np.array([up_or_down(step=t) for t in range(16)], np.float64) - 0.5
    for distance in (1, 2, 3, 5, 8, 13, 64, 128):
        correlation = np.mean(ups[:, distance:] * ups[:, :-distance]) * 4
        assert abs(correlation) < 4 / ups.size**0.5, distance


# ---- Small steps over a long time ----


def distance_from_float32(
    half: Half, rounding: Rounding, relative: float, steps: int, size: int = 1024
) -> tuple[float, float]:
    """How far parameters that move so much a step end from float32, and how far that moved."""
    rng = np.random.default_rng(12)
    starts = np.asarray(rng.uniform(0.5, 2, size), np.float32)
    leaf = one_leaf(starts, half.dtype)
    plain = rule("sgd", weight_decay=0.0)
    exact = Engine(plain, {"w": leaf["w"].astype(mx.float32)})
    stored = Engine(plain, leaf, rounding=rounding)
    begin = floats(leaf["w"]).astype(np.float64)
    draws = mx.array(
        rng.uniform(0.5, 1.5, (64, size)).astype(np.float32) * begin.astype(np.float32)
    )
    gradients = [draws[i] for i in range(64)]
    mx.eval(gradients)
    for t in range(steps):
        for engine in (exact, stored):
            engine.step({"w": gradients[t % 64]}, relative)
    expected = floats(exact.parameters["w"]).astype(np.float64)
    got = floats(stored.parameters["w"])
    if stored.state:
        in_blocks = stored.parameters["w"].reshape(-1, BLOCK)
        got = np.array(_ext.load_split(in_blocks, stored.state[0][0], rounding)).reshape(-1)
    moved = relative_distance(expected, begin)
    return relative_distance(got.astype(np.float64), expected, start=begin), moved


# How far a parameter moves in a step, in parts of itself; steps; and the bound. A last place of 24
# bits is 2^-15 of a bfloat16: much smaller steps add up all the same.
SMALL_STEPS = [
    ("float16", Rounding.KEEP_16_BITS, 1e-6, 10_000, 1e-3),
    ("bfloat16", Rounding.KEEP_16_BITS, 1e-6, 10_000, 1e-3),
    ("float16", Rounding.KEEP_8_BITS, 1e-6, 10_000, 1e-3),
    ("bfloat16", Rounding.KEEP_8_BITS, 1e-6, 10_000, 1e-3),
    ("bfloat16", Rounding.KEEP_8_BITS, 1e-4, 3_000, 1e-3),
    ("float16", Rounding.KEEP_8_BITS, 1e-3, 300, 1e-3),
    ("bfloat16", Rounding.KEEP_8_BITS, 1e-3, 300, 1e-3),
]


@pytest.mark.parametrize(("name", "rounding", "relative", "steps", "bound"), SMALL_STEPS)
def test_small_steps_add_up_as_in_float32(
    name: str, rounding: Rounding, relative: float, steps: int, bound: float
) -> None:
    distance, moved = distance_from_float32(HALVES[name], rounding, relative, steps)
    assert distance < bound < moved / 5


def test_small_steps_of_bfloat16_rounded_to_nearest_are_lost() -> None:
    distance, moved = distance_from_float32(HALVES["bfloat16"], Rounding.NEAREST, 1e-6, 1000)
    assert distance > 0.99 * moved


@every_half
def test_small_steps_that_are_rounded_by_chance_add_up_in_the_mean(name: str) -> None:
    distance, moved = distance_from_float32(HALVES[name], Rounding.STOCHASTIC, 1e-4, 3000, 1 << 14)
    # Each element walks at random about its way; their sum does not.
    assert distance < moved / 4
