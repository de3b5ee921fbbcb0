"""What is installed: its files, stubs, version, documentation, and what it says at import."""

import ast
import doctest
import inspect
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import flatstep
import flatstep._mlx_version as mlx_version
import flatstep.fused
import pytest
from nanobind.stubgen import StubGen

each_module = pytest.mark.parametrize(
    "module",
    [flatstep.fused, flatstep.optimizers, flatstep.schedulers],
    ids=lambda module: module.__name__,
)


@pytest.fixture
def installed() -> metadata.Distribution:
    try:
        return metadata.distribution("flatstep")
    except metadata.PackageNotFoundError:
        pytest.skip("flatstep runs from its sources here")


def test_the_version_is_the_metadatas(installed: metadata.Distribution) -> None:
    assert flatstep.__version__ == installed.version


def test_the_wheel_holds_the_package_and_no_library_of_mlx(
    installed: metadata.Distribution,
) -> None:
    names = {path.name for path in installed.files or []}
    assert {"py.typed", "_ext.pyi", "LICENSE"} <= names
    libraries = [name for name in names if {".so", ".dylib"} & set(Path(name).suffixes)]
    assert len(libraries) == 1
    assert libraries[0].startswith("_ext.")


def test_the_wheel_requires_the_mlx_that_the_import_wants(
    installed: metadata.Distribution,
) -> None:
    pins = [line for line in installed.requires or [] if line.startswith("mlx")]
    assert pins
    assert all(f"=={mlx_version.REQUIRED_MLX};" in pin.replace(" ", "") for pin in pins)


def normalized(stub: str) -> str:
    """A stub without what a formatter may change."""
    tree = ast.parse(stub)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = inspect.cleandoc(node.value)
    return ast.unparse(tree)


def test_the_stub_is_that_of_the_extension() -> None:
    generator = StubGen(flatstep._ext)
    generator.put(flatstep._ext)
    stub = Path(flatstep.__file__).with_name("_ext.pyi").read_text(encoding="utf-8")
    assert normalized(stub) == normalized(generator.get()), "run `make stubs`"


def public_members(module: ModuleType) -> list[tuple[str, Any]]:
    """The module, its own public classes and functions, and the methods of those classes."""
    found: list[tuple[str, Any]] = [(module.__name__, module)]
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
            continue
        found.append((name, value))
        for key, member in vars(value).items() if inspect.isclass(value) else ():
            if not key.startswith("_") and (
                inspect.isfunction(member) or isinstance(member, property)
            ):
                found.append((f"{name}.{key}", getattr(value, key)))
    return found


@each_module
def test_everything_public_is_documented(module: ModuleType) -> None:
    bare = [name for name, value in public_members(module) if not inspect.getdoc(value)]
    assert not bare


@each_module
def test_the_documentations_examples_run(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


def test_every_optimizer_and_schedule_has_an_example() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    for name in flatstep.__all__:
        value = getattr(flatstep, name)
        is_rule = inspect.isclass(value) and issubclass(value, flatstep.fused.FusedOptimizer)
        if is_rule or getattr(value, "__module__", "") == "flatstep.schedulers":
            assert any(test.examples for test in finder.find(value, name)), name


@pytest.mark.parametrize("found", ["0.32.3", "1.0.0", None])
def test_another_mlx_is_refused_with_the_remedy(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(mlx_version.metadata, "version", version)
    with pytest.raises(ImportError) as error:
        mlx_version.check_mlx_version()
    for part in (found or "no mlx", mlx_version.REQUIRED_MLX, "pip install"):
        assert part in str(error.value)


def test_an_empty_thread_count_means_the_default() -> None:
    environment = {**os.environ, "FLATSTEP_NUM_THREADS": ""}
    assert (
        subprocess.run([sys.executable, "-c", "import flatstep"], env=environment).returncode == 0
    )


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1025", "²"])
def test_a_bad_thread_count_is_refused_at_import(value: str) -> None:
    process = subprocess.run(
        [sys.executable, "-c", "import flatstep"],
        env={**os.environ, "FLATSTEP_NUM_THREADS": value},
        capture_output=True,
        encoding="utf-8",
    )
    assert process.returncode != 0
    message = process.stderr.splitlines()[-1]
    assert message.startswith("ValueError: FLATSTEP_NUM_THREADS")
    assert repr(value) in message
