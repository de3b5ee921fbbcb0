"""Kernels to try the simulator on: kernels/samples.metal with its arguments and what it should
give, and kernels of one line."""

import functools
from pathlib import Path

import numpy as np
import simulator
from simulator import bfloat16_bits

SAMPLES = Path(__file__).parent / "kernels" / "samples.metal"
SEGMENT = np.dtype([("begin", "u8"), ("length", "u8"), ("learning_rate", "f4"), ("padding", "u4")])
SETTINGS = np.dtype([("beta1", "f4"), ("beta2", "f4"), ("eps", "f4"), ("num_segments", "u4")])


@functools.cache
def samples() -> simulator.Library:
    simulator.check(SAMPLES)
    return simulator.build(SAMPLES)


def build(body: str, parameters: str = "device float* x [[buffer(0)]]") -> simulator.Library:
    """One kernel `k` of these parameters and this body, where `i` is the thread's position."""
    position = "uint i [[thread_position_in_grid]]"
    text = "#include <metal_stdlib>\nusing namespace metal;\n"
    text += f"[[kernel]] void k({parameters}, {position}) {{\n{body}\n}}\n"
    simulator.check(text)
    return simulator.build(text)


def compute(expression: str, num_threads: int = 32) -> np.ndarray:
    """What each of the threads, of one threadgroup, gets."""
    x = np.zeros(num_threads, np.float32)
    build(f"x[i] = {expression};").run(
        "k", threadgroups=(1,), threads=(num_threads,), buffers={0: x}
    )
    return x


def adam_arguments(dtype, n=1000):
    """A flat buffer with two segments, which lie apart and cover half of it."""
    rng = np.random.default_rng(0)
    p, g = rng.normal(size=(2, n)).astype(np.float32)
    if dtype == "bfloat":
        p, g = bfloat16_bits(p), bfloat16_bits(g)
    elif dtype == "half":
        p, g = p.astype(np.float16), g.astype(np.float16)
    m, v = np.zeros((2, n), np.float32)
    segments = np.array([(64, 136, 1e-2, 0), (500, 364, 1e-3, 0)], SEGMENT)
    settings = np.array([(0.9, 0.99, 1e-8, 2)], SETTINGS)
    return {0: p, 1: m, 2: v, 3: g, 4: segments, 5: settings}


def adam_reference(p, g, segments):
    p = p.astype(np.float64)
    for begin, length, learning_rate, _ in segments:
        part = slice(begin, begin + length)
        gradient = g[part].astype(np.float64)
        change = 0.1 * gradient / (np.sqrt(0.01 * gradient**2) + 1e-8)
        p[part] -= learning_rate * change
    return p
