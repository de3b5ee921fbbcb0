"""Checks of single values, with errors that name the argument, its value and what is allowed."""

import math
from typing import Any

import mlx.core as mx

from . import _ext
from .layout import name_of

# The nearest float32 of a number from here on is infinite.
FLOAT32_LIMIT = 2.0**128 - 2.0**103


def as_number(name: str, value: Any) -> float:
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name} should be a number, {value!r} was provided instead") from None


def check_finite(name: str, number: float) -> None:
    """Raises ValueError when a number is NaN or infinite, or would be as a float32."""
    if not abs(number) < FLOAT32_LIMIT:
        raise ValueError(f"{name} should be finite in float32, {number} was provided instead")


def as_learning_rate(value: Any) -> mx.array:
    """A float32 scalar, as the kernels read it. An array that is not evaluated is not looked at."""
    if isinstance(value, mx.array):
        if value.size != 1 or value.dtype == mx.complex64:
            raise ValueError(
                f"learning_rate should be one real number, an array of shape {tuple(value.shape)} "
                f"and {name_of(value.dtype)} was provided instead"
            )
        known = _ext.known_value(value)
        if known is not None:
            check_finite("learning_rate", known)
        if value.dtype == mx.float32 and value.ndim == 0:
            return value
        return value.astype(mx.float32).reshape(())
    number = as_number("learning_rate", value)
    check_finite("learning_rate", number)
    return mx.array(number, mx.float32)


def as_step(value: Any) -> mx.array:
    if isinstance(value, mx.array):
        if value.size != 1 or not mx.issubdtype(value.dtype, mx.integer):
            raise ValueError(
                f"step should be one whole number, an array of shape {tuple(value.shape)} and "
                f"{name_of(value.dtype)} was provided instead"
            )
        if value.dtype == mx.uint64 and value.ndim == 0:
            return value
        if mx.issubdtype(value.dtype, mx.signedinteger):
            return as_step(value.reshape(()).item())
        return value.astype(mx.uint64).reshape(())
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(f"step should be a whole number >= 0, {value!r} was provided instead")
    return mx.array(value, mx.uint64)
