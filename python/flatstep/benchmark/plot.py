"""Results as a picture. The colours are Okabe and Ito's, which colour-blind eyes tell apart."""

from pathlib import Path

from matplotlib.figure import Figure

from .measure import quartiles
from .results import Result

COLORS = {
    "flatstep eager": "#56B4E9",
    "flatstep compiled": "#0072B2",
    "mlx eager": "#E69F00",
    "mlx compiled": "#D55E00",
    "torch fused": "#009E73",
}
COLUMNS = 3


def draw(results: list[Result], machine: str, path: Path) -> None:
    """Median times as bars; the floor as a line across them."""
    columns = min(COLUMNS, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.7 * rows), layout="constrained")
    for number, result in enumerate(results):
        axis = figure.add_subplot(rows, columns, 1 + number)
        medians = {name: 1e3 * quartiles(s.seconds)[1] for name, s in result.series.items()}
        floor = 1e3 * quartiles(result.floor_seconds)[1]
        bars = axis.barh(list(medians), list(medians.values()), color=[COLORS[n] for n in medians])
        labels = [f"{_short(medians[n])} ms = {_short(s.ratio)}x" for n, s in result.series.items()]
        axis.bar_label(bars, labels, padding=4, fontsize=9)
        axis.axvline(floor, color="black", linestyle="--", linewidth=1.2)
        axis.set_title(result.setting.label, fontsize=10, loc="left")
        axis.set_xlim(0, 1.45 * max(medians.values()))
        noisy = "; noisy" if result.noise else ""
        axis.set_xlabel(f"ms; dashed: the floor, {_short(floor)} ms{noisy}", fontsize=9)
        axis.tick_params(left=False)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"One optimizer step, and how many times the floor it takes\n{machine}")
    figure.savefig(path, dpi=130)


def _short(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
