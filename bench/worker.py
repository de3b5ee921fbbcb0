"""A process that measures some contenders in one setting, for `run.py`.

Reads one JSON job from standard input; writes a JSON line for its progress and one for its result.
"""

import json
import sys
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from .cases import Setting
from .contenders import SPINNING, group_of, make_contenders
from .floor import Floor
from .measure import Budget, measure


def write(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    job = json.load(sys.stdin)
    setting = Setting(**job["setting"])
    mx.set_default_device(mx.cpu)  # where the floor runs
    names = tuple(job["contenders"])
    series = measure(
        make_contenders(setting, names),
        Floor(setting).run,
        Budget(**job["budget"]),
        group_of(names[0]) in SPINNING,
        lambda done: write({"done": done}),
    )
    write({"series": {name: asdict(runs) for name, runs in series.items()}})


if __name__ == "__main__":
    main()
