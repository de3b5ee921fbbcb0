"""csrc/backend/metal.cpp itself, compiled against a stand-in for MLX's Metal device.

Each test here is a process in which every update takes the Metal backend: bindings, dispatch
tables, memory decisions, and the kernels' own text, run by the simulator. Most run the tests that
the CPU backend passes, as they are; standin_plugin.py says which of them `make test` leaves out.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import standin

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="here the GPU itself runs it")

TESTS = standin.REPOSITORY / "tests"

# What is not run here of the CPU backend's tests, and why.
LEFT_OUT = {
    "test_blow_up.py": "takes long; test_stored_kernels.py says that codes are the CPU's",
    "test_chance.py": "takes long; test_stored_kernels.py says that keys are the CPU's",
    "test_bench_command.py": "measures",
    "test_bench_tools.py": "is about the benchmarks",
    "test_bits.py": "compares the CPU's instruction sets and threads",
    "test_distributed.py": "starts processes that have no simulator",
    "test_doctor.py": "starts processes that have no simulator",
    "test_environment.py": "is about what is imported",
    "test_memory_estimate.py": "is about sizes",
    "test_modes.py": "is about the benchmarks",
    "test_memory.py": "measures peaks, and the simulator needs memory of its own",
    "test_out_of_memory.py": "starts processes that have no simulator",
    "test_package.py": "is about what is installed",
    "test_thread_pool.py": "is about the CPU's threads",
    "test_torch.py": "takes long, and says what test_parity.py says",
}
SELECTION = {
    "test_accumulated_state.py": ["-k", "not a_peak"],  # measures, in processes of its own
    "test_eight_bit_state.py": ["-k", "not bytes_held"],  # takes long
    "test_operands.py": ["-k", "one_buffer"],  # the rest is about what the CPU holds
    "test_parity.py": ["-k", "not a_thousand_steps"],  # takes long
    "test_pass_misuse.py": ["-k", "not leaves_the_sums_in_place"],  # docs/metal.md, on waiting
    # The rest forks.
    "test_threads_and_forks.py": ["-k", "two_threads or moves_between or main_one"],
}
ENGINE = sorted(path.name for path in TESTS.glob("test_*.py") if path.name not in LEFT_OUT)

# What a kernel that does not fit the host fails, the shortest first.
FITTING = [
    "on_standin.py::test_state_of_two_dtypes_held_state_and_a_part_of_the_leaves",
    "on_standin.py::test_a_gpu_that_runs_fewer_threads_gives_the_same",
    "on_standin_passes.py::test_a_part_of_the_leaves_with_everything_at_once",
    "on_standin_passes.py::test_any_number_of_groups_each_with_its_rate",
    "on_standin.py::test_a_hundred_steps_agree_with_the_cpu_backend",
]
# Kernels that no longer fit the host: what one of the two was told and the other was not.
MISFITS = {
    "states swapped": (
        "state0 [[buffer(FLATSTEP_STATE)]],\n    device char* state1 "
        "[[buffer(FLATSTEP_STATE + 1)]]",
        "state0 [[buffer(FLATSTEP_STATE + 1)]],\n    device char* state1 "
        "[[buffer(FLATSTEP_STATE)]]",
    ),
    "an index off by one": (
        "#define FLATSTEP_FIRST_SOURCE 12",
        "#define FLATSTEP_FIRST_SOURCE 11",
    ),
    "indices of advance swapped": (
        "#define FLATSTEP_ADVANCE_CONSTANTS 16\n#define FLATSTEP_ADVANCE_ARGUMENTS 17",
        "#define FLATSTEP_ADVANCE_CONSTANTS 17\n#define FLATSTEP_ADVANCE_ARGUMENTS 16",
    ),
    "average and sums swapped": (
        "#define FLATSTEP_EMA 6\n#define FLATSTEP_ACCUMULATED 7",
        "#define FLATSTEP_EMA 7\n#define FLATSTEP_ACCUMULATED 6",
    ),
    "scalars of a step in another order": (
        "SCALAR(sum_of_squares, float, float32)       \\\n  SCALAR(grad_norm, float",
        "SCALAR(grad_norm, float, float32) \\\n  SCALAR(sum_of_squares, float",
    ),
    "settings in another order": (
        "  float max_grad_norm;\n  float clip_value;\n",
        "  float clip_value;\n  float max_grad_norm;\n",
    ),
    "fields of a group swapped": (
        "  uint32_t source;\n  float scale;\n",
        "  float scale;\n  uint32_t source;\n",
    ),
    "another number for sums as a source": (
        "#define FLATSTEP_SUM_AS_SOURCE FLATSTEP_MAX_SOURCES",
        "#define FLATSTEP_SUM_AS_SOURCE FLATSTEP_MAX_SOURCES + 1",
    ),
    "fields of the segment swapped": (
        "  uint32_t source;       // its number\n  uint32_t group;        // of parameters\n",
        "  uint32_t group;\n  uint32_t source;\n",
    ),
    "a field of the segment gone": ("  uint32_t num_dimensions;\n", ""),
    "hyperparameters in another order": (
        "FLATSTEP_HYPERPARAMETERS(weight_decay, beta1, beta2, eps, bias_correction)",
        "FLATSTEP_HYPERPARAMETERS(weight_decay, beta2, beta1, eps, bias_correction)",
    ),
    "another form of a number": (
        "  float value;\n  float one_minus;",
        "  float one_minus;\n  float value;",
    ),
    "another number of pieces": (
        "#define FLATSTEP_MAX_SCHEDULE_PIECES 24",
        "#define FLATSTEP_MAX_SCHEDULE_PIECES 25",
    ),
    "another number of threads": ("#define FLATSTEP_THREADS 256", "#define FLATSTEP_THREADS 128"),
    "another run": ("#define FLATSTEP_RUN 4", "#define FLATSTEP_RUN 2"),
    "another tile": ("#define FLATSTEP_TILE_ROWS 32", "#define FLATSTEP_TILE_ROWS 16"),
    "read in place through another buffer": ("dispatch.p_in_place ? p_out : p_in", "p_in"),
    "storages in another order": (
        "  STORAGE(Float16, float16)        \\\n  STORAGE(Bfloat16, bfloat16)",
        "  STORAGE(Bfloat16, bfloat16)      \\\n  STORAGE(Float16, float16)",
    ),
}


PASS = {
    "the host": [f"tests/metal/on_standin{part}.py" for part in ("", "_layouts", "_queues")],
    "storages": ["tests/metal/on_standin_storages.py"],
    "passes": ["tests/metal/on_standin_passes.py"],
    **{file: [f"tests/{file}", *SELECTION.get(file, [])] for file in ENGINE},
}


@pytest.fixture(scope="session")
def site() -> Path:
    return standin.build()


def run(
    arguments: list[str], variables: dict[str, str], config: pytest.Config
) -> subprocess.CompletedProcess[str]:
    """The tests in a process of their own, as exhaustive as this one."""
    command = [sys.executable, "-m", "pytest", "-p", "standin_plugin", "-q", "-x", *arguments]
    command += ["-m", config.option.markexpr]
    return subprocess.run(
        command, cwd=standin.REPOSITORY, env=variables, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("job", PASS)
def test_tests_pass_with_every_update_through_the_metal_backend(
    job: str, site: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    done = run(PASS[job], standin.environment(site, tmp_path), pytestconfig)
    shown = done.stdout
    if len(shown) > 9000:  # the first failure and the summary
        shown = f"{shown[:6000]}\n...\n{shown[-2000:]}"
    assert done.returncode == 0, f"{shown}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("job", MISFITS)
def test_a_kernel_that_does_not_fit_the_host_is_found(
    job: str, site: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    mutate = tmp_path / "mutate.py"
    mutate.write_text(f"from mutants import main\nmain(*{MISFITS[job]!r})\n")
    variables = standin.environment(site, tmp_path)
    variables["FLATSTEP_STANDIN_COMPILER"] = f"{sys.executable} {mutate} build --no-check"
    done = run([f"tests/metal/{test}" for test in FITTING], variables, pytestconfig)
    assert done.returncode == 1, done.stdout[-4000:]
    assert "1 failed" in done.stdout or "1 error" in done.stdout
    assert "stands 0 times" not in done.stdout
