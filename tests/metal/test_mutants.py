"""The tests of the kernels are tests: mistakes put into the kernels' text are found.

Every line that keeps a kernel within its bounds is taken out here, every barrier dropped.
"""

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import arguments as args
import numpy as np
import pytest
import simulator
from cases import Case
from mutants import mutated
from updates import (
    BFLOAT,
    FLOAT,
    HALF,
    TYPES,
    Update,
    check_far_group,
    check_far_segment,
    check_far_source,
    make_leaf,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the simulator runs on Linux")

SOURCE_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "metal_source.py"
ADAM = "Adam, half, float, bfloat, true"
SGD = "Sgd<true, true, true>, bfloat, float, float, true"
PLAIN = "Adam, float, float, float, true"

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
INSIDE_TILE = "if (r < height && c < width) {"
READ_TILE = f"uint c = i / FLATSTEP_TILE;\n      {INSIDE_TILE}"
WRITE_TILE = f"uint c = i % FLATSTEP_TILE;\n      {INSIDE_TILE}"
LOAD = "vec<T, FLATSTEP_RUN> values = *"
STORE = "vec<T, FLATSTEP_RUN> values;\n"
TAIL = "if (k < count) {\n"

LOAD_SOURCE = """Run load_source(
    const device char* source,
    constant SourceSegment& segment,
    constant SourceDimension* dimensions,
    uint64_t first,"""

# What is changed, and into what.
MUTANTS = {
    # Bounds
    "no end of the runs": ("if (first >= segment.size) {\n      return;\n    }\n", ""),
    "every run is whole": ("left < FLATSTEP_RUN ? uint(left) : FLATSTEP_RUN", "FLATSTEP_RUN"),
    "no end of the tiles": ("if (number >= num_tiles) {\n      return;\n    }\n", ""),
    "end of the tiles off by one": ("if (number >= num_tiles)", "if (number > num_tiles)"),
    "tile read past its rows": (READ_TILE, READ_TILE.replace("r < height && ", "")),
    "tile read past its columns": (READ_TILE, READ_TILE.replace(" && c < width", "")),
    "tile written past its rows": (WRITE_TILE, WRITE_TILE.replace("r < height && ", "")),
    "tile written past its columns": (WRITE_TILE, WRITE_TILE.replace(" && c < width", "")),
    "tile as high as any": (
        "uint(min(num_rows - row, uint64_t(FLATSTEP_TILE)))",
        "FLATSTEP_TILE",
    ),
    "tile as wide as any": (
        "uint(min(num_columns - column, uint64_t(FLATSTEP_TILE)))",
        "FLATSTEP_TILE",
    ),
    "whole loads in the tail": (
        f"if (count == FLATSTEP_RUN) {{\n    {LOAD}",
        f"if (true) {{\n    {LOAD}",
    ),
    "whole stores in the tail": (
        f"if (count == FLATSTEP_RUN) {{\n    {STORE}",
        f"if (true) {{\n    {STORE}",
    ),
    "tail loads too much": (
        TAIL + "        run.at[k] = float(from[k]);",
        TAIL.replace("k < count", "true") + "        run.at[k] = float(from[k]);",
    ),
    "tail stores too much": (
        TAIL + "        to[k] = T(run.at[k]);",
        TAIL.replace("k < count", "true") + "        to[k] = T(run.at[k]);",
    ),
    "source read past its end": (
        TAIL + "      int64_t offset",
        TAIL.replace("k < count", "true") + "      int64_t offset",
    ),
    "more segments than there are": ("s < num_segments", "s <= num_segments"),
    "64 bits cut to 32 in a run": (
        "uint64_t p_at = segment.p_offset + first;",
        "uint p_at = segment.p_offset + first;",
    ),
    "64 bits cut to 32 in a stride": (
        "int64_t offset = 0;",
        "int offset = 0;",
    ),
    "64 bits cut to 32 in a tile": ("int64_t column_stride =", "int column_stride ="),
    "64 bits cut to 32 in the runs": ("uint64_t first_run =", "uint first_run ="),
    "64 bits cut to 32 in a run's start": (
        "uint64_t first = (first_run",
        "uint first = uint(first_run",
    ),
    "64 bits cut to 32 in a source": (LOAD_SOURCE, LOAD_SOURCE.replace("uint64_t", "uint")),
    "64 bits cut to 32 in a tile's corner": ("int64_t corner = ", "int corner = "),
    "64 bits cut to 32 in a tile's start": (
        "uint64_t first = (uint64_t(matrix)",
        "uint first = uint(uint64_t(matrix)",
    ),
    "64 bits cut to 32 in a tile's p": (
        "uint64_t p_at = segment.p_offset + index;",
        "uint p_at = segment.p_offset + index;",
    ),
    "64 bits cut to 32 in a tile's state": (
        "uint64_t state_at = segment.state_offset + index;",
        "uint state_at = segment.state_offset + index;",
    ),
    "64-bit division cut to 32": (
        "bool is_small = (index | extent) >> 32 == 0;",
        "bool is_small = true;",
    ),
    # Barriers
    "no barrier after the constants": (
        BARRIER + "\n  Constants constants;",
        "\n  Constants constants;",
    ),
    "no barrier before a tile is used": (BARRIER + "\n    uint64_t first", "\n    uint64_t first"),
    "no barrier before the next tile": (BARRIER + "\n  }\n}", "\n  }\n}"),
    "a simdgroup's barrier": (
        BARRIER + "\n    uint64_t first",
        BARRIER.replace("threadgroup_", "simdgroup_", 1) + "\n    uint64_t first",
    ),
    # Indices
    "segment off by one": ("segments[s].first_group <= group", "segments[s].first_group < group"),
    "m and v swapped": (
        "#define FLATSTEP_M 2\n#define FLATSTEP_V 3",
        "#define FLATSTEP_M 3\n#define FLATSTEP_V 2",
    ),
    "wrong source": ("FLATSTEP_CASE(7)", "case 7: source = source6; break;"),
    "source not bound": ("#define FLATSTEP_FIRST_SOURCE 10", "#define FLATSTEP_FIRST_SOURCE 11"),
    "state where p lies": (
        "uint64_t state_at = segment.state_offset + first;",
        "uint64_t state_at = segment.p_offset + first;",
    ),
    "state of a tile where p lies": (
        "uint64_t state_at = segment.state_offset + index;",
        "uint64_t state_at = segment.p_offset + index;",
    ),
    "another source's dimensions": ("dimensions + segment.first_dimension", "dimensions"),
    "wrong dimension": ("* dimensions[d - 1].stride", "* dimensions[0].stride"),
    "tile transposed twice": (
        "tile[r * pitch + c] = load_one",
        "tile[c * pitch + r] = load_one",
    ),
    "groups overlap": (
        "uint64_t(work.group) * work.passes * FLATSTEP_THREADS",
        "uint64_t(work.group) * FLATSTEP_THREADS",
    ),
    "tiles overlap": ("work.group * work.passes + pass", "work.group + pass"),
    "threads overlap": ("run += work.num_threads", "run += work.num_threads / 2 + 1"),
    "half for bfloat": ("return load_one<bfloat>", "return load_one<half>"),
    "bfloat for half": (
        "load_aligned((const device half*)source + first, count)",
        "load_aligned((const device bfloat*)source + first, count)",
    ),
    "read in place through another buffer": ("arguments.p_in_place ? p_out : p_in", "p_in"),
    # What is prepared
    "nobody prepares": ("if (thread_index == 0) {", "if (thread_index == 1000) {"),
    "all prepare": ("if (thread_index == 0) {", "if (true) {"),
    "step before the increment": (
        "pair_from_step(steps_before + 1)",
        "pair_from_step(steps_before)",
    ),
    "schedule ignored": (
        "schedule.num_pieces > 0 ? schedule_value",
        "schedule.num_pieces > 1 ? schedule_value",
    ),
    "step not read": ("arguments.reads_step ? step[0] : 0", "0"),
    "swapped betas": (
        "s.beta1 = pair(h.beta1.hi, h.beta1.lo);",
        "s.beta1 = pair(h.beta2.hi, h.beta2.lo);",
    ),
    "swapped m and v": (
        "  e.m = rounded(m);\n  e.v = rounded(v);",
        "  e.m = rounded(v);\n  e.v = rounded(m);",
    ),
    "plain float32": ("return pair(sum, (a - a_part) + (b - b_part));", "return pair(sum, 0.0f);"),
    "advance by two": ("next_step[0] = step[0] + 1;", "next_step[0] = step[0] + 2;"),
    # Address spaces, which only the strict dialect knows
    "tile in thread memory": ("    threadgroup float* tile,", "    thread float* tile,"),
    "device pointer without device": (
        "load_one(const device char* source, uint",
        "load_one(const char* source, uint",
    ),
    "constant written": (
        "work.group = group - segment.first_group;",
        "segments[0].padding = 1; work.group = group - segment.first_group;",
    ),
    "double": ("float rate = arguments", "double rate = arguments"),
    "half from bfloat": (
        "return float(((const device T*)source)[offset]);",
        "T x = ((const device T*)source)[offset];\n  bfloat y = float(x);\n  return float(y);",
    ),
}


def kernel_text() -> str:
    script = [sys.executable, str(SOURCE_SCRIPT)]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout


def battery(text: str) -> None:
    """Raises what the tests of the kernels would raise, on fewer cases."""
    lines = [f'FLATSTEP_INSTANTIATE("{name}", {name})' for name in (ADAM, SGD, PLAIN)]
    text += "\n".join(lines) + "\n"
    simulator.check(text)
    library = simulator.build(text)
    rng = np.random.default_rng(0)
    adam = Case("AdamW", {"weight_decay": 0.1, "bias_correction": True})
    sgd = Case("SGD", {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True})
    leaves = [
        make_leaf("aligned", (9002,), FLOAT, rng),
        make_leaf("transposed", (40, 70), HALF, rng),
        make_leaf("sliced", (3, 5, 7), BFLOAT, rng),
        make_leaf("unaligned", (3,), FLOAT, rng),
        make_leaf("transposed", (3, 34, 33), FLOAT, rng),
        make_leaf("aligned", (9,), HALF, rng),
        make_leaf("broadcast", (5,), FLOAT, rng),
        *[make_leaf("aligned", (8 + n,), TYPES[n % 3], rng) for n in range(13)],
    ]
    cosine = ("cosine_decay", 1e-2, 10)
    for passes, threads in ((1, 256), (4, 96)):
        update = Update(adam, leaves, (HALF, FLOAT, BFLOAT), schedule=cosine, step=3)
        update.run(library, ADAM, passes=passes, threads=threads, order="shuffled")
        update.check()
        update = Update(sgd, leaves, (BFLOAT, FLOAT, FLOAT))
        update.run(library, SGD, passes=passes, threads=threads, order="reverse")
        update.check()
    for leaf, in_place in product(leaves[:5], (False, True)):
        update = Update(adam, [leaf], (FLOAT,) * 3, step=1)
        update.run(library, PLAIN, in_place=in_place)
        update.check()
    for layout in ("aligned", "transposed"):
        check_far_segment(library, PLAIN, layout)
    for layout in (args.STRIDED, args.TILED):
        check_far_source(library, PLAIN, layout)
    for layout in (args.ALIGNED, args.UNALIGNED, args.STRIDED, args.TILED):
        check_far_group(library, PLAIN, layout)
    check_advance(library)


def check_advance(library: Any) -> None:
    next_step, rate = np.zeros(1, np.uint64), np.zeros(1, np.float32)
    schedule = np.array([args.schedule("linear_schedule", 0.0, 1.0, 4)])
    buffers = {0: np.array([2], np.uint64), 1: next_step, 2: rate, 3: schedule}
    library.run("advance", grid=(1,), threads=(1,), buffers=buffers)
    assert next_step[0] == 3 and rate[0] == 0.5


def test_the_battery_passes_without_a_mistake() -> None:
    battery(kernel_text())


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_in_the_kernels_is_found(mistake: str) -> None:
    text = mutated(kernel_text(), *MUTANTS[mistake])
    with pytest.raises((simulator.CompileError, simulator.KernelError, AssertionError)):
        battery(text)
