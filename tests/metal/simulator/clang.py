"""Which clang compiles the kernels: $FLATSTEP_CLANG, a clang on PATH, or the one in ziglang.

`python -m simulator.clang` prints the command, or fails if there is none, so that a Makefile can
ask whether the package `ziglang`, which holds a clang and needs no root, has to be installed.
"""

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys

OLDEST = 17  # the first that computes with __bf16


class ClangNotFoundError(Exception):
    """There is no clang that can compile the kernels."""


def _version(command: list[str]) -> int:
    try:
        result = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=False
        )
    except OSError:
        return 0
    found = re.search(r"clang version (\d+)", result.stdout)
    # Apple's numbers are those of Xcode, and its clang is not asked to compile for OpenCL.
    return int(found[1]) if found and "Apple" not in result.stdout else 0


def _on_path() -> list[str] | None:
    """The newest clang on PATH, if it is new enough."""
    names = {"clang"}
    for folder in os.get_exec_path():
        if os.path.isdir(folder):
            names.update(n for n in os.listdir(folder) if re.fullmatch(r"clang-\d+", n))
    found = [[path] for name in sorted(names) if (path := shutil.which(name))]
    best = max(found, key=_version, default=[])
    return best if best and _version(best) >= OLDEST else None


@functools.cache
def _find(wanted: str | None) -> tuple[str, ...]:
    if wanted:
        command = shlex.split(wanted)
        if _version(command) < OLDEST:
            raise ClangNotFoundError(
                f"FLATSTEP_CLANG={wanted} is no clang of version {OLDEST} or later."
            )
        return tuple(command)
    if installed := _on_path():
        return tuple(installed)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "clang")
    raise ClangNotFoundError(
        f"The Metal kernels are compiled by clang {OLDEST} or later: install one, name one in "
        "FLATSTEP_CLANG, or `pip install ziglang`, which holds one."
    )


def find_clang() -> list[str]:
    """The command that starts clang. Raises ClangNotFoundError."""
    return list(_find(os.environ.get("FLATSTEP_CLANG")))


if __name__ == "__main__":
    try:
        print(shlex.join(find_clang()))
    except ClangNotFoundError as error:
        sys.exit(str(error))
