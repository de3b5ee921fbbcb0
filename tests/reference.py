"""The update rules and the schedules in float64 NumPy, and how far from them a result may lie.

A rule returns, for each array that it updates, the list of terms whose sum is the new value. The
terms are kept apart because an error is measured in ulp of the largest of them and their sum:
where terms cancel, the sum is small but the rounding of what was summed is not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from flatstep.diagnosis.formulas import PAIR_ULPS
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Terms = list[Float64]

# Bits of the significand, the leading one included, and the exponent of the smallest subnormal.
_FORMATS = {mx.float32: (24, -149), mx.float16: (11, -24), mx.bfloat16: (8, -133)}


def sgd(
    arrays: Mapping[str, Float64],
    learning_rate: float,
    t: int,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> dict[str, Terms]:
    """One step of SGD: the terms of the new ``p`` and ``v``."""
    p, v = arrays["p"], arrays["v"]
    gradient = [arrays["g"], weight_decay * p]
    if momentum <= 0:
        return {"p": [p, *_scaled(-learning_rate, gradient)], "v": [v]}
    velocity = [momentum * v, *_scaled(1 - dampening, gradient)]
    update = [*gradient, *_scaled(momentum, velocity)] if nesterov else velocity
    return {"p": [p, *_scaled(-learning_rate, update)], "v": velocity}


def adam(
    arrays: Mapping[str, Float64],
    learning_rate: float,
    t: int,
    *,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    bias_correction: bool = False,
    weight_decay: float = 0.0,
) -> dict[str, Terms]:
    """Step ``t`` (the first is 1) of Adam: the terms of the new ``p``, ``m`` and ``v``."""
    p, g = arrays["p"], arrays["g"]
    b1, b2 = betas
    m = [b1 * arrays["m"], (1 - b1) * g]
    v = [b2 * arrays["v"], (1 - b2) * g * g]
    c1, c2 = (_correction(b1, t), _correction(b2, t)) if bias_correction else (1.0, 1.0)
    denominator = np.sqrt(total(v) / c2) + eps
    update = _scaled(-learning_rate / c1 / denominator, m)
    return {"p": [p, -learning_rate * weight_decay * p, *update], "m": m, "v": v}


def adamw(
    arrays: Mapping[str, Float64],
    learning_rate: float,
    t: int,
    *,
    weight_decay: float = 0.01,
    **arguments: Any,
) -> dict[str, Terms]:
    """Adam with decoupled weight decay."""
    return adam(arrays, learning_rate, t, weight_decay=weight_decay, **arguments)


RULES: dict[str, Callable[..., dict[str, Terms]]] = {"SGD": sgd, "Adam": adam, "AdamW": adamw}


def _scaled(factor: float | Float64, terms: Terms) -> Terms:
    return [factor * term for term in terms]


def _correction(beta: float, t: int) -> float:
    """``1 - beta**t`` without cancellation."""
    return 1.0 if beta == 0 else -math.expm1(t * math.log(beta))


def linear_schedule(step: int, init: float, end: float, steps: int) -> float:
    return end if step >= steps else init + (end - init) * (step / steps)


def cosine_decay(step: int, init: float, decay_steps: int, end: float = 0.0) -> float:
    # (1 + cos x) / 2 = sin((pi - x) / 2)^2, and the second form has no cancellation near the end.
    left = max(decay_steps - step, 0)
    return end + math.sin(math.pi / 2 * (left / decay_steps)) ** 2 * (init - end)


def exponential_decay(step: int, init: float, decay_rate: float) -> float:
    return init * float(decay_rate) ** step


def step_decay(step: int, init: float, decay_rate: float, step_size: int) -> float:
    return init * float(decay_rate) ** (step // step_size)


def join_schedules(step: int, schedules: Sequence[Any], boundaries: Sequence[int]) -> float:
    # MLX lets the last boundary in the list that has been reached decide, sorted or not.
    active, start = schedules[0], 0
    for schedule, boundary in zip(schedules[1:], boundaries, strict=True):
        if step >= boundary:
            active, start = schedule, boundary
    return schedule_value(active, step - start)


SCHEDULES: dict[str, Callable[..., float]] = {
    "linear_schedule": linear_schedule,
    "cosine_decay": cosine_decay,
    "exponential_decay": exponential_decay,
    "step_decay": step_decay,
    "join_schedules": join_schedules,
}


def schedule_value(schedule: Any, step: int) -> float:
    """The value at ``step`` of ``(name, *arguments)``, which may hold others, or of a callable."""
    if callable(schedule):
        return float(schedule(step))
    name, *arguments = schedule
    return SCHEDULES[name](step, *arguments)


def to_float64(array: mx.array) -> Float64:
    """A copy of an array of any floating type; float32 holds the half types exactly."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def total(terms: Terms) -> Float64:
    return np.sum(np.broadcast_arrays(*terms), axis=0)


def ulp(x: Float64 | float, dtype: mx.Dtype) -> Float64:
    """The distance between the numbers of ``dtype`` around ``x``."""
    bits, smallest = _FORMATS[dtype]
    exponent = np.where(np.equal(x, 0), smallest, np.frexp(x)[1] - bits)
    return np.ldexp(1.0, np.maximum(exponent, smallest))


def ulp_of_largest(terms: Terms, dtype: mx.Dtype) -> Float64:
    """An ulp, in ``dtype``, of the largest of the terms and their sum, element by element."""
    return ulp(np.max(np.abs(np.broadcast_arrays(*terms, total(terms))), axis=0), dtype)


def rounded(x: Float64 | float, dtype: mx.Dtype) -> Float64:
    """The nearest number of ``dtype``, ties to even; nothing here comes near an overflow."""
    spacing = ulp(x, dtype)
    return np.rint(x / spacing) * spacing


def assert_sum(actual: mx.array, terms: Terms, ulps: float = PAIR_ULPS) -> None:
    """Hold a float32 to ``ulps``, and a half type to one rounding of a float32 within ``ulps``.

    An ulp is that of the largest term or the sum. Unless the sum nearly cancels, more than one
    value in a hundred that isn't correctly rounded means that something else was rounded on the
    way.
    """
    got, exact = to_float64(actual), total(terms)
    tolerance = ulps * ulp_of_largest(terms, mx.float32)
    if actual.dtype != mx.float32:
        coarse = ulp(np.abs(exact) + tolerance, actual.dtype)
        wrong = (got != rounded(exact, actual.dtype)) & (tolerance < 0.01 * coarse)
        assert np.count_nonzero(wrong) <= max(1, got.size // 100)
        tolerance += 0.5 * coarse
    # Negated, so that a NaN fails.
    wrong = ~(np.abs(got - exact) <= tolerance)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        error = np.abs(got - exact) / ulp_of_largest(terms, mx.float32)
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
