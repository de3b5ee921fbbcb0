"""Instructions that callgrind counts, by phase, thread and library."""

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

# One thread, the same hashes and heap each time: what is left to chance is the kernel's scheduling.
REPEATABLE = {"FLATSTEP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
NAME = re.compile(r"(?:\((\d+)\))?\s*(.*)")


class CallgrindError(Exception):
    pass


@dataclass
class Part:
    """What one thread executed between two dumps: instructions by library."""

    thread: int
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.instructions.total()


def count(command: list[str], dump_at: str, profile: Path, root: Path) -> tuple[list[Part], str]:
    """Run a command in callgrind; return its parts, and its output.

    Args:
        command: a program and its arguments.
        dump_at: a C function; each call of it ends a part of the thread that calls.
        profile: the file that callgrind writes.
        root: the folder to run in.
    """
    callgrind = [
        "valgrind",
        "--tool=callgrind",
        f"--callgrind-out-file={profile}",
        f"--dump-before={dump_at}",
        "--separate-threads=yes",
        "--combine-dumps=yes",
        "--dump-line=no",
        # Threads take turns, not as the machine wakes them, which decides who frees what.
        "--fair-sched=yes",
    ]
    done = subprocess.run(
        [*callgrind, *command],
        cwd=root,
        env={**os.environ, **REPEATABLE},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise CallgrindError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    with profile.open() as lines:
        return parse(lines), done.stdout


def parse(lines: Iterable[str]) -> list[Part]:
    """The parts of a profile in callgrind's format, with one event and one position a line.

    https://valgrind.org/docs/manual/cl-format.html
    """
    parts: list[Part] = []
    libraries: dict[str, str] = {}
    library = ""
    is_callee = False  # the next line of costs is what a call took, which the callee's lines say
    for line in lines:
        if line.startswith("thread:"):
            parts.append(Part(int(line.split()[1])))
        elif line.startswith(("ob=", "cob=")):
            name = _full_name(line.partition("=")[2].strip(), libraries)
            library = name if line.startswith("ob=") else library
        elif line.startswith("calls="):
            is_callee = True
        elif line[:1] in "0123456789+-*" and line.strip():
            if not is_callee:
                parts[-1].instructions[library] += int(line.split()[1])
            is_callee = False
    return parts


def _full_name(text: str, names: dict[str, str]) -> str:
    """A name as it stands, or `(number) name` where it comes first and `(number)` from then on."""
    match = NAME.fullmatch(text)
    assert match
    number, name = match.groups()
    if number is None:
        return text
    if name:
        names[number] = name
    return names[number]
