"""The arithmetic of what is said of a step's parts. To measure them takes valgrind, or time.

The expected figures are worked out by hand.
"""

import json
from pathlib import Path

import pytest
from flatstep.benchmark import in_pass, instructions
from flatstep.benchmark.profile import Profile

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
fn=(1) outer
0 12
calls=2 0
0 95
totals: 107

part: 2
thread: 3
ob=(2)
fn=(2)
0 1000
totals: 1000
"""


def test_a_profile_has_the_instructions_of_each_part_and_its_thread() -> None:
    assert instructions.totals(PROFILE.splitlines()) == [(1, 107), (3, 1000)]


def test_a_rise_is_told_beyond_the_room_and_no_sooner() -> None:
    accepted = {"148 eager": {"python": 100.0, "eval": 900.0}}

    def risen(python: float, evaluation: float) -> list[str]:
        counted = {"148 eager": {"python": python, "eval": evaluation}}
        return instructions.compare(accepted, counted)[0]

    assert risen(119.0, 980.0) == []
    (rise,) = risen(121.0, 900.0)
    assert rise == "148 eager, python: 100 -> 121 instructions for each tensor (+21.0%)"
    whole, part = risen(100.0, 1001.0)
    assert whole == "148 eager: 1,000 -> 1,101 instructions for each tensor (+10.1%)"
    assert part.startswith("148 eager, eval: 900 -> 1,001 ")


def test_a_part_that_was_not_there_is_a_rise() -> None:
    counted = {"case": {"eval": 900.0, "free": 50.0}}
    (rise,), _ = instructions.compare({"case": {"eval": 1000.0}}, counted)
    assert rise == "case, free: 0 -> 50 instructions for each tensor"


def test_a_fall_is_told_for_whole_steps() -> None:
    accepted = {"case": {"graph": 500.0, "eval": 500.0}}
    assert instructions.compare(accepted, {"case": {"graph": 400.0, "eval": 510.0}}) == ([], [])
    _, (fall,) = instructions.compare(accepted, {"case": {"graph": 300.0, "eval": 500.0}})
    assert fall == "case: 1,000 -> 800 instructions for each tensor (-20.0%)"


def test_counts_are_compared_with_those_of_the_same_environment_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "instructions.json"
    file.write_text("[]")
    monkeypatch.setattr(instructions, "ACCEPTED", file)
    here, other = {"python": "3.11.7", "mlx": "0.32.4"}, {"python": "3.12.1", "mlx": "0.32.4"}
    for environment, number in ((other, 2.0), (here, 3.0), (here, 4.04)):
        entries = json.loads(file.read_text())
        instructions.accept(entries, environment, {"case": {"eval": number}})

    entries = json.loads(file.read_text())
    assert len(entries) == 2
    dear = {"case": {"eval": 4.5}}
    assert not instructions.verdict(entries, here, dear)
    assert "ROSE case: 4 -> 4 instructions for each tensor (+12.5%)" in capsys.readouterr().out
    assert instructions.verdict(entries, here, {"case": {"eval": 4.0}})
    assert instructions.verdict(entries, here | {"compiler": "clang"}, dear)
    assert "has no counts of this environment" in capsys.readouterr().out


def test_steps_are_divided_into_phases_and_marks_cost_nothing() -> None:
    phases = ["nothing", "python", "graph", "python", "between", "nothing", "python", "graph"]
    numbers = [10, 110, 60, 30, 11, 20, 120, 70]
    assert instructions.steps_of(phases, numbers) == [
        {"python": 120, "graph": 50, "between": 1},  # 110 - 10 and 30 - 10 are Python
        {"python": 100, "graph": 50},
    ]


def test_the_parts_of_a_profiled_step_are_its_whole() -> None:
    parts = {"python": [1.0, 1.0], "eval": [2.0, 4.0]}
    profile = Profile(parts, plain=[4.0, 4.0, 4.0], floor=[3.0], other_cores=0.0)
    assert profile.coverage == 1.0
    each = ["  a tensor", "2,000,000", "500,000", "1,500,000", "-", "1,500,000"]
    assert profile.rows("eager", 2)[1] == each
    assert profile.remarks("eager") == [
        "eager: the parts are 100.0% of a whole step, medians of 3 steps"
    ]
    profile.other_cores = 0.5
    assert "others used 0.5 cores" in profile.remarks("eager")[1]


def test_ways_are_compared_by_turns_and_with_one_of_their_set(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for ways in in_pass.SETS.values():
        assert {way.beside for way in ways.values()} <= {None, *ways}
    measured = {
        "AdamW": {"seconds": [1.0, 2.0, 9.0], "held": 100, "scratch": 0},
        "max_grad_norm": {"seconds": [1.3, 2.2, 9.9], "held": 100, "scratch": 1},
    }
    in_pass.print_set("clip, compiled", measured)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "max_grad" in line]
    assert " ".join(row.split()[1:]) == (
        "2200.0 1300.0 1.100 1.300 AdamW at most 1.2: met 0.0 MB, 1.0%"
    )
