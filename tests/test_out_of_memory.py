"""What a step does where the system has no memory left. Each in a process of its own."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sets a limit that Linux keeps")

PRELUDE = """
import resource
import flatstep as optim, mlx.core as mx
from flatstep import _ext

def transposed(value):
    gradient = mx.contiguous(mx.full((900, 1300), value) * mx.arange(1300)).T
    mx.eval(gradient)
    return gradient

def use_up_memory():
    '''Leaves pieces of 40,000 bytes: enough for a graph, too small for a thread's panel.'''
    resource.setrlimit(resource.RLIMIT_AS, (
        int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize(), -1
    ))
    held = []
    for size in (1 << 20, 1 << 17, 40_000):
        try:
            while True:
                held.append(bytearray(size))
        except MemoryError:
            pass
    del held[-60::2]
    return held

def train(step_without_memory, threads):
    _ext.set_num_threads(threads)
    params = {"w": mx.zeros((1300, 900))}
    optimizer = optim.AdamW(1e-2)
    gradients = [{"w": mx.ones((1300, 900))}, {"w": transposed(0.5)}]
    mx.eval(params, gradients)
    for number, gradient in enumerate(gradients):
        if number == 1:
            _ext.set_num_threads(threads)  # lets the threads go: they are made anew in the step
        held = use_up_memory() if number == step_without_memory else None
        params = optimizer.apply_gradients(gradient, params)
        mx.eval(params, optimizer.state)
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    return params["w"]
"""


def run(program: str) -> str:
    # Other arenas than the first reserve memory ahead, which is then there.
    process = subprocess.run(
        [sys.executable, "-c", PRELUDE + program],
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("threads", [1, 3, 1000])
def test_a_step_without_memory_for_threads_and_their_panels(threads: int) -> None:
    shown = run(f"""
without = train(1, {threads})
print(mx.array_equal(without, train(None, {threads})).item())
""")
    assert shown == "True\n"
