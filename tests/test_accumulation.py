"""Gradients that are summed up for a step: by ``accumulate``, or by ``accumulate_steps``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cases import Case, leaves, random_tree
from mlx.utils import tree_map
from models import assert_trees_equal, every_rule
from pass_reference import PassReference, Training, model_of
from reference import to_float64
from shadow import bits, fails

SHAPES = {"w": (65, 70), "b": (70,), "deep": [{"weight": (64, 3)}, {"scale": ()}]}
ADAMW = Case("AdamW", {"weight_decay": 0.1, "bias_correction": True})
STEPS = {
    "accumulate": {"accumulate_dtype": mx.float32},
    "accumulate_steps": {"accumulate_steps": 8},
}

modes = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
ways = pytest.mark.parametrize("way", STEPS)


def new_tree(seed: int, dtype: mx.Dtype = mx.float32) -> Any:
    return random_tree(SHAPES, np.random.default_rng(seed), dtype)


# ---- As one batch ----


def network() -> nn.Module:
    mx.random.seed(5)
    model = nn.Sequential(nn.Linear(70, 99), nn.LayerNorm(99), nn.Tanh(), nn.Linear(99, 4))
    mx.eval(model.parameters())
    return model


def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return mx.mean(mx.square(model(x) - y))


class Trainer:
    """Training as mlx-lm's: one function that is compiled or not, told when to take a step."""

    def __init__(self, optimizer: Any, way: str, compiled: bool, dtype: mx.Dtype = mx.float32):
        self.model, self.optimizer = network(), optimizer
        self.model.set_dtype(dtype)
        optimizer.init(self.model.trainable_parameters())
        state = [self.model.state, optimizer.state, mx.random.state]

        def step(x: mx.array, y: mx.array, is_last: bool) -> mx.array:
            value, gradients = nn.value_and_grad(self.model, loss)(self.model, x, y)
            if way != "accumulate":
                optimizer.update(self.model, gradients)
                return value
            optimizer.accumulate(gradients)
            if is_last:
                optimizer.update(self.model)
            return value

        self.state = state
        self.run = mx.compile(step, inputs=state, outputs=state) if compiled else step

    def train(self, parts: int, batches: int = 3) -> None:
        """Batches of 16, each in so many parts."""
        for seed in range(batches):
            rng = np.random.default_rng(seed)
            x, y = (mx.array(rng.normal(size=(16, n)).astype(np.float32)) for n in (70, 4))
            for i, (a, b) in enumerate(zip(mx.split(x, parts), mx.split(y, parts), strict=True)):
                mx.eval(self.run(a, b, i == parts - 1), self.state)


# Beside each: how far the weights may end, of the way that they went.
WITH: dict[str, tuple[dict[str, Any], float]] = {
    "nothing else": ({}, 1e-5),
    "clipping": ({"max_grad_norm": 0.1, "clip_value": 0.05}, 1e-5),
    "skipping": ({"skip_nonfinite": True}, 1e-5),
    "a scale": ({"grad_scale": 0.5}, 1e-5),
    "groups": ({"groups": [optim.no_decay, optim.Group("layers.3.*", lr_scale=0.1)]}, 1e-5),
    "an average": ({"ema": 0.5}, 1e-5),
    # Where a code or a rest is rounded otherwise, the next step starts elsewhere.
    "8-bit state": ({"state_dtype": mx.int8}, 1e-2),
    "master weights": ({"master_weight_bits": 32}, 1e-5),
}


@modes
@ways
@pytest.mark.parametrize("name", WITH)
def test_eight_micro_batches_are_one_batch(name: str, way: str, compiled: bool) -> None:
    options, bound = WITH[name]
    make = partial(optim.AdamW, 1e-3, weight_decay=0.1, eps=1e-4, **options)
    whole = Trainer(make(), "none", False)
    parts = Trainer(make(**STEPS[way]), way, compiled)
    start = leaves(network().parameters())
    whole.train(1)
    parts.train(8)
    assert parts.optimizer.step.item() == whole.optimizer.step.item() == 3
    assert parts.optimizer.state["accumulated"].item() == 0
    expected = leaves(whole.model.parameters())
    for path, p in leaves(parts.model.parameters()).items():
        a, b, c = (to_float64(x) for x in (p, expected[path], start[path]))
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b - c), path
    if "max_grad_norm" in options:
        norms = [trainer.optimizer.state["grad_norm"].item() for trainer in (parts, whole)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    if "ema" in options:
        averages = [t.optimizer.ema_weights(t.model) for t in (parts, whole)]
        for path, p in leaves(averages[0]).items():
            assert mx.allclose(p, leaves(averages[1])[path], 1e-5, 1e-6), path


@ways
@every_rule
def test_one_gradient_is_a_step_of_its_own(case: Case, way: str) -> None:
    options = {"accumulate": {}, "accumulate_steps": {"accumulate_steps": 1}}[way]
    summed, plain = case.make(optim, **options), case.make(optim)
    models = [model_of(new_tree(1)) for _ in range(2)]
    summed.init(models[0].parameters())
    for seed in (2, 3):
        if way == "accumulate":
            summed.accumulate(new_tree(seed))
            summed.update(models[0])
        else:
            summed.update(models[0], new_tree(seed))
        plain.update(models[1], new_tree(seed))
    assert_trees_equal(models[0].parameters(), models[1].parameters())


@modes
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@ways
def test_any_number_of_gradients_is_averaged(way: str, count: int, compiled: bool) -> None:
    options = STEPS[way] if way == "accumulate" else {way: count}
    training = Training(PassReference(ADAMW, max_grad_norm=0.1, **options), new_tree(1), compiled)
    for step in range(2):
        for i in range(count):
            gradients = new_tree(10 * step + i, mx.bfloat16)
            if way == "accumulate":
                training.accumulate(gradients)
            else:
                training.update(gradients)
        if way == "accumulate":
            training.update()
    assert training.optimizer.step.item() == 2


def test_a_step_may_come_before_as_many_as_were_asked_for() -> None:
    training = Training(PassReference(ADAMW, accumulate_steps=5), new_tree(1))
    for seed in range(3):
        training.update(new_tree(seed))
    training.update()
    assert training.optimizer.step.item() == 1
    for seed in range(5):
        training.update(new_tree(seed))
    assert training.optimizer.step.item() == 2


def test_gradients_that_come_with_the_update_are_added_to_the_others() -> None:
    training = Training(PassReference(ADAMW, accumulate_dtype=mx.float32), new_tree(1))
    training.accumulate(new_tree(2))
    training.update(new_tree(3))
    assert training.optimizer.step.item() == 1


@modes
def test_an_update_of_nothing_does_nothing(compiled: bool) -> None:
    training = Training(PassReference(ADAMW, accumulate_dtype=mx.float32), new_tree(1), compiled)
    for _ in range(2):
        training.update()
        assert training.optimizer.step.item() == 0
    training.accumulate(new_tree(2))
    training.update()
    training.update()
    assert training.optimizer.step.item() == 1


def test_a_skipped_step_drops_what_was_accumulated() -> None:
    reference = PassReference(ADAMW, accumulate_dtype=mx.float32, skip_nonfinite=True)
    training = Training(reference, new_tree(1))
    for seed, value in ((2, 1.0), (3, mx.nan), (4, 1.0), (5, 1.0)):
        training.accumulate(tree_map(lambda g, v=value: g * v, new_tree(seed)))
        training.accumulate(new_tree(seed + 10))
        training.update()
    state = training.optimizer.state
    assert (state["step"].item(), state["skipped_steps"].item()) == (3, 1)


# ---- Sums ----


def test_sums_are_seen_beside_the_state() -> None:
    optimizer = optim.AdamW(0.1)
    optimizer.init(new_tree(1))
    assert "accumulated" not in optimizer.state
    assert list(optimizer.state["w"]) == ["m", "v"]
    optimizer.accumulate(new_tree(2))
    optimizer.accumulate(new_tree(3))
    state = optimizer.state
    assert list(state["w"]) == ["m", "v", "gradient_sum"]
    assert (state["accumulated"].item(), state["accumulated"].dtype) == (2, mx.uint64)
    expected = tree_map(mx.add, new_tree(2), new_tree(3))
    assert mx.array_equal(state["deep"][0]["weight"]["gradient_sum"], expected["deep"][0]["weight"])


def test_parts_of_the_gradients_may_come_one_after_the_other() -> None:
    """As from a model whose layers are frozen in turns, or one that is too large for one pass."""
    training = Training(PassReference(ADAMW, accumulate_dtype=mx.float32), new_tree(1))
    whole = new_tree(2)
    for part in ({"deep": whole["deep"]}, {"w": whole["w"]}, {"b": whole["b"]}, {}):
        training.accumulate(part)
    training.accumulate({"deep": [{}, whole["deep"][1]]})
    training.update()
    assert training.optimizer.step.item() == 1
    # What a step leaves out is dropped.
    training = Training(PassReference(ADAMW, accumulate_dtype=mx.float32), new_tree(1))
    training.accumulate(whole)
    training.update({"b": whole["b"]})
    assert not training.optimizer.state["w"]["gradient_sum"].any().item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_sums_of_small_gradients_are_right_in_the_mean(dtype: mx.Dtype) -> None:
    """256 plus 1,000 times a tenth of its last place of bfloat16: rounded to nearest, still 256."""
    size, small, count = 20_000, 0.2, 1000
    optimizer = optim.SGD(0.1, accumulate_dtype=dtype, seed=3)
    optimizer.init({"w": mx.zeros(size)})
    optimizer.accumulate({"w": mx.full((size,), 256.0)})
    for _ in range(count):
        optimizer.accumulate({"w": mx.full((size,), small)})
    sums = optimizer.state["w"]["gradient_sum"]
    assert sums.dtype == dtype
    values = to_float64(sums)
    # A walk of steps that are 2 now and then, and 0 otherwise.
    deviation = (count * small * (2 - small)) ** 0.5 if dtype == mx.bfloat16 else 0.0
    assert abs(values.mean() - 456) < 5 * deviation / size**0.5 + 3e-2
    assert values.std() < 1.1 * deviation + 1e-3
    if dtype == mx.bfloat16:
        assert values.std() > 0.8 * deviation


def test_chance_is_another_at_each_gradient_and_seed() -> None:
    sums = []
    for seed, times in ((0, 1), (0, 2), (1, 1), (0, 1)):
        optimizer = optim.SGD(0.1, accumulate_dtype=mx.bfloat16, seed=seed)
        optimizer.init({"w": mx.zeros(1000)})
        for _ in range(times):
            optimizer.accumulate({"w": mx.full((1000,), (1 + 2**-8) / times)})
        sums.append(np.array(optimizer.state["w"]["gradient_sum"].astype(mx.float32)))
    assert np.array_equal(sums[0], sums[3])
    assert 0.1 < np.mean(sums[0] == sums[2]) < 0.95
    assert 0.1 < np.mean(sums[0] == sums[1]) < 0.95


def test_chance_is_another_for_a_sum_than_for_its_parameter() -> None:
    between = mx.full((4096,), 2.0**-8)  # half-way from 1 to the next number
    optimizer = optim.SGD(1.0, accumulate_dtype=mx.bfloat16)
    optimizer.init({"w": mx.zeros(4096)})
    optimizer.accumulate({"w": 1 + between})
    rounded = optim.SGD(1.0, stochastic_rounding=True)
    params = rounded.apply_gradients({"w": -between}, {"w": mx.ones(4096, mx.bfloat16)})
    a, b = optimizer.state["w"]["gradient_sum"] > 1, params["w"] > 1
    assert all(0.3 < mx.mean(x).item() < 0.7 for x in (a, b))
    assert 0.01 < mx.mean(a == b).item() < 0.99


BAD: dict[str, tuple[Callable[[Any], Any], type[Exception], tuple[str, ...]]] = {
    "a shape": (lambda g: {**g, "b": mx.ones(3)}, ValueError, ("b", "(3,)", "(70,)")),
    "a name": (lambda g: {**g, "c": mx.ones(3)}, ValueError, ("c", "init")),
    "a dtype": (
        lambda g: {**g, "b": mx.ones(70, mx.int32)},
        TypeError,
        ("b", "int32", "float32, float16 and bfloat16"),
    ),
    "no array": (lambda g: {**g, "b": None}, TypeError, ("b", "NoneType")),
    "no tree": (lambda g: (1.0, g), TypeError, ("gradients", "tuple", "value_and_grad")),
    "a subtree": (lambda g: {**g, "deep": mx.ones(3)}, ValueError, ("deep", "subtree")),
}


@pytest.mark.parametrize("name", BAD)
def test_gradients_that_do_not_fit_change_nothing(name: str) -> None:
    change, exception, parts = BAD[name]
    optimizers = [optim.AdamW(0.1), optim.AdamW(0.1)]
    for optimizer in optimizers:
        optimizer.init(new_tree(1))
        optimizer.accumulate(new_tree(2))
    before = bits(optimizers[0].state)
    fails(lambda: optimizers[0].accumulate(change(new_tree(3))), exception, *parts)
    assert bits(optimizers[0].state) == before
    for optimizer in optimizers:
        optimizer.accumulate(new_tree(3))
    assert bits(optimizers[0].state) == bits(optimizers[1].state)
