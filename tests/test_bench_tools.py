"""The arithmetic of what `bench/` says of a step's parts. To measure them takes valgrind, or time.

The expected figures are worked out by hand.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from flatstep.benchmark.cases import Setting

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from bench import baseline, callgrind, counts, parts  # noqa: E402

PROFILE = """\
# callgrind format
version: 1
part: 1
thread: 1
desc: Trigger: --dump-before=getppid
positions: line
events: Ir
summary: 107

ob=(1) /lib/libone.so
fl=(1) ???
fn=(1) outer
0 12
+3 5
cob=(2) /lib/libtwo.so
cfi=(1)
cfn=(2) inner
calls=2 0
0 90
0 3

ob=(2)
fl=(1)
fn=(2)
0 80
* 7
totals: 107

part: 2
thread: 3
ob=(2)
fn=(2)
0 1000
totals: 1000
"""


def test_a_profile_counts_each_instruction_once_where_it_is() -> None:
    first, second = callgrind.parse(PROFILE.splitlines())
    assert (first.thread, second.thread) == (1, 3)
    assert first.instructions == Counter({"/lib/libone.so": 20, "/lib/libtwo.so": 87})
    assert first.total == 107  # what callgrind says itself
    assert second.instructions == Counter({"/lib/libtwo.so": 1000})


def test_a_rise_is_told_beyond_the_room_and_no_sooner() -> None:
    accepted = {"148 eager": {"python": 100.0, "eval": 900.0}}
    assert baseline.rises(accepted, {"148 eager": {"python": 119.0, "eval": 980.0}}) == []
    (rise,) = baseline.rises(accepted, {"148 eager": {"python": 121.0, "eval": 900.0}})
    assert str(rise) == "148 eager, python: 100 -> 121 instructions for each tensor (+21.0%)"
    whole, part = baseline.rises(accepted, {"148 eager": {"python": 100.0, "eval": 1001.0}})
    assert (whole.part, whole.accepted, whole.counted) == (None, 1000.0, 1101.0)
    assert part.part == "eval"


def test_a_part_that_was_not_there_is_a_rise() -> None:
    (rise,) = baseline.rises({"case": {"eval": 1000.0}}, {"case": {"eval": 900.0, "free": 50.0}})
    assert "none -> 50" in str(rise)


def test_a_fall_is_told_for_whole_steps() -> None:
    accepted = {"case": {"graph": 500.0, "eval": 500.0}}
    assert baseline.falls(accepted, {"case": {"graph": 400.0, "eval": 510.0}}) == []
    (fall,) = baseline.falls(accepted, {"case": {"graph": 300.0, "eval": 500.0}})
    assert str(fall) == "case: 1,000 -> 800 instructions for each tensor (-20.0%)"


def test_counts_are_compared_with_those_of_the_same_environment_only(tmp_path: Path) -> None:
    here = {"python": "3.11.7", "mlx": "0.32.4", "machine": "x86_64"}
    near, far = here | {"python": "3.12.1"}, {"python": "3.13.0", "mlx": "1", "machine": "arm"}
    file = tmp_path / "instructions.json"
    baselines = baseline.Baselines(file)
    assert baselines.counts_for(here) is None
    assert baselines.nearest(here) is None
    for environment, count in ((far, 1.0), (near, 2.0), (here, 3.0), (here, 4.04)):
        baselines.accept(environment, {"case": {"eval": count}})

    again = baseline.Baselines(file)
    assert again.counts_for(here) == {"case": {"eval": 4.0}}  # the last, and rounded
    assert again.counts_for(near) == {"case": {"eval": 2.0}}
    other = here | {"compiler": "clang"}
    assert again.counts_for(other) is None
    assert again.nearest(other) == here
    assert baseline.differences(other, here) == ["compiler: clang, not unknown"]
    assert len(json.loads(file.read_text())) == 3


def test_steps_are_divided_into_phases_and_marks_cost_nothing() -> None:
    phases = ["nothing", "python", "graph", "python", "between", "nothing", "python", "graph"]
    numbers = [10, 110, 60, 30, 11, 20, 120, 70]
    dumps = [callgrind.Part(1, Counter({"/x/_ext.abi3.so": n})) for n in numbers]
    first, second = counts.steps_of(phases, dumps)
    assert first == {
        "python": Counter({"flatstep": 120}),  # 110 - 10 and 30 - 10
        "graph": Counter({"flatstep": 50}),
        "between": Counter({"flatstep": 1}),
    }
    assert second["graph"] == Counter({"flatstep": 50})
    assert counts.mean_step([first, second], "python") == Counter({"flatstep": 110})


@pytest.mark.parametrize(
    ("path", "library"),
    [
        ("/site-packages/flatstep/_ext.cpython-311-x86_64-linux-gnu.so", "flatstep"),
        ("/site-packages/mlx/lib/libmlx.so", "MLX"),
        ("/site-packages/mlx/core.cpython-311-x86_64-linux-gnu.so", "mlx.core"),
        ("/usr/lib/libpython3.11.so.1.0", "Python"),
        ("/usr/bin/python3.11", "Python"),
        ("/lib/x86_64-linux-gnu/libc.so.6", "malloc, libc"),
        ("/lib/x86_64-linux-gnu/libstdc++.so.6.0.30", "libstdc++"),
        ("/lib/x86_64-linux-gnu/libm.so.6", "other"),
        ("???", "other"),
    ],
)
def test_a_library_is_known_by_its_file(path: str, library: str) -> None:
    assert counts.by_library(callgrind.Part(1, Counter({path: 7}))) == {library: 7}


def test_the_parts_of_a_profiled_step_are_its_whole() -> None:
    profile = parts.Profile(
        Setting("tiny"),
        "eager",
        1,
        {"python": [1.0, 1.0], "eval": [2.0, 4.0]},
        plain=[4.0, 4.0, 4.0],
        other_cores=0.0,
    )
    assert profile.sum == 4.0
    assert profile.coverage == 1.0
    assert not profile.is_noisy
    profile.other_cores = 0.5
    assert profile.is_noisy
