"""The engine with its Metal backend on the CPU: built, and put where a process can import it.

The extension is csrc/ as it is, with MLX's Metal device replaced by the C++ files beside this one.
"""

import fcntl
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def build() -> Path:
    """The folder to import flatstep from. A second call compiles only what has changed."""
    folder = REPOSITORY / "build" / f"standin{SUFFIX.removesuffix('.so')}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two test runs at once, one builds
        return _build(folder)


def _build(folder: Path) -> Path:
    configure = ["cmake", "-S", str(REPOSITORY), "-B", str(folder), "-G", "Ninja"]
    configure += ["-DFLATSTEP_METAL_STANDIN=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-DCMAKE_BUILD_TYPE=Release", "--log-level=WARNING"]
    # The tools that pip installed lie beside this Python.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    site = folder / "site"
    _link_package(folder, site / "flatstep")
    return site


def _link_package(folder: Path, package: Path) -> None:
    """The package's Python files beside the extension that was just built."""
    package.mkdir(parents=True, exist_ok=True)
    python = [f for f in (REPOSITORY / "python" / "flatstep").iterdir() if f.suffix != ".so"]
    wanted = {file.name: file for file in [*python, folder / f"_ext{SUFFIX}"]}
    for old in package.iterdir():
        if old.is_symlink() and (old.name not in wanted or old.resolve() != wanted[old.name]):
            old.unlink()
    for name, file in wanted.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(file)


def environment(site: Path, scratch: Path) -> dict[str, str]:
    """Of a process that imports flatstep from `site` and has its kernels run by the simulator."""
    tests = REPOSITORY / "tests"
    paths = [site, tests / "metal", tests]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "FLATSTEP_STANDIN_SCRATCH": str(scratch),
    }
