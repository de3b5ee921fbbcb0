"""Instruction counts that were accepted, and whether new ones stay within them.

Counts depend on the compiler, Python, MLX and the C library, so the file keeps one entry for each
environment, and like is compared with like only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Environment = dict[str, str]
# By case, then by part of the step: instructions for each tensor and step.
Counts = dict[str, dict[str, float]]

ROOM = 0.1
# A part may be a hundredth of its step: its own rise counts from this part of the step's total on.
SMALLEST_RISE = 0.02


@dataclass(frozen=True)
class Change:
    """A count that left its bounds; `part` is None for the whole step."""

    case: str
    part: str | None
    accepted: float
    counted: float

    def __str__(self) -> str:
        what = self.case if self.part is None else f"{self.case}, {self.part}"
        return (
            f"{what}: {self.accepted:,.0f} -> {self.counted:,.0f} instructions for each tensor "
            f"({self.counted / self.accepted - 1:+.1%})"
            if self.accepted
            else f"{what}: none -> {self.counted:,.0f} instructions for each tensor"
        )


def rises(accepted: Counts, counted: Counts) -> list[Change]:
    """What costs more than was accepted and `ROOM` on top, whole steps before their parts."""
    changes = []
    for case, parts in counted.items():
        before = accepted.get(case, {})
        total = sum(before.values())
        if not total:
            continue
        if sum(parts.values()) > (1 + ROOM) * total:
            changes.append(Change(case, None, total, sum(parts.values())))
        for part, count in parts.items():
            old = before.get(part, 0.0)
            if count - old > max(ROOM * old, SMALLEST_RISE * total):
                changes.append(Change(case, part, old, count))
    return changes


def falls(accepted: Counts, counted: Counts) -> list[Change]:
    """Whole steps that cost less than was accepted, by more than `ROOM`."""
    totals = {
        case: (sum(accepted[case].values()), sum(parts.values()))
        for case, parts in counted.items()
        if case in accepted
    }
    return [
        Change(case, None, before, now)
        for case, (before, now) in totals.items()
        if now < (1 - ROOM) * before
    ]


class Baselines:
    """The entries of a file: an environment and its counts each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: list[dict[str, Any]] = []
        if path.exists():
            self._entries = json.loads(path.read_text())

    def counts_for(self, environment: Environment) -> Counts | None:
        return next((e["counts"] for e in self._entries if e["environment"] == environment), None)

    def nearest(self, environment: Environment) -> Environment | None:
        """The environment in the file that differs the least."""
        there = [entry["environment"] for entry in self._entries]
        return min(there, key=lambda other: len(differences(environment, other)), default=None)

    def accept(self, environment: Environment, counts: Counts) -> None:
        """Write these counts to the file; counts of other environments stay."""
        rounded = {
            case: {part: round(count, 1) for part, count in parts.items()}
            for case, parts in counts.items()
        }
        entry = {"environment": environment, "counts": rounded}
        others = [e for e in self._entries if e["environment"] != environment]
        self._entries = [*others, entry]
        self._path.write_text(json.dumps(self._entries, indent=1) + "\n")


def differences(environment: Environment, other: Environment) -> list[str]:
    """What is not the same in two environments."""
    names = sorted(environment.keys() | other.keys())
    return [
        f"{name}: {environment.get(name, 'unknown')}, not {other.get(name, 'unknown')}"
        for name in names
        if environment.get(name) != other.get(name)
    ]
