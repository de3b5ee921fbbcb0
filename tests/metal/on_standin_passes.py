"""What a step does besides its rule (groups, clipping, skipping, sums of gradients, averages): what
the Metal backend's host code makes of it, to the bits of the CPU backend.

Run as on_standin.py is. Where gradients are clipped by their norm they are small whole numbers,
whose squares add up to the same in any order.
"""

from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from cases import Case, random_array
from flatstep import _ext
from on_standin import updates
from on_standin_storages import (
    ADAMW,
    SHAPES,
    Rounding,
    Training,
    assert_same_bits,
    gradients_of,
    start_of,
)
from pass_training import PassTraining, Scalars, whole, with_value
from reference import to_float64
from standin_plugin import StandIn

NESTEROV = Case("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1})
LION = Case("Lion", {"betas": [0.9, 0.99], "weight_decay": 0.1})

KINDS: list[tuple[mx.Dtype, _ext.Rounding, mx.Dtype]] = [
    (mx.float32, Rounding.NEAREST, mx.float32),
    (mx.bfloat16, Rounding.NEAREST, mx.float32),
    (mx.bfloat16, Rounding.STOCHASTIC, mx.bfloat16),
    (mx.bfloat16, Rounding.KEEP_8_BITS, mx.uint8),
    (mx.float16, Rounding.KEEP_16_BITS, mx.uint8),
]
kinds = pytest.mark.parametrize(
    ("dtype", "rounding", "state_dtype"), KINDS, ids=lambda v: str(v).rpartition(".")[2]
)


@pytest.mark.parametrize("count", [2, 5, 28, 29, 40, 300])
def test_any_number_of_groups_each_with_its_rate(count: int, standin: StandIn) -> None:
    rng = np.random.default_rng(1)
    start = start_of(rng, mx.bfloat16, [(3 + i % 70,) for i in range(max(count, 9))])
    values = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    rule = _ext.Rule("adam", {**values, "bias_correction": 1.0})
    cosine = _ext.cosine_decay(1e-2, 0.0, 7)
    joined = _ext.join_schedules([_ext.linear_schedule(0.0, 1e-2, 3), cosine], [3])
    for g in range(1, count):
        source = [_ext.RateSource.ALL, _ext.RateSource.OWN, _ext.RateSource.SCHEDULE][g % 3]
        schedule = [cosine, joined][g % 2] if g % 3 == 2 else None
        own = {**values, "weight_decay": 0.01 * g, "bias_correction": g % 2}
        rule = rule.with_group(own, source, 1.0 + 0.1 * g, schedule)
    groups = _ext.LeafGroups([i % count for i in range(len(start))])
    rates = [1e-3 * g for g in range(1, count)]

    def make(schedule: _ext.PlainSchedule | None = None) -> PassTraining:
        options: Any = {"rule": rule, "groups": groups, "schedule": schedule}
        return PassTraining(ADAMW, start, scalars={"group_learning_rates": rates}, **options)

    steps = gradients_of(start, rng, 4)
    assert_same_bits(standin, make, steps)
    assert_same_bits(standin, lambda: make(joined), steps)


def test_frozen_leaves_stay_as_they_are(standin: StandIn) -> None:
    rng = np.random.default_rng(2)
    start = start_of(rng, mx.bfloat16)
    groups = _ext.LeafGroups([_ext.FROZEN if i % 3 == 1 else 0 for i in range(len(start))])

    def make() -> PassTraining:
        return PassTraining(
            ADAMW, start, Rounding.KEEP_8_BITS, groups=groups, sums=mx.float32, accumulate_steps=1
        )

    steps = gradients_of(start, rng, 3)
    assert_same_bits(standin, make, steps)
    training = make()
    training.take_step(steps[0])
    assert mx.array_equal(training.parameters["1"], start["1"])
    assert not mx.array_equal(training.parameters["0"], start["0"])


CLIPPED: dict[str, tuple[dict[str, Any], Scalars]] = {
    "scale": ({}, {"grad_scale": 0.25}),
    "value": ({"clip_value": 0.5}, {}),
    "norm": ({"has_norm": True, "max_grad_norm": 10.0}, {"grad_norm": 0.0}),
    "norm that is less": ({"has_norm": True, "max_grad_norm": 1e6}, {"grad_norm": 0.0}),
    "all": (
        {"has_norm": True, "max_grad_norm": 3.0, "clip_value": 0.75},
        {"grad_scale": 0.25, "grad_norm": 0.0},
    ),
}


@pytest.mark.parametrize("clipped", CLIPPED)
@kinds
def test_gradients_are_scaled_and_clipped(
    clipped: str, dtype: mx.Dtype, rounding: Any, state_dtype: mx.Dtype, standin: StandIn
) -> None:
    rng = np.random.default_rng(3)
    start = start_of(rng, dtype)
    settings, scalars = CLIPPED[clipped]
    steps = whole(gradients_of(start, rng, 3))

    def make() -> PassTraining:
        return PassTraining(NESTEROV, start, rounding, state_dtype, scalars=scalars, **settings)

    assert_same_bits(standin, make, steps)


@kinds
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(
    dtype: mx.Dtype, rounding: Any, state_dtype: mx.Dtype, standin: StandIn
) -> None:
    rng = np.random.default_rng(4)
    start = start_of(rng, dtype)
    steps = whole(gradients_of(start, rng, 6))
    steps[1] = with_value(steps[1], "2", 77, np.inf)
    steps[2] = with_value(steps[2], "0", 0, np.nan)
    steps[4] = with_value(steps[4], "other", 69, -np.inf)
    kept: list[Any] = []

    def hold(training: Training, step: int) -> None:
        # A leaf that is held: parameters that lie flat are then not in place.
        kept.append(training.parameters["5"] if step in (2, 3) else None)

    def make() -> PassTraining:
        return PassTraining(
            ADAMW,
            start,
            rounding,
            state_dtype,
            scalars={"skipped_steps": 0, "grad_norm": 0.0},
            average=mx.float32,
            has_norm=True,
            skips_nonfinite=True,
            clip_value=2.0,
            ema=0.9,
        )

    assert_same_bits(standin, make, steps, hold)
    training = make()
    for step, given in enumerate(steps):
        before = training.bits()
        training.take_step(given)
        after = training.bits()
        is_skipped = step in (1, 2, 4)
        assert after["skipped_steps"] - before["skipped_steps"] == is_skipped
        names = [name for name in before if name not in ("skipped_steps", "learning_rate")]
        same = [np.array_equal(before[name], after[name]) for name in names]
        assert all(same) == is_skipped, step


SUMS = [mx.float32, mx.bfloat16, mx.float16]


@pytest.mark.parametrize("sums", SUMS, ids=lambda v: str(v).rpartition(".")[2])
@pytest.mark.parametrize("waits", [False, True], ids=["when they are there", "at each gradient"])
@kinds
def test_gradients_are_summed_up(
    sums: mx.Dtype,
    waits: bool,
    dtype: mx.Dtype,
    rounding: Any,
    state_dtype: mx.Dtype,
    standin: StandIn,
) -> None:
    rng = np.random.default_rng(5)
    start = start_of(rng, dtype)
    steps = gradients_of(start, rng, 7)

    class EveryThird(PassTraining):
        def take_step(self, gradients: dict[str, mx.array]) -> None:
            count = getattr(self, "count", 0) + 1
            self.count = count % 3
            if waits or self.count == 0:
                super().take_step(gradients)
                return
            self.add(gradients)
            mx.eval(self.state, self.scalars)
            mx.synchronize()

    def make() -> PassTraining:
        return EveryThird(
            ADAMW,
            start,
            rounding,
            state_dtype,
            sums=sums,
            scalars={"grad_scale": 0.5},
            accumulate_steps=3,
        )

    assert_same_bits(standin, make, steps)


def test_sums_that_are_not_finite_are_dropped(standin: StandIn) -> None:
    rng = np.random.default_rng(6)
    start = start_of(rng, mx.bfloat16)
    steps = whole(gradients_of(start, rng, 8))
    steps[2] = with_value(steps[2], "4", 70, np.inf)
    for held in (False, True):
        kept: list[Any] = []

        def hold(training: Training, step: int, held: bool = held, kept: Any = kept) -> None:
            kept.append((list(training.state[-1]), training.parameters["2"]) if held else None)

        def make() -> PassTraining:
            return PassTraining(
                ADAMW,
                start,
                Rounding.KEEP_8_BITS,
                mx.uint8,
                sums=mx.float32,
                average=mx.bfloat16,
                scalars={"skipped_steps": 0, "grad_norm": 0.0},
                accumulate_steps=2,
                has_norm=True,
                max_grad_norm=20.0,
                skips_nonfinite=True,
                ema=0.5,
            )

        assert_same_bits(standin, make, steps, hold)
    training = make()
    for given in steps:
        training.take_step(given)
    assert training.bits()["skipped_steps"] == 1 and training.bits()["step"] == 3


@pytest.mark.parametrize("average", SUMS, ids=lambda v: str(v).rpartition(".")[2])
@pytest.mark.parametrize(("ema_start", "ema_every"), [(0, 1), (2, 1), (1, 3)])
@kinds
def test_an_average_is_of_parameters_before_they_are_rounded(
    average: mx.Dtype,
    ema_start: int,
    ema_every: int,
    dtype: mx.Dtype,
    rounding: Any,
    state_dtype: mx.Dtype,
    standin: StandIn,
) -> None:
    rng = np.random.default_rng(7)
    start = start_of(rng, dtype)
    ema = {"ema": 0.99, "ema_start": ema_start, "ema_every": ema_every}

    def make() -> PassTraining:
        return PassTraining(LION, start, rounding, state_dtype, average=average, **ema)

    assert_same_bits(standin, make, gradients_of(start, rng, 6))


def test_a_part_of_the_leaves_with_everything_at_once(standin: StandIn) -> None:
    rng = np.random.default_rng(8)
    start = start_of(rng, mx.bfloat16)
    steps = [
        {name: g for i, (name, g) in enumerate(given.items()) if (i + step // 2) % 3}
        for step, given in enumerate(whole(gradients_of(start, rng, 8)))
    ]
    options: Any = {
        "sums": mx.bfloat16,
        "average": mx.float32,
        "scalars": {"skipped_steps": 0, "grad_norm": 0.0, "grad_scale": 0.5},
        "accumulate_steps": 2,
        "has_norm": True,
        "max_grad_norm": 5.0,
        "clip_value": 1.5,
        "skips_nonfinite": True,
        "ema": 0.9,
        "ema_every": 2,
    }
    for rounding, state_dtype in product(Rounding, (mx.uint8, mx.float32)):
        assert_same_bits(
            standin,
            lambda r=rounding, s=state_dtype: PassTraining(ADAMW, start, r, s, **options),
            steps,
        )


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_norm_is_the_cpu_backends(dtype: mx.Dtype, standin: StandIn) -> None:
    rng = np.random.default_rng(9)
    arrays = [random_array((size,), rng, dtype) for size in (1, 63, 64, 65, 4097, 100_000)]
    arrays += [random_array((300, 500), rng, dtype).T, random_array((40, 50), rng)[::2, ::3]]
    arrays += [mx.broadcast_to(mx.array(0.5), (1000,)), mx.zeros((0,)), mx.zeros((3, 0))]
    arrays += [random_array((5,), rng, dtype) for _ in range(50)]
    mx.eval(arrays)
    squares = [np.square(to_float64(a)).sum() for a in arrays]
    for chosen in (range(len(arrays)), [9], [], [6], [7]):
        expected = np.sqrt(sum(squares[i] for i in chosen))
        for on_gpu in (False, True):
            standin.use_gpu(on_gpu)
            norm = _ext.global_norm([arrays[i] for i in chosen]).item()
            assert abs(norm - expected) <= 1e-6 * expected


@pytest.mark.parametrize("has_norm", [False, True])
def test_sums_whose_norm_is_taken_in_the_same_evaluation_are_copied(
    has_norm: bool, standin: StandIn
) -> None:
    """As long as that has not run; sums that were just added to are in place, as all else is."""
    rng = np.random.default_rng(11)
    start = start_of(rng, mx.float32)
    given = whole(gradients_of(start, rng, 3))
    options: Any = {"sums": mx.float32, "accumulate_steps": 1, "has_norm": has_norm}
    training = PassTraining(ADAMW, start, **options)
    for step, gradients in enumerate(given):
        if step == 2:
            standin.hold_stream(True)
        before = _ext.reuse_counters()
        training.build_step(gradients)
        mx.async_eval(training.parameters, training.state, training.scalars)
        after = _ext.reuse_counters()
        standin.hold_stream(False)
        mx.synchronize()
    changed = {name: after[name] - before[name] for name in after}
    assert changed["state_fresh"] == has_norm and changed["state_in_place"] == 4 - has_norm
    standin.use_gpu(False)
    expected = PassTraining(ADAMW, start, **options)
    for gradients in given:
        expected.take_step(gradients)
    for name, bits in expected.bits().items():
        np.testing.assert_array_equal(bits, training.bits()[name])


def test_sums_are_read_and_cleared_where_they_lie(standin: StandIn) -> None:
    rng = np.random.default_rng(10)
    start = start_of(rng, mx.bfloat16, [shape for shape in SHAPES for _ in range(9)])
    options: Any = {"sums": mx.float32, "accumulate_steps": 1}
    training = PassTraining(ADAMW, start, Rounding.KEEP_8_BITS, mx.uint8, **options)
    start.clear()
    for step in range(4):
        given = gradients_of(dict(training.parameters), rng, 1)[0]
        before = _ext.reuse_counters()
        training.add(given)
        mx.eval(training.state, training.scalars)
        mx.synchronize()
        standin.take_log()
        sums, training.sums = training.sums, None
        training.take_step(given)
        training.sums = sums
        if step >= 2:
            assert _ext.reuse_counters()["state_fresh"] == before["state_fresh"]
            # As many leaves as the table holds, whatever they are.
            assert len(updates(standin.take_log())) == -(-72 // 64) + 1
