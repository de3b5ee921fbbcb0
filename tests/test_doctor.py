"""`python -m flatstep doctor`: what it prints, its exit status, its JSON, and that it can fail."""

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import flatstep
import flatstep.__main__ as command
import mlx.core as mx
import pytest
from flatstep import _command_line, _ext, optimizers, stepping
from flatstep.diagnosis import cases, comparison, environment, formulas, in_pass, selftest, speed
from flatstep.diagnosis.comparison import run_row
from flatstep.fused import FusedOptimizer
from flatstep.step_options import Pass

has_gpu = environment.why_not("gpu") is None

CPU = mx.Device(mx.cpu)


def run_doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flatstep", "doctor", *arguments],
        capture_output=True,
        encoding="utf-8",
    )


def change_rules(monkeypatch: pytest.MonkeyPatch, **changes: float) -> None:
    """Every rule gets hyperparameters that are off by so much."""
    make_rule = stepping.make_rule

    def changed(name: str, **values: float) -> _ext.Rule:
        return make_rule(name, **{**values, **{k: values[k] + changes[k] for k in changes}})

    monkeypatch.setattr(stepping, "make_rule", changed)


def verdicts(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(("PASS", "FAIL"))]


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> dict[str, selftest.Check]:
    """Doctor with a table of one case, which a test may add to, and no measurements."""
    row = cases.Row(cases.ADAMW)
    checks: dict[str, selftest.Check] = {str(row): lambda device: run_row(row, device)}
    monkeypatch.setattr(selftest, "groups", lambda quick: {"rules": checks})

    def measure(device: mx.Device, quick: bool) -> speed.Speed:
        seconds = {speed.STEP: 2.0, "copy": 1.0}
        return speed.Speed(1, 28, 1, seconds, dict.fromkeys(seconds, 0.0), 16, 0, 0.0)

    monkeypatch.setattr(speed, "measure", measure)
    return checks


def test_a_sound_installation_passes_and_the_json_says_what_was_printed(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    process = run_doctor("--quick", "--device", "cpu", "--json", str(path))
    assert process.returncode == 0, process.stdout + process.stderr
    assert verdicts(process.stdout) == process.stdout.splitlines()[-1:]
    assert process.stdout.splitlines()[-1].startswith("PASS: all ")
    assert max(map(len, process.stdout.splitlines())) <= 80

    report = json.loads(path.read_text())
    assert report["verdict"] == "PASS" and report["summary"] in process.stdout
    assert report["environment"].keys() >= {"flatstep", "mlx", "Python", "system", "CPU backend"}
    checks = report["devices"]["cpu"]["checks"]
    assert f"all {len(checks) + 1} checks" in report["summary"]
    assert {check["group"] for check in checks} == set(selftest.groups(quick=True))
    assert all(check["name"] and check["problem"] is None for check in checks)
    figures = report["devices"]["cpu"]["speed"]
    assert figures["share"] > 0 and figures["extra_bytes"] < 0.1 * figures["held_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "--device", "tpu"], "'tpu'"),
        (["doctor", "--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: No such"),
        (["doctor", "--fast"], "--fast"),
        ([], "COMMAND"),
    ],
)
def test_bad_arguments_are_refused_with_their_names(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(has_gpu, reason="this build runs on the GPU here")
def test_a_gpu_that_cannot_be_used_is_refused_with_the_reason() -> None:
    process = run_doctor("--device", "gpu")
    assert process.returncode == 2
    assert not process.stdout
    assert f"--device gpu: {environment.why_not('gpu')}" in process.stderr


def test_all_devices_are_those_that_work(
    few_checks: dict[str, selftest.Check], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["doctor", "--device", "all"]) == 0
    output = capsys.readouterr().out
    assert "Results on the CPU" in output
    assert ("Results on the GPU" in output) == has_gpu
    assert has_gpu or "no tests on the GPU" in output


def test_a_default_device_without_a_backend_gives_way_to_the_cpu(
    few_checks: dict[str, selftest.Check],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_command_line, "default_device", lambda: "gpu")
    monkeypatch.setattr(_ext, "gpu_backend", lambda: None)
    assert command.main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "not on MLX's default" in output and "no GPU backend" in output
    assert verdicts(output) == ["PASS: all 2 checks on the CPU"]


def test_a_wrong_result_is_reported_with_what_was_run_expected_and_got(
    few_checks: dict[str, selftest.Check],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    change_rules(monkeypatch, beta1=1e-6)
    path = tmp_path / "report.json"
    assert command.main(["doctor", "--device", "cpu", "--json", str(path)]) == 1
    output = " ".join(capsys.readouterr().out.split())
    for part in (
        "wrong: AdamW(weight_decay=0.1, bias_correction=True), all float32",
        "step 1: m: ",
        "values are wrong, the first is 'one' at 0",
        "expected ",
        "(float64) got ",
        "off by ",
        "given p=",
        "FAIL: 1 of 2 checks: 1 of rules on the CPU",
    ):
        assert part in output
    report = json.loads(path.read_text())
    assert report["verdict"] == "FAIL"
    assert "expected" in report["devices"]["cpu"]["checks"][0]["problem"]


HALF_ADAM = cases.Row(cases.ADAM, cases.MIXES[2], large=True)
HALF_ADAMW = cases.Row(cases.ADAMW, cases.MIXES[2], large=True)


def test_a_half_precision_parameter_near_its_update_is_held_to_what_float32_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two ulp of the parameter and half a unit of float16's subnormals off, and a little.
    p, g = 0.0021152496337890625, 0.001934051513671875

    def leaves(shapes: cases.Shapes, seed: int, dtype: mx.Dtype) -> dict[str, mx.array]:
        value = p if seed == 1 else g
        return {path: mx.full(shape, value, dtype) for path, shape in shapes.items()}

    monkeypatch.setattr(comparison, "random_leaves", leaves)
    run_row(dataclasses.replace(HALF_ADAMW, large=False, steps=1), CPU)


@pytest.mark.parametrize(
    ("row", "change"),
    [(HALF_ADAM, {"eps": 1e-6}), (HALF_ADAMW, {"weight_decay": 1e-3 / cases.LEARNING_RATE})],
    ids=["eps", "1 - learning_rate weight_decay"],
)
def test_a_constant_that_is_off_by_a_thousandth_shows_in_a_half_precision_parameter(
    row: cases.Row, change: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_row(row, CPU)
    change_rules(monkeypatch, **change)
    with pytest.raises(comparison.DiscrepancyError, match=": p: "):
        run_row(row, CPU)


@pytest.mark.parametrize(
    ("check", "name", "changed"),
    [
        (in_pass.clips, "max_grad_norm", 1.001 * in_pass.MAX_NORM),
        (in_pass.clips, "clip_value", None),
        (in_pass.skips, "skip_nonfinite", False),
        (in_pass.accumulates, "accumulate_steps", in_pass.MICRO_BATCHES + 1),
        (in_pass.averages, "ema", in_pass.DECAY - 1e-6),
        (in_pass.averages, "ema_start", 1),
    ],
)
def test_what_a_step_does_otherwise_than_it_was_told_is_found(
    check: Any, name: str, changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Pass.of

    def other(options: Any) -> Pass:
        given = told(options)
        return given if given == Pass() else given._replace(**{name: changed})

    row = cases.Row(cases.ADAMW)
    check(row, CPU)
    monkeypatch.setattr(Pass, "of", other)
    with pytest.raises((comparison.DiscrepancyError, KeyError)):
        check(row, CPU)


def test_a_parameter_in_another_group_than_it_was_told_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = cases.Row(cases.ADAMW)
    in_pass.has_groups(row, CPU)
    monkeypatch.setattr(flatstep.Group, "matches", lambda self, path, weight: weight.ndim == 0)
    with pytest.raises(comparison.DiscrepancyError):
        in_pass.has_groups(row, CPU)


def test_an_exception_fails_its_check_and_the_next_one_runs(
    few_checks: dict[str, selftest.Check],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("[metal] no such kernel")

    sound = dict(few_checks)
    few_checks.clear()
    few_checks.update({"broken": broken, **sound})
    monkeypatch.setattr(speed, "measure", broken)
    assert command.main(["doctor", "--device", "cpu", "-v"]) == 1
    output = capsys.readouterr().out
    assert output.count("RuntimeError: [metal] no such kernel") == 2
    assert "wrong broken" in output and "1 of 2 are right" in output
    summary = "FAIL: 2 of 3 checks: 1 of rules on the CPU, 1 of speed on the CPU"
    assert verdicts(output) == [summary]


@pytest.mark.parametrize("quick", [False, True])
def test_the_table_has_every_rule_dtype_schedule_and_layout(quick: bool) -> None:
    table = cases.quick_rows() if quick else cases.all_rows()
    rows = [row for group in table.values() for row in group]
    assert len({str(row) for row in rows}) == len(rows)
    assert {str(row.case) for row in rows} == set(map(str, cases.RULES))
    for kind in range(3):
        assert {row.dtypes[kind] for row in rows} == {"float32", "float16", "bfloat16"}
    for compiled in (False, True):
        some = [row for row in rows if row.compiled == compiled]
        assert {row.layout for row in some} == set(cases.LAYOUTS)
        assert {row.schedule for row in some} == set(cases.SCHEDULES)


def test_every_optimizer_has_a_formula_and_cases() -> None:
    names = {
        name
        for name, value in vars(optimizers).items()
        if inspect.isclass(value)
        and issubclass(value, FusedOptimizer)
        and value.slots
        and value.default_state_dtype == "float32"
    }
    assert names == formulas.RULES.keys() == {case.rule for case in cases.RULES}


def test_importing_flatstep_imports_no_doctor() -> None:
    code = "import sys, flatstep; print([m for m in sys.modules if m.startswith('flatstep.d')])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert output.stdout.strip() == "[]"
