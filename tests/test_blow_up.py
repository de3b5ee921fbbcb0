"""AdamW over 8-bit state never takes a step that it would not take over float32, however the sizes
of a block's elements differ, and whenever their gradients come and go."""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from block_reference import BLOCK, Float32, Float64, decode, unpacked
from engine_steps import SIGNS, Engine, rule

# Sizes of the gradients of a block's elements are log-normal.
SIGMAS = [0.0, 0.5, 1.5, 2.5]
SCALES = [1e-15, 1e-8, 1e-4, 1.0, 1e4]

# Which elements get a gradient, of blocks of noise, at a step of so many.
Chosen = Callable[[np.random.Generator, tuple[int, int], int, int], Any]


def all_of_them(_rng: Any, _shape: Any, _t: int, _steps: int) -> Any:
    return True


def a_few(rng: np.random.Generator, shape: tuple[int, int], _t: int, _steps: int) -> Any:
    return rng.random(shape, np.float32) < 0.03


def half_of_them_stop(_rng: Any, _shape: Any, t: int, steps: int) -> Any:
    return (np.arange(BLOCK) % 2 == 0) | (t < steps // 3)


def all_stop(_rng: Any, _shape: Any, t: int, steps: int) -> Any:
    return t < steps // 3


def rows_now_and_then(_rng: Any, shape: tuple[int, int], t: int, _steps: int) -> Any:
    """A row of a block's size, as of an embedding, is seen once in a hundred steps."""
    return (np.arange(shape[0]) * 13 % 100 == t % 100)[:, None]


def parts_of_a_block_now_and_then(_rng: Any, _shape: Any, t: int, _steps: int) -> Any:
    return np.arange(BLOCK) % 16 == t // 5 % 16


KINDS: dict[str, Chosen] = {
    function.__name__: function
    for function in (
        all_of_them,
        a_few,
        half_of_them_stop,
        all_stop,
        rows_now_and_then,
        parts_of_a_block_now_and_then,
    )
}


class Extent(NamedTuple):
    steps: int
    blocks: int  # of a kind, sigma and scale


FAST = Extent(2000, 30)
LARGE = Extent(8000, 100)


def adamw(blocks: int, has_codes: bool, **changed: float) -> Engine:
    zeros = {"w": mx.zeros((blocks, BLOCK))}
    return Engine(rule("adam", weight_decay=0.0, **changed), zeros, has_codes=has_codes, seed=3)


def update(engine: Engine, gradient: mx.array) -> mx.array:
    """What a step adds to parameters, exactly: they are 0 before it."""
    engine.parameters = {"w": mx.zeros(gradient.shape)}
    engine.step({"w": gradient}, 1.0)
    return engine.parameters["w"]


def sizes(rng: np.random.Generator, blocks: int, sigma: float, scale: float) -> Float32:
    spread = np.exp(sigma * rng.normal(size=(blocks, BLOCK)))
    return np.asarray(scale * spread, np.float32)


@cache
def largest_updates(kind: str, extent: Extent) -> dict[tuple[float, float], tuple[float, float]]:
    """By sigma and scale the largest update of any element: over codes, and over float32."""
    rng = np.random.default_rng(21)
    settings = list(product(SIGMAS, SCALES))
    size = np.concatenate([sizes(rng, extent.blocks, *setting) for setting in settings])
    engines = [adamw(len(size), has_codes, eps=1e-20) for has_codes in (True, False)]
    largest = [mx.zeros(len(size)) for _ in engines]
    for t in range(extent.steps):
        noise = rng.standard_normal(size.shape, np.float32)
        chosen = KINDS[kind](rng, size.shape, t, extent.steps)
        gradient = mx.array(noise * size * np.asarray(chosen, np.float32))
        for i, engine in enumerate(engines):
            largest[i] = mx.maximum(largest[i], mx.abs(update(engine, gradient)).max(axis=1))
        mx.eval(largest)
    for k in range(2):
        assert np.isfinite(decode(engines[0].codes(k), SIGNS["adam"][k])).all()
    by_setting = [np.array(x).reshape(len(settings), -1).max(axis=1) for x in largest]
    return {
        setting: (float(a), float(b)) for setting, a, b in zip(settings, *by_setting, strict=True)
    }


extents = pytest.mark.parametrize(
    "extent", [FAST, pytest.param(LARGE, marks=pytest.mark.exhaustive)], ids=["fast", "large"]
)


@extents
@pytest.mark.parametrize("kind", KINDS)
def test_no_update_exceeds_what_float32_state_gives_by_half(kind: str, extent: Extent) -> None:
    found = largest_updates(kind, extent)
    assert all(np.isfinite(pair).all() for pair in found.values())
    too_large = {
        setting: (coded, exact) for setting, (coded, exact) in found.items() if coded > 1.5 * exact
    }
    assert not too_large


@pytest.mark.parametrize("sigma", SIGMAS)
def test_v_follows_gradients_that_fall(sigma: float) -> None:
    rng = np.random.default_rng(22)
    blocks, steps = 40, 3000
    size = sizes(rng, blocks, sigma, 1.0)
    engines = [adamw(blocks, has_codes) for has_codes in (True, False)]
    for t in range(steps):
        fallen = 1.0 if t < steps // 3 else 0.3
        noise = rng.standard_normal(size.shape, np.float32)
        gradient = mx.array(noise * size * np.float32(fallen))
        for engine in engines:
            update(engine, gradient)
    blocks_of_v = engines[0].codes(1)
    coded = decode(blocks_of_v, has_sign=False).astype(np.float64)
    exact = np.array(engines[1].state[1][0], np.float64)
    # What is smaller than a fourth of the scale is kept as that, so it is too large.
    is_above_least = exact > unpacked(blocks_of_v).scales[:, None]
    ratio: Float64 = (coded / exact)[is_above_least]
    assert is_above_least.mean() > 0.25
    assert 0.95 < np.median(ratio) < 1.05
    assert 0.95 < np.mean(ratio) < 1.05


HUGE = [1e-45, 1e-38, 1e-20, 1e18, 1e20, 1e30, 3e38]


@pytest.mark.parametrize("rule_name", ["momentum", "adam", "lion"])
@pytest.mark.parametrize("huge", HUGE)
def test_finite_gradients_never_make_nan(rule_name: str, huge: float) -> None:
    rng = np.random.default_rng(23)
    blocks = 16
    # With decay a parameter that overflows, over float32 too, would be part of a gradient.
    made = Engine(
        rule(rule_name, weight_decay=0.0),
        {"w": mx.array(rng.normal(size=(blocks, BLOCK)).astype(np.float32))},
        has_codes=True,
    )
    for t in range(200):
        gradient = rng.normal(size=(blocks, BLOCK)).astype(np.float32)
        # Alone among others, in a whole block, now and then, and in each step.
        gradient[0, 5] = gradient[1] = huge
        if t % 20 == 0:
            gradient[2, ::3] = -huge
        gradient[3] = huge * (-1) ** t
        made.step({"w": mx.array(gradient)})
        for k, has_sign in enumerate(SIGNS[rule_name]):
            assert np.isfinite(decode(made.codes(k), has_sign)).all()
    # Momentum adds what is as large as its gradient.
    parameters = np.array(made.parameters["w"])
    assert np.isfinite(parameters if rule_name != "momentum" else parameters[4:]).all()
