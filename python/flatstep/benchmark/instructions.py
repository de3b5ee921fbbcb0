"""Count the instructions of a step around its kernels: ``make instructions``.

Needs valgrind, so Linux, and a checkout. Times of a busy machine say little; these counts hardly
change from run to run, and `instructions.json` bounds them. They depend on the compiler, Python,
MLX and the C library, so the file has one entry for each environment, and like is compared with
like only. The kernels see 16 elements of each tensor.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import _ext
from .._command_line import print_table, print_wrapped
from .host_path import FIRST_STEPS, STEPS

ACCEPTED = Path("python/flatstep/benchmark/instructions.json")
CASES = [(tensors, mode) for tensors in (148, 2_000) for mode in ("eager", "compiled")]
# On the main thread, in this order; and the kernels' thread.
MAIN_PARTS = ("python", "graph", "free", "eval")
STREAM = "stream"

ROOM = 0.1
# A part may be a hundredth of its step: its own rise counts from this part of the step's total on.
SMALLEST_RISE = 0.02

CALLGRIND = (
    "valgrind",
    "--tool=callgrind",
    "--dump-before=getppid",  # where the process marks a phase
    "--separate-threads=yes",
    "--combine-dumps=yes",
    "--dump-line=no",
    # Threads take turns, not as the machine wakes them, which decides who frees what.
    "--fair-sched=yes",
)
# One thread, the same hashes and heap each time: what is left to chance is the kernel's scheduling.
REPEATABLE = {"FLATSTEP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}

# By case, then by part of the step: instructions for each tensor and step.
Counts = dict[str, dict[str, float]]


def count(tensors: int, mode: str) -> tuple[dict[str, float], str]:
    """Count one case, by part; also returns the loops that callgrind's processor runs."""
    command = [sys.executable, "-m", "flatstep.benchmark.host_path", str(tensors), mode]
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        done = subprocess.run(
            [*CALLGRIND, f"--callgrind-out-file={profile}", *command],
            env={**os.environ, **REPEATABLE},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
        with profile.open() as lines:
            dumps = totals(lines)
    report = json.loads(done.stdout)
    main = [number for thread, number in dumps if thread == 1]
    steps = steps_of(report["phases"], main[1:])[-STEPS:]
    # The mean. Not the median: malloc takes turns between a dear and a cheap step.
    parts = {name: sum(s[name] for s in steps) / STEPS / tensors for name in MAIN_PARTS}
    if not parts["graph"]:
        sys.exit("the step did not call flatstep._ext.step: see host_path.py")
    last = max(thread for thread, _ in dumps)
    assert last != 1
    stream = sum(number for thread, number in dumps if thread == last)
    return {**parts, STREAM: stream / (FIRST_STEPS + STEPS) / tensors}, report["vector loops"]


def totals(lines: Iterable[str]) -> list[tuple[int, int]]:
    """The parts of a profile in callgrind's format: each a thread's number, and its instructions.

    https://valgrind.org/docs/manual/cl-format.html
    """
    threads, numbers = [], []
    for line in lines:
        key, _, value = line.partition(":")
        if key == "thread":
            threads.append(int(value))
        elif key == "totals":
            numbers.append(int(value))
    return list(zip(threads, numbers, strict=True))


def steps_of(phases: list[str], numbers: list[int]) -> list[Counter[str]]:
    """What each step executed in each of its phases; marking them is not counted.

    A phase "nothing" begins a step and contains only what a mark itself costs.
    """
    steps: list[Counter[str]] = []
    marking = 0
    for phase, number in zip(phases, numbers, strict=True):
        if phase == "nothing":
            marking = number
            steps.append(Counter())
        else:
            steps[-1][phase] += number - marking
    return steps


def compare(accepted: Counts, counted: Counts) -> tuple[list[str], list[str]]:
    """What rose, whole steps and their parts, and which whole steps fell: by more than `ROOM`."""
    risen, fallen = [], []
    for case, parts in counted.items():
        before = accepted.get(case)
        if not before:
            continue
        total, now = sum(before.values()), sum(parts.values())
        if now > (1 + ROOM) * total:
            risen.append(change(case, total, now))
        elif now < (1 - ROOM) * total:
            fallen.append(change(case, total, now))
        for part, number in parts.items():
            old = before.get(part, 0.0)
            if number - old > max(ROOM * old, SMALLEST_RISE * total):
                risen.append(change(f"{case}, {part}", old, number))
    return risen, fallen


def change(what: str, before: float, now: float) -> str:
    part = f" ({now / before - 1:+.1%})" if before else ""
    return f"{what}: {before:,.0f} -> {now:,.0f} instructions for each tensor{part}"


def environment(loops: str) -> dict[str, str]:
    """What the counts depend on, other than flatstep itself. `loops` are those in callgrind."""
    optimised = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    return {
        "python": platform.python_version(),
        "python's build": f"{platform.python_compiler()}{', optimised' if optimised else ''}",
        "compiler": compiler(Path(_ext.__file__)),
        "mlx": metadata.version("mlx"),
        "C library": " ".join(platform.libc_ver()),
        "machine": platform.machine(),
        "vector loops": loops,
    }


def compiler(library: Path) -> str:
    """What an ELF file's .comment says."""
    found = set(re.findall(rb"(?:GCC: \(|clang version )[ -~]+", library.read_bytes()))
    return ", ".join(sorted(text.decode() for text in found)) or "unknown"


def accept(entries: list[dict[str, Any]], here: dict[str, str], counts: Counts) -> None:
    """Write these counts to the file; those of other environments stay."""
    rounded = {case: {k: round(n, 1) for k, n in parts.items()} for case, parts in counts.items()}
    others = [entry for entry in entries if entry["environment"] != here]
    entries = [*others, {"environment": here, "counts": rounded}]
    # A case's parts in a line.
    text = re.sub(r"\n {4,}|\n {3}(?=})", " ", json.dumps(entries, indent=1))
    ACCEPTED.write_text(text + "\n")


def verdict(entries: list[dict[str, Any]], here: dict[str, str], counts: Counts) -> bool:
    """Says how the counts compare to those accepted for this environment; whether none rose."""
    command = "`make instructions ARGS=--accept`"
    print()
    accepted = next((e["counts"] for e in entries if e["environment"] == here), None)
    if accepted is None:
        print(f"Not compared: {ACCEPTED} has no counts of this environment. {command} adds these.")
        return True
    risen, fallen = compare(accepted, counts)
    for line in risen:
        print(f"ROSE {line}")
    for line in fallen:
        print(f"fell {line}")
    if risen:
        print(
            f"More than {ROOM:.0%} above {ACCEPTED.name}. If the step has to cost this, accept it "
            f"with {command}, and commit the file with the reason."
        )
    elif fallen:
        print(f"{command} makes the lower counts the bound.")
    else:
        print(f"Within {ROOM:.0%} of what {ACCEPTED.name} accepts.")
    return not risen


def main() -> None:
    parser = argparse.ArgumentParser(prog="make instructions", description=__doc__)
    parser.add_argument(
        "--accept", action="store_true", help="make these counts the bound for this environment"
    )
    options = parser.parse_args()
    if not shutil.which("valgrind"):
        sys.exit("make instructions: valgrind is not installed (Debian: apt install valgrind)")
    if not ACCEPTED.exists():
        sys.exit(f"make instructions: there is no {ACCEPTED} in this folder, so it is no checkout")
    entries = json.loads(ACCEPTED.read_text())
    counts: Counts = {}
    loops = ""
    for tensors, mode in CASES:
        counts[f"{tensors:,} {mode}"], loops = count(tensors, mode)
    here = environment(loops)
    print_wrapped("; ".join(f"{name}: {value}" for name, value in here.items()))
    rows = []
    for case, parts in counts.items():
        main_thread = [parts[name] for name in MAIN_PARTS]
        values = (*main_thread, sum(main_thread), parts[STREAM])
        rows.append((case, *(f"{value:,.0f}" for value in values)))
    head = ("", *MAIN_PARTS, "main thread", STREAM)
    print_table("Instructions for each tensor and step", head, rows)
    if options.accept:
        accept(entries, here, counts)
        print(f"\nwrote {ACCEPTED}")
    elif not verdict(entries, here, counts):
        sys.exit(1)


if __name__ == "__main__":
    main()
