"""Clipping by the global norm and by value, and the scale of gradients, as they are read."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from cases import DTYPES, Case, case_id, leaves, random_array, random_tree
from flatstep import _ext
from mlx.utils import tree_map
from models import assert_trees_equal, every_rule
from pass_reference import PassReference, Training
from reference import to_float64
from shadow import Run, bits, fails

ADAMW = Case("AdamW", {"weight_decay": 0.1, "bias_correction": True})
SHAPES = {"w": (65, 70), "b": (70,), "deep": [{"weight": (64, 3)}, {"scale": ()}]}

modes = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)


def new_tree(seed: int, dtype: mx.Dtype = mx.float32, size: float = 1.0) -> Any:
    tree = random_tree(SHAPES, np.random.default_rng(seed), dtype)
    return tree_map(lambda g: g * size, tree)


def exact_norm(gradients: Any) -> float:
    return float(np.sqrt(sum(np.sum(to_float64(g) ** 2) for g in leaves(gradients).values())))


def norms(gradients: Any) -> list[float]:
    """As a step, as the function, and as the engine find it."""
    optimizer = optim.SGD(0.1, max_grad_norm=float("inf"))
    optimizer.apply_gradients(gradients, tree_map(mx.zeros_like, gradients))
    return [
        optimizer.state["grad_norm"].item(),
        optim.clip_grad_norm(gradients, 1.0)[1].item(),
        _ext.global_norm(list(leaves(gradients).values())).item(),
    ]


# ---- The norm ----

LIE: dict[str, Callable[[mx.array], mx.array]] = {
    "as they are": lambda g: g,
    "transposed": lambda g: mx.contiguous(g.T).T,
    "every other element": lambda g: mx.contiguous(mx.repeat(g, 2, axis=-1))[..., ::2],
    "reversed": lambda g: mx.contiguous(g[..., ::-1])[..., ::-1],
    "a row for all": lambda g: mx.broadcast_to(g[:1], g.shape),
    "a column for all": lambda g: mx.broadcast_to(g[..., :1], g.shape),
    "one for all": lambda g: mx.broadcast_to(g[:1, :1], g.shape),
}
SIZES = [(1,), (63,), (64,), (65,), (4097,), (1_000_000,)]
ROWS = [(1, 1), (65, 130), (1030, 70), (3, 2100), (70, 1088)]


@pytest.mark.parametrize("shape", [*SIZES, (), (0,), (0, 3), (2, 3, 517)], ids=str)
@every_dtype
def test_the_norm_is_that_of_float64(dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(shape))
    for gradient in (random_array(shape, rng, dtype), mx.full(shape, 0.1, dtype)):
        gradients = {"w": gradient}
        for norm in norms(gradients):
            assert norm == pytest.approx(exact_norm(gradients), rel=1e-6)


@pytest.mark.parametrize("lie", LIE)
@every_dtype
def test_the_norm_is_that_of_float64_however_gradients_lie(dtype: mx.Dtype, lie: str) -> None:
    rng = np.random.default_rng(7)
    gradients = {str(s): LIE[lie](random_array(s, rng, dtype)) for s in ROWS}
    for norm in norms(gradients):
        assert norm == pytest.approx(exact_norm(gradients), rel=1e-6)


def test_the_norm_is_over_all_dtypes_layouts_and_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatstep.state.BUCKET_BYTES", 1 << 14)
    rng = np.random.default_rng(11)
    rows = list(product(DTYPES, LIE, [(1, 1), (65, 30), (3, 2100)]))
    gradients = {str(i): LIE[lie](random_array(s, rng, d)) for i, (d, lie, s) in enumerate(rows)}
    for norm in norms(gradients):
        assert norm == pytest.approx(exact_norm(gradients), rel=1e-6)


LARGE = [(mx.float16, 60_000.0), (mx.bfloat16, 1e17), (mx.float32, 1e17), (mx.float32, 1e-17)]


@pytest.mark.parametrize(("dtype", "value"), LARGE, ids=str)
def test_squares_of_large_and_small_gradients_are_summed(dtype: mx.Dtype, value: float) -> None:
    gradients = {"w": mx.full((30_000,), value, dtype), "b": mx.full((3,), -value, dtype)}
    for norm in norms(gradients):
        assert norm == pytest.approx(exact_norm(gradients), rel=1e-6)
    clipped, _ = optim.clip_grad_norm(gradients, value)
    assert exact_norm(clipped) == pytest.approx(value, rel=1e-2 if dtype != mx.float32 else 1e-5)


@pytest.mark.parametrize("value", [mx.nan, mx.inf, 1e30])
def test_a_norm_that_is_not_finite_is_what_it_is(value: float) -> None:
    for place in (0, 4999):
        gradients = {"w": mx.where(mx.arange(5000) == place, value, 1.0), "b": mx.ones(3)}
        for norm in norms(gradients):
            assert not np.isfinite(norm)
            assert np.isnan(norm) == np.isnan(value)


@pytest.mark.parametrize("count", [0, 1, 70])
def test_the_norm_of_a_part_is_that_of_its_gradients(count: int) -> None:
    params = {str(i): mx.zeros(i + 1) for i in range(70)}
    optimizer = optim.SGD(0.1, max_grad_norm=1e9)
    optimizer.init(params)
    part = {str(i): mx.ones(i + 1) for i in range(70 - count, 70)}
    optimizer.apply_gradients(part, params)
    assert optimizer.state["grad_norm"].item() == pytest.approx(exact_norm(part), rel=1e-6)


@pytest.mark.usefixtures("restored_settings")
def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    rng = np.random.default_rng(13)
    gradients = {
        f"{d} {lie}": LIE[lie](random_array((301, 211), rng, d)) for d in DTYPES for lie in LIE
    }
    gradients["large"] = random_array((300_001,), rng)
    seen = set()
    for loops, threads in product(_ext.available_cpu_loops(), (1, 2, 5)):
        _ext.set_cpu_loops(loops)
        _ext.set_num_threads(threads)
        optimizer = optim.AdamW(0.1, max_grad_norm=0.5, clip_value=2.0, ema=0.9, grad_scale=0.3)
        params = optimizer.apply_gradients(gradients, tree_map(mx.zeros_like, gradients))
        state = {key: optimizer.state[key] for key in ("grad_norm", *gradients)}
        seen.add(tuple(bits([params, state]).values()))
    assert len(seen) == 1


# ---- Clipping by it ----


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=case_id)
@modes
@every_rule
def test_clipping_is_mlx_clip_grad_norm_and_an_update(
    case: Case, compiled: bool, dtype: mx.Dtype
) -> None:
    run = Run(case.make(optim, max_grad_norm=1.0), new_tree(1), compiled)
    theirs, expected = case.make(mlx.optimizers), new_tree(1)
    # Clipped and not, in turns. Lion has no larger gradients, only others.
    for seed, size in enumerate((1.0, 1e-3, 5.0, 1e-4)):
        gradients = new_tree(seed, dtype, size)
        clipped, norm = mlx.optimizers.clip_grad_norm(
            tree_map(lambda g: g.astype(mx.float32), gradients), 1.0
        )
        expected = theirs.apply_gradients(clipped, expected)
        run.step(gradients)
        assert run.optimizer.state["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
        mx.eval(expected, theirs.state)
    close = tree_map(
        lambda a, b: mx.mean(mx.abs(a - b) > 1e-5 * (1 + mx.abs(b))), run.params, expected
    )
    # Where Lion's sum cancels, rounding decides its sign.
    assert all(
        part.item() <= (1e-2 if case.rule == "Lion" else 0) for part in leaves(close).values()
    )


# The last: where the epsilon is a part of the norm.
LIMITS = [(1e-3, 1.0), (1.0, 1.0), (1e9, 1.0), (float("inf"), 1.0), (1e-7, 1e-7), (1e-6, 1e-9)]


@modes
@pytest.mark.parametrize(("limit", "size"), LIMITS)
@every_rule
def test_the_factor_is_that_of_float64(
    case: Case, limit: float, size: float, compiled: bool
) -> None:
    training = Training(PassReference(case, max_grad_norm=limit), new_tree(1), compiled)
    for seed in range(2):
        training.update(new_tree(seed, size=size))


def test_a_norm_just_at_the_limit_is_not_clipped() -> None:
    # 3 and 4 have a norm of exactly 5, to which the factor's epsilon is too small to matter.
    gradients = {"w": mx.array([3.0, 4.0])}
    plain = optim.SGD(1.0).apply_gradients(gradients, {"w": mx.zeros(2)})
    for limit, is_clipped in ((5.000002, False), (4.9, True), (6.0, False)):
        optimizer = optim.SGD(1.0, max_grad_norm=limit)
        updated = optimizer.apply_gradients(gradients, {"w": mx.zeros(2)})
        assert mx.array_equal(updated["w"], plain["w"]).item() != is_clipped
        assert optimizer.state["grad_norm"].item() == 5


@pytest.mark.parametrize("rate", [0.1, optim.cosine_decay(0.1, 5)], ids=["rate", "schedule"])
def test_nothing_is_evaluated_until_somebody_asks(rate: Any) -> None:
    options = {
        "skip_nonfinite": True,
        "accumulate_steps": 2,
        "ema": 0.9,
        "grad_scale": mx.array(2.0),
    }
    optimizer = optim.AdamW(rate, max_grad_norm=1.0, groups=[optim.no_decay], **options)
    params = new_tree(1)
    optimizer.init(params)
    # One that fails when it is evaluated.
    gradients = new_tree(2) | {"b": mx.linalg.inv(mx.zeros((70, 70)), stream=mx.cpu)[0]}
    for _ in range(3):
        params = optimizer.apply_gradients(gradients, params)
        assert _ext.known_value(optimizer.state["grad_norm"]) is None
        assert _ext.known_value(params["deep"][1]["scale"]) is None


def test_a_compiled_step_is_traced_once_and_reads_nothing() -> None:
    optimizer = optim.AdamW(optim.cosine_decay(0.1, 9), max_grad_norm=1.0, skip_nonfinite=True)
    params = new_tree(1)
    optimizer.init(params)
    traces = []

    def step(gradients: Any, params: Any) -> Any:
        traces.append(1)
        return optimizer.apply_gradients(gradients, params)

    state = [optimizer.state]
    run = mx.compile(step, inputs=state, outputs=state)
    for seed in range(4):
        params = run(new_tree(seed), params)
        assert _ext.known_value(optimizer.state["grad_norm"]) is None
        mx.async_eval(params, optimizer.state)
    assert len(traces) == 1
    assert optimizer.state["grad_norm"].item() == pytest.approx(exact_norm(new_tree(3)), rel=1e-6)


# ---- By value, and scaled ----


@every_dtype
@modes
def test_clipping_by_value_is_mlx_clip(compiled: bool, dtype: mx.Dtype) -> None:
    plain = Run(optim.AdamW(0.1), new_tree(1), compiled)
    clipped = Run(optim.AdamW(0.1, clip_value=0.25), new_tree(1), compiled)
    for seed in range(3):
        gradients = new_tree(seed, dtype)
        gradients["b"] = mx.where(mx.arange(70) % 9 == 0, mx.inf, gradients["b"]).astype(dtype)
        clipped.step(gradients)
        plain.step(tree_map(lambda g: mx.clip(g, -0.25, 0.25), gradients))
    assert_trees_equal(clipped.params, plain.params)
    assert_trees_equal(clipped.optimizer.state, plain.optimizer.state)


def test_clipping_by_value_keeps_a_nan() -> None:
    gradients = {"w": mx.array([mx.nan, 1.0, -mx.inf])}
    updated = optim.SGD(1.0, clip_value=0.5).apply_gradients(gradients, {"w": mx.zeros(3)})
    np.testing.assert_array_equal(np.array(updated["w"]), [np.nan, -0.5, 0.5])


SCALES: dict[str, Any] = {
    "a number": 0.25,
    "a whole number": 3,
    "none": 0,
    "below zero": -0.5,
    "an array": mx.array(0.3),
    "of one element": mx.array([0.5], mx.bfloat16),
    "an integer array": mx.array(2),
}


@modes
@pytest.mark.parametrize("name", SCALES)
def test_gradients_are_scaled_as_they_are_read(name: str, compiled: bool) -> None:
    scale = SCALES[name]
    reference = PassReference(ADAMW, grad_scale=scale, max_grad_norm=0.5, clip_value=0.2)
    training = Training(reference, new_tree(1), compiled)
    assert training.optimizer.grad_scale.dtype == mx.float32
    for seed in range(2):
        training.update(new_tree(seed))
    # What a user sets, also where a replay has to see it.
    for seed, changed in enumerate((0.7, mx.array(0.1), mx.array(1.0) / mx.array(3.0), 1e-20)):
        training.optimizer.grad_scale = changed
        training.update(new_tree(seed))
        assert training.optimizer.grad_scale.item() == np.float32(mx.array(changed).item())


def test_a_scale_may_be_given_where_there_was_none() -> None:
    optimizer, plain = optim.SGD(1.0), optim.SGD(1.0)
    assert optimizer.grad_scale is None and "grad_scale" not in optimizer.state
    optimizer.grad_scale = 0.5
    got = optimizer.apply_gradients(new_tree(2), new_tree(1))
    assert_trees_equal(got, plain.apply_gradients(new_tree(2, size=0.5), new_tree(1)))


def test_a_scale_is_a_gradient_multiplied_by_it() -> None:
    for dtype in DTYPES:
        gradients, params = new_tree(2, dtype), new_tree(1)
        by_hand = tree_map(lambda g: g.astype(mx.float32) * 0.3, gradients)
        got = optim.AdamW(0.1, grad_scale=0.3).apply_gradients(gradients, params)
        assert_trees_equal(got, optim.AdamW(0.1).apply_gradients(by_hand, params))


# ---- The function ----

TREES: dict[str, Any] = {
    "floats": new_tree(3),
    **{case_id(dtype): new_tree(4, dtype) for dtype in DTYPES[1:]},
    "integers": {"w": mx.array([3, 4]), "b": mx.array([[12]], mx.uint8), "c": mx.array([True])},
    "mixed": {"w": mx.array([3, 4]), "b": [mx.ones(70), (mx.full((3,), 0.5, mx.float16),)]},
    "tiny": new_tree(5, size=1e-8),
    "empty": {},
    "only containers": {"a": [], "b": {}},
    "an empty leaf": {"w": mx.zeros((0, 3)), "b": mx.ones(2)},
    "a list": [mx.ones(3), mx.ones(2)],
    "an array": mx.ones((3, 4)),
    "large halves": {"w": mx.full((500,), 60_000.0, mx.float16)},
}


# Compiled too where leaves are of all kinds: MLX compiles each function anew, which takes seconds.
CALLS = [
    *((name, limit, False) for name in TREES for limit in (0.0, 1.0, 1e9, math.inf, mx.array(0.5))),
    ("mixed", 1.0, True),
    ("tiny", 1e-7, False),  # where the epsilon is a part of the norm
]


@pytest.mark.parametrize(("name", "limit", "compiled"), CALLS, ids=str)
def test_clip_grad_norm_gives_what_mlx_does(name: str, limit: Any, compiled: bool) -> None:
    def of(module: Any) -> Any:
        def clip(tree: Any) -> Any:
            return module.clip_grad_norm(tree, limit)

        return (mx.compile(clip) if compiled else clip)(TREES[name])

    (got, norm), (expected, exact) = of(optim), of(mlx.optimizers)
    assert (norm.dtype, norm.shape) == (mx.float32, ())
    # MLX adds one square after the other, those of bfloat16 in bfloat16.
    rtol = 3e-2 if name == "bfloat16" else 1e-5
    assert norm.item() == pytest.approx(exact.item(), rel=rtol)
    a, b = ({"tree": tree} for tree in (got, expected))
    assert {k: v.dtype for k, v in leaves(a).items()} == {k: v.dtype for k, v in leaves(b).items()}
    rounding = {"float16": 1e-3, "large halves": 1e-3}.get(name, rtol)
    for path, value in leaves(b).items():
        # The least float16 is 2^-24.
        least = 2.0**-24 if value.dtype == mx.float16 else 0.0
        np.testing.assert_allclose(to_float64(leaves(a)[path]), to_float64(value), rounding, least)


def test_clip_grad_norm_refuses_a_negative_limit_as_mlx_does() -> None:
    for module in (optim, mlx.optimizers):
        fails(
            lambda m=module: m.clip_grad_norm(new_tree(1), -0.5),
            ValueError,
            "max_norm",
            "-0.5",
            ">=0",
        )
