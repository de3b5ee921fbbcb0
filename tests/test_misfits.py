"""Trees that don't fit are named by their path, and nothing has changed afterwards."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flatstep as optim
import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from cases import Case, random_array
from models import every_rule
from shadow import Run, Shadow, assert_it_goes_on, copied, fails, replaced, train

SHAPES = {"w": (3, 4), "layers": [{"weight": (8, 4), "bias": (8,)}, {}], "pair": ((2,), ())}
WEIGHT = "layers.0.weight"


def new_tree(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "w": random_array((3, 4), rng),
        "layers": [{"weight": random_array((8, 4), rng), "bias": random_array((8,), rng)}, {}],
        "pair": (random_array((2,), rng), random_array((), rng)),
    }


class Misfit(NamedTuple):
    """What is wrong with gradients or parameters, and the error that says so."""

    name: str
    change: Callable[[Any, Any], tuple[Any, Any]]
    exception: type[Exception] | tuple[type[Exception], ...]
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def gradient_at(path: str, value: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    return lambda gradients, params: (replaced(gradients, {path: value}), params)


def parameter_at(path: str, value: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    return lambda gradients, params: (gradients, replaced(params, {path: value}))


def bad_dtypes() -> Iterator[Misfit]:
    for dtype in (mx.int32, mx.uint8, mx.bool_, mx.complex64, mx.float64):
        with mx.stream(mx.cpu):
            value = mx.array(np.ones((8, 4), np.int32)).astype(dtype)
        name = str(dtype).removeprefix("mlx.core.")
        parts = (WEIGHT, name, "float32, float16 and bfloat16")
        yield Misfit(f"{name} gradient", gradient_at(WEIGHT, value), TypeError, parts)
        yield Misfit(f"{name} parameter", parameter_at(WEIGHT, value), TypeError, parts)


ONES = mx.ones((8, 4))
MISFITS = [
    Misfit(
        "gradient of another shape",
        gradient_at(WEIGHT, ONES.T),
        ValueError,
        (f"{WEIGHT}: gradient (4, 8) does not match parameter (8, 4)",),
    ),
    Misfit(
        "gradient of the same size",
        gradient_at(WEIGHT, mx.ones((32,))),
        ValueError,
        (f"{WEIGHT}: gradient (32,) does not match parameter (8, 4)",),
    ),
    Misfit(
        "gradient for a scalar",
        gradient_at("pair.1", mx.ones((1,))),
        ValueError,
        ("pair.1: gradient (1,) does not match parameter ()",),
    ),
    *bad_dtypes(),
    Misfit(
        "gradient without parameter",
        lambda g, p: ({**g, "extra": mx.ones((2,))}, p),
        ValueError,
        ("extra: ", "no parameter"),
    ),
    Misfit(
        "gradient without parameter in a list",
        lambda g, p: ({**g, "layers": [*g["layers"], {"weight": ONES}]}, p),
        ValueError,
        ("layers.2", "no parameter"),
    ),
    Misfit(
        "name that is no string",
        lambda g, p: ({**g, 3: ONES}, {**p, 3: ONES}),
        (TypeError, ValueError),
        ("3",),
    ),
    Misfit("None for a gradient", gradient_at(WEIGHT, None), TypeError, (WEIGHT, "NoneType")),
    Misfit("number for a gradient", gradient_at(WEIGHT, 1.0), TypeError, (WEIGHT, "float")),
    Misfit("string for a gradient", gradient_at("w", "w"), TypeError, ("w: ", "str")),
    Misfit(
        "NumPy array for a gradient",
        gradient_at(WEIGHT, np.ones((8, 4), np.float32)),
        TypeError,
        (WEIGHT, "mlx.core.array", "ndarray"),
    ),
    Misfit(
        "NumPy array for a parameter",
        parameter_at(WEIGHT, np.ones((8, 4), np.float32)),
        TypeError,
        (WEIGHT, "mlx.core.array", "ndarray"),
    ),
    Misfit("None for a parameter", parameter_at(WEIGHT, None), TypeError, (WEIGHT, "NoneType")),
    Misfit(
        "list where the parameters have a dict",
        lambda g, p: ({**g, "layers": [[ONES, mx.ones((8,))], {}]}, p),
        ValueError,
        ("layers.0",),
    ),
    Misfit(
        "dict where the parameters have a list",
        lambda g, p: ({**g, "layers": {"0": {"weight": ONES}}}, p),
        ValueError,
        ("layers",),
    ),
    Misfit(
        "array where the parameters have a dict",
        lambda g, p: ({**g, "layers": [ONES, {}]}, p),
        TypeError,
        ("layers.0", "parameter", "mlx.core.array", "dict"),
    ),
    Misfit(
        "dict where the parameters have an array",
        lambda g, p: ({**g, "w": {"x": ONES}}, p),
        ValueError,
        ("w",),
    ),
    Misfit(
        "loss with the gradients",
        lambda g, p: ((ONES, g), p),
        TypeError,
        ("gradients should be a dict", "a tuple", "(loss, gradients)", "pass the second"),
    ),
    Misfit("list of gradients", lambda g, p: ([ONES], p), TypeError, ("gradients", "a list")),
    Misfit("list of parameters", lambda g, p: (g, [ONES]), TypeError, ("parameters", "a list")),
    Misfit("one array of gradients", lambda g, p: (ONES, p), TypeError, ("gradients", "an array")),
    Misfit("one array", lambda g, p: (g, ONES), TypeError, ("parameters", "an array")),
    Misfit("no gradients", lambda g, p: (None, p), TypeError, ("gradients", "dict", "None")),
    Misfit("no parameters", lambda g, p: (g, None), TypeError, ("parameters", "dict", "None")),
]
# These fit each other, but not the tree that the optimizer was initialised with.
LATE_MISFITS = [
    Misfit(
        "parameter of another shape",
        lambda g, p: (replaced(g, {WEIGHT: ONES.T}), replaced(p, {WEIGHT: ONES.T})),
        ValueError,
        (WEIGHT, "(4, 8)", "(8, 4)", "initialised"),
    ),
    Misfit(
        "new parameter",
        lambda g, p: ({**g, "extra": ONES}, {**p, "extra": ONES}),
        ValueError,
        ("extra: ", "init"),
    ),
    Misfit(
        "array that was a subtree",
        lambda g, p: ({**g, "layers": [ONES]}, {**p, "layers": [ONES]}),
        ValueError,
        ("layers.0", "initialised"),
    ),
    Misfit(
        "subtree that was an array",
        lambda g, p: ({**g, "w": {"x": ONES}}, {**p, "w": {"x": ONES}}),
        ValueError,
        ("w",),
    ),
]


def new_rate() -> Any:
    return optim.cosine_decay(0.1, 50)


def trained(case: Case, compiled: bool = False) -> tuple[Run, Shadow]:
    run = Run(case.make(optim, new_rate()), new_tree(1), compiled)
    shadow = Shadow(lambda: case.make(optim, new_rate()), new_tree(1))
    return train(run, shadow, new_tree)


@pytest.mark.parametrize("misfit", [*MISFITS, *LATE_MISFITS], ids=str)
@every_rule
def test_a_step_names_the_misfit_and_changes_nothing(case: Case, misfit: Misfit) -> None:
    run, shadow = trained(case)
    gradients, params = misfit.change(new_tree(4), run.params)
    fails(lambda: run.apply(gradients, params), misfit.exception, *misfit.parts)
    assert_it_goes_on(run, shadow, new_tree)


@pytest.mark.parametrize("misfit", MISFITS, ids=str)
@every_rule
def test_the_first_step_names_the_misfit_and_changes_nothing(case: Case, misfit: Misfit) -> None:
    optimizer, untouched = (case.make(optim, new_rate()) for _ in range(2))
    gradients, params = misfit.change(new_tree(4), new_tree(1))
    fails(lambda: optimizer.apply_gradients(gradients, params), misfit.exception, *misfit.parts)
    assert optimizer.state == untouched.state and optimizer.layout == []
    run = Run(optimizer, new_tree(1))
    shadow = Shadow(lambda: case.make(optim, new_rate()), new_tree(1))
    assert_it_goes_on(run, shadow, new_tree)


@pytest.mark.parametrize("misfit", [*MISFITS[:5], LATE_MISFITS[0]], ids=str)
@every_rule
def test_a_compiled_step_names_the_misfit_too(case: Case, misfit: Misfit) -> None:
    run, shadow = trained(case, compiled=True)
    kept = copied(run.optimizer.state)
    gradients, params = misfit.change(new_tree(4), run.params)
    fails(lambda: run.apply(gradients, params), misfit.exception, *misfit.parts)
    # An error inside mx.compile leaves MLX's placeholders in any state that it captures.
    run.optimizer.state = kept
    run.use(compiled=True)
    assert_it_goes_on(run, shadow, new_tree)


BAD_PARAMETERS: list[tuple[str, Any, type[Exception], tuple[str, ...]]] = [
    ("list", [ONES], TypeError, ("dict", "list")),
    ("array", ONES, TypeError, ("dict", "array")),
    ("NumPy", {"a": [np.ones(2)]}, TypeError, ("a.0", "mlx.core.array", "ndarray")),
    ("None", {"a": {"b": None}}, TypeError, ("a.b", "mlx.core.array", "NoneType")),
    ("number", {"a": 1.0}, TypeError, ("a", "mlx.core.array", "float")),
    ("key", {"a": {3: ONES}}, TypeError, ("a", "string", "3")),
    ("tuple key", {("a", "b"): ONES}, TypeError, ("string", "('a', 'b')")),
    ("step", {"step": ONES}, ValueError, ("step", "name")),
    ("rate", {"learning_rate": {"w": ONES}}, ValueError, ("learning_rate", "name")),
]


@pytest.mark.parametrize(("name", "params", "exception", "parts"), BAD_PARAMETERS)
@every_rule
def test_init_names_the_misfit_and_changes_nothing(
    case: Case, name: str, params: Any, exception: type[Exception], parts: tuple[str, ...]
) -> None:
    run, shadow = trained(case)
    fails(lambda: run.optimizer.init(params), exception, *parts)
    assert_it_goes_on(run, shadow, new_tree)
    optimizer, untouched = (case.make(optim, new_rate()) for _ in range(2))
    fails(lambda: optimizer.init(params), exception, *parts)
    assert optimizer.state == untouched.state and optimizer.layout == []


def quantized(dtype: mx.Dtype) -> Any:
    return {"frozen": {"w": mx.ones((2, 4), dtype)}, "scale": mx.ones((2,))}


@every_rule
def test_parameters_that_cannot_be_trained_get_no_state(case: Case) -> None:
    optimizer, params = case.make(optim), quantized(mx.uint32)
    optimizer.init(params)
    assert optimizer.state["frozen"] == {"w": {}}
    gradient = {"frozen": {"w": mx.ones((2, 4))}}
    before = copied(optimizer.state)
    fails(lambda: optimizer.apply_gradients(gradient, params), TypeError, "frozen.w", "uint32")
    assert optimizer.state == before
    optimizer.apply_gradients({"scale": mx.ones((2,))}, params)
    trainable = quantized(mx.float32)
    fails(lambda: optimizer.apply_gradients(gradient, trainable), ValueError, "frozen.w", "init")
    optimizer.init(trainable)
    for array in optimizer.state["frozen"]["w"].values():
        assert array.tolist() == mx.zeros((2, 4)).tolist()
    # What it has now is kept, should the parameter be quantized again.
    optimizer.apply_gradients(gradient, trainable)
    before = copied(optimizer.state)
    optimizer.init(quantized(mx.uint32))
    assert optimizer.state == before


def test_a_parameter_named_step_may_lie_deeper() -> None:
    params = {"inner": {"step": mx.ones((2,)), "learning_rate": mx.ones((3,))}}
    ours, theirs = optim.AdamW(0.1), mlx.optimizers.AdamW(0.1)
    got, expected = params, params
    for _ in range(3):
        got, expected = ours.apply_gradients(got, got), theirs.apply_gradients(expected, expected)
    assert mx.allclose(got["inner"]["step"], expected["inner"]["step"])
    assert ours.step.item() == 3


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@every_rule
def test_empty_and_scalar_parameters_are_updated(case: Case, compiled: bool) -> None:
    params: Any = {
        "none": mx.zeros((0,)),
        "rows": mx.zeros((0, 5)),
        "scalar": mx.array(2.0),
        "one": mx.array([[3.0]]),
        "bf16": mx.array(1.0, mx.bfloat16),
        "columns": mx.zeros((5, 0), mx.float16),
    }
    for tree in (params, {"none": params["none"]}, {"scalar": params["scalar"]}):
        run = Run(case.make(optim), tree, compiled)
        expected, theirs = tree, case.make(mlx.optimizers)
        for _ in range(3):
            run.step(run.params)
            expected = theirs.apply_gradients(expected, expected)
        for name, value in expected.items():
            assert (run.params[name].shape, run.params[name].dtype) == (value.shape, value.dtype)
            assert mx.allclose(run.params[name], value, 1e-2 if name == "bf16" else 1e-5), name
