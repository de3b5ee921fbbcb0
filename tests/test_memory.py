"""An update needs no memory of its own, and a training step no more than with mlx.optimizers."""

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import flatstep as optim
import mlx.core as mx
import pytest
from cases import Case
from flatstep import _ext
from flatstep.trees import FLAT_KEY
from mlx.utils import tree_map
from models import every_rule
from peaks import measured, nbytes
from shadow import Run

eager_and_compiled = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])

# 61 tensors, 8 million parameters.
MIDDLE = [(500, 512), (512,), (64, 1001)] * 20 + [(1500, 1024)]
GPT2 = [
    (50257, 768),
    (1024, 768),
    *[
        shape
        for _ in range(12)
        for shape in [
            *[(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)],
            *[(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)],
        ]
    ],
    *[(768,), (768,)],
]


def tree_of(shapes: list[tuple[int, ...]], value: float, dtype: mx.Dtype = mx.float32) -> Any:
    """Arrays that own their memory, which mx.full's don't."""
    tree = {"layers": [{"w": mx.full(shape, value, dtype) + 0} for shape in shapes]}
    mx.eval(tree)
    return tree


def steady(run: Run, gradients: Any) -> Run:
    """After the first steps all memory is where it stays."""
    for _ in range(3):
        run.step(gradients)
    return run


def assert_an_update_reuses_every_buffer(run: Run, gradients: Any) -> None:
    steady(run, gradients)
    state = nbytes({"flat": [run.optimizer.state[key] for key in run.params]})
    gc.collect()
    counted = _ext.reuse_counters()
    memory = measured(lambda: run.step(gradients))
    reused = {key: count - counted[key] for key, count in _ext.reuse_counters().items()}
    buckets = len({segment.bucket for segment in run.optimizer.layout})
    print(
        f"\n{buckets} buckets, {memory.peak - memory.before} bytes above the {state} of the state"
    )
    assert reused == {
        "parameters_in_place": buckets,
        "parameters_fresh": 0,
        "state_in_place": buckets * len(run.optimizer.slots),
        "state_fresh": 0,
    }
    assert memory.peak - memory.before < 0.01 * state
    assert memory.after <= memory.before


@eager_and_compiled
@every_rule
def test_an_update_with_given_gradients_reuses_every_buffer(
    case: Case, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatstep.state.BUCKET_BYTES", 2 << 20)
    run = Run(case.make(optim), tree_of(MIDDLE, 1.0), compiled)
    assert_an_update_reuses_every_buffer(run, tree_of(MIDDLE, 0.5))


@eager_and_compiled
def test_mixed_dtypes_reuse_every_buffer(compiled: bool) -> None:
    params, gradients = tree_of(MIDDLE[:30], 1.0), tree_of(MIDDLE[:30], 0.5, mx.float16)
    for i, dtype in enumerate([mx.bfloat16, mx.float16, mx.float32] * 10):
        params["layers"][i] = tree_map(lambda p, dtype=dtype: p.astype(dtype), params["layers"][i])
    mx.eval(params)
    run = Run(optim.AdamW(0.1, state_dtype=mx.bfloat16), params, compiled)
    del params
    assert_an_update_reuses_every_buffer(run, gradients)


@eager_and_compiled
def test_gpt2_reuses_every_buffer(compiled: bool) -> None:
    assert len(GPT2) == 148
    run = Run(optim.AdamW(1e-3), tree_of(GPT2, 1.0), compiled)
    assert sum(segment.size for segment in run.optimizer.layout) == 124_439_808
    assert_an_update_reuses_every_buffer(run, tree_of(GPT2, 0.5))


@every_rule
def test_memory_does_not_grow_over_200_steps(case: Case) -> None:
    shapes = [(100, 64), (3,), (), (65,)]
    gradients = tree_of(shapes, 0.5)
    for compiled in (False, True):
        run = steady(Run(case.make(optim), tree_of(shapes, 1.0), compiled), gradients)
        gc.collect()
        before, blocks = mx.get_active_memory(), sys.getallocatedblocks()
        for _ in range(200):
            run.step(gradients)
        gc.collect()
        assert mx.get_active_memory() <= before
        # Some slack for what the interpreter itself caches.
        assert sys.getallocatedblocks() < blocks + 200


def test_an_update_on_the_cpu_leaves_no_noise_between_leaves() -> None:
    """A user who strides over the end of a leaf finds zeros, not what the memory held before."""
    with mx.stream(mx.cpu):
        params = {"small": mx.ones((3,)), "other": mx.ones((70,))}
        optimizer = optim.AdamW(0.1)
        for _ in range(3):
            # MLX keeps memory for what is allocated next.
            noise = [mx.full((64 * n,), float("nan")) + 0 for n in range(1, 9) for _ in range(4)]
            mx.eval(noise)
            del noise
            # The old arrays are held, so the new ones take fresh memory.
            held = params, optimizer.state.copy()
            params = optimizer.apply_gradients(tree_map(mx.ones_like, params), params)
            mx.eval(params, optimizer.state)
            flat = dict.__getitem__(optimizer.state, FLAT_KEY)
            # The larger leaf is a view of its bucket, which starts with the smaller one.
            ends = [mx.as_strided(params["other"], (128,), (1,))[70:]]
            for slot in optimizer.slots:
                ends += [flat[slot][0].reshape(-1)[3:64], flat[slot][0].reshape(-1)[64 + 70 :]]
            assert not any(mx.any(end).item() for end in ends)
            del held


def test_sgd_without_momentum_keeps_no_state() -> None:
    params, gradients = tree_of(MIDDLE, 1.0), tree_of(MIDDLE, 0.5)
    before = mx.get_active_memory()
    run = Run(optim.SGD(0.1), params)
    mx.eval(run.optimizer.state)
    assert mx.get_active_memory() - before < 10_000
    del params
    steady(run, gradients)
    # The parameters have moved to flat memory, whose segments start at multiples of 64 elements.
    assert mx.get_active_memory() - before < 0.01 * nbytes(run.params)


@pytest.fixture(scope="module")
def training_step() -> dict[str, dict[str, int]]:
    """What a whole training step of a transformer needs, by library and mode."""
    program = Path(__file__).with_name("peaks.py")
    results = {}
    for library in ("flatstep", "mlx"):
        for mode in ("eager", "compiled"):
            command = [sys.executable, str(program), library, mode]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[f"{library} {mode}"] = json.loads(output)
    for name, numbers in results.items():
        print(f"\n{name}: { ({key: f'{n / 1e6:.1f} MB' for key, n in numbers.items()}) }")
    return results


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_training_step_needs_no_more_than_with_eager_mlx(
    training_step: dict[str, dict[str, int]], mode: str
) -> None:
    assert training_step[f"flatstep {mode}"]["peak"] <= training_step["mlx eager"]["peak"]


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_training_step_needs_far_less_than_with_compiled_mlx(
    training_step: dict[str, dict[str, int]], mode: str
) -> None:
    def above_what_is_held(name: str) -> int:
        return training_step[name]["peak"] - training_step[name]["held"]

    assert above_what_is_held(f"flatstep {mode}") < 0.75 * above_what_is_held("mlx compiled")
