"""The Metal backend from Python to the kernels, run where flatstep is the stand-in's.

`test_standin.py` runs this file in a process of its own, with the plugin standin_plugin.py.
"""

import os
from itertools import product
from typing import Any

import flatstep as optim
import kernel_text
import mlx.core as mx
import numpy as np
import pytest
from cases import FULLEST, Case, random_array
from flatstep import _ext
from mlx.utils import tree_flatten
from reference import to_float64
from standin_plugin import StandIn
from updates import rule_of

BOUND = 19  # gradients in a dispatch, where they lie apart
IN_ONE_BUFFER = 64

COSINE = ("cosine_decay", 1e-2, 60)
TRAINED = [*FULLEST, Case("SGD", {"momentum": 0.9, "nesterov": True})]


def updates(log: list[str]) -> list[str]:
    return [line for line in log if line.startswith("flatstep update") and "Copy" not in line]


def has_tiles(line: str) -> bool:
    return ", true, " in line


def many(count: int, rng: np.random.Generator, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    return {f"p{i}": random_array((3 + i % 5, 7), rng, dtype) for i in range(count)}


def test_this_is_the_metal_backend() -> None:
    assert _ext.gpu_backend() == "metal"


@pytest.mark.parametrize("case", TRAINED, ids=str)
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(mx.float32, mx.float32), (mx.bfloat16, mx.float32), (mx.bfloat16, mx.bfloat16)],
    ids=["float32", "bfloat16", "bfloat16 throughout"],
)
def test_a_hundred_steps_agree_with_the_cpu_backend(
    case: Case, dtype: mx.Dtype, state_dtype: mx.Dtype, standin: StandIn
) -> None:
    rng = np.random.default_rng(0)
    shapes = [(40, 70), (65,), (3, 5, 7), (1,)]
    start = {str(i): random_array(shape, rng, dtype) for i, shape in enumerate(shapes)}
    optimizers, parameters = [], []
    for _ in range(2):
        schedule = optim.cosine_decay(*COSINE[1:])
        arguments = {**case.arguments, "state_dtype": state_dtype}
        optimizers.append(getattr(optim, case.rule)(schedule, **arguments))
        parameters.append({k: mx.array(v) for k, v in start.items()})
    for step in range(100):
        gradients = {k: random_array(v.shape, rng, dtype) for k, v in start.items()}
        gradients["0"] = random_array((70, 40), rng, dtype).T
        for on_gpu in (False, True):
            standin.use_gpu(on_gpu)
            new = optimizers[on_gpu].apply_gradients(gradients, parameters[on_gpu])
            mx.eval(new, optimizers[on_gpu].state)
            mx.synchronize()
            parameters[on_gpu] = new
        flat = [
            tree_flatten((parameters[i], dict(optimizers[i].state)), destination={})
            for i in (False, True)
        ]
        for name, value in flat[0].items():
            if name in ("1.step",):
                assert flat[1][name].item() == value.item() == step + 1
                continue
            assert mx.array_equal(value, flat[1][name]), f"{name} at step {step}"


@pytest.mark.parametrize("count", [1, 2, 18, 19, 20, 38, 39, 57, 58])
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
def test_a_bucket_takes_a_dispatch_for_every_nineteen_gradients(
    count: int, transposed: bool, standin: StandIn
) -> None:
    rng = np.random.default_rng(count)
    parameters = many(count, rng)
    optimizer = optim.AdamW(1e-2)
    for _ in range(3):
        gradients = {k: random_array(v.shape, rng) for k, v in parameters.items()}
        if transposed:
            gradients = {k: random_array(v.shape[::-1], rng).T for k, v in parameters.items()}
        standin.take_log()
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    log = standin.take_log()
    assert len(updates(log)) == -(-count // BOUND)
    # They write disjoint parts of the same arrays, so none has to wait for another.
    assert all("barrier=0" in line for line in updates(log)[1:])
    assert len(log) == len(updates(log)) + 1  # the step's count


@pytest.mark.parametrize("place", [0, 7, 24])
def test_one_transposed_gradient_takes_tiles_and_its_neighbours_go_with_it(
    place: int, standin: StandIn
) -> None:
    rng = np.random.default_rng(11)
    parameters = many(25, rng)
    optimizer = optim.AdamW(1e-2)
    gradients = {k: random_array(v.shape, rng) for k, v in parameters.items()}
    shape = parameters[f"p{place}"].shape
    gradients[f"p{place}"] = random_array(shape[::-1], rng).T
    for _ in range(2):
        standin.take_log()
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    tiled = [has_tiles(line) for line in updates(standin.take_log())]
    assert tiled == [place < BOUND, place >= BOUND]


def test_state_of_two_dtypes_held_state_and_a_part_of_the_leaves(standin: StandIn) -> None:
    results = []
    for on_gpu in (False, True):
        standin.use_gpu(on_gpu)
        rng = np.random.default_rng(14)
        parameters = many(30, rng)
        optimizer = optim.AdamW(1e-2, bias_correction=True)
        optimizer.init(parameters)
        held = []
        for step in range(4):
            some = {k: v for i, (k, v) in enumerate(parameters.items()) if (i + step) % 3}
            gradients = {k: random_array(v.shape, rng) for k, v in some.items()}
            updated = optimizer.apply_gradients(gradients, parameters)
            mx.eval(updated, optimizer.state)
            parameters = {**parameters, **updated}
            held.append(optimizer.state["p3"]["v"])
            mx.eval(held)
        state = dict(optimizer.state)
        flat = optimizer.flat_update(
            parameters["p0"].reshape(-1),
            mx.ones(21),
            mx.zeros(21, mx.bfloat16),
            mx.zeros(21, mx.float32),
            step=0,
        )
        mx.eval(state, flat.parameter, flat.state)
        mx.synchronize()
        everything = tree_flatten((parameters, state, held, flat.parameter, list(flat.state)))
        results.append([to_float64(a) for _, a in everything])
    for cpu, gpu in zip(*results, strict=True):
        np.testing.assert_array_equal(cpu, gpu)


def test_every_kernel_asked_for_is_among_all_instances(standin: StandIn) -> None:
    """What continuous integration compiles on a Mac is what users' Macs will compile."""
    text = kernel_text.all_instances()
    rng = np.random.default_rng(15)
    for case, dtype in product(TRAINED, (mx.float32, mx.bfloat16)):
        optimizer = case.make(optim, optim.exponential_decay(1e-2, 0.9))
        parameters = many(3, rng, dtype)
        gradients = {k: random_array(v.shape[::-1], rng, dtype).T for k, v in parameters.items()}
        mx.eval(optimizer.apply_gradients(gradients, parameters), optimizer.state)
    names = {line.split("; ")[0].removeprefix("flatstep ") for line in standin.take_log()}
    assert len(names) >= 2 * len({rule_of(case).type for case in TRAINED})
    for name in names:
        assert f'", {name})' in text, name


def test_mixed_dtypes_and_layouts_share_a_dispatch(standin: StandIn) -> None:
    rng = np.random.default_rng(1)
    parameters = many(BOUND, rng)
    dtypes = [mx.float32, mx.float16, mx.bfloat16]
    gradients = {
        k: random_array(v.shape[::-1], rng, dtypes[i % 3]).T
        if i % 2
        else random_array(v.shape, rng, dtypes[i % 3])
        for i, (k, v) in enumerate(parameters.items())
    }
    optimizer = optim.SGD(1e-2, momentum=0.9)
    for _ in range(2):
        standin.take_log()
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    assert len(updates(standin.take_log())) == 1


def test_a_flat_gradient_takes_one_dispatch(standin: StandIn) -> None:
    rng = np.random.default_rng(2)
    p, g = (random_array((3210,), rng) for _ in range(2))
    m, v = mx.zeros_like(p), mx.zeros_like(p)
    mx.eval(p, g, m, v)
    optimizer = optim.AdamW(1e-2)
    step = mx.array(0, mx.uint64)
    for _ in range(2):
        standin.take_log()
        p, (m, v), step, _ = optimizer.flat_update(p, g, m, v, step=step)
        mx.eval(p, m, v, step)
    assert len(updates(standin.take_log())) == 1


@pytest.mark.parametrize("count", [19, 64, 65, 130])
def test_gradients_in_one_buffer_take_few_dispatches_and_give_the_same_bits(
    count: int, standin: StandIn
) -> None:
    rng = np.random.default_rng(16)
    start = many(count, rng)
    # They lie in one buffer as the parameters do that another optimizer has updated.
    zeros = {k: mx.zeros_like(v) for k, v in start.items()}
    flat = optim.SGD(1.0).apply_gradients(zeros, many(count, rng))
    mx.eval(flat)
    apart = {k: v + 0 for k, v in flat.items()}
    results, dispatches = [], []
    for gradients in (flat, apart):
        mx.eval(gradients)
        optimizer = optim.AdamW(1e-2, bias_correction=True)
        parameters = dict(start)
        for _ in range(2):
            standin.take_log()
            parameters = optimizer.apply_gradients(gradients, parameters)
            mx.eval(parameters, optimizer.state)
        dispatches.append(len(updates(standin.take_log())))
        results.append(tree_flatten((parameters, dict(optimizer.state))))
    assert dispatches == [-(-count // IN_ONE_BUFFER), -(-count // BOUND)]
    for (name, a), (_, b) in zip(*results, strict=True):
        np.testing.assert_array_equal(to_float64(a), to_float64(b), err_msg=name)


def test_state_and_parameters_stay_where_they_are(standin: StandIn) -> None:
    rng = np.random.default_rng(3)
    parameters = many(50, rng)
    optimizer = optim.AdamW(1e-2)
    for step in range(5):
        gradients = {k: random_array(v.shape, rng) for k, v in parameters.items()}
        mx.eval(gradients)
        before = _ext.reuse_counters()
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
        mx.synchronize()
        after = _ext.reuse_counters()
        moved = {k: after[k] - before[k] for k in after}
        if step >= 2:
            assert moved["state_fresh"] == 0 and moved["parameters_fresh"] == 0


@pytest.mark.parametrize("most", [32, 96, 250])
def test_a_gpu_that_runs_fewer_threads_gives_the_same(most: int, standin: StandIn) -> None:
    rng = np.random.default_rng(4)
    parameters = {"a": random_array((2000,), rng), "b": random_array((33, 70), rng)}
    gradients = {"a": random_array((2000,), rng), "b": random_array((70, 33), rng).T}
    mx.eval(parameters, gradients)
    results = []
    for threads in (1024, most):
        standin.set_max_threads(threads)
        optimizer = optim.Adam(1e-2)
        updated = optimizer.apply_gradients(gradients, parameters)
        mx.eval(updated)
        results.append({k: to_float64(v) for k, v in updated.items()})
    for name in parameters:
        np.testing.assert_array_equal(results[0][name], results[1][name])


def test_a_kernel_that_does_not_compile_is_an_exception_with_the_compilers_message(
    standin: StandIn, tmp_path: Any
) -> None:
    rng = np.random.default_rng(5)
    # A mix of dtypes that no other test here has, so its kernel is yet to be compiled.
    parameters = {"w": random_array((4, 4), rng, mx.float16)}
    gradients = {"w": random_array((4, 4), rng, mx.float16)}
    mx.eval(parameters, gradients)
    held = to_float64(parameters["w"])
    optimizer = optim.SGD(1e-2, momentum=0.9, weight_decay=0.1, state_dtype=mx.bfloat16)
    optimizer.init(parameters)
    mx.eval(optimizer.state)
    command = tmp_path / "fails.sh"
    command.write_text("echo 'update.metal:12:3: error: what Apple would say' >&2\nexit 1\n")
    good = standin.compiler
    standin.set_compiler(f"sh {command}", str(tmp_path))
    try:
        updated = optimizer.apply_gradients(gradients, parameters)
        with pytest.raises(RuntimeError, match=r"(?s)metal.*update\.metal:12:3: error: what Apple"):
            mx.eval(updated)
    finally:
        standin.set_compiler(good, os.environ["FLATSTEP_STANDIN_SCRATCH"])
    np.testing.assert_array_equal(to_float64(parameters["w"]), held)
    # What failed can be evaluated once the cause is gone: nothing was lost.
    mx.eval(updated, optimizer.state)
    assert not np.array_equal(to_float64(updated["w"]), held)


def test_nothing_is_encoded_before_all_kernels_are_there(standin: StandIn, tmp_path: Any) -> None:
    """State is copied before parameters are; here the second copy's kernel does not compile."""
    rng = np.random.default_rng(7)
    # No other test here has transposed parameters of this type.
    parameters = {"w": random_array((5, 7), rng, mx.float16).T}
    gradients = {"w": random_array((7, 5), rng)}
    mx.eval(parameters, gradients)
    optimizer = optim.SGD(1e-2, momentum=0.9)
    optimizer.init(parameters)
    mx.eval(optimizer.state)
    command = tmp_path / "fails.sh"
    refuse = 'if grep -q \'("update", update, Copy, true, Float16,\' "$1"; then exit 1; fi'
    command.write_text(f'{refuse}\nexec {standin.compiler} "$@"\n')
    good = standin.compiler
    standin.take_log()
    standin.set_compiler(f"sh {command}", os.environ["FLATSTEP_STANDIN_SCRATCH"])
    try:
        updated = optimizer.apply_gradients(gradients, parameters)
        with pytest.raises(RuntimeError, match="Unable to build metal library"):
            mx.eval(updated)
    finally:
        standin.set_compiler(good, os.environ["FLATSTEP_STANDIN_SCRATCH"])
    assert all("advance" in line for line in standin.take_log())
    mx.eval(updated, optimizer.state)
    assert not np.array_equal(to_float64(updated["w"]), to_float64(parameters["w"]))


def test_a_compiled_training_step_runs_on_it(standin: StandIn) -> None:
    rng = np.random.default_rng(6)
    weights = {"w": random_array((8, 8), rng), "b": random_array((8,), rng)}
    x, y = random_array((16, 8), rng), random_array((16, 8), rng)

    def loss(w: dict[str, mx.array]) -> mx.array:
        return mx.mean((x @ w["w"].T + w["b"] - y) ** 2)

    results = []
    for compiled, on_gpu in product((False, True), (False, True)):
        standin.use_gpu(on_gpu)
        optimizer = optim.AdamW(optim.linear_schedule(1e-2, 1e-3, 10), bias_correction=True)
        parameters = {k: mx.array(v) for k, v in weights.items()}
        optimizer.init(parameters)

        def step(w: dict[str, mx.array], optimizer: Any = optimizer) -> dict[str, mx.array]:
            return optimizer.apply_gradients(mx.grad(loss)(w), w)

        if compiled:
            step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
        for _ in range(12):
            parameters = step(parameters)
            mx.eval(parameters, optimizer.state)
        mx.synchronize()
        results.append({k: to_float64(v) for k, v in parameters.items()})
    for other in results[1:]:
        for name in weights:
            np.testing.assert_allclose(other[name], results[0][name], rtol=1e-6)
