"""The tests of the kernels are tests: mistakes put into the kernels' text are found.

Every line that keeps a kernel within its bounds is taken out here, every barrier dropped.
"""

import sys
from itertools import product
from typing import Any

import arguments as args
import kernel_text
import numpy as np
import pytest
import simulator
from advances import Group, run_advance
from cases import Case
from mutants import mutated
from stored_updates import FEW, check_blocks_copy, check_stored
from unusual_updates import (
    KEYED,
    SHIFTED,
    THREE,
    check_far_group,
    check_far_segment,
    check_far_source,
    check_far_source_offset,
    check_keys,
    check_tails,
    check_three_states,
)
from updates import (
    BFLOAT,
    FLOAT,
    HALF,
    TYPES,
    Update,
    flat_leaves,
    make_leaf,
    rule_of,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the simulator runs on Linux")

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
INSIDE_TILE = "if (r < height && c < width) {"
READ_TILE = f"uint c = i / FLATSTEP_TILE_ROWS;\n        {INSIDE_TILE}"
WRITE_TILE = "uint count = r < height && c < width ?"
TAIL = "if (k < count) {\n"
COUNT = "uint(min(left, uint64_t(FLATSTEP_RUN)))"
LEAVES = "if (first - first % FLATSTEP_BLOCK >= segment->size) {\n        return;\n      }\n"
RUNS = """run += num_threads) {
      uint64_t first = start_of_run(group, num_runs, run);
      """
WHOLE = "place.is_whole = count == FLATSTEP_RUN && first % FLATSTEP_RUN == 0;"

LARGEST = """mask < FLATSTEP_BLOCK_LANES; mask *= 2) {
    x = max(x, """
SUM = """mask < FLATSTEP_BLOCK_LANES; mask *= 2) {
    x += """
IN_BLOCK = "if (place.has_block) {\n        "
SCALE = """float scale = simd_shuffle(place.is_first() ? block->scale : 0.0f, place.first_lane);"""
LOAD_SOURCE = """Run load_source(
    const device char* source,
    constant SourceSegment& segment,
    constant SourceDimension* dimensions,
    uint64_t first,"""

# What is changed, and into what.
MUTANTS = {
    # Bounds
    "no end of the runs": (LEAVES, ""),
    "the runs end within a block": (
        LEAVES,
        LEAVES.replace("first - first % FLATSTEP_BLOCK", "first"),
    ),
    "every run is whole": (COUNT, "FLATSTEP_RUN"),
    "no end of the tiles": ("if (number >= num_tiles) {\n        return;\n      }\n", ""),
    "end of the tiles off by one": ("if (number >= num_tiles)", "if (number > num_tiles)"),
    "tile read past its rows": (READ_TILE, READ_TILE.replace("r < height && ", "")),
    "tile read past its columns": (READ_TILE, READ_TILE.replace(" && c < width", "")),
    "tile written past its rows": (WRITE_TILE, WRITE_TILE.replace("r < height && ", "")),
    "tile written past its columns": (WRITE_TILE, WRITE_TILE.replace(" && c < width", "")),
    "tile as high as any": (
        "uint(min(num_rows - row, uint64_t(FLATSTEP_TILE_ROWS)))",
        "FLATSTEP_TILE_ROWS",
    ),
    "tile as wide as any": (
        "uint(min(num_columns - column, uint64_t(FLATSTEP_TILE_COLUMNS)))",
        "FLATSTEP_TILE_COLUMNS",
    ),
    "a tile's run past its columns": ("min(width - c, uint(FLATSTEP_RUN))", "FLATSTEP_RUN"),
    "whole loads and stores in the tail": (WHOLE, WHOLE.replace("count == FLATSTEP_RUN && ", "")),
    "vectors where none may start": (WHOLE, WHOLE.replace(" && first % FLATSTEP_RUN == 0", "")),
    "whole loads of a source's tail": (
        "first, count, count == FLATSTEP_RUN);",
        "first, count, true);",
    ),
    "tail loads too much": (
        TAIL + "        values[k] = from[k];",
        TAIL.replace("k < count", "true") + "        values[k] = from[k];",
    ),
    "tail stores too much": (
        TAIL + "        to[k] = values[k];",
        TAIL.replace("k < count", "true") + "        to[k] = values[k];",
    ),
    "source read past its end": (
        TAIL + "      int64_t offset",
        TAIL.replace("k < count", "true") + "      int64_t offset",
    ),
    "more segments than there are": ("s < num_segments", "s <= num_segments"),
    "64 bits cut to 32 in a run": (
        "place.p_at = segment->p_offset + first;",
        "place.p_at = uint(segment->p_offset + first);",
    ),
    "64 bits cut to 32 in a run's state": (
        "place.state_at = segment->state_offset + first;",
        "place.state_at = uint(segment->state_offset + first);",
    ),
    "64 bits cut to 32 in a stride": (
        "int64_t offset = 0;",
        "int offset = 0;",
    ),
    "64 bits cut to 32 in a tile": ("int64_t column_stride =", "int column_stride ="),
    "64 bits cut to 32 in the runs": ("uint64_t(group) * num_runs", "group * num_runs"),
    "64 bits cut to 32 in a run's start": (
        "return (uint64_t(group) * num_runs + run)",
        "return uint(uint64_t(group) * num_runs + run)",
    ),
    "64 bits cut to 32 in a source": (LOAD_SOURCE, LOAD_SOURCE.replace("uint64_t", "uint")),
    "64 bits cut to 32 in a tile's corner": ("int64_t corner = ", "int corner = "),
    "64 bits cut to 32 in a tile's start": (
        "uint64_t first = (uint64_t(matrix)",
        "uint first = uint(uint64_t(matrix)",
    ),
    "64 bits cut to 32 in a source's offset": (
        "source + segment.source_offset;",
        "source + uint(segment.source_offset);",
    ),
    "64-bit division cut to 32": (
        "bool is_small = (index | extent) >> 32 == 0;",
        "bool is_small = true;",
    ),
    # Barriers
    "no barrier before a tile is used": (BARRIER + "\n      uint64_t first", "uint64_t first"),
    "no barrier before the next tile": (BARRIER + "\n    }\n  }", "\n    }\n  }"),
    "a simdgroup's barrier": (
        BARRIER + "\n      uint64_t first",
        BARRIER.replace("threadgroup_", "simdgroup_", 1) + "\n      uint64_t first",
    ),
    # Indices
    "segment off by one": ("segments[s].first_group <= group", "segments[s].first_group < group"),
    "states swapped": ("work.state0 = state0;", "work.state0 = state1;"),
    "last states swapped": ("work.state2 = state2;", "work.state2 = state1;"),
    "a state's index": (
        "state2 [[buffer(FLATSTEP_STATE + 2)]]",
        "state2 [[buffer(FLATSTEP_STATE + 1)]]",
    ),
    "states' storages swapped": (
        "Work<R, P, S0, S1, S2, E> work",
        "Work<R, P, S0, S2, S1, E> work",
    ),
    "a state not loaded": ("FLATSTEP_LOAD_STATE(2)", ""),
    "a state not stored": ("FLATSTEP_STORE_STATE(2)", ""),
    "wrong source": ("case k:", "case k == 7 ? 30 : k:"),
    "source not bound": ("#define FLATSTEP_FIRST_SOURCE 12", "#define FLATSTEP_FIRST_SOURCE 11"),
    "source's place dropped": ("source + segment.source_offset;", "source;"),
    "source's place in elements": (
        "source + segment.source_offset;",
        "source + segment.source_offset * 4;",
    ),
    "state where p lies": (
        "place.state_at = segment->state_offset + first;",
        "place.state_at = segment->p_offset + first;",
    ),
    "another source's dimensions": (
        "work.dimensions = dimensions + segment.first_dimension",
        "work.dimensions = dimensions",
    ),
    "wrong dimension": ("* dimensions[d - 1].stride", "* dimensions[0].stride"),
    "tile transposed twice": (
        "tile[r * pitch + c] = load_one",
        "tile[c * pitch + r] = load_one",
    ),
    "groups overlap": (
        "uint64_t(group) * num_runs",
        "uint64_t(group) * FLATSTEP_THREADS",
    ),
    "tiles overlap": ("group * passes + pass", "group + pass"),
    "threads overlap": (
        RUNS + LEAVES,
        RUNS.replace("num_threads", "num_threads / 2 + 1") + LEAVES,
    ),
    "storages in another order": (
        "  STORAGE(Float16, float16)        \\\n  STORAGE(Bfloat16, bfloat16)",
        "  STORAGE(Bfloat16, bfloat16)      \\\n  STORAGE(Float16, float16)",
    ),
    "read in place through another buffer": ("dispatch.p_in_place ? p_out : p_in", "p_in"),
    # Constants
    "another group's constants": ("segment.group * FLATSTEP_GROUP_WORDS", "0"),
    "constants where the key lies": ("own + FLATSTEP_PASS_WORDS)", "own)"),
    "another word for the seed": ("start_of(work.pass.seed,", "start_of(work.pass.tick,"),
    "another word for the step": ("starts[array], pass.tick,", "starts[array], pass.seed,"),
    "the leaf ignored": ("(work.pass.seed, segment.name, k)", "(work.pass.seed, 0, k)"),
    "element's number in p": ("key_of(0, first)", "key_of(0, place.p_at)"),
    "element's number in the state": ("key_of(1 + k, first)", "key_of(1 + k, place.state_at)"),
    "p's key for a state": ("key_of(1 + k, first", "key_of(k, first"),
    "a state's key for p": ("key_of(0, first", "key_of(1, first"),
    "one key for a run of two parts": (
        "P::store(run.at[k], next(key, k))",
        "P::store(run.at[k], key)",
    ),
    "one key for a run": ("S::store(run.at[k], next(key, k))", "S::store(run.at[k], key)"),
    "one key for a run's codes": ("inverse, next(key, k))", "inverse, key)"),
    "copy reads p": ("e.p = source;", "e.p += source - e.p;"),
    "copy reads constants": ("if (!is_same<R, Copy>::value) {", "if (true) {"),
    "another group's hyperparameters": ("group * (sizeof(GroupArguments) / 4)", "0"),
    "groups written over each other": ("constants + group * FLATSTEP_GROUP_WORDS", "constants"),
    "a word of the constants missing": (
        "k < sizeof(typename R::Constants) / 4",
        "k + 1 < sizeof(typename R::Constants) / 4",
    ),
    "a word of a struct missing": ("k < sizeof(T) / 4", "k + 1 < sizeof(T) / 4"),
    "a step later": ("(numbers), rate, now.step)", "(numbers), rate, now.step + 1)"),
    "step before the increment": (
        "pair_from_step(limited(steps_before) + 1)",
        "pair_from_step(limited(steps_before))",
    ),
    "schedule ignored": ("schedule.num_pieces > 0)", "schedule.num_pieces > 2)"),
    "the first piece at all times": (
        "schedule.pieces + active_piece(schedule, step)",
        "schedule.pieces",
    ),
    "swapped betas": ("        h.beta1.value,\n", "        h.beta2.value,\n"),
    "swapped m and v": (
        "    e.state[0] = m;\n    e.state[1] = v;",
        "    e.state[0] = v;\n    e.state[1] = m;",
    ),
    # Blocks
    "a mask left out of the largest": (LARGEST, LARGEST.replace("*= 2", "*= 4")),
    "the largest of half a block": (LARGEST, LARGEST.replace("LANES;", "LANES / 2;")),
    "the largest of two blocks": (LARGEST, LARGEST.replace("< FLAT", "<= FLAT")),
    "the largest of a lane": (LARGEST, LARGEST.replace("max(x, ", "max(x, 0 * ")),
    "a mask left out of the sum": (SUM, SUM.replace("*= 2", "*= 4")),
    "the sum of half a block": (SUM, SUM.replace("LANES;", "LANES / 2;")),
    "the sum of two blocks": (SUM, SUM.replace("< FLAT", "<= FLAT")),
    "another block's lane": ("ushort(lane - lane % FLATSTEP_BLOCK_LANES)", "0"),
    "a lane's own scale": (SCALE, "float scale = block->scale;"),
    "no lane's scale": ("block->scale = scale;", ""),
    "every lane's scale": ("if (place.is_first()) {\n      block->scale", "{\n      block->scale"),
    "checksum not verified": ("are_theirs ? kept.at[k] : T(0)", "kept.at[k]"),
    "checksum not written": ("block->checksum = sum;", ""),
    "one weight for all lanes": ("checksum_weight(place.in_block + k)", "checksum_weight(k)"),
    "rests in a state's buffer": ("work.rests = rests;", "work.rests = state0;"),
    "rests of another block": ("return state_at / FLATSTEP_BLOCK", "return p_at / FLATSTEP_BLOCK"),
    "state past the end": ("i < count ? state[k].at[i] : 0.0f", "state[k].at[i]"),
    "parameters past the end": ("i < count ? p.at[i] : 0.0f", "p.at[i]"),
    "bytes of no block": (
        f"{IN_BLOCK}word = ",
        f"{IN_BLOCK.replace('place.has_block', 'true')}word = ",
    ),
    "bytes to no block": (
        f"{IN_BLOCK}*(dev",
        f"{IN_BLOCK.replace('place.has_block', 'true')}*(dev",
    ),
    "a block past the last row": ("count, r < height, g)", "count, true, g)"),
    "no block in a tile": ("count, r < height, g)", "count, false, g)"),
    "first of no block": ("return has_block && in_block == 0;", "return in_block == 0;"),
    "copy past the end": ("i < arguments.size;", "i <= arguments.size;"),
    "copy of one for all": ("from[i * arguments.stride]", "from[0]"),
    "copy without its stride": ("from[i * arguments.stride]", "from[i]"),
    # Address spaces, which only the strict dialect knows
    "tile in thread memory": (
        "update_tiles(threadgroup float* tile)",
        "update_tiles(thread float* tile)",
    ),
    "device pointer without device": (
        "load_one(const device char* source, uint",
        "load_one(const char* source, uint",
    ),
    "constant written": (
        "work.group = group - segment.first_group;",
        "segments[0].padding = 1; work.group = group - segment.first_group;",
    ),
    "double": ("float rate = rate_of_all;", "double rate = rate_of_all;"),
    "half from bfloat": (
        "value = Type::load(((const device Type::Stored*)source)[offset]);",
        "bfloat x = ((const device Type::Stored*)source)[offset]; value = x;",
    ),
}


ADAMW = Case("AdamW", {"weight_decay": 0.1, "bias_correction": True})
ADAM = Case("Adam", {"betas": [0.6, 0.9], "eps": 1e-3})
NESTEROV = Case("SGD", {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True})


def kernels() -> list[str]:
    wanted = [kernel_text.advance(rule) for rule in ("Adam", "Momentum", "ThreeStates", "Shift")]
    updates: list[tuple[str, list[str]]] = [
        ("Adam", ["Float16", "Float32", "Bfloat16"]),
        ("Adam", ["Float32"] * 3),
        ("Momentum", ["Bfloat16", "Float32"]),
        ("Momentum", ["Keyed"] * 2),
        ("Shift", SHIFTED),
        ("ThreeStates", [stored.name for stored in THREE]),
        ("Copy", ["Float32"]),
        ("Copy", ["Keyed"]),
    ]
    wanted += [storages.kernel(rule_of(case).type) for case, storages in FEW]
    return wanted + [kernel_text.update(rule, True, storages) for rule, storages in updates]


def battery(text: str) -> None:
    """Raises what the tests of the kernels would raise, on fewer cases."""
    text = kernel_text.with_instances(text, kernels())
    simulator.check(text)
    library = simulator.build(text)
    check_advance(library)
    check_three_states(library)
    check_keys(library)
    check_tails(library)
    check_blocks_copy(library)
    for case, storages in FEW:
        check_stored(library, case, storages, order="shuffled")
    rng = np.random.default_rng(0)
    leaves = [
        make_leaf("aligned", (9002,), FLOAT, rng),
        make_leaf("transposed", (40, 70), HALF, rng),
        make_leaf("sliced", (3, 5, 7), BFLOAT, rng),
        make_leaf("unaligned", (3,), FLOAT, rng),
        make_leaf("transposed", (3, 34, 33), FLOAT, rng),
        make_leaf("aligned", (9,), HALF, rng),
        make_leaf("broadcast", (5,), FLOAT, rng),
        *[make_leaf("aligned", (8 + n,), TYPES[n % 3], rng) for n in range(12)],
    ]
    joined = ("join_schedules", [("linear_schedule", 0, 1e-2, 5), ("cosine_decay", 1e-2, 10)], [2])
    for passes, threads in ((1, 256), (4, 96)):
        update = Update([ADAMW, ADAM], leaves, (HALF, FLOAT, BFLOAT), schedule=joined, step=3)
        update.run(library, passes=passes, threads=threads, order="shuffled")
        update.check()
        update = Update(NESTEROV, leaves, (BFLOAT, FLOAT))
        update.run(library, passes=passes, threads=threads, order="reverse")
        update.check()
    for leaf, in_place in product(leaves[:5], (False, True)):
        update = Update(ADAMW, [leaf], [FLOAT], step=1)
        update.run(library, in_place=in_place)
        update.check()
    update = Update([ADAMW, ADAM], flat_leaves(leaves[-2::-3]), [FLOAT])
    update.run(library)
    update.check()
    check_copy(library)
    check_far_source_offset(library)
    for layout in ("aligned", "transposed"):
        check_far_segment(library, layout)
    for number in (args.STRIDED, args.TILED):
        check_far_source(library, number)
    for number in (args.ALIGNED, args.UNALIGNED, args.STRIDED, args.TILED):
        check_far_group(library, number)


def check_advance(library: Any) -> None:
    groups = [Group(rule_of(ADAMW)), Group(rule_of(ADAM))]
    step = (1 << 32) + 2
    schedule = ("linear_schedule", 0.0, 1.0, 1 << 33)
    scalars = {"step": step, "learning_rate": 0.25}
    written = ("step", "learning_rate")
    settings = args.settings(seed=7)
    constants, after = run_advance(
        library, groups, scalars, written, schedule=schedule, settings=settings
    )
    assert after["step"] == [step + 1]
    assert after["learning_rate"] == [np.float32(step / (1 << 33))]
    assert (constants[:, :2] == [step & args.WORD, 7]).all()
    _, after = run_advance(library, groups, scalars, written)
    assert after["step"] == [step + 1] and after["learning_rate"] == [0.25]


def check_copy(library: Any) -> None:
    leaf = make_leaf("aligned", (70,), FLOAT, np.random.default_rng(3))
    for stored in (FLOAT, KEYED):
        update = Update(Case("SGD", {}), [leaf], [stored])
        update.run(library, "Copy")
        if stored == FLOAT:
            np.testing.assert_array_equal(update.p_out[:70], leaf.values)
        update.check_gaps()


def test_the_battery_passes_without_a_mistake() -> None:
    battery(kernel_text.source())


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_in_the_kernels_is_found(mistake: str) -> None:
    text = mutated(kernel_text.source(), *MUTANTS[mistake])
    with pytest.raises((simulator.CompileError, simulator.KernelError, AssertionError)):
        battery(text)
