"""``python -m flatstep doctor``: is this installation right, on this machine, and how fast?

It describes the machine, tests the results against float64 and MLX on each device, and measures a
step against a copy. The last line says PASS or FAIL, and so does the exit status.
"""

import argparse
import dataclasses
import textwrap
import time
import traceback
from pathlib import Path
from typing import Any

from ._command_line import (
    WIDTH,
    choose_device,
    print_environment,
    print_row,
    print_wrapped,
    require_writable,
    write_json,
)
from .diagnosis import selftest, speed
from .diagnosis.comparison import TOLERANCES
from .diagnosis.environment import DEVICES, why_not

SHOWN = 3  # of the wrong checks of a group

Report = dict[str, Any]


def add_command(commands: Any) -> None:
    """Adds ``doctor`` to an argparse parser's subcommands."""
    parser = commands.add_parser(
        "doctor",
        help="test this installation on this machine",
        description="Tests this installation on this machine, and measures its speed.",
        epilog="The exit status is 0 if all checks passed, 1 if not. "
        "A bug report is best made with --json.",
    )
    parser.add_argument(
        "--device",
        choices=[*DEVICES, "all"],
        help="where to test; all: every device that works here "
        "(default: MLX's default device if this build can run there, else the CPU)",
    )
    parser.add_argument("--quick", action="store_true", help="a part of the checks, a small buffer")
    parser.add_argument("--json", metavar="PATH", type=Path, help="write the report as JSON, too")
    parser.add_argument("-v", "--verbose", action="store_true", help="list all checks")
    parser.set_defaults(run=lambda options: run(options, parser))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Runs the command; returns the exit status."""
    names, note = _choose_devices(options.device, parser)
    require_writable(options.json, parser)
    print("flatstep doctor")
    environment = print_environment(note)
    devices = {
        name: {"checks": _test(name, options), **_measure(name, options.quick)} for name in names
    }
    verdict, summary = _verdict(devices)
    if options.json:
        report = {
            "verdict": verdict,
            "summary": summary,
            "environment": environment,
            "note": note,
            "quick": options.quick,
            "tolerances": TOLERANCES,
            "devices": devices,
        }
        write_json(options.json, report)
    print(f"\n{verdict}: {summary}")
    return 0 if verdict == "PASS" else 1


def _choose_devices(
    choice: str | None, parser: argparse.ArgumentParser
) -> tuple[list[str], str | None]:
    """The devices to test, and what to say about the choice."""
    if choice == "all":
        reasons = {name: why_not(name) for name in DEVICES}
        left_out = [f"no tests on the {n.upper()}: {why}" for n, why in reasons.items() if why]
        return [name for name, why in reasons.items() if not why], "; ".join(left_out) or None
    name, note = choose_device(choice, parser, "tests run")
    return [name], note


def _test(device: str, options: argparse.Namespace) -> list[Report]:
    """Runs all checks on a device, printing as it goes."""
    print(f"\nResults on the {device.upper()}")
    for line in TOLERANCES:
        print_wrapped(line)
    start = time.perf_counter()
    checks = []
    for group, members in selftest.groups(options.quick).items():
        # Before it runs, so that a crash shows where it was.
        print(f"  {group:16}", end="\n" if options.verbose else "", flush=True)
        results = []
        for result in selftest.run(members, DEVICES[device]):
            results.append(result)
            if options.verbose:
                mark = "wrong" if result.problem else "ok"
                print_wrapped(f"{mark:6}{result.name} ({result.seconds * 1e3:.0f} ms)", "    ")
        _print_outcome(group, results, options.verbose)
        checks += [{"group": group, **dataclasses.asdict(result)} for result in results]
    print_row("seconds", f"{time.perf_counter() - start:.1f}")
    return checks


def _print_outcome(group: str, results: list[selftest.Result], verbose: bool) -> None:
    wrong = [result for result in results if result.problem]
    label = f"  {group:16}" if verbose else ""
    print(f"{label}{len(results) - len(wrong)} of {len(results)} are right", flush=True)
    shown = wrong if verbose else wrong[:SHOWN]
    for result in shown:
        print()
        print_wrapped(f"wrong: {result.name}", "    ")
        _print_problem(str(result.problem))
    if len(wrong) > len(shown):
        print(f"\n    and {len(wrong) - len(shown)} more; -v and --json give them all")
    if wrong:
        print()


def _measure(device: str, quick: bool) -> Report:
    print(f"\nSpeed on the {device.upper()}", flush=True)
    try:
        measured = speed.measure(DEVICES[device], quick)
    except Exception:
        problem = traceback.format_exc().rstrip()
        print("    wrong:")
        _print_problem(problem)
        return {"speed": None, "speed_problem": problem}
    print_wrapped(
        f"one float32 array of {measured.elements / 1e6:.1f} million, in place; each moves "
        f"{measured.bytes / 1e6:.0f} MB; medians of {measured.rounds} runs in turns"
    )
    for label, seconds in measured.seconds.items():
        rate = measured.bytes / seconds / 1e9
        spread = f"middle half of the runs: {measured.spread[label]:.0%} wide"
        print(f"  {label:18}{seconds * 1e3:7.2f} ms {rate:7.1f} GB/s  {spread}")
    print_row("share", f"{measured.share:.0%} of the fastest copy's speed")
    held = f"above the {measured.held_bytes / 1e6:.0f} MB held"
    print_row("peak memory", f"{measured.extra_bytes / 1e6:.1f} MB {held}")
    if measured.is_noisy:
        print_wrapped(
            f"The machine was busy (load {measured.load:.1f}) or its times scattered: take these "
            "figures for rough ones."
        )
    figures = {**dataclasses.asdict(measured), "share": measured.share, "noisy": measured.is_noisy}
    return {"speed": figures, "speed_problem": None}


def _verdict(devices: dict[str, Report]) -> tuple[str, str]:
    """PASS or FAIL, and what passed or where it failed."""
    count, wrong = 0, []
    for name, device in devices.items():
        count += len(device["checks"]) + 1
        wrong += [f"{c['group']} on the {name.upper()}" for c in device["checks"] if c["problem"]]
        if device["speed_problem"]:
            wrong.append(f"speed on the {name.upper()}")
    if not wrong:
        where = " and ".join(f"the {name.upper()}" for name in devices)
        return "PASS", f"all {count} checks on {where}"
    parts = [f"{wrong.count(place)} of {place}" for place in dict.fromkeys(wrong)]
    return "FAIL", f"{len(wrong)} of {count} checks: {', '.join(parts)}"


def _print_problem(problem: str) -> None:
    for line in problem.splitlines():
        text = line.lstrip()
        indent = " " * (6 + len(line) - len(text))
        print(textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent + " " * 9))
