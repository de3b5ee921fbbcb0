"""How the state of a leaf lies in rows of flat arrays, and what a user sees of it."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from . import _ext
from .walk import Keys

# A segment starts on a boundary of so many elements, and a flat array has rows of them.
BLOCK = 64

FLOATING = (mx.float32, mx.float16, mx.bfloat16)
HALVES = (mx.float16, mx.bfloat16)

# Smaller tensors keep float32 state where others have codes: norms and biases, whose bytes hardly
# count.
SMALLEST_CODED = 4096

# The slot of what half-precision parameters lack of their master weights.
MASTER = "master"
# Those of the weights' average, and of the sum of gradients that no step has used yet.
EMA = "ema"
GRADIENT_SUM = "gradient_sum"
ROUNDINGS = {24: _ext.Rounding.KEEP_8_BITS, 32: _ext.Rounding.KEEP_16_BITS}


class Blocks(dict[str, mx.array]):
    """The arrays of a leaf's state in blocks. To change one, assign all of them to the slot."""

    def __new__(cls, *items: Any, **named: Any) -> Any:
        return dict(*items, **named)  # MLX's tree functions call the type of a container

    @classmethod
    def of(cls, items: dict[str, mx.array]) -> "Blocks":
        blocks: Blocks = dict.__new__(cls)
        dict.update(blocks, items)
        return blocks

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            f"{' and '.join(self)} can't be changed one by one; assign a dict of them, or a float "
            "array, to the slot"
        )

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = _refuse
    clear = setdefault = _refuse


@dataclass(frozen=True)
class Values:
    """Values of a floating dtype, which a user sees as an array."""

    dtype: mx.Dtype
    has_sign: bool

    @property
    def row(self) -> int:
        return BLOCK

    def shown(self, flat: mx.array, first: int, shape: tuple[int, ...]) -> Any:
        return _ext.views(flat, [(list(shape), first * BLOCK)])[0]

    def floats(self, flat: mx.array, first: int, shape: tuple[int, ...]) -> mx.array:
        view: mx.array = self.shown(flat, first, shape)
        return view

    def rows(self, value: Any) -> mx.array:
        if isinstance(value, dict):
            value = CODES.floats_of(value, self.has_sign)
        return in_blocks(value.astype(self.dtype))


@dataclass(frozen=True)
class InBlocks:
    """Two arrays, one with an element for each of the leaf, one with an element for each block."""

    names: tuple[str, str]
    dtypes: tuple[mx.Dtype, mx.Dtype]

    dtype: ClassVar[mx.Dtype] = mx.uint8  # of a row, which is what C++ has for a block

    @property
    def row(self) -> int:
        return BLOCK * self.dtypes[0].size + self.dtypes[1].size

    def shown(self, flat: mx.array, first: int, shape: tuple[int, ...]) -> Any:
        rows = flat[first : first + num_blocks(shape)]
        split = BLOCK * self.dtypes[0].size
        each = mx.contiguous(rows[:, :split]).view(self.dtypes[0])
        whole = mx.contiguous(rows[:, split:]).view(self.dtypes[1]).reshape(-1)
        return Blocks.of(dict(zip(self.names, (from_blocks(each, shape), whole), strict=True)))

    def rows(self, value: Any) -> mx.array:
        each, whole = (value[name] for name in self.names)
        of_blocks = mx.contiguous(whole.reshape(-1, 1)).view(mx.uint8)
        return mx.concatenate([mx.contiguous(in_blocks(each)).view(mx.uint8), of_blocks], axis=1)

    def floats_of(self, value: Any, has_sign: bool) -> mx.array:
        """The values of codes."""
        values = _ext.load_codes(self.rows(value), has_sign)
        return from_blocks(values, tuple(value[self.names[0]].shape))


CODES = InBlocks(("codes", "scales"), (mx.uint8, mx.float32))
RESTS = {
    24: InBlocks(("rests", "checksums"), (mx.int8, mx.uint32)),
    32: InBlocks(("rests", "checksums"), (mx.int16, mx.uint32)),
}


@dataclass(frozen=True)
class Codes:
    """8-bit codes, which may be assigned as floats too."""

    has_sign: bool

    dtype: ClassVar[mx.Dtype] = mx.uint8
    row: ClassVar[int] = _ext.block_bytes()

    def shown(self, flat: mx.array, first: int, shape: tuple[int, ...]) -> Any:
        return CODES.shown(flat, first, shape)

    def floats(self, flat: mx.array, first: int, shape: tuple[int, ...]) -> mx.array:
        rows = flat[first : first + num_blocks(shape)]
        return from_blocks(_ext.load_codes(rows, self.has_sign), shape)

    def rows(self, value: Any) -> mx.array:
        if isinstance(value, dict):
            return CODES.rows(value)
        return _ext.store_codes(in_blocks(value.astype(mx.float32)), self.has_sign)


Storage = Values | Codes | InBlocks


class StateForm(NamedTuple):
    """What an optimizer keeps for a leaf, and how."""

    slots: tuple[str, ...]
    unsigned: tuple[str, ...]  # those of the slots whose values are never below zero
    state_dtype: str
    master_weight_bits: int | None
    full_precision: Callable[[str, mx.array], bool] | None = None
    # Names of dtypes.
    ema: str | None = None
    gradient_sum: str | None = None

    @property
    def flat_slots(self) -> tuple[str, ...]:
        """In the order of the engine."""
        others = {
            MASTER: self.master_weight_bits,
            EMA: self.ema,
            GRADIENT_SUM: self.gradient_sum,
        }
        return (*self.slots, *(slot for slot, is_there in others.items() if is_there))

    def leaf_slots(self, dtype: mx.Dtype) -> tuple[str, ...]:
        """Of a parameter of this dtype."""
        slots = self.flat_slots
        return slots if dtype in HALVES else tuple(slot for slot in slots if slot != MASTER)

    def leaf_state(self, keys: Keys, shape: tuple[int, ...], weight: mx.array) -> str:
        """How the state of a leaf is stored, as the name of a dtype."""
        if self.state_dtype != "int8":
            return self.state_dtype
        if prod(shape) < SMALLEST_CODED:
            return "float32"
        is_full = self.full_precision is not None and self.full_precision(
            ".".join(map(str, keys)), weight
        )
        return "float32" if is_full else "int8"

    def storage(self, slot: str, state: str, dtype: mx.Dtype) -> Storage | None:
        """Of a slot of a leaf with this kind of state and dtype; None where it has none."""
        if slot == MASTER:
            return RESTS[self.master_weight_bits or 24] if dtype in HALVES else None
        if slot in (EMA, GRADIENT_SUM):
            dtype_name = self.ema if slot == EMA else self.gradient_sum
            return Values(getattr(mx, dtype_name or "float32"), True)
        has_sign = slot not in self.unsigned
        return Codes(has_sign) if state == "int8" else Values(getattr(mx, state), has_sign)


def num_blocks(shape: tuple[int, ...]) -> int:
    return -(-prod(shape) // BLOCK)


def in_blocks(value: mx.array) -> mx.array:
    """The elements of an array, padded with zeros, as rows of a flat array.

    A dimension is an int32, so a large array must not become one-dimensional on the way.
    """
    rest = value.size % BLOCK
    if rest == 0:
        return value.reshape(value.size // BLOCK, BLOCK)
    return mx.pad(value.reshape(-1), (0, BLOCK - rest)).reshape(-1, BLOCK)


def from_blocks(rows: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The array of this shape that `in_blocks` laid out."""
    if rows.size == prod(shape):
        return rows.reshape(shape)
    return rows.reshape(-1)[: prod(shape)].reshape(shape)
