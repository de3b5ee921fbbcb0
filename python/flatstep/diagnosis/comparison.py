"""One row of the table: steps on a device, each held against float64 and mlx.optimizers.

Each step is compared by itself, from the values that it started with. What is looked at is copied
at once, so that nothing is held and the next step may update in place as in training.
"""

import math
from collections.abc import Iterable
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.optimizers
from mlx.utils import tree_flatten, tree_unflatten

import flatstep

from ..slots import SMALLEST_CODED
from . import formulas
from .cases import LAYOUTS, PART, SCHEDULES, STORAGES, Row, Shapes

# What is allowed, relative to the largest term or the sum.
MLX_PARAMETERS = 1e-3  # MLX's 1 - beta^t is float32, and on a GPU as exact as the GPU's pow
MLX_STATE = 1e-5
TOLERANCES = (
    f"against float64: {formulas.PARAMETER_ULPS:g} ulp of the largest term, "
    f"{formulas.STATE_ULPS:g} for the state, and one rounding to float16 or bfloat16",
    f"against mlx.optimizers in float32: {MLX_PARAMETERS:g} of the largest term, {MLX_STATE:g} for "
    "the state",
)

Vectors = dict[str, mx.array]


class DiscrepancyError(Exception):
    """Something is not as it should be; the message says what was expected and what came."""


class Training:
    """The parameters of a row, their optimizer, which may have more to do, and a step that is
    compiled or not."""

    def __init__(self, row: Row, **more: Any) -> None:
        self.row = row
        options = {"state_dtype": row.dtype(2), **STORAGES[row.storage], **more}
        self.optimizer = row.make(flatstep, **options)
        self.leaves = random_leaves(row.shapes, 1, row.dtype(0))
        if row.layout == "transposed parameters":
            self.leaves = {path: transposed(leaf) for path, leaf in self.leaves.items()}
        self.optimizer.init(tree_of(self.leaves))
        state = self.optimizer.state
        if row.first_step:
            state["step"] = mx.array(row.first_step, mx.uint64)
        self._apply = self.optimizer.apply_gradients
        if row.compiled:
            self._apply = mx.compile(self._apply, inputs=state, outputs=state)

    def gradients(self, seed: int) -> dict[str, mx.array]:
        layout = self.row.layout
        if layout == "gradients that are the parameters":
            return dict(self.leaves)
        leaves = random_leaves(self.row.shapes, seed, self.row.dtype(1))
        if layout == "gradients for a part":
            return {path: leaves[path] for path in PART}
        return {path: laid_out(layout, leaf) for path, leaf in leaves.items()}

    def step(self, gradients: dict[str, mx.array]) -> None:
        updated = self._apply(tree_of(gradients), tree_of(self.leaves))
        self.leaves.update(flattened(updated))
        mx.eval(self.leaves, self.optimizer.state)

    def vectors(self, paths: Iterable[str]) -> Vectors:
        """The parameters and the state of these leaves, in float64, one after the other."""
        state = flattened(self.optimizer.dequantized_state())
        weights = self.leaves
        if "master_weight_bits" in STORAGES[self.row.storage]:
            weights = flattened(self.optimizer.master_weights(tree_of(self.leaves)))
        arrays = {"p": [weights[path] for path in paths]}
        for slot in self.row.case.slots:
            arrays[slot] = [state[f"{path}.{slot}"] for path in paths]
        return {name: joined(parts) for name, parts in arrays.items()}


def run_row(row: Row, device: mx.Device) -> None:
    """Raises DiscrepancyError when a step is not what float64 and MLX say."""
    with mx.stream(device):
        training = Training(row)
        for number in range(row.steps):
            _one_step(training, row.first_step + number, device)


def _one_step(training: Training, step: int, device: mx.Device) -> None:
    row, optimizer = training.row, training.optimizer
    gradients = training.gradients(seed=step + 2)
    covered = list(gradients)
    others = [path for path in row.shapes if path not in gradients]
    before = {**training.vectors(covered), "g": joined(list(gradients.values()))}
    untouched = training.vectors(others) if others else {}
    training.step(gradients)
    del gradients

    where = f"step {step + 1:,}"
    _check_kinds(training, where)
    _check_equal(f"{where}: step", step + 1, optimizer.step.item())
    learning_rate = number(optimizer.learning_rate)
    _check_learning_rate(row.schedule, where, step, learning_rate)
    for name, old in untouched.items():
        check_same(f"{where}: {name} without gradients", old, training.vectors(others)[name])

    after = training.vectors(covered)
    theirs = _mlx_step(row, before, step, device)
    with mx.stream(mx.cpu):
        formula = formulas.RULES[row.case.rule]
        exact = formula(before, learning_rate, step + 1, **row.case.arguments)
        given = {**before, "learning_rate": mx.array(learning_rate, mx.float64)}
        shapes = {path: row.shapes[path] for path in covered}
        for name, terms in exact.items():
            bits = STORAGES[row.storage].get("master_weight_bits")
            dtype = row.dtype(0 if name == "p" else 2)
            if name == "p" and bits:
                dtype = mx.float32
            near_mlx = (MLX_PARAMETERS if name == "p" else MLX_STATE) * formulas.largest(terms)
            if dtype != mx.float32:
                near_mlx = near_mlx + formulas.ulp(theirs[name], dtype)
            near = formulas.tolerance(terms, dtype, formulas.allowed_ulps(name))
            stored = _storage_step(row, name, terms, shapes)
            near, near_mlx = near + stored, near_mlx + stored
            check = partial(_check_close, f"{where}: {name}", shapes, given, after[name])
            check("float64", formulas.total(terms), near)
            check("mlx.optimizers", theirs[name], near_mlx)


def _storage_step(row: Row, name: str, terms: formulas.Terms, shapes: Shapes) -> Any:
    """How far what is stored may be from these values, besides a rounding to nearest."""
    options, values = STORAGES[row.storage], formulas.total(terms)
    if name == "p":
        if options.get("master_weight_bits") == 24:
            return mx.abs(values) / 2.0 ** (15 if row.dtype(0) == mx.bfloat16 else 18) + 2.0**-32
        if options.get("master_weight_bits") == 32:
            return 0.0 if row.dtype(0) == mx.bfloat16 else 2.0**-40
        rounded = options.get("stochastic_rounding") and row.dtype(0) != mx.float32
        return formulas.ulp(values, row.dtype(0)) if rounded else 0.0
    if "state_dtype" not in options or not values.size:
        return 0.0
    has_sign = row.case.make(flatstep).rule().has_sign(row.case.slots.index(name))
    ends = list(accumulate(map(math.prod, shapes.values())))
    parts = mx.split(values, ends[:-1])
    steps = [
        formulas.code_step(part, has_sign) if part.size >= SMALLEST_CODED else mx.zeros_like(part)
        for part in parts
    ]
    return mx.concatenate(steps)


def _check_kinds(training: Training, where: str) -> None:
    """Each leaf keeps its shape and dtype."""
    row = training.row
    arrays = {**flattened(training.optimizer.dequantized_state()), **training.leaves}
    for path, shape in row.shapes.items():
        for name in (path, *(f"{path}.{slot}" for slot in row.case.slots)):
            kind = (shape, row.dtype(0 if name == path else 2))
            got = (tuple(arrays[name].shape), arrays[name].dtype)
            _check_equal(f"{where}: shape and dtype of {name}", kind, got)


def _check_equal(what: str, expected: Any, got: Any) -> None:
    if got != expected:
        raise DiscrepancyError(f"{what}\n  expected {expected}\n  got      {got}")


def check_same(what: str, expected: mx.array, got: mx.array) -> None:
    """Holds float64 vectors to be the same in every bit that matters."""
    with mx.stream(mx.cpu):
        differ = got != expected
        count = int(number(mx.sum(differ)))
        if count:
            at = int(number(mx.argmax(differ)))
            raise DiscrepancyError(
                f"{what}: {count} of {got.size} values differ, the first at {at}\n"
                f"  expected {number(expected[at])!r}\n  got      {number(got[at])!r}"
            )


def _check_learning_rate(schedule: str, where: str, step: int, got: float) -> None:
    expected = formulas.schedule_value(SCHEDULES[schedule], step)
    # MLX evaluates callables, with its own roundings.
    ulps = formulas.LEARNING_RATE_ULPS * (4 if "callable" in schedule else 1)
    allowed = ulps * math.ldexp(1.0, math.frexp(expected)[1] - 24) if expected else 0.0
    if not abs(got - expected) <= allowed:
        raise DiscrepancyError(
            f"{where}: learning rate of {schedule}({step})\n"
            f"  expected {expected!r} (float64)\n  got      {got!r}\n"
            f"  off by   {abs(got - expected):.3g}, allowed {allowed:.3g}"
        )


def _mlx_step(row: Row, before: Vectors, step: int, device: mx.Device) -> Vectors:
    """What mlx.optimizers makes of the same values in float32, on the same device."""
    with mx.stream(mx.cpu):
        inputs = {name: vector.astype(mx.float32) for name, vector in before.items()}
        mx.eval(inputs)
    optimizer = row.make(mlx.optimizers)
    optimizer.state = {
        "step": mx.array(step, mx.uint64),
        "learning_rate": optimizer.learning_rate,
        "all": {slot: inputs[slot] for slot in row.case.slots},
    }
    with mx.stream(device):
        updated = optimizer.apply_gradients({"all": inputs["g"]}, {"all": inputs["p"]})
        result = {"p": updated["all"], **optimizer.state["all"]}
        mx.eval(result)
    return {name: joined([array]) for name, array in result.items()}


def _check_close(
    what: str,
    shapes: Shapes,  # of the leaves, which follow one another in each vector
    given: Vectors,
    got: mx.array,
    source: str,
    expected: mx.array,
    allowed: mx.array,
) -> None:
    """Holds each element to what a source says, but for so much."""
    # Negated, so that a NaN fails.
    error = mx.abs(got - expected)
    wrong = mx.logical_not(error <= allowed)
    count = int(number(mx.sum(wrong)))
    if count:
        at = int(number(mx.argmax(wrong)))
        worst = number(mx.max(mx.where(wrong, error / allowed, 0.0)))
        values = [f"{k}={number(v[at] if v.ndim else v)!r}" for k, v in given.items()]
        raise DiscrepancyError(
            f"{what}: {count} of {got.size} values are wrong, the first is {_place(shapes, at)}\n"
            f"  expected {number(expected[at])!r} ({source})\n  got      {number(got[at])!r}\n"
            f"  off by   {number(error[at]):.3g}, allowed {number(allowed[at]):.3g}; "
            f"the worst by {worst:.3g} times what is allowed\n  given    {', '.join(values)}"
        )


def _place(shapes: Shapes, at: int) -> str:
    for path, shape in shapes.items():
        if at < math.prod(shape):
            return f"{path!r} at {at} of {math.prod(shape)} elements"
        at -= math.prod(shape)
    raise IndexError(at)


def random_leaves(shapes: Shapes, seed: int, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Values of either sign over four orders of magnitude, so that either term of a sum leads."""
    size = sum(math.prod(shape) for shape in shapes.values())
    with mx.stream(mx.cpu):
        exponents, signs = mx.random.split(mx.random.key(seed))
        magnitude = mx.power(10.0, mx.random.uniform(-3, 1, (size,), key=exponents))
        sign = mx.where(mx.random.bernoulli(0.5, (size,), key=signs), 1.0, -1.0)
        ends = list(accumulate(map(math.prod, shapes.values())))
        parts = mx.split((magnitude * sign).astype(dtype), ends[:-1])
        named = zip(shapes.items(), parts, strict=True)
        return {path: evaluated(mx.contiguous(part.reshape(s))) for (path, s), part in named}


def laid_out(layout: str, leaf: mx.array) -> mx.array:
    """An array of this shape and dtype in the layout that a row names."""
    if layout == "transposed gradients":
        return transposed(leaf)
    if layout == "sliced gradients":
        return evaluated(mx.stack([leaf, leaf + 1], axis=-1))[..., 0]
    if layout == "broadcast gradients" and leaf.size:
        return mx.broadcast_to(evaluated(leaf[0] if leaf.ndim else leaf), leaf.shape)
    assert layout in LAYOUTS
    return leaf


def transposed(leaf: mx.array) -> mx.array:
    """The same values, the first axis fastest."""
    return evaluated(mx.contiguous(leaf.T)).T


def evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


def number(scalar: mx.array) -> float:
    value: Any = scalar.item()
    return float(value)


def joined(arrays: list[mx.array]) -> mx.array:
    """All elements in a float64 vector of its own."""
    with mx.stream(mx.cpu):
        return evaluated(mx.concatenate([a.reshape(-1).astype(mx.float64) for a in arrays]))


def flattened(tree: Any) -> dict[str, mx.array]:
    flat: Any = tree_flatten(tree)
    return dict(flat)


def tree_of(leaves: dict[str, mx.array]) -> Any:
    return tree_unflatten(list(leaves.items()))
