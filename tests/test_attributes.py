"""What a user sets on an optimizer is what they set, beside mlx.optimizers doing the same."""

from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from shadow import fails

BOTH = pytest.mark.parametrize("module", [optim, mlx.optimizers], ids=lambda m: m.__name__)
ONE = {"w": mx.ones((2,))}


@BOTH
def test_a_learning_rate_in_an_array_is_the_optimizers_own(module: Any) -> None:
    rate = mx.array(0.25)
    first, second = module.SGD(rate), module.SGD(0.5)
    second.learning_rate = rate
    first.learning_rate *= 0.5
    rate *= 2.0
    assert [first.learning_rate.item(), second.learning_rate.item()] == [0.125, 0.25]


@BOTH
def test_a_subclass_may_keep_a_hyperparameter_in_the_state(module: Any) -> None:
    class Scheduled(module.AdamW):  # type: ignore[misc, name-defined]
        @property
        def weight_decay(self) -> Any:
            return self.state["weight_decay"]

        @weight_decay.setter
        def weight_decay(self, value: Any) -> None:
            self.state["weight_decay"] = mx.array(value)

    optimizer = Scheduled(0.5, weight_decay=0.5)
    updated = optimizer.apply_gradients({"w": mx.zeros((2,))}, ONE)
    assert updated["w"].tolist() == [0.75, 0.75]


@BOTH
def test_an_update_that_is_set_on_one_optimizer_is_used(module: Any) -> None:
    optimizer = module.SGD(0.1)
    optimizer.apply_single = lambda gradient, parameter, state: parameter + 7.0
    assert optimizer.apply_gradients(ONE, ONE)["w"].tolist() == [8.0, 8.0]


def test_a_hyperparameter_that_is_traced_is_named() -> None:
    optimizer = optim.AdamW(0.1)
    optimizer.init(ONE)

    def step(decay: mx.array) -> Any:
        optimizer.weight_decay = decay
        return optimizer.apply_gradients(ONE, ONE)

    fails(lambda: mx.compile(step)(mx.array(0.1)), TypeError, "AdamW weight_decay", "compiled")


def test_a_step_may_be_an_integer_of_numpy() -> None:
    optimizer = optim.Lion(0.1)
    result = optimizer.flat_update(mx.ones(2), mx.ones(2), mx.zeros(2), step=np.int64(5))
    assert result.step.item() == 6
    set_step = optimizer.state.__setitem__
    fails(lambda: set_step("step", np.float64(5)), ValueError, "step", "5", "whole")


def test_the_dtype_of_the_state_is_chosen_once() -> None:
    optimizer = optim.Lion(0.1, state_dtype=mx.bfloat16)
    assert optimizer.state_dtype == mx.bfloat16
    with pytest.raises(AttributeError):
        optimizer.state_dtype = mx.float16  # type: ignore[misc]
