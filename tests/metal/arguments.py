"""What the host hands to the kernels, built here a second time, from what a user writes.

The structs are those of csrc/rules.h, csrc/schedule.h and csrc/backend/metal_arguments.h.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

THREADS = 256
RUN = 4
TILE = 32
MAX_SOURCES = 20
MAX_PIECES = 24
LAST_STEP = 1 << 61

# Buffer indices of the update kernel.
P_IN, P_OUT, M, V, STEP, LEARNING_RATE, CONSTANTS, DISPATCH, SEGMENTS, DIMENSIONS = range(10)
FIRST_SOURCE = 10

# How a source lies in memory.
ALIGNED, UNALIGNED, STRIDED, TILED = range(4)

PAIR = np.dtype([("hi", "f4"), ("lo", "f4")])
HYPERPARAMETERS = np.dtype(
    [
        ("weight_decay", PAIR),
        ("momentum", PAIR),
        ("one_minus_dampening", PAIR),
        ("nesterov", "u4"),
        ("beta1", PAIR),
        ("one_minus_beta1", PAIR),
        ("log_beta1", PAIR),
        ("beta2", PAIR),
        ("one_minus_beta2", PAIR),
        ("log_beta2", PAIR),
        ("eps", PAIR),
        ("bias_correction", "u4"),
    ]
)
PIECE = np.dtype(
    [
        ("start", "i8"),
        ("origin", "i8"),
        ("steps", "i8"),
        ("init", PAIR),
        ("end", PAIR),
        ("slope", PAIR),
        ("log_rate", PAIR),
        ("kind", "i4"),
        ("rate_sign", "i4"),
    ]
)
SCHEDULE = np.dtype([("num_pieces", "i4"), ("padding", "i4"), ("pieces", PIECE, MAX_PIECES)])
STEP_ARGUMENTS = np.dtype(
    [
        ("hyperparameters", HYPERPARAMETERS),
        ("reads_step", "u4"),
        ("p_in_place", "u4"),
        ("schedule", SCHEDULE),
    ]
)
DISPATCH_ARGUMENTS = np.dtype([("num_segments", "u4"), ("passes", "u4")])
SEGMENT = np.dtype(
    [
        ("size", "u8"),
        ("p_offset", "u8"),
        ("state_offset", "u8"),
        ("first_group", "u4"),
        ("source_type", "u4"),
        ("source_layout", "u4"),
        ("first_dimension", "u4"),
        ("num_dimensions", "u4"),
        ("padding", "u4"),
    ]
)
DIMENSION = np.dtype([("extent", "u8"), ("stride", "i8")])

Struct = NDArray[np.void]


def split(x: float) -> tuple[float, float]:
    """A double as the nearest float and the float nearest to what is left."""
    hi = np.float32(x)
    return float(hi), float(np.float32(x - float(hi))) if np.isfinite(hi) else 0.0


def hyperparameters(
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = False,
) -> Struct:
    h = np.zeros((), HYPERPARAMETERS)
    h["weight_decay"] = split(weight_decay)
    h["momentum"] = split(momentum)
    h["one_minus_dampening"] = split(1 - dampening)
    h["nesterov"] = nesterov
    for number, beta in enumerate(betas, start=1):
        h[f"beta{number}"] = split(beta)
        h[f"one_minus_beta{number}"] = split(1 - beta)
        h[f"log_beta{number}"] = split(math.log(beta) if beta else -math.inf)
    h["eps"] = split(eps)
    h["bias_correction"] = bias_correction
    return h


def pieces(name: str, *arguments: Any) -> list[Struct]:
    """The pieces of a schedule, given as its name and arguments (see reference.SCHEDULES)."""
    if name == "join_schedules":
        return _joined(*arguments)
    piece = np.zeros((), PIECE)
    piece["start"] = -LAST_STEP
    piece["steps"] = 1
    init = float(arguments[0])
    piece["init"] = split(init)
    if name == "linear_schedule":
        end, steps = arguments[1:]
        piece["kind"], piece["steps"] = 1, steps
        piece["end"], piece["slope"] = split(end), split((end - init) / steps)
    elif name == "cosine_decay":
        steps, end = arguments[1], arguments[2] if len(arguments) > 2 else 0.0
        piece["kind"], piece["steps"], piece["end"] = 2, steps, split(end)
    elif name in ("exponential_decay", "step_decay"):
        rate = arguments[1]
        piece["kind"], piece["steps"] = 3, arguments[2] if len(arguments) > 2 else 1
        piece["log_rate"] = split(math.log(abs(rate)) if rate else 0.0)
        piece["rate_sign"] = int(np.sign(rate))
    return [piece]


def _joined(schedules: Any, boundaries: Any) -> list[Struct]:
    result = pieces(*schedules[0])
    for schedule, boundary in zip(schedules[1:], boundaries, strict=True):
        for piece in pieces(*schedule):
            piece["start"] = max(boundary, max(piece["start"] + boundary, -LAST_STEP))
            piece["origin"] += boundary
            result.append(piece)
    return result


def schedule(*description: Any) -> Struct:
    """`schedule()` is none: the learning rate then comes as an array."""
    result = np.zeros((), SCHEDULE)
    parts = pieces(*description) if description else []
    result["num_pieces"] = len(parts)
    for number, piece in enumerate(parts):
        result["pieces"][number] = piece
    return result


def step_arguments(h: Struct, s: Struct, reads_step: bool) -> Struct:
    result = np.zeros((), STEP_ARGUMENTS)
    result["hyperparameters"], result["schedule"], result["reads_step"] = h, s, reads_step
    return result
