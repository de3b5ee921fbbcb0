"""``python -m flatstep.benchmark.storages``: a step on GPT-2's shapes by how it is stored, beside
float32.

Each way has a process of its own, and they step in turns: what counts are the ratios to the float32
step of the same turn.
"""

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import mlx.core as mx

import flatstep

from .. import _ext
from .._command_line import print_table
from .cases import CASES

WARM_UP = 3
# By name: the parameters' dtype, the gradients', what the optimizer is made with, and how long a
# step should take at most, in float32's.
WAYS: dict[str, tuple[mx.Dtype, mx.Dtype, dict[str, Any], float | None]] = {
    "float32": (mx.float32, mx.float32, {}, None),
    "bfloat16": (mx.bfloat16, mx.bfloat16, {}, None),
    "24 bits": (mx.bfloat16, mx.bfloat16, {"master_weight_bits": 24}, 1.0),
    "24 bits, int8": (
        mx.bfloat16,
        mx.bfloat16,
        {"master_weight_bits": 24, "state_dtype": mx.int8},
        1.4,
    ),
    "24 bits, int8, float32 gradients": (
        mx.bfloat16,
        mx.float32,
        {"master_weight_bits": 24, "state_dtype": mx.int8},
        None,
    ),
    "32 bits, int8": (
        mx.bfloat16,
        mx.bfloat16,
        {"master_weight_bits": 32, "state_dtype": mx.int8},
        None,
    ),
    "stochastic": (mx.bfloat16, mx.bfloat16, {"stochastic_rounding": True}, None),
}


def work(way: str) -> None:
    """Steps once for each line that comes, and says how long it took."""
    dtype, gradient_dtype, options, _ = WAYS[way]
    shapes = CASES["gpt2"][1]
    optimizer = flatstep.AdamW(1e-4, bias_correction=True, **options)
    parameters: Any = {k: (0.02 * mx.random.normal(s)).astype(dtype) for k, s in shapes.items()}
    gradients = {k: (1e-3 * mx.random.normal(s)).astype(gradient_dtype) for k, s in shapes.items()}
    mx.eval(parameters, gradients)
    for number, _ in enumerate(iter(sys.stdin.readline, "")):
        start = time.perf_counter()
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
        if number >= WARM_UP:
            print(time.perf_counter() - start, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flatstep.benchmark.storages")
    parser.add_argument("--turns", type=int, default=21, help="how often each steps (default: 21)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        _ext.set_num_threads(arguments.threads)
    mx.set_default_device(mx.cpu)
    if arguments.way:
        work(arguments.way)
        return
    command = [sys.executable, "-m", "flatstep.benchmark.storages", "--way"]
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    workers = {
        way: subprocess.Popen(
            [*command, way, *threads], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for way in WAYS
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(-WARM_UP, arguments.turns):
        for way, worker in workers.items():
            assert worker.stdin and worker.stdout
            worker.stdin.write("\n")
            worker.stdin.flush()
            if turn >= 0:
                seconds[way].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    rows = []
    for way, (_, _, _, most) in WAYS.items():
        pairs = zip(seconds[way], seconds["float32"], strict=True)
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        goal = "" if most is None else f"at most {most:g}: {'met' if ratio <= most else 'not met'}"
        rows.append((way, f"{1e3 * statistics.median(seconds[way]):.1f}", f"{ratio:.3f}", goal))
    print_table("AdamW, GPT-2 124M", ("", "ms", "of float32", "goal"), rows)


if __name__ == "__main__":
    main()
