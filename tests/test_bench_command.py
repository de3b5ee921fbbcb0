"""`python -m flatstep bench`: what it prints and writes, its exit status, and its goals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flatstep.__main__ as command
import mlx.core as mx
import pytest
from flatstep import _ext, bench
from flatstep.benchmark import goals
from flatstep.benchmark.cases import CASES, PLAN, Setting
from flatstep.benchmark.contenders import FLATSTEP, MLX, bytes_needed, groups
from flatstep.benchmark.floor import floor_for
from flatstep.benchmark.measure import QUICK, Series
from flatstep.benchmark.results import Result
from flatstep.benchmark.worker import Job, WorkerError, run_worker, set_up
from flatstep.diagnosis.environment import why_not

COMMAND = [sys.executable, "-m", "flatstep", "bench"]
TINY = [*COMMAND, "--device", "cpu", "--quick", "--case", "tiny"]
CONTENDERS = [name for names in groups(Setting("tiny"), "cpu") for name in names]


def test_it_prints_and_writes_every_contender_beside_the_floor(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    process = subprocess.run(
        [*TINY, "--json", str(path)],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""  # no progress where nobody watches
    lines = process.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for name in ("floor", *CONTENDERS):
        row = next(line for line in lines if line.startswith(f"  {name} "))
        assert re.search(r"\d+(\.\d+)? +\[[\d., ]+\]", row), row

    report = json.loads(path.read_text())
    assert report["device"] == "cpu" and report["problems"] == []
    assert report["environment"].keys() >= {"flatstep", "mlx", "machine"}
    (result,) = report["results"]
    tiny = {"case": "tiny", "rule": "adamw", "dtype": "fp32", "threads": None, "loops": None}
    assert result["setting"] == tiny
    assert result["step_bytes"] == 2000 * 1000 * 28
    assert list(result["series"]) == CONTENDERS
    for name, runs in result["series"].items():
        assert len(runs["seconds"]) == len(runs["floor_seconds"]) >= 1
        assert min(runs["seconds"]) > 0 and runs["ratio"] > 0
        assert (runs["extra_bytes"] is None) == name.startswith("torch")


def test_ctrl_c_ends_it_with_a_word_and_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    process = subprocess.Popen(
        [*COMMAND, "--device", "cpu", "--case", "tiny", "--json", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A job that a shell has put in the background inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout
    while "Steps on" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the worker gets it, too
    output, errors = process.communicate(timeout=30)
    assert process.returncode == bench.INTERRUPTED, output + errors
    assert output.endswith("interrupted\n") and "Traceback" not in errors
    assert json.loads(path.read_text())["results"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "bert"], "'bert'"),
        (["--goals", "--case", "many"], "--goals: there is none for many"),
        (["--device", "tpu"], "'tpu'"),
        (["--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: No such"),
        (["--plot", "no/such/folder/x.png"], "--plot no/such/folder/x.png: No such"),
        pytest.param(
            ["--device", "gpu"],
            "--device gpu: this build",
            marks=pytest.mark.skipif(why_not("gpu") is None, reason="it runs on the GPU here"),
        ),
    ],
)
def test_bad_arguments_are_refused_with_their_names(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(["bench", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_full_run_has_every_case_and_what_has_a_goal_once() -> None:
    settings = bench.plan(None, quick=False, goals=False, device="cpu")
    assert len(set(settings)) == len(settings)
    assert {setting.case for setting in settings} == set(CASES)
    assert {goal.setting for goal in goals.GOALS} <= set(PLAN)
    slower = Setting("gpt2", loops="avx2")
    assert (slower in settings) == ("avx512" in _ext.available_cpu_loops())
    on_gpu = bench.plan(["gpt2", "gpt2"], quick=False, goals=False, device="gpu")
    assert on_gpu == [Setting("gpt2"), Setting("gpt2", "sgd"), Setting("gpt2", dtype="bf16")]
    assert bench.plan(["lora"], quick=True, goals=False, device="cpu") == [Setting("lora")]


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that would have been given to workers; each answers at once."""
    jobs = []

    def answer(job: Job, report: Any) -> dict[str, Series]:
        jobs.append(job)
        return {name: Series([2e-3, 3e-3], [1e-3, 1e-3], 0, 0.0) for name in job.contenders}

    monkeypatch.setattr(bench, "run_worker", answer)
    return jobs


def test_what_does_not_fit_in_half_the_memory_is_left_out_and_said(
    no_processes: list[Job],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    needed = bytes_needed(Setting("gpt2"), ("flatstep eager",))
    assert needed < bytes_needed(Setting("gpt2"), ("mlx eager",))
    monkeypatch.setattr(bench, "usable_bytes", lambda: needed)
    assert command.main(["bench", "--device", "cpu", "--quick", "--case", "gpt2"]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert [job.contenders for job in no_processes] == [(name,) for name in FLATSTEP]
    assert "left out: mlx eager needs 4.0 GB" in output and "left out: mlx compiled" in output


def test_a_worker_that_fails_is_reported_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(job: Job, report: Any) -> dict[str, Series]:
        if job.contenders == MLX:
            raise WorkerError("exit code -11: Segmentation fault")
        return {name: Series([2e-3], [1e-3], 0, 0.0) for name in job.contenders}

    monkeypatch.setattr(bench, "run_worker", fail)
    assert command.main(["bench", "--device", "cpu", "--quick", "--case", "tiny"]) == 1
    output = capsys.readouterr().out
    assert "failed: mlx eager, mlx compiled: exit code -11: Segmentation fault" in output
    assert re.search(r"flatstep compiled +2\.00 ", output)


def test_a_worker_says_why_it_failed() -> None:
    job = Job(Setting("tiny"), ("no such",), QUICK)
    with pytest.raises(WorkerError, match="exit code 1: KeyError: 'no'"):
        run_worker(job, lambda done: None)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no terminals of this kind")
def test_on_a_terminal_a_line_shows_the_progress_and_goes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    show = bench._progress("1 of 4: a case, mlx")
    show(0.5)
    assert capsys.readouterr().err.strip() == "1 of 4: a case, mlx: 50%"
    show(None)
    assert capsys.readouterr().err.strip() == ""


def test_a_setting_has_its_threads_and_loops_and_no_peers(no_processes: list[Job]) -> None:
    command.main(["bench", "--device", "cpu", "--case", "flat"])
    alone = [job for job in no_processes if job.setting == Setting("flat", threads=1)]
    assert [job.contenders for job in alone] == [FLATSTEP]
    before = _ext.num_threads(), _ext.cpu_loops()
    try:
        set_up(Setting("gpt2", threads=1, loops="baseline"))
        assert (_ext.num_threads(), _ext.cpu_loops()) == (1, "baseline")
    finally:
        _ext.set_num_threads(before[0])
        _ext.set_cpu_loops(before[1])


def test_a_noisy_machine_and_a_smaller_state_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    steady, unsteady = Series([9e-3] * 3, [8e-3] * 3, 0, 0.0), [8e-3, 20e-3, 30e-3]
    series = {"flatstep eager": steady, "mlx eager": Series([9e-3] * 3, unsteady, 0, 0.0)}
    Result(Setting("gpt2", dtype="bf16"), series).print()
    notes = " ".join(capsys.readouterr().out.split())
    assert "peers keep their state in bf16: they move 14 bytes an element, flatstep 22" in notes
    assert "too noisy to tell" in notes


def test_a_goal_is_for_the_worse_of_eager_and_compiled_unless_it_says_which(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = {"flatstep eager": 1.0, "flatstep compiled": 1.5, "mlx compiled": 10.0}
    series = {name: Series([ratio] * 3, [1.0] * 3, 0, 0.0) for name, ratio in times.items()}
    gpt2, tiny = Setting("gpt2"), Setting("tiny")
    assert not goals.print_goals([gpt2, tiny], [Result(gpt2, series), Result(tiny, series)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "at most 1.05 of the floor 1.500 not met" in lines
    assert "eager at least 8 times as fast as mlx compiled 10.000 met" in lines
    assert "compiled at least 6 times as fast as mlx compiled 6.667 met" in lines
    assert "eager at least 2 times as fast as torch fused - not measured" in lines
    assert "at most 1% of the state 0.00% met" in lines


def test_goals_that_are_not_met_are_the_exit_status(no_processes: list[Job]) -> None:
    assert command.main(["bench", "--device", "cpu", "--quick", "--case", "flat"]) == 0
    assert command.main(["bench", "--device", "cpu", "--quick", "--case", "flat", "--goals"]) == 1


def test_a_picture_needs_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        command.main(["bench", "--plot", str(tmp_path / "bench.png")])
    assert "--plot needs matplotlib, which is not installed" in capsys.readouterr().err


@pytest.mark.skipif(why_not("gpu") is not None, reason="no GPU here")
def test_the_floor_of_a_gpu_moves_the_bytes_of_a_step() -> None:
    floor_for(Setting("tiny"), mx.Device(mx.gpu))()


def test_importing_flatstep_imports_none_of_it() -> None:
    code = "import sys, flatstep; print([m for m in sys.modules if 'bench' in m])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert output.stdout.strip() == "[]"


def test_it_needs_nothing_beyond_mlx() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['numpy', 'matplotlib', 'torch']))\n"
        "import flatstep.bench, flatstep.benchmark.profile, flatstep.benchmark.instructions"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
