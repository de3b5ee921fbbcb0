"""Seeded mistakes: one place of the kernels' text changed, which the tests must find."""

import subprocess
import sys
from pathlib import Path


def mutated(text: str, old: str, new: str) -> str:
    """The text with `old`, which stands in it once, replaced."""
    if text.count(old) != 1:
        raise ValueError(f"{old!r} stands {text.count(old)} times in the text, not once")
    return text.replace(old, new)


def main(old: str, new: str) -> None:
    """A program that stands between a host and the simulator: what is compiled is mutated first."""
    command = sys.argv[1:]
    source = Path(next(argument for argument in command if argument.endswith(".metal")))
    source.write_text(mutated(source.read_text(), old, new))
    done = subprocess.run([sys.executable, "-m", "simulator", *command], check=False)
    sys.exit(done.returncode)
