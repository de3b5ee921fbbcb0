"""``python -m flatstep bench``: how fast is a step here, beside mlx.optimizers and the memory?

Each library runs in a process of its own, in turns with a floor that moves the same bytes and
computes next to nothing. On a Mac's GPU a prediction stands beside each time.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._command_line import (
    WIDTH,
    choose_device,
    print_environment,
    print_wrapped,
    require_writable,
    write_json,
)
from .benchmark import apple_gpu, table
from .benchmark.cases import CASES, COMMAND_CASES, Setting
from .benchmark.contenders import GROUPS, bytes_needed, fitting
from .benchmark.floor import LITTLE_MEMORY
from .benchmark.measure import FULL, QUICK, Budget
from .benchmark.memory import total_bytes, usable_bytes
from .benchmark.process import Job, WorkerError, run_worker
from .benchmark.results import Result
from .diagnosis.environment import DEVICES, device_name

MOST_RUNS = 10_000
MOST_MEMORY = 0.5  # of the machine's
INTERRUPTED = 130


def add_command(commands: Any) -> None:
    """Adds ``bench`` to an argparse parser's subcommands."""
    parser = commands.add_parser(
        "bench",
        help="measure a step on this machine, beside mlx.optimizers",
        description="Measures a step of flatstep, of mlx.optimizers, and the time that moving the "
        "same bytes takes.",
        epilog="Cases: "
        + "; ".join(f"{name}: {CASES[name][0]}" for name in COMMAND_CASES)
        + ". The exit status is 1 if something could not be measured.",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="where to run (default: MLX's default device if this build can run there, "
        "else the CPU)",
    )
    parser.add_argument(
        "--case", nargs="+", choices=COMMAND_CASES, metavar="CASE", help="default: all of them"
    )
    parser.add_argument("--quick", action="store_true", help="only AdamW in float32, fewer runs")
    parser.add_argument(
        "--runs",
        type=_runs,
        metavar="N",
        help=f"runs of each (default: as many as {FULL.seconds:.0f} seconds take)",
    )
    parser.add_argument("--json", metavar="PATH", type=Path, help="write all runs as JSON, too")
    parser.set_defaults(run=lambda options: run(options, parser))


def _runs(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= MOST_RUNS):
        raise argparse.ArgumentTypeError(f"should be from 1 to {MOST_RUNS:,}, not {text!r}")
    return int(text)


def plan(cases: list[str] | None, quick: bool) -> list[Setting]:
    """The settings to measure, each once."""
    rules, dtypes = (("adamw",), ("fp32",)) if quick else (("adamw", "sgd"), ("fp32", "bf16"))
    names = dict.fromkeys(cases or COMMAND_CASES)
    return [Setting(name, rule, dtype) for name in names for rule in rules for dtype in dtypes]


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Runs the command; returns the exit status."""
    device, note = choose_device(options.device, parser, "steps run")
    require_writable(options.json, parser)
    budget = QUICK if options.quick else FULL
    if options.runs:
        budget = Budget(None, options.runs, options.runs)
    print("flatstep bench")
    environment = print_environment(note)
    chips = apple_gpu.chips_named(device_name("gpu")) if device == "gpu" else []
    _explain(device, chips)
    report: dict[str, Any] = {
        "environment": environment,
        "device": device,
        "note": note,
        "chips": [dataclasses.asdict(chip) for chip in chips],
        "results": [],
        "problems": [],
    }
    try:
        _measure_all(plan(options.case, options.quick), device, budget, chips, report)
    except KeyboardInterrupt:
        print("\ninterrupted")
        return INTERRUPTED
    finally:
        if options.json:
            write_json(options.json, report)
    return 1 if report["problems"] or not report["results"] else 0


def _explain(device: str, chips: list[apple_gpu.Chip]) -> None:
    print(f"\nSteps on the {device.upper()}")
    floor = "flatstep's threads pass over" if device == "cpu" else "MLX's a += b moves"
    print_wrapped(
        "Medians, in brackets the middle half of the runs. Each library has a process of its own, "
        f"and before each run the floor: {floor} as many bytes as flatstep's step. 'x floor' is "
        "the median of the ratios; 'extra' the peak of memory above what is held."
    )
    if chips:
        print_wrapped(
            f"'predicted' is a model's range in ms for {chips[0].name}, which no Mac has checked "
            "yet; ! marks what is outside. docs/apple_gpu_model.md says what it assumes."
        )
    elif device == "gpu":
        print_wrapped(f"There is no prediction for {device_name('gpu')}.")


def _measure_all(
    settings: list[Setting],
    device: str,
    budget: Budget,
    chips: list[apple_gpu.Chip],
    report: dict[str, Any],
) -> None:
    for number, setting in enumerate(settings):
        start = f"{number + 1} of {len(settings)}: {setting.label}"
        result, problems = _measure(setting, device, budget, start)
        print()
        if result.series:
            predictions = {
                name: apple_gpu.predict(name, setting, chips) for name in ("floor", *result.series)
            }
            print("\n".join(table.lines(result, predictions)), flush=True)
            report["results"].append(table.as_json(result, predictions))
        else:
            print(setting.label, flush=True)
        for problem in problems:
            print_wrapped(problem)
        report["problems"] += [f"{setting.label}: {problem}" for problem in problems]


def _measure(setting: Setting, device: str, budget: Budget, start: str) -> tuple[Result, list[str]]:
    """What was measured, and what could not be."""
    result, problems = Result(setting, {}), []
    usable = min(MOST_MEMORY * total_bytes(), usable_bytes())
    for group, names in GROUPS.items():
        jobs = fitting(setting, names, usable, LITTLE_MEMORY)
        for name in names:
            if not any(name in job for job in jobs):
                needed = bytes_needed(setting, (name,), LITTLE_MEMORY)
                problems.append(
                    f"left out: {name} needs {needed / 1e9:.1f} GB of memory; half of this "
                    f"machine's, or what is free of it, is {usable / 1e9:.1f} GB"
                )
        for job in jobs:
            report = _progress(f"{start}, {group}")
            try:
                result.series |= run_worker(
                    "flatstep.benchmark.worker",
                    Job(setting, job, budget, LITTLE_MEMORY, device),
                    report,
                )
            except WorkerError as error:
                problems.append(f"failed: {', '.join(job)}: {error}")
            finally:
                report(None)
    return result, problems


def _progress(text: str) -> Callable[[float | None], None]:
    """Shows a line on a terminal how much is done, from 0 to 1; None takes it away."""
    if not sys.stderr.isatty():
        return lambda done: None

    def show(done: float | None) -> None:
        line = "" if done is None else f"{text}: {done:.0%}"
        end = "\r" if done is None else ""
        print(f"\r{line[: WIDTH - 1]:{WIDTH - 1}}", end=end, file=sys.stderr, flush=True)

    return show
