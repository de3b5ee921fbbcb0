"""A step's options used otherwise than meant: nothing goes wrong in silence."""

from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.nn as nn
import pytest
from flatstep import _ext
from mlx.utils import tree_map


def vector(value: float, size: int = 2) -> mx.array:
    return mx.full((size,), float(value))


@pytest.mark.parametrize(
    "rates", [lambda: mx.array([1.0, 2.0])[::-1], lambda: mx.broadcast_to(mx.array(3.0), (2,))]
)
def test_rates_of_groups_may_lie_in_any_layout(rates: Any) -> None:
    groups = [optim.Group(name, learning_rate=9.0) for name in "ab"]
    optimizer = optim.SGD(1.0, groups=groups)
    optimizer.state["group_learning_rates"] = rates()
    ones = {"a": vector(1), "b": vector(1)}
    updated = optimizer.apply_gradients(ones, {"a": vector(0), "b": vector(0)})
    assert [-updated[name][0].item() for name in "ab"] == rates().tolist()


def test_a_step_leaves_no_sum_behind_in_any_bucket() -> None:
    optimizer = optim.SGD(1.0, accumulate_steps=2)
    # A bucket of each dtype, and two leaves in one of them.
    parameters = {"a": vector(0), "b": vector(0), "c": vector(0).astype(mx.bfloat16)}
    gradients = tree_map(mx.ones_like, parameters)
    optimizer.init(parameters)
    for given in (gradients, {"a": gradients["a"]}):
        parameters |= optimizer.apply_gradients(given, parameters)
    assert optimizer.state["accumulated"].item() == 0
    assert not any(optimizer.state[name]["gradient_sum"].any().item() for name in "abc")
    for _ in range(2):
        parameters |= optimizer.apply_gradients(gradients, parameters)
    assert [parameters[name][0].item() for name in "abc"] == [-2, -1, -1]


def test_a_dequantized_state_has_no_count_of_the_sums_that_it_lacks() -> None:
    first, second = (optim.SGD(1.0, accumulate_steps=4) for _ in range(2))
    parameters = {"w": vector(0)}
    for _ in range(3):
        parameters = first.apply_gradients({"w": vector(1)}, parameters)
    second.state = first.dequantized_state()
    parameters = second.apply_gradients({"w": vector(1)}, parameters)
    assert parameters["w"][0].item() == 0
    assert second.state["accumulated"].item() == 1


def test_a_state_with_sums_of_which_the_count_is_lost_is_refused() -> None:
    optimizer = optim.SGD(1.0, accumulate_steps=2)
    optimizer.init({"w": vector(0)})
    optimizer.accumulate({"w": vector(1)})
    state: Any = {"w": dict(optimizer.state["w"])}
    state |= {name: optimizer.state[name] for name in ("step", "learning_rate")}
    with pytest.raises(ValueError, match="gradient_sum, but not how many there are, accumulated"):
        optimizer.state = state


def test_a_norm_of_what_was_accumulated_leaves_the_sums_in_place() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])
    optimizer = optim.AdamW(1e-3, max_grad_norm=1.0)
    optimizer.init(model.trainable_parameters())
    fresh = []
    for _ in range(3):
        gradients = tree_map(mx.ones_like, model.trainable_parameters())
        mx.eval(gradients)
        optimizer.accumulate(gradients)
        mx.eval(optimizer.state)
        before = _ext.reuse_counters()["state_fresh"]
        optimizer.update(model)
        mx.eval(model, optimizer.state)
        fresh.append(_ext.reuse_counters()["state_fresh"] - before)
    assert fresh[1:] == [0, 0]


def test_no_limit_does_not_clip_by_a_norm_that_is_infinite() -> None:
    optimizer = optim.SGD(1.0, max_grad_norm=float("inf"))
    gradients = {"large": vector(1e20), "small": vector(1)}
    updated = optimizer.apply_gradients(gradients, tree_map(mx.zeros_like, gradients))
    assert updated["small"][0].item() == -1


def test_a_first_step_that_fails_changes_nothing() -> None:
    optimizer = optim.SGD(1.0, accumulate_steps=2)
    with pytest.raises(ValueError, match="does not match parameter"):
        optimizer.apply_gradients({"w": vector(1, 3)}, {"w": vector(1)})
    assert list(optimizer.state) == ["step", "accumulated", "learning_rate"]
    optimizer.apply_gradients({"w": vector(1, 3)}, {"w": vector(1, 3)})


def test_parameters_are_flat_beside_a_frozen_group() -> None:
    optimizer = optim.SGD(1.0, groups=[optim.Group("a", frozen=True)])
    parameters = {"a": vector(1), "b": vector(1), "c": vector(1)}
    for _ in range(2):
        parameters = optimizer.apply_gradients(parameters, parameters)
    assert optimizer.is_flat(parameters)


def test_names_with_dots_are_not_taken_for_paths() -> None:
    gradients = {"a.b": vector(3, 1), "a": {"b": vector(4, 1)}}
    assert optim.clip_grad_norm(gradients, 1.0)[1].item() == 5
    group = optim.Group(lambda path, weight: weight.ndim == 2, learning_rate=5.0)
    optimizer = optim.SGD(1.0, groups=[group])
    ones = {"a.b": mx.ones((1, 1)), "a": {"b": vector(1, 1)}}
    updated: Any = optimizer.apply_gradients(ones, ones)
    assert (updated["a.b"].item(), updated["a"]["b"].item()) == (-4, 0)


def test_state_with_an_average_says_what_an_optimizer_without_one_takes() -> None:
    optimizer = optim.Adam(1e-3, ema=0.9)
    optimizer.init({"w": vector(1)})
    with pytest.raises(ValueError, match=r"dequantized_state\(\)"):
        optim.Adam(1e-3).state = optimizer.state
    other = optim.Adam(1e-3)
    other.state = optimizer.dequantized_state()
    other.init({"w": vector(1)})


def test_a_step_inside_use_ema_weights_is_refused_and_changes_nothing() -> None:
    model = nn.Linear(2, 2)
    optimizer = optim.Adam(1e-3, ema=0.9)
    optimizer.init(model.trainable_parameters())
    gradients = tree_map(mx.ones_like, model.trainable_parameters())
    with optimizer.use_ema_weights(model), pytest.raises(ValueError, match="would be lost"):
        optimizer.update(model, gradients)
    assert optimizer.step.item() == 0
    optimizer.update(model, gradients)


def test_an_average_of_none_of_the_parameters_is_an_error() -> None:
    optimizer = optim.Adam(1e-3, ema=0.9)
    optimizer.init({"w": vector(1)})
    with pytest.raises(ValueError, match="no average of any"):
        optimizer.ema_weights({"v": vector(1)})


@pytest.mark.parametrize("change", [lambda o: setattr(o.groups[0], "frozen", True)])
def test_a_group_is_not_changed_by_its_attributes(change: Any) -> None:
    group = optim.Group("a")
    optimizer = optim.AdamW(1e-3, groups=[group])
    with pytest.raises(AttributeError):
        change(optimizer)
    with pytest.raises(AttributeError, match=r"optimizer\.groups = "):
        group.frozen = True


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_a_loss_scale_in_the_state_is_looked_at(value: float) -> None:
    optimizer = optim.Adam(1e-3, grad_scale=optim.DynamicLossScale())
    with pytest.raises(ValueError, match="loss_scale should be above 0"):
        optimizer.state["loss_scale"] = value


def test_a_loss_scale_never_becomes_zero() -> None:
    scale = optim.DynamicLossScale(2.0**-125, backoff_factor=2.0**-60)
    optimizer = optim.SGD(1.0, grad_scale=scale)
    for _ in range(2):
        optimizer.apply_gradients({"w": vector(mx.inf)}, {"w": vector(0)})
    assert optimizer.loss_scale.item() == 2.0**-126
