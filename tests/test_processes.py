"""Threads, instruction sets and processes: the same bits everywhere, and no way to hang."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import flatstep
import mlx.core as mx
import numpy as np
import pytest
from cases import Case
from flatstep import _ext
from models import RULES, every_rule

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# Around the lengths of vectors, blocks of scratch and ranges of threads.
SIZES = [0, 1, 3, 15, 17, 63, 64, 65, 1023, 1025, 4097, 70_001]
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 1e-40, -1e-38, 3e38, 1e20, 1e-20]


@pytest.fixture(autouse=True)
def default_loops_and_threads() -> Iterator[None]:
    loops, threads = _ext.cpu_loops(), _ext.num_threads()
    yield
    _ext.set_cpu_loops(loops)
    _ext.set_num_threads(threads)


def values(rng: np.random.Generator, size: int) -> np.ndarray:
    """Ordinary numbers, with special ones among them."""
    result = rng.normal(scale=0.02, size=size).astype(np.float32)
    if size > len(SPECIAL):
        result[rng.choice(size, len(SPECIAL), replace=False)] = SPECIAL
    return result


def bits(array: mx.array) -> np.ndarray:
    """The stored bits, with all NaNs made one: which of them is no business of an update."""
    kind = mx.uint32 if array.dtype == mx.float32 else mx.uint16
    nan = mx.isnan(array)
    return np.array(mx.where(nan, mx.array(1, kind), array.view(kind)))


def two_steps(case: Case, dtype: mx.Dtype, transposed: bool = False) -> list[np.ndarray]:
    """Every bit of parameters and state after two steps from the same random start."""
    rng = np.random.default_rng(7)
    parameters = {str(n): mx.array(values(rng, n)).astype(dtype) for n in SIZES}
    parameters["matrix"] = mx.array(values(rng, 130 * 77).reshape(130, 77)).astype(dtype)
    gradients = {k: mx.array(values(rng, p.size)).astype(dtype) for k, p in parameters.items()}
    matrix = gradients["matrix"].reshape(77, 130)
    gradients["matrix"] = matrix.T if transposed else mx.contiguous(matrix.T)
    optimizer = case.make(flatstep)
    for _ in range(2):
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    state = [optimizer.state[k][slot] for k in parameters for slot in case.slots]
    return [bits(a) for a in [*parameters.values(), *state]]


def assert_same_bits(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_rule
def test_every_instruction_set_gives_the_same_bits(case: Case, dtype: mx.Dtype) -> None:
    results = []
    for name in _ext.available_cpu_loops():
        _ext.set_cpu_loops(name)
        assert _ext.cpu_loops() == name
        results.append(two_steps(case, dtype))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_rule
def test_every_number_of_threads_gives_the_same_bits(case: Case, dtype: mx.Dtype) -> None:
    results = []
    for threads in (1, 2, 3, 7):
        _ext.set_num_threads(threads)
        assert _ext.num_threads() == threads
        results.append(two_steps(case, dtype))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_in_any_layout_gives_the_same_bits(dtype: mx.Dtype) -> None:
    assert_same_bits(two_steps(RULES[2], dtype, True), two_steps(RULES[2], dtype, False))


def layouts(rng: np.random.Generator) -> dict[str, mx.array]:
    """Arrays that lie in memory in every way that a gradient may."""
    cube = mx.array(rng.normal(size=(24, 40, 36)).astype(np.float32))
    matrix = mx.array(rng.normal(size=(300, 1040)).astype(np.float32))
    return {
        "transposed": matrix.T,
        "slice": matrix[3:291:2, 5:1000],
        "strided columns": matrix[:, ::3],
        "reversed": matrix[::-1, ::-1],
        "permuted": cube.transpose(2, 0, 1),
        "swapped": cube.swapaxes(1, 2),
        "row": mx.broadcast_to(matrix[:1], (300, 1040)),
        "column": mx.broadcast_to(matrix[:, :1], (300, 1040)),
        "one element": mx.broadcast_to(mx.array(0.3), (513, 1031)),
        "half": matrix.astype(mx.float16).T,
        "bfloat16": cube.astype(mx.bfloat16).transpose(1, 2, 0),
        "vector": matrix.reshape(-1)[::7],
        "long row": mx.broadcast_to(mx.array(rng.normal(size=(1, 140_000))), (2, 140_000)).T,
    }


def test_strided_gradients_and_parameters_are_read_as_their_copies_are() -> None:
    rng = np.random.default_rng(3)
    strided = {k: a.astype(mx.float32) if k == "long row" else a for k, a in layouts(rng).items()}
    copies = {
        name: mx.array(np.array(a.astype(mx.float32))).astype(a.dtype)
        for name, a in strided.items()
    }
    mx.eval(strided, copies)
    results = [
        flatstep.AdamW(1e-2).apply_gradients(g, p)
        for g, p in [(copies, copies), (strided, copies), (copies, strided), (strided, strided)]
    ]
    for result in results[1:]:
        for name, a in result.items():
            np.testing.assert_array_equal(bits(a), bits(results[0][name]), err_msg=name)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_environment_sets_the_number_of_threads() -> None:
    code = "from flatstep import _ext; print(_ext.num_threads())"
    assert run(code, FLATSTEP_NUM_THREADS="3").stdout.strip() == "3"


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "", "99999999999"])
def test_a_wrong_number_of_threads_is_an_error_at_import(text: str) -> None:
    result = run("import flatstep", FLATSTEP_NUM_THREADS=text)
    assert result.returncode != 0
    assert "FLATSTEP_NUM_THREADS" in result.stderr
    assert repr(text) in result.stderr


STEPS = """
import mlx.core as mx, flatstep, os, signal, sys
_ = flatstep.optimizers._ext.set_num_threads(3)
optimizer = flatstep.AdamW(1e-3, bias_correction=True)
p = {"w": mx.zeros((1000, 700)), "b": mx.zeros(5)}
g = {"w": mx.ones((1000, 700)), "b": mx.ones(5)}
def step():
    global p
    p = optimizer.apply_gradients(g, p)
def check(steps):
    assert abs(p["w"] + 1e-3 * steps).max().item() < 1e-6 * steps, p["w"]
"""


def test_a_fork_leaves_the_parent_working_and_lets_the_child_exit() -> None:
    result = run(
        STEPS
        + """
step(); mx.eval(p)
child = os.fork()
if child == 0:
    sys.exit(7)
assert os.waitpid(child, 0)[1] == 7 << 8
step(); mx.eval(p)
check(2)
print("done")
"""
    )
    assert result.stdout.strip() == "done", result.stderr


def test_the_pool_works_in_a_forked_child() -> None:
    # Through the pool alone: MLX's own stream threads do not exist in a forked child.
    result = run(
        STEPS
        + """
a = [mx.ones(1 << 20) for _ in range(4)]
mx.eval(a)
step(); mx.eval(p)
child = os.fork()
if child == 0:
    signal.alarm(20)
    flatstep.optimizers._ext.floor_pass(a[0], a[1], a[2:])
    os._exit(0 if memoryview(a[0])[12345] == 2.0 else 1)
print(os.waitpid(child, 0)[1])
"""
    )
    assert result.stdout.strip() == "0", result.stderr


def test_the_interpreter_exits_while_an_update_runs() -> None:
    for _ in range(5):
        result = run(STEPS + "\nfor _ in range(5): step()\nmx.async_eval(p, optimizer.state)")
        assert result.returncode == 0, result.stderr


def test_ctrl_c_reaches_python_and_training_goes_on() -> None:
    code = (
        STEPS
        + """
print("ready", flush=True)
steps = 0
try:
    while True:
        step(); mx.eval(p, optimizer.state); steps += 1
except KeyboardInterrupt:
    pass
mx.eval(p, optimizer.state)
steps = optimizer.step.item()
for _ in range(3):
    step(); mx.eval(p, optimizer.state)
assert optimizer.step.item() == steps + 3
assert mx.isfinite(p["w"]).all().item()
print("went on")
"""
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        threading.Event().wait(0.5)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert out.strip() == "went on"


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    return thread, result


def train_on_a_stream_of_its_own() -> np.ndarray:
    with mx.stream(mx.new_stream(mx.cpu)):
        rng = np.random.default_rng(5)
        p = {"w": mx.array(rng.normal(size=(300, 257)).astype(np.float32))}
        g = {"w": mx.array(rng.normal(size=(300, 257)).astype(np.float32))}
        optimizer = flatstep.AdamW(1e-2, bias_correction=True)
        for _ in range(30):
            p = optimizer.apply_gradients(g, p)
            mx.eval(p, optimizer.state)
        return np.array(p["w"])


def test_two_threads_update_at_once_on_streams_of_their_own() -> None:
    _ext.set_num_threads(3)
    expected = train_on_a_stream_of_its_own()
    running = [in_thread(train_on_a_stream_of_its_own) for _ in range(3)]
    for thread, result in running:
        thread.join(60)
        assert not thread.is_alive()
        np.testing.assert_array_equal(result[0], expected)
