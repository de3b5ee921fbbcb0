"""`make modes`: each way to store parameters and state is trained and measured, and none twice."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from flatstep.benchmark.mode_jobs import FINE_TUNED, MODES, ONLY_COSTS, Job
from flatstep.benchmark.modes import plan
from flatstep.benchmark.worker import WorkerError, ask

EXAMPLES = Path(__file__).parents[1] / "examples"
WORKER = "flatstep.benchmark.mode_worker"


def test_a_quick_run_trains_and_tunes_every_mode_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "flatstep.benchmark.modes", "--quick"]
    command += ["--part", "train", "finetune", "--examples", str(EXAMPLES), "--json", str(path)]
    process = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert process.returncode == 0, process.stdout + process.stderr

    report = json.loads(path.read_text())
    trained = [f"train tiny {mode} 0" for mode in MODES if mode != ONLY_COSTS]
    assert list(report["runs"]) == [*trained, *(f"finetune tiny {mode} 0" for mode in FINE_TUNED)]
    for run in report["runs"].values():
        assert len(run["losses"]) == 4 and 0 < run["validation"] < 7
    assert report["runs"]["finetune tiny float32 0"]["along_float32"] == 1.0
    for mode in MODES.values():
        assert f"  {mode.label} " in process.stdout or mode is MODES[ONLY_COSTS]

    # What is there is not run again; what is not, or had other steps, is.
    runs = report["runs"]
    again = [runs.pop(trained[1])["losses"], runs[trained[2]]["losses"].copy()]
    runs[trained[0]]["validation"] = 6.5
    del runs[trained[2]]["losses"][3]
    path.write_text(json.dumps(report))
    subprocess.run(command, capture_output=True, check=True)
    runs = json.loads(path.read_text())["runs"]
    assert runs[trained[0]]["validation"] == 6.5
    assert [runs[key]["losses"] for key in trained[1:3]] == again


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_costs_are_counted(compiled: bool) -> None:
    job = Job("cost", "tiny", "24-int8", 0, compiled, 4, 3, examples=str(EXAMPLES))
    result = ask(WORKER, asdict(job), lambda done: None)["result"]
    small = 13_000  # of float32 state, in biases, norms and the output, a small part of a model
    assert 5.18 < result["held"] < 5.2 + 6 * small / result["elements"]
    assert result["moved"] == 2 * result["held"] + 2
    assert result["peak"] > result["held"] * result["elements"]
    assert result["scratch"] < 0.01
    assert result["step"].keys() == result["update"].keys() == {"seconds", "processor_seconds"}


def test_the_plan_has_every_mode_for_every_seed() -> None:
    jobs = plan(["demo", "large"], ["train"], 3, None, {})
    assert len({job.key for job in jobs}) == len(jobs) == 2 * 3 * (len(MODES) - 1)
    costs = plan(["demo"], ["cost", "release"], 3, None, {})
    assert {job.compiled for job in costs} == {True, False}


def test_a_run_that_fails_says_why() -> None:
    job = Job("finetune", "tiny", "float32", folder="nowhere", examples=str(EXAMPLES))
    with pytest.raises(WorkerError, match="nowhere"):
        ask(WORKER, asdict(job), lambda done: None)
