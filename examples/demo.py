"""Train one small transformer with mlx.optimizers and with flatstep, and compare.

Both runs start from the same weights, see the same batches, and differ only in the module that
AdamW and its schedule come from. Then both clip the norm of gradients, accumulate them over some
batches, and keep an average of the weights: with mlx.optimizers the loop does it, with flatstep the
optimizer. Prints tables, and draws the loss curves and the costs.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import flatstep
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten, tree_map
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
MAX_GRAD_NORM = 1.0
MICRO_BATCHES = 4
EMA = 0.95
UNSTEADY = 3  # first steps, which compile and allocate: left out of times and peaks
MICRO_BATCHES_IN_TURN = 40
UPDATES_IN_TURN = 100

Batches = Sequence[tuple[mx.array, mx.array]]


class Part(NamedTuple):
    """What both runs do: in how many batches a step gets its gradients, and the rest with them."""

    title: str
    micro_batches: int
    does_more: bool


PARTS = (
    Part("AdamW", 1, does_more=False),
    Part(f"AdamW of {MICRO_BATCHES} batches, clipped, averaged", MICRO_BATCHES, does_more=True),
)


@dataclass
class Result:
    """What one optimizer did: losses in nats per byte, times in milliseconds, memory in MB."""

    losses: list[float] = field(default_factory=list)
    validation_loss: float = 0.0
    average_loss: float = 0.0  # the validation loss of the average of the weights
    train_ms: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    update_ms: list[float] = field(default_factory=list)
    update_mb: list[float] = field(default_factory=list)


class Trainer:
    """A model and its optimizer, with a compiled training step and a compiled update."""

    def __init__(self, part: Part, optim: ModuleType, seed: int, steps: int) -> None:
        mx.random.seed(seed)
        self.micro_batches = part.micro_batches
        self.model = model = ByteTransformer()
        in_loop = part.does_more and optim is mlx.optimizers
        options: dict[str, Any] = {}
        if part.does_more and not in_loop:
            options = {"max_grad_norm": MAX_GRAD_NORM, "ema": EMA}
            options["accumulate_steps"] = part.micro_batches
        self.optimizer = optimizer = make_adamw(optim, steps, **options)
        optimizer.init(model.trainable_parameters())
        loss_and_grad = nn.value_and_grad(model, loss_fn)
        self.average = {"weights": tree_map(mx.array, model.parameters())} if in_loop else {}
        self.state = state = [model.state, optimizer.state, self.average]
        mx.eval(state)

        def use(grads: Any, before: Any, is_last: bool) -> Any:
            """Takes a step, or gives the gradients that the loop has to keep for it."""
            if not in_loop:
                optimizer.update(model, grads)
                return None
            if before is not None:
                grads = tree_map(mx.add, grads, before)
            if not is_last:
                return grads
            grads = tree_map(lambda g: g / part.micro_batches, grads)
            grads, _ = mlx.optimizers.clip_grad_norm(grads, MAX_GRAD_NORM)
            optimizer.update(model, grads)
            average, weights = self.average["weights"], model.parameters()
            self.average["weights"] = tree_map(
                lambda a, w: EMA * a + (1 - EMA) * w, average, weights
            )
            return None

        def step(x: mx.array, y: mx.array, before: Any, is_last: bool) -> Any:
            loss, grads = loss_and_grad(model, x, y)
            return loss, use(grads, before, is_last)

        compiled = partial(mx.compile, inputs=state, outputs=state)
        self._step, self._use = compiled(step), compiled(use)

    def step(self, batches: Batches) -> float:
        losses, grads = [], None
        for number, (x, y) in enumerate(batches):
            loss, grads = self._step(x, y, grads, number == len(batches) - 1)
            mx.eval(loss, grads, self.state)
            losses.append(float(loss))
        return statistics.mean(losses)

    def update(self, grads: Any) -> None:
        """What a step does besides its gradients, which are the same for each of its batches."""
        kept = None
        for number in range(self.micro_batches):
            kept = self._use(grads, kept, number == self.micro_batches - 1)
            mx.eval(kept, self.state)

    def use_average(self) -> None:
        """For good."""
        weights = self.average.get("weights")
        self.model.update(weights or cast(Any, self.optimizer).ema_weights(self.model))


def make_adamw(optim: ModuleType, steps: int, **options: Any) -> mlx.optimizers.Optimizer:
    """AdamW under a linear warmup joined to a cosine decay, all of them from module `optim`."""
    warmup = max(1, steps // 10)
    rise = optim.linear_schedule(0.0, LEARNING_RATE, warmup)
    fall = optim.cosine_decay(LEARNING_RATE, steps - warmup, 0.1 * LEARNING_RATE)
    schedule = optim.join_schedules([rise, fall], [warmup])
    adamw: mlx.optimizers.Optimizer = optim.AdamW(
        learning_rate=schedule, weight_decay=WEIGHT_DECAY, bias_correction=True, **options
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


def batches_of_steps(text: Bytes, seed: int, steps: int, micro_batches: int) -> Iterator[Batches]:
    one_by_one = batches(text, seed, steps * micro_batches, BATCH)
    for _ in range(steps):
        yield [next(one_by_one) for _ in range(micro_batches)]


def train(
    part: Part,
    optim: ModuleType,
    text: tuple[Bytes, Bytes],
    seed: int,
    steps: int,
    progress: Progress,
) -> Result:
    free_memory()
    trainer = Trainer(part, optim, seed, steps)
    result = Result()
    data = batches_of_steps(text[0], seed, steps, part.micro_batches)
    for number, step in enumerate(progress.track(data, steps, description=optim.__name__)):
        if number == UNSTEADY:
            mx.reset_peak_memory()
        result.losses.append(timed(result.train_ms, trainer.step, step))
    result.peak_mb = mx.get_peak_memory() / 1e6
    del result.train_ms[:UNSTEADY]
    x, y = next(batches(text[1], seed, 1, VALIDATION_BATCH))
    result.validation_loss = float(loss_fn(trainer.model, x, y))
    if part.does_more:
        trainer.use_average()
        result.average_loss = float(loss_fn(trainer.model, x, y))
    return result


def measure_in_turn(
    part: Part, results: dict[str, Result], text: Bytes, seed: int, progress: Progress
) -> None:
    """Time steps and updates of models of their own, in turn, so that all see the same noise.

    The updates get the same evaluated gradients each time, so they cost what the optimizer costs.
    """
    free_memory()
    steps = MICRO_BATCHES_IN_TURN // part.micro_batches
    step = next(batches_of_steps(text, seed, 1, part.micro_batches))
    trainers = {name: Trainer(part, optim, seed, steps) for name, optim in OPTIMIZERS.items()}
    model = trainers["flatstep"].model
    _, grads = nn.value_and_grad(model, loss_fn)(model, *step[0])
    mx.eval(grads)
    for _ in progress.track(range(UNSTEADY + steps), description="steps in turn"):
        for name, trainer in trainers.items():
            timed(results[name].step_ms, trainer.step, step)
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


def make_table(part: Part, results: dict[str, Result]) -> Table:
    table = Table(part.title, *results, "ratio")
    for column in table.columns[1:]:
        column.justify = "right"
    runs = list(results.values())
    losses = {
        "last training loss (nats)": [run.losses[-1] for run in runs],
        "validation loss (nats)": [run.validation_loss for run in runs],
    }
    if part.does_more:
        losses["the same of the average"] = [run.average_loss for run in runs]
    for label, values in losses.items():
        table.add_row(label, *(f"{loss:.4f}" for loss in values))
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


def draw(parts: dict[Part, dict[str, Result]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.6 * len(parts)), layout="constrained")
    rows = cast(Any, figure.subfigures(len(parts), 1, squeeze=False, hspace=0.05))
    for (part, results), (row,) in zip(parts.items(), rows, strict=True):
        draw_part(part, results, row)
    figure.savefig(path, dpi=150)


def draw_part(part: Part, results: dict[str, Result], figure: Any) -> None:
    figure.suptitle(part.title, weight="bold")
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
        axis.bar_label(
            drawn,
            fmt=lambda length: f"{length:.3g}" if length < 1000 else f"{length:,.0f}",
            padding=3,
        )
        axis.set_title(title)
        axis.set_xlim(0, 1.15 * max(lengths))
        axis.xaxis.set_visible(False)
        axis.tick_params(left=False)
        axis.invert_yaxis()
        axis.spines[["top", "right", "bottom"]].set_visible(False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=240, help="batches that each run trains on")
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
    parts: dict[Part, dict[str, Result]] = {}
    with Progress(console=console) as progress:
        for part in PARTS:
            results = parts[part] = {}
            steps = max(2 * UNSTEADY, arguments.steps // part.micro_batches)
            for name, optim in OPTIMIZERS.items():
                results[name] = train(part, optim, text, arguments.seed, steps, progress)
            measure_in_turn(part, results, train_text, arguments.seed, progress)

    for part, results in parts.items():
        console.print(make_table(part, results))
        gap, where = largest_gap(results)
        console.print(f"Largest gap between the training curves: {gap:.2e} nats, at step {where}.")
    console.print(
        f"Times are medians \\[quartiles] without the first {UNSTEADY}. In turn, both see the same "
        "noise; in training, one run follows the other, and the machine may have changed."
    )
    draw(parts, arguments.output)
    console.print(f"Wrote {arguments.output}.")


if __name__ == "__main__":
    main()
