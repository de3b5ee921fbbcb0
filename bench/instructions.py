"""Count the instructions of a step around its kernels: ``python -m bench.instructions``.

Needs valgrind, so Linux. Times of a busy machine say little; these counts hardly change from run to
run, and `bench/instructions.json` bounds them. The kernels see 16 elements of each tensor.
"""

import argparse
import mmap
import platform
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from flatstep import _ext
from rich import box
from rich.console import Console
from rich.table import Table

from .baseline import ROOM, Baselines, Change, Counts, Environment, differences, falls, rises
from .callgrind import CallgrindError
from .counts import LIBRARIES, MAIN_PARTS, STREAM, Counted, count_case
from .machine import version

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "bench" / "instructions.json"
CASES = [(tensors, mode) for tensors in (148, 2_000) for mode in ("eager", "compiled")]


def environment(loops: str) -> Environment:
    """What the counts depend on, other than flatstep itself. `loops` are those in callgrind."""
    optimised = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    return {
        "python": platform.python_version(),
        "python's build": f"{platform.python_compiler()}{', optimised' if optimised else ''}",
        "compiler": compiler(Path(_ext.__file__)),
        "mlx": version("mlx"),
        "C library": " ".join(platform.libc_ver()),
        "machine": platform.machine(),
        "vector loops": loops,
    }


def compiler(library: Path) -> str:
    """What an ELF file's .comment says."""
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        found = set(re.findall(rb"(?:GCC: \(|clang version )[ -~]+", content))
    return ", ".join(sorted(text.decode() for text in found)) or "unknown"


def parts_table(cases: list[Counted], title: str) -> Table:
    columns = ("", *MAIN_PARTS, "main thread", STREAM)
    table = Table(*columns, box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for case in cases:
        main = [case.part(name) for name in MAIN_PARTS]
        table.add_row(case.name, *(f"{n:,.0f}" for n in (*main, sum(main), case.part(STREAM))))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def libraries_table(cases: list[Counted]) -> Table:
    names = [*LIBRARIES.values(), "other"]
    title = "The main thread's, by library"
    table = Table("", *names, box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for case in cases:
        table.add_row(case.name, *(f"{case.library(name):,.0f}" for name in names))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def verdict(
    console: Console, baselines: Baselines, here: Environment, counts: Counts
) -> list[Change]:
    """Say how the counts compare to those accepted; return what rose."""
    accepted = baselines.counts_for(here)
    command = "make instructions ARGS=--accept"
    if accepted is None:
        console.print("[yellow]Not compared:[/] bench/instructions.json is of another environment.")
        nearest = baselines.nearest(here)
        for line in differences(here, nearest) if nearest else ["(it is empty)"]:
            console.print(f"  {line}", highlight=False)
        console.print(f"`{command}` adds these.")
        return []
    risen, fallen = rises(accepted, counts), falls(accepted, counts)
    for change in risen:
        console.print(f"[red]ROSE[/] {change}", highlight=False)
    for change in fallen:
        console.print(f"[green]fell[/] {change}", highlight=False)
    if risen:
        console.print(
            f"More than {ROOM:.0%} above bench/instructions.json. If the step has to cost this, "
            f"accept it with `{command}`, and commit the file with the reason."
        )
    elif fallen:
        console.print(f"`{command}` makes the lower counts the bound.")
    else:
        console.print(f"Within {ROOM:.0%} of what bench/instructions.json accepts.")
    return risen


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.instructions", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--accept", action="store_true", help="make these counts the bound for this environment"
    )
    arguments = parser.parse_args()
    if not shutil.which("valgrind"):
        sys.exit("bench.instructions: valgrind is not installed (Debian: apt install valgrind)")
    console = Console(width=None if sys.stdout.isatty() else 110)
    cases: list[Counted] = []
    report: dict[str, Any] = {}
    for tensors, mode in CASES:
        try:
            case, report = count_case(tensors, mode)
        except CallgrindError as error:
            sys.exit(f"bench.instructions: {error}")
        cases.append(case)
    here = environment(report["vector loops"])
    console.print("; ".join(f"{name}: {value}" for name, value in here.items()), style="dim")
    console.print(parts_table(cases, "Instructions for each tensor and step"))
    console.print(libraries_table(cases))
    counts = {case.name: case.totals for case in cases}
    baselines = Baselines(BASELINE)
    if arguments.accept:
        baselines.accept(here, counts)
        console.print("wrote bench/instructions.json")
    elif verdict(console, baselines, here, counts):
        sys.exit(1)


if __name__ == "__main__":
    main()
