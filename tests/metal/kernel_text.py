"""The kernels' text as the extension carries it, and the names of what their tables list."""

import runpy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "metal_source.py"
_script = runpy.run_path(str(SCRIPT))
source: Callable[[], str] = _script["source"]
all_instances: Callable[[], str] = _script["all_instances"]
instances: Callable[[Mapping[str, str]], str] = _script["instances"]
STORAGES: list[str] = _script["rows"]("storage.h", "FLATSTEP_STORAGES")
MAX_STATES: int = _script["MAX_STATES"]

# A rule and a storage besides those of the tables.
EXTRA = (Path(__file__).parent / "kernels" / "extra.metal").read_text()


def advance(rule: str) -> str:
    return f"advance, {rule}"


def update(rule: str, has_tiles: bool, storages: Iterable[str]) -> str:
    """An instance, which is its name here too. `storages`: of p and the state."""
    names = list(storages)
    names += names[-1:] * (1 + MAX_STATES - len(names))
    return ", ".join(["update", rule, str(has_tiles).lower(), *names])


def with_instances(text: str, names: Iterable[str]) -> str:
    return text + EXTRA + instances({name: name for name in sorted(names)})
