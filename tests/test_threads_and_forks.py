"""What a process may do while it trains: threads, forks, exits, interrupts."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import flatstep as optim
import mlx.core as mx
import numpy as np
import pytest
from cases import Case, random_array, random_tree
from flatstep import _ext
from models import every_rule
from shadow import Run, Shadow, assert_same_bits, bits, copied

SHAPES = {"large": (300_000,), "small": (65,), "scalar": ()}
PRELUDE = """
import os, signal, sys, threading, time
import flatstep as optim, mlx.core as mx
from flatstep import _ext
# A job that a shell has put in the background inherits an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
_ext.set_num_threads(4)
params = {"a": mx.ones((300_000,)), "b": [mx.ones((70,)), mx.ones(())]}
gradients = {"a": mx.full((300_000,), 0.5), "b": [mx.full((70,), 0.5), mx.array(0.5)]}
mx.eval(params, gradients)
optimizer = optim.AdamW(1e-2)

def step(params):
    params = optimizer.apply_gradients(gradients, params)
    mx.eval(params, optimizer.state)
    return params

def uniform(array):
    assert mx.all(array == array.reshape(-1)[0]).item()
    return array.reshape(-1)[0].item()

def values(params):
    (value,) = {uniform(params["a"]), *map(uniform, params["b"])}
    return value
"""


def start(program: str, **options: Any) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PRELUDE + program],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        **options,
    )


def output_of(process: "subprocess.Popen[str]") -> str:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert not err
    return out


# ---- Threads ----


def problem(seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    params, gradients = random_tree(SHAPES, rng), random_tree(SHAPES, rng)
    mx.eval(params, gradients)
    return params, gradients


def in_threads(*works: Callable[[], None]) -> None:
    """Runs them at once, each in a thread and on a stream of its own; raises what they raise."""

    def run(work: Callable[[], None]) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            work()

    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(run, work) for work in works]:
            done.result()


@every_rule
def test_two_threads_update_at_once_on_their_own_streams(case: Case) -> None:
    expected: dict[int, Any] = {}
    got: dict[int, Any] = {}

    def train(seed: int, results: dict[int, Any]) -> None:
        params, gradients = problem(seed)
        run = Run(case.make(optim, optim.cosine_decay(0.1, 50)), params)
        del params
        for i in range(40):
            run.step(gradients, evaluate=i % 3 == 0)
        mx.eval(run.params, run.optimizer.state)
        results[seed] = [bits(run.params), bits(run.optimizer.state)]

    for seed in range(3):
        train(seed, expected)
    in_threads(*[lambda seed=seed: train(seed, got) for seed in range(3)])
    assert got == expected


@every_rule
def test_an_optimizer_moves_between_threads(case: Case) -> None:
    params, gradients = problem(1)
    shadow = Shadow(lambda: case.make(optim), params)
    run = Run(case.make(optim), params)
    mx.eval(run.optimizer.state)
    del params
    for i in range(4):
        if i % 2:
            run.step(gradients)
        else:
            in_threads(lambda: run.step(gradients))
        shadow.step(gradients)
        assert_same_bits(run, shadow)


@every_rule
def test_a_thread_other_than_the_main_one_trains_by_itself(case: Case) -> None:
    run: list[Run] = []

    def train() -> None:
        params, gradients = problem(2)
        run.append(Run(case.make(optim), params, compiled=True))
        for _ in range(3):
            run[0].step(gradients)

    in_threads(train)
    params, gradients = problem(2)
    shadow = Shadow(lambda: case.make(optim), params)
    for _ in range(3):
        shadow.step(gradients)
    assert_same_bits(run[0], shadow)


def test_the_number_of_threads_may_change_while_updates_run() -> None:
    params, gradients = problem(3)
    run, undisturbed = (Run(optim.AdamW(0.1), params) for _ in range(2))
    threads = _ext.num_threads()
    try:
        for i in range(60):
            run.step(gradients, evaluate=False)
            mx.async_eval(run.params, run.optimizer.state)
            _ext.set_num_threads(1 + i % 5)
    finally:
        _ext.set_num_threads(threads)
    for _ in range(60):
        undisturbed.step(gradients)
    assert bits(run.params) == bits(undisturbed.params)


# ---- Forks ----

FORK = """
def in_child(work):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print("child:", repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    for _ in range(2000):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, status
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")
"""


def test_the_parent_keeps_working_after_a_fork() -> None:
    program = """
params = step(params)
for _ in range(3):
    in_child(lambda: None)
    params = step(params)
other = optim.AdamW(1e-2)
expected = {"w": mx.ones((3,))}
for _ in range(4):
    expected = other.apply_gradients({"w": mx.full((3,), 0.5)}, expected)
assert values(params) == expected["w"][0].item()
"""
    output_of(start(FORK + program))


# MLX can't evaluate in a child on a stream that has a thread in the parent; on a new one it can.
CHILD_UPDATES = """
def trained():
    optimizer, gradient = optim.AdamW(1e-2), {"a": mx.full((300_000,), 0.5)}
    params = {"a": mx.ones((300_000,))}
    for _ in range(3):
        params = optimizer.apply_gradients(gradient, params)
        mx.eval(params, optimizer.state)
    return uniform(params["a"])

expected = trained()

def child():
    with mx.stream(mx.new_stream(mx.cpu)):
        assert trained() == expected
"""


def test_a_forked_child_updates_on_a_new_stream() -> None:
    output_of(start(FORK + CHILD_UPDATES + "in_child(child)\nassert trained() == expected"))


def test_a_fork_while_threads_are_busy_leaves_both_processes_working() -> None:
    program = """
for i in range(20):
    params = optimizer.apply_gradients(gradients, params)
    mx.async_eval(params, optimizer.state)
    if i % 2:
        in_child(child)
values(params)
"""
    output_of(start(FORK + CHILD_UPDATES + program))


def test_the_threads_alone_survive_a_fork_too() -> None:
    program = """
p, g, m = (mx.ones((500_000,)) + 0 for _ in range(3))
mx.eval(p, g, m)
_ext.floor_pass(p, g, [m])
def child():
    for _ in range(3):
        _ext.floor_pass(p, g, [m])
    assert uniform(p) == uniform(m) == 5
# uniform evaluates, which MLX can't do on this stream in a child.
def uniform(array):
    (value,) = set(memoryview(array))
    return value
in_child(child)
_ext.floor_pass(p, g, [m])
assert uniform(p) == uniform(m) == 3
"""
    output_of(start(FORK + program))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_works_beside_training(method: str, tmp_path: Path) -> None:
    """What a data loader does."""
    program = f"""
import multiprocessing
if __name__ == "__main__":
    params = step(params)
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        for i in range(5):
            params = step(params)
            assert pool.map(abs, [-i, i]) == [i, i]
    values(params)
"""
    script = tmp_path / "train.py"
    script.write_text(PRELUDE + program)
    process = subprocess.run(
        [sys.executable, "-W", "ignore", script], capture_output=True, text=True, timeout=60
    )
    assert (process.returncode, process.stderr) == (0, "")


# ---- Exits ----

EXITS = {
    "after an asynchronous update": "mx.async_eval(step_lazily(params), optimizer.state)",
    "after sys.exit": "mx.async_eval(step_lazily(params), optimizer.state); sys.exit(0)",
    "with lazy updates": "kept = step_lazily(params)",
    "from a thread": """
def work():
    with mx.stream(mx.new_stream(mx.cpu)):
        mx.async_eval(step_lazily({"a": mx.ones((300_000,))}, {"a": mx.ones((300_000,))}))
thread = threading.Thread(target=work); thread.start(); thread.join()
""",
}


@pytest.mark.parametrize("name", EXITS)
def test_the_interpreter_exits_cleanly(name: str) -> None:
    program = """
def step_lazily(params, gradients=gradients):
    for _ in range(5):
        params = optimizer.apply_gradients(gradients, params)
    return params
"""
    for _ in range(5):
        output_of(start(program + EXITS[name]))


# ---- Interrupts ----


def test_training_goes_on_after_ctrl_c() -> None:
    program = """
for _ in range(10):
    try:
        print("ready", flush=True)
        while True:
            params = step(params)
    except KeyboardInterrupt:
        pass
    # Whatever was interrupted, all elements have seen the same steps.
    values(params)
    (m,) = {uniform(leaf["m"]) for leaf in [optimizer.state["a"], *optimizer.state["b"]]}
    (v,) = {uniform(leaf["v"]) for leaf in [optimizer.state["a"], *optimizer.state["b"]]}
    count = optimizer.step.item()
    params = step(params)
    values(params)
    assert optimizer.step.item() == count + 1
print("done")
"""
    process = start(program)
    assert process.stdout is not None
    for _ in range(10):
        assert process.stdout.readline() == "ready\n"
        threading.Event().wait(0.05)
        process.send_signal(signal.SIGINT)
    assert output_of(process) == "done\n"


def interrupted_at_line(number: int, work: Callable[[], None]) -> bool:
    """Runs `work` with a KeyboardInterrupt at the n-th line of flatstep's Python.

    Returns False when there are fewer lines.
    """
    package = os.path.dirname(optim.__file__)
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            seen += 1
            if seen == number:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def lines() -> Iterator[int]:
    return iter(range(1, 2000))


@every_rule
def test_an_interrupted_update_has_either_happened_or_not(case: Case) -> None:
    rng = np.random.default_rng(5)
    params = {"a": random_array((5,), rng), "b": [random_array((), rng)]}
    gradients = {"a": random_array((5,), rng), "b": [random_array((), rng)]}

    def trained() -> Run:
        run = Run(case.make(optim), copied(params))
        run.step(gradients)
        return run

    before, after = trained(), trained()
    after.step(gradients)
    allowed = [bits(run.optimizer.state) for run in (before, after)]
    for number in lines():
        run = trained()
        if not interrupted_at_line(number, lambda run=run: run.step(gradients)):
            break
        assert bits(run.optimizer.state) in allowed, number
        run.step(gradients)
    else:
        raise AssertionError("the update never ends")


@pytest.mark.parametrize("threads", [0, 1025])
def test_a_number_of_threads_out_of_range_is_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 1024, {threads}"):
        _ext.set_num_threads(threads)
