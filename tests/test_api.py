"""The Python interface of mlx.optimizers: trees, updates, compilation, subclasses, streams."""

import copy
import inspect
from functools import partial
from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from cases import RULES, Case, leaves, random_array
from flatstep.fused import FusedOptimizer
from mlx.utils import tree_map, tree_unflatten
from models import (
    assert_trees_close,
    assert_trees_equal,
    batch,
    every_rule,
    loss,
    new_model,
    new_sequential,
    train,
)


def test_every_public_name_of_mlx_optimizers_is_here() -> None:
    made_there = {
        name
        for name, value in vars(mlx.optimizers).items()
        if getattr(value, "__module__", "").startswith("mlx.optimizers")
    }
    assert {"Muon", "clip_grad_norm", "MultiOptimizer"} <= made_there
    assert made_there | {"optimizers", "schedulers"} <= set(dir(optim))


@pytest.mark.parametrize(
    "name",
    [
        *dict.fromkeys(case.rule for case in RULES),
        "linear_schedule",
        "cosine_decay",
        "exponential_decay",
        "step_decay",
        "join_schedules",
    ],
)
def test_arguments_and_their_defaults_are_those_of_mlx(name: str) -> None:
    def positional(module: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        # (0.9, 0.999) and [0.9, 0.999] are the same default.
        plain = [(p.name, p.default, p.kind) for p in parameters]
        return [
            (name, list(default) if isinstance(default, tuple) else default)
            for name, default, kind in plain
            if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]

    assert positional(optim) == positional(mlx.optimizers)


@every_rule
def test_our_classes_are_mlx_optimizers(case: Case) -> None:
    ours, theirs = case.make(optim), case.make(mlx.optimizers)
    for name in ("Optimizer", "RMSprop", *(case.rule for case in RULES)):
        kind = getattr(mlx.optimizers, name)
        assert isinstance(ours, kind) == isinstance(theirs, kind), name
    assert isinstance(ours, getattr(optim, case.rule)) and isinstance(ours, optim.Optimizer)
    # MLX's classes are there for isinstance: what they do is not.
    for name in ("init", "apply_gradients", "init_single", "apply_single"):
        assert getattr(type(ours), name) is getattr(FusedOptimizer, name)
    for name, value in case.arguments.items():
        assert getattr(ours, name) == value


@every_rule
def test_training_a_model_follows_mlx(case: Case) -> None:
    ours, theirs = case.make(optim), case.make(mlx.optimizers)
    assert_trees_close(train(ours, 20).parameters(), train(theirs, 20).parameters())
    assert_trees_close(ours.state, theirs.state)


@every_rule
def test_the_first_update_initialises_like_an_explicit_init(case: Case) -> None:
    explicit, lazy = case.make(optim), case.make(optim)
    explicit.init(new_model().trainable_parameters())
    for path, leaf in leaves(explicit.state).items():
        if path not in ("step", "learning_rate"):
            assert leaf.dtype == mx.float32 and not leaf.any().item(), path
    assert_trees_equal(train(lazy, 2).parameters(), train(explicit, 2).parameters())
    assert_trees_equal(lazy.state, explicit.state)


@every_rule
def test_init_builds_the_state_tree_of_mlx(case: Case) -> None:
    trees: list[Any] = [
        new_model().trainable_parameters(),
        {},
        {"empty": {}, "none": [], "deep": [{}, [], {"w": mx.ones((2,))}]},
        {"pair": (mx.ones((2,)), [mx.ones((3,)), (mx.ones(()),)])},
        {"zero": mx.zeros((0,)), "scalar": mx.array(1.0)},
    ]
    for tree in trees:
        ours, theirs = case.make(optim), case.make(mlx.optimizers)
        ours.init(tree)
        theirs.init(tree)
        assert repr(ours.state) == repr(theirs.state)
        assert_trees_equal(ours.state, theirs.state)


def test_a_second_init_keeps_what_is_there() -> None:
    optimizer = optim.Adam(0.1)
    params = {"a": mx.ones((2,)), "b": [mx.ones((3,))]}
    optimizer.apply_gradients(params, params)
    before = tree_map(mx.array, dict(optimizer.state))
    optimizer.init({**params, "c": mx.ones((4,))})
    for path, leaf in leaves(before).items():
        assert mx.array_equal(leaves(optimizer.state)[path], leaf)
    assert optimizer.state["c"]["m"].tolist() == [0, 0, 0, 0]


@every_rule
def test_apply_gradients_returns_the_structure_of_the_gradients(case: Case) -> None:
    tree = {
        "list": [mx.ones((2,)), {"w": mx.ones((3, 1))}, {}],
        "tuple": (mx.ones((2, 2)), mx.ones(())),
        "empty": {},
        "none": [],
    }
    updated = case.make(optim).apply_gradients(tree, tree)
    assert isinstance(updated["tuple"], tuple) and isinstance(updated["list"], list)
    assert updated["empty"] == {} and updated["none"] == [] and updated["list"][2] == {}
    assert [(path, p.shape) for path, p in leaves(updated).items()] == [
        (path, p.shape) for path, p in leaves(tree).items()
    ]


@every_rule
def test_gradients_may_be_a_subset_of_the_parameters(case: Case) -> None:
    params = {"a": mx.ones((3,)), "b": {"w": mx.ones((2,)), "u": mx.ones((70,))}, "c": mx.ones(())}
    subsets: list[Any] = [
        params,
        {"b": {"u": mx.full((70,), 0.5)}},
        {},
        {"c": mx.array(-1.0), "b": {"w": mx.ones((2,))}},
        params,
    ]
    ours, theirs = case.make(optim), case.make(mlx.optimizers)
    ours.init(params)
    theirs.init(params)
    for grads in subsets:
        updated = ours.apply_gradients(grads, params)
        assert_trees_close(updated, theirs.apply_gradients(grads, params))
        assert_trees_close(ours.state, theirs.state)
        flat = leaves(params) | leaves(updated)
        params = tree_unflatten(list(flat.items()))


@every_rule
def test_only_the_initialised_subset_has_state(case: Case) -> None:
    model = new_model()
    model.freeze()
    model.layers[0].unfreeze()
    frozen = tree_map(mx.array, model.nested["pair"][0].parameters())
    optimizer = case.make(optim)
    _, grads = nn.value_and_grad(model, loss)(model, batch(0))
    optimizer.update(model, grads)
    assert {path.rpartition(".")[0] for path in leaves(optimizer.state)} == {
        "",
        "layers.0.weight",
        "layers.0.bias",
    }
    assert_trees_equal(model.nested["pair"][0].parameters(), frozen)


def test_an_empty_update_counts_a_step() -> None:
    optimizer = optim.AdamW(0.1)
    for expected in (1, 2, 3):
        optimizer.update({}, {})
        assert optimizer.step.item() == expected
        assert optimizer.step.dtype == mx.uint64
    assert list(optimizer.state) == ["step", "learning_rate"]


def test_learning_rate_is_read_and_set() -> None:
    optimizer = optim.SGD(0.1)
    params, grads = {"w": mx.zeros((2,))}, {"w": mx.ones((2,))}
    assert repr(optimizer.learning_rate) == "array(0.1, dtype=float32)"
    for rate in (0.5, mx.array(0.25), 2):
        optimizer.learning_rate = rate
        expected = float(rate)
        assert optimizer.learning_rate.item() == expected
        assert optimizer.state["learning_rate"].item() == expected
        assert optimizer.apply_gradients(grads, params)["w"].tolist() == [-expected] * 2
    optimizer.state["learning_rate"] = mx.array(4.0)
    assert optimizer.apply_gradients(grads, params)["w"].tolist() == [-4.0, -4.0]


def test_a_schedule_overrules_an_assigned_rate_at_the_next_step() -> None:
    optimizer = optim.SGD(optim.step_decay(0.5, 0.5, 1))
    optimizer.update({}, {})
    optimizer.learning_rate = 7.0
    assert optimizer.learning_rate.item() == 7.0
    optimizer.update({}, {})
    assert optimizer.learning_rate.item() == 0.25


def test_an_assigned_rate_is_effective_inside_a_compiled_function() -> None:
    params, grads = {"w": mx.zeros((5, 5))}, {"w": mx.ones((5, 5))}
    optimizer = optim.SGD(1.0)

    @partial(mx.compile, inputs=optimizer.state)
    def update(grads: Any) -> Any:
        return optimizer.apply_gradients(grads, params)

    for rate in (1.0, 0.5, 0.125):
        optimizer.learning_rate = rate
        assert mx.array_equal(update(grads)["w"], mx.full((5, 5), -rate))


@every_rule
@pytest.mark.parametrize("initialised", [True, False])
def test_a_compiled_training_step_follows_the_eager_one(case: Case, initialised: bool) -> None:
    eager_optimizer, optimizer, model = case.make(optim), case.make(optim), new_model()
    if initialised:
        optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array) -> mx.array:
        value, grads = nn.value_and_grad(model, loss)(model, x)
        optimizer.update(model, grads)
        return value

    for i in range(8):
        mx.eval(step(batch(i)), state)
    assert_trees_close(model.parameters(), train(eager_optimizer, 8).parameters())
    assert_trees_close(optimizer.state, eager_optimizer.state)
    assert optimizer.state["step"].item() == 8


@every_rule
def test_explicit_state_passes_through_a_compiled_function(case: Case) -> None:
    optimizer, eager = case.make(optim), case.make(optim)
    params = {"w": random_array((6,), np.random.default_rng(0)), "l": [mx.ones((3, 3)), {}]}
    grads = tree_map(lambda p: p * 0.5 + 1.0, params)

    @mx.compile
    def step(params: Any, state: Any, grads: Any) -> Any:
        optimizer.state = state
        params = optimizer.apply_gradients(grads, params)
        return params, optimizer.state

    optimizer.init(params)
    state, got, expected = optimizer.state, params, params
    for _ in range(4):
        got, state = step(got, state, grads)
        expected = eager.apply_gradients(grads, expected)
        assert_trees_close(got, expected)
    optimizer.state = state
    assert_trees_close(optimizer.state, eager.state)
    assert optimizer.step.item() == 4


@every_rule
def test_an_overridden_apply_single_and_init_single_are_called(case: Case) -> None:
    base = getattr(optim, case.rule)
    calls: list[str] = []

    class Halved(base):  # type: ignore[misc, valid-type]
        def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
            calls.append("init")
            super().init_single(parameter, state)

        def apply_single(
            self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
        ) -> mx.array:
            calls.append("apply")
            return super().apply_single(0.5 * gradient, parameter, state)

    halved, plain = Halved(0.1, **case.arguments), case.make(optim, 0.1)
    params = {"a": mx.ones((3,)), "b": [mx.ones((2, 2))]}
    grads = tree_map(lambda p: p * 3.0, params)
    got, expected = params, params
    for _ in range(3):
        got = halved.apply_gradients(grads, got)
        expected = plain.apply_gradients(tree_map(lambda g: 0.5 * g, grads), expected)
    assert calls == ["init"] * 2 + ["apply"] * 6
    assert_trees_close(got, expected)
    assert_trees_close(halved.state, plain.state)


def test_a_subclass_may_keep_state_of_its_own() -> None:
    class Counting(optim.SGD):
        def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
            super().init_single(parameter, state)
            state["count"] = mx.array(0)

        def apply_single(
            self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
        ) -> mx.array:
            state["count"] = state["count"] + 1
            return super().apply_single(gradient, parameter, state)

    optimizer = Counting(0.5, momentum=0.5)
    params = {"w": mx.zeros((2,))}
    for _ in range(3):
        optimizer.apply_gradients({"w": mx.ones((2,))}, params)
    assert optimizer.state["w"]["count"].item() == 3
    assert optimizer.state["w"]["v"].tolist() == [1.75, 1.75]


def test_a_subclass_that_adds_only_a_method_is_still_the_same_optimizer() -> None:
    class Named(optim.AdamW):
        def name(self) -> str:
            return "named"

    named, plain = Named(0.1), optim.AdamW(0.1)
    assert named.name() == "named"
    assert_trees_equal(train(named, 3).parameters(), train(plain, 3).parameters())


def multi(module: Any) -> Any:
    """The matrices of a model with one optimizer, the vectors with another."""
    return module.MultiOptimizer(
        [module.AdamW(1e-2), module.SGD(0.1, momentum=0.9)], [lambda _, weight: weight.ndim > 1]
    )


def test_multi_optimizer_holds_our_optimizers() -> None:
    ours, theirs = multi(optim), multi(mlx.optimizers)
    trained = [train(optimizer, 5, new_sequential()).parameters() for optimizer in (ours, theirs)]
    assert_trees_close(*trained)
    assert_trees_close(ours.state, theirs.state)
    adamw, sgd = ours.state["states"]
    assert not any("bias" in path for path in leaves(adamw))
    assert any("bias" in path for path in leaves(sgd))
    ours.learning_rate = 0.5
    assert [o.learning_rate.item() for o in ours.optimizers] == [0.5, 0.5]


def test_multi_optimizer_compiles_and_takes_a_state() -> None:
    eager, optimizer, model = multi(optim), multi(optim), new_sequential()
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array) -> None:
        _, grads = nn.value_and_grad(model, loss)(model, x)
        optimizer.update(model, grads)

    for i in range(4):
        step(batch(i))
    expected = train(eager, 4, new_sequential())
    assert_trees_close(model.parameters(), expected.parameters())
    fresh = multi(optim)
    fresh.state = copy.deepcopy(optimizer.state)
    assert_trees_equal(fresh.state, optimizer.state)


@every_rule
def test_an_update_runs_on_the_callers_stream(case: Case) -> None:
    expected = train(case.make(optim), 3)
    with mx.stream(mx.new_stream(mx.cpu)):
        got = train(case.make(optim), 3)
    assert_trees_equal(got.parameters(), expected.parameters())


def test_updates_from_two_streams_see_each_other() -> None:
    optimizer, params = optim.SGD(1.0, momentum=0.5), {"w": mx.zeros((1000,))}
    streams = [mx.new_stream(mx.cpu), mx.new_stream(mx.cpu)]
    for i in range(6):
        with mx.stream(streams[i % 2]):
            params = optimizer.apply_gradients({"w": mx.ones((1000,))}, params)
    # v runs 1, 1.5, 1.75, ... and w takes each of them off.
    assert params["w"][0].item() == -sum(2 - 0.5**k for k in range(6))


def test_lazy_updates_evaluate_later_and_in_order() -> None:
    lazy, eager = optim.AdamW(0.1), optim.AdamW(0.1)
    params = {"w": random_array((100,), np.random.default_rng(2))}
    got, expected = params, params
    for _ in range(30):
        got = lazy.apply_gradients(tree_map(mx.sin, got), got)
        expected = eager.apply_gradients(tree_map(mx.sin, expected), expected)
        mx.eval(expected, eager.state)
    mx.async_eval(got, lazy.state)
    assert_trees_equal(got, expected)
    assert_trees_equal(lazy.state, eager.state)
