"""metal/*.metal as they are, compiled by clang and run on the CPU, against float64.

Each access is checked to the byte: a kernel may touch the leaves of its dispatch and nothing else.
"""

import sys
from itertools import product
from typing import Any

import arguments as args
import kernel_text
import numpy as np
import pytest
import reference
import simulator
from advances import Group, pass_of, run_advance
from cases import CASES, EXTREME, FULLEST, UNUSUAL, Case, case_id
from unusual_updates import (
    THREE,
    check_far_group,
    check_far_segment,
    check_far_source,
    check_far_source_offset,
    check_keys,
    check_three_states,
)
from updates import (
    BFLOAT,
    FLOAT,
    HALF,
    TYPES,
    Leaf,
    Type,
    Update,
    flat_leaves,
    make_leaf,
    rule_of,
    types_of,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="here the GPU itself runs them")

# A case that uses much of its rule, and others of the same kernel. With round betas, gradients of
# half types would make sums that lie in the middle between two numbers.
ADAMW = Case("AdamW", {"betas": [0.8931, 0.99713], "weight_decay": 0.1, "bias_correction": True})
ADAM = Case("Adam", {"betas": [0.5, 0.9], "eps": 1e-3})
MOMENTUM = Case("SGD", {"momentum": 0.9, "dampening": 0.1})

# Types of p and the state that occur: one throughout, half parameters with float32 state, and odd
# ones.
MIXES = [
    (FLOAT, FLOAT),
    (HALF, HALF),
    (BFLOAT, BFLOAT),
    (BFLOAT, FLOAT),
    (HALF, FLOAT),
    (FLOAT, HALF, BFLOAT),
    (HALF, BFLOAT, FLOAT),
]

SCHEDULES: list[tuple[Any, ...]] = [
    ("linear_schedule", 0.0, 1e-2, 7),
    ("linear_schedule", 1e-2, 1e-3, 100),
    ("cosine_decay", 1e-2, 10),
    ("cosine_decay", 1e-2, 1000, 1e-4),
    ("exponential_decay", 0.1, 0.99),
    ("exponential_decay", 0.1, -0.5),
    ("step_decay", 0.1, 0.5, 3),
    ("join_schedules", [("linear_schedule", 0, 1e-2, 5), ("cosine_decay", 1e-2, 20)], [5]),
    (
        "join_schedules",
        [("linear_schedule", 0, 1e-2, 3), ("step_decay", 1e-2, 0.9, 2), ("cosine_decay", 1, 9)],
        [3, 9],
    ),
]
STEPS = [0, 1, 4, 5, 6, 9, 17, 1000, (5 << 32) + 7]


@pytest.fixture(scope="session")
def library() -> Any:
    """Every kernel that this file runs, named as its instance."""
    rules = {rule.type: rule.num_states for rule in map(rule_of, CASES)}
    wanted = {kernel_text.advance(rule) for rule in [*rules, "ThreeStates"]}
    for (rule, num_states), types in product(rules.items(), MIXES):
        names = [stored.name for stored in types_of(types, num_states)]
        wanted.add(kernel_text.update(rule, True, names))
    wanted.add(kernel_text.update("Adam", False, ["Float32"] * 3))
    wanted.add(kernel_text.update("Momentum", True, ["Keyed"] * 2))
    wanted.add(kernel_text.update("ThreeStates", True, [stored.name for stored in THREE]))
    wanted |= {kernel_text.update("Copy", True, [stored.name]) for stored in TYPES}
    return simulator.build(kernel_text.with_instances(kernel_text.source(), wanted))


def leaves_of(types: list[Type], rng: np.random.Generator) -> list[Leaf]:
    """One of each layout and of many sizes, mixed as a bucket mixes them."""
    kinds = [
        ("aligned", (4097,)),
        ("unaligned", (65,)),
        ("transposed", (37, 70)),
        ("aligned", (1,)),
        ("sliced", (5, 7)),
        ("broadcast", (131,)),
        ("transposed", (3, 33, 31)),
        ("aligned", (64,)),
        ("unaligned", (1026,)),
        ("sliced", (2, 3, 5)),
        ("aligned", (63,)),
        ("transposed", (2, 2)),
        ("aligned", (2048,)),
    ]
    return [
        make_leaf(layout, shape, types[i % len(types)], rng)
        for i, (layout, shape) in enumerate(kinds)
    ]


def test_every_kernel_that_the_engine_may_ask_for_passes_the_strict_checks() -> None:
    text = kernel_text.source() + kernel_text.all_instances()
    assert text.isascii()
    simulator.check(text, warnings_are_errors=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_rule_is_what_float64_says(case: Case, library: Any) -> None:
    rng = np.random.default_rng(1)
    update = Update(case, leaves_of([FLOAT], rng), [FLOAT], step=3)
    update.run(library)
    update.check()


@pytest.mark.parametrize("case", UNUSUAL + EXTREME, ids=str)
@pytest.mark.parametrize("step", [0, 1, 999, 10**6])
def test_unusual_hyperparameters_keep_their_precision(case: Case, step: int, library: Any) -> None:
    rng = np.random.default_rng(2)
    leaf = make_leaf("aligned", (777,), FLOAT, rng)
    update = Update(case, [leaf], [FLOAT], step=step)
    update.run(library)
    update.check()


@pytest.mark.parametrize("types", MIXES, ids=lambda t: "-".join(x.name for x in t))
@pytest.mark.parametrize("case", FULLEST, ids=case_id)
def test_each_mix_of_dtypes_is_rounded_once(
    case: Case, types: tuple[Type, ...], library: Any
) -> None:
    rng = np.random.default_rng(3)
    update = Update(case, leaves_of([FLOAT], rng), types, step=5)
    update.run(library)
    update.check()


def test_a_rule_may_keep_three_states_in_storages_of_their_own(library: Any) -> None:
    check_three_states(library)


def test_a_storage_is_told_the_elements_number_and_the_step(library: Any) -> None:
    check_keys(library)


def test_each_group_has_its_own_constants(library: Any) -> None:
    rng = np.random.default_rng(19)
    update = Update([ADAMW, ADAM, *UNUSUAL[-3:]], leaves_of(TYPES, rng), [FLOAT], step=7)
    update.run(library, passes=2)
    update.check()


@pytest.mark.parametrize("stored", TYPES, ids=lambda t: t.name)
def test_gradients_may_lie_in_one_buffer(stored: Type, library: Any) -> None:
    rng = np.random.default_rng(20)
    apart = [make_leaf("aligned", (1 + 37 * n % 150,), stored, rng) for n in range(19)]
    updates = [Update(ADAMW, leaves, [FLOAT]) for leaves in (apart, flat_leaves(apart))]
    assert [len(update.sources()[0]) for update in updates] == [19, 1]
    for update in updates:
        update.run(library)
    np.testing.assert_array_equal(updates[0].p_out, updates[1].p_out)
    for a, b in zip(updates[0].state, updates[1].state, strict=True):
        np.testing.assert_array_equal(a, b)


def test_as_many_leaves_of_one_buffer_as_the_table_holds(library: Any) -> None:
    rng = np.random.default_rng(21)
    apart = [make_leaf("aligned", (1 + n,), FLOAT, rng) for n in range(args.MAX_SEGMENTS)]
    update = Update([ADAMW, ADAM], flat_leaves(apart), [FLOAT])
    update.run(library)
    update.check()


@pytest.mark.parametrize(("threads", "passes"), [(256, 1), (256, 3), (96, 2), (32, 16), (64, 1)])
@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_threads_and_passes_do_not_change_the_result(
    threads: int, passes: int, order: str, library: Any
) -> None:
    rng = np.random.default_rng(4)
    update = Update(
        ADAMW, leaves_of(TYPES, rng), (BFLOAT, FLOAT), step=2, p_start=64, state_start=0
    )
    update.run(library, threads=threads, passes=passes, order=order)
    update.check()


@pytest.mark.parametrize("in_place", [False, True])
def test_parameters_may_be_written_where_they_were_read(in_place: bool, library: Any) -> None:
    rng = np.random.default_rng(5)
    update = Update(ADAMW, leaves_of(TYPES, rng), [FLOAT], step=1)
    update.run(library, in_place=in_place)
    update.check()


@pytest.mark.parametrize("layout", ["aligned", "unaligned", "sliced", "broadcast"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 1023, 1024, 1025, 1027, 2050])
def test_a_tail_touches_nothing_past_its_segment(layout: str, size: int, library: Any) -> None:
    rng = np.random.default_rng(size)
    leaves = [make_leaf(layout, (size,), stored, rng) for stored in TYPES]
    update = Update(ADAMW, leaves, (FLOAT, HALF, BFLOAT), step=0)
    update.run(library)
    update.check()


@pytest.mark.parametrize(
    "shape", [(2, 2), (31, 32), (32, 33), (33, 31), (1000, 3), (3, 1000), (64, 64), (2, 5, 40)]
)
@pytest.mark.parametrize("stored", TYPES, ids=lambda t: t.name)
def test_tiles_cover_a_transposed_gradient(
    shape: tuple[int, ...], stored: Type, library: Any
) -> None:
    rng = np.random.default_rng(6)
    leaves = [make_leaf("transposed", shape, stored, rng), make_leaf("aligned", (5,), FLOAT, rng)]
    update = Update(ADAMW, leaves, [FLOAT], step=0)
    update.run(library, passes=2)
    update.check()


def test_a_kernel_without_tiles_reads_what_lies_along_its_rows(library: Any) -> None:
    rng = np.random.default_rng(7)
    leaves = [make_leaf(kind, (9, 13), FLOAT, rng) for kind in ("aligned", "sliced", "broadcast")]
    update = Update(ADAMW, leaves, [FLOAT])
    update.run(library, has_tiles=False)
    update.check()


@pytest.mark.parametrize("count", [1, 2, 18, 19])
def test_each_source_has_its_own_buffer(count: int, library: Any) -> None:
    rng = np.random.default_rng(8)
    leaves = [make_leaf("aligned", (10 + i,), TYPES[i % 3], rng) for i in range(count)]
    update = Update(ADAMW, leaves, [FLOAT])
    update.run(library)
    update.check()


@pytest.mark.parametrize(("schedule", "step"), [*product(SCHEDULES, STEPS)], ids=str)
def test_the_update_evaluates_its_schedule(
    schedule: tuple[Any, ...], step: int, library: Any
) -> None:
    rng = np.random.default_rng(9)
    leaf = make_leaf("aligned", (33,), FLOAT, rng)
    update = Update(MOMENTUM, [leaf], [FLOAT], schedule=schedule, step=step)
    update.run(library)
    update.check()


@pytest.mark.parametrize(("schedule", "step"), [*product([(), *SCHEDULES], STEPS)], ids=str)
def test_advance_counts_and_gives_the_learning_rate(
    schedule: tuple[Any, ...], step: int, library: Any
) -> None:
    written = ("step", "learning_rate") if schedule else ("step",)
    constants, after = run_advance(
        library,
        [Group(rule_of(ADAMW))],
        {"step": step, "learning_rate": 0.5},
        written,
        schedule=schedule,
        settings=args.settings(seed=7),
    )
    assert after["step"] == [step + 1]
    assert pass_of(constants).tolist() == (step & args.WORD, 7, args.UPDATE, 1, np.inf, 1, 0, 1)
    if schedule:
        expected = np.float32(reference.schedule_value(schedule, step))
        assert abs(after["learning_rate"] - expected) <= np.spacing(abs(expected))


@pytest.mark.parametrize("stored", TYPES, ids=lambda t: t.name)
def test_copy_brings_any_layout_into_a_flat_array(stored: Type, library: Any) -> None:
    rng = np.random.default_rng(10)
    leaves = leaves_of([stored], rng)
    update = Update(Case("SGD", {}), leaves, [stored])
    update.run(library, "Copy")
    for leaf, at in zip(leaves, update.p_offsets, strict=True):
        np.testing.assert_array_equal(stored.decode(update.p_out[at : at + leaf.size]), leaf.values)


@pytest.mark.parametrize("case", FULLEST, ids=str)
def test_flushing_subnormals_leaves_normal_numbers_alone(case: Case, library: Any) -> None:
    rng = np.random.default_rng(14)
    leaves = leaves_of([FLOAT], rng)
    update = Update(case, leaves, [FLOAT], step=3)
    update.run(library, flush_to_zero=True)
    update.check()


@pytest.fixture(scope="session")
def fast_library() -> Any:
    """Compiled as if there were no NaN, which Metal's options should prevent."""
    wanted = [kernel_text.advance("Adam"), kernel_text.update("Adam", True, ["Float32"] * 3)]
    wanted.append(kernel_text.update("Adam", True, ["Bfloat16", "Float32", "Float32"]))
    text = kernel_text.with_instances(kernel_text.source(), wanted)
    return simulator.build(text, fast_math=True)


@pytest.mark.parametrize("math", ["library", "fast_library"])
@pytest.mark.parametrize("types", [[FLOAT], [BFLOAT, FLOAT]], ids=["float", "bfloat"])
def test_nan_and_infinity_are_seen(
    types: list[Type], math: str, request: pytest.FixtureRequest
) -> None:
    library = request.getfixturevalue(math)
    rng = np.random.default_rng(11)
    leaf = make_leaf("aligned", (7,), FLOAT, rng)
    leaf.memory[1], leaf.memory[3] = np.nan, np.inf
    update = Update(ADAMW, [leaf], types)
    update.run(library)
    p = types[0].decode(update.p_out[update.p_offsets[0] : update.p_offsets[0] + 7])
    m = types[-1].decode(update.state[0][update.state_offsets[0] : update.state_offsets[0] + 7])
    assert np.isnan(p[1]) and np.isnan(m[1]) and np.isinf(m[3])
    assert np.isfinite(p[[0, 2, 4, 5, 6]]).all()


@pytest.mark.parametrize("layout", ["aligned", "transposed"])
def test_a_segment_may_lie_beyond_four_billion_elements(layout: str, library: Any) -> None:
    check_far_segment(library, layout)


@pytest.mark.parametrize("layout", [args.STRIDED, args.TILED])
def test_a_source_may_stride_over_billions_of_elements(layout: int, library: Any) -> None:
    check_far_source(library, layout)


@pytest.mark.parametrize("layout", [args.ALIGNED, args.UNALIGNED, args.STRIDED, args.TILED])
def test_a_leaf_may_have_more_than_four_billion_elements(layout: int, library: Any) -> None:
    check_far_group(library, layout)


def test_a_source_may_start_beyond_four_billion_bytes(library: Any) -> None:
    check_far_source_offset(library)
