"""Blocks of eight-bit codes hold what csrc/codes.h promises of them."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from block_reference import (
    BLOCK,
    HALVES,
    MOST,
    Float32,
    decode,
    exact_place,
    in_blocks,
    last_code,
    magnitude,
    neighbours,
    packed,
    scale_of,
    steps_of,
    unpacked,
)
from flatstep import _ext

SIGNS = pytest.mark.parametrize("has_sign", [True, False], ids=["signed", "unsigned"])


def store(values: Float32, has_sign: bool) -> Any:
    return np.array(_ext.store_codes(mx.array(np.ascontiguousarray(values)), has_sign))


def load(blocks: Any, has_sign: bool) -> Float32:
    return np.array(_ext.load_codes(mx.array(blocks), has_sign))


def shuffled(values: Float32) -> Float32:
    return np.random.default_rng(1).permutation(values)


def by_magnitude(values: Float32) -> Float32:
    return values[np.argsort(np.abs(values), kind="stable")]


def one_of_each_magnitude(values: Float32) -> Float32:
    """Neighbours lie as far apart as they can: a block goes through all there is."""
    n = len(values) // BLOCK * BLOCK
    return np.ascontiguousarray(by_magnitude(values)[:n].reshape(BLOCK, -1).T).reshape(-1)


ARRANGEMENTS: dict[str, Callable[[Float32], Float32]] = {
    "sorted": by_magnitude,
    "shuffled": shuffled,
    "of each magnitude": one_of_each_magnitude,
}


def half_patterns(name: str) -> Float32:
    return np.array(HALVES[name].every().astype(mx.float32))


def dense_floats() -> Float32:
    """Every exponent with a dense set of significands, of either sign."""
    rng = np.random.default_rng(2)
    significands = rng.integers(0, 2**23, (254, 1024), dtype=np.uint32)
    bits = np.arange(254, dtype=np.uint32)[:, None] << np.uint32(23) | significands
    bits |= rng.integers(0, 2, bits.shape, dtype=np.uint32) << np.uint32(31)
    return bits.view(np.float32).reshape(-1)


def moderate() -> Float32:
    """Blocks like those of a trained model, for whom a scale keeps all."""
    rng = np.random.default_rng(3)
    return (rng.normal(size=2**18) * np.exp(rng.normal(size=2**18))).astype(np.float32)


SETS: dict[str, Callable[[], Float32]] = {
    "float16": lambda: half_patterns("float16"),
    "bfloat16": lambda: half_patterns("bfloat16"),
    "float32": dense_floats,
    "moderate": moderate,
}


def finite_blocks(name: str, arrangement: str, has_sign: bool) -> Float32:
    values = SETS[name]()
    values = values[np.isfinite(values)]
    blocks: Float32 = in_blocks(ARRANGEMENTS[arrangement](values))
    return blocks if has_sign else np.abs(blocks)


every_set = pytest.mark.parametrize("name", SETS)
every_arrangement = pytest.mark.parametrize("arrangement", ARRANGEMENTS)


@SIGNS
def test_every_code_is_decoded_exactly(has_sign: bool) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(4, BLOCK)
    scales = np.array([1.0, 1e-38, 3.3e-20, 1e30, 0.0, np.pi], np.float32)
    for scale in scales:
        blocks = packed(codes, np.full(4, scale))
        expected = decode(blocks, has_sign)
        np.testing.assert_array_equal(load(blocks, has_sign), expected)
        np.testing.assert_array_equal(np.signbit(load(blocks, has_sign)), np.signbit(expected))


@SIGNS
@every_set
@every_arrangement
def test_a_value_becomes_one_of_the_two_codes_around_it(
    name: str, arrangement: str, has_sign: bool
) -> None:
    values = finite_blocks(name, arrangement, has_sign)
    blocks = store(values, has_sign)
    codes, scales = unpacked(blocks)
    np.testing.assert_allclose(scales, scale_of(values, has_sign), rtol=2.0**-23)
    low, high = neighbours(values, scales, has_sign)
    steps = np.abs(steps_of(codes)) if has_sign else codes
    if not has_sign:
        # The three smallest numbers that there are become their bits' number.
        low = np.minimum(low, np.ascontiguousarray(values).view(np.uint32))
    assert (steps >= low).all() and (steps <= high).all()
    # As often the one as the value is near it.
    inside = low < high
    at = exact_place(values, scales, has_sign)
    error = (np.asarray(steps, np.float64) - at)[inside & (at < last_code(has_sign))]
    assert len(error) < 1000 or abs(error.mean()) < 0.02
    if has_sign:
        np.testing.assert_array_equal(codes > 127, np.signbit(values))


@SIGNS
@every_set
@every_arrangement
def test_what_is_decoded_is_within_a_sixteenth_of_itself_and_the_scale(
    name: str, arrangement: str, has_sign: bool
) -> None:
    values = finite_blocks(name, arrangement, has_sign)
    blocks = store(values, has_sign)
    exact = np.clip(values.astype(np.float64), -MOST[has_sign], MOST[has_sign])
    scale = unpacked(blocks).scales.astype(np.float64)[:, None]
    decoded = load(blocks, has_sign)
    np.testing.assert_array_equal(decoded, decode(blocks, has_sign))
    # The step around x, of which no more than all is lost: 1/16 of the power of two in scale + |x|.
    bound = (np.abs(exact) + scale) / 16 * (1 + 2.0**-20)
    error = np.abs(decoded - exact)
    if not has_sign:
        is_small = exact < scale / 2
        assert (error[is_small] <= np.broadcast_to(scale / 2, exact.shape)[is_small]).all()
        bound = np.where(is_small, np.inf, bound)
    assert (error <= bound).all()
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(values))


@every_set
@every_arrangement
def test_what_is_above_zero_stays_half_of_its_scale(name: str, arrangement: str) -> None:
    values = finite_blocks(name, arrangement, False)
    blocks = store(values, False)
    decoded, scale = load(blocks, False), unpacked(blocks).scales[:, None]
    assert ((decoded == 0) == (values == 0)).all()
    assert (decoded >= scale / 2)[values > 0].all()


@SIGNS
@every_set
@every_arrangement
def test_what_is_decoded_has_the_same_codes_again(
    name: str, arrangement: str, has_sign: bool
) -> None:
    values = finite_blocks(name, arrangement, has_sign)
    blocks = store(values, has_sign)
    again = unpacked(store(load(blocks, has_sign), has_sign))
    codes, scales = unpacked(blocks)
    # The largest of a block, but for those below the smallest scale, gives the same one again.
    same = np.max(codes & last_code(has_sign), axis=1) == last_code(has_sign)
    same |= again.scales == scales
    np.testing.assert_allclose(again.scales[same], scales[same], rtol=2.0**-22)
    changed = np.count_nonzero(again.codes[same] != codes[same])
    assert changed <= max(2, codes.size // 10**5)
    is_scaled = np.abs(values).max(axis=1) >= 2.0**-100
    assert np.count_nonzero(is_scaled & ~same) <= 1


@SIGNS
@pytest.mark.parametrize("scale", [10.0**e for e in range(-38, 39, 4)])
def test_a_block_is_scaled_from_the_smallest_to_the_largest_number(
    scale: float, has_sign: bool
) -> None:
    rng = np.random.default_rng(4)
    values = (rng.uniform(0.001, 1, (1000, BLOCK)) * scale).astype(np.float32)
    blocks = store(values, has_sign)
    codes, scales = unpacked(blocks)
    decoded = load(blocks, has_sign)
    assert np.isfinite(decoded).all()
    # Where there is no room below, codes are fewer: none is subnormal.
    assert (scales >= np.finfo(np.float32).tiny).all()
    least = 2.0**-100 / magnitude(127 if has_sign else 255)
    values = np.clip(values, 0, MOST[has_sign])
    assert (np.abs(decoded - values) <= (values + np.maximum(scales, least)[:, None]) / 2).all()
    if scale > 1e-29:
        assert (codes.max(axis=1) >= (126 if has_sign else 254)).all()


SPECIAL = {
    "zero": 0.0,
    "minus zero": -0.0,
    "smallest subnormal": 1e-45,
    "largest subnormal": 1.1754942e-38,
    "smallest normal": 1.1754944e-38,
    "one": 1.0,
    "largest": 3.4028235e38,
    "infinity": np.inf,
    "minus infinity": -np.inf,
}


@SIGNS
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("at", [0, 17, 63])
def test_a_special_value_is_kept_as_far_as_it_can_be(special: str, at: int, has_sign: bool) -> None:
    value = np.float32(SPECIAL[special])
    value = value if has_sign else np.abs(value)
    for others in (0.0, 1e-30, 1.0, 3e38):
        values = np.full((2, BLOCK), others, np.float32)
        values[0, at] = value
        decoded = load(store(values, has_sign), has_sign)
        assert np.isfinite(decoded).all()
        got, scale = decoded[0, at], unpacked(store(values, has_sign)).scales[0]
        assert np.signbit(got) == np.signbit(value)
        expected = np.clip(value, -MOST[has_sign], MOST[has_sign])
        assert abs(float(got) - float(expected)) <= abs(float(expected)) / 16 + float(scale) / 2
        if value == 0:
            assert got == 0
        if np.isinf(value):
            assert abs(got) == np.float32(MOST[has_sign])
        # A block knows nothing of its neighbour.
        alone = load(store(values[1:], has_sign), has_sign)
        assert np.abs(decoded[1] - alone[0]).max() <= others / 16 * 1.001


@SIGNS
@pytest.mark.parametrize("nan", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF])
def test_a_nan_makes_its_block_nan_and_no_other(nan: int, has_sign: bool) -> None:
    for at in (0, 31, 63):
        values = np.ones((3, BLOCK), np.float32)
        values[1, (at + 5) % BLOCK] = np.inf
        values.view(np.uint32)[1, at] = nan
        decoded = load(store(values, has_sign), has_sign)
        np.testing.assert_array_equal(np.isnan(decoded), [[row == 1] * BLOCK for row in range(3)])
        assert np.isnan(load(store(decoded, has_sign), has_sign)[1]).all()


@SIGNS
def test_a_block_of_zeros_is_zero_bytes_and_the_other_way_round(has_sign: bool) -> None:
    zeros = np.zeros((3, BLOCK), np.float32)
    assert not store(zeros, has_sign).any()
    assert not load(np.zeros((3, BLOCK + 4), np.uint8), has_sign).any()
    minus = store(-zeros, True)
    assert (minus[:, :BLOCK] == 0x80).all() and not minus[:, BLOCK:].any()


def test_neither_shape_nor_dtype_of_blocks_is_guessed() -> None:
    for values in (mx.zeros((64,)), mx.zeros((2, 63)), mx.zeros((2, 64), mx.float16)):
        with pytest.raises(ValueError, match="blocks"):
            _ext.store_codes(values, True)
    for blocks in (mx.zeros((68,), mx.uint8), mx.zeros((2, 64), mx.uint8), mx.zeros((2, 68))):
        with pytest.raises(ValueError, match="blocks"):
            _ext.load_codes(blocks, True)
    assert _ext.block_bytes() == BLOCK + 4
