"""The update rules and the schedules in MLX's float64, and how far from them a result may lie.

A rule returns, for each array that it updates, the terms whose sum is the new value. The terms are
kept apart because an error is measured in ulp of the largest of them and their sum: where terms
cancel, the sum is small but the rounding of what was summed is not.

MLX has float64 on the CPU only: call these under ``with mx.stream(mx.cpu):``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

Terms = list[mx.array]

# Bits of the significand, the leading one included, and the exponent of the smallest subnormal.
_FORMATS = {mx.float32: (24, -149), mx.float16: (11, -24), mx.bfloat16: (8, -133)}

# How far a float32 result may be off; docs/numerics.md says why.
PAIR_ULPS = 1.5
PLAIN_ULPS = 16.0


def sgd(
    arrays: Mapping[str, mx.array],
    learning_rate: float,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> dict[str, Terms]:
    """One step of SGD."""
    p, v = arrays["p"], arrays["v"]
    gradient = [arrays["g"], weight_decay * p]
    if momentum <= 0:
        return {"p": [p, *_scaled(-learning_rate, gradient)], "v": [v]}
    velocity = [momentum * v, *_scaled(1 - dampening, gradient)]
    update = [*gradient, *_scaled(momentum, velocity)] if nesterov else velocity
    return {"p": [p, *_scaled(-learning_rate, update)], "v": velocity}


def adam(
    arrays: Mapping[str, mx.array],
    learning_rate: float,
    t: int,
    *,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    bias_correction: bool = False,
    weight_decay: float = 0.0,
) -> dict[str, Terms]:
    """Step ``t`` (the first is 1) of Adam."""
    p, g = arrays["p"], arrays["g"]
    b1, b2 = betas
    m = [b1 * arrays["m"], (1 - b1) * g]
    v = [b2 * arrays["v"], (1 - b2) * g * g]
    # 1 - beta^t without cancellation.
    c1, c2 = (-math.expm1(t * math.log(b)) if bias_correction else 1.0 for b in betas)
    factor = -learning_rate / c1 / (mx.sqrt(total(v) / c2) + eps)
    decay = -learning_rate * weight_decay * p
    return {"p": [p, decay, *_scaled(factor, m)], "m": m, "v": v}


def one_step(
    rule: str,
    arguments: Mapping[str, Any],
    arrays: Mapping[str, mx.array],
    learning_rate: float,
    t: int,
) -> dict[str, Terms]:
    if rule == "SGD":
        return sgd(arrays, learning_rate, **arguments)
    defaults = {"weight_decay": 0.01} if rule == "AdamW" else {}
    return adam(arrays, learning_rate, t, **{**defaults, **arguments})


def linear_schedule(step: int, init: float, end: float, steps: int) -> float:
    return end if step >= steps else init + (end - init) * (step / steps)


def cosine_decay(step: int, init: float, decay_steps: int, end: float = 0.0) -> float:
    # (1 + cos x) / 2 = sin((pi - x) / 2)^2, and the second form has no cancellation near the end.
    left = max(decay_steps - step, 0)
    return end + math.sin(math.pi / 2 * (left / decay_steps)) ** 2 * (init - end)


def exponential_decay(step: int, init: float, decay_rate: float) -> float:
    return init * decay_rate**step


def step_decay(step: int, init: float, decay_rate: float, step_size: int) -> float:
    return init * decay_rate ** (step // step_size)


def allowed_ulps(rule: str, name: str, dtype: mx.Dtype) -> float:
    """How many float32 ulp an array of a rule may be off before it is rounded to `dtype`."""
    is_plain = rule != "SGD" and name == "p" and dtype != mx.float32
    return PLAIN_ULPS if is_plain else PAIR_ULPS


def tolerance(terms: Terms, dtype: mx.Dtype, ulps: float) -> mx.array:
    """How far from the terms' sum a `dtype` may be when its float32 is within so many ulp."""
    off = ulps * ulp(largest(terms), mx.float32)
    if dtype == mx.float32:
        return off
    return off + 0.5 * ulp(mx.abs(total(terms)) + off, dtype)


def total(terms: Terms) -> mx.array:
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return result


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


def _scaled(factor: float | mx.array, terms: Terms) -> Terms:
    return [factor * term for term in terms]
