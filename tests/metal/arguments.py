"""What the host hands to the kernels, built here a second time, from what a user writes.

The structs are those of csrc/schedule.h and csrc/backend/metal_arguments.h. A rule's own are the
engine's: `rule.groups` are the bytes that the kernel `advance` gets.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

THREADS = 256
RUN = 4
TILE_ROWS = 32
TILE_COLUMNS = 64
MAX_SOURCES = 20
MAX_PIECES = 24
LAST_STEP = 1 << 61

MAX_SEGMENTS = 64
KEY_WORDS = 4
GROUP_WORDS = 20

# Buffer indices of the update kernel, where three follow the first state's.
P_IN, P_OUT, STATE = range(3)
CONSTANTS, DISPATCH, SEGMENTS, DIMENSIONS, FIRST_SOURCE = range(6, 11)

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


WORD = (1 << 32) - 1
