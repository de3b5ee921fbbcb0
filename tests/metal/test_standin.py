"""csrc/backend/metal.cpp itself, compiled against a stand-in for MLX's Metal device.

Each test here is a process in which every update takes the Metal backend: bindings, dispatch
tables, memory decisions, and the kernels' own text, run by the simulator. Most run the tests that
the CPU backend passes, as they are.
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
    "test_bench_command.py": "measures",
    "test_bench_tools.py": "is about the benchmarks",
    "test_bits.py": "compares the CPU's instruction sets and threads",
    "test_doctor.py": "starts processes that have no simulator",
    "test_memory.py": "measures peaks, and the simulator needs memory of its own",
    "test_package.py": "is about what is installed",
    "test_torch.py": "takes long, and says what test_parity.py says",
}
SELECTION = {
    "test_parity.py": "not a_thousand_steps",  # takes long
    "test_threads_and_forks.py": "two_threads or moves_between or main_one",  # the rest forks
}
ENGINE = sorted(path.name for path in TESTS.glob("test_*.py") if path.name not in LEFT_OUT)

# Kernels that no longer fit the host: what one of the two was told and the other was not.
MISFITS = {
    "m and v swapped": (
        "#define FLATSTEP_M 2\n#define FLATSTEP_V 3",
        "#define FLATSTEP_M 3\n#define FLATSTEP_V 2",
    ),
    "an index off by one": (
        "#define FLATSTEP_FIRST_SOURCE 10",
        "#define FLATSTEP_FIRST_SOURCE 11",
    ),
    "fields of the segment swapped": (
        "uint64_t p_offset;      // in elements, like all that follow\n  uint64_t state_offset;",
        "uint64_t state_offset;\n  uint64_t p_offset;",
    ),
    "a field of the segment gone": ("  uint32_t num_dimensions;\n", ""),
    "hyperparameters in another order": (
        "  Pair beta1;\n  Pair one_minus_beta1;\n",
        "  Pair one_minus_beta1;\n  Pair beta1;\n",
    ),
    "a smaller hyperparameter": ("  uint32_t nesterov;\n", ""),
    "another order of the step's arguments": (
        "  Hyperparameters hyperparameters;\n  uint32_t reads_step;",
        "  uint32_t reads_step;\n  Hyperparameters hyperparameters;",
    ),
    "another number of pieces": (
        "#define FLATSTEP_MAX_SCHEDULE_PIECES 24",
        "#define FLATSTEP_MAX_SCHEDULE_PIECES 25",
    ),
    "another number of threads": ("#define FLATSTEP_THREADS 256", "#define FLATSTEP_THREADS 128"),
    "another run": ("#define FLATSTEP_RUN 4", "#define FLATSTEP_RUN 2"),
    "another tile": ("#define FLATSTEP_TILE 32", "#define FLATSTEP_TILE 16"),
    "other numbers for the dtypes": (
        "SOURCE_FLOAT16 = 1,\n  SOURCE_BFLOAT16 = 2,",
        "SOURCE_BFLOAT16 = 1,\n  SOURCE_FLOAT16 = 2,",
    ),
}


@pytest.fixture(scope="session")
def site() -> Path:
    """The stand-in's extension, built."""
    return standin.build()


def run_tests(
    site: Path, scratch: Path, arguments: list[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "standin_plugin", "-q", *arguments]
    variables = {**standin.environment(site, scratch), **environment}
    return subprocess.run(
        command, cwd=standin.REPOSITORY, env=variables, capture_output=True, text=True, check=False
    )


def assert_passed(done: subprocess.CompletedProcess[str]) -> None:
    shown = done.stdout
    if len(shown) > 9000:  # the first failure and the summary
        shown = f"{shown[:6000]}\n...\n{shown[-2000:]}"
    assert done.returncode == 0, f"{shown}\n{done.stderr[-2000:]}"


def test_the_host_dispatches_as_it_should(site: Path, tmp_path: Path) -> None:
    assert_passed(run_tests(site, tmp_path, ["tests/metal/on_standin.py", "-x"]))


@pytest.mark.parametrize("file", ENGINE)
def test_the_engines_tests_pass_on_the_metal_backend(file: str, site: Path, tmp_path: Path) -> None:
    selection = ["-k", SELECTION[file]] if file in SELECTION else []
    assert_passed(run_tests(site, tmp_path, [f"tests/{file}", "-x", *selection]))


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_kernel_that_does_not_fit_the_host_is_found(
    misfit: str, site: Path, tmp_path: Path
) -> None:
    old, new = MISFITS[misfit]
    mutate = tmp_path / "mutate.py"
    mutate.write_text(f"from mutants import main\nmain({old!r}, {new!r})\n")
    done = run_tests(
        site,
        tmp_path,
        ["tests/metal/on_standin.py", "-x", "-k", "a_hundred_steps or a_gpu_that_runs"],
        FLATSTEP_STANDIN_COMPILER=f"{sys.executable} {mutate} build --no-check",
    )
    assert done.returncode == 1, done.stdout[-4000:]
    assert "stands 0 times" not in done.stdout
