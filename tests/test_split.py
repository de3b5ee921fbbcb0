"""Parameters with a rest beside them are weights of 24 or 32 bits, as csrc/split.h promises."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from block_reference import (
    BLOCK,
    HALVES,
    Float32,
    Half,
    checksums,
    in_blocks,
    rests_of,
    with_checksums,
)
from flatstep import _ext

ROUNDINGS = {8: _ext.Rounding.KEEP_8_BITS, 16: _ext.Rounding.KEEP_16_BITS}

every_half = pytest.mark.parametrize("name", HALVES)
every_width = pytest.mark.parametrize("bits", ROUNDINGS)


def store(values: Float32, half: Half, bits: int) -> tuple[Any, Any]:
    """Bits of parameters, and the blocks of their rests."""
    given = mx.array(np.ascontiguousarray(values))
    stored, rests = _ext.store_split(given, half.dtype, ROUNDINGS[bits])
    assert stored.dtype == half.dtype and rests.dtype == mx.uint8
    assert rests.shape[1] == _ext.rest_bytes(ROUNDINGS[bits], half.dtype) == 8 * bits + 4
    return np.array(stored.view(mx.uint16)), np.array(rests)


def load(stored: Any, rests: Any, half: Half, bits: int) -> Float32:
    given = mx.array(stored).view(half.dtype)
    return np.array(_ext.load_split(given, mx.array(rests), ROUNDINGS[bits]))


def as_floats(stored: Any, half: Half) -> Float32:
    return np.array(mx.array(stored).view(half.dtype).astype(mx.float32))


def assert_same_bits(got: Float32, expected: Float32) -> None:
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), is_nan)
    np.testing.assert_array_equal(got[~is_nan].view(np.uint32), expected[~is_nan].view(np.uint32))


def dense(half: Half) -> Float32:
    """Float32 of every exponent that the format has, between its numbers and on either side of
    the middle between two of them."""
    rng = np.random.default_rng(5)
    limit = 65504.0 if half.dtype == mx.float16 else 3.3895314e38
    patterns = np.array(half.every().astype(mx.float32))
    numbers = patterns[np.abs(patterns) <= limit].astype(np.float64)
    spacing = half.spacing(numbers)
    parts = rng.uniform(-0.5, 0.5, (3, len(numbers)))
    middle = np.array([0.5 - 2.0**-9, 0.5 - 2.0**-17, 0.5, 0.5 + 2.0**-17])[:, None]
    all_parts = np.concatenate([parts, np.broadcast_to(middle, (4, len(numbers)))])
    values = numbers + all_parts * spacing
    blocks: Float32 = in_blocks(values[np.abs(values) <= limit].astype(np.float32))
    return blocks


@every_half
@every_width
def test_every_number_of_the_format_is_itself_and_its_rest_zero(name: str, bits: int) -> None:
    half = HALVES[name]
    patterns = np.array(half.every().view(mx.uint16)).reshape(-1, BLOCK)
    values = as_floats(patterns, half)
    stored, rests = store(values, half, bits)
    assert_same_bits(as_floats(stored, half), values)
    assert not rests_of(rests, bits).any()
    assert_same_bits(load(stored, rests, half, bits), values)


@every_half
def test_every_parameter_with_every_rest_is_a_weight_that_is_kept(name: str) -> None:
    half = HALVES[name]
    patterns = np.arange(2**16, dtype=np.uint16)
    corners = patterns[(patterns & 0x7F) < 3]
    for numbers, all_rests in (
        (corners, np.arange(-128, 128)),
        (patterns, np.array([-128, -77, -1, 1, 100, 127])),
    ):
        stored = np.repeat(numbers, len(all_rests))
        rests = np.tile(all_rests, len(numbers)).astype(np.int8)
        # Nothing lies below zero, and infinity has no rest.
        magnitude = stored & 0x7FFF
        is_there = ~((magnitude == 0) & (rests < 0)) & (magnitude < half.infinite)
        stored, rests = in_blocks(stored[is_there]), in_blocks(rests[is_there])
        weights = load(stored, with_checksums(stored, rests), half, 8)
        exact = as_floats(stored, half).astype(np.float64)
        toward_zero = half.spacing(np.nextafter(exact, 0))
        spacing = np.where(rests < 0, toward_zero, half.spacing(exact))
        sign = np.where(stored & 0x8000, -1.0, 1.0)
        assert_same_bits(weights, (exact + sign * rests * spacing / 256).astype(np.float32))
        again = load(*store(weights, half, 8), half, 8)
        assert_same_bits(again, weights)


@every_half
@every_width
def test_a_weight_is_kept_to_the_bits_there_are(name: str, bits: int) -> None:
    half = HALVES[name]
    values = dense(half)
    weights = load(*store(values, half, bits), half, bits)
    if (name, bits) == ("bfloat16", 16):
        assert_same_bits(weights, values)
        return
    exact = values.astype(np.float64)
    error = np.abs(weights.astype(np.float64) - exact)
    # A last place, and what float32 rounds off where it is added.
    least = 2.0 ** (half.least - (half.bits - 1) - bits)
    if bits == 16:  # a float16 has no more bits than float32 here, and is exact
        assert (error[np.abs(exact) >= 2.0**half.least] == 0).all()
        assert (error <= least / 2 * (1 + 2.0**-20)).all()
        assert least == 2.0**-40
        return
    relative = {"bfloat16": 2.0**-15, "float16": 2.0**-18}[name]
    is_normal = np.abs(exact) >= 2.0**half.least
    assert (error < relative * np.abs(exact))[is_normal].all()
    assert (error <= least * (1 + 2.0**-20))[~is_normal].all()


@every_half
@every_width
def test_a_parameter_is_its_weight_rounded_to_nearest(name: str, bits: int) -> None:
    half = HALVES[name]
    values = dense(half)
    stored, rests = store(values, half, bits)
    exact, rounded = values.astype(np.float64), as_floats(stored, half).astype(np.float64)
    is_finite = np.isfinite(rounded)
    spacing = half.spacing(np.where(is_finite, rounded, exact))
    # No further than half, but for what the weight itself is rounded by.
    furthest = 0.5 + 2.0**-bits
    assert (np.abs(rounded - exact) <= furthest * spacing)[is_finite].all()
    nearest = np.array(mx.array(values).astype(half.dtype).astype(mx.float32), np.float64)
    is_tie = np.abs(np.abs(exact - nearest) / half.spacing(exact) - 0.5) <= 2.0**-bits
    np.testing.assert_array_equal(rounded[~is_tie], nearest[~is_tie])
    # Ties go away from zero: so a rest is what a signed number holds.
    assert (np.abs(rests_of(rests, bits)) <= 2 ** (bits - 1)).all()


SPECIAL: dict[str, tuple[float, float]] = {
    # What is given, and what it becomes in float16.
    "zero": (0.0, 0.0),
    "minus zero": (-0.0, -0.0),
    "infinity": (np.inf, np.inf),
    "minus infinity": (-np.inf, -np.inf),
    "smallest subnormal": (1e-45, 0.0),
    "minus the smallest subnormal": (-1e-45, -0.0),
    "beyond float16": (1e6, np.inf),
    "minus beyond float16": (-1e6, -np.inf),
    "where float16 ends": (65520.0, np.inf),
    "not a number": (np.nan, np.nan),
}


@every_half
@every_width
@pytest.mark.parametrize("special", SPECIAL)
def test_a_special_value_is_kept_as_the_format_can(name: str, bits: int, special: str) -> None:
    half = HALVES[name]
    given, in_float16 = SPECIAL[special]
    values = np.ones((2, BLOCK), np.float32)
    values[0, 13] = given
    stored, rests = store(values, half, bits)
    expected = values.copy()
    expected[0, 13] = in_float16 if half.dtype == mx.float16 else given
    got = load(stored, rests, half, bits)
    if half.dtype == mx.bfloat16 and bits == 8 and 0 < abs(given) < 1e-44:
        expected[0, 13] = np.copysign(0.0, given)
    elif half.dtype == mx.bfloat16 and np.isfinite(given):
        np.testing.assert_allclose(got, expected, rtol=2.0**-16)
        expected = got
    assert_same_bits(got, expected)
    if not np.isfinite(given):
        assert not rests_of(rests, bits)[0, 13]


def test_32_bits_keep_the_largest_float32_although_its_parameter_is_infinite() -> None:
    half = HALVES["bfloat16"]
    values = np.full((1, BLOCK), np.finfo(np.float32).max)
    stored, rests = store(values, half, 16)
    assert np.isinf(as_floats(stored, half)).all()
    assert_same_bits(load(stored, rests, half, 16), values)


def trained_blocks(half: Half, bits: int, blocks: int = 40) -> tuple[Any, Any, Float32]:
    values = np.random.default_rng(6).normal(size=(blocks, BLOCK)).astype(np.float32)
    return *store(values, half, bits), values


@every_half
@every_width
def test_a_block_has_the_checksum_of_its_parameters(name: str, bits: int) -> None:
    half = HALVES[name]
    stored, rests, _ = trained_blocks(half, bits)
    np.testing.assert_array_equal(rests, with_checksums(stored, rests[:, : 8 * bits]))
    assert checksums(np.zeros((1, BLOCK), np.uint16)) == 0
    # What `init` makes: rests of nobody.
    weights = load(stored, np.zeros_like(rests), half, bits)
    assert_same_bits(weights, as_floats(stored, half))


def assert_only_these_rests_are_dropped(
    changed: Any, stored: Any, rests: Any, half: Half, bits: int
) -> None:
    """Block by block: other parameters are read as they are, the same ones with their rests."""
    weights = load(changed, rests, half, bits)
    is_other = (changed != stored).any(axis=1)
    plain, whole = as_floats(changed, half), load(stored, rests, half, bits)
    assert_same_bits(weights[is_other], plain[is_other])
    assert_same_bits(weights[~is_other], whole[~is_other])
    kept = plain[~is_other] != whole[~is_other]
    assert is_other.any() and (kept.mean() > 0.9 if kept.size else True)


@every_half
@every_width
def test_a_change_of_any_parameter_drops_the_rests_of_its_block_only(name: str, bits: int) -> None:
    half = HALVES[name]
    stored, rests, _ = trained_blocks(half, bits, BLOCK * 16)
    # Block 16 i + b has bit b of parameter i flipped.
    at = np.arange(BLOCK * 16)
    flipped = stored.copy()
    flipped[at, at // 16] ^= (1 << (at % 16)).astype(np.uint16)
    for chosen in (at % 2 == 0, at % 2 == 1, at == 500):
        changed = np.where(chosen[:, None], flipped, stored)
        assert_only_these_rests_are_dropped(changed, stored, rests, half, bits)


@every_half
@every_width
def test_a_swap_of_any_two_parameters_drops_the_rests_of_their_block(name: str, bits: int) -> None:
    half = HALVES[name]
    i, j = np.triu_indices(BLOCK, 1)
    stored, rests, _ = trained_blocks(half, bits, len(i))
    at = np.arange(len(i))
    changed = stored.copy()
    changed[at, i], changed[at, j] = stored[at, j], stored[at, i]
    # Two that are equal are not swapped.
    assert_only_these_rests_are_dropped(changed, stored, rests, half, bits)


@every_half
@every_width
def test_other_parameters_are_read_without_rests(name: str, bits: int) -> None:
    half = HALVES[name]
    stored, rests, _ = trained_blocks(half, bits)
    others: dict[str, Any] = {
        "reversed": stored[:, ::-1],
        "next block": np.roll(stored, 1, axis=0),
        "next parameter": np.roll(stored.reshape(-1), 1).reshape(stored.shape),
        "negated": stored ^ np.uint16(0x8000),
        "doubled": stored + np.uint16(1 << (half.bits - 1)),
    }
    for changed in others.values():
        changed = np.ascontiguousarray(changed)
        assert_only_these_rests_are_dropped(changed, stored, rests, half, bits)


def test_neither_shape_nor_dtype_of_parts_is_guessed() -> None:
    rounding = _ext.Rounding.KEEP_8_BITS
    zeros = mx.zeros((2, BLOCK), mx.bfloat16)
    for parameters, rests in (
        (zeros, mx.zeros((2, BLOCK), mx.uint8)),
        (zeros, mx.zeros((1, BLOCK + 4), mx.uint8)),
        (zeros.reshape(-1), mx.zeros((2, BLOCK + 4), mx.uint8)),
        (mx.zeros((2, 32), mx.bfloat16), mx.zeros((2, BLOCK + 4), mx.uint8)),
    ):
        with pytest.raises(ValueError, match="blocks"):
            _ext.load_split(parameters, rests, rounding)
