"""The average of the weights that ``ema=`` keeps, and a model that uses it for a while."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from cases import Case, case_id, leaves, random_tree
from mlx.utils import tree_map, tree_unflatten
from models import assert_trees_equal, batch, every_rule, loss, new_model, train
from pass_reference import PassReference, Training, model_of
from reference import to_float64
from shadow import bits, fails, replaced

SHAPES = {"w": (65, 70), "b": (70,), "deep": [{"weight": (64, 3)}, {"scale": ()}]}
ADAMW = Case("AdamW", {"weight_decay": 0.1, "bias_correction": True})

modes = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def new_tree(seed: int, dtype: mx.Dtype = mx.float32) -> Any:
    return random_tree(SHAPES, np.random.default_rng(seed), dtype)


# ---- Against float64 ----

# `ema`, `ema_start`, `ema_every`.
WHEN = [
    (0.9, 0, 1),
    (0.0, 0, 1),
    (0.999, 3, 1),
    (0.9, 0, 3),
    (0.5, 2, 2),
    (0.9, 10, 1),
    (0.9, 1, 20),
]
STORED: dict[str, tuple[mx.Dtype, dict[str, Any]]] = {
    "float32": (mx.float32, {}),
    "bfloat16": (mx.bfloat16, {}),
    "float16": (mx.float16, {"ema_dtype": mx.bfloat16}),
    "24 bits": (mx.bfloat16, {"master_weight_bits": 24}),
    "32 bits": (mx.float16, {"master_weight_bits": 32, "state_dtype": mx.int8}),
    "chance": (mx.bfloat16, {"stochastic_rounding": True, "ema_dtype": mx.bfloat16}),
}


@modes
@pytest.mark.parametrize("when", WHEN, ids=str)
def test_the_average_is_that_of_float64(when: tuple[float, int, int], compiled: bool) -> None:
    ema, start, every = when
    reference = PassReference(ADAMW, ema=ema, ema_start=start, ema_every=every)
    training = Training(reference, new_tree(1), compiled)
    for seed in range(7):
        training.update(new_tree(seed))


@pytest.mark.parametrize("stored", STORED)
@every_rule
def test_the_average_is_of_the_weights_before_they_are_rounded(case: Case, stored: str) -> None:
    dtype, options = STORED[stored]
    training = Training(PassReference(case, ema=0.5), new_tree(1, dtype), **options)
    for seed in range(3):
        training.update(new_tree(seed))


def test_an_average_by_hand() -> None:
    optimizer = optim.SGD(1.0, ema=0.75, ema_start=1, ema_every=2)
    params = {"w": mx.array([8.0])}
    optimizer.init(params)
    seen = [optimizer.ema_weights(params)["w"].item()]
    for _ in range(5):
        params = optimizer.apply_gradients({"w": mx.ones(1)}, params)
        seen.append(optimizer.ema_weights(params)["w"].item())
    # The weights are 7 after the first step, then 6, 5, 4 and 3; of these 5 and 3 count.
    assert seen == [8, 7, 7, 0.75 * 7 + 0.25 * 5, 6.5, 0.75 * 6.5 + 0.25 * 3]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=case_id)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_average_follows_weights_over_many_steps(dtype: mx.Dtype, compiled: bool) -> None:
    """With 0.999 a bfloat16 that is rounded to nearest stands still."""
    size, steps, decay = 20_000, 1000, 0.999
    optimizer = optim.SGD(2.0**-10, ema=decay, ema_dtype=dtype)
    params = {"w": mx.ones(size)}
    optimizer.init(params)
    apply = optimizer.apply_gradients
    state = optimizer.state
    run: Any = mx.compile(apply, inputs=state, outputs=state) if compiled else apply
    gradients = {"w": -mx.ones(size)}
    exact = 1.0
    for step in range(steps):
        params = run(gradients, params)
        mx.eval(params, state)
        exact = decay * exact + (1 - decay) * (1 + (step + 1) * 2.0**-10)
    values = to_float64(optimizer.state["w"]["ema"])
    assert 1.3 < exact < 1.5
    if dtype == mx.float32:
        np.testing.assert_allclose(values, exact, 1e-4)
    else:
        # What a rounding changed is forgotten as a weight is, after about 1,000 steps.
        assert 0 < values.std() < 0.1
        assert values.mean() == pytest.approx(exact, abs=5 * values.std() / size**0.5 + 1e-4)


def test_chance_is_another_for_the_average_than_for_the_parameter() -> None:
    options = {"stochastic_rounding": True, "ema": 0.0, "ema_dtype": mx.bfloat16}
    params = {"w": mx.ones(4096, mx.bfloat16)}
    drawn = []
    for seed in (0, 1):
        optimizer = optim.SGD(1.0, seed=seed, **options)
        updated = optimizer.apply_gradients({"w": mx.full((4096,), -(2.0**-8))}, params)
        drawn += [updated["w"] > 1, optimizer.state["w"]["ema"] > 1]
    for i, a in enumerate(drawn):
        assert 0.3 < mx.mean(a).item() < 0.7
        assert all(mx.mean(a == b).item() < 0.99 for b in drawn[i + 1 :])


# ---- What has none, and what starts one ----


def test_an_average_starts_from_the_weights() -> None:
    for dtype in (mx.float32, mx.bfloat16):
        optimizer, params = optim.AdamW(0.1, ema=0.9), new_tree(1, dtype)
        optimizer.init(params)
        assert list(optimizer.state["w"]) == ["m", "v", "ema"]
        assert optimizer.state["w"]["ema"].dtype == mx.float32
        assert_trees_equal(optimizer.ema_weights(params), params)


def from_mlx(params: Any) -> Any:
    theirs = mlx.optimizers.AdamW(0.1)
    for seed in (2, 3):
        params = theirs.apply_gradients(new_tree(seed), params)
    return params, tree_map(mx.array, theirs.state)


def from_ours(params: Any) -> Any:
    ours = optim.AdamW(0.1)
    for seed in (2, 3):
        params = ours.apply_gradients(new_tree(seed), params)
    return params, ours.state


def from_a_pickle(params: Any) -> Any:
    params, state = from_ours(params)
    return params, pickle.loads(pickle.dumps(state))


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("source", [from_mlx, from_ours, from_a_pickle])
def test_state_without_an_average_starts_one_from_the_weights(
    source: Callable[[Any], Any], init: bool
) -> None:
    params, state = source(new_tree(1))
    optimizer = optim.AdamW(0.1, ema=0.5)
    optimizer.state = state
    model = model_of(params)
    if init:
        optimizer.init(params)
        assert_trees_equal(optimizer.ema_weights(params), params)
    before = tree_map(to_float64, leaves(params))
    optimizer.update(model, new_tree(4))
    assert optimizer.step.item() == 3
    averages = leaves(optimizer.ema_weights(model))
    for path, p in leaves(model.parameters()).items():
        expected = 0.5 * before[path] + 0.5 * to_float64(p)
        np.testing.assert_allclose(to_float64(averages[path]), expected, 1e-6, 1e-6)


def test_a_part_without_weights_at_hand_is_refused_by_its_path() -> None:
    params, state = from_mlx(new_tree(1))
    optimizer = optim.AdamW(0.1, ema=0.5)
    optimizer.state = state
    fails(
        lambda: optimizer.apply_gradients({"b": mx.ones(70)}, params),
        ValueError,
        "w",
        "no average",
        "init",
    )
    optimizer.init(params)
    optimizer.apply_gradients({"b": mx.ones(70)}, params)


def test_a_state_with_an_average_is_refused_where_none_is_kept() -> None:
    averaged, plain = optim.AdamW(0.1, ema=0.9), optim.AdamW(0.1)
    params = averaged.apply_gradients(new_tree(2), new_tree(1))
    for state in (averaged.state, copy.deepcopy(averaged.state)):
        fails(lambda state=state: setattr(plain, "state", state), ValueError, "ema", "m and v")
    plain.state = averaged.dequantized_state()
    got = plain.apply_gradients(new_tree(3), params)
    assert_trees_equal(got, averaged.apply_gradients(new_tree(3), params))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=case_id)
def test_a_saved_average_goes_on_to_the_same_bits(dtype: mx.Dtype) -> None:
    make = partial(optim.Lion, 0.1, ema=0.9, ema_dtype=dtype, ema_every=2, ema_start=1)
    optimizer, params = make(), new_tree(1)
    for seed in range(4):
        params = optimizer.apply_gradients(new_tree(seed), params)
    resumed, same = make(), tree_map(mx.array, params)
    resumed.state = tree_unflatten([(k, mx.array(v)) for k, v in leaves(optimizer.state).items()])
    for seed in range(4, 8):
        params = optimizer.apply_gradients(new_tree(seed), params)
        same = resumed.apply_gradients(new_tree(seed), same)
    assert bits([same, resumed.state]) == bits([params, optimizer.state])


@modes
def test_a_step_that_is_not_taken_leaves_the_average(compiled: bool) -> None:
    reference = PassReference(ADAMW, ema=0.5, skip_nonfinite=True, accumulate_steps=2)
    training = Training(reference, new_tree(1), compiled)
    training.update(new_tree(2))
    assert_trees_equal(training.optimizer.ema_weights(training.model), new_tree(1))
    training.update(tree_map(lambda g: g * mx.nan, new_tree(3)))
    assert_trees_equal(training.optimizer.ema_weights(training.model), new_tree(1))
    for seed in (4, 5):
        training.update(new_tree(seed))
    assert training.optimizer.step.item() == 1


# ---- Used ----


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=case_id)
def test_averages_have_the_tree_and_the_dtypes_of_a_model(dtype: mx.Dtype) -> None:
    model = new_model()
    model.set_dtype(dtype)
    optimizer = optim.AdamW(1e-2, ema=0.5)
    train(optimizer, 3, model)
    averages = optimizer.ema_weights(model)
    for tree in (averages, optimizer.ema_weights(model.parameters())):
        a, b = leaves(tree), leaves(model.parameters())
        assert {path: (p.shape, p.dtype) for path, p in a.items()} == {
            path: (p.shape, p.dtype) for path, p in b.items()
        }
    state = leaves(optimizer.state)
    for path, average in leaves(averages).items():
        assert mx.array_equal(average, state[f"{path}.ema"].astype(dtype)), path
    assert mx.any(model.layers[0].weight != averages["layers"][0]["weight"]).item()


def test_a_model_has_its_averages_for_a_while() -> None:
    model, optimizer = new_model(), optim.AdamW(1e-2, ema=0.5)
    train(optimizer, 3, model)
    own = tree_map(mx.array, model.parameters())
    averages = optimizer.ema_weights(model)
    with optimizer.use_ema_weights(model) as used:
        assert used is model
        assert_trees_equal(model.parameters(), averages)
    assert_trees_equal(model.parameters(), own)
    with pytest.raises(ZeroDivisionError), optimizer.use_ema_weights(model):
        assert 1 // 0
    assert_trees_equal(model.parameters(), own)
    # Training goes on as if nothing had been.
    others = new_model()
    other = optim.AdamW(1e-2, ema=0.5)
    train(other, 5, others)
    train_on(optimizer, model, 3, 2)
    assert_trees_equal(model.parameters(), others.parameters())
    assert_trees_equal(optimizer.ema_weights(model), other.ema_weights(others))


def train_on(optimizer: Any, model: nn.Module, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        _, grads = nn.value_and_grad(model, loss)(model, batch(step))
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)


def test_what_has_no_average_keeps_its_weights() -> None:
    model = new_model()
    model.layers[0].freeze()
    model.nested["norm"].bias = model.nested["norm"].bias.astype(mx.float32)
    optimizer = optim.AdamW(1e-2, ema=0.5)
    optimizer.init(model.trainable_parameters())
    train_on(optimizer, model, 0, 2)
    averages, own = leaves(optimizer.ema_weights(model)), leaves(model.parameters())
    assert averages.keys() == own.keys()
    same = {path for path in own if mx.array_equal(averages[path], own[path]).item()}
    assert same == {"layers.0.weight", "layers.0.bias"}
    # Before there is any state, all have what they are.
    assert_trees_equal(optim.AdamW(0.1, ema=0.5).ema_weights(model), model.parameters())
    tree = {"ints": mx.arange(3), "w": mx.ones(3)}
    optimizer = optim.AdamW(0.1, ema=0.5)
    optimizer.init(tree)
    assert_trees_equal(optimizer.ema_weights(tree), tree)


def test_averages_that_are_asked_for_in_vain() -> None:
    optimizer, model = optim.AdamW(0.1), new_model()
    fails(lambda: optimizer.ema_weights(model), ValueError, "ema_weights", "ema=")
    fails(lambda: optimizer.use_ema_weights(model).__enter__(), ValueError, "ema_weights", "ema=")
    optimizer = optim.AdamW(0.1, ema=0.9)
    fails(lambda: optimizer.ema_weights([mx.ones(3)]), TypeError, "parameters", "a list")
    fails(lambda: optimizer.ema_weights({"w": 1.0}), TypeError, "w", "mlx.core.array", "1.0")
    as_dict = model.parameters()
    fails(lambda: optimizer.use_ema_weights(as_dict).__enter__(), TypeError, "model", "a dict")
    optimizer.init(model.trainable_parameters())
    other = replaced(model.parameters(), {"layers.0.bias": mx.ones(3)})
    fails(lambda: optimizer.ema_weights(other), ValueError, "layers.0.bias", "(3,)", "(8,)")
