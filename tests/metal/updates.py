"""A dispatch of the update kernel, made from leaves of any layout, and held to the reference."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import arguments as args
import mlx.core as mx
import numpy as np
import reference
from cases import Case, random_values
from flatstep.diagnosis.formulas import allowed_ulps
from numpy.typing import NDArray
from simulator import bfloat16_bits, from_bfloat16_bits, guarded_array

BLOCK = 64


class Type(NamedTuple):
    """A type that is stored: as the kernels spell it, as NumPy holds it, as MLX names it."""

    name: str
    held: str
    dtype: mx.Dtype
    number: int  # in SourceType

    def encode(self, values: NDArray[Any]) -> NDArray[Any]:
        if self.name == "bfloat":
            return bfloat16_bits(values)
        with np.errstate(over="ignore"):
            return np.asarray(values, np.float32).astype(self.held)

    def decode(self, stored: NDArray[Any]) -> NDArray[np.float64]:
        values = from_bfloat16_bits(stored) if self.name == "bfloat" else stored
        return values.astype(np.float64)

    def to_mx(self, stored: NDArray[Any]) -> mx.array:
        return mx.array(np.ascontiguousarray(stored)).view(self.dtype)


FLOAT = Type("float", "f4", mx.float32, 0)
HALF = Type("half", "f2", mx.float16, 1)
BFLOAT = Type("bfloat", "u2", mx.bfloat16, 2)
TYPES = [FLOAT, HALF, BFLOAT]

# What a gap between segments holds: never a value, so that a write there is seen.
CANARY = {"f4": np.float32(-12345.5), "f2": np.float16(-1234.5), "u2": np.uint16(0xC640)}


@dataclass
class Leaf:
    """A leaf's gradient as it lies in memory, exactly as large as it has to be."""

    memory: NDArray[Any]
    first: int  # where its first element lies
    type: Type
    layout: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements; only of what is not contiguous

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def bound(self) -> NDArray[Any]:
        return self.memory[self.first :]

    @property
    def values(self) -> NDArray[np.float64]:
        index = np.full(self.shape, self.first, np.int64)
        strides = self.strides or np.cumprod((1, *self.shape[:0:-1]))[::-1]
        for axis, stride in enumerate(strides):
            along = np.arange(self.shape[axis]) * int(stride)
            index += along.reshape([-1 if a == axis else 1 for a in range(len(self.shape))])
        return self.type.decode(self.memory[index.reshape(-1)])


def make_leaf(layout: str, shape: tuple[int, ...], stored: Type, rng: np.random.Generator) -> Leaf:
    """`layout`: aligned, unaligned, transposed (the last two dimensions), sliced or broadcast."""
    size = int(np.prod(shape))
    first, strides, kind = 0, (), args.ALIGNED
    extent = size
    if layout == "unaligned":
        first, kind, extent = 1, args.UNALIGNED, size + 1
    elif layout == "transposed":
        rows = shape[-2]
        outer = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape) - 2))
        strides, kind = (*outer, 1, rows), args.TILED
    elif layout == "sliced":
        pitch = shape[-1] + 3
        outer = tuple(int(np.prod(shape[i + 1 : -1])) * pitch for i in range(len(shape) - 1))
        strides, kind = (*outer, 1), args.STRIDED
        extent = (int(np.prod(shape[:-1])) - 1) * pitch + shape[-1]
    elif layout == "broadcast":
        strides, kind, extent = (0,) * len(shape), args.STRIDED, 1
    memory = guarded_array(extent, stored.held, at="start")
    memory[:] = stored.encode(random_values(extent, rng))
    return Leaf(memory, first, stored, kind, shape, strides)


def kernel_rule(case: Case) -> str:
    """The rule as metal/update.metal names it."""
    if case.rule != "SGD":
        return "Adam"
    flags = ("weight_decay", "momentum", "nesterov")
    return f"Sgd<{', '.join(str(bool(case.arguments.get(flag))).lower() for flag in flags)}>"


class Update:
    """Flat arrays with gaps between the leaves, and the tables of one dispatch over them."""

    def __init__(
        self,
        case: Case,
        leaves: Sequence[Leaf],
        types: tuple[Type, Type, Type],  # of p, m and v
        *,
        step: int = 0,
        schedule: tuple[Any, ...] = (),
        learning_rate: float = 2.2e-3,
        seed: int = 0,
        p_start: int = 0,
        state_start: int = 2 * BLOCK,
    ) -> None:
        self.case, self.leaves, self.types = case, leaves, types
        self.step, self.learning_rate = step, float(np.float32(learning_rate))
        if schedule:
            self.learning_rate = float(np.float32(reference.schedule_value(schedule, step)))
        rng = np.random.default_rng(seed)
        self.p_offsets = self._offsets(p_start)
        self.state_offsets = self._offsets(state_start)
        p, m, v = types
        self.p_in = self._flat(p, self.p_offsets, rng)
        self.p_out = np.full(self.p_in.size, CANARY[p.held])
        self.m = self._flat(m, self.state_offsets, rng)
        self.v = self._flat(v, self.state_offsets, rng, positive=True)
        self.before = {"p": self.p_in.copy(), "m": self.m.copy(), "v": self.v.copy()}
        self.reads_step = bool(schedule) or case.arguments.get("bias_correction", False)
        a = {**case.arguments}
        if case.rule == "AdamW":
            a.setdefault("weight_decay", 0.01)
        self.constants = args.step_arguments(
            args.hyperparameters(**a), args.schedule(*schedule), self.reads_step
        )

    def _offsets(self, start: int) -> list[int]:
        offsets = []
        for leaf in self.leaves:
            offsets.append(start)
            start += -(-leaf.size // BLOCK) * BLOCK
        return offsets

    def _flat(
        self, stored: Type, offsets: list[int], rng: np.random.Generator, positive: bool = False
    ) -> NDArray[Any]:
        size = offsets[-1] + -(-max(self.leaves[-1].size, 1) // BLOCK) * BLOCK
        flat = guarded_array(size, stored.held, at="start")
        flat[:] = CANARY[stored.held]
        for leaf, offset in zip(self.leaves, offsets, strict=True):
            values = random_values(leaf.size, rng)
            flat[offset : offset + leaf.size] = stored.encode(
                np.abs(values) if positive else values
            )
        return flat

    def tables(self, passes: int) -> tuple[args.Struct, args.Struct, args.Struct, int]:
        """The dispatch's arguments, segments and dimensions, and how many threadgroups it has."""
        segments = np.zeros(len(self.leaves), args.SEGMENT)
        dimensions: list[tuple[int, int]] = []
        groups = 0
        for number, leaf in enumerate(self.leaves):
            work = -(-leaf.size // (args.THREADS * args.RUN))
            own = list(zip(leaf.shape, leaf.strides, strict=True)) if leaf.strides else []
            if leaf.layout == args.TILED:
                *outer, rows, columns = leaf.shape
                work = -(-rows // args.TILE) * -(-columns // args.TILE) * int(np.prod(outer))
            segments[number] = (
                leaf.size,
                self.p_offsets[number],
                self.state_offsets[number],
                groups,
                leaf.type.number,
                leaf.layout,
                len(dimensions),
                len(own),
                0,
            )
            dimensions += own
            groups += -(-work // passes)
        arguments = np.zeros((), args.DISPATCH_ARGUMENTS)
        arguments["num_segments"], arguments["passes"] = len(self.leaves), passes
        table = np.array(dimensions or [(0, 0)], args.DIMENSION)
        return arguments, segments, table, groups

    def _ranges(self, offsets: list[int], flat: NDArray[Any]) -> list[tuple[int, int]]:
        """The bytes of the segments: all that may be touched of a flat array."""
        size = flat.itemsize
        return [
            (at * size, (at + leaf.size) * size)
            for at, leaf in zip(offsets, self.leaves, strict=True)
        ]

    def run(
        self,
        library: Any,
        kernel: str,
        *,
        passes: int = 1,
        threads: int = args.THREADS,
        in_place: bool = False,
        order: str = "forward",
        check_memory: bool = True,
        flush_to_zero: bool = False,
        first_group: int = 0,
    ) -> None:
        """Runs the kernel, which may touch the leaves' own bytes and nothing else.

        `first_group`: leaves out the threadgroups of the first leaf before it.
        """
        arguments, segments, dimensions, groups = self.tables(passes)
        if first_group:
            segments["first_group"][0] = np.uint32(-first_group % (1 << 32))
            groups -= first_group
        if in_place:
            self.p_out[:] = self.p_in
        p_in = self.p_out if in_place else self.p_in
        self.constants["p_in_place"] = in_place
        spare = np.zeros(0, np.uint8)
        buffers = {
            args.P_IN: p_in,
            args.P_OUT: self.p_out,
            args.M: self.m,
            args.V: self.v,
            args.STEP: np.array([self.step], np.uint64) if self.reads_step else spare,
            args.LEARNING_RATE: np.array([self.learning_rate], np.float32),
            args.CONSTANTS: np.array([self.constants]),
            args.DISPATCH: np.array([arguments]),
            args.SEGMENTS: segments,
            args.DIMENSIONS: dimensions,
        }
        if self.constants["schedule"]["num_pieces"]:
            buffers[args.LEARNING_RATE] = spare
        for number in range(args.MAX_SOURCES):
            source = self.leaves[number].bound if number < len(self.leaves) else spare
            buffers[args.FIRST_SOURCE + number] = source
        p_ranges = self._ranges(self.p_offsets, self.p_in)
        m_ranges = self._ranges(self.state_offsets, self.m)
        v_ranges = self._ranges(self.state_offsets, self.v)
        slots = self.case.slots if self._has_state() else ()
        touched = {
            args.P_OUT: p_ranges,
            args.M: m_ranges if "m" in slots else [],
            args.V: v_ranges if "v" in slots else [],
        }
        library.run(
            kernel,
            threadgroups=(groups,),
            threads=(threads,),
            buffers=buffers,
            readable={**touched, args.P_IN: p_ranges},
            writable=touched,
            order=order,
            check_memory=check_memory,
            flush_to_zero=flush_to_zero,
        )

    def _has_state(self) -> bool:
        return self.case.rule != "SGD" or self.case.arguments.get("momentum", 0) > 0

    def check(self) -> None:
        """Every leaf is what float64 says, and the gaps are as they were."""
        for number, leaf in enumerate(self.leaves):
            arrays = {"g": leaf.values}
            for slot, offsets in self._slots():
                stored = self.types["pmv".index(slot)]
                at = offsets[number]
                arrays[slot] = stored.decode(self.before[slot][at : at + leaf.size])
            a = self.case.arguments
            terms = reference.RULES[self.case.rule](arrays, self.learning_rate, self.step + 1, **a)
            for slot, offsets in self._slots():
                if slot != "p" and slot not in self.case.slots:
                    continue
                stored, at = self.types["pmv".index(slot)], offsets[number]
                got = (self.p_out if slot == "p" else getattr(self, slot))[at : at + leaf.size]
                result = stored.to_mx(got)
                ulps = allowed_ulps(self.case.rule, slot, result.dtype)
                reference.assert_sum(result, terms[slot], ulps)
        for slot, offsets in self._slots():
            flat = self.p_out if slot == "p" else getattr(self, slot)
            gap = np.ones(flat.size, bool)
            for leaf, at in zip(self.leaves, offsets, strict=True):
                gap[at : at + leaf.size] = False
            assert (flat[gap] == CANARY[flat.dtype.str[1:]]).all(), f"{slot} was written in a gap"

    def _slots(self) -> list[tuple[str, list[int]]]:
        return [("p", self.p_offsets), ("m", self.state_offsets), ("v", self.state_offsets)]


def reserved_array(size: int) -> NDArray[np.float32]:
    """Zeros whose pages come with the first touch."""
    no_reserve = 0x4000  # Python names it only since 3.12
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, size * 4, flags=flags), np.float32)


FAR = Case("AdamW", {"weight_decay": 0.1, "bias_correction": True})


def check_far_segment(library: Any, kernel: str, layout: str) -> None:
    """A segment billions of elements into its flat arrays is updated as one at their start."""
    leaf = make_leaf(layout, (7, 10), FLOAT, np.random.default_rng(12))
    near = Update(FAR, [leaf], (FLOAT,) * 3)
    near.run(library, kernel)
    far = Update(FAR, [leaf], (FLOAT,) * 3)
    p_at, state_at = (1 << 32) + 64, (1 << 33) + 128
    where = {"p_in": (0, p_at), "p_out": (0, p_at), "m": (128, state_at), "v": (128, state_at)}
    for name, (old_at, new_at) in where.items():
        reserved = reserved_array(new_at + 128)
        reserved[new_at : new_at + 70] = getattr(far, name)[old_at : old_at + 70]
        setattr(far, name, reserved)
    far.p_offsets, far.state_offsets = [p_at], [state_at]
    far.run(library, kernel)
    for name, (old_at, new_at) in where.items():
        np.testing.assert_array_equal(
            getattr(far, name)[new_at : new_at + 70], getattr(near, name)[old_at : old_at + 70]
        )


def check_far_source(library: Any, kernel: str, layout: int) -> None:
    """A gradient whose elements lie billions apart is read where they are, also in later tiles."""
    far, outer = (1 << 31) + 7, 40
    shape = (2, 3, 5) if layout == args.STRIDED else (2, outer, 35)
    strides = (far * 40, far, 1) if layout == args.STRIDED else (far * 40, 1, far)
    memory = reserved_array(far * 80)
    rng = np.random.default_rng(13)
    rows = range(shape[1] if layout == args.STRIDED else shape[2])
    length = shape[2] if layout == args.STRIDED else shape[1]
    for matrix, row in product(range(2), rows):
        start = matrix * strides[0] + row * far
        memory[start : start + length] = random_values(length, rng)
    update = Update(FAR, [Leaf(memory, 0, FLOAT, layout, shape, strides)], (FLOAT,) * 3)
    update.run(library, kernel)
    update.check()


def check_far_group(library: Any, kernel: str, layout: int) -> None:
    """The threadgroups at the end of a leaf of billions of elements, and no others."""
    columns = 64
    rows = (1 << 27) + args.TILE  # times the columns: more than 2^33 elements
    size = rows * columns
    last = args.THREADS * args.RUN  # how many elements the last threadgroup has
    shape, strides = (size,), ()
    if layout != args.ALIGNED and layout != args.UNALIGNED:
        shape, strides = (rows, columns), (1, rows)
    first_of_last = size - last
    # Elements of the last pass, and where their gradients lie.
    index = np.arange(first_of_last, size)
    if layout == args.TILED:  # the last tile: 32 rows of the last 32 columns
        row, column = np.divmod(np.arange(args.TILE**2), args.TILE)
        index = (rows - args.TILE + row) * columns + columns - args.TILE + column
    source_index = index // columns + index % columns * rows if strides else index
    rng = np.random.default_rng(16)
    memory = reserved_array(size)
    memory[source_index] = random_values(last, rng)
    leaf = Leaf(memory, 0, FLOAT, layout, shape, strides)
    small = make_leaf("aligned", (last,), FLOAT, rng)
    small.memory[:] = memory[source_index]
    near = Update(FAR, [small], (FLOAT,) * 3, state_start=0)
    near.run(library, kernel)
    far = Update.__new__(Update)
    far.__dict__.update(near.__dict__)
    far.leaves = [leaf]
    for name in ("p_in", "p_out", "m", "v"):
        reserved = reserved_array(size)
        reserved[index] = near.before[name[0]][:last]
        setattr(far, name, reserved)
    work = size // last if layout != args.TILED else rows // args.TILE * columns // args.TILE
    far.run(library, kernel, first_group=work - 1)
    for name in ("p_out", "m", "v"):
        np.testing.assert_array_equal(getattr(far, name)[index], getattr(near, name)[:last])
