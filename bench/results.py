"""The curves of cost among what was measured, and the file that keeps it."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flatstep.benchmark.cases import Setting
from flatstep.benchmark.measure import Series
from flatstep.benchmark.results import Result


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
