"""Runs the table of cases and the other checks, and keeps what each of them said."""

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from . import in_pass, memory
from .cases import all_rows, quick_rows
from .comparison import DiscrepancyError, run_row

Check = Callable[[mx.Device], None]


@dataclass(frozen=True)
class Result:
    name: str
    seconds: float
    problem: str | None  # what was expected and what came; None when all is well


def groups(quick: bool) -> dict[str, dict[str, Check]]:
    """The checks of each group by their names."""
    rows = quick_rows() if quick else all_rows()
    checks: dict[str, dict[str, Check]] = {
        group: {str(row): partial(run_row, row) for row in rows[group]} for group in rows
    }
    return {**checks, "in the pass": in_pass.checks(quick), "memory": memory.checks(quick)}


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
