"""What was measured of each mode, as pictures."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .mode_jobs import MODES
from .mode_report import Runs, models, of

# Okabe and Ito's, as in plot.py; the modes of one family are neighbours.
COLORS = {
    "float32": "#000000",
    "mlx-float32": "#999999",
    "mlx-bfloat16": "#D55E00",
    "bfloat16": "#E69F00",
    "24": "#56B4E9",
    "24-int8": "#0072B2",
    "stochastic-int8": "#009E73",
    "lion": "#CC79A7",
    "lion-float32": "#666666",
}
WINDOW = 15  # steps that a curve is a mean of


def draw_all(runs: Runs, folder: Path) -> Iterable[Path]:
    """Draws what there is, and says where."""
    for kind, name, draw in (
        ("train", "memory_losses.png", _losses),
        ("finetune", "memory_fine_tuning.png", _fine_tuning),
        ("cost", "memory_bytes.png", _bytes),
    ):
        if models(runs, kind):
            draw(runs).savefig(folder / name, dpi=110)
            yield folder / name


def _losses(runs: Runs) -> Figure:
    """Against the step, the loss and how far it is above float32's; what each run ended with."""
    names = models(runs, "train")
    figure = Figure(figsize=(5.6 * len(names), 9), layout="constrained")
    grid = figure.add_gridspec(3, len(names), height_ratios=[1.3, 1, 1])
    for column, model in enumerate(names):
        curves, above, ends = (figure.add_subplot(grid[row, column]) for row in range(3))
        rows = list(_modes(runs, "train", model))
        reference = _smooth(of(runs, "train", model, "float32"))
        for mode, found in rows:
            mean = _smooth(found)
            steps = np.arange(len(mean)) + min(WINDOW, len(mean))
            wide = mode == "float32"
            line: dict[str, Any] = {
                "color": COLORS[mode],
                "linewidth": 3.5 if wide else 1.3,
                "zorder": 2 - wide,
            }
            curves.plot(steps, mean, label=MODES[mode].label, **line)
            if len(mean) == len(reference) and not mode.startswith("lion"):
                above.plot(steps, mean - reference, **line)
        _ends(ends, rows)
        seeds = max(len(found) for _, found in rows)
        title = f"{model}: training loss, means of {seeds} seeds and {WINDOW} steps"
        curves.set_title(title, fontsize=10, loc="left")
        curves.set_ylabel("nats per byte", fontsize=9)
        curves.legend(frameon=False, fontsize=8)
        above.set_title("the same, above float32's (without Lion)", fontsize=10, loc="left")
        above.set_xlabel("step", fontsize=9)
        _plain(curves, above, ends)
    return figure


def _smooth(found: dict[str, Any]) -> Any:
    """The mean of the seeds' losses, and of so many steps."""
    mean = np.mean([run["losses"] for run in found.values()], axis=0)
    window = min(WINDOW, len(mean))
    return np.convolve(mean, np.ones(window) / window, "valid")


def _ends(axis: Any, rows: Any) -> None:
    for row, (mode, found) in enumerate(rows):
        values = [run["validation"] for run in found.values()]
        axis.plot(values, [row] * len(values), "o", color=COLORS[mode], alpha=0.7)
        axis.plot([statistics.mean(values)], [row], "|", color="black", markersize=14)
        if mode == "float32":
            axis.axvspan(min(values), max(values), color="black", alpha=0.08)
    axis.set_yticks(range(len(rows)), [MODES[mode].label for mode, _ in rows])
    axis.invert_yaxis()
    axis.set_xlabel("validation loss at the end; grey: the float32 seeds", fontsize=9)


def _fine_tuning(runs: Runs) -> Figure:
    """How many weights moved, and how far in the direction of float32."""
    model = models(runs, "finetune")[0]
    rows = list(_modes(runs, "finetune", model))
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for number, (what, title, form) in enumerate(
        (
            ("moved", "weights that moved", "{:.0%}"),
            ("along_float32", "moved along float32's way; 1: as far", "{:.2f}"),
        )
    ):
        axis = figure.add_subplot(1, 2, 1 + number)
        means = [statistics.mean(run[what] for run in found.values()) for _, found in rows]
        _bars(axis, rows, means, form)
        axis.set_title(title, fontsize=10, loc="left")
        if number:
            axis.set_yticks([])
    return figure


def _bytes(runs: Runs) -> Figure:
    """What is held, and the peak of a whole step above it, in bytes a parameter."""
    names = models(runs, "cost")
    figure = Figure(figsize=(10, 3.2 * len(names)), layout="constrained")
    for number, model in enumerate(names):
        left, widest = None, 0.0
        for column, how in enumerate(("eager", "compiled")):
            axis = figure.add_subplot(len(names), 2, 1 + 2 * number + column, sharex=left)
            left = left or axis
            rows = [(m, f[how]) for m, f in _modes(runs, "cost", model) if how in f]
            peaks = [run["peak"] / run["elements"] for _, run in rows]
            _bars(axis, rows, peaks, "{:.1f}", alpha=0.45)
            held = [run["held"] for _, run in rows]
            axis.barh(range(len(rows)), held, color=[COLORS[mode] for mode, _ in rows])
            axis.set_title(f"{model}, {how}: peak of a step; dark: held", fontsize=10, loc="left")
            axis.set_xlabel("bytes a parameter", fontsize=9)
            if column:
                axis.set_yticks([])
                axis.set_xlim(0, max(axis.get_xlim()[1], widest))
            widest = axis.get_xlim()[1]
    return figure


def _modes(runs: Runs, kind: str, model: str) -> Iterable[tuple[str, dict[str, Any]]]:
    for mode in MODES:
        found = of(runs, kind, model, mode)
        if found:
            yield mode, found


def _bars(axis: Any, rows: Any, values: list[float], form: str, alpha: float = 1.0) -> None:
    colors = [COLORS[mode] for mode, _ in rows]
    bars = axis.barh(range(len(rows)), values, color=colors, alpha=alpha)
    axis.bar_label(bars, [form.format(value) for value in values], padding=4, fontsize=9)
    axis.set_yticks(range(len(rows)), [MODES[mode].label for mode, _ in rows])
    axis.set_xlim(0, 1.15 * max(values))
    axis.invert_yaxis()
    _plain(axis)


def _plain(*axes: Any) -> None:
    for axis in axes:
        axis.tick_params(left=False)
        axis.spines[["top", "right"]].set_visible(False)
