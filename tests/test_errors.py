"""Bad input: a clear error at the call that passed it, and nothing changed."""

from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import flatstep as optim
import mlx.core as mx
import numpy as np
import pytest
from cases import leaves
from flatstep._mlx_version import check_mlx_version

NAN, INF = float("nan"), float("inf")
W, B = mx.ones((4, 8)), mx.ones(4)
PARAMETERS = {"w": W, "b": B}


class Bad(NamedTuple):
    """A call, the exception it raises, and what the message says."""

    name: str
    call: Callable[..., Any]
    error: type[Exception]
    says: tuple[str, ...]


def one_cosine() -> optim.schedulers.Schedule:
    return optim.cosine_decay(0.1, 3)


# Constructors and schedules: the argument, its value, what is allowed.
ARGUMENTS = [
    Bad("beta1 of 1", lambda: optim.Adam(0.1, [1.0, 0.9]), ValueError, ("beta1", "1", "[0, 1)")),
    Bad("negative beta", lambda: optim.AdamW(0.1, [0.9, -0.1]), ValueError, ("beta2", "-0.1")),
    Bad("NaN beta", lambda: optim.Adam(0.1, [NAN, 0.9]), ValueError, ("beta1", "nan")),
    Bad("one beta", lambda: optim.Adam(0.1, [0.9]), ValueError, ("betas", "two", "1")),
    Bad("betas a float", lambda: optim.Adam(0.1, 0.9), TypeError, ("betas", "0.9")),
    Bad("negative eps", lambda: optim.Adam(0.1, eps=-1), ValueError, ("epsilon", "-1", ">=0")),
    Bad("NaN eps", lambda: optim.AdamW(0.1, eps=NAN), ValueError, ("epsilon", "nan")),
    Bad("eps a string", lambda: optim.AdamW(0.1, eps="x"), TypeError, ("epsilon", "'x'")),
    Bad("NaN decay", lambda: optim.AdamW(0.1, weight_decay=NAN), ValueError, ("weight_decay",)),
    Bad("infinite decay", lambda: optim.SGD(0.1, weight_decay=INF), ValueError, ("inf",)),
    Bad("negative momentum", lambda: optim.SGD(0.1, -1), ValueError, ("momentum", "-1", ">=0")),
    Bad("NaN momentum", lambda: optim.SGD(0.1, NAN), ValueError, ("momentum", "nan")),
    Bad("dampening", lambda: optim.SGD(0.1, 0.9, dampening=-1), ValueError, ("dampening", "-1")),
    Bad("Nesterov alone", lambda: optim.SGD(0.1, nesterov=True), ValueError, ("Nesterov",)),
    Bad("NaN rate", lambda: optim.SGD(NAN), ValueError, ("learning_rate", "nan", "finite")),
    Bad("rate a string", lambda: optim.SGD("a"), TypeError, ("learning_rate", "'a'")),
    Bad("rate None", lambda: optim.SGD(None), TypeError, ("learning_rate", "None")),
    Bad("several rates", lambda: optim.SGD(mx.ones(3)), ValueError, ("learning_rate", "(3,)")),
    Bad(
        "integer state",
        lambda: optim.SGD(0.1, state_dtype=mx.int32),
        ValueError,
        ("state_dtype", "int32", "bfloat16"),
    ),
    Bad("decay_steps", lambda: optim.cosine_decay(0.1, 0), ValueError, ("decay_steps", "0")),
    Bad("steps", lambda: optim.linear_schedule(0, 1, 0), ValueError, ("steps", "0")),
    Bad("step_size", lambda: optim.step_decay(0.1, 0.9, 0), ValueError, ("step_size", "0")),
    Bad("NaN init", lambda: optim.linear_schedule(NAN, 1, 3), ValueError, ("init", "nan")),
    Bad("init a string", lambda: optim.cosine_decay("a", 3), TypeError, ("init", "'a'")),
    Bad("nothing joined", lambda: optim.join_schedules([], []), ValueError, ("1 schedule",)),
    Bad(
        "boundaries",
        lambda: optim.join_schedules([one_cosine()], [3]),
        ValueError,
        ("1 boundaries", "expected 0"),
    ),
    Bad(
        "numbers joined",
        lambda: optim.join_schedules([1, one_cosine()], [3]),
        TypeError,
        ("schedules[0]", "callable", "1"),
    ),
    Bad(
        "boundary a string",
        lambda: optim.join_schedules([one_cosine(), one_cosine()], ["a"]),
        TypeError,
        ("boundaries[0]", "'a'"),
    ),
]


def apply(gradients: Any, parameters: Any = PARAMETERS) -> Callable[[Any], Any]:
    return lambda optimizer: optimizer.apply_gradients(gradients, parameters)


def assign(key: str, value: Any) -> Callable[[Any], Any]:
    return lambda optimizer: optimizer.state.__setitem__(key, value)


def assign_leaf(slot: str, value: Any) -> Callable[[Any], Any]:
    return lambda optimizer: optimizer.state["w"].__setitem__(slot, value)


def set_rate(value: Any) -> Callable[[Any], Any]:
    return lambda optimizer: setattr(optimizer, "learning_rate", value)


def flat(*arrays: mx.array, **options: Any) -> Callable[[Any], Any]:
    return lambda optimizer: optimizer.flat_update(*arrays, **{"step": 0, **options})


def tied_to(dtype: mx.Dtype) -> dict[str, mx.array]:
    return {"w": mx.ones((4, 8)).astype(dtype)}


ONES = [mx.ones(3)] * 4

# Calls on an optimizer in use: the path, what is there, what should be.
CALLS = [
    Bad("gradient's shape", apply({"w": W.T}), ValueError, ("w: gradient (8, 4)", "(4, 8)")),
    Bad("both shapes", apply({"w": W.T}, {"w": W.T}), ValueError, ("w: parameter (8, 4)",)),
    Bad("deep path", apply({"w": {"x": [W]}}), ValueError, ("w",)),
    Bad("list for an array", apply({"w": [W]}), ValueError, ("w.0", "no parameter")),
    Bad("integer", apply(tied_to(mx.int32)), TypeError, ("w: gradient", "int32", "float16")),
    Bad("boolean", apply(tied_to(mx.bool_)), TypeError, ("w: gradient", "bool")),
    Bad("complex", apply(tied_to(mx.complex64)), TypeError, ("w: gradient", "complex64")),
    Bad("float64", apply(tied_to(mx.float64)), TypeError, ("w: gradient", "float64")),
    Bad(
        "integer parameter",
        apply({"w": W}, tied_to(mx.int32)),
        TypeError,
        ("w: parameter", "int32"),
    ),
    Bad("no parameter", apply({"w": W, "z": W}), ValueError, ("z:", "no parameter")),
    Bad("no state", apply({"c": W}, {"c": W}), ValueError, ("c:", "no optimizer state", "init(")),
    Bad("number", apply({"w": 3.0}), TypeError, ("w:", "mlx.core.array", "float")),
    Bad("None", apply({"w": None}), TypeError, ("w:", "NoneType")),
    Bad("NumPy array", apply({"w": np.ones((4, 8))}), TypeError, ("w:", "ndarray")),
    Bad("parameter a number", apply({"w": W}, {"w": 1.0}), TypeError, ("w:", "parameter")),
    Bad("negative step", assign("step", -1), ValueError, ("step", "-1", ">= 0")),
    Bad("half a step", assign("step", 1.5), ValueError, ("step", "1.5")),
    Bad("several steps", assign("step", mx.arange(3)), ValueError, ("step", "(3,)")),
    Bad("NaN set", set_rate(NAN), ValueError, ("learning_rate", "nan")),
    Bad("rates set", set_rate(mx.ones(2)), ValueError, ("learning_rate", "(2,)")),
    Bad("rate of letters", assign("learning_rate", "x"), TypeError, ("learning_rate", "'x'")),
    Bad("leaf's shape", assign_leaf("m", B), ValueError, ("w.m", "(4,)", "(4, 8)")),
    Bad("leaf's dtype", assign_leaf("m", W.astype(mx.int32)), TypeError, ("w.m", "int32")),
    Bad("unknown slot", assign_leaf("q", W), KeyError, ("w.q", "m, v")),
    Bad("leaf a number", assign("w", 3), TypeError, ("w:", "3")),
    Bad("unknown name", lambda o: o.state["q"], KeyError, ("q",)),
    Bad("removal", lambda o: o.state["w"].pop("m"), TypeError, ("cannot be removed",)),
    Bad("flat step", flat(*ONES, step=-1), ValueError, ("step", "-1")),
    Bad("flat rate", flat(*ONES, learning_rate=NAN), ValueError, ("learning_rate", "nan")),
    Bad("no flat state", flat(*ONES[:2]), ValueError, ("2 state arrays", "'m', 'v'")),
    Bad("flat length", flat(ONES[0], B, *ONES[2:]), ValueError, ("gradient", "(4,)", "(3,)")),
    Bad("not flat", flat(W, W, W, W), ValueError, ("one-dimensional", "(4, 8)")),
    Bad(
        "flat integer",
        flat(ONES[0], mx.ones(3, mx.int32), *ONES[2:]),
        TypeError,
        ("gradient", "int32"),
    ),
    Bad("foreign tree", lambda o: o.is_flat({"z": W}), ValueError, ("z:", "no optimizer state")),
    Bad(
        "another rule's state",
        lambda o: setattr(o, "state", initialised(optim.SGD(0.1)).state),
        ValueError,
        ("keeps v", "AdamW", "m, v"),
    ),
    Bad(
        "broken flat state",
        lambda o: setattr(o, "state", {"__flatstep__": {"layout": "junk", "m": [], "v": []}}),
        ValueError,
        ("__flatstep__",),
    ),
]

SCALARS = {"step": mx.array(0, mx.uint64), "learning_rate": mx.array(0.1)}

# A state that a user set: the error comes when it meets the parameters.
STATES = [
    Bad("a number", lambda: 3, TypeError, ("optimizer.state", "int")),
    Bad("empty", dict, ValueError, ("'step'",)),
    Bad("half", lambda: {**SCALARS, "w": {"m": W}}, ValueError, ("w:", "m but not v")),
    Bad(
        "a leaf's shape",
        lambda: {**SCALARS, "w": {"m": B, "v": B}},
        ValueError,
        ("w.m", "(4,)", "(4, 8)"),
    ),
    Bad("no dict", lambda: {**SCALARS, "w": W}, TypeError, ("w:", "dict", "array")),
    Bad("no arrays", lambda: {**SCALARS, "w": {"m": [1], "v": 2}}, TypeError, ("w.m", "list")),
    Bad("step", lambda: {**SCALARS, "step": "x"}, ValueError, ("step", "'x'")),
]

# An optimizer that has seen nothing yet.
FIRST_CALLS = [
    Bad("list", apply([W], [W]), TypeError, ("dict", "list")),
    Bad("array", apply(W, W), TypeError, ("dict", "array")),
    Bad("number", apply({"w": 3.0}), TypeError, ("w:", "float")),
    Bad("no parameter", apply({"w": W, "z": W}), ValueError, ("z:", "no parameter")),
    Bad("deeper than the parameters", apply({"w": {"x": W}}), ValueError, ("w.x",)),
    Bad("gradient's shape", apply({"w": W.T}), ValueError, ("w: gradient (8, 4)",)),
    Bad("init of a list", lambda o: o.init([W]), TypeError, ("dict", "list")),
    Bad("init of integers", lambda o: o.init({"w": mx.arange(3)}), TypeError, ("w:", "int32")),
    Bad("numbers as names", lambda o: o.init({0: W}), TypeError, ("strings", "0")),
    Bad("a reserved name", lambda o: o.init({"step": W}), ValueError, ("step",)),
]


def initialised(optimizer: Any) -> Any:
    optimizer.init(PARAMETERS)
    return optimizer


def in_use() -> Any:
    optimizer = initialised(optim.AdamW(1e-2, bias_correction=True))
    optimizer.apply_gradients(PARAMETERS, PARAMETERS)
    return optimizer


def held(optimizer: Any) -> dict[str, Any]:
    return {path: np.array(leaf) for path, leaf in leaves(optimizer.state).items()}


def check(bad: Bad, *arguments: Any) -> None:
    with pytest.raises(bad.error) as raised:
        bad.call(*arguments)
    for fragment in bad.says:
        assert fragment in str(raised.value)


def named(rows: list[Bad]) -> Any:
    return pytest.mark.parametrize("bad", rows, ids=lambda bad: bad.name)


@named(ARGUMENTS)
def test_a_wrong_argument_is_named_with_what_is_allowed(bad: Bad) -> None:
    check(bad)


@named(CALLS)
def test_a_failed_call_says_why_and_changes_nothing(bad: Bad) -> None:
    optimizer = in_use()
    before = held(optimizer)
    check(bad, optimizer)
    after = held(optimizer)
    assert after.keys() == before.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)
    good = optimizer.apply_gradients(PARAMETERS, PARAMETERS)
    twin = in_use().apply_gradients(PARAMETERS, PARAMETERS)
    for path in PARAMETERS:
        np.testing.assert_array_equal(np.array(good[path]), np.array(twin[path]))


@named(STATES)
def test_a_state_that_does_not_fit_is_refused(bad: Bad) -> None:
    def step() -> None:
        optimizer = in_use()
        optimizer.state = bad.call()
        optimizer.apply_gradients({"w": W}, PARAMETERS)

    check(bad._replace(call=step))


@named(FIRST_CALLS)
def test_a_failed_first_call_leaves_the_optimizer_new(bad: Bad) -> None:
    optimizer = optim.AdamW(1e-2)
    check(bad, optimizer)
    assert list(optimizer.state.keys()) == ["step", "learning_rate"]
    assert optimizer.step.item() == 0
    assert optimizer.layout == []


def test_a_hyperparameter_spoilt_later_is_refused_at_the_next_step() -> None:
    optimizer = in_use()
    before = held(optimizer)
    optimizer.eps = -1
    with pytest.raises(ValueError, match="epsilon"):
        optimizer.apply_gradients(PARAMETERS, PARAMETERS)
    np.testing.assert_array_equal(held(optimizer)["w.m"], before["w.m"])
    assert optimizer.step.item() == 1


TRANSFORMS = {
    "mx.grad": lambda f: mx.grad(lambda p: f(p).sum())(mx.ones(3)),
    "mx.vmap": lambda f: mx.vmap(f)(mx.ones((2, 3))),
    "mx.jvp": lambda f: mx.jvp(f, [mx.ones(3)], [mx.ones(3)]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transformation_through_an_update_says_what_to_use_instead(transform: str) -> None:
    def update(p: mx.array) -> mx.array:
        return optim.SGD(0.1, momentum=0.9).apply_gradients({"w": mx.ones(3)}, {"w": p})["w"]

    with pytest.raises(ValueError, match=f"{transform} through an optimizer update") as raised:
        TRANSFORMS[transform](update)
    assert "loss alone" in str(raised.value) or "stack the parameters" in str(raised.value)


def test_zero_length_and_scalar_parameters_are_updated() -> None:
    parameters = {"empty": mx.zeros((0, 3)), "scalar": mx.array(1.0), "last": mx.zeros(0)}
    optimizer = optim.SGD(0.5, momentum=0.9)
    gradients = {name: mx.ones_like(p) for name, p in parameters.items()}
    for _ in range(2):
        parameters = optimizer.apply_gradients(gradients, parameters)
    assert parameters["empty"].shape == (0, 3)
    assert parameters["last"].shape == (0,)
    assert parameters["scalar"].item() == pytest.approx(1 - 0.5 - 0.95)
    only_empty = optim.AdamW(0.1)
    assert only_empty.apply_gradients({"e": mx.zeros(0)}, {"e": mx.zeros(0)})["e"].size == 0


@pytest.mark.parametrize("found", ["0.31.0", None])
def test_another_mlx_is_named_with_the_one_needed(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(_: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ImportError, match=r"0\.32\.4") as raised:
        check_mlx_version()
    assert (found or "no mlx") in str(raised.value)
    assert "pip install" in str(raised.value)
