"""What was measured, and what it says."""

from dataclasses import dataclass

from .cases import Setting
from .measure import Series, quartiles, spread

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
        return quartiles(self._floor_seconds)

    @property
    def _floor_seconds(self) -> list[float]:
        return [s for runs in self.series.values() for s in runs.floor_seconds]

    @property
    def floor_spread(self) -> float:
        return spread(self._floor_seconds)

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
