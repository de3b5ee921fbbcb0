"""Results as pictures. The colours are Okabe and Ito's, which colour-blind eyes tell apart."""

from pathlib import Path

from flatstep.benchmark.cases import CASES, Setting
from flatstep.benchmark.results import Result
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import cost_families

COLORS = {
    "flatstep eager": "#56B4E9",
    "flatstep compiled": "#0072B2",
    "mlx eager": "#E69F00",
    "mlx compiled": "#D55E00",
    "torch fused": "#009E73",
    "torch foreach": "#CC79A7",
    "optax jit": "#999999",
}
MARKERS = dict(zip(COLORS, "oDs^vP*", strict=True))
COLUMNS = 3


def _grid(count: int, height: float, width: float = 5.2) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, 1 + i) for i in range(count)]


def _bars(axis: Axes, lengths: dict[str, float], labels: list[str], title: str) -> None:
    bars = axis.barh(list(lengths), list(lengths.values()), color=[COLORS[k] for k in lengths])
    axis.bar_label(bars, labels, padding=4, fontsize=9)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlim(0, 1.45 * max(*lengths.values(), 1e-9))
    axis.tick_params(left=False)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


def _short(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _title(setting: Setting) -> str:
    return f"{CASES[setting.case][0]}\n{setting.manner}"


def draw_times(results: list[Result], machine: str, path: Path) -> None:
    """Median times as bars; the floor as a line across them."""
    figure, axes = _grid(len(results), 2.7)
    for axis, result in zip(axes, results, strict=True):
        medians = {name: 1e3 * runs.quartiles[1] for name, runs in result.series.items()}
        labels = [
            f"{_short(medians[name])} ms = {_short(runs.ratio)}x"
            for name, runs in result.series.items()
        ]
        floor = 1e3 * result.floor_quartiles[1]
        _bars(axis, medians, labels, _title(result.setting))
        axis.axvline(floor, color="black", linestyle="--", linewidth=1.2)
        noise = "; noisy" if result.is_noisy else ""
        axis.set_xlabel(f"ms; dashed: the floor, {_short(floor)} ms{noise}", fontsize=9)
    figure.suptitle(f"One optimizer step, and how many times the floor it takes\n{machine}")
    figure.savefig(path, dpi=130)


def draw_memory(results: list[Result], machine: str, path: Path) -> None:
    """Peak memory above what is held before the step, for each parameter."""
    figure, axes = _grid(len(results), 2.7)
    for axis, result in zip(axes, results, strict=True):
        extra = {
            name: runs.extra_bytes / result.setting.elements
            for name, runs in result.series.items()
            if runs.extra_bytes is not None
        }
        _bars(axis, extra, [f"{value:.2f}" for value in extra.values()], _title(result.setting))
        axis.set_xlabel("bytes per parameter", fontsize=9)
    figure.suptitle(f"Peak memory in a step above what is held before it\n{machine}")
    figure.savefig(path, dpi=130)


def _curves(axis: Axes, family: list[Result]) -> None:
    counts = [len(result.setting.shapes) for result in family]
    floors = [1e3 * result.floor_quartiles[1] for result in family]
    axis.plot(counts, floors, color="black", linestyle="--", label="floor")
    for name, color in COLORS.items():
        points = [
            (count, 1e3 * result.series[name].quartiles[1])
            for count, result in zip(counts, family, strict=True)
            if name in result.series
        ]
        if points:
            axis.plot(*zip(*points, strict=True), color=color, marker=MARKERS[name], label=name)
    axis.set(xscale="log", yscale="log", xlabel="tensors that 10⁶ elements are divided into")
    axis.set_ylabel("ms for one step")
    axis.set_title(family[0].setting.manner, fontsize=10, loc="left")
    axis.grid(which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def draw_cost(results: list[Result], machine: str, path: Path) -> None:
    """Time against the number of tensors, the number of elements being the same."""
    families = cost_families(results)
    figure, axes = _grid(len(families), 5.5, 8)
    for axis, family in zip(axes, families, strict=True):
        _curves(axis, family)
    axes[0].legend(frameon=False)
    figure.suptitle(f"Cost of a step against the number of tensors\n{machine}", fontsize=11)
    figure.savefig(path, dpi=130)


def draw(results: list[Result], machine: dict[str, str], folder: Path) -> list[Path]:
    """Draw what there are results for, and return the pictures' paths."""
    name = f"{machine['cpu']}, {machine['cores']} cores"
    models = [result for result in results if not result.setting.is_cost]
    costs = [result for result in results if result.setting.is_cost]
    drawn = []
    for file, function, shown in (
        ("time.png", draw_times, models),
        ("memory.png", draw_memory, models),
        ("cost.png", draw_cost, costs),
    ):
        if shown:
            function(shown, name, folder / file)
            drawn.append(folder / file)
    return drawn
