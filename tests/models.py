"""A small model whose parameter tree has every kind of node, its training, and trees compared."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cases import FULLEST, leaves

every_rule = pytest.mark.parametrize("case", FULLEST, ids=lambda case: case.rule)


class Model(nn.Module):
    """Lists, a tuple, layers without parameters, and parameters that stand alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = mx.array(1.5)
        self.layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Dropout(0.5)]
        self.nested = {"norm": nn.LayerNorm(8), "pair": (nn.Linear(8, 4), nn.Tanh())}

    def __call__(self, x: mx.array) -> mx.array:
        x = self.layers[2](self.layers[1](self.layers[0](x)))
        return self.nested["pair"][0](self.nested["norm"](x * self.scale))


def new_model() -> Model:
    mx.random.seed(3)
    model = Model()
    model.eval()
    mx.eval(model.parameters())
    return model


def new_sequential() -> nn.Module:
    """A model without tuples, which MLX's MultiOptimizer doesn't merge."""
    mx.random.seed(4)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def loss(model: nn.Module, x: mx.array) -> mx.array:
    return mx.mean(mx.square(model(x) - 1.0))


def batch(seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32))


def assert_trees_close(got: Any, expected: Any, rtol: float = 1e-5) -> None:
    a, b = leaves(got), leaves(expected)
    assert a.keys() == b.keys()
    for path, value in b.items():
        assert a[path].shape == value.shape
        assert mx.allclose(a[path], value, rtol, 1e-6), path


def assert_trees_equal(got: Any, expected: Any) -> None:
    a, b = leaves(got), leaves(expected)
    assert a.keys() == b.keys()
    for path, value in b.items():
        assert mx.array_equal(a[path], value), path


def train(optimizer: Any, steps: int, model: nn.Module | None = None) -> nn.Module:
    """The model, by default a new one, after some eager steps."""
    model = model or new_model()
    for step in range(steps):
        _, grads = nn.value_and_grad(model, loss)(model, batch(step))
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
    return model
