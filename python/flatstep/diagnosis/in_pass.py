"""What a step does besides its rule: its bits are those of plain steps with what was done by hand.

The plain steps are held to float64 by the table of cases.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import mlx.core as mx

import flatstep

from .cases import ADAMW, MIXES, MOMENTUM, Row
from .comparison import (
    DiscrepancyError,
    Training,
    check_same,
    evaluated,
    flattened,
    joined,
    number,
    tree_of,
)

Check = Callable[[mx.Device], None]

STEPS = 2
MAX_NORM = 0.5
CLIP_VALUE = 2.0
SCALE = 0.3
MICRO_BATCHES = 3
DECAY = 0.9
RATE = 7e-3
# Relative to float64's, which is how squares are summed in float32.
NORM_TOLERANCE = 1e-6


def checks(quick: bool) -> dict[str, Check]:
    """The checks by their names."""
    modes = product((ADAMW, MOMENTUM), MIXES[:2], (False, True))
    rows = [Row(case, dtypes, compiled=compiled) for case, dtypes, compiled in modes]
    found: dict[str, Check] = {}
    for row in rows[::3] if quick else rows:
        found[f"gradients are scaled and clipped: {row}"] = partial(clips, row)
        found[f"a step that is not finite is skipped: {row}"] = partial(skips, row)
        found[f"gradients are accumulated: {row}"] = partial(accumulates, row)
        found[f"groups have their own: {row}"] = partial(has_groups, row)
        if row.dtypes == MIXES[0]:  # else the average is of weights that nobody sees
            found[f"weights are averaged: {row}"] = partial(averages, row)
    return found


def clips(row: Row, device: mx.Device) -> None:
    with mx.stream(device):
        options = {"max_grad_norm": MAX_NORM, "clip_value": CLIP_VALUE, "grad_scale": SCALE}
        training, plain = Training(row, **options), Training(row)
        for seed in range(2, 2 + STEPS):
            gradients = training.gradients(seed)
            training.step(gradients)
            scaled = {
                path: mx.clip(g.astype(mx.float32) * SCALE, -CLIP_VALUE, CLIP_VALUE)
                for path, g in gradients.items()
            }
            norm = training.optimizer.state["grad_norm"]
            with mx.stream(mx.cpu):
                exact = number(mx.sqrt(mx.sum(mx.square(joined(list(scaled.values()))))))
            if not abs(number(norm) - exact) <= NORM_TOLERANCE * exact:
                raise DiscrepancyError(
                    f"grad_norm\n  expected {exact!r} (float64)\n  got      {number(norm)!r}"
                )
            factor = mx.minimum(MAX_NORM / (norm + 1e-6), 1.0)
            plain.step({path: evaluated(g * factor) for path, g in scaled.items()})
            _check(plain, training)


def skips(row: Row, device: mx.Device) -> None:
    with mx.stream(device):
        training, plain = Training(row, skip_nonfinite=True), Training(row)
        for seed, value, at in ((2, mx.nan, 0), (3, mx.inf, -1)):
            gradients = training.gradients(seed)
            path = "vector" if at else "one"
            training.step({**gradients, path: _with(gradients[path], at, value)})
            _check(plain, training, f"after {value} in {path}")
        _expect("skipped_steps", 2, number(training.optimizer.state["skipped_steps"]))
        gradients = training.gradients(4)
        training.step(gradients)
        plain.step(gradients)
        _check(plain, training)
        _expect("step", 1, number(training.optimizer.step))


def accumulates(row: Row, device: mx.Device) -> None:
    with mx.stream(device):
        training, plain = Training(row, accumulate_steps=MICRO_BATCHES), Training(row)
        for first in range(2, 2 + STEPS * MICRO_BATCHES, MICRO_BATCHES):
            sums: dict[str, Any] = {path: mx.array(0.0) for path in row.shapes}
            for seed in range(first, first + MICRO_BATCHES):
                _check(plain, training, f"before gradients {seed - 1} were added")
                gradients = training.gradients(seed)
                training.step(gradients)
                sums = {path: sums[path] + g.astype(mx.float32) for path, g in gradients.items()}
            average = mx.array(1.0) / MICRO_BATCHES
            plain.step({path: evaluated(total * average) for path, total in sums.items()})
            _check(plain, training)


def averages(row: Row, device: mx.Device) -> None:
    with mx.stream(device):
        training = Training(row, ema=DECAY)
        expected = dict(training.leaves)
        for seed in range(2, 2 + STEPS):
            training.step(training.gradients(seed))
            for path, leaf in training.leaves.items():
                expected[path] = evaluated(DECAY * expected[path] + (1 - DECAY) * leaf)
            got = flattened(training.optimizer.ema_weights(tree_of(training.leaves)))
            for path, leaf in expected.items():
                check_same(f"the average of {path}", joined([leaf]), joined([got[path]]))


def has_groups(row: Row, device: mx.Device) -> None:
    """As an optimizer for each group would have it."""
    groups = [
        flatstep.Group("odd.*", learning_rate=RATE),
        flatstep.Group("vector", frozen=True),
        flatstep.no_decay,
    ]
    members = {
        "odd.0": {"learning_rate": RATE},
        "odd.1": {"learning_rate": RATE},
        "one": {"weight_decay": 0.0},
        "scalar": {"weight_decay": 0.0},
        "empty": {},
        "matrix": {},
    }
    with mx.stream(device):
        training = Training(row, groups=groups)
        expected = dict(training.leaves)
        arguments = {"learning_rate": number(training.optimizer.learning_rate)}
        arguments |= row.case.arguments
        optimizers = {
            path: getattr(flatstep, row.case.rule)(**{**arguments, **others})
            for path, others in members.items()
        }
        for seed in range(2, 2 + STEPS):
            gradients = training.gradients(seed)
            training.step(gradients)
            for path, optimizer in optimizers.items():
                tree = optimizer.apply_gradients({"": gradients[path]}, {"": expected[path]})
                expected[path] = evaluated(tree[""])
        for path, leaf in expected.items():
            check_same(path, joined([leaf]), joined([training.leaves[path]]))


def _check(plain: Training, training: Training, where: str = "") -> None:
    """All that both have is the same."""
    paths = plain.row.shapes
    expected, got = plain.vectors(paths), training.vectors(paths)
    for name, vector in expected.items():
        where = where or f"step {number(plain.optimizer.step):g}"
        check_same(f"{where}: {name}", vector, got[name])


def _expect(name: str, expected: float, got: float) -> None:
    if got != expected:
        raise DiscrepancyError(f"{name}\n  expected {expected!r}\n  got      {got!r}")


def _with(leaf: mx.array, at: int, value: float) -> mx.array:
    """A copy with another value in one place of a vector."""
    places = mx.arange(leaf.size) == at % leaf.size
    return evaluated(mx.where(places, mx.array(value, leaf.dtype), leaf))
