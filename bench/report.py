"""Results as tables for a terminal."""

from flatstep.benchmark.measure import Series
from flatstep.benchmark.results import Result
from rich import box
from rich.markup import escape
from rich.table import Table


def _warning(results: list[Result]) -> str | None:
    noisy = [result for result in results if result.is_noisy]
    if not noisy:
        return None
    spread = max(result.floor_spread for result in noisy)
    others = max(result.other_cores for result in noisy)
    return (
        f"[yellow]too noisy to tell: the floor's times spread over {spread:.0%}, "
        f"and others used {others:.1f} cores[/]"
    )


def _figures(values: tuple[float, float, float], digits: int) -> str:
    first, median, third = (f"{value:.{digits}f}" for value in values)
    return escape(f"{median} [{first}, {third}]")


def _milliseconds(seconds: tuple[float, float, float]) -> str:
    first, median, third = (1e3 * value for value in seconds)
    return _figures((first, median, third), 2 if median < 20 else 1 if median < 200 else 0)


def _extra(result: Result, runs: Series) -> str:
    if runs.extra_bytes is None:
        return "-"
    return f"{runs.extra_bytes / 1e6:,.1f} ({runs.extra_bytes / result.setting.state_bytes:.1%})"


def _align(table: Table) -> None:
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"


def setting_table(result: Result) -> Table:
    """Medians with quartiles; one row for each contender."""
    table = Table(
        "",
        "time (ms)",
        "times the floor",
        "GB/s",
        "extra MB (of state)",
        box=box.SIMPLE_HEAD,
        title=result.setting.label,
        caption=_warning([result]),
        title_justify="left",
        caption_justify="left",
    )
    _align(table)
    moved = result.setting.step_bytes / 1e9
    floor = result.floor_quartiles
    table.add_row("floor", _milliseconds(floor), "1", f"{moved / floor[1]:.1f}", "", style="dim")
    for name, runs in result.series.items():
        ratios = runs.ratio_quartiles
        table.add_row(
            name,
            _milliseconds(runs.quartiles),
            _figures(ratios, 2 if ratios[1] < 10 else 1),
            f"{moved / runs.quartiles[1]:.1f}",
            _extra(result, runs),
        )
    return table


def cost_table(results: list[Result]) -> Table:
    """Median milliseconds of each contender at each number of tensors, of one family."""
    table = Table(
        "ms for 10⁶ elements in",
        *(f"{len(result.setting.shapes):,}" for result in results),
        box=box.SIMPLE_HEAD,
        min_width=90,
        title=f"Cost against the number of tensors, {results[0].setting.manner}",
        caption=_warning(results),
        title_justify="left",
        caption_justify="left",
    )
    _align(table)
    floors = (f"{1e3 * result.floor_quartiles[1]:.2f}" for result in results)
    table.add_row("floor", *floors, style="dim")
    for name in dict.fromkeys(name for result in results for name in result.series):
        medians = (
            f"{1e3 * result.series[name].quartiles[1]:.2f}" if name in result.series else "-"
            for result in results
        )
        table.add_row(name, *medians)
    return table
