"""What the host hands to the kernels, built here a second time, from what a user writes.

The structs are those of csrc/schedule.h, csrc/pass.h and csrc/backend/metal_arguments.h. A rule's
own are the engine's: `rule.groups` are the bytes that the kernel `advance` gets.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

THREADS = 256
RUN = 4
TILE_ROWS = 32
TILE_COLUMNS = 64
MAX_SOURCES = 19
MAX_PIECES = 24
LAST_STEP = 1 << 61

MAX_SEGMENTS = 64
PASS_WORDS = 8
GROUP_WORDS = 24

# Buffer indices of the update kernel, where two follow the first state's.
P_IN, P_OUT, STATE = range(3)
RESTS, EMA, ACCUMULATED, CONSTANTS = range(5, 9)
DISPATCH, SEGMENTS, DIMENSIONS, FIRST_SOURCE = range(9, 13)
# A source's number, of gradients that are summed up.
SUM_AS_SOURCE = MAX_SOURCES
# Those of `advance`, where each scalar has two places in the table's order.
ADVANCE_WRITTEN, ADVANCE_CONSTANTS = 8, 16
ADVANCE_ARGUMENTS, ADVANCE_SCHEDULE, ADVANCE_GROUPS = range(17, 20)
# Those of the sum of squares.
NORM_GRAD_SCALE, NORM_ACCUMULATED, NORM_SUMS, NORM_RESULT, NORM_ARGUMENTS = range(5)

# How a source lies in memory.
ALIGNED, UNALIGNED, STRIDED, TILED = range(4)

PAIR = np.dtype([("hi", "f4"), ("lo", "f4")])
PIECE = np.dtype(
    [
        ("start", "i8"),
        ("origin", "i8"),
        ("steps", "i8"),
        ("init", PAIR),
        ("end", PAIR),
        ("log_rate", PAIR),
        ("kind", "i4"),
        ("rate_sign", "i4"),
    ]
)
SCHEDULE = np.dtype([("num_pieces", "i4"), ("padding", "i4"), ("pieces", PIECE, MAX_PIECES)])
SCALARS = {
    "step": "u8",
    "learning_rate": "f4",
    "group_learning_rates": "f4",
    "grad_scale": "f4",
    "sum_of_squares": "f4",
    "grad_norm": "f4",
    "skipped_steps": "u8",
    "accumulated": "u8",
}
UPDATE, DROP, HOLD = range(3)
OF_ALL, OWN, OF_SCHEDULE = range(3)
PASS_SETTINGS = np.dtype(
    [
        ("accumulate_steps", "u8"),
        ("ema_start", "u8"),
        ("ema_every", "u8"),
        ("max_grad_norm", "f4"),
        ("clip_value", "f4"),
        ("ema_decay", "f4"),
        ("one_minus_ema_decay", "f4"),
        ("has_norm", "u4"),
        ("skips_nonfinite", "u4"),
        ("is_accumulation", "u4"),
        ("seed", "u4"),
    ]
)
PASS_CONSTANTS = np.dtype(
    [
        ("tick", "u4"),
        ("seed", "u4"),
        ("action", "u4"),
        ("grad_scale", "f4"),
        ("clip_value", "f4"),
        ("clip_factor", "f4"),
        ("ema_decay", "f4"),
        ("ema_weight", "f4"),
    ]
)
ADVANCE_STRUCT = np.dtype([("settings", PASS_SETTINGS), ("read", "u4"), ("written", "u4")])
GROUP_ARGUMENTS = np.dtype(
    [
        ("source", "u4"),
        ("scale", "f4"),
        ("schedule", "u4"),
        ("padding", "u4"),
        ("hyperparameters", "u4", 32),
    ]
)
NORM_STRUCT = np.dtype(
    [
        ("settings", PASS_SETTINGS),
        ("has_grad_scale", "u4"),
        ("has_accumulated", "u4"),
        ("num_sums", "u4"),
        ("padding", "u4"),
    ]
)
DISPATCH_ARGUMENTS = np.dtype([("num_segments", "u4"), ("passes", "u4"), ("p_in_place", "u4")])
COPY_ARGUMENTS = np.dtype([("size", "u8"), ("stride", "u8")])
SEGMENT = np.dtype(
    [
        ("size", "u8"),
        ("p_offset", "u8"),
        ("state_offset", "u8"),
        ("source_offset", "u8"),  # in bytes
        ("source", "u4"),
        ("group", "u4"),
        ("first_group", "u4"),
        ("storage", "u4"),
        ("source_layout", "u4"),
        ("first_dimension", "u4"),
        ("num_dimensions", "u4"),
        ("name", "u4"),  # a hash
    ]
)
DIMENSION = np.dtype([("extent", "u8"), ("stride", "i8")])

Struct = NDArray[np.void]


def split(x: float) -> tuple[float, float]:
    """A double as the nearest float and the float nearest to what is left."""
    hi = np.float32(x)
    return float(hi), float(np.float32(x - float(hi))) if np.isfinite(hi) else 0.0


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
        piece["kind"], piece["steps"], piece["end"] = 0, steps, split(end)
    elif name == "cosine_decay":
        steps, end = arguments[1], arguments[2] if len(arguments) > 2 else 0.0
        piece["kind"], piece["steps"], piece["end"] = 1, steps, split(end)
    elif name in ("exponential_decay", "step_decay"):
        rate = arguments[1]
        piece["kind"], piece["steps"] = 2, arguments[2] if len(arguments) > 2 else 1
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


def settings(**values: Any) -> Struct:
    """What a user sets; `ema` is the average's decay."""
    result = np.zeros((), PASS_SETTINGS)
    result["max_grad_norm"] = result["clip_value"] = np.inf
    result["ema_every"] = 1
    decay = values.pop("ema", 0.0)
    result["ema_decay"], result["one_minus_ema_decay"] = decay, 1 - decay
    for name, value in values.items():
        result[name] = value
    return result


WORD = (1 << 32) - 1
