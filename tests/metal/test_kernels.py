"""metal/*.metal as they are, compiled by clang and run on the CPU, against float64.

Each access is checked to the byte: a kernel may touch the leaves of its dispatch and nothing else.
"""

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import arguments as args
import numpy as np
import pytest
import reference
import simulator
from cases import EXTREME, UNUSUAL, Case, case_id
from updates import (
    BFLOAT,
    FLOAT,
    HALF,
    TYPES,
    Leaf,
    Type,
    Update,
    check_far_group,
    check_far_segment,
    check_far_source,
    kernel_rule,
    make_leaf,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="here the GPU itself runs them")

SOURCE_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "metal_source.py"

RULES = [
    Case("SGD", {}),
    Case("SGD", {"weight_decay": 0.1}),
    Case("SGD", {"momentum": 0.9, "dampening": 0.1}),
    Case("SGD", {"momentum": 0.9, "weight_decay": 0.01}),
    Case("SGD", {"momentum": 0.9, "nesterov": True}),
    Case("SGD", {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    Case("Adam", {}),
    Case("AdamW", {"weight_decay": 0.1, "bias_correction": True}),
]
ADAMW = RULES[-1]
SGD = RULES[2]

# Mixes that occur: one type throughout, half parameters with float32 state, and odd ones.
MIXES = [
    (FLOAT, FLOAT, FLOAT),
    (HALF, HALF, HALF),
    (BFLOAT, BFLOAT, BFLOAT),
    (BFLOAT, FLOAT, FLOAT),
    (HALF, FLOAT, FLOAT),
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
STEPS = [0, 1, 4, 5, 6, 9, 17, 1000]


def instance(case: Case, types: tuple[Type, ...], has_tiles: bool = True) -> str:
    names = ", ".join(stored.name for stored in types)
    return f"{kernel_rule(case)}, {names}, {str(has_tiles).lower()}"


@pytest.fixture(scope="session")
def kernel_text() -> str:
    """The text that the extension carries."""
    script = [sys.executable, str(SOURCE_SCRIPT)]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="session")
def library(kernel_text: str) -> Any:
    """Every kernel that this file runs, named as its instance."""
    wanted = {instance(case, (FLOAT,) * 3) for case in RULES}
    wanted |= {instance(case, types) for case in (ADAMW, SGD) for types in MIXES}
    wanted |= {instance(ADAMW, (FLOAT,) * 3, has_tiles=False)}
    wanted |= {f"Copy, {stored.name}, float, float, true" for stored in TYPES}
    lines = [f'FLATSTEP_INSTANTIATE("{name}", {name})' for name in sorted(wanted)]
    return simulator.build(kernel_text + "\n".join(lines) + "\n")


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
    script = [sys.executable, str(SOURCE_SCRIPT), "--all-instances"]
    text = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert text.isascii()
    simulator.check(text, warnings_are_errors=True)


@pytest.mark.parametrize("case", RULES, ids=str)
def test_each_rule_is_what_float64_says(case: Case, library: Any) -> None:
    rng = np.random.default_rng(1)
    update = Update(case, leaves_of([FLOAT], rng), (FLOAT,) * 3, step=3)
    update.run(library, instance(case, (FLOAT,) * 3))
    update.check()


@pytest.mark.parametrize("case", [c for c in UNUSUAL + EXTREME if c.rule != "SGD"], ids=str)
@pytest.mark.parametrize("step", [0, 1, 999, 10**6])
def test_unusual_hyperparameters_keep_their_precision(case: Case, step: int, library: Any) -> None:
    rng = np.random.default_rng(2)
    leaf = make_leaf("aligned", (777,), FLOAT, rng)
    update = Update(case, [leaf], (FLOAT,) * 3, step=step)
    update.run(library, instance(ADAMW, (FLOAT,) * 3))
    update.check()


@pytest.mark.parametrize("types", MIXES, ids=lambda t: "-".join(x.name for x in t))
@pytest.mark.parametrize("case", [ADAMW, SGD], ids=case_id)
def test_each_mix_of_dtypes_is_rounded_once(
    case: Case, types: tuple[Type, Type, Type], library: Any
) -> None:
    rng = np.random.default_rng(3)
    update = Update(case, leaves_of(TYPES, rng), types, step=5)
    update.run(library, instance(case, types))
    update.check()


@pytest.mark.parametrize(("threads", "passes"), [(256, 1), (256, 3), (96, 2), (32, 16), (1, 1)])
@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_threads_and_passes_do_not_change_the_result(
    threads: int, passes: int, order: str, library: Any
) -> None:
    rng = np.random.default_rng(4)
    types = (BFLOAT, FLOAT, FLOAT)
    update = Update(ADAMW, leaves_of(TYPES, rng), types, step=2, p_start=64, state_start=0)
    update.run(library, instance(ADAMW, types), threads=threads, passes=passes, order=order)
    update.check()


@pytest.mark.parametrize("in_place", [False, True])
def test_parameters_may_be_written_where_they_were_read(in_place: bool, library: Any) -> None:
    rng = np.random.default_rng(5)
    update = Update(ADAMW, leaves_of(TYPES, rng), (FLOAT,) * 3, step=1)
    update.run(library, instance(ADAMW, (FLOAT,) * 3), in_place=in_place)
    update.check()


@pytest.mark.parametrize("layout", ["aligned", "unaligned", "sliced", "broadcast"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 1023, 1024, 1025, 1027, 2050])
def test_a_tail_touches_nothing_past_its_segment(layout: str, size: int, library: Any) -> None:
    rng = np.random.default_rng(size)
    leaves = [make_leaf(layout, (size,), stored, rng) for stored in TYPES]
    update = Update(ADAMW, leaves, (FLOAT, HALF, BFLOAT), step=0)
    kernel = instance(ADAMW, (FLOAT, HALF, BFLOAT))
    update.run(library, kernel)
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
    update = Update(ADAMW, leaves, (FLOAT,) * 3, step=0)
    update.run(library, instance(ADAMW, (FLOAT,) * 3), passes=2)
    update.check()


def test_a_kernel_without_tiles_reads_what_lies_along_its_rows(library: Any) -> None:
    rng = np.random.default_rng(7)
    leaves = [make_leaf(kind, (9, 13), FLOAT, rng) for kind in ("aligned", "sliced", "broadcast")]
    update = Update(ADAMW, leaves, (FLOAT,) * 3)
    update.run(library, instance(ADAMW, (FLOAT,) * 3, has_tiles=False))
    update.check()


@pytest.mark.parametrize("count", [1, 2, 19, 20])
def test_each_source_has_its_own_buffer(count: int, library: Any) -> None:
    rng = np.random.default_rng(8)
    leaves = [make_leaf("aligned", (10 + i,), TYPES[i % 3], rng) for i in range(count)]
    update = Update(ADAMW, leaves, (FLOAT,) * 3)
    update.run(library, instance(ADAMW, (FLOAT,) * 3))
    update.check()


@pytest.mark.parametrize(("schedule", "step"), [*product(SCHEDULES, STEPS)], ids=str)
def test_the_update_evaluates_its_schedule(
    schedule: tuple[Any, ...], step: int, library: Any
) -> None:
    rng = np.random.default_rng(9)
    leaf = make_leaf("aligned", (33,), FLOAT, rng)
    update = Update(SGD, [leaf], (FLOAT,) * 3, schedule=schedule, step=step)
    update.run(library, instance(SGD, (FLOAT,) * 3))
    update.check()


@pytest.mark.parametrize(("schedule", "step"), [*product([(), *SCHEDULES], STEPS)], ids=str)
def test_advance_counts_and_gives_the_learning_rate(
    schedule: tuple[Any, ...], step: int, library: Any
) -> None:
    next_step, rate = np.zeros(1, np.uint64), np.zeros(1, np.float32)
    no_rate = np.zeros(0, np.float32)
    library.run(
        "advance",
        grid=(1,),
        threads=(1,),
        buffers={
            0: np.array([step], np.uint64),
            1: next_step,
            2: rate if schedule else no_rate,
            3: np.array([args.schedule(*schedule)]),
        },
    )
    assert next_step[0] == step + 1
    if schedule:
        expected = np.float32(reference.schedule_value(schedule, step))
        assert abs(rate[0] - expected) <= np.spacing(abs(expected))


@pytest.mark.parametrize("stored", TYPES, ids=lambda t: t.name)
def test_copy_brings_any_layout_into_a_flat_array(stored: Type, library: Any) -> None:
    rng = np.random.default_rng(10)
    leaves = leaves_of([stored], rng)
    update = Update(Case("SGD", {}), leaves, (stored, FLOAT, FLOAT))
    update.run(library, f"Copy, {stored.name}, float, float, true")
    for leaf, at in zip(leaves, update.p_offsets, strict=True):
        np.testing.assert_array_equal(stored.decode(update.p_out[at : at + leaf.size]), leaf.values)


@pytest.mark.parametrize("case", RULES, ids=str)
def test_flushing_subnormals_leaves_normal_numbers_alone(case: Case, library: Any) -> None:
    rng = np.random.default_rng(14)
    leaves = leaves_of([FLOAT], rng)
    update = Update(case, leaves, (FLOAT,) * 3, step=3)
    update.run(library, instance(case, (FLOAT,) * 3), flush_to_zero=True)
    update.check()


@pytest.fixture(scope="session")
def fast_library(kernel_text: str) -> Any:
    """Compiled as if there were no NaN, which Metal's options should prevent."""
    wanted = [instance(ADAMW, types) for types in ((FLOAT,) * 3, (BFLOAT, FLOAT, FLOAT))]
    lines = [f'FLATSTEP_INSTANTIATE("{name}", {name})' for name in wanted]
    return simulator.build(kernel_text + "\n".join(lines) + "\n", fast_math=True)


@pytest.mark.parametrize("math", ["library", "fast_library"])
@pytest.mark.parametrize("types", [(FLOAT,) * 3, (BFLOAT, FLOAT, FLOAT)], ids=["float", "bfloat"])
def test_nan_and_infinity_are_seen(
    types: tuple[Type, Type, Type], math: str, request: pytest.FixtureRequest
) -> None:
    library = request.getfixturevalue(math)
    rng = np.random.default_rng(11)
    leaf = make_leaf("aligned", (7,), FLOAT, rng)
    leaf.memory[1], leaf.memory[3] = np.nan, np.inf
    update = Update(ADAMW, [leaf], types)
    update.run(library, instance(ADAMW, types))
    p = types[0].decode(update.p_out[update.p_offsets[0] : update.p_offsets[0] + 7])
    m = types[1].decode(update.m[update.state_offsets[0] : update.state_offsets[0] + 7])
    assert np.isnan(p[1]) and np.isnan(m[1]) and np.isinf(m[3])
    assert np.isfinite(p[[0, 2, 4, 5, 6]]).all()


@pytest.mark.parametrize("layout", ["aligned", "transposed"])
def test_a_segment_may_lie_beyond_four_billion_elements(layout: str, library: Any) -> None:
    check_far_segment(library, instance(ADAMW, (FLOAT,) * 3), layout)


@pytest.mark.parametrize("layout", [args.STRIDED, args.TILED])
def test_a_source_may_stride_over_billions_of_elements(layout: int, library: Any) -> None:
    check_far_source(library, instance(ADAMW, (FLOAT,) * 3), layout)


@pytest.mark.parametrize("layout", [args.ALIGNED, args.UNALIGNED, args.STRIDED, args.TILED])
def test_a_leaf_may_have_more_than_four_billion_elements(layout: int, library: Any) -> None:
    check_far_group(library, instance(ADAMW, (FLOAT,) * 3), layout)
