"""``python -m flatstep.benchmark.modes``: what each way to store parameters and state learns,
holds and takes.

Each run has a process of its own, and is written down as soon as it is there; what the file has
already is not run again.
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.optimizers
from rich.console import Console
from rich.progress import Progress, TaskID

from .._command_line import print_environment, print_wrapped, write_json
from .mode_jobs import FINE_TUNED, FINE_TUNED_MODELS, MODES, ONLY_COSTS, RELEASED, Job
from .mode_report import print_report
from .worker import WorkerError, ask

WORKER = "flatstep.benchmark.mode_worker"
INTERRUPTED = 130
STEPS = {"demo": 300, "large": 100, "tiny": 4}
FINE_TUNING_STEPS = 100
COST_STEPS = {"27M": 5, "large": 5, "310M": 3, "tiny": 4}
UPDATES = 7
PARTS = ("cost", "train", "finetune", "release")


def plan(
    models: list[str], parts: list[str], seeds: int, steps: int | None, rest: dict[str, Any]
) -> list[Job]:
    """All that is run, in an order that leaves something to compare whenever it ends."""
    jobs = []

    def training(kind: str, model: str, mode: str, seed: int, count: int) -> Job:
        # On a CPU compiled steps of mlx.optimizers in bfloat16 take longer, for the same result.
        compiled = MODES[mode].optim is not mlx.optimizers
        return Job(kind, model, mode, seed, compiled, count, **rest)

    def costs(model: str, mode: str, compiled: bool, updates: int) -> Job:
        count = COST_STEPS[model]
        return Job("cost", model, mode, compiled=compiled, steps=count, updates=updates, **rest)

    trained = [mode for mode in MODES if mode != ONLY_COSTS]
    quick = models == ["tiny"]
    if "cost" in parts:
        for model in models if quick else ["27M", "large"]:
            jobs += [
                costs(model, mode, compiled, UPDATES)
                for mode in MODES
                for compiled in (False, True)
            ]
    for seed in range(seeds):
        for model in models:
            count = steps or STEPS[model]
            if "train" in parts:
                jobs += [training("train", model, mode, seed, count) for mode in trained]
            if "finetune" in parts and model in FINE_TUNED_MODELS:
                count = STEPS["tiny"] if quick else FINE_TUNING_STEPS
                jobs += [training("finetune", model, mode, seed, count) for mode in FINE_TUNED]
    if "release" in parts and not quick:
        jobs += [
            costs("310M", mode, compiled, 0) for mode in RELEASED for compiled in (False, True)
        ]
    return jobs


def measure(jobs: list[Job], path: Path, report: dict[str, Any]) -> list[str]:
    """Runs what the report lacks, and writes it after each; what failed."""
    problems = []
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        whole = progress.add_task("all", total=len(jobs))
        for job in jobs:
            if not _is_there(job, report["runs"]):
                task = progress.add_task(job.key, total=1.0)
                try:
                    message = ask(WORKER, asdict(job), partial(_show, progress, task))
                    # Another one may have written meanwhile.
                    report["runs"] = {**read(path)["runs"], job.key: message["result"]}
                    write_json(path, report)
                except WorkerError as error:
                    problems.append(f"failed: {job.key}: {error}")
                progress.remove_task(task)
            progress.advance(whole)
    return problems


def _is_there(job: Job, runs: dict[str, Any]) -> bool:
    """Whether this has run, and for as many steps."""
    return job.key in runs and len(runs[job.key].get("losses", [])) in (0, job.steps)


def _show(progress: Progress, task: TaskID, done: float) -> None:
    progress.update(task, completed=done)


def read(path: Path) -> dict[str, Any]:
    """A report that was begun, or an empty one."""
    report: dict[str, Any] = {"runs": {}}
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Trains small transformers in each way to store parameters and state, and "
        "measures what a step holds and takes."
    )
    parser.add_argument(
        "--model", nargs="+", choices=["demo", "large"], default=["demo", "large"], help="to train"
    )
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=PARTS, help="what to run; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="some steps of a tiny model")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each; default: 3")
    parser.add_argument("--steps", type=int, help="of training; default: 300, and 100 of the large")
    parser.add_argument(
        "--json", metavar="PATH", type=Path, default=Path("build/modes/report.json")
    )
    parser.add_argument("--plots", metavar="FOLDER", type=Path, help="write pictures there")
    parser.add_argument(
        "--examples", metavar="FOLDER", type=Path, default=Path("examples"), help="of a checkout"
    )
    options = parser.parse_args()
    if not (options.examples / "transformer.py").exists():
        parser.error(f"--examples {options.examples}: there is no transformer.py in it")
    if options.seeds < 1 or (options.steps is not None and options.steps < 4):
        parser.error("--seeds should be at least 1, and --steps at least 4")
    folder = options.json.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    rest = {"folder": str(folder), "examples": str(options.examples.resolve())}
    models, seeds = (["tiny"], 1) if options.quick else (options.model, options.seeds)
    report = read(options.json)
    report["environment"] = print_environment(None)
    try:
        jobs = plan(models, list(options.part), seeds, options.steps, rest)
        problems = measure(jobs, options.json, report)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here")
        return INTERRUPTED
    print_report(report["runs"])
    for problem in problems:
        print_wrapped(problem)
    if options.plots:
        from .mode_plots import draw_all

        options.plots.mkdir(parents=True, exist_ok=True)
        for path in draw_all(report["runs"], options.plots):
            print(f"wrote {path}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
