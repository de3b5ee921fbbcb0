"""What the commands of ``python -m flatstep`` share: where to run, where to write, how to print."""

import argparse
import json
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .diagnosis.environment import default_device, describe, why_not

WIDTH = 80


def choose_device(
    choice: str | None, parser: argparse.ArgumentParser, what: str
) -> tuple[str, str | None]:
    """The device to run on, and what to say of it; one that was asked for has to be there."""
    name = choice or default_device()
    why = why_not(name)
    if not why:
        return name, None
    if choice:
        parser.error(f"--device {choice}: {why}")
    return "cpu", f"{what} on the CPU and not on MLX's default device: {why}"


def require_writable(
    path: Path | None, parser: argparse.ArgumentParser, option: str = "--json"
) -> None:
    """Before anything runs for long. What is there stays as it is."""
    if path:
        try:
            is_new = not path.exists()
            with path.open("a"):
                pass
            if is_new:
                path.unlink()
        except OSError as error:
            parser.error(f"{option} {path}: {error.strerror}")


def write_json(path: Path, report: Any) -> None:
    """Writes the report whole; an old one is there until then."""
    text = json.dumps(report, indent=1) + "\n"
    if path.exists() and not path.is_file():  # a pipe, say
        path.write_text(text, encoding="utf-8")
        return
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError:  # a folder that takes no new files
        path.write_text(text, encoding="utf-8")


def print_environment(note: str | None) -> dict[str, str]:
    """Prints what a report belongs to, and returns it."""
    environment = describe()
    for name, value in environment.items():
        print_row(name, value)
    if note:
        print_row("note", note)
    return environment


def print_row(name: str, value: str) -> None:
    print_wrapped(value, f"  {name:16}")


def print_wrapped(text: str, start: str = "  ") -> None:
    indent = " " * min(18, len(start) + 2)
    print(textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=indent))


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints columns under a title: the first aligned to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(["", first.ljust(widths[0]), *cells]).rstrip(), flush=True)
