"""Train one small transformer twice, with mlx.optimizers and with flatstep, and compare.

Both runs start from the same weights, see the same batches, and differ only in the module that
AdamW and its schedule come from. Prints a table, and draws the loss curves and the costs.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import flatstep
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from transformer import CONTEXT, Bytes, ByteTransformer, batches, load_text, loss_fn

OPTIMIZERS: dict[str, ModuleType] = {"mlx.optimizers": mlx.optimizers, "flatstep": flatstep}
COLORS = {"mlx.optimizers": "#E69F00", "flatstep": "#0072B2"}  # told apart by colour-blind eyes

BATCH = 2
VALIDATION_BATCH = 32
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
UNSTEADY = 3  # first steps, which compile and allocate: left out of times and peaks
STEPS_IN_TURN = 40
UPDATES_IN_TURN = 100


@dataclass
class Result:
    """What one optimizer did: losses in nats per byte, times in milliseconds, memory in MB."""

    losses: list[float] = field(default_factory=list)
    validation_loss: float = 0.0
    train_ms: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    update_ms: list[float] = field(default_factory=list)
    update_mb: list[float] = field(default_factory=list)


class Trainer:
    """A model and its optimizer, with a compiled training step and a compiled update."""

    def __init__(self, optim: ModuleType, seed: int, steps: int) -> None:
        mx.random.seed(seed)
        self.model = model = ByteTransformer()
        optimizer = make_adamw(optim, steps)
        optimizer.init(model.trainable_parameters())
        loss_and_grad = nn.value_and_grad(model, loss_fn)
        self.state = state = [model.state, optimizer.state]
        mx.eval(state)

        @partial(mx.compile, inputs=state, outputs=state)
        def step(x: mx.array, y: mx.array) -> mx.array:
            loss, grads = loss_and_grad(model, x, y)
            optimizer.update(model, grads)
            return cast(mx.array, loss)

        @partial(mx.compile, inputs=state, outputs=state)
        def update(grads: Any) -> None:
            optimizer.update(model, grads)

        self._step, self._update = step, update

    def step(self, x: mx.array, y: mx.array) -> float:
        loss = self._step(x, y)
        mx.eval(loss, self.state)
        return float(loss)

    def update(self, grads: Any) -> None:
        self._update(grads)
        mx.eval(self.state)


def make_adamw(optim: ModuleType, steps: int) -> mlx.optimizers.Optimizer:
    """AdamW under a linear warmup joined to a cosine decay, all of them from module `optim`."""
    warmup = max(1, steps // 10)
    rise = optim.linear_schedule(0.0, LEARNING_RATE, warmup)
    fall = optim.cosine_decay(LEARNING_RATE, steps - warmup, 0.1 * LEARNING_RATE)
    schedule = optim.join_schedules([rise, fall], [warmup])
    adamw: mlx.optimizers.Optimizer = optim.AdamW(
        learning_rate=schedule, weight_decay=WEIGHT_DECAY, bias_correction=True
    )
    return adamw


def timed(times: list[float], function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`, append its milliseconds to `times`, and return what it returned."""
    start = time.perf_counter()
    value = function(*args)
    times.append(1e3 * (time.perf_counter() - start))
    return value


def free_memory() -> None:
    """Let go of models no longer used, which would count in the peaks of the next."""
    gc.collect()
    mx.clear_cache()


def train(
    optim: ModuleType, text: tuple[Bytes, Bytes], seed: int, steps: int, progress: Progress
) -> Result:
    free_memory()
    trainer = Trainer(optim, seed, steps)
    result = Result()
    data = progress.track(batches(text[0], seed, steps, BATCH), steps, description=optim.__name__)
    for number, (x, y) in enumerate(data):
        if number == UNSTEADY:
            mx.reset_peak_memory()
        result.losses.append(timed(result.train_ms, trainer.step, x, y))
    result.peak_mb = mx.get_peak_memory() / 1e6
    del result.train_ms[:UNSTEADY]
    x, y = next(batches(text[1], seed, 1, VALIDATION_BATCH))
    result.validation_loss = float(loss_fn(trainer.model, x, y))
    return result


def measure_in_turn(results: dict[str, Result], text: Bytes, seed: int, progress: Progress) -> None:
    """Time steps and updates of models of their own, in turn, so that all see the same noise.

    The updates get the same evaluated gradients each time, so they cost what the optimizer costs.
    """
    free_memory()
    x, y = next(batches(text, seed, 1, BATCH))
    trainers = {name: Trainer(optim, seed, STEPS_IN_TURN) for name, optim in OPTIMIZERS.items()}
    model = trainers["flatstep"].model
    _, grads = nn.value_and_grad(model, loss_fn)(model, x, y)
    mx.eval(grads)
    for _ in progress.track(range(UNSTEADY + STEPS_IN_TURN), description="steps in turn"):
        for name, trainer in trainers.items():
            timed(results[name].step_ms, trainer.step, x, y)
    for _ in progress.track(range(UNSTEADY + UPDATES_IN_TURN), description="updates in turn"):
        for name, trainer in trainers.items():
            result = results[name]
            held = mx.get_active_memory()
            mx.reset_peak_memory()
            timed(result.update_ms, trainer.update, grads)
            result.update_mb.append((mx.get_peak_memory() - held) / 1e6)
    for result in results.values():
        for samples in (result.step_ms, result.update_ms, result.update_mb):
            del samples[:UNSTEADY]


def largest_gap(results: dict[str, Result]) -> tuple[float, int]:
    """Return the largest distance between the training curves, and the step where it is."""
    one, other = (np.array(result.losses) for result in results.values())
    gaps = np.abs(one - other)
    return float(gaps.max()), int(gaps.argmax())


def make_table(results: dict[str, Result]) -> Table:
    table = Table("", *results, "ratio")
    for column in table.columns[1:]:
        column.justify = "right"
    runs = list(results.values())
    for label, losses in {
        "last training loss (nats)": [run.losses[-1] for run in runs],
        "validation loss (nats)": [run.validation_loss for run in runs],
    }.items():
        table.add_row(label, *(f"{loss:.4f}" for loss in losses))
    for label, samples in {
        "optimizer alone (ms)": [run.update_ms for run in runs],
        "step, in turn (ms)": [run.step_ms for run in runs],
        "step, in training (ms)": [run.train_ms for run in runs],
    }.items():
        quarters = [statistics.quantiles(sample, n=4) for sample in samples]
        digits = 2 if quarters[0][1] < 20 else 0
        cells = (f"{q2:.{digits}f} [{q1:.{digits}f}, {q3:.{digits}f}]" for q1, q2, q3 in quarters)
        table.add_row(label, *map(escape, cells), f"{quarters[1][1] / quarters[0][1]:.2f}")
    for label, (first, second) in {
        "peak in training (MB)": [run.peak_mb for run in runs],
        "extra in an update (MB)": [max(run.update_mb) for run in runs],
    }.items():
        table.add_row(label, f"{first:.1f}", f"{second:.1f}", f"{second / first:.2f}")
    return table


def draw(results: dict[str, Result], path: Path) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=[1.8, 1])
    curves = figure.add_subplot(grid[:, 0])
    # A wide pale line below a thin dark one: where they agree, both can be seen.
    for (name, result), (width, alpha) in zip(
        results.items(), [(4.5, 0.55), (1.0, 1)], strict=True
    ):
        curves.plot(result.losses, color=COLORS[name], label=name, linewidth=width, alpha=alpha)
    gap, where = largest_gap(results)
    curves.set_title(f"Training loss; largest gap {gap:.1e} nats, at step {where}")
    curves.set_xlabel("step")
    curves.set_ylabel("loss (nats per byte)")
    curves.grid(alpha=0.3)
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False)

    runs = results.values()
    bars = {
        "Optimizer alone (ms, median)": [statistics.median(run.update_ms) for run in runs],
        "Whole step, in turn (ms, median)": [statistics.median(run.step_ms) for run in runs],
        "Peak memory in training (MB)": [run.peak_mb for run in runs],
    }
    for row, (title, lengths) in enumerate(bars.items()):
        axis = figure.add_subplot(grid[row, 1])
        drawn = axis.barh(list(results), lengths, color=[COLORS[name] for name in results])
        axis.bar_label(drawn, fmt="%.3g", padding=3)
        axis.set_title(title)
        axis.set_xlim(0, 1.15 * max(lengths))
        axis.xaxis.set_visible(False)
        axis.tick_params(left=False)
        axis.invert_yaxis()
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=240, help="training steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write")
    arguments = parser.parse_args()
    if arguments.steps < 2 * UNSTEADY:
        parser.error(f"--steps must be at least {2 * UNSTEADY}, not {arguments.steps}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    train_text, validation_text = text = load_text()
    size = sum(leaf.size for leaf in dict(tree_flatten(ByteTransformer().parameters())).values())
    console.print(
        f"{size / 1e6:.2f}M parameters; {len(train_text) / 1e6:.1f} MB of text, "
        f"{len(validation_text) / 1e6:.1f} MB held out; {BATCH} x {CONTEXT} bytes a step"
    )
    results: dict[str, Result] = {}
    with Progress(console=console) as progress:
        for name, optim in OPTIMIZERS.items():
            results[name] = train(optim, text, arguments.seed, arguments.steps, progress)
        measure_in_turn(results, train_text, arguments.seed, progress)

    console.print(make_table(results))
    gap, where = largest_gap(results)
    console.print(f"Largest gap between the training curves: {gap:.2e} nats, at step {where}.")
    console.print(
        f"Times are medians \\[quartiles] without the first {UNSTEADY}. In turn, both see the same "
        "noise; in training, one run follows the other, and the machine may have changed."
    )
    draw(results, arguments.output)
    console.print(f"Wrote {arguments.output}.")


if __name__ == "__main__":
    main()
