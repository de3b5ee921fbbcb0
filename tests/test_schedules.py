"""Schedules: the values that MLX documents, float64 at every step, else MLX's behaviour."""

import copy
import math
from functools import partial
from typing import Any

import flatstep
import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from flatstep.diagnosis.cases import build_schedule as build
from reference import schedule_value, to_float64, ulp

# A schedule is written (name, *arguments): the same row builds ours, MLX's and the reference.
Spec = Any

WARMUP = ("linear_schedule", 0.0, 0.1, 10)
COSINE = ("cosine_decay", 0.1, 200)

SIMPLE: list[Spec] = [
    WARMUP,
    ("linear_schedule", 0.1, 0.0, 7),
    ("linear_schedule", 3e-4, 1e-5, 1),
    ("linear_schedule", -0.5, 0.25, 40),
    ("linear_schedule", 0.1, 0.1, 3),
    COSINE,
    ("cosine_decay", 0.1, 1000),
    ("cosine_decay", 0.1, 33, 0.01),
    ("cosine_decay", 1e-5, 20, 1e-3),
    ("cosine_decay", 2.0, 1),
    ("exponential_decay", 0.1, 0.9),
    ("exponential_decay", 1.0, 0.999999),
    ("exponential_decay", 1e-6, 1.1),
    ("exponential_decay", 0.1, 1.0),
    ("exponential_decay", 0.1, 0.0),
    ("exponential_decay", 0.1, -0.9),
    ("exponential_decay", -0.1, 0.5),
    ("step_decay", 0.1, 0.9, 10),
    ("step_decay", 0.1, 0.5, 1),
    ("step_decay", 0.1, 0.0, 5),
    ("step_decay", 0.1, -0.5, 7),
    ("step_decay", 3.0, 1.01, 3),
]
JOINED: list[Spec] = [
    ("join_schedules", [COSINE], []),
    ("join_schedules", [WARMUP, COSINE], [10]),
    (
        "join_schedules",
        [WARMUP, ("step_decay", 0.1, 0.5, 4), ("exponential_decay", 1, 0.9)],
        [5, 30],
    ),
    # Unsorted, equal, at zero and before it: the last boundary reached, in list order, decides.
    ("join_schedules", [WARMUP, COSINE, ("exponential_decay", 0.3, 0.9)], [20, 10]),
    ("join_schedules", [WARMUP, COSINE, ("exponential_decay", 0.3, 0.9)], [10, 10]),
    ("join_schedules", [WARMUP, COSINE], [0]),
    (
        "join_schedules",
        [
            WARMUP,
            ("join_schedules", [COSINE, ("step_decay", 0.2, 0.5, 3)], [12]),
            ("join_schedules", [("linear_schedule", 0.1, 0.0, 9), WARMUP], [9]),
        ],
        [10, 40],
    ),
]
ALL = SIMPLE + JOINED


def hyperbola(step: Any) -> Any:
    return 0.45 / (step + 4.5)


# The user's own functions are evaluated with MLX operations, so they have float32's error.
CALLABLES: list[Spec] = [
    hyperbola,
    ("join_schedules", [WARMUP, hyperbola], [10]),
    ("join_schedules", [hyperbola, COSINE, hyperbola], [7, 20]),
    (
        "join_schedules",
        [WARMUP, ("join_schedules", [hyperbola, ("exponential_decay", 0.1, 0.9)], [5])],
        [10],
    ),
]


def spec_id(spec: Spec) -> str:
    if callable(spec):
        return spec.__name__
    name, *arguments = spec
    if name == "join_schedules":
        schedules, boundaries = arguments
        return f"join({'; '.join(map(spec_id, schedules))} at {boundaries})"
    return f"{name}{tuple(arguments)}"


def largest_value(spec: Spec) -> float:
    return max(abs(schedule_value(spec, step)) for step in range(80))


def rate_after(optimizer: Any, step: int) -> float:
    """The learning rate of the update with which ``step`` becomes ``step + 1``."""
    optimizer.state["step"] = mx.array(step, mx.uint64)
    optimizer.update({}, {})
    assert optimizer.step.item() == step + 1
    rate = optimizer.state["learning_rate"]
    assert rate.dtype == mx.float32 and rate.shape == ()
    return rate.item()


def assert_within_one_ulp(rate: float, expected: float) -> None:
    assert abs(rate - expected) <= ulp(expected, mx.float32), (rate, expected)


every_schedule = pytest.mark.parametrize("spec", ALL, ids=spec_id)
schedules_and_callables = pytest.mark.parametrize("spec", ALL + CALLABLES, ids=spec_id)


@pytest.mark.parametrize(
    ("spec", "updates", "first", "shown"),
    [
        (("cosine_decay", 1e-1, 1000), 5, "0.1", "0.0999961"),
        (("exponential_decay", 1e-1, 0.9), 5, "0.1", "0.06561"),
        (("linear_schedule", 0, 1e-1, 100), 101, "0", "0.1"),
        (("step_decay", 1e-1, 0.9, 10), 21, "0.1", "0.081"),
        (
            ("join_schedules", [("linear_schedule", 0, 1e-1, 10), COSINE], [10]),
            12,
            "0",
            "0.0999938",
        ),
    ],
    ids=lambda value: spec_id(value) if isinstance(value, tuple) else None,
)
def test_the_documented_examples_show_the_documented_values(
    spec: Spec, updates: int, first: str, shown: str
) -> None:
    optimizer = flatstep.SGD(learning_rate=build(flatstep, spec))
    assert repr(optimizer.learning_rate) == f"array({first}, dtype=float32)"
    for _ in range(updates):
        optimizer.update({}, {})
    assert repr(optimizer.learning_rate) == f"array({shown}, dtype=float32)"


@every_schedule
def test_every_step_is_within_one_ulp_of_float64(spec: Spec) -> None:
    optimizer = flatstep.SGD(build(flatstep, spec))
    for step in range(120):
        optimizer.update({}, {})
        rate = optimizer.state["learning_rate"]
        assert rate.dtype == mx.float32 and rate.shape == ()
        assert_within_one_ulp(rate.item(), schedule_value(spec, step))
    assert optimizer.step.item() == 120


@schedules_and_callables
def test_a_new_optimizer_shows_the_rate_of_its_first_step(spec: Spec) -> None:
    rate = flatstep.SGD(build(flatstep, spec)).learning_rate
    assert rate.dtype == mx.float32
    assert abs(rate.item() - schedule_value(spec, 0)) <= 1e-6 * largest_value(spec)


@every_schedule
@pytest.mark.parametrize("step", [999, 1000, 1001, 2**24 + 1, 2**31 + 3, 2**32 + 5, 2**40])
def test_far_steps_are_within_one_ulp_of_float64(spec: Spec, step: int) -> None:
    if spec[0] == "exponential_decay" and spec[2] > 1:
        spec = (spec[0], spec[1], 1 + 1 / step)
    elif spec[0] == "step_decay" and spec[2] > 1:
        spec = (*spec[:3], max(step // 50, 1))
    rate = rate_after(flatstep.SGD(build(flatstep, spec)), step)
    assert_within_one_ulp(rate, schedule_value(spec, step))


@pytest.mark.parametrize(
    ("init", "decay_rate", "step", "expected"),
    [
        (1e-30, 10.0, 40, 1e10),
        (-1e-37, 10.0, 74, -1e37),
        (1e30, 0.1, 50, 1e-20),
        (1e38, 1e-37, 2, 1e-36),
        (3e38, 0.9999, 3, 3e38 * 0.9999**3),
        (0.1, 2.0, 131, 0.1 * 2.0**131),
        (0.1, 2.0, 132, math.inf),
        (-0.1, 2.0, 10**6, -math.inf),
        (0.0, 2.0, 10**6, 0.0),
        (1e-30, 0.1, 30, 0.0),
    ],
)
def test_a_power_may_leave_float32_where_the_rate_does_not(
    init: float, decay_rate: float, step: int, expected: float
) -> None:
    for schedule, at in (
        (flatstep.exponential_decay(init, decay_rate), step),
        (flatstep.step_decay(init, decay_rate, 3), 3 * step + 2),
    ):
        rate = rate_after(flatstep.SGD(schedule), at)
        if math.isinf(expected) or expected == 0:
            assert rate == expected
        else:
            assert_within_one_ulp(rate, expected)


@pytest.mark.parametrize(
    "spec",
    [
        ("linear_schedule", 0.0, 0.1, 2**30),
        ("linear_schedule", 0.1, 0.01, 2**41),
        ("cosine_decay", 0.1, 2**25),
        ("cosine_decay", 0.1, 2**41, 0.01),
        ("exponential_decay", 0.1, 1 - 1e-7),
        ("exponential_decay", 0.1, 1 - 1e-12),
        ("step_decay", 0.1, 0.99, 2**20),
        ("step_decay", 0.1, 0.99, 2**34 + 1),
        ("join_schedules", [WARMUP, ("cosine_decay", 0.1, 2**25)], [2**24]),
        ("join_schedules", [WARMUP, COSINE], [2**40 - 100]),
    ],
    ids=spec_id,
)
@pytest.mark.parametrize("step", [2**24 - 1, 2**24, 2**24 + 1, 2**40 - 1, 2**40, 2**40 + 1])
def test_long_schedules_count_steps_that_float32_cannot(spec: Spec, step: int) -> None:
    rate = rate_after(flatstep.SGD(build(flatstep, spec)), step)
    assert_within_one_ulp(rate, schedule_value(spec, step))


@schedules_and_callables
def test_the_rate_in_an_optimizer_is_mlx_value(spec: Spec) -> None:
    ours = flatstep.AdamW(build(flatstep, spec))
    theirs = build(mlx.optimizers, spec)
    scale = largest_value(spec)
    for step in range(80):
        ours.update({}, {})
        assert abs(ours.learning_rate.item() - float(theirs(step))) <= 1e-6 * scale, step


@pytest.mark.parametrize("spec", CALLABLES, ids=spec_id)
def test_a_users_function_agrees_with_float64_also_far_out(spec: Spec) -> None:
    optimizer = flatstep.Adam(build(flatstep, spec))
    for step in [*range(40), 1000, 2**24 + 1, 2**40]:
        expected = schedule_value(spec, step)
        assert rate_after(optimizer, step) == pytest.approx(expected, rel=1e-6, abs=1e-12)


STEPS_AS_ARRAYS = [
    mx.array(3),
    mx.array(12, mx.uint64),
    mx.array([11]),
    mx.array([0, 9, 10, 11, 40]),
    mx.array([[1, 20, 30], [400, 5, 60]], mx.uint32),
    mx.array([10, 11], mx.uint64),
    mx.array([[[2.0], [15.0]]]),
]


@schedules_and_callables
def test_calling_a_schedule_gives_what_calling_mlx_schedule_gives(spec: Spec) -> None:
    ours, theirs = build(flatstep, spec), build(mlx.optimizers, spec)
    scale = largest_value(spec)
    for step in [0, 1, 9, 10, 11, 50, 1000, 5.0]:
        assert abs(float(ours(step)) - float(theirs(step))) <= 1e-6 * scale, step
        assert isinstance(ours(step), mx.array) == isinstance(theirs(step), mx.array)
    for steps in STEPS_AS_ARRAYS:
        got, expected = ours(steps), theirs(steps)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        # MLX computes a power of an array in float32, which loses digits as the exponent grows.
        assert np.allclose(to_float64(got), to_float64(expected), 1e-4, 1e-6 * scale), steps


@schedules_and_callables
def test_a_schedule_runs_inside_a_compiled_function(spec: Spec) -> None:
    optimizer = flatstep.SGD(build(flatstep, spec))

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def update() -> None:
        optimizer.update({}, {})

    eager = flatstep.SGD(build(flatstep, spec))
    for step in range(45):
        update()
        eager.update({}, {})
        assert optimizer.step.item() == step + 1
        assert optimizer.learning_rate.item() == pytest.approx(eager.learning_rate.item(), rel=3e-7)


@every_schedule
def test_the_rate_steers_the_update_of_the_same_step(spec: Spec) -> None:
    optimizer = flatstep.SGD(build(flatstep, spec))
    params = {"w": mx.zeros((3,))}
    for step in range(25):
        updated = optimizer.apply_gradients({"w": mx.array([-1.0, -1.0, -1.0])}, params)
        assert updated["w"].tolist() == [optimizer.learning_rate.item()] * 3
        assert_within_one_ulp(optimizer.learning_rate.item(), schedule_value(spec, step))


def test_a_join_of_functions_that_return_python_numbers_works_as_in_mlx() -> None:
    functions = [lambda _: 3, lambda _: 4, lambda _: 5]
    ours = flatstep.join_schedules(functions, [2, 4])
    theirs = mlx.optimizers.join_schedules(functions, [2, 4])
    assert [ours(step).item() for step in range(7)] == [3, 3, 4, 4, 5, 5, 5]
    assert ours(3).dtype == theirs(3).dtype
    optimizer = flatstep.SGD(ours)
    rates = []
    for _ in range(6):
        optimizer.update({}, {})
        rates.append(optimizer.learning_rate.item())
    assert rates == [3, 3, 4, 4, 5, 5]


def test_a_users_function_gets_the_steps_since_its_boundary() -> None:
    schedule = flatstep.join_schedules([build(flatstep, WARMUP), lambda step: step * 1.0], [10])
    optimizer = flatstep.SGD(schedule)
    assert [rate_after(optimizer, step) for step in (10, 11, 25)] == [0.0, 1.0, 15.0]


def test_a_users_class_with_call_is_a_schedule() -> None:
    class Halving:
        def __call__(self, step: mx.array) -> mx.array:
            return 0.5 ** (step + 1)

    optimizer = flatstep.SGD(Halving())
    assert [rate_after(optimizer, step) for step in range(3)] == [0.5, 0.25, 0.125]


def test_mlx_own_schedules_work_as_functions() -> None:
    theirs = mlx.optimizers.join_schedules(
        [mlx.optimizers.linear_schedule(0.0, 0.1, 5), flatstep.cosine_decay(0.1, 50)], [5]
    )
    expected = (
        "join_schedules",
        [("linear_schedule", 0.0, 0.1, 5), ("cosine_decay", 0.1, 50)],
        [5],
    )
    optimizer = flatstep.SGD(theirs)
    for step in range(60):
        value = schedule_value(expected, step)
        assert rate_after(optimizer, step) == pytest.approx(value, rel=1e-5, abs=1e-7)


def test_our_schedules_work_in_mlx_optimizers() -> None:
    spec = JOINED[1]
    optimizer = mlx.optimizers.SGD(build(flatstep, spec))
    for step in range(40):
        optimizer.update({}, {})
        value = schedule_value(spec, step)
        assert optimizer.learning_rate.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("linear_schedule", (0.0, 0.1, 0)),
        ("linear_schedule", (0.0, 0.1, -3)),
        ("cosine_decay", (0.1, 0)),
        ("cosine_decay", (0.1, -1, 0.01)),
        ("step_decay", (0.1, 0.9, 0)),
        ("step_decay", (0.1, 0.9, -10)),
        ("step_decay", (0.1, 0.9, 0.5)),
        ("join_schedules", ([], [])),
        ("join_schedules", ([abs, abs, abs], [2, 3, 4])),
        ("join_schedules", ([abs, abs], [])),
        ("linear_schedule", (0.0, 0.1)),
        ("cosine_decay", ()),
    ],
)
def test_a_wrong_argument_is_the_same_error_as_in_mlx(name: str, arguments: tuple[Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as theirs:
        getattr(mlx.optimizers, name)(*arguments)
    with pytest.raises(theirs.type) as ours:
        getattr(flatstep, name)(*arguments)
    assert str(ours.value) == str(theirs.value)


def test_arguments_have_mlx_names() -> None:
    assert flatstep.linear_schedule(init=0, end=0.1, steps=10)(5).item() == pytest.approx(0.05)
    assert flatstep.cosine_decay(init=0.1, decay_steps=10, end=0.01)(10).item() == pytest.approx(
        0.01
    )
    assert flatstep.exponential_decay(init=0.1, decay_rate=0.9)(1) == pytest.approx(0.09)
    assert flatstep.step_decay(init=0.1, decay_rate=0.9, step_size=10)(10) == pytest.approx(0.09)
    join = flatstep.join_schedules(schedules=[lambda _: 1.0, lambda _: 2.0], boundaries=[3])
    assert join(3).item() == 2.0


@every_schedule
def test_a_copied_schedule_has_the_same_values(spec: Spec) -> None:
    optimizer = flatstep.SGD(copy.deepcopy(build(flatstep, spec)))
    assert_within_one_ulp(rate_after(optimizer, 13), schedule_value(spec, 13))
