"""The update rules and the schedules in float64, and how far from them a result may lie.

A rule returns, for each array that it updates, the terms whose sum is the new value. The terms are
kept apart because an error is measured in ulp of the largest of them and their sum: where terms
cancel, the sum is small but the rounding of what was summed is not.

The formulas are written with operators only, for float64 arrays of MLX and of NumPy alike. MLX has
float64 on the CPU only: call them under ``with mx.stream(mx.cpu):``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

Terms = list[Any]

# Bits of the significand, the leading one included, and the exponent of the smallest subnormal.
_FORMATS = {mx.float32: (24, -149), mx.float16: (11, -24), mx.bfloat16: (8, -133)}

# How far a float32 result may be off; docs/numerics.md says why.
STATE_ULPS = 6.0
PARAMETER_ULPS = 12.0
LEARNING_RATE_ULPS = 1.0


def sgd(
    arrays: Mapping[str, Any],
    learning_rate: float,
    t: int,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> dict[str, Terms]:
    p, v = arrays["p"], arrays["v"]
    gradient = [arrays["g"], weight_decay * p]
    if momentum <= 0:
        return {"p": [p, *_scaled(-learning_rate, gradient)], "v": [v]}
    velocity = [momentum * v, *_scaled(1 - dampening, gradient)]
    update = [*gradient, *_scaled(momentum, velocity)] if nesterov else velocity
    return {"p": [p, *_scaled(-learning_rate, update)], "v": velocity}


def adam(
    arrays: Mapping[str, Any],
    learning_rate: float,
    t: int,
    *,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    bias_correction: bool = False,
    weight_decay: float = 0.0,
) -> dict[str, Terms]:
    p, g = arrays["p"], arrays["g"]
    b1, b2 = betas
    m = [b1 * arrays["m"], (1 - b1) * g]
    v = [b2 * arrays["v"], (1 - b2) * g * g]
    c1, c2 = (_correction(beta, t) if bias_correction else 1.0 for beta in betas)
    factor = -learning_rate / c1 / ((total(v) / c2) ** 0.5 + eps)
    return {"p": [p, -learning_rate * weight_decay * p, *_scaled(factor, m)], "m": m, "v": v}


def lion(
    arrays: Mapping[str, Any],
    learning_rate: float,
    t: int,
    *,
    betas: Sequence[float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> dict[str, Terms]:
    p, g = arrays["p"], arrays["g"]
    direction, m = ([beta * arrays["m"], (1 - beta) * g] for beta in betas)
    # The sign of a sum as the sum over its magnitude: where it nearly cancels, so that rounding
    # decides the sign, the terms are so large that either is within a few of their ulp.
    factor = -learning_rate / (abs(total(direction)) + 1e-100)
    return {"p": [p, -learning_rate * weight_decay * p, *_scaled(factor, direction)], "m": m}


# By an optimizer's name. They take the arrays `p`, `g` and the state, the learning rate, the number
# of the step, of which the first is 1, and what the optimizer is made with.
RULES: dict[str, Callable[..., dict[str, Terms]]] = {
    "SGD": sgd,
    "Adam": adam,
    "AdamW": partial(adam, weight_decay=0.01),
    "Lion": lion,
}


def _scaled(factor: Any, terms: Terms) -> Terms:
    return [factor * term for term in terms]


def _correction(beta: float, t: int) -> float:
    """``1 - beta**t`` without cancellation."""
    return -math.expm1(t * math.log(beta)) if beta else 1.0


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
    """The value at ``step`` of a number, a callable, or ``(name, *arguments)``, as joins nest."""
    if callable(schedule):
        return float(schedule(step))
    if not isinstance(schedule, tuple):
        return float(schedule)
    name, *arguments = schedule
    return SCHEDULES[name](step, *arguments)


def allowed_ulps(name: str) -> float:
    """How many float32 ulp an array of a rule may be off before it is rounded to its dtype."""
    return PARAMETER_ULPS if name == "p" else STATE_ULPS


def tolerance(terms: Terms, dtype: mx.Dtype, ulps: float) -> mx.array:
    """How far from the terms' sum a `dtype` may be when its float32 is within so many ulp."""
    off = ulps * ulp(largest(terms), mx.float32)
    if dtype == mx.float32:
        return off
    return off + 0.5 * ulp(abs(total(terms)) + off, dtype)


# The largest code's multiple of the scale, of values with a sign and of others.
_CODED = {True: 247.0, False: 63487.0}
_BLOCK = 64


def code_step(values: mx.array, has_sign: bool) -> mx.array:
    """How far a leaf's 8-bit codes may be from these values, each by itself."""
    magnitude = mx.abs(values)
    padding = -values.size % _BLOCK
    blocks = mx.pad(magnitude, (0, padding)).reshape(-1, _BLOCK)
    scales = mx.repeat(mx.max(blocks, axis=1) / _CODED[has_sign], _BLOCK)[: values.size]
    return (magnitude + scales) / 16 + (0.0 if has_sign else 1.0) * scales / 2


def total(terms: Terms) -> Any:
    return sum(terms)


def largest(terms: Terms) -> mx.array:
    """The magnitude of the largest term, or of the sum if that is larger, element by element."""
    result = mx.abs(total(terms))
    for term in terms:
        result = mx.maximum(result, mx.abs(term))
    return result


def ulp(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """The distance between the numbers of ``dtype`` around ``x``, a power of two."""
    bits, smallest = _FORMATS[dtype]
    exponent = ((x.view(mx.uint64) >> 52) & 0x7FF).astype(mx.int64) - 1023
    exponent = mx.maximum(exponent - (bits - 1), smallest)
    return ((exponent + 1023).astype(mx.uint64) << 52).view(mx.float64)
