"""Codes with a scale, numbers in two parts and rounding by chance, from what the headers' comments
say of them: csrc/codes.h, split.h and rounding.h in NumPy. Nothing here is computed as it is there,
but for the random numbers, which are integers.
"""

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Words = NDArray[np.uint32]

BLOCK = 64
CODE_BYTES = BLOCK + 4
# The largest number that is kept, of values with a sign and of others.
MOST = {True: 2.0**63, False: float(np.uint32(0x7F7F0000).view(np.float32))}
# Of a code's place, what float32 may be off: three roundings of 2^-24 of a sum, in sixteenths.
PLACE_ERROR = 16 * 3 * 2.0**-24 * 1.01


# ---- Codes ----


def last_code(has_sign: bool) -> int:
    return 127 if has_sign else 255


def magnitude(place: Any) -> Any:
    """What codes stand for in scales; between two codes, what lies between them evenly."""
    exponent = np.floor(np.asarray(place, np.float64) / 16)
    return 2.0**exponent * (1 + place / 16 - exponent) - 1


def place_of(scales: Any) -> Any:
    """The inverse: of a magnitude in scales, the code in whose place it is, and how far beyond."""
    significand, exponent = np.frexp(1 + np.asarray(scales, np.float64))
    return 16 * (exponent - 1) + 16 * (2 * significand - 1)


def scale_of(values: Float32, has_sign: bool) -> Float64:
    """Of each block, from its largest magnitude; NaN of one with a NaN."""
    largest = np.abs(values).max(axis=1).astype(np.float64)
    kept = np.clip(largest, 2.0**-100, MOST[has_sign])
    return np.where(largest == 0, 0.0, kept / magnitude(last_code(has_sign)))


class Codes(NamedTuple):
    codes: Bytes
    scales: Float32

    @property
    def steps(self) -> NDArray[np.int64]:
        """Codes as numbers that are apart as far as the codes are, with a sign."""
        return steps_of(self.codes)


def steps_of(codes: Bytes) -> NDArray[np.int64]:
    number = codes.astype(np.int64)
    return np.where(number < 128, number, 128 - number)


def unpacked(blocks: Bytes) -> Codes:
    """A uint8 array of blocks, each with its scale behind the codes."""
    scales = np.ascontiguousarray(blocks[:, BLOCK:]).view(np.float32)[:, 0]
    return Codes(np.ascontiguousarray(blocks[:, :BLOCK]), scales)


def packed(codes: Bytes, scales: Float32) -> Bytes:
    scale_bytes = np.ascontiguousarray(scales, np.float32)[:, None].view(np.uint8)
    return np.concatenate([codes, scale_bytes], axis=1)


def decode(blocks: Bytes, has_sign: bool) -> Float32:
    codes, scales = unpacked(blocks)
    number = codes & 127 if has_sign else codes
    # A product of two float32 in float64 is exact: it is rounded once.
    exact = magnitude(number.astype(np.float64)) * scales.astype(np.float64)[:, None]
    negative = has_sign & (codes > 127)
    signed: Float64 = np.copysign(exact, np.where(negative, -1.0, 1.0))
    return signed.astype(np.float32)


def neighbours(values: Float32, scales: Float32, has_sign: bool) -> tuple[Any, Any]:
    """The places of values below and above which no code may be, ignoring their signs."""
    at = exact_place(values, scales, has_sign)
    low, high = np.floor(at * (1 - 2.0**-22)), np.ceil(at * (1 + 2.0**-22))
    last = last_code(has_sign)
    return np.minimum(low, last), np.minimum(high, last)


def exact_place(values: Float32, scales: Float32, has_sign: bool) -> Float64:
    """Where values lie among the codes, as float64 has it; of values in blocks with no NaN."""
    finite = np.minimum(np.abs(values.astype(np.float64)), np.finfo(np.float32).max)
    scale = scales.astype(np.float64)[:, None]
    at = place_of(np.divide(finite, scale, out=np.zeros_like(finite), where=scale > 0))
    least = 0.0 if has_sign else 8.0
    return np.asarray(np.where(finite > 0, np.maximum(at, least), 0.0))


def chance_codes(
    values: Float32, scales: Float32, has_sign: bool, keys: Words
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The least and the largest code that these keys can make of values, ignoring their signs.

    They are the same but for values that lie, within float32's error, where a key decides.
    """
    at = exact_place(values, scales, has_sign)
    # Only leading bits count, as many as there are below a code's last.
    chance = (keys >> 13).reshape(values.shape) / 2.0**19
    # A float is cut off where its sum ends, so what lies below that counts as well.
    last = last_code(has_sign)

    def code(error: float) -> NDArray[np.int64]:
        place = np.floor(at + chance + error)
        return np.where(values == 0, 0, np.clip(place, 0, last)).astype(np.int64)

    return code(-PLACE_ERROR), code(PLACE_ERROR)


# ---- The random numbers of csrc/rounding.h ----


def scrambled(x: Any) -> Any:
    x = np.atleast_1d(np.asarray(x, np.uint32)).copy()
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def hash_of(name: str) -> int:
    """FNV-1a, of 32 bits."""
    result = 2166136261
    for byte in name.encode():
        result = (result ^ byte) * 16777619 % 2**32
    return result


def rounding_keys(elements: int, step: int, seed: int, leaf: str, array: int) -> Words:
    """Of the first elements of a leaf: 0 is the parameter's, the state's follow."""
    start = scrambled(scrambled(seed + 1) ^ np.uint32(hash_of(leaf)))
    start = scrambled((start + np.uint32(array)).astype(np.uint32))
    # Multiples of the powers of 1.3247..., the root of x^3 = x + 1: Roberts' sequence.
    ratio = max(np.roots([1, 0, -1, -1]).real)
    of_element, of_step = (int(2**32 / ratio**k) | 1 for k in (1, 2))
    number = start + np.uint32(step * of_step % 2**32)
    result: Words = number + np.arange(elements, dtype=np.uint32) * np.uint32(of_element)
    return result


def random_bits(keys: Words) -> Words:
    result: Words = scrambled(keys)
    return result


# ---- Half precision with more bits ----


class Half(NamedTuple):
    """A half-precision format as float64 sees it."""

    dtype: mx.Dtype
    bits: int  # of the significand, the leading one included
    least: int  # the exponent of the smallest normal number
    infinite: int  # the bits of infinity

    def spacing(self, x: Float64, more_bits: int = 0) -> Float64:
        """Between the numbers around ``x``, with so many bits below the last."""
        _, exponent = np.frexp(np.abs(x))
        exponent = np.where(x == 0, self.least, np.maximum(exponent - 1, self.least))
        spacing: Float64 = np.ldexp(1.0, exponent - (self.bits - 1) - more_bits)
        return spacing

    def every(self) -> mx.array:
        """Every number of the format by its bits."""
        return mx.array(np.arange(2**16, dtype=np.uint16)).view(self.dtype)


HALVES = {
    "float16": Half(mx.float16, 11, -14, 0x7C00),
    "bfloat16": Half(mx.bfloat16, 8, -126, 0x7F80),
}


def checksums(stored: NDArray[np.uint16]) -> Words:
    """Of blocks of 64: a sum of numbers with a sign, by the squares of odd numbers."""
    weights = (2 * np.arange(BLOCK, dtype=np.int64) + 1) ** 2
    total = (stored.view(np.int16).astype(np.int64) * weights).sum(axis=1)
    result: Words = (total % 2**32).astype(np.uint32)
    return result


def with_checksums(stored: NDArray[np.uint16], rests: Any) -> Bytes:
    """Rests of blocks in memory: int8 or int16, and their parameters' checksum behind them."""
    parts = [np.ascontiguousarray(rests).view(np.uint8), checksums(stored)[:, None].view(np.uint8)]
    return np.concatenate(parts, axis=1)


def rests_of(blocks: Bytes, bits: int) -> NDArray[np.int64]:
    raw = np.ascontiguousarray(blocks[:, : BLOCK * bits // 8])
    signed: Any = raw.view(np.int8 if bits == 8 else np.int16)
    return np.asarray(signed, np.int64)


def in_blocks(values: Any) -> Any:
    """In rows of 64, the last filled up with ones."""
    flat = np.asarray(values).reshape(-1)
    return np.concatenate([flat, np.ones(-len(flat) % BLOCK, flat.dtype)]).reshape(-1, BLOCK)
