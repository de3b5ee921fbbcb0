"""The kernels' text as the extension carries it, and the names of what their tables list."""

import runpy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "metal_source.py"
_script = runpy.run_path(str(SCRIPT))
source: Callable[[], str] = _script["source"]
all_instances: Callable[[], str] = _script["all_instances"]
instances: Callable[[Mapping[str, str]], str] = _script["instances"]
STORAGES: list[str] = _script["rows"]("storage.h", "FLATSTEP_STORAGES")
PARAMETER_STORAGES: list[str] = [
    storage
    for kind in ("STOCHASTIC", "SPLIT")
    for storage in _script["rows"]("storage.h", f"FLATSTEP_{kind}_STORAGES")
]
code_storages: Callable[[str], list[str]] = _script["code_storages"]
_update: Callable[[str, str, str, Sequence[str], str], str] = _script["update"]
# What copies blocks, and sums up squares.
WHOLE: list[str] = _script["WHOLE"]

# A rule and a storage besides those of the tables.
EXTRA = (Path(__file__).parent / "kernels" / "extra.metal").read_text()


def advance(rule: str) -> str:
    return f"advance, {rule}"


def update(rule: str, has_tiles: bool, storages: Iterable[str], ema: str = "Absent") -> str:
    """An instance, which is its name here too. `storages`: of p and the state."""
    p, *state = storages
    return _update(rule, str(has_tiles).lower(), p, state, ema)


def with_instances(text: str, names: Iterable[str]) -> str:
    return text + EXTRA + instances({name: name for name in sorted([*names, *WHOLE])})
