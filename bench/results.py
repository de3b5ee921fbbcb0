"""What was measured, what it says, and the file that keeps it."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .cases import Setting
from .measure import Series, quartiles

# Figures are doubtful where the middle half of the floor's times is wider than this part of their
# median, or where other processes kept this many cores busy.
WIDE = 0.1
BUSY = 0.1


@dataclass
class Result:
    """The runs of every contender in one setting."""

    setting: Setting
    series: dict[str, Series]

    @property
    def floor_quartiles(self) -> tuple[float, float, float]:
        """Quartiles in seconds of all the floor's runs, whoever they were paired with."""
        return quartiles([s for runs in self.series.values() for s in runs.floor_seconds])

    @property
    def floor_spread(self) -> float:
        first, median, third = self.floor_quartiles
        return (third - first) / median

    @property
    def other_cores(self) -> float:
        return max(runs.other_cores or 0.0 for runs in self.series.values())

    @property
    def is_noisy(self) -> bool:
        return self.floor_spread > WIDE or self.other_cores > BUSY

    def faster(self, name: str, peer: str) -> float:
        """How many times faster `name` is than `peer`, each as a multiple of its own floor.

        So two processes can be compared, which never run at the same moment.
        """
        return self.series[peer].ratio / self.series[name].ratio

    def extra_part(self, name: str) -> float | None:
        """The peak memory above what is held, as a part of flatstep's state."""
        extra = self.series[name].extra_bytes
        return None if extra is None else extra / self.setting.state_bytes


def cost_families(results: list[Result]) -> list[list[Result]]:
    """The curves of cost against the number of tensors, by rule, dtype and threads."""
    families: dict[Setting, list[Result]] = {}
    for result in results:
        if result.setting.is_cost:
            families.setdefault(replace(result.setting, case="cost"), []).append(result)
    return [sorted(family, key=lambda r: len(r.setting.shapes)) for family in families.values()]


def save(path: Path, machine: dict[str, str], results: list[Result]) -> None:
    content = {"machine": machine, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1))


def load(path: Path) -> tuple[dict[str, str], list[Result]]:
    content: dict[str, Any] = json.loads(path.read_text())
    results = []
    for entry in content["results"]:
        series = {name: Series(**runs) for name, runs in entry["series"].items()}
        results.append(Result(Setting(**entry["setting"]), series))
    return content["machine"], results
