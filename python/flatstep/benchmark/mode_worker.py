"""A process that trains one model in one mode, or measures what a step of it costs."""

import faulthandler
import gc
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .mode_jobs import (
    FINE_TUNED_MODELS,
    FINE_TUNING_RATE,
    MODELS,
    MODES,
    WEIGHT_DECAY,
    Job,
    schedule,
)
from .worker import write

VALIDATION_BATCH = 64
LAST = 20  # training losses that a mean is taken of
UNSTEADY = 2  # first steps, which compile and move the parameters to flat memory
COST_TOKENS = 16
FINE_TUNING_BATCHES = 1000  # is added to the seed: other batches than in training

Report = Callable[[float], None]
Result = dict[str, Any]


class Trainer:
    """A model, its optimizer, and a training step; the model's weights come from the seed."""

    def __init__(self, job: Job, transformer: Any, learning_rate: Any, decay: float) -> None:
        self.transformer, self.mode = transformer, MODES[job.mode]
        self.batch = MODELS[job.model].batch
        mx.random.seed(job.seed)
        self.model = MODELS[job.model].make(transformer)
        if job.kind == "finetune":
            self.model.load_weights(weights_file(job))
            self.model.set_dtype(mx.bfloat16)
        self.model.set_dtype(self.mode.dtype)
        self.optimizer = self.mode.make(learning_rate, decay, job.seed)
        self.optimizer.init(self.model.trainable_parameters())
        self.state = [self.model.state, self.optimizer.state]
        mx.eval(self.state)
        self.loss_and_grad = nn.value_and_grad(self.model, transformer.loss_fn)
        self._step, self._update = self._whole_step, self._only_update
        if job.compiled:
            compiled = partial(mx.compile, inputs=self.state, outputs=self.state)
            self._step, self._update = compiled(self._step), compiled(self._update)

    def _whole_step(self, x: mx.array, y: mx.array) -> mx.array:
        loss, gradients = self.loss_and_grad(self.model, x, y)
        self.optimizer.update(self.model, gradients)
        return cast(mx.array, loss)

    def _only_update(self, gradients: Any) -> None:
        self.optimizer.update(self.model, gradients)

    # One evaluation each. Nothing here holds gradients while it runs.

    def step(self, x: mx.array, y: mx.array) -> float:
        loss = self._step(x, y)
        mx.eval(loss, self.model.state, self.optimizer.state)
        return float(loss)

    def update(self, gradients: Any) -> None:
        self._update(gradients)
        mx.eval(self.model.state, self.optimizer.state)

    def run(self, text: Any, seed: int, steps: int, report: Report) -> Result:
        """Trains; what the losses were."""
        losses, seconds = [], []
        for x, y in self.transformer.batches(text, seed, steps, self.batch):
            start = time.perf_counter()
            losses.append(self.step(x, y))
            seconds.append(time.perf_counter() - start)
            report(len(losses) / steps)
        last = losses[-LAST:]
        return {
            "losses": [round(loss, 4) for loss in losses],
            "last_losses": statistics.mean(last),
            "step_seconds": statistics.median(seconds[UNSTEADY:]),
        }

    def validation(self, text: Any) -> float:
        """The loss on windows that are the same for every seed and mode."""
        x, y = next(self.transformer.batches(text, 0, 1, VALIDATION_BATCH))
        return float(self.transformer.loss_fn(self.model, x, y))

    def weights(self) -> dict[str, mx.array]:
        """What is trained, in float32."""
        tree = self.model.parameters()
        if hasattr(self.optimizer, "master_weights"):
            tree = self.optimizer.master_weights(tree)
        return {path: leaf.astype(mx.float32) for path, leaf in leaves(tree).items()}

    def elements(self) -> int:
        return sum(leaf.size for leaf in leaves(self.model.parameters()).values())


def leaves(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree by their paths."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def weights_file(job: Job, what: str = "trained") -> str:
    return str(Path(job.folder) / f"{what}-{job.model}-{job.seed}.safetensors")


def held() -> int:
    """Bytes that MLX holds."""
    gc.collect()
    return mx.get_active_memory()


def train(job: Job, transformer: Any, report: Report) -> Result:
    mode, text = MODES[job.mode], transformer.load_text()
    trainer = Trainer(job, transformer, schedule(mode.optim, mode.rate, job.steps), WEIGHT_DECAY)
    # Matrix products in bfloat16 are slow on a CPU: they are in float32 in every mode.
    trainer.model.activations = mx.float32
    result = trainer.run(text[0], job.seed, job.steps, report)
    if job.mode == "float32" and job.model in FINE_TUNED_MODELS:
        trainer.model.save_weights(weights_file(job))
    return {
        **result,
        "held": held() / trainer.elements(),
        "validation": trainer.validation(text[1]),
    }


def fine_tune(job: Job, transformer: Any, report: Report) -> Result:
    """Goes on at a small rate from weights that were trained in float32, rounded to bfloat16."""
    text = transformer.load_text()
    trainer = Trainer(job, transformer, FINE_TUNING_RATE, 0.0)
    trainer.model.activations = mx.float32
    before, start = trainer.validation(text[1]), dense(trainer.weights())
    result = trainer.run(text[0], FINE_TUNING_BATCHES + job.seed, job.steps, report)
    steps = {path: leaf - start[path] for path, leaf in dense(trainer.weights()).items()}
    mx.eval(steps)
    reference_file = weights_file(job, "moved")
    if job.mode == "float32":
        mx.save_safetensors(reference_file, steps)
    reference = mx.load(reference_file)
    assert isinstance(reference, dict)
    along = sum(float(mx.sum(steps[path] * reference[path])) for path in steps)
    whole = sum(float(mx.sum(leaf * leaf)) for leaf in reference.values())
    moved = sum(int(mx.sum(leaf != 0)) for leaf in steps.values())
    return {
        **result,
        "before": before,
        "validation": trainer.validation(text[1]),
        "moved": moved / sum(leaf.size for leaf in steps.values()),
        "along_float32": along / whole,
    }


def dense(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Those that every step has a gradient for: not the tables, whose rows are seen rarely."""
    return {path: leaf for path, leaf in weights.items() if not path.startswith(("byte", "pair"))}


def cost(job: Job, transformer: Any, report: Report) -> Result:
    """Bytes held, peaks and times of whole steps and of updates alone, of a short batch."""
    trainer = Trainer(job, transformer, 1e-4, WEIGHT_DECAY)
    trainer.model.activations = trainer.mode.dtype
    tokens = mx.random.randint(0, 256, (1, COST_TOKENS + 1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    mx.eval(x, y)
    peaks, times = [], []
    for number in range(job.steps):
        mx.reset_peak_memory()
        times.append(timed(partial(trainer.step, x, y)))
        peaks.append(mx.get_peak_memory())
        report((number + 1) / (job.steps + 2))
    bytes_held = held()
    mx.reset_peak_memory()
    loss, gradients = trainer.loss_and_grad(trainer.model, x, y)
    mx.eval(loss, gradients)
    result = {
        "elements": trainer.elements(),
        "held": bytes_held / trainer.elements(),
        # What it has to read and write: all it holds, and the gradient.
        "moved": 2 * bytes_held / trainer.elements() + trainer.mode.dtype.size,
        "peak": max(peaks[UNSTEADY:]),
        "gradients_peak": mx.get_peak_memory(),
        "step": summary(times[UNSTEADY:]),
    }
    scratch, times = [], []
    for _ in range(job.updates):
        before = held()
        mx.reset_peak_memory()
        times.append(timed(partial(trainer.update, gradients)))
        scratch.append(mx.get_peak_memory() - before)
    if times:
        result["scratch"] = max(scratch[UNSTEADY:]) / bytes_held
        result["update"] = summary(times[UNSTEADY:])
    return result


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that pass, and those of all threads' processor time."""
    wall, used = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - used


def summary(times: list[tuple[float, float]]) -> dict[str, float]:
    """The least that passed, and the median of the processor time, which others disturb less."""
    walls, used = zip(*times, strict=True)
    return {"seconds": min(walls), "processor_seconds": statistics.median(used)}


KINDS: dict[str, Callable[[Job, Any, Report], Result]] = {
    "train": train,
    "finetune": fine_tune,
    "cost": cost,
}


def serve() -> None:
    job = Job(**json.load(sys.stdin))
    sys.path.insert(0, job.examples)
    transformer = importlib.import_module("transformer")
    write({"result": KINDS[job.kind](job, transformer, lambda done: write({"done": done}))})


if __name__ == "__main__":
    faulthandler.enable()
    serve()
