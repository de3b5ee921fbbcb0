"""Where the time of a step goes: ``python -m bench.profile``.

Prints the medians of a step's parts, in microseconds and for each tensor. docs/performance.md says
what each part is. A part that is counted in instructions: see `instructions.py`.
"""

import argparse
import json
import multiprocessing
import sys
from dataclasses import asdict
from pathlib import Path

from flatstep.benchmark.cases import CASES, ITEMSIZE, RULES, Setting
from flatstep.benchmark.contenders import bytes_needed
from flatstep.benchmark.measure import quartiles
from flatstep.benchmark.memory import usable_bytes
from rich import box
from rich.console import Console
from rich.table import Table

from .machine import describe
from .parts import PARTS, Profile, profile
from .plans import named_cases, product_plan

MODES = ("eager", "compiled")
DEFAULT_CASES = ("lora", "tiny", "gpt2", "cost-1000")
TOLERANCE = 0.05  # of a whole step, for the sum of its parts


def microseconds(seconds: float) -> str:
    value = 1e6 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rows(result: Profile) -> list[list[str]]:
    """A row of microseconds, and the same for each tensor."""
    total = result.sum
    kernel = quartiles(result.kernel)[1] if result.kernel else None
    values = [total, *map(result.median, PARTS), kernel, quartiles(result.floor)[1]]
    return [
        ["-" if value is None else microseconds(value / divisor) for value in values]
        for divisor in (1, result.tensors)
    ]


def setting_table(setting: Setting, results: list[Profile]) -> Table:
    table = Table(
        "µs",
        *("step", *PARTS, "kernels", "floor"),
        box=box.SIMPLE_HEAD,
        title=f"{setting.label} ({results[0].threads} in use)",
        caption="\n".join(remarks(results)),
        title_justify="left",
        caption_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for result in results:
        whole, each = rows(result)
        table.add_row(result.mode, *whole)
        table.add_row("  a tensor", *each, style="dim")
    return table


def remarks(results: list[Profile]) -> list[str]:
    lines = []
    for result in results:
        style = "yellow" if abs(result.coverage - 1) > TOLERANCE else "none"
        lines.append(
            f"[{style}]{result.mode}: the parts are {result.coverage:.1%} of a whole step[/], "
            f"medians of {len(result.plain)} steps"
        )
    noisy = [result for result in results if result.is_noisy]
    if noisy:
        spread = max(result.spread for result in noisy)
        others = max(result.other_cores or 0.0 for result in noisy)
        lines.append(
            f"[yellow]too noisy to tell: whole steps spread over {spread:.0%}, "
            f"and others used {others:.1f} cores[/]"
        )
    return lines


def measure(setting: Setting, seconds: float, console: Console) -> list[Profile]:
    """Each mode in a process of its own, which leaves nothing on the other's heap."""
    results = []
    for mode in MODES:
        if bytes_needed(setting, (f"flatstep {mode}",)) > usable_bytes():
            console.print(f"{setting.label}: too little memory")
            break
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(profile, (setting, mode, seconds)))
    return results


def save(path: Path, machine: dict[str, str], results: list[Profile]) -> None:
    entries = [asdict(result) for result in results]
    path.write_text(json.dumps({"machine": machine, "profiles": entries}, indent=1))


def parse_arguments() -> argparse.Namespace:
    from .run import thread_count  # with all that draws, which a measured process need not load

    parser = argparse.ArgumentParser(
        prog="bench.profile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--case", nargs="+", choices=[*CASES, "cost"], default=DEFAULT_CASES)
    parser.add_argument("--rule", nargs="+", choices=RULES, default=["adamw"])
    parser.add_argument("--dtype", nargs="+", choices=ITEMSIZE, default=["fp32"])
    parser.add_argument("--threads", nargs="+", type=thread_count, default=[1, None])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each mode of each case")
    parser.add_argument("--output", type=Path, help="a file for all that was measured, as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 110)
    machine = describe()
    for name, value in machine.items():
        console.print(f"{name}: {value}", style="dim", highlight=False)
    cases = named_cases(arguments.case)
    results: list[Profile] = []
    for setting in product_plan(cases, arguments.rule, arguments.dtype, arguments.threads):
        measured = measure(setting, arguments.seconds, console)
        if measured:
            console.print(setting_table(setting, measured))
        results += measured
        if arguments.output:
            save(arguments.output, machine, results)
    console.print(
        "A step is the sum of python, graph, free, eval and wait, on the main thread. The kernels "
        "run on MLX's stream thread, beside eval and through all of wait.",
        style="dim",
    )


if __name__ == "__main__":
    main()
