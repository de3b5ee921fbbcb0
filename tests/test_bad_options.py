"""Bad options of a step and of groups are named, and nothing has changed afterwards."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cases import random_tree
from flatstep import DynamicLossScale, Group
from pass_reference import model_of
from shadow import Run, Shadow, assert_it_goes_on, bits, fails, train

NAN, INF = math.nan, math.inf
Bad = tuple[dict[str, Any], type[Exception], tuple[str, ...]]

ABOVE_0: list[Bad] = [
    ({name: value}, ValueError, (name, f"{value:g}", "above 0"))
    for name in ("max_grad_norm", "clip_value")
    for value in (0, -0.5, NAN, -INF)
]
NO_NUMBERS: list[Bad] = [
    ({name: value}, TypeError, (name, repr(value), "number"))
    for name in ("max_grad_norm", "clip_value", "ema", "grad_scale")
    for value in ("0.5", [0.5], 1j)
]
# Of the optimizer: arguments, exception, and what its message names.
BAD_OPTIONS: list[Bad] = [
    *ABOVE_0,
    *NO_NUMBERS,
    ({"skip_nonfinite": 1}, TypeError, ("skip_nonfinite", "1", "True or False")),
    ({"skip_nonfinite": "yes"}, TypeError, ("skip_nonfinite", "'yes'", "True or False")),
    ({"grad_scale": INF}, ValueError, ("grad_scale", "inf", "finite in float32")),
    ({"grad_scale": mx.array(NAN)}, ValueError, ("grad_scale", "nan", "finite in float32")),
    ({"grad_scale": mx.ones(2)}, ValueError, ("grad_scale", "(2,)", "one real number")),
    ({"grad_scale": DynamicLossScale}, TypeError, ("grad_scale", "DynamicLossScale", "a number")),
    ({"accumulate_steps": 0}, ValueError, ("accumulate_steps", "0", "from 1 to 2**63 - 1")),
    ({"accumulate_steps": -1}, ValueError, ("accumulate_steps", "-1", "from 1")),
    ({"accumulate_steps": 2**63}, ValueError, ("accumulate_steps", str(2**63), "2**63 - 1")),
    ({"accumulate_steps": 2.0}, TypeError, ("accumulate_steps", "2.0", "a whole number")),
    ({"accumulate_steps": True}, TypeError, ("accumulate_steps", "True", "a whole number")),
    ({"accumulate_dtype": mx.float16}, ValueError, ("accumulate_dtype", "float16", "mx.bfloat16")),
    ({"accumulate_dtype": "float32"}, ValueError, ("accumulate_dtype", "'float32'", "mx.float32")),
    ({"ema": 1}, ValueError, ("ema", "1 ", "[0, 1)")),
    ({"ema": -0.1}, ValueError, ("ema", "-0.1", "[0, 1)")),
    ({"ema": NAN}, ValueError, ("ema", "nan", "[0, 1)")),
    ({"ema": 0.9, "ema_start": -1}, ValueError, ("ema_start", "-1", "from 0 to 2**63 - 1")),
    ({"ema": 0.9, "ema_start": 1.5}, TypeError, ("ema_start", "1.5", "a whole number")),
    ({"ema": 0.9, "ema_every": 0}, ValueError, ("ema_every", "0", "from 1 to 2**63 - 1")),
    ({"ema": 0.9, "ema_every": "2"}, TypeError, ("ema_every", "'2'", "a whole number")),
    ({"ema": 0.9, "ema_dtype": mx.int8}, ValueError, ("ema_dtype", "int8", "mx.bfloat16")),
    ({"ema_start": 2}, ValueError, ("ema_start", "ema=")),
    ({"ema_every": 2}, ValueError, ("ema_every", "ema=")),
    ({"ema_dtype": mx.float32}, ValueError, ("ema_dtype", "ema=")),
    (
        {"norm_group": "world", "max_grad_norm": 1.0},
        TypeError,
        ("norm_group", "'world'", "mx.distributed.Group"),
    ),
    (
        {"norm_group": mx.distributed.init(), "clip_value": 1.0},
        ValueError,
        ("norm_group", "max_grad_norm=", "skip_nonfinite="),
    ),
    ({"max_norm": 1.0}, TypeError, ("AdamW", "max_norm")),
]
BAD_GROUPS: list[Bad] = [
    ({"groups": optim.no_decay}, TypeError, ("groups", "weight_decay", "a list of")),
    ({"groups": None}, TypeError, ("groups", "None", "a list of")),
    ({"groups": {"b": 1}}, TypeError, ("groups", "{'b': 1}", "a list of")),
    ({"groups": [1]}, TypeError, ("groups[0]", "1", "flatstep.Group")),
    ({"groups": [optim.no_decay, "b"]}, TypeError, ("groups[1]", "'b'", "flatstep.Group")),
    (
        {"groups": [Group("b", momentum=0.9)]},
        ValueError,
        ("groups", "momentum", "AdamW", "betas, eps, bias_correction, weight_decay"),
    ),
    ({"groups": [Group("b", state_dtype=mx.int8)]}, ValueError, ("groups", "state_dtype", "betas")),
    ({"groups": [Group("b", max_grad_norm=1.0)]}, ValueError, ("groups", "max_grad_norm", "eps")),
    ({"groups": [Group("b", betas=(0.9, 1.5))]}, ValueError, ("AdamW beta2", "1.5", "[0, 1)")),
    ({"groups": [Group("b", eps=-1.0)]}, ValueError, ("AdamW epsilon", "-1", ">=0")),
    ({"groups": [Group("b", weight_decay=NAN)]}, ValueError, ("weight_decay", "nan", "finite")),
    (
        {"groups": [Group("b", learning_rate=lambda step: "fast")]},
        TypeError,
        ("learning_rate", "'fast'", "number"),
    ),
]
# Of a group and of a loss scale by themselves.
BAD_CALLS: list[tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = [
    *(
        (partial(Group, match), TypeError, ("match", repr(match), "a glob, a list of globs"))
        for match in (1, None, ["a", 1], {"a"}, b"a")
    ),
    (lambda: Group("a", learning_rate="x"), TypeError, ("learning_rate", "'x'", "number")),
    (lambda: Group("a", learning_rate=INF), ValueError, ("learning_rate", "inf", "finite")),
    (lambda: Group("a", lr_scale=-1), ValueError, ("lr_scale", "-1", ">=0")),
    (lambda: Group("a", lr_scale=NAN), ValueError, ("lr_scale", "nan", "finite")),
    (lambda: Group("a", lr_scale=None), TypeError, ("lr_scale", "None", "number")),
    (lambda: Group("a", frozen=1), TypeError, ("frozen", "1", "True or False")),
    (lambda: DynamicLossScale(0), ValueError, ("init_scale", "0", "2**-126")),
    (lambda: DynamicLossScale(INF), ValueError, ("init_scale", "inf", "finite")),
    (lambda: DynamicLossScale("x"), TypeError, ("init_scale", "'x'", "number")),
    (lambda: DynamicLossScale(growth_factor=1), ValueError, ("growth_factor", "1", "above 1")),
    (lambda: DynamicLossScale(backoff_factor=1), ValueError, ("backoff_factor", "1", "(0, 1)")),
    (lambda: DynamicLossScale(backoff_factor=0), ValueError, ("backoff_factor", "0", "(0, 1)")),
    (lambda: DynamicLossScale(growth_interval=0), ValueError, ("growth_interval", "0", "above 0")),
    (lambda: DynamicLossScale(growth_interval=1.5), ValueError, ("growth_interval", "1.5")),
    (lambda: DynamicLossScale(growth_interval=True), ValueError, ("growth_interval", "True")),
]


@pytest.mark.parametrize(("options", "exception", "parts"), [*BAD_OPTIONS, *BAD_GROUPS])
def test_a_bad_option_is_named(
    options: dict[str, Any], exception: type[Exception], parts: tuple[str, ...]
) -> None:
    fails(lambda: optim.AdamW(0.1, **options), exception, *parts)


@pytest.mark.parametrize(("call", "exception", "parts"), BAD_CALLS)
def test_a_bad_argument_is_named(
    call: Callable[[], Any], exception: type[Exception], parts: tuple[str, ...]
) -> None:
    fails(call, exception, *parts)


def test_a_group_has_the_hyperparameters_of_its_optimizer() -> None:
    fails(lambda: optim.SGD(0.1, groups=[Group("b", betas=(0.9, 0.9))]), ValueError, "betas", "SGD")
    fails(lambda: optim.Adam(0.1, groups=[optim.no_decay]), ValueError, "weight_decay", "Adam")
    fails(lambda: optim.SGD(0.1, groups=[Group("b", nesterov=True)]), ValueError, "Nesterov")


# ---- What is set later ----

SHAPES = {"w": (3, 4), "b": (70,)}
GROUPS = [
    Group("b", learning_rate=0.2),
    Group("nobody", lr_scale=2.0),
    Group("none", learning_rate=optim.cosine_decay(0.1, 9)),
]


def new_tree(seed: int) -> Any:
    return random_tree(SHAPES, np.random.default_rng(seed))


def make() -> Any:
    return optim.AdamW(0.1, grad_scale=0.5, max_grad_norm=1.0, groups=GROUPS, accumulate_steps=1)


def set_rate(optimizer: Any, rate: Any, index: int = 0) -> None:
    optimizer.groups[index].learning_rate = rate


def set_groups(optimizer: Any, groups: Any) -> None:
    optimizer.groups = groups


LATER: dict[str, tuple[Callable[[Any], Any], type[Exception], tuple[str, ...]]] = {
    "a rate": (lambda o: set_rate(o, NAN), ValueError, ("learning_rate", "nan", "finite")),
    "no rate": (lambda o: set_rate(o, "x"), TypeError, ("learning_rate", "'x'", "number")),
    "rates": (lambda o: set_rate(o, mx.ones(2)), ValueError, ("learning_rate", "(2,)")),
    "one that follows": (
        lambda o: set_rate(o, 0.3, 1),
        ValueError,
        ("groups[1]", "follows the optimizer's", "learning_rate"),
    ),
    "one with a schedule": (
        lambda o: set_rate(o, 0.3, 2),
        ValueError,
        ("groups[2]", "has a schedule", "learning_rate"),
    ),
    **{
        f"groups {i}": (partial(set_groups, groups=bad["groups"]), exception, parts)
        for i, (bad, exception, parts) in enumerate(BAD_GROUPS)
    },
    "a scale": (lambda o: setattr(o, "grad_scale", INF), ValueError, ("grad_scale", "inf")),
    "no scale": (lambda o: setattr(o, "grad_scale", None), TypeError, ("grad_scale", "None")),
    "a loss scale": (
        lambda o: setattr(o, "loss_scale", 2.0),
        ValueError,
        ("loss_scale", "DynamicLossScale"),
    ),
    "rates in the state": (
        lambda o: o.state.update(group_learning_rates=mx.ones((3, 1))),
        ValueError,
        ("group_learning_rates", "(3, 1)", "one-dimensional"),
    ),
    "a list in the state": (
        lambda o: o.state.update(group_learning_rates=[1.0] * 3),
        TypeError,
        ("group_learning_rates", "[1.0, 1.0, 1.0]"),
    ),
    "a count in the state": (
        lambda o: o.state.update(accumulated=-1),
        ValueError,
        ("accumulated", "-1", "whole"),
    ),
    "a scale in the state": (
        lambda o: o.state.update(grad_scale=NAN),
        ValueError,
        ("grad_scale", "nan"),
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_a_bad_value_that_is_set_later_changes_nothing(name: str) -> None:
    change, exception, parts = LATER[name]
    run, shadow = train(Run(make(), new_tree(1)), Shadow(make, new_tree(1)), new_tree)
    fails(lambda: change(run.optimizer), exception, *parts)
    assert [group.group for group in run.optimizer.groups] == [*GROUPS, None]
    assert_it_goes_on(run, shadow, new_tree)


def test_what_was_chosen_cannot_be_assigned() -> None:
    optimizer = make()
    for name in ("max_grad_norm", "clip_value", "skip_nonfinite", "accumulate_steps", "ema"):
        fails(lambda name=name: setattr(optimizer, name, 1), AttributeError, name)
    assert (optimizer.max_grad_norm, optimizer.accumulate_steps, optimizer.ema) == (1.0, 1, None)


def test_a_dynamic_scale_is_changed_as_loss_scale() -> None:
    optimizer = optim.AdamW(0.1, grad_scale=DynamicLossScale(8.0))
    fails(lambda: setattr(optimizer, "grad_scale", 0.5), ValueError, "DynamicLossScale", "loss_sc")
    for bad in (0, -1, NAN, INF, mx.array(-2.0)):
        fails(lambda bad=bad: setattr(optimizer, "loss_scale", bad), ValueError, "loss_scale")
    fails(lambda: setattr(optimizer, "loss_scale", "x"), TypeError, "loss_scale", "'x'", "number")
    assert optimizer.loss_scale.item() == 8
    fails(lambda: make().loss_scale, ValueError, "loss_scale", "DynamicLossScale")


# ---- Where an option has no place ----

OPTIONS: dict[str, Any] = {
    "max_grad_norm": 1.0,
    "clip_value": 0.5,
    "skip_nonfinite": True,
    "grad_scale": 0.5,
    "grad_scale ": DynamicLossScale(),
    "accumulate_steps": 2,
    "accumulate_dtype": mx.float32,
    "ema": 0.9,
    "groups": [optim.no_decay],
}
P = mx.ones(5)


class Custom(optim.AdamW):
    """With its own way with a single parameter."""

    def apply_single(self, gradient: Any, parameter: Any, state: Any) -> Any:
        return super().apply_single(gradient, parameter, state)


PLACES: dict[str, Callable[..., Any]] = {
    "flat_update": lambda **o: optim.AdamW(0.1, **o).flat_update(P, P, P, P, step=0),
    "init_single": lambda **o: optim.AdamW(0.1, **o).init_single(P, {}),
    "apply_single": lambda **o: optim.AdamW(0.1, **o).apply_single(P, P, {"m": P, "v": P}),
    "Custom: init_single": lambda **o: Custom(0.1, **o).init({"w": P}),
    "Custom:": lambda **o: Custom(0.1, **o).apply_gradients({"w": P}, {"w": P}),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("place", PLACES)
def test_an_option_without_a_place_is_refused(place: str, name: str) -> None:
    option = name.strip()
    work = partial(PLACES[place], **{option: OPTIONS[name]})
    if place == "flat_update" and name == "clip_value":
        work()  # this one needs nothing but the gradient
        return
    named = "accumulate_" if option.startswith("accumulate") else option
    fails(work, ValueError, place, f"no place for {named}", "without it")
    PLACES[place]()


def test_flat_update_clips_by_value() -> None:
    clipped = optim.SGD(1.0, clip_value=0.25).flat_update(P, P, step=0)
    assert clipped.parameter.tolist() == [0.75] * 5


def test_sums_need_to_know_the_parameters() -> None:
    model = nn.Linear(3, 3)
    gradients = model.trainable_parameters()
    for work in (
        lambda o: o.accumulate(gradients),
        lambda o: o.update(model),
    ):
        for options in ({}, {"accumulate_steps": 2}, {"accumulate_dtype": mx.bfloat16}):
            optimizer = optim.AdamW(0.1, **options)
            before = bits([optimizer.state["step"]])
            fails(lambda work=work, o=optimizer: work(o), ValueError, "accumulate", "init")
            assert bits([optimizer.state["step"]]) == before


def test_sums_in_a_compiled_function_have_to_be_there_before() -> None:
    optimizer, model = optim.AdamW(0.1), model_of(new_tree(1))
    optimizer.init(model.parameters())
    state = optimizer.state
    add = mx.compile(optimizer.accumulate, inputs=state, outputs=state)
    fails(lambda: add(new_tree(2)), ValueError, "compiled", "accumulate_dtype=mx.float32")


def test_a_state_of_another_number_of_groups_starts_from_the_groups_rates() -> None:
    params = new_tree(1)
    other = optim.AdamW(0.1, groups=GROUPS)
    params = other.apply_gradients(new_tree(2), params)
    for groups in ([Group("b", learning_rate=0.5)], [Group("b", lr_scale=0.5), *GROUPS]):
        optimizer, fresh = (optim.AdamW(0.1, groups=groups) for _ in range(2))
        optimizer.state = copy.deepcopy(other.state)
        fresh.init(params)
        expected = fresh.state["group_learning_rates"].tolist()
        optimizer.apply_gradients(new_tree(3), params)
        assert optimizer.state["group_learning_rates"].tolist() == pytest.approx(expected, rel=0.2)
        assert optimizer.step.item() == 2
    # Without groups nothing asks for rates.
    optimizer = optim.AdamW(0.1)
    optimizer.state = copy.deepcopy(other.state)
    optimizer.apply_gradients(new_tree(3), params)
    assert optimizer.step.item() == 2
