"""`python -m flatstep bench`: what it prints and writes, its exit status, and its prediction."""

import io
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
import mlx.optimizers as optim
import pytest
from flatstep import bench
from flatstep.benchmark import apple_gpu, memory, table
from flatstep.benchmark.cases import COMMAND_CASES, Setting
from flatstep.benchmark.contenders import GROUPS, bytes_needed, rule_arguments
from flatstep.benchmark.floor import LITTLE_MEMORY, floor_for
from flatstep.benchmark.measure import Budget, Series
from flatstep.benchmark.process import Job, WorkerError, run_worker
from flatstep.benchmark.results import Result
from flatstep.diagnosis.environment import why_not
from mlx.utils import tree_flatten

COMMAND = [sys.executable, "-m", "flatstep", "bench"]
TINY = [*COMMAND, "--device", "cpu", "--quick", "--case", "tiny"]
CONTENDERS = [name for names in GROUPS.values() for name in names]
ROOT = Path(__file__).parent.parent


def test_it_prints_and_writes_every_contender_beside_the_floor(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    process = subprocess.run(
        [*TINY, "--runs", "2", "--json", str(path)],
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
    assert "predicted" not in process.stdout

    report = json.loads(path.read_text())
    assert report["device"] == "cpu" and report["problems"] == []
    assert report["environment"].keys() >= {"flatstep", "mlx", "machine"}
    (result,) = report["results"]
    assert result["setting"] == {"case": "tiny", "rule": "adamw", "dtype": "fp32", "threads": None}
    assert result["step_bytes"] == 2000 * 1000 * 28
    assert list(result["series"]) == CONTENDERS
    for runs in result["series"].values():
        assert len(runs["seconds"]) == len(runs["floor_seconds"]) == 2
        assert min(runs["seconds"]) > 0 and runs["ratio"] > 0 and runs["extra_bytes"] >= 0


def test_ctrl_c_ends_it_with_a_word_and_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    process = subprocess.Popen(
        [*TINY, "--runs", "10000", "--json", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        # A job that a shell has put in the background inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(2.0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the worker gets it, too
    output, errors = process.communicate(timeout=30)
    assert process.returncode == bench.INTERRUPTED, output + errors
    assert output.endswith("interrupted\n") and "Traceback" not in errors
    assert json.loads(path.read_text())["results"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "bert"], "'bert'"),
        (["--runs", "0"], "should be from 1 to 10,000, not '0'"),
        (["--runs", "many"], "not 'many'"),
        (["--device", "tpu"], "'tpu'"),
        (["--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: No such"),
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


def test_a_full_run_has_each_case_with_both_rules_and_dtypes_once() -> None:
    settings = bench.plan(None, quick=False)
    assert len(set(settings)) == len(settings) == len(COMMAND_CASES) * 4
    assert {(s.rule, s.dtype) for s in settings} == {
        (rule, dtype) for rule in ("adamw", "sgd") for dtype in ("fp32", "bf16")
    }
    assert bench.plan(["lora", "lora"], quick=True) == [Setting("lora")]


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that would have been given to workers; each answers at once."""
    jobs = []

    def answer(module: str, job: Job, report: Any) -> dict[str, Series]:
        jobs.append(job)
        return {name: Series([2e-3, 3e-3], [1e-3, 1e-3], 0, 0.0) for name in job.contenders}

    monkeypatch.setattr(bench, "run_worker", answer)
    return jobs


def test_what_does_not_fit_in_half_the_memory_is_left_out_and_said(
    no_processes: list[Job],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    needed = bytes_needed(Setting("gpt2"), ("flatstep eager",), LITTLE_MEMORY)
    assert needed < bytes_needed(Setting("gpt2"), ("mlx eager",), LITTLE_MEMORY)
    monkeypatch.setattr(bench, "total_bytes", lambda: 2 * needed)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * needed)
    assert command.main(["bench", "--device", "cpu", "--quick", "--case", "gpt2"]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert [job.contenders for job in no_processes] == [(name,) for name in GROUPS["flatstep"]]
    assert "left out: mlx eager needs 4.0 GB" in output and "left out: mlx compiled" in output


def test_a_worker_that_fails_is_reported_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(module: str, job: Job, report: Any) -> dict[str, Series]:
        if job.contenders == GROUPS["mlx"]:
            raise WorkerError("exit code -11: Segmentation fault")
        return {name: Series([2e-3], [1e-3], 0, 0.0) for name in job.contenders}

    monkeypatch.setattr(bench, "run_worker", fail)
    assert command.main(["bench", "--device", "cpu", "--quick", "--case", "tiny"]) == 1
    output = capsys.readouterr().out
    assert "failed: mlx eager, mlx compiled: exit code -11: Segmentation fault" in output
    assert re.search(r"flatstep compiled +2\.00 ", output)


def test_a_worker_says_why_it_failed() -> None:
    job = Job(Setting("tiny"), ("no such",), Budget(None, 1, 1), LITTLE_MEMORY)
    with pytest.raises(WorkerError, match="exit code 1: KeyError: 'no'"):
        run_worker("flatstep.benchmark.worker", job, lambda done: None)


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


# ---- What a Mac's GPU prints; the model. ----


def result_of(setting: Setting, milliseconds: float) -> Result:
    runs = Series([1e-3 * milliseconds] * 3, [8e-3] * 3, 0, 0.0)
    return Result(setting, {"flatstep compiled": runs, "mlx eager": runs})


def test_a_prediction_stands_beside_the_time_and_a_time_outside_is_marked() -> None:
    setting = Setting("gpt2")
    chips = apple_gpu.chips_named("Apple M4 Max")
    assert [chip.bandwidth for chip in chips] == [410, 546]
    predictions = {
        name: apple_gpu.predict(name, setting, chips)
        for name in ("floor", "flatstep compiled", "mlx eager")
    }
    assert predictions["mlx eager"] is None
    inside, outside = (
        table.lines(result_of(setting, milliseconds), predictions) for milliseconds in (9.0, 30.0)
    )
    assert "predicted" in inside[1] and "!" not in "".join(inside)
    marked = [line for line in outside if line.endswith("!")]
    assert len(marked) == 1 and marked[0].startswith("  flatstep compiled")
    assert max(map(len, inside + outside)) <= 80


def test_a_noisy_machine_and_a_smaller_state_are_said() -> None:
    result = result_of(Setting("gpt2", dtype="bf16"), 9.0)
    result.series["mlx eager"].floor_seconds = [8e-3, 20e-3, 30e-3]
    notes = "\n".join(table.lines(result, {}))
    assert "mlx keeps its state in bf16: it moves 14 bytes an element, flatstep 22" in notes
    assert "too noisy to tell" in notes


def test_every_chip_has_a_source_and_its_times_are_ordered() -> None:
    names = [(chip.name, chip.variant) for chip in apple_gpu.CHIPS]
    assert len(set(names)) == len(names)
    assert apple_gpu.chips_named("Apple M4") != apple_gpu.chips_named("Apple M4 Max")
    assert apple_gpu.chips_named("AMD Radeon Pro") == []
    for chip in apple_gpu.CHIPS:
        assert chip.source.partition("/")[0].endswith((".com", ".org"))
        assert chip.by_apple == ("apple.com" in chip.source)
        for setting in bench.plan(None, quick=False):
            floor = apple_gpu.predict("floor", setting, [chip])
            for name in ("flatstep compiled", "mlx compiled"):
                predicted = apple_gpu.predict(name, setting, [chip])
                assert predicted and floor and 0 < predicted[0] < predicted[1]
                if name.startswith("flatstep"):
                    assert all(a > 0.99 * b for a, b in zip(predicted, floor, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_the_model_counts_the_kernels_that_mlx_compiles(rule: str, dtype: str) -> None:
    setting = Setting("tiny", rule, dtype)
    shapes = dict(list(setting.shapes.items())[:7])
    parameters = {
        path: mx.zeros(shape, mx.float32 if dtype == "fp32" else mx.bfloat16)
        for path, shape in shapes.items()
    }
    make = {"adamw": optim.AdamW, "sgd": optim.SGD}[rule]
    optimizer = make(1e-3, **rule_arguments(setting))
    optimizer.init(parameters)
    mx.eval(parameters, optimizer.state)
    update = mx.compile(optimizer.apply_gradients, inputs=optimizer.state, outputs=optimizer.state)
    kernels = kernels_of(update(parameters, parameters), optimizer.state)
    scalars = apple_gpu.mlx_compiled_work(setting, False).dispatches - len(setting.shapes)
    assert kernels == len(shapes) + scalars


def kernels_of(*trees: Any) -> int:
    """The nodes of a graph that is not evaluated yet; each of them is one kernel here."""
    text = io.StringIO()
    mx.export_to_dot(text, *(array for tree in trees for _, array in tree_flatten(tree)))
    return text.getvalue().count("shape=rectangle")


def test_the_model_counts_the_dispatches_of_the_kernel() -> None:
    header = (ROOT / "csrc" / "backend" / "metal_arguments.h").read_text()
    assert f"#define FLATSTEP_MAX_SOURCES {apple_gpu.GRADIENTS_OF_A_DISPATCH}\n" in header
    buckets = apple_gpu.flatstep_buckets(Setting("lora"))
    assert sum(buckets.values()) == 448 and len(buckets) == 15
    assert apple_gpu.flatstep_work(Setting("tiny"), False).dispatches == 2 * 50 + 1 + 1


def test_the_tables_in_the_docs_are_those_of_the_model() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "bench.apple_gpu_model"],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        check=True,
    )
    assert process.stdout.strip() in (ROOT / "docs" / "apple_gpu_model.md").read_text("utf-8")


@pytest.mark.skipif(why_not("gpu") is not None, reason="no GPU here")
def test_the_floor_of_a_gpu_moves_the_bytes_of_a_step() -> None:
    floor_for(Setting("tiny"), mx.Device(mx.gpu), LITTLE_MEMORY)()


def test_importing_flatstep_imports_none_of_it() -> None:
    code = "import sys, flatstep; print([m for m in sys.modules if 'bench' in m])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert output.stdout.strip() == "[]"


def test_it_needs_nothing_beyond_mlx() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['numpy', 'rich', 'matplotlib', 'torch']))\n"
        "import flatstep.bench, flatstep.benchmark.worker"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
