"""A step whose gradients are not finite changes nothing but the count of those skipped."""

from collections.abc import Callable
from itertools import product
from typing import Any

import flatstep as optim
import mlx.core as mx
import numpy as np
import pytest
from cases import DTYPES, RULES, Case, case_id, leaves, random_array, random_tree
from flatstep import _ext
from mlx.utils import tree_map
from models import every_rule
from pass_reference import Parameters, PassReference, Training
from shadow import bits, replaced

SHAPES = {"w": (65, 70), "b": (70,), "deep": [{"weight": (64, 3)}, {"scale": ()}]}
PATHS = ["w", "b", "deep.0.weight", "deep.1.scale"]
ADAMW = Case("AdamW", {"weight_decay": 0.1, "bias_correction": True})
VALUES = {"nan": mx.nan, "inf": mx.inf, "-inf": -mx.inf}

modes = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def new_tree(seed: int, dtype: mx.Dtype = mx.float32) -> Any:
    return random_tree(SHAPES, np.random.default_rng(seed), dtype)


def with_value(array: mx.array, value: float, place: int) -> mx.array:
    """The array with this for one of its elements, counted from the end below zero."""
    here = mx.arange(array.size) == place % array.size
    return mx.where(here.reshape(array.shape), value, array).astype(array.dtype)


def spoilt(gradients: Any, path: str, value: float, place: int) -> Any:
    return replaced(gradients, {path: with_value(leaves(gradients)[path], value, place)})


class Watched:
    """Parameters and an optimizer, and all that is in them by its bits."""

    def __init__(self, optimizer: Any, params: Any, compiled: bool = False):
        self.optimizer, self.params = optimizer, params
        optimizer.init(params)
        apply = optimizer.apply_gradients
        state = optimizer.state
        self.apply: Any = mx.compile(apply, inputs=state, outputs=state) if compiled else apply

    def step(self, gradients: Any) -> None:
        self.params = self.apply(gradients, self.params)
        mx.eval(self.params, self.optimizer.state)

    def bits(self) -> dict[str, bytes]:
        state = {key: self.optimizer.state[key] for key in self.optimizer.state}
        skipped = state.pop("skipped_steps")
        assert skipped.dtype == mx.uint64
        return bits({"params": self.params, "state": state})

    @property
    def skipped(self) -> int:
        return int(self.optimizer.state["skipped_steps"].item())


# Beside the rule: all that a step writes.
EVERYTHING: dict[str, Any] = {
    "skip_nonfinite": True,
    "max_grad_norm": 1.0,
    "ema": 0.9,
    "groups": [
        optim.Group("deep.*", learning_rate=optim.cosine_decay(0.1, 9)),
        optim.Group("b", lr_scale=0.5),
    ],
}
STORED: dict[str, tuple[mx.Dtype, dict[str, Any]]] = {
    "float32": (mx.float32, {}),
    "8-bit state": (mx.float32, {"state_dtype": mx.int8}),
    "master weights": (mx.bfloat16, {"master_weight_bits": 24, "state_dtype": mx.int8}),
    "by chance": (mx.float16, {"stochastic_rounding": True, "ema_dtype": mx.bfloat16}),
}


@modes
@pytest.mark.parametrize("stored", STORED)
@every_rule
def test_a_step_that_is_skipped_leaves_everything_bit_for_bit(
    case: Case, stored: str, compiled: bool
) -> None:
    dtype, options = STORED[stored]
    rate = optim.join_schedules([optim.linear_schedule(0, 0.1, 3), optim.cosine_decay(0.1, 9)], [3])
    optimizer = case.make(optim, rate, **EVERYTHING, **options)
    run = Watched(optimizer, new_tree(1, dtype), compiled)
    run.step(new_tree(2))
    before, skipped = run.bits(), 0
    for path, value, place in product(PATHS, VALUES.values(), (0, -1)):
        run.step(spoilt(new_tree(3), path, value, place))
        skipped += 1
        assert run.bits() == before, (path, value, place)
        assert run.skipped == skipped
    run.step(new_tree(4))
    assert run.skipped == skipped and optimizer.step.item() == 2
    changed = run.bits()
    assert all(changed[f"params.{path}"] != before[f"params.{path}"] for path in PATHS)


RATES: dict[str, Any] = {"plain": optim.cosine_decay(0.1, 9), "callable": lambda t: 0.1 / (1 + t)}


@modes
@pytest.mark.parametrize("own", RATES)
@pytest.mark.parametrize("rate", RATES)
def test_schedules_of_any_kind_stand_still(rate: str, own: str, compiled: bool) -> None:
    groups = [optim.Group("b", learning_rate=RATES[own])]
    optimizer = optim.AdamW(RATES[rate], skip_nonfinite=True, groups=groups)
    run = Watched(optimizer, new_tree(1), compiled)
    for seed in (2, 3):
        run.step(new_tree(seed))
    before = run.bits()
    for _ in range(2):
        run.step(spoilt(new_tree(4), "w", mx.nan, 0))
        assert run.bits() == before
    run.step(new_tree(5))
    expected = RATES[rate](mx.array(2)).item()
    assert optimizer.learning_rate.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", [0, 1, 63, 64, 1023, 1024, 4549, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_one_element_of_any_dtype_is_enough(dtype: mx.Dtype, place: int, value: str) -> None:
    run = Watched(optim.AdamW(0.1, skip_nonfinite=True), new_tree(1))
    run.step(new_tree(2, dtype))
    before = run.bits()
    run.step(spoilt(new_tree(3, dtype), "w", VALUES[value], place))
    assert run.bits() == before and run.skipped == 1


LIE: dict[str, Callable[[mx.array], mx.array]] = {
    "transposed": lambda g: mx.contiguous(g.T).T,
    "sliced": lambda g: mx.contiguous(mx.repeat(g, 2, axis=-1))[..., ::2],
    "reversed": lambda g: mx.contiguous(g[..., ::-1])[..., ::-1],
    "broadcast": lambda g: mx.broadcast_to(g[-1:], g.shape),
}


@pytest.mark.parametrize("lie", LIE)
@pytest.mark.parametrize("place", [65 * 70 - 70, -1])
def test_one_element_is_found_however_gradients_lie(lie: str, place: int) -> None:
    run = Watched(optim.Lion(0.1, skip_nonfinite=True), new_tree(1))
    before = run.bits()
    gradients = new_tree(3)
    gradients["w"] = LIE[lie](with_value(gradients["w"], mx.nan, place))
    run.step(gradients)
    assert run.bits() == before and run.skipped == 1


@pytest.mark.usefixtures("restored_settings")
@pytest.mark.parametrize("threads", [1, 2])
def test_every_instruction_set_finds_it(threads: int) -> None:
    _ext.set_num_threads(threads)
    for loops, dtype, place in product(_ext.available_cpu_loops(), DTYPES, (0, 77, -1)):
        _ext.set_cpu_loops(loops)
        run = Watched(optim.AdamW(0.1, skip_nonfinite=True, clip_value=0.1), new_tree(1))
        before = run.bits()
        run.step(spoilt(new_tree(2, dtype), "w", -mx.inf, place))
        assert run.bits() == before and run.skipped == 1


@modes
def test_clipping_by_value_hides_no_infinity(compiled: bool) -> None:
    run = Watched(optim.AdamW(0.1, skip_nonfinite=True, clip_value=0.5), new_tree(1), compiled)
    before = run.bits()
    for value in VALUES.values():
        run.step(spoilt(new_tree(2), "b", value, 3))
        assert run.bits() == before
    assert run.skipped == 3


@modes
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_a_scale_hides_no_infinity(scale: float, compiled: bool) -> None:
    run = Watched(optim.AdamW(0.1, skip_nonfinite=True, grad_scale=scale), new_tree(1), compiled)
    before = run.bits()
    run.step(spoilt(new_tree(2), "b", mx.inf, 3))
    assert run.bits() == before and run.skipped == 1


@modes
def test_a_norm_that_overflows_skips(compiled: bool) -> None:
    for options in ({}, {"max_grad_norm": 1.0}):
        optimizer = optim.AdamW(0.1, skip_nonfinite=True, **options)
        run = Watched(optimizer, new_tree(1), compiled)
        before = run.bits()
        run.step(tree_map(lambda g: mx.full(g.shape, 1e19), new_tree(2)))
        assert run.bits() == before and run.skipped == 1
        run.step(tree_map(lambda g: mx.full(g.shape, 1e17), new_tree(2)))
        assert run.bits() != before and run.skipped == 1


def test_without_it_numbers_that_are_not_finite_spread() -> None:
    optimizer = optim.AdamW(0.1, max_grad_norm=1.0)
    updated = optimizer.apply_gradients(spoilt(new_tree(2), "b", mx.nan, 0), new_tree(1))
    assert all(mx.all(mx.isnan(p)).item() for p in leaves(updated).values())
    assert np.isnan(optimizer.state["grad_norm"].item()) and optimizer.step.item() == 1
    assert "skipped_steps" not in optimizer.state


# ---- Wherever parameters and state lie ----


def replace_one(run: Watched) -> Any:
    """A weight that was loaded lies apart from the others, which are written in place."""
    new = {"w": random_array((65, 70), np.random.default_rng(9))}
    run.params = replaced(run.params, new)


def transpose_one(run: Watched) -> Any:
    new = {"w": mx.contiguous(random_array((70, 65), np.random.default_rng(9))).T}
    run.params = replaced(run.params, new)


HOLD: dict[str, Callable[[Watched], Any]] = {
    "nobody": lambda run: None,
    "the parameters": lambda run: tree_map(lambda p: p, run.params),
    "one parameter": lambda run: run.params["b"],
    "an expression": lambda run: run.params["w"] * 2,
    "the state": lambda run: run.optimizer.state.copy(),
    "one of it": lambda run: run.optimizer.state["w"]["m"],
    "a replaced weight": replace_one,
    "a transposed weight": transpose_one,
}


@modes
@pytest.mark.parametrize("holds", HOLD)
def test_what_lies_elsewhere_is_kept_too(holds: str, compiled: bool) -> None:
    run = Watched(optim.AdamW(0.1, **EVERYTHING), new_tree(1), compiled)
    for seed in (2, 3):
        run.step(new_tree(seed))
    held = HOLD[holds](run)
    its_bits = bits([held]) if isinstance(held, mx.array | dict) else None
    before = run.bits()
    for _ in range(2):
        run.step(spoilt(new_tree(4), "w", mx.nan, 100))
        assert run.bits() == before
    assert run.skipped == 2
    assert its_bits is None or bits([held]) == its_bits
    twin = Watched(optim.AdamW(0.1, **EVERYTHING), tree_map(mx.array, run.params))
    twin.optimizer.state = tree_map(mx.array, {**run.optimizer.state})
    for each in (run, twin):
        each.step(new_tree(5))
    assert run.bits() == twin.bits()


@modes
def test_a_part_of_the_parameters_is_kept_where_it_lies(compiled: bool) -> None:
    run = Watched(optim.AdamW(0.1, skip_nonfinite=True), new_tree(1))
    run.step(new_tree(2))
    before = run.bits()
    part = {"b": with_value(mx.ones(70), mx.nan, 69), "deep": [{"weight": mx.ones((64, 3))}]}
    updated = run.apply(part, run.params)
    mx.eval(updated, run.optimizer.state)
    run.params = replaced(run.params, leaves(updated))
    assert run.bits() == before and run.skipped == 1


@modes
def test_async_eval_skips_as_well(compiled: bool) -> None:
    runs = [Watched(optim.AdamW(0.1, **EVERYTHING), new_tree(1), compiled) for _ in range(2)]
    for seed in range(12):
        gradients = new_tree(seed)
        if seed % 3 == 1:
            gradients = spoilt(gradients, PATHS[seed % 4], mx.nan, -1)
        runs[0].step(gradients)
        runs[1].params = runs[1].apply(gradients, runs[1].params)
        mx.async_eval(runs[1].params, runs[1].optimizer.state)
    assert runs[0].bits() == runs[1].bits()
    assert runs[0].skipped == runs[1].skipped == 4


# ---- Against float64 ----

KINDS: list[tuple[mx.Dtype, dict[str, Any]]] = [
    *((dtype, {}) for dtype in DTYPES),
    (mx.bfloat16, {"state_dtype": mx.bfloat16}),
    (mx.float16, {"master_weight_bits": 24}),
    (mx.bfloat16, {"master_weight_bits": 32}),
    (mx.float16, {"stochastic_rounding": True}),
]
SMALL = [(), (1,), (0,), (3,), (5, 7), (65,)]


@pytest.mark.parametrize("seed", range(250))
def test_random_mixes_are_skipped_or_near_float64(seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = RULES[rng.integers(len(RULES))]
    dtype, stored = KINDS[rng.integers(len(KINDS))]
    shapes = {str(i): SMALL[rng.integers(len(SMALL))] for i in range(rng.integers(1, 4))}
    more = {"max_grad_norm": 0.3, "clip_value": 0.2, "ema": 0.5}
    options: dict[str, Any] = {name: value for name, value in more.items() if rng.random() < 0.4}
    frozen = bool(rng.random() < 0.3)
    groups = [Parameters("0", frozen=frozen, scale=0.5)] if rng.random() < 0.4 else []
    reference = PassReference(case, groups=groups, skip_nonfinite=True, **options)
    training = Training(reference, random_tree(shapes, rng, dtype), **stored)
    for _ in range(4):
        gradients = {
            path: random_array(shape, rng, DTYPES[rng.integers(3)])
            for path, shape in shapes.items()
        }
        for path, g in gradients.items():
            if g.size and rng.random() < 0.25:
                value = float(rng.choice(list(VALUES.values())))
                gradients[path] = with_value(g, value, int(rng.integers(g.size)))
        training.update(gradients)


# ---- DynamicLossScale ----


class GradScaler:
    """torch.amp.GradScaler, as its documentation has it."""

    def __init__(self, scale: float, growth: float, backoff: float, interval: int):
        self.scale, self.growth, self.backoff, self.interval = scale, growth, backoff, interval
        self.steps = 0

    def update(self, is_finite: bool) -> None:
        if not is_finite:
            self.scale, self.steps = self.scale * self.backoff, 0
            return
        self.steps += 1
        if self.steps == self.interval:
            self.scale, self.steps = self.scale * self.growth, 0


SCALERS = [(65536.0, 2.0, 0.5, 3), (1.0, 1.1, 0.5, 1), (1000.0, 1.5, 0.75, 7)]


@modes
@pytest.mark.parametrize("arguments", SCALERS, ids=str)
def test_a_loss_scale_is_that_of_torch(
    arguments: tuple[float, float, float, int], compiled: bool
) -> None:
    model, rng = GradScaler(*arguments), np.random.default_rng(3)
    optimizer = optim.SGD(0.1, grad_scale=optim.DynamicLossScale(*arguments))
    run = Watched(optimizer, {"w": mx.zeros(70)}, compiled)
    skipped = 0
    for _ in range(300):
        is_finite = bool(rng.random() > 0.15)
        scale = optimizer.loss_scale.item()
        assert scale == pytest.approx(model.scale, rel=1e-4)
        gradient = random_array((70,), rng)
        before = np.array(run.params["w"])
        run.step({"w": (gradient if is_finite else with_value(gradient, mx.inf, 3)) * scale})
        model.update(is_finite)
        skipped += not is_finite
        expected = before - 0.1 * np.array(gradient) if is_finite else before
        np.testing.assert_allclose(np.array(run.params["w"]), expected, 1e-5, 1e-5)
    assert run.skipped == skipped
    assert optimizer.state["loss_scale_steps"].item() == model.steps


def test_a_loss_scale_does_not_grow_beyond_float32() -> None:
    scale = optim.DynamicLossScale(init_scale=2.0**127, growth_interval=1)
    optimizer, params = optim.SGD(0.1, grad_scale=scale), {"w": mx.ones(3)}
    for _ in range(3):
        params = optimizer.apply_gradients({"w": mx.zeros(3)}, params)
        assert optimizer.loss_scale.item() == 2.0**127


def test_a_loss_scale_that_is_set_is_what_the_next_step_divides_by() -> None:
    optimizer = optim.SGD(1.0, grad_scale=optim.DynamicLossScale())
    run = Watched(optimizer, {"w": mx.zeros(3)}, compiled=True)
    for scale in (8.0, mx.array(4.0)):
        optimizer.loss_scale = scale
        run.step({"w": mx.full((3,), float(optimizer.loss_scale.item()))})
        assert optimizer.grad_scale.item() == 1 / optimizer.loss_scale.item()
    assert run.params["w"].tolist() == [-2, -2, -2]


@every_rule
def test_fp16_gradients_too_small_for_fp16_are_learnt(case: Case) -> None:
    """2^-30 is zero in float16, 2^16 times it is not."""
    optimizer = case.make(optim, 1.0, grad_scale=optim.DynamicLossScale())
    params = {"w": mx.ones(65)}
    exact = {"w": mx.full((65,), 2.0**-30)}
    scaled = tree_map(lambda g: (g * optimizer.loss_scale).astype(mx.float16), exact)
    got = optimizer.apply_gradients(scaled, params)
    expected = case.make(optim, 1.0).apply_gradients(exact, params)
    assert mx.array_equal(got["w"], expected["w"])
