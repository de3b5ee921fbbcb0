"""Measure flatstep and its peers against the floor: ``python -m bench.run``.

Prints a table for each setting, and writes every run as JSON, and pictures.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flatstep.benchmark.cases import CASES, ITEMSIZE, RULES, Setting
from flatstep.benchmark.contenders import fitting
from flatstep.benchmark.floor import MAX_BYTES
from flatstep.benchmark.measure import FULL, QUICK, Budget, Series
from flatstep.benchmark.memory import usable_bytes
from flatstep.benchmark.process import Job, WorkerError, run_worker
from flatstep.benchmark.results import Result
from rich.console import Console
from rich.progress import Progress

from .contenders import GROUPS, groups_for
from .goals import GOALS, goal_table, judge
from .machine import describe
from .plans import (
    cost_cases,
    default_plan,
    goals_plan,
    named_cases,
    product_plan,
    quick_plan,
)
from .plots import draw
from .report import cost_table, setting_table
from .results import cost_families, load, save

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAUSE = 0.5  # between processes


def measure_setting(
    setting: Setting, budget: Budget, console: Console, report: Callable[[float], None]
) -> Result | None:
    """Measure every group that is installed; `report` is told how much is done, from 0 to 1."""
    series: dict[str, Series] = {}
    groups = groups_for(setting)
    for i, group in enumerate(groups):
        jobs = fitting(setting, GROUPS[group], usable_bytes())
        if left_out := set(GROUPS[group]).difference(*jobs):
            console.print(f"{setting.label}: too little memory for {', '.join(sorted(left_out))}")
        for j, names in enumerate(jobs):
            part = 1 / len(jobs)
            inner = partial(report_part, report, (i + j * part) / len(groups), part / len(groups))
            try:
                job = Job(setting, names, budget, MAX_BYTES)
                series |= run_worker("bench.worker", job, inner, ROOT)
            except WorkerError as error:
                console.print(f"[red]{setting.label}: {', '.join(names)}: {error}[/]")
            time.sleep(PAUSE)
    return Result(setting, series) if series else None


def report_part(report: Callable[[float], None], start: float, part: float, done: float) -> None:
    report(start + part * done)


def measure_plan(
    plan: list[Setting],
    budget: Budget,
    console: Console,
    keep: Callable[[list[Result]], None],
) -> list[Result]:
    """Measure one setting after the other; `keep` is given all that there is after each."""
    results = []
    with Progress(console=console, refresh_per_second=2) as progress:
        task = progress.add_task("", total=len(plan))

        def report(done: float) -> None:
            progress.update(task, completed=number + done)

        for number, setting in enumerate(plan):
            progress.update(task, description=setting.label, completed=number)
            result = measure_setting(setting, budget, console, report)
            if result:
                results.append(result)
                keep(results)
                if not setting.is_cost:
                    console.print(setting_table(result))
        progress.update(task, description="done", completed=len(plan))
    return results


def print_goals(results: list[Result], console: Console) -> bool:
    """Print whether each goal is met; return whether all are."""
    by_setting = {result.setting: result for result in results}
    verdicts = {title: [judge(goal, by_setting) for goal in GOALS[title]] for title in GOALS}
    for title, judged in verdicts.items():
        console.print(goal_table(title, judged))
    return all(verdict.is_met for judged in verdicts.values() for verdict in judged)


def thread_count(text: str) -> int | None:
    if text == "all":
        return None
    if not (text.isdecimal() and 1 <= int(text) <= 1024):
        raise argparse.ArgumentTypeError(
            f"should be 'all' or a number from 1 to 1024, not {text!r}"
        )
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.run", description=(__doc__ or "").split("\n")[0])
    cases = [name for name in CASES if name not in cost_cases()]
    parser.add_argument(
        "--case", nargs="+", choices=[*cases, "cost"], help="default: a choice of all"
    )
    parser.add_argument("--rule", nargs="+", choices=RULES, help="with --case; default: adamw")
    parser.add_argument("--dtype", nargs="+", choices=ITEMSIZE, help="with --case; default: fp32")
    parser.add_argument("--threads", nargs="+", type=thread_count, help="with --case; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer settings and runs: for a look")
    parser.add_argument("--goals", action="store_true", help="only what the goals need, and judge")
    parser.add_argument("--strict", action="store_true", help="fail when a goal is not met")
    parser.add_argument("--load", type=Path, help="show results that were saved; measure nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder to write to")
    arguments = parser.parse_args()
    if arguments.case is None and (arguments.rule or arguments.dtype or arguments.threads):
        parser.error("--rule, --dtype and --threads need --case")
    return arguments


def choose_plan(arguments: argparse.Namespace) -> list[Setting]:
    if arguments.case:
        rules, dtypes = arguments.rule or ["adamw"], arguments.dtype or ["fp32"]
        cases = named_cases(arguments.case)
        return product_plan(cases, rules, dtypes, arguments.threads or [None])
    if arguments.goals:
        return goals_plan()
    return quick_plan() if arguments.quick else default_plan()


def main() -> None:
    arguments = parse_arguments()
    # Wide enough for the tables where the output is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 110)
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.load:
        machine, results = load(arguments.load)
        for result in results:
            if not result.setting.is_cost:
                console.print(setting_table(result))
    else:
        machine = describe()
        for name, value in machine.items():
            console.print(f"{name}: {value}", style="dim", highlight=False)
        plan = choose_plan(arguments)
        budget = QUICK if arguments.quick else FULL
        keep = partial(save, folder / "results.json", machine)
        results = measure_plan(plan, budget, console, keep)
        if not results:
            sys.exit("nothing was measured")
    for family in cost_families(results):
        console.print(cost_table(family))
    for path in draw(results, machine, folder):
        console.print(f"wrote {path}")
    complete = (
        arguments.goals or arguments.strict or {r.setting for r in results} >= set(goals_plan())
    )
    if complete and not print_goals(results, console) and arguments.strict:
        sys.exit(1)


if __name__ == "__main__":
    main()
