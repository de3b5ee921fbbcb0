"""What the tests hold results to: float64, from the formulas that the doctor has too."""

from typing import Any

import mlx.core as mx
import numpy as np
from flatstep.diagnosis import formulas
from flatstep.diagnosis.formulas import RULES, STATE_ULPS, Terms, schedule_value, total
from numpy.typing import NDArray

__all__ = ["RULES", "Float64", "Terms", "assert_sum", "schedule_value", "to_float64", "total"]

Float64 = NDArray[np.float64]


def to_float64(array: mx.array) -> Float64:
    """A copy of an array of any floating type; float32 holds the half types exactly."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def in_mlx(values: Any) -> mx.array:
    return mx.array(np.asarray(values, np.float64), mx.float64)


def ulp(x: Float64 | float, dtype: mx.Dtype) -> Float64:
    """The distance between the numbers of ``dtype`` around ``x``."""
    with mx.stream(mx.cpu):
        return np.array(formulas.ulp(in_mlx(x), dtype))


def rounded(x: Float64 | float, dtype: mx.Dtype) -> Float64:
    """The nearest number of ``dtype``, ties to even; nothing here comes near an overflow."""
    spacing = ulp(x, dtype)
    return np.rint(x / spacing) * spacing


def assert_sum(actual: mx.array, terms: Terms, ulps: float = STATE_ULPS) -> None:
    """Hold a float32 to ``ulps``, and a half type to one rounding of a float32 within ``ulps``.

    An ulp is that of the largest term or the sum. A half type differs from the rounded sum only
    where the middle of two numbers lies within ``ulps``, which chance gives to twice their part of
    the numbers' distance: more of them mean that something else was rounded on the way.
    """
    got, exact = to_float64(actual), total(terms)
    with mx.stream(mx.cpu):
        as_mlx = [in_mlx(term) for term in terms]
        off = np.array(formulas.tolerance(as_mlx, mx.float32, ulps))
        tolerance = np.array(formulas.tolerance(as_mlx, actual.dtype, ulps))
    if actual.dtype != mx.float32:
        expected = np.sum(np.minimum(2 * off / ulp(exact, actual.dtype), 1))
        differ = np.count_nonzero(got != rounded(exact, actual.dtype))
        assert differ <= 1 + expected + 4 * expected**0.5, (differ, expected)
    # Negated, so that a NaN fails.
    wrong = ~(np.abs(got - exact) <= tolerance)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        error = ulps * np.abs(got - exact) / off
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} are wrong, the first at {at}: got {got[at]!r}, "
            f"expected {exact[at]!r}, off by {error[at]:.2f} ulp of the largest term; "
            f"the worst by {error.max():.2f}"
        )


def relative_distance(actual: Float64, expected: Float64, start: Float64 | float = 0.0) -> float:
    """Norm of the difference, over the larger of what was expected and how far that moved.

    A weight that has crossed zero has lost digits for the same reason as a sum that cancels.
    """
    scale = max(float(np.linalg.norm(expected)), float(np.linalg.norm(expected - start)))
    return float(np.linalg.norm(actual - expected)) / (scale or 1.0)
