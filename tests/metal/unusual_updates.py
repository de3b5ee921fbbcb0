"""Updates that no step has: of three states, of a storage that shows its key, and far into memory.

The tests of the kernels run them, and those of the mistakes in them.
"""

import mmap
import struct
from itertools import product
from types import SimpleNamespace
from typing import Any

import arguments as args
import kernel_text
import mlx.core as mx
import numpy as np
from advances import Group, run_advance
from block_reference import rounding_keys
from cases import Case, random_values
from flatstep import _ext
from numpy.typing import NDArray
from updates import BFLOAT, FLOAT, HALF, Leaf, Type, Update, make_leaf

# The rule of kernels/extra.metal: all the state that there is room for, each in a storage that its
# neighbours do not have.
THREE = [BFLOAT, FLOAT, HALF, BFLOAT]
# Each hyperparameter is four floats: value, what is left to 1, the logarithm in two.
THREE_STATES = [
    SimpleNamespace(type="ThreeStates", num_states=3, groups=[struct.pack("32f", *numbers)])
    for numbers in (range(32), range(32, 64))
]


def check_three_states(library: Any) -> None:
    """Every state has its constants and its storage. Small whole numbers, so all is exact."""
    rng = np.random.default_rng(18)
    leaves = [make_leaf("aligned", (n,), FLOAT, rng) for n in (5, 66, 7)]
    rate, step = 2.0, 3
    update = Update((), leaves, THREE, step=step, learning_rate=rate, rules=THREE_STATES)
    start = [5, 1, 2, 3]  # p and the state
    for number, leaf in enumerate(leaves):
        leaf.memory[:] = rng.integers(-1, 2, leaf.size)
        for stored, (array, at), value in zip(THREE, update.places(number), start, strict=True):
            array[at : at + leaf.size] = stored.encode(np.full(leaf.size, value))
    update.p_in[:] = update.p_out
    update.run(library)
    for number, leaf in enumerate(leaves):
        h = np.frombuffer(THREE_STATES[number % 2].groups[0], np.float32).reshape(8, 4)
        g = leaf.values
        thirds = [h[3, 2], h[4, 3], h[5, 2]]
        changes = [rate * g + h[6, 0] + step]
        changes += [h[k, 0] * g + h[k, 1] + thirds[k] for k in range(3)]
        for k, (array, at) in enumerate(update.places(number)):
            got = THREE[k].decode(array[at : at + leaf.size])
            np.testing.assert_array_equal(got, start[k] + changes[k])


# What a storage of kernels/extra.metal stores is what its store is given.
KEYED = Type("Keyed", "u4", mx.uint32)


def check_keys(library: Any) -> None:
    """Of the step, the seed, the leaf, the array, and of the element's number in the leaf."""
    rng = np.random.default_rng(22)
    leaves = [make_leaf(layout, (5, 7), FLOAT, rng) for layout in ("aligned", "transposed")]
    step, seed = (3 << 32) + 5, 12345
    update = Update(Case("SGD", {"momentum": 0.9}), leaves, [KEYED], step=step)
    update.state_offsets = [64, (1 << 32) + 192]
    update.state = [reserved_array((1 << 32) + 256).view("u4")]
    update.run(library, seed=seed)
    for leaf_number, leaf in enumerate(leaves):
        for number, (array, at) in enumerate(update.places(leaf_number)):
            expected = rounding_keys(leaf.size, step, seed, str(leaf_number), number)
            np.testing.assert_array_equal(array[at : at + leaf.size], expected)


# For the rule of kernels/extra.metal that makes something of a zero.
SHIFTED = ["Bfloat16And8", "SignedCodes"]


def check_tails(library: Any) -> None:
    """Past the end of a leaf codes and rests are zero, and nothing counts in a checksum."""
    by, size = 1.0 + 2.0**-14, 70
    groups = [struct.pack("32f", by, *[0.0] * 31)]
    shift = SimpleNamespace(type="Shift", num_states=1, groups=groups)
    constants, _ = run_advance(library, [Group(shift)], {"step": 0, "learning_rate": 0.0})
    p = np.zeros(size, np.uint16)
    codes, rests = np.zeros((2, 2, 68), np.uint8)
    segment = np.zeros(1, args.SEGMENT)
    segment["size"] = size
    spare = np.zeros(0, np.uint8)
    buffers: dict[int, Any] = dict.fromkeys(range(args.FIRST_SOURCE + args.MAX_SOURCES), spare)
    buffers |= {args.P_IN: p, args.P_OUT: p, args.STATE: codes, args.RESTS: rests}
    buffers |= {args.CONSTANTS: constants, args.SEGMENTS: segment}
    buffers |= {args.FIRST_SOURCE: np.zeros(size, np.float32)}
    buffers[args.DISPATCH] = np.array([(1, 1, 1)], args.DISPATCH_ARGUMENTS)
    buffers[args.DIMENSIONS] = np.zeros(1, args.DIMENSION)
    kernel = kernel_text.update("Shift", True, SHIFTED)
    for _ in range(2):
        library.run(kernel, threadgroups=(1,), threads=(args.THREADS,), buffers=buffers)
    for blocks in (codes, rests):
        assert blocks.reshape(-1)[: 64 + 4].any() and not blocks[1, 6:64].any()
    padded = mx.array(np.pad(p, (0, 128 - size)).reshape(2, 64)).view(mx.bfloat16)
    weights = _ext.load_split(padded, mx.array(rests), _ext.Rounding.KEEP_8_BITS)
    np.testing.assert_array_equal(np.array(weights).reshape(-1)[:size], np.float32(2 * by))


def reserved_array(size: int) -> NDArray[np.float32]:
    """Zeros whose pages come with the first touch."""
    no_reserve = 0x4000  # Python names it only since 3.12
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, size * 4, flags=flags), np.float32)


FAR = Case("AdamW", {"weight_decay": 0.1, "bias_correction": True})


def check_far_segment(library: Any, layout: str) -> None:
    """A segment billions of elements into its flat arrays is updated as one at their start."""
    leaf = make_leaf(layout, (7, 10), FLOAT, np.random.default_rng(12))
    near = Update(FAR, [leaf], [FLOAT])
    near.run(library)
    far = Update(FAR, [leaf], [FLOAT])
    p_at, state_at = (1 << 32) + 64, (1 << 33) + 128

    def moved(array: NDArray[Any], old_at: int, new_at: int) -> NDArray[Any]:
        reserved = reserved_array(new_at + 128)
        reserved[new_at : new_at + 70] = array[old_at : old_at + 70]
        return reserved

    far.p_in, far.p_out = moved(far.p_in, 0, p_at), moved(far.p_out, 0, p_at)
    far.state = [moved(array, 128, state_at) for array in far.state]
    far.p_offsets, far.state_offsets = [p_at], [state_at]
    far.run(library)
    np.testing.assert_array_equal(far.p_out[p_at : p_at + 70], near.p_out[:70])
    for new, old in zip(far.state, near.state, strict=True):
        np.testing.assert_array_equal(new[state_at : state_at + 70], old[128:198])


def check_far_source(library: Any, layout: int) -> None:
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
    update = Update(FAR, [Leaf(memory, 0, FLOAT, layout, shape, strides)], [FLOAT])
    update.run(library)
    update.check()


def check_far_group(library: Any, layout: int) -> None:
    """The threadgroups at the end of a leaf of billions of elements, and no others."""
    columns = 64
    rows = (1 << 27) + args.TILE_ROWS  # times the columns: more than 2^33 elements
    size = rows * columns
    last = args.THREADS * args.RUN  # how many elements the last threadgroup has
    if layout == args.TILED:
        last = args.TILE_ROWS * args.TILE_COLUMNS
    shape, strides = (size,), ()
    if layout != args.ALIGNED and layout != args.UNALIGNED:
        shape, strides = (rows, columns), (1, rows)
    first_of_last = size - last
    # Elements of the last pass, and where their gradients lie.
    index = np.arange(first_of_last, size)
    # The last tile is as wide as the leaf.
    source_index = index // columns + index % columns * rows if strides else index
    rng = np.random.default_rng(16)
    memory = reserved_array(size)
    memory[source_index] = random_values(last, rng)
    leaf = Leaf(memory, 0, FLOAT, layout, shape, strides)
    small = make_leaf("aligned", (last,), FLOAT, rng)
    small.memory[:] = memory[source_index]
    near = Update(FAR, [small], [FLOAT], state_start=0)
    near.run(library)
    far = Update(FAR, [small], [FLOAT], state_start=0)
    far.leaves = [leaf]

    def scattered(array: NDArray[Any]) -> NDArray[Any]:
        reserved = reserved_array(size)
        reserved[index] = array[:last]
        return reserved

    far.p_in, far.p_out = scattered(far.p_in), scattered(far.p_out)
    far.state = [scattered(array) for array in far.state]
    far.run(library, first_group=size // last - 1)
    for new, old in zip((far.p_out, *far.state), (near.p_out, *near.state), strict=True):
        np.testing.assert_array_equal(new[index], old[:last])


def check_far_source_offset(library: Any) -> None:
    """A gradient that lies billions of bytes into a buffer."""
    leaf = make_leaf("aligned", (70,), FLOAT, np.random.default_rng(17))
    first = (1 << 31) + 64
    memory = reserved_array(first + 70)
    memory[first:] = leaf.memory
    part = Leaf(memory, first, FLOAT, args.ALIGNED, (70,), (), is_part=True)
    update = Update(FAR, [part], [FLOAT])
    update.run(library)
    update.check()
