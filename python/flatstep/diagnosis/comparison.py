"""One case of the table: steps on a device, each held against float64 and mlx.optimizers.

Each step is compared by itself, from the values that it started with. What is looked at is copied
at once, so that nothing is held and the next step may update in place as in training.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers
from mlx.utils import tree_flatten, tree_unflatten

import flatstep

from . import formulas
from .cases import LAYOUTS, PART, SCHEDULES, Case, Shapes

# What is allowed, relative to the largest term or the sum.
MLX_PARAMETERS = 1e-3  # MLX's 1 - beta^t is float32, and on a GPU as exact as the GPU's pow
MLX_STATE = 1e-5
TOLERANCES = (
    f"against float64: {formulas.PAIR_ULPS:g} ulp of the largest term, {formulas.PLAIN_ULPS:g} for "
    "half-precision parameters of Adam, and one rounding to float16 or bfloat16",
    f"against mlx.optimizers in float32: {MLX_PARAMETERS:g} of the largest term, {MLX_STATE:g} for "
    "the state",
)

Vectors = dict[str, mx.array]


class DiscrepancyError(Exception):
    """Something is not as it should be; the message says what was expected and what came."""


class Training:
    """The parameters of a case, their optimizer, and a step that is compiled or not."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.optimizer = case.make(flatstep, state_dtype=case.dtype(2))
        self.leaves = {
            path: transposed(leaf) if case.layout == "transposed parameters" else leaf
            for path, leaf in random_leaves(case.shapes, 1, case.dtype(0)).items()
        }
        self.optimizer.init(tree_of(self.leaves))
        state = self.optimizer.state
        if case.first_step:
            state["step"] = mx.array(case.first_step, mx.uint64)
        self._apply = self.optimizer.apply_gradients
        if case.compiled:
            self._apply = mx.compile(self._apply, inputs=state, outputs=state)

    def gradients(self, seed: int) -> dict[str, mx.array]:
        layout = self.case.layout
        if layout == "gradients that are the parameters":
            return dict(self.leaves)
        leaves = random_leaves(self.case.shapes, seed, self.case.dtype(1))
        if layout == "gradients for a part":
            return {path: leaves[path] for path in PART}
        return {path: laid_out(layout, leaf) for path, leaf in leaves.items()}

    def step(self, gradients: dict[str, mx.array]) -> None:
        updated = self._apply(tree_of(gradients), tree_of(self.leaves))
        self.leaves.update(flattened(updated))
        mx.eval(self.leaves, self.optimizer.state)

    def vectors(self, paths: Iterable[str]) -> Vectors:
        """The parameters and the state of these leaves, in float64, one after the other."""
        state = flattened(self.optimizer.state)
        arrays = {"p": [self.leaves[path] for path in paths]}
        for slot in self.case.slots:
            arrays[slot] = [state[f"{path}.{slot}"] for path in paths]
        return {name: joined(parts) for name, parts in arrays.items()}


def run_case(case: Case, device: mx.Device) -> None:
    """Raises DiscrepancyError when a step is not what float64 and MLX say."""
    with mx.stream(device):
        training = Training(case)
        for number in range(case.steps):
            _one_step(training, case.first_step + number, device)


def _one_step(training: Training, step: int, device: mx.Device) -> None:
    case, optimizer = training.case, training.optimizer
    gradients = training.gradients(seed=step + 2)
    covered = list(gradients)
    others = [path for path in case.shapes if path not in gradients]
    before = {**training.vectors(covered), "g": joined(list(gradients.values()))}
    untouched = training.vectors(others) if others else {}
    training.step(gradients)
    del gradients

    where = f"step {step + 1:,}"
    _check_kinds(training, where)
    _check_equal(f"{where}: step", step + 1, optimizer.step.item())
    learning_rate = number(optimizer.learning_rate)
    _check_learning_rate(case, where, step, learning_rate)
    for name, expected in untouched.items():
        check_same(
            f"{where}: {name} of leaves without gradients", expected, training.vectors(others)[name]
        )

    after = training.vectors(covered)
    theirs = _mlx_step(case, before, step, device)
    with mx.stream(mx.cpu):
        exact = formulas.one_step(case.rule, case.arguments, before, learning_rate, step + 1)
        given = {**before, "learning_rate": mx.array(learning_rate, mx.float64)}
        for name, terms in exact.items():
            shapes = {path: case.shapes[path] for path in covered}
            sums = Sums(f"{where}: {name}", shapes, terms, after[name], given)
            dtype = case.dtype(0 if name == "p" else 2)
            sums.check_float64(dtype, formulas.allowed_ulps(case.rule, name, dtype))
            sums.check_mlx(theirs[name], MLX_PARAMETERS if name == "p" else MLX_STATE, dtype)


def _check_kinds(training: Training, where: str) -> None:
    """Each leaf keeps its shape and dtype."""
    case, state = training.case, flattened(training.optimizer.state)
    for path, shape in case.shapes.items():
        kinds = {path: (training.leaves[path], case.dtype(0))}
        kinds |= {f"{path}.{s}": (state[f"{path}.{s}"], case.dtype(2)) for s in case.slots}
        for name, (array, dtype) in kinds.items():
            _check_equal(f"{where}: shape of {name}", shape, tuple(array.shape))
            _check_equal(f"{where}: dtype of {name}", dtype, array.dtype)


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


def _check_learning_rate(case: Case, where: str, step: int, got: float) -> None:
    schedule = SCHEDULES[case.schedule]
    expected = schedule.value(step)
    ulp = math.ldexp(1.0, math.frexp(expected)[1] - 24) if expected else 0.0
    allowed = ulp if schedule.in_kernel else 4 * ulp
    if not abs(got - expected) <= allowed:
        raise DiscrepancyError(
            f"{where}: learning rate of {case.schedule}({step})\n"
            f"  expected {expected!r} (float64)\n  got      {got!r}\n"
            f"  off by   {abs(got - expected):.3g}, allowed {allowed:.3g}"
        )


def _mlx_step(case: Case, before: Vectors, step: int, device: mx.Device) -> Vectors:
    """What mlx.optimizers makes of the same values in float32, on the same device."""
    with mx.stream(mx.cpu):
        inputs = {name: vector.astype(mx.float32) for name, vector in before.items()}
        mx.eval(inputs)
    optimizer = case.make(mlx.optimizers)
    optimizer.state = {
        "step": mx.array(step, mx.uint64),
        "learning_rate": optimizer.learning_rate,
        "all": {slot: inputs[slot] for slot in case.slots},
    }
    with mx.stream(device):
        updated = optimizer.apply_gradients({"all": inputs["g"]}, {"all": inputs["p"]})
        result = {"p": updated["all"], **optimizer.state["all"]}
        mx.eval(result)
    return {name: joined([array]) for name, array in result.items()}


@dataclass(frozen=True)
class Sums:
    """What a step made of one of its arrays, and the terms that it should be the sum of."""

    label: str
    shapes: Shapes  # of the leaves, which follow one another in each vector
    terms: formulas.Terms
    got: mx.array
    given: Vectors

    def check_float64(self, dtype: mx.Dtype, ulps: float) -> None:
        tolerance = formulas.tolerance(self.terms, dtype, ulps)
        self._check("float64", formulas.total(self.terms), tolerance)

    def check_mlx(self, theirs: mx.array, part: float, dtype: mx.Dtype) -> None:
        tolerance = part * formulas.largest(self.terms)
        if dtype != mx.float32:
            tolerance = tolerance + formulas.ulp(theirs, dtype)
        self._check("mlx.optimizers", theirs, tolerance)

    def _check(self, source: str, expected: mx.array, tolerance: mx.array) -> None:
        # Negated, so that a NaN fails.
        error = mx.abs(self.got - expected)
        wrong = mx.logical_not(error <= tolerance)
        count = int(number(mx.sum(wrong)))
        if not count:
            return
        at = int(number(mx.argmax(wrong)))
        worst = number(mx.max(mx.where(wrong, error / tolerance, 0.0)))
        inputs = [
            f"{name}={number(array[at] if array.ndim else array)!r}"
            for name, array in self.given.items()
        ]
        raise DiscrepancyError(
            f"{self.label}: {count} of {self.got.size} values are wrong, the first is "
            f"{self._place(at)}\n"
            f"  expected {number(expected[at])!r} ({source})\n"
            f"  got      {number(self.got[at])!r}\n"
            f"  off by   {number(error[at]):.3g}, allowed {number(tolerance[at]):.3g}; "
            f"the worst by {worst:.3g} times what is allowed\n"
            f"  given    {', '.join(inputs)}"
        )

    def _place(self, at: int) -> str:
        for path, shape in self.shapes.items():
            size = math.prod(shape)
            if at < size:
                return f"{path!r} at {at} of {size} elements"
            at -= size
        raise IndexError(at)


def random_leaves(shapes: Shapes, seed: int, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Values of either sign over four orders of magnitude, so that either term of a sum leads."""
    size = sum(math.prod(shape) for shape in shapes.values())
    with mx.stream(mx.cpu):
        exponents, signs = mx.random.split(mx.random.key(seed))
        magnitude = mx.power(10.0, mx.random.uniform(-3, 1, (size,), key=exponents))
        sign = mx.where(mx.random.bernoulli(0.5, (size,), key=signs), 1.0, -1.0)
        flat = (magnitude * sign).astype(dtype)
        leaves: dict[str, mx.array] = {}
        start = 0
        for path, shape in shapes.items():
            end = start + math.prod(shape)
            leaves[path] = mx.contiguous(flat[start:end].reshape(shape))
            start = end
        mx.eval(leaves)
    return leaves


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
