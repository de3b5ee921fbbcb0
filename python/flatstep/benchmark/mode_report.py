"""What was measured of each mode, as tables."""

import statistics
from collections.abc import Iterable
from typing import Any

from .._command_line import print_table, print_wrapped
from .mode_jobs import MODELS, MODES

Runs = dict[str, Any]
Row = tuple[str, ...]
TIMED = {"step": "a training step", "update": "an update alone"}


def of(runs: Runs, kind: str, model: str, mode: str) -> dict[str, Any]:
    """The runs of a mode by what their keys end with: a seed, or how it was run."""
    start = f"{kind} {model} {mode} "
    return {key[len(start) :]: run for key, run in runs.items() if key.startswith(start)}


def models(runs: Runs, kind: str) -> list[str]:
    """Those with runs of this kind, the smallest first."""
    found = {key.split()[1] for key in runs if key.startswith(f"{kind} ")}
    return [model for model in MODELS if model in found]


def print_report(runs: Runs) -> None:
    for model in models(runs, "train"):
        head: Row = ("", "seeds", "validation loss", "from float32", "last 20 losses", "bytes held")
        print_table(f"Training, {model}", head, _training(runs, model))
        verdict = _within(runs, model)
        if verdict:
            print_wrapped(verdict)
    for model in models(runs, "finetune"):
        head = ("", "seeds", "weights moved", "as far as float32", "loss before", "after")
        print_table(f"Fine-tuning at 1e-5, {model}", head, _fine_tuning(runs, model))
    for model in models(runs, "cost"):
        head = ("", "held", "moved", "peak eager", "compiled", "all gradients", "extra")
        print_table(f"Bytes a parameter, {model}", head, _bytes(runs, model))
        for what in ("step", "update"):
            rows = list(_times(runs, model, what))
            if rows:
                head = ("", "eager", "compiled", "processor, eager", "compiled")
                print_table(f"Milliseconds of {TIMED[what]}, {model}", head, rows)


def _training(runs: Runs, model: str) -> Iterable[Row]:
    reference = of(runs, "train", model, "float32")
    for name, mode in MODES.items():
        found = of(runs, "train", model, name)
        if found:
            gaps = [
                run["validation"] - reference[seed]["validation"]
                for seed, run in found.items()
                if seed in reference
            ]
            yield (
                mode.label,
                str(len(found)),
                _range([run["validation"] for run in found.values()]),
                _range(gaps, "+") if gaps else "-",
                _range([run["last_losses"] for run in found.values()]),
                f"{statistics.mean(run['held'] for run in found.values()):.2f}",
            )


def _within(runs: Runs, model: str) -> str | None:
    """Whether 24 bits with int8 state end where float32 does, as far as its seeds tell."""
    ends, reference = (
        [run["validation"] for run in of(runs, "train", model, mode).values()]
        for mode in ("24-int8", "float32")
    )
    if len(ends) < 2 or len(reference) < 2:
        return None
    inside = min(reference) <= statistics.mean(ends) <= max(reference)
    return (
        f"the mean of 24 bits with int8 state, {statistics.mean(ends):.3f}, is "
        f"{'within' if inside else 'outside'} the float32 seeds' {min(reference):.3f} to "
        f"{max(reference):.3f}"
    )


def _fine_tuning(runs: Runs, model: str) -> Iterable[Row]:
    for name, mode in MODES.items():
        found = list(of(runs, "finetune", model, name).values())
        if found:
            yield (
                mode.label,
                str(len(found)),
                f"{statistics.mean(run['moved'] for run in found):.1%}",
                f"{statistics.mean(run['along_float32'] for run in found):.3f}",
                _range([run["before"] for run in found], digits=4),
                _range([run["validation"] for run in found], digits=4),
            )


def _bytes(runs: Runs, model: str) -> Iterable[Row]:
    for label, eager, compiled in _costs(runs, model):
        some = eager or compiled
        elements = some["elements"]
        yield (
            label,
            f"{some['held']:.2f}",
            f"{some['moved']:.2f}",
            *(f"{run['peak'] / elements:.2f}" if run else "-" for run in (eager, compiled)),
            f"{some['gradients_peak'] / elements:.2f}",
            f"{max(run['scratch'] for run in (eager, compiled) if run):.2%}"
            if "scratch" in some
            else "-",
        )


def _times(runs: Runs, model: str, what: str) -> Iterable[Row]:
    for label, *both in _costs(runs, model):
        if any(run and what in run for run in both):
            yield (
                label,
                *(
                    f"{1e3 * run[what][clock]:,.1f}" if run else "-"
                    for clock in ("seconds", "processor_seconds")
                    for run in both
                ),
            )


def _costs(runs: Runs, model: str) -> Iterable[tuple[str, Any, Any]]:
    for name, mode in MODES.items():
        found = of(runs, "cost", model, name)
        if found:
            yield mode.label, found.get("eager"), found.get("compiled")


def _range(values: list[float], sign: str = "", digits: int = 3) -> str:
    """The mean, and in brackets the least and the most."""
    mean, least, most = statistics.mean(values), min(values), max(values)
    form = f"{sign}.{digits}f"
    return f"{mean:{form}} [{least:{form}}, {most:{form}}]"
