"""Dispatches of the sum of squares over sources of any layout, held to float64."""

from collections.abc import Mapping, Sequence
from typing import Any

import arguments as args
import numpy as np
from numpy.typing import NDArray
from simulator import guarded_array
from updates import BFLOAT, FLOAT, HALF, TYPES, Leaf, make_leaf

# Of the norm. A dozen and a half roundings of 2^-24 on the way to the sum, of which the root has
# half.
TOLERANCE = 1e-6
SIZES = (1, 63, 64, 65, 1023, 4097, 16_385, 40_000)


def sum_of_squares(
    library: Any,
    dispatches: Sequence[Sequence[tuple[Leaf, int, int]]],
    settings: Mapping[str, Any] | None = None,
    scalars: Mapping[str, Any] | None = None,
    *,
    threads: int = args.THREADS,
    passes: int = 3,
    order: str = "shuffled",
    check_memory: bool = True,
) -> float:
    """Of parts of leaves: a leaf, its first element, and how many."""
    scalars = scalars or {}
    arguments = np.zeros((), args.NORM_STRUCT)
    arguments["settings"] = args.settings(**(settings or {}))
    arguments["has_grad_scale"] = "grad_scale" in scalars
    arguments["has_accumulated"] = "accumulated" in scalars
    spare = np.zeros(0, np.uint8)
    own: dict[int, Any] = {
        args.NORM_GRAD_SCALE: np.array(scalars.get("grad_scale", []), np.float32).reshape(-1),
        args.NORM_ACCUMULATED: np.array(scalars.get("accumulated", []), np.uint64).reshape(-1),
        args.NORM_ARGUMENTS: np.array([arguments]),
    }
    sums = []
    for parts in dispatches:
        buffers = {args.FIRST_SOURCE + k: spare for k in range(args.MAX_SOURCES)} | own
        segments = np.zeros(len(parts), args.SEGMENT)
        dimensions: list[tuple[int, int]] = []
        groups, memories = 0, []
        for segment, (leaf, first, size) in zip(segments, parts, strict=True):
            if not memories or leaf.memory is not memories[-1]:
                memories.append(leaf.memory)
                buffers[args.FIRST_SOURCE + len(memories) - 1] = leaf.memory
            strides = list(zip(leaf.shape, leaf.strides, strict=True)) if leaf.strides else []
            segment["size"], segment["p_offset"] = size, first
            segment["source"], segment["source_offset"] = (
                len(memories) - 1,
                leaf.first * leaf.memory.itemsize,
            )
            segment["first_group"], segment["storage"] = groups, leaf.type.number
            segment["source_layout"] = leaf.layout
            segment["first_dimension"] = len(dimensions)
            segment["num_dimensions"] = len(strides)
            dimensions += strides
            groups += -(-size // (passes * args.THREADS * args.RUN))
        of_groups = np.full(groups, -1e30, np.float32)
        buffers[args.NORM_SUMS] = of_groups
        buffers[args.DISPATCH] = np.array([(len(parts), passes, 0)], args.DISPATCH_ARGUMENTS)
        buffers[args.SEGMENTS] = segments
        buffers[args.DIMENSIONS] = np.array(dimensions or [(0, 0)], args.DIMENSION)
        library.run(
            "sum_squares, 256",
            threadgroups=(groups,),
            threads=(threads,),
            buffers=buffers,
            order=order,
            check_memory=check_memory,
        )
        sums.append(of_groups)
    own[args.NORM_SUMS] = np.concatenate(sums) if sums else np.zeros(0, np.float32)
    arguments["num_sums"] = own[args.NORM_SUMS].size
    own[args.NORM_ARGUMENTS] = np.array([arguments])
    result = np.full(1, -1e30, np.float32)
    own[args.NORM_RESULT] = result
    library.run("add_sums, 256", threadgroups=(1,), threads=(threads,), buffers=own, order=order)
    return float(result[0])


def parts_of(leaves: Sequence[Leaf]) -> list[tuple[Leaf, int, int]]:
    return [(leaf, 0, leaf.size) for leaf in leaves]


def assert_norm(got: float, values: Sequence[NDArray[np.float64]]) -> None:
    expected = sum(float(np.square(v).sum()) for v in values)
    assert abs(np.sqrt(got) - np.sqrt(expected)) <= TOLERANCE * np.sqrt(expected)


def norm_leaves(rng: np.random.Generator) -> list[Leaf]:
    """Those of a layout in tiles are read as any that strides tell."""
    leaves = [
        make_leaf(layout, shape, TYPES[i % 3], rng)
        for i, (layout, shape) in enumerate(
            [
                ("aligned", (4097,)),
                ("transposed", (37, 70)),
                ("unaligned", (65,)),
                ("sliced", (5, 7, 11)),
                ("broadcast", (1311,)),
                ("transposed", (3, 33, 31)),
                ("aligned", (1,)),
            ]
        )
    ]
    for leaf in leaves:
        leaf.layout = args.STRIDED if leaf.layout == args.TILED else leaf.layout
    return leaves


def check_norms(library: Any) -> None:
    rng = np.random.default_rng(61)
    for size in SIZES:
        leaf = make_leaf("aligned", (size,), FLOAT, rng)
        for threads, passes in ((256, 1), (256, 16), (32, 3), (96, 2)):
            got = sum_of_squares(library, [parts_of([leaf])], threads=threads, passes=passes)
            assert_norm(got, [leaf.values])
    dispatches = [norm_leaves(rng) for _ in range(4)]
    got = sum_of_squares(library, [parts_of(leaves) for leaves in dispatches])
    assert_norm(got, [leaf.values for leaves in dispatches for leaf in leaves])
    assert sum_of_squares(library, []) == 0


def check_parts(library: Any) -> None:
    """Of one array, as sums of gradients are, also before they are more than one zero."""
    rng = np.random.default_rng(62)
    for layout, shape in (("aligned", (4096,)), ("broadcast", (64, 64)), ("sliced", (64, 64))):
        for stored in (FLOAT, BFLOAT):
            leaf = make_leaf(layout, shape, stored, rng)
            parts = [(0, 65), (128, 1), (192, 3000), (3968, 128)]
            got = sum_of_squares(library, [[(leaf, first, size) for first, size in parts]])
            values = [leaf.values[first : first + size] for first, size in parts]
            assert_norm(got, values)


def check_scaled_norms(library: Any) -> None:
    rng = np.random.default_rng(63)
    leaves = norm_leaves(rng)
    settings = {"clip_value": 0.4, "accumulate_steps": 4}
    for accumulated in (3, 4, 5):
        scalars = {"grad_scale": 0.7, "accumulated": accumulated}
        got = sum_of_squares(library, [parts_of(leaves)], settings, scalars)
        if accumulated < 4:
            assert got == 0
            continue
        scale = np.float32(0.7) / np.float32(accumulated)
        limit = np.float32(0.4)
        assert_norm(got, [np.clip(leaf.values * scale, -limit, limit) for leaf in leaves])


def check_nonfinite_norms(library: Any) -> None:
    """First and last of each source, whether or not clipping makes them finite."""
    rng = np.random.default_rng(64)
    for value in (np.nan, np.inf, -np.inf):
        for which in range(3):
            for at in (0, -1):
                leaves = [make_leaf("aligned", (n,), HALF, rng) for n in (3001, 1, 66)]
                leaves[which].memory[at] = value
                for limit in (np.inf, 1.0):
                    for skips in (0, 1):
                        settings = {"clip_value": limit, "skips_nonfinite": skips}
                        got = sum_of_squares(library, [parts_of(leaves)], settings)
                        if skips or np.isnan(value):
                            assert np.isnan(got)
                        else:
                            assert np.isfinite(got) if limit == 1 else np.isposinf(got)


def check_large_norms(library: Any) -> None:
    """What a float cannot hold is infinite; half a million of alike, and of small beside large."""
    leaf = make_leaf("aligned", (70,), FLOAT, np.random.default_rng(65))
    leaf.memory[:] = 3e19
    assert np.isposinf(sum_of_squares(library, [parts_of([leaf])]))
    memory = guarded_array(1 << 19, "f4", at="start")
    for first, others in ((0.1, 0.1), (1000.0, 1e-1), (1.0, 1e-4)):
        memory[:] = others
        memory[0] = first
        many = Leaf(memory, 0, FLOAT, args.ALIGNED, (memory.size,), ())
        got = sum_of_squares(library, [parts_of([many])], threads=32, passes=16, check_memory=False)
        assert_norm(got, [many.values])


CHECKS = [
    check_norms,
    check_parts,
    check_scaled_norms,
    check_nonfinite_norms,
    check_large_norms,
]
