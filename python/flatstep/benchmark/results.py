"""What was measured in a setting, and what it says."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from .._command_line import print_table, print_wrapped
from .cases import Setting
from .contenders import FLATSTEP
from .measure import Series, noise, quartiles


@dataclass
class Result:
    """The runs of every contender in one setting."""

    setting: Setting
    series: dict[str, Series]

    @property
    def floor_seconds(self) -> list[float]:
        """All the floor's runs, whoever they were paired with."""
        return [s for runs in self.series.values() for s in runs.floor_seconds]

    @property
    def noise(self) -> str | None:
        others = max(runs.other_cores or 0.0 for runs in self.series.values())
        return noise("the floor's times", self.floor_seconds, others)

    def faster(self, name: str, peer: str) -> float:
        """How many times faster `name` is than `peer`, each as a multiple of its own floor.

        So two processes can be compared, which never run at the same moment.
        """
        return self.series[peer].ratio / self.series[name].ratio

    def extra_part(self, name: str) -> float:
        """The peak memory above what is held, as a part of flatstep's state."""
        return (self.series[name].extra_bytes or 0) / self.setting.state_bytes

    def print(self) -> None:
        """Medians with the middle half, one line for each contender."""
        rows = [self._row("floor", self.floor_seconds, "", "")]
        for name, runs in self.series.items():
            extra = "-" if runs.extra_bytes is None else f"{runs.extra_bytes / 1e6:,.1f}"
            rows.append(self._row(name, runs.seconds, f"{runs.ratio:.2f}", extra))
        print_table(self.setting.label, ("", "ms", "", "x floor", "GB/s", "extra MB"), rows)
        if self.setting.dtype != "fp32" and not set(self.series) <= set(FLATSTEP):
            theirs = (3 + 2 * self.setting.slots) * self.setting.itemsize
            ours = self.setting.step_bytes // self.setting.elements
            print_wrapped(
                f"peers keep their state in {self.setting.dtype}: they move {theirs} bytes an "
                f"element, flatstep {ours}"
            )
        if self.noise:
            print_wrapped(self.noise)

    def _row(self, name: str, seconds: list[float], ratio: str, extra: str) -> tuple[str, ...]:
        first, median, third = (1e3 * value for value in quartiles(seconds))
        digits = 2 if median < 20 else 1 if median < 200 else 0
        half = f"[{first:.{digits}f}, {third:.{digits}f}]"
        speed = f"{self.setting.step_bytes / median / 1e6:.1f}"
        return name, f"{median:.{digits}f}", half, ratio, speed, extra

    def as_json(self) -> dict[str, Any]:
        return {
            "label": self.setting.label,
            "setting": dataclasses.asdict(self.setting),
            "step_bytes": self.setting.step_bytes,
            "noise": self.noise,
            "series": {
                name: {
                    **dataclasses.asdict(runs),
                    "median": quartiles(runs.seconds)[1],
                    "ratio": runs.ratio,
                }
                for name, runs in self.series.items()
            },
        }
