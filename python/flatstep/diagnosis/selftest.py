"""Runs the table of cases and the checks of memory, and keeps what each of them said."""

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from . import memory
from .cases import all_cases, quick_cases
from .comparison import DiscrepancyError, run_case

Check = Callable[[mx.Device], None]


@dataclass(frozen=True)
class Result:
    name: str
    seconds: float
    problem: str | None  # what was expected and what came; None when all is well


def groups(quick: bool) -> dict[str, dict[str, Check]]:
    """The checks of each group by their names."""
    cases = quick_cases() if quick else all_cases()
    table: dict[str, dict[str, Check]] = {
        group: {str(case): partial(run_case, case) for case in rows}
        for group, rows in cases.items()
    }
    table["memory"] = memory.checks(quick)
    return table


def run(checks: dict[str, Check], device: mx.Device) -> Iterator[Result]:
    """Runs each check; one that raises has failed and the next one runs."""
    for name, check in checks.items():
        start = time.perf_counter()
        problem = None
        try:
            check(device)
        except DiscrepancyError as discrepancy:
            problem = str(discrepancy)
        except Exception:
            problem = traceback.format_exc().rstrip()
        yield Result(name, time.perf_counter() - start, problem)
