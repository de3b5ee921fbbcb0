"""A dispatch of the update kernel, made from leaves of any layout, and held to the reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import arguments as args
import flatstep
import kernel_text
import mlx.core as mx
import numpy as np
import reference
from advances import Group, Rule, run_advance
from block_reference import hash_of
from cases import Case, random_values
from flatstep.diagnosis.formulas import allowed_ulps
from numpy.typing import NDArray
from simulator import bfloat16_bits, from_bfloat16_bits, guarded_array

BLOCK = 64


class Type(NamedTuple):
    """A storage: as the kernels spell it, as NumPy holds it, as MLX names it."""

    name: str
    held: str
    dtype: mx.Dtype

    @property
    def number(self) -> int:
        return kernel_text.STORAGES.index(self.name)

    def encode(self, values: NDArray[Any]) -> NDArray[Any]:
        if self.dtype == mx.bfloat16:
            return bfloat16_bits(values)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(values, np.float32).astype(self.held)

    def decode(self, stored: NDArray[Any]) -> NDArray[np.float64]:
        values = from_bfloat16_bits(stored) if self.dtype == mx.bfloat16 else stored
        return values.astype(np.float64)

    def to_mx(self, stored: NDArray[Any]) -> mx.array:
        return mx.array(np.ascontiguousarray(stored)).view(self.dtype)


FLOAT = Type("Float32", "f4", mx.float32)
HALF = Type("Float16", "f2", mx.float16)
BFLOAT = Type("Bfloat16", "u2", mx.bfloat16)
TYPES = [FLOAT, HALF, BFLOAT]


def types_of(types: Sequence[Type], num_states: int) -> list[Type]:
    """Of p and the state, where the last given is that of all that follow."""
    return [*types, *types[-1:] * num_states][: 1 + num_states]


# What a gap between segments holds: never a value, so that a write there is seen.
CANARY = {
    "f4": np.float32(-12345.5),
    "f2": np.float16(-1234.5),
    "u2": np.uint16(0xC640),
    "u4": np.uint32(0xC640C640),
}


@dataclass
class Leaf:
    """A leaf's gradient as it lies in memory, exactly as large as it has to be."""

    memory: NDArray[Any]
    first: int  # where its first element lies
    type: Type
    layout: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements; only of what is not contiguous
    is_part: bool = False  # of memory that other leaves lie in too

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

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


def flat_leaves(leaves: Sequence[Leaf]) -> list[Leaf]:
    """The same values in one buffer, as a backward pass may leave them."""
    stored = leaves[0].type
    starts = np.cumsum([0, *[-(-leaf.size // BLOCK) * BLOCK for leaf in leaves]])
    memory = np.zeros(starts[-1], stored.held)
    for leaf, start in zip(leaves, starts[:-1], strict=True):
        memory[start : start + leaf.size] = stored.encode(leaf.values)
    return [
        Leaf(memory, int(start), stored, args.ALIGNED, leaf.shape, (), is_part=True)
        for leaf, start in zip(leaves, starts[:-1], strict=True)
    ]


def rule_of(case: Case) -> Any:
    """The engine's rule, whose struct in csrc/rules.h is its `type`."""
    return case.make(flatstep).rule()


class Update:
    """Flat arrays with gaps between the leaves, and the tables of one dispatch over them.

    The leaves take turns in as many groups of parameters as there are cases, all of one rule.
    """

    def __init__(
        self,
        case: Case | Sequence[Case],
        leaves: Sequence[Leaf],
        types: Sequence[Type],  # see types_of
        *,
        step: int = 0,
        schedule: tuple[Any, ...] = (),
        learning_rate: float = 2.2e-3,
        seed: int = 0,
        p_start: int = 0,
        state_start: int = 2 * BLOCK,
        rules: Sequence[Rule] = (),  # instead of those of the cases
        settings: args.Struct | None = None,
        scalars: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = args.settings() if settings is None else settings
        self.scalars = scalars or {}
        self.cases = [case] if isinstance(case, Case) else list(case)
        self.rules = rules or [rule_of(case) for case in self.cases]
        self.leaves, self.step, self.schedule = leaves, step, schedule
        self.learning_rate = float(np.float32(learning_rate))
        if schedule:
            self.learning_rate = float(np.float32(reference.schedule_value(schedule, step)))
        rng = np.random.default_rng(seed)
        self.p_offsets = self._offsets(p_start)
        self.state_offsets = self._offsets(state_start)
        count = self.rules[0].num_states
        self.types = types_of(types, count)
        self.slots = self.cases[0].slots[:count] if self.cases else ("",) * count
        self.p_in = self._flat(self.types[0], self.p_offsets, rng)
        self.p_out = np.full(self.p_in.size, CANARY[self.types[0].held])
        self.state = [
            self._flat(stored, self.state_offsets, rng, positive=slot == "v")
            for stored, slot in zip(self.types[1:], self.slots, strict=True)
        ]
        self.before = [array.copy() for array in (self.p_in, *self.state)]

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

    def sources(self) -> tuple[list[NDArray[Any]], list[tuple[int, int]]]:
        """The buffers of the gradients, and of each leaf which it is and where in bytes."""
        sources: list[NDArray[Any]] = []
        places = []
        for leaf in self.leaves:
            if not leaf.is_part or not any(leaf.memory is source for source in sources):
                sources.append(leaf.memory if leaf.is_part else leaf.memory[leaf.first :])
            offset = leaf.first * leaf.memory.itemsize if leaf.is_part else 0
            places.append((len(sources) - 1, offset))
        return sources, places

    def tables(self, passes: int) -> tuple[args.Struct, args.Struct, args.Struct, int]:
        """The dispatch's arguments, segments and dimensions, and how many threadgroups it has."""
        segments = np.zeros(len(self.leaves), args.SEGMENT)
        dimensions: list[tuple[int, int]] = []
        groups = 0
        for number, (leaf, place) in enumerate(zip(self.leaves, self.sources()[1], strict=True)):
            work = -(-leaf.size // (args.THREADS * args.RUN))
            own = list(zip(leaf.shape, leaf.strides, strict=True)) if leaf.strides else []
            if leaf.layout == args.TILED:
                *outer, rows, columns = leaf.shape
                work = -(-rows // args.TILE_ROWS) * -(-columns // args.TILE_COLUMNS)
                work *= int(np.prod(outer))
            segments[number] = (
                leaf.size,
                self.p_offsets[number],
                self.state_offsets[number],
                place[1],
                place[0],
                number % len(self.rules),
                groups,
                self.source_type(leaf).number,
                leaf.layout,
                len(dimensions),
                len(own),
                hash_of(str(number)),
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
        rule: str = "",  # instead of the cases' rule
        *,
        has_tiles: bool = True,
        passes: int = 1,
        threads: int = args.THREADS,
        in_place: bool = False,
        order: str = "forward",
        check_memory: bool = True,
        flush_to_zero: bool = False,
        first_group: int = 0,
        seed: int = 0,
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
        arguments["p_in_place"] = in_place
        spare = np.zeros(0, np.uint8)
        buffers = dict.fromkeys(range(args.FIRST_SOURCE + args.MAX_SOURCES), spare)
        buffers[args.P_IN] = self.p_out if in_place else self.p_in
        buffers[args.P_OUT] = self.p_out
        buffers |= dict(zip(self.indices(), self.state, strict=True))
        if rule != "Copy":
            buffers[args.CONSTANTS] = self.constants(library, seed)
        buffers[args.DISPATCH] = np.array([arguments])
        buffers[args.SEGMENTS] = segments
        buffers[args.DIMENSIONS] = dimensions
        for number, source in enumerate(self.sources()[0]):
            buffers[args.FIRST_SOURCE + number] = source
        p_ranges = self._ranges(self.p_offsets, self.p_in)
        touched = {args.P_OUT: p_ranges}
        more = self.more_buffers()
        buffers |= more
        for index, array in [*zip(self.indices(), self.state, strict=True), *more.items()]:
            touched[index] = self._ranges(self.state_offsets, array)
        library.run(
            self.kernel(rule, has_tiles),
            threadgroups=(groups,),
            threads=(threads,),
            buffers=buffers,
            readable={**touched, args.P_IN: [] if rule == "Copy" else p_ranges},
            writable=touched,
            order=order,
            check_memory=check_memory,
            flush_to_zero=flush_to_zero,
        )

    def constants(self, library: Any, seed: int) -> NDArray[np.uint32]:
        scalars = {"step": self.step, "learning_rate": self.learning_rate, **self.scalars}
        settings = self.settings.copy()
        settings["seed"] = seed
        groups = [Group(rule) for rule in self.rules]
        return run_advance(library, groups, scalars, schedule=self.schedule, settings=settings)[0]

    def source_type(self, leaf: Leaf) -> Type:
        return leaf.type

    def more_buffers(self) -> dict[int, NDArray[Any]]:
        """What lies as the state does, by the index that it is bound to."""
        return {}

    def indices(self) -> list[int]:
        """Of the buffers of the state."""
        return [args.STATE + k for k in range(len(self.state))]

    def kernel(self, rule: str = "", has_tiles: bool = True) -> str:
        names = [stored.name for stored in self.types]
        return kernel_text.update(rule or self.rules[0].type, has_tiles, names)

    def check(self) -> None:
        """Every leaf is what float64 says, and the gaps are as they were."""
        for number, leaf in enumerate(self.leaves):
            case = self.cases[number % len(self.cases)]
            # The formula of a rule that keeps state at times asks for it at all times.
            arrays = {slot: np.zeros(leaf.size) for slot in case.slots}
            arrays["g"] = leaf.values
            places = self.places(number)
            arrays_of_leaf = list(zip(("p", *self.slots), self.types, places, strict=True))
            for (slot, stored, (_, at)), before in zip(arrays_of_leaf, self.before, strict=True):
                arrays[slot] = stored.decode(before[at : at + leaf.size])
            terms = reference.RULES[case.rule](
                arrays, self.learning_rate, self.step + 1, **case.arguments
            )
            for slot, stored, (after, at) in arrays_of_leaf:
                result = stored.to_mx(after[at : at + leaf.size])
                reference.assert_sum(result, terms[slot], allowed_ulps(slot))
        self.check_gaps()

    def check_gaps(self) -> None:
        offsets = [self.p_offsets, *[self.state_offsets] * len(self.state)]
        for flat, starts in zip((self.p_out, *self.state), offsets, strict=True):
            gap = np.ones(flat.size, bool)
            for leaf, at in zip(self.leaves, starts, strict=True):
                gap[at : at + leaf.size] = False
            assert (flat[gap] == CANARY[flat.dtype.str[1:]]).all(), "a gap was written"

    def places(self, leaf: int) -> list[tuple[NDArray[Any], int]]:
        """What was written, p and each state, and where the leaf lies in it."""
        states = [(array, self.state_offsets[leaf]) for array in self.state]
        return [(self.p_out, self.p_offsets[leaf]), *states]
