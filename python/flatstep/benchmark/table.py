"""A result as lines for a terminal, and as JSON."""

import dataclasses
from typing import Any

from .cases import ITEMSIZE
from .contenders import FLATSTEP
from .results import Result

Predictions = dict[str, tuple[float, float] | None]  # seconds, by contender and "floor"


def lines(result: Result, predictions: Predictions) -> list[str]:
    """At most 80 columns: medians with the middle half, one line for each contender."""
    setting = result.setting
    moved = setting.step_bytes
    shows_prediction = any(predictions.values())
    head = f"  {'':17}{'ms':>8} {'':15}{'x floor':>8}{'GB/s':>8}{'extra MB':>10}"
    found = [setting.label, head + (f"{'predicted':>10}" if shows_prediction else "")]
    rows = [("floor", result.floor_quartiles, "", "")]
    for name, runs in result.series.items():
        extra = "-" if runs.extra_bytes is None else f"{runs.extra_bytes / 1e6:,.1f}"
        rows.append((name, runs.quartiles, f"{runs.ratio:.2f}", extra))
    for name, (first, median, third), ratio, extra in rows:
        digits = 2 if median < 0.02 else 1 if median < 0.2 else 0
        half = f"[{1e3 * first:.{digits}f}, {1e3 * third:.{digits}f}]"
        line = (
            f"  {name:17}{1e3 * median:8.{digits}f} {half:15}{ratio:>8}"
            f"{moved / median / 1e9:8.1f}{extra:>10}"
        )
        found.append((line + _prediction(predictions.get(name), median)).rstrip())
    return found + _notes(result)


def _prediction(predicted: tuple[float, float] | None, median: float) -> str:
    if predicted is None:
        return ""
    fast, slow = predicted
    return f"{milliseconds(predicted):>10}{'' if fast <= median <= slow else '!'}"


def milliseconds(predicted: tuple[float, float]) -> str:
    """A range with two digits, since a prediction deserves no more."""
    return "-".join(_two_digits(1e3 * seconds) for seconds in predicted)


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def _notes(result: Result) -> list[str]:
    setting, notes = result.setting, []
    if setting.dtype != "fp32" and any(name not in FLATSTEP for name in result.series):
        peer = (3 + 2 * setting.slots) * ITEMSIZE[setting.dtype]
        notes.append(
            f"  mlx keeps its state in {setting.dtype}: it moves {peer} bytes an element, "
            f"flatstep {setting.step_bytes // setting.elements}"
        )
    if result.is_noisy:
        others = (
            f", others used {result.other_cores:.1f} cores" if result.other_cores > 0.05 else ""
        )
        notes.append(
            f"  too noisy to tell: the floor's middle half is {result.floor_spread:.0%} "
            f"wide{others}"
        )
    return notes


def as_json(result: Result, predictions: Predictions) -> dict[str, Any]:
    return {
        "label": result.setting.label,
        "setting": dataclasses.asdict(result.setting),
        "step_bytes": result.setting.step_bytes,
        "noisy": result.is_noisy,
        "floor_spread": result.floor_spread,
        "predicted_seconds": predictions,
        "series": {
            name: {**dataclasses.asdict(runs), "median": runs.quartiles[1], "ratio": runs.ratio}
            for name, runs in result.series.items()
        },
    }
