"""A bad argument is an error that says what was wrong, and nothing has changed afterwards."""

import math
from collections.abc import Callable
from typing import Any

import flatstep as optim
import mlx.core as mx
import numpy as np
import pytest
from cases import Case, random_tree
from flatstep import _ext
from mlx.utils import tree_map
from models import every_rule
from shadow import Run, Shadow, assert_it_goes_on, assert_same_bits, bits, copied, fails, train

NAN, INF = math.nan, math.inf
# Class, arguments, exception, and what its message names: the argument, the value, what is allowed.
BAD_ARGUMENTS: list[tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ("SGD", {"momentum": -0.5}, ValueError, ("SGD momentum", "-0.5", ">=0")),
    ("SGD", {"momentum": NAN}, ValueError, ("SGD momentum", "nan", "finite")),
    ("SGD", {"momentum": INF}, ValueError, ("SGD momentum", "inf", "finite")),
    ("SGD", {"momentum": 1e39}, ValueError, ("SGD momentum", "1e+39", "finite in float32")),
    ("SGD", {"momentum": 10**400}, ValueError, ("SGD momentum", "inf", "finite in float32")),
    ("SGD", {"momentum": "fast"}, TypeError, ("SGD momentum", "'fast'", "number")),
    ("SGD", {"momentum": "0.9"}, TypeError, ("SGD momentum", "'0.9'", "number")),
    ("SGD", {"momentum": None}, TypeError, ("SGD momentum", "None", "number")),
    ("SGD", {"momentum": 1j}, TypeError, ("SGD momentum", "1j", "number")),
    ("SGD", {"momentum": mx.array([0.1, 0.2])}, TypeError, ("SGD momentum", "array", "number")),
    ("SGD", {"weight_decay": NAN}, ValueError, ("SGD weight_decay", "nan", "finite")),
    ("SGD", {"weight_decay": -INF}, ValueError, ("SGD weight_decay", "-inf", "finite")),
    (
        "SGD",
        {"weight_decay": -1e39},
        ValueError,
        ("SGD weight_decay", "-1e+39", "finite in float32"),
    ),
    ("SGD", {"weight_decay": [0.1]}, TypeError, ("SGD weight_decay", "[0.1]", "number")),
    ("SGD", {"dampening": -1.0}, ValueError, ("SGD dampening", "-1", ">=0")),
    ("SGD", {"dampening": NAN}, ValueError, ("SGD dampening", "nan", "finite")),
    ("SGD", {"dampening": 1e39}, ValueError, ("SGD dampening", "1e+39", "finite in float32")),
    ("SGD", {"nesterov": True}, ValueError, ("Nesterov", "momentum", "zero dampening")),
    (
        "SGD",
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        ValueError,
        ("Nesterov", "momentum", "zero dampening"),
    ),
    ("Adam", {"betas": (1.0, 0.999)}, ValueError, ("Adam beta1", "1 ", "[0, 1)")),
    ("Adam", {"betas": (0.9, -0.1)}, ValueError, ("Adam beta2", "-0.1", "[0, 1)")),
    ("Adam", {"betas": (NAN, 0.9)}, ValueError, ("Adam beta1", "nan", "[0, 1)")),
    ("Adam", {"betas": (0.9, INF)}, ValueError, ("Adam beta2", "inf", "[0, 1)")),
    ("Adam", {"betas": (0.9,)}, ValueError, ("Adam betas", "two", "1 ")),
    ("Adam", {"betas": (0.9, 0.99, 0.999)}, ValueError, ("Adam betas", "two", "3 ")),
    ("Adam", {"betas": 0.9}, TypeError, ("Adam betas", "0.9")),
    ("Adam", {"betas": None}, TypeError, ("Adam betas", "None")),
    ("Adam", {"betas": (0.9, "b")}, TypeError, ("Adam beta2", "'b'", "number")),
    ("Adam", {"eps": -1e-8}, ValueError, ("Adam epsilon", "-1e-08", ">=0")),
    ("Adam", {"eps": NAN}, ValueError, ("Adam epsilon", "nan", "finite")),
    ("Adam", {"eps": INF}, ValueError, ("Adam epsilon", "inf", "finite")),
    ("Adam", {"eps": 1e39}, ValueError, ("Adam epsilon", "1e+39", "finite in float32")),
    ("Adam", {"eps": None}, TypeError, ("Adam epsilon", "None", "number")),
    ("AdamW", {"betas": (0.9, 1.5)}, ValueError, ("AdamW beta2", "1.5", "[0, 1)")),
    ("AdamW", {"eps": -1}, ValueError, ("AdamW epsilon", "-1", ">=0")),
    ("AdamW", {"weight_decay": NAN}, ValueError, ("AdamW weight_decay", "nan", "finite")),
    ("AdamW", {"weight_decay": 1e39}, ValueError, ("AdamW weight_decay", "1e+39", "finite")),
    ("AdamW", {"weight_decay": "small"}, TypeError, ("AdamW weight_decay", "'small'", "number")),
    ("AdamW", {"state_dtype": mx.int32}, ValueError, ("state_dtype", "int32", "mx.bfloat16")),
    ("AdamW", {"state_dtype": mx.float64}, ValueError, ("state_dtype", "float64", "mx.bfloat16")),
    ("SGD", {"state_dtype": "float32"}, ValueError, ("state_dtype", "'float32'", "mx.bfloat16")),
]
BAD_RATES: list[tuple[Any, type[Exception], tuple[str, ...]]] = [
    (NAN, ValueError, ("learning_rate", "nan", "finite")),
    (INF, ValueError, ("learning_rate", "inf", "finite")),
    (-1e39, ValueError, ("learning_rate", "-1e+39", "finite in float32")),
    (10**400, ValueError, ("learning_rate", "inf", "finite in float32")),
    (mx.array(NAN), ValueError, ("learning_rate", "nan", "finite in float32")),
    (mx.array([-INF], mx.bfloat16), ValueError, ("learning_rate", "-inf", "finite in float32")),
    (mx.array(INF, mx.float16), ValueError, ("learning_rate", "inf", "finite in float32")),
    (mx.array(1e39, mx.float64), ValueError, ("learning_rate", "1e+39", "finite in float32")),
    ("0.1", TypeError, ("learning_rate", "'0.1'", "number")),
    ("fast", TypeError, ("learning_rate", "'fast'", "number")),
    (None, TypeError, ("learning_rate", "None", "number")),
    ([0.1], TypeError, ("learning_rate", "[0.1]", "number")),
    (1j, TypeError, ("learning_rate", "1j", "number")),
    (mx.array([0.1, 0.2]), ValueError, ("learning_rate", "(2,)", "one real number")),
    (mx.zeros((0,)), ValueError, ("learning_rate", "(0,)", "one real number")),
    (mx.array(1j), ValueError, ("learning_rate", "complex64", "one real number")),
]


@pytest.mark.parametrize(("rule", "arguments", "exception", "parts"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named(
    rule: str, arguments: dict[str, Any], exception: type[Exception], parts: tuple[str, ...]
) -> None:
    fails(lambda: getattr(optim, rule)(0.1, **arguments), exception, *parts)


SHAPES = {"w": (3, 4), "layers": [{"weight": (70,)}, {"bias": ()}]}


def new_tree(seed: int) -> Any:
    return random_tree(SHAPES, np.random.default_rng(seed))


def trained(make: Callable[[], Any]) -> tuple[Run, Shadow]:
    return train(Run(make(), new_tree(1)), Shadow(make, new_tree(1)), new_tree)


# ---- Learning rates ----

every_bad_rate = pytest.mark.parametrize(
    ("rate", "exception", "parts"), BAD_RATES, ids=[str(rate) for rate, _, _ in BAD_RATES]
)


@every_bad_rate
def test_a_bad_learning_rate_is_refused_at_once(
    rate: Any, exception: type[Exception], parts: tuple[str, ...]
) -> None:
    fails(lambda: optim.AdamW(rate), exception, *parts)


@every_bad_rate
def test_assigning_a_bad_learning_rate_changes_nothing(
    rate: Any, exception: type[Exception], parts: tuple[str, ...]
) -> None:
    run, shadow = trained(lambda: optim.AdamW(0.1))
    fails(lambda: setattr(run.optimizer, "learning_rate", rate), exception, *parts)
    fails(lambda: run.optimizer.state.update(learning_rate=rate), exception, *parts)
    assert_it_goes_on(run, shadow, new_tree)


@every_bad_rate
def test_a_state_with_a_bad_learning_rate_is_refused(
    rate: Any, exception: type[Exception], parts: tuple[str, ...]
) -> None:
    run, shadow = trained(lambda: optim.AdamW(0.1))
    bad = {**run.optimizer.state, "learning_rate": rate}
    fails(lambda: setattr(run.optimizer, "state", bad), exception, *parts)
    assert_it_goes_on(run, shadow, new_tree)


def test_the_largest_float32_is_a_learning_rate() -> None:
    largest = mx.finfo(mx.float32).max
    for rate in (largest, -largest, 3.4028235e38, mx.array(largest)):
        assert optim.SGD(rate).learning_rate.abs().item() == largest


def test_a_learning_rate_that_is_not_evaluated_is_not_looked_at() -> None:
    rate = mx.array(0.0) / mx.array(0.0)
    optimizer = optim.SGD(rate)
    optimizer.learning_rate = rate
    assert _ext.known_value(rate) is None
    seen = []

    @mx.compile
    def update(rate: mx.array) -> mx.array:
        optimizer = optim.SGD(rate)
        seen.append(_ext.known_value(rate))
        updated: mx.array = optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})["w"]
        return updated

    assert mx.isnan(update(mx.array(NAN))).all().item()
    assert update(mx.array(0.5)).tolist() == [0.5, 0.5]
    assert seen == [None]


def bad_schedules() -> list[tuple[str, Any, type[Exception], tuple[str, ...]]]:
    def broken(step: Any) -> Any:
        raise RuntimeError("no rate today")

    return [
        ("raises", broken, RuntimeError, ("no rate today",)),
        ("gives a string", lambda step: "0.1", TypeError, ("learning_rate", "'0.1'")),
        ("gives None", lambda step: None, TypeError, ("learning_rate", "None")),
        ("gives NaN", lambda step: NAN, ValueError, ("learning_rate", "nan")),
        ("overflows", lambda step: 1e39, ValueError, ("learning_rate", "1e+39")),
        ("gives two", lambda step: mx.array([0.1, 0.2]), ValueError, ("learning_rate", "(2,)")),
    ]


@pytest.mark.parametrize(("name", "schedule", "exception", "parts"), bad_schedules())
def test_a_schedule_that_fails_later_changes_nothing(
    name: str, schedule: Any, exception: type[Exception], parts: tuple[str, ...]
) -> None:
    is_broken = False
    run, shadow = trained(
        lambda: optim.AdamW(lambda step: schedule(step) if is_broken else 0.1 / (step + 1))
    )
    is_broken = True
    fails(lambda: run.step(new_tree(4)), exception, *parts)
    is_broken = False
    assert_it_goes_on(run, shadow, new_tree)


@pytest.mark.parametrize(("name", "schedule", "exception", "parts"), bad_schedules())
def test_a_schedule_that_fails_at_once_is_refused(
    name: str, schedule: Any, exception: type[Exception], parts: tuple[str, ...]
) -> None:
    fails(lambda: optim.SGD(schedule), exception, *parts)


# ---- Hyperparameters and steps ----


SET_LATER = [bad for bad in BAD_ARGUMENTS if not {"state_dtype", "nesterov"} & set(bad[1])]


@pytest.mark.parametrize(("rule", "arguments", "exception", "parts"), SET_LATER)
def test_a_hyperparameter_that_turns_bad_changes_nothing(
    rule: str, arguments: dict[str, Any], exception: type[Exception], parts: tuple[str, ...]
) -> None:
    run, shadow = trained(lambda: getattr(optim, rule)(0.1))
    ((name, value),) = arguments.items()
    good = getattr(run.optimizer, name)
    setattr(run.optimizer, name, value)
    fails(lambda: run.step(new_tree(4)), exception, *parts)
    setattr(run.optimizer, name, good)
    assert_it_goes_on(run, shadow, new_tree)


def test_a_hyperparameter_may_change_between_steps() -> None:
    run, shadow = trained(lambda: optim.SGD(0.1))
    shadow.make = lambda: optim.SGD(0.1, momentum=0.9, weight_decay=0.1)
    run.optimizer.momentum, run.optimizer.weight_decay = 0.9, 0.1
    assert_it_goes_on(run, shadow, new_tree)
    shadow.make = lambda: optim.SGD(0.1, momentum=0.9, nesterov=True)
    run.optimizer.weight_decay, run.optimizer.nesterov = 0.0, True
    assert_it_goes_on(run, shadow, new_tree)


BAD_STEPS: list[Any] = [
    *[-1, 1.5, "3", None, True, 2**64, [1]],
    *[mx.array([1, 2]), mx.array(1.5), mx.array(True), mx.array(-1), mx.array(-(2**40))],
]
every_bad_step = pytest.mark.parametrize("step", BAD_STEPS, ids=str)


@every_bad_step
def test_assigning_a_bad_step_changes_nothing(step: Any) -> None:
    run, shadow = trained(lambda: optim.Adam(0.1, bias_correction=True))
    fails(lambda: run.optimizer.state.update(step=step), (TypeError, ValueError), "step", "whole")
    assert_it_goes_on(run, shadow, new_tree)


def test_a_whole_number_of_any_type_is_a_step() -> None:
    for step in (7, mx.array(7), mx.array([7], mx.uint8), mx.array(7, mx.int64)):
        run, shadow = trained(lambda: optim.Adam(0.1, bias_correction=True))
        run.optimizer.state["step"] = step
        shadow.state["step"] = mx.array(7, mx.uint64)
        assert_it_goes_on(run, shadow, new_tree)


# ---- flat_update ----

P, ROWS = mx.ones((5,)), mx.ones((5, 1))
FLAT_MISUSE: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ("no state", (P, P), {"step": 0}, ValueError, ("AdamW", "2 state arrays", "m", "v", "0")),
    ("more state", (P, P, P, P, P), {"step": 0}, ValueError, ("2 state arrays", "3")),
    ("long gradient", (P, mx.ones((6,)), P, P), {"step": 0}, ValueError, ("gradient", "(6,)")),
    ("short state", (P, P, P, mx.ones((4,))), {"step": 0}, ValueError, ("v", "(4,)", "(5,)")),
    ("two dimensions", (ROWS, ROWS, ROWS, ROWS), {"step": 0}, ValueError, ("one-dim", "(5, 1)")),
    ("integers", (P, P, P.astype(mx.int32), P), {"step": 0}, TypeError, ("m", "int32", "bfloat16")),
    ("complex", (P, P.astype(mx.complex64), P, P), {"step": 0}, TypeError, ("gradient", "complex")),
    ("NumPy", (np.ones(5), P, P, P), {"step": 0}, TypeError, ("parameter", "mlx.core.array")),
    ("None", (P, None, P, P), {"step": 0}, TypeError, ("gradient", "mlx.core.array", "None")),
    ("no step", (P, P, P, P), {}, TypeError, ("step",)),
]


@pytest.mark.parametrize(("name", "arrays", "arguments", "exception", "parts"), FLAT_MISUSE)
def test_misuse_of_flat_update_is_named(
    name: str,
    arrays: tuple[Any, ...],
    arguments: dict[str, Any],
    exception: type[Exception],
    parts: tuple[str, ...],
) -> None:
    fails(lambda: optim.AdamW(0.1).flat_update(*arrays, **arguments), exception, *parts)


@every_bad_step
def test_flat_update_refuses_a_bad_step(step: Any) -> None:
    fails(
        lambda: optim.SGD(0.1).flat_update(P, P, step=step),
        (TypeError, ValueError),
        "step",
        "whole",
    )


@every_bad_rate
def test_flat_update_refuses_a_bad_learning_rate(
    rate: Any, exception: type[Exception], parts: tuple[str, ...]
) -> None:
    if rate is not None:
        fails(
            lambda: optim.SGD(0.1).flat_update(P, P, step=0, learning_rate=rate), exception, *parts
        )


# ---- Transformations ----


def transformed(case: Case, with_state: bool) -> dict[str, Callable[[], Any]]:
    """Each transformation through an update, by the name that its error has to give."""
    w = mx.arange(6.0)

    def update(w: mx.array) -> mx.array:
        optimizer = case.make(optim, optim.cosine_decay(0.1, 10))
        updated = optimizer.apply_gradients({"w": w * 2}, {"w": w})["w"]
        result: mx.array = optimizer.state["w"][case.slots[0]] if with_state else updated
        return result

    return {
        "mx.grad": lambda: mx.grad(lambda w: update(w).sum())(w),
        "mx.jvp": lambda: mx.jvp(update, [w], [w]),
        "mx.vmap": lambda: mx.vmap(update)(mx.stack([w, w])),
    }


INSTEAD = {
    "mx.grad": ("gradient of the loss", "mlx.optimizers"),
    "mx.jvp": ("derivative of the loss",),
    "mx.vmap": ("stack", "mlx.optimizers"),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("with_state", [False, True], ids=["parameters", "state"])
@pytest.mark.parametrize("name", INSTEAD)
@every_rule
def test_a_transformation_says_what_to_use_instead(
    case: Case, name: str, with_state: bool, compiled: bool
) -> None:
    work = transformed(case, with_state)[name]
    fails(mx.compile(work) if compiled else work, ValueError, name, *INSTEAD[name])


# ---- Evaluation ----


def singular() -> mx.array:
    """Fails when it is evaluated, not before."""
    return mx.linalg.inv(mx.zeros((3, 3)), stream=mx.cpu)


@every_rule
def test_an_error_in_evaluation_surfaces_and_spares_what_is_held(case: Case) -> None:
    run = Run(case.make(optim), {"w": mx.ones((3, 3)), "u": mx.ones((2,))})
    run.step({"w": mx.ones((3, 3)), "u": mx.ones((2,))})
    shadow = Shadow(lambda: case.make(optim), run.params)
    shadow.state = copied(run.optimizer.state)
    params = tree_map(lambda p: p, run.params)
    state = tree_map(lambda leaf: leaf, run.optimizer.state)
    before = bits([params, state])
    fails(lambda: run.step({"w": singular(), "u": mx.ones((2,))}), RuntimeError, "Inverse")
    assert bits([params, state]) == before
    # Back to what was kept, and on.
    run.params, run.optimizer.state = params, state
    for _ in range(2):
        run.step({"w": mx.ones((3, 3)), "u": mx.ones((2,))})
        shadow.step({"w": mx.ones((3, 3)), "u": mx.ones((2,))})
    assert_same_bits(run, shadow)


def test_a_tensor_that_no_array_could_hold_is_refused() -> None:
    run, shadow = trained(lambda: optim.AdamW(0.1))
    huge = {"big": mx.broadcast_to(mx.array(0.0), (2**20, 2**20))}
    fails(lambda: optim.AdamW(0.1).init(huge), ValueError, "big", "too large")
    fails(lambda: optim.AdamW(0.1).apply_gradients(huge, huge), ValueError, "big", "too large")
    fails(lambda: run.optimizer.init(huge), ValueError, "big", "too large")
    assert_it_goes_on(run, shadow, new_tree)
    assert "big" not in run.optimizer.state
    assert bits(run.params)
