"""``python -m flatstep bench``: how fast is a step here, beside its peers and the memory?

Each library runs in a process of its own, in turns with a floor that moves the same bytes and
computes next to nothing.
"""

import argparse
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._command_line import (
    WIDTH,
    choose_device,
    print_environment,
    print_row,
    print_wrapped,
    require_writable,
    write_json,
)
from .benchmark.cases import CASES, PLAN, Setting
from .benchmark.contenders import bytes_needed, fitting, groups, usable_bytes
from .benchmark.goals import GOALS, print_goals
from .benchmark.measure import FULL, QUICK, Budget
from .benchmark.results import Result
from .benchmark.worker import Job, WorkerError, run_worker
from .diagnosis.environment import DEVICES

INTERRUPTED = 130


def add_command(commands: Any) -> None:
    """Adds ``bench`` to an argparse parser's subcommands."""
    parser = commands.add_parser(
        "bench",
        help="measure a step on this machine, beside mlx.optimizers",
        description="Measures a step of flatstep, of mlx.optimizers, of torch where it is "
        "installed, and the time that moving the same bytes takes.",
        epilog="Cases: "
        + "; ".join(f"{name}: {text}" for name, (text, _) in CASES.items())
        + ". The exit status is 1 if something could not be measured, or a goal is not met.",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="where to run (default: MLX's default device if this build can run there, "
        "else the CPU)",
    )
    parser.add_argument(
        "--case", nargs="+", choices=CASES, metavar="CASE", help="default: all of them"
    )
    parser.add_argument("--quick", action="store_true", help="only AdamW in float32, fewer runs")
    parser.add_argument("--goals", action="store_true", help="only what has a goal, and judge it")
    parser.add_argument("--json", metavar="PATH", type=Path, help="write all runs as JSON, too")
    parser.add_argument("--plot", metavar="PATH", type=Path, help="draw a picture with matplotlib")
    parser.set_defaults(run=lambda options: run(options, parser))


def plan(cases: list[str] | None, quick: bool, goals: bool, device: str) -> list[Setting]:
    """The settings to measure."""
    with_goal = {goal.setting for goal in GOALS}
    return [
        setting
        for setting in PLAN
        if setting.runs_on(device)
        and (not cases or setting.case in cases)
        and (not quick or setting == Setting(setting.case))
        and (not goals or setting in with_goal)
    ]


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Runs the command; returns the exit status."""
    device, note = choose_device(options.device, parser, "steps run")
    require_writable(options.json, parser)
    require_writable(options.plot, parser, "--plot")
    if options.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib, which is not installed")
    settings = plan(options.case, options.quick, options.goals, device)
    if not settings:
        parser.error(f"--goals: there is none for {', '.join(options.case)}")
    print("flatstep bench")
    environment = print_environment(note)
    if importlib.util.find_spec("torch"):
        environment["torch"] = importlib.metadata.version("torch")
        print_row("torch", environment["torch"])
    _explain(device)
    results: list[Result] = []
    problems: list[str] = []
    try:
        _measure_all(settings, device, QUICK if options.quick else FULL, results, problems)
    except KeyboardInterrupt:
        print("\ninterrupted")
        return INTERRUPTED
    finally:
        if options.json:
            report = {
                "environment": environment,
                "device": device,
                "note": note,
                "results": [result.as_json() for result in results],
                "problems": problems,
            }
            write_json(options.json, report)
    met = not options.goals or print_goals(settings, results)
    if options.plot and results:
        from .benchmark.plot import draw

        draw(results, f"{environment['devices']}, {environment['machine']}", options.plot)
        print(f"\nwrote {options.plot}")
    return 1 if problems or not met else 0


def _explain(device: str) -> None:
    print(f"\nSteps on the {device.upper()}")
    floor = "flatstep's threads pass over" if device == "cpu" else "MLX's a += b moves"
    print_wrapped(
        "Medians, in brackets the middle half of the runs. Each library has a process of its own, "
        f"and before each run the floor: {floor} as many bytes as flatstep's step. 'x floor' is "
        "the median of the ratios; 'extra' the peak of memory above what is held."
    )
    if device == "gpu":
        print_wrapped("docs/apple_gpu_model.md says what an Apple GPU should take.")


def _measure_all(
    settings: list[Setting],
    device: str,
    budget: Budget,
    results: list[Result],
    problems: list[str],
) -> None:
    """Adds to the results and the problems as it goes."""
    for number, setting in enumerate(settings):
        start = f"{number + 1} of {len(settings)}: {setting.label}"
        result, wrong = _measure(setting, device, budget, start)
        if result.series:
            result.print()
            results.append(result)
        else:
            print(f"\n{setting.label}", flush=True)
        for problem in wrong:
            print_wrapped(problem)
        problems += [f"{setting.label}: {problem}" for problem in wrong]


def _measure(setting: Setting, device: str, budget: Budget, start: str) -> tuple[Result, list[str]]:
    """What was measured, and what could not be."""
    result, problems = Result(setting, {}), []
    usable = usable_bytes()
    for names in groups(setting, device):
        jobs = fitting(setting, names, usable)
        for name in names:
            if not any(name in job for job in jobs):
                needed = bytes_needed(setting, (name,))
                problems.append(
                    f"left out: {name} needs {needed / 1e9:.1f} GB of memory; half of this "
                    f"machine's, or what is free of it, is {usable / 1e9:.1f} GB"
                )
        for job in jobs:
            report = _progress(f"{start}, {job[0].split()[0]}")
            try:
                result.series |= run_worker(Job(setting, job, budget, device), report)
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
