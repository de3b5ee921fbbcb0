"""``python -m flatstep.benchmark.in_pass``: what a step's options cost on GPT-2's shapes.

Each way has a process of its own, and those of a set step in turns: what counts are the ratios of
times of the same turn. Then the peak memory of whole training steps.
"""

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from .. import _ext
from .._command_line import (
    print_environment,
    print_table,
    print_wrapped,
    require_writable,
    write_json,
)
from .cases import gpt2
from .in_pass_peaks import print_peaks
from .in_pass_ways import SETS
from .measure import noise

WARM_UP = 3
QUICK_WIDTH = 192


def work(way: str, width: int) -> None:
    """Steps once for each line that comes, and says how long it took; then its scratch memory."""
    title, name = way.split("/")
    shapes = gpt2(width)
    parameters, gradients = (
        tree_unflatten([(path, scale * mx.random.normal(s)) for path, s in shapes.items()])
        for scale in (0.02, 1e-3)
    )
    mx.eval(parameters, gradients)
    step = SETS[title][name].make(parameters, gradients)
    del parameters
    for _ in range(WARM_UP):
        step()
    # Else one would pay for garbage in the middle of a step, and another between two.
    gc.collect()
    gc.disable()
    print("ready", flush=True)
    for _ in iter(sys.stdin.readline, ""):
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    step()
    print(json.dumps({"held": held, "scratch": max(0, mx.get_peak_memory() - held)}))


def take_turns(title: str, turns: int, rest: list[str]) -> dict[str, dict[str, Any]]:
    """What was measured of each way: the seconds of each turn, and bytes."""
    command = [sys.executable, "-m", "flatstep.benchmark.in_pass", *rest, "--way"]
    workers = {
        name: subprocess.Popen(
            [*command, f"{title}/{name}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in SETS[title]
    }
    try:
        for worker in workers.values():
            _answer(worker)
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        order, names = random.Random(0), list(workers)
        for _ in range(turns):
            order.shuffle(names)
            for name in names:
                stdin = workers[name].stdin
                assert stdin
                stdin.write("\n")
                stdin.flush()
                seconds[name].append(float(_answer(workers[name])))
        return {
            name: {"seconds": seconds[name], **json.loads(worker.communicate()[0])}
            for name, worker in workers.items()
        }
    finally:
        for worker in workers.values():
            worker.kill()


def _answer(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError("a process that measures has ended; it says why above")
    return line


def print_set(title: str, measured: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, (_, beside, most) in SETS[title].items():
        seconds = measured[name]["seconds"]
        ratio = of_least = goal = ""
        if beside:
            theirs = measured[beside]["seconds"]
            figure = statistics.median(a / b for a, b in zip(seconds, theirs, strict=True))
            ratio = f"{figure:.3f}"
            of_least = f"{min(seconds) / min(theirs):.3f}"
            if most:
                goal = f"at most {most:g}: {'met' if figure <= most else 'not met'}"
        held, scratch = measured[name]["held"], measured[name]["scratch"]
        is_floor = name.startswith("floor")
        memory = "" if is_floor else f"{scratch / 1e6:.1f} MB, {scratch / held:.1%}"
        times = [f"{1e3 * t:.1f}" for t in (statistics.median(seconds), min(seconds))]
        rows.append((name, *times, ratio, of_least, beside or "", goal, memory))
    head = ("", "ms", "least", "times", "of least", "of", "goal", "scratch, of held")
    print_table(title, head, rows)
    first = next(iter(measured))
    doubt = noise(f"{first}'s times", measured[first]["seconds"], None)
    if doubt:
        print_wrapped(doubt)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flatstep.benchmark.in_pass", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--set", nargs="+", choices=[*SETS, "peaks"], help="default: all of them")
    parser.add_argument("--turns", type=int, default=21, help="how often each steps (default: 21)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all)")
    parser.add_argument("--quick", action="store_true", help="narrow tensors, a small transformer")
    parser.add_argument("--json", metavar="PATH", type=Path, help="write all times as JSON, too")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    width = QUICK_WIDTH if arguments.quick else 768
    if arguments.threads:
        _ext.set_num_threads(arguments.threads)
    mx.set_default_device(mx.cpu)
    if arguments.way:
        work(arguments.way, width)
        return
    require_writable(arguments.json, parser)
    report: dict[str, Any] = {"environment": print_environment(None)}
    print_wrapped(
        "AdamW in float32, given gradients, on the CPU. Times are medians and the least, ratios "
        "the median of those of each turn, and of the least; scratch: the peak above what is held."
    )
    rest = ["--threads", str(arguments.threads)] if arguments.threads else []
    rest += ["--quick"] if arguments.quick else []
    for title in arguments.set or [*SETS, "peaks"]:
        if title == "peaks":
            report[title] = print_peaks(arguments.quick)
        else:
            report[title] = take_turns(title, arguments.turns, rest)
            print_set(title, report[title])
        if arguments.json:
            write_json(arguments.json, report)


if __name__ == "__main__":
    main()
