"""What `in_pass.py` measures: steps that do more than their rule, and what does the same otherwise.

A way is made of parameters and gradients; what it gives takes a step when called.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers
from mlx.utils import tree_flatten, tree_map

import flatstep

from .floor import cpu_floor

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
MAX_NORM = 1.0
DECAY = 0.999  # of an average of weights
# Nine groups, and those in none: each bucket has leaves of most of them.
KINDS = (
    "*.norm_1.weight",
    "*.norm_1.bias",
    "*.norm_2.*",
    "*.attention.qkv.weight",
    "*.attention.*.bias",
    "*.attention.out.weight",
    "*.mlp.up.weight",
    "*.mlp.up.bias",
    "*.mlp.down.*",
)

Tree = Any  # of arrays
Step = Callable[[], None]


class Way(NamedTuple):
    """How it is made, what its times are compared with, and how long it should take at most, in
    that one's."""

    make: Callable[[Tree, Tree], Step]
    beside: str | None = None
    most: float | None = None


def adamw(compiled: bool = False, **options: Any) -> Callable[[Tree, Tree], Step]:
    """flatstep's step."""

    def make(parameters: Tree, gradients: Tree) -> Step:
        optimizer = flatstep.AdamW(
            LEARNING_RATE, bias_correction=True, weight_decay=WEIGHT_DECAY, **options
        )
        optimizer.init(parameters)
        return stepping(optimizer.apply_gradients, parameters, gradients, optimizer.state, compiled)

    return make


def peer(clips: bool = False, averages: bool = False) -> Callable[[Tree, Tree], Step]:
    """The compiled step of mlx.optimizers, with what is written around it."""

    def make(parameters: Tree, gradients: Tree) -> Step:
        optimizer = mlx.optimizers.AdamW(
            LEARNING_RATE, bias_correction=True, weight_decay=WEIGHT_DECAY
        )
        optimizer.init(parameters)
        state: dict[str, Any] = {"optimizer": optimizer.state}
        if averages:
            state["average"] = tree_map(mx.array, parameters)

        def update(gradients: Tree, parameters: Tree) -> Any:
            if clips:
                gradients, _ = mlx.optimizers.clip_grad_norm(gradients, MAX_NORM)
            parameters = optimizer.apply_gradients(gradients, parameters)
            if averages:
                state["average"] = tree_map(averaged, state["average"], parameters)
            return parameters

        return stepping(update, parameters, gradients, state, compiled=True)

    return make


def averaged(average: mx.array, parameter: mx.array) -> mx.array:
    return DECAY * average + (1 - DECAY) * parameter


def multi_optimizer(globs: Sequence[str] | None) -> Callable[[Tree, Tree], Step]:
    """The compiled step of an mlx.optimizers.MultiOptimizer; with None for no_decay."""

    def make(parameters: Tree, gradients: Tree) -> Step:
        def is_vector(path: str, weight: mx.array) -> bool:
            return weight.ndim < 2

        def matches(glob: str, path: str, weight: mx.array) -> bool:
            return fnmatchcase(path, glob)

        filters = [is_vector] if globs is None else [partial(matches, glob) for glob in globs]
        decays = [WEIGHT_DECAY] * (len(filters) + 1) if globs else [0.0, WEIGHT_DECAY]
        parts = [
            mlx.optimizers.AdamW(LEARNING_RATE, bias_correction=True, weight_decay=decay)
            for decay in decays
        ]
        optimizer = mlx.optimizers.MultiOptimizer(parts, filters)
        optimizer.init(parameters)
        return stepping(optimizer.apply_gradients, parameters, gradients, optimizer.state, True)

    return make


def stepping(
    update: Callable[..., Any], parameters: Tree, gradients: Tree, state: Any, compiled: bool
) -> Step:
    if compiled:
        update = mx.compile(update, inputs=state, outputs=state)
    held = [parameters]

    def step() -> None:
        held.append(update(gradients, held.pop()))
        mx.eval(held, state)

    return step


def accumulating(compiled: bool = False, **options: Any) -> Callable[[Tree, Tree], Step]:
    def make(parameters: Tree, gradients: Tree) -> Step:
        optimizer = flatstep.AdamW(LEARNING_RATE, **{"accumulate_dtype": mx.float32, **options})
        optimizer.init(parameters)
        state, add = optimizer.state, optimizer.accumulate
        if compiled:
            add = mx.compile(add, inputs=state, outputs=state)

        def step() -> None:
            add(gradients)
            mx.eval(state)

        return step

    return make


def tree_map_sum(parameters: Tree, gradients: Tree) -> Step:
    """As a training loop has it, compiled."""

    @mx.compile
    def add(sums: Tree, gradients: Tree) -> Any:
        return tree_map(mx.add, sums, gradients)

    held = [gradients]

    def step() -> None:
        held.append(add(held.pop(), gradients))
        mx.eval(held)

    return step


def floor(slots: int) -> Callable[[Tree, Tree], Step]:
    """The memory of a step with so many arrays of state, moved with next to no arithmetic."""

    def make(parameters: Tree, gradients: Tree) -> Step:
        leaves: Any = tree_flatten(parameters)
        return cpu_floor(sum(leaf.size for _, leaf in leaves), slots)

    return make


def groups(globs: Sequence[str]) -> list[flatstep.Group]:
    return [flatstep.Group(glob, lr_scale=1 / (n + 1)) for n, glob in enumerate(globs)]


# By title, then by name. What is in a set is measured in turns.
SETS: dict[str, dict[str, Way]] = {
    "clip": {
        "AdamW": Way(adamw()),
        "max_grad_norm": Way(adamw(max_grad_norm=MAX_NORM), "AdamW", 1.2),
        "mlx.optimizers, compiled": Way(peer(), "AdamW"),
        "the same with clip_grad_norm": Way(peer(clips=True), "mlx.optimizers, compiled"),
    },
    "clip, compiled": {
        "AdamW": Way(adamw(compiled=True)),
        "max_grad_norm": Way(adamw(compiled=True, max_grad_norm=MAX_NORM), "AdamW", 1.2),
    },
    "scale and skip": {
        "AdamW": Way(adamw()),
        "clip_value": Way(adamw(clip_value=1e-3), "AdamW"),
        "grad_scale": Way(adamw(grad_scale=0.5), "AdamW"),
        "skip_nonfinite": Way(adamw(skip_nonfinite=True), "AdamW"),
        "DynamicLossScale, max_grad_norm": Way(
            adamw(grad_scale=flatstep.DynamicLossScale(1.0), max_grad_norm=MAX_NORM), "AdamW"
        ),
    },
    "groups": {
        "AdamW": Way(adamw()),
        "2 groups, no_decay": Way(adamw(groups=[flatstep.no_decay]), "AdamW", 1.01),
        "10 groups": Way(adamw(groups=groups(KINDS)), "AdamW", 1.03),
        "MultiOptimizer of 2, compiled": Way(multi_optimizer(None), "AdamW"),
        "MultiOptimizer of 10, compiled": Way(multi_optimizer(KINDS), "AdamW"),
    },
    "groups, compiled": {
        "AdamW": Way(adamw(compiled=True)),
        "2 groups, no_decay": Way(adamw(compiled=True, groups=[flatstep.no_decay]), "AdamW", 1.01),
        "10 groups": Way(adamw(compiled=True, groups=groups(KINDS)), "AdamW", 1.03),
    },
    "accumulate": {
        "floor, 12 bytes": Way(floor(0)),
        "accumulate": Way(accumulating(), "floor, 12 bytes", 1.1),
        "accumulate, compiled": Way(accumulating(compiled=True), "floor, 12 bytes", 1.1),
        "accumulate in bfloat16": Way(
            accumulating(accumulate_dtype=mx.bfloat16), "floor, 12 bytes"
        ),
        "tree_map, compiled": Way(tree_map_sum, "floor, 12 bytes"),
    },
    "average": {
        "floor, 28 bytes": Way(floor(2)),
        "AdamW": Way(adamw(), "floor, 28 bytes"),
        "floor, 36 bytes": Way(floor(3)),
        "ema": Way(adamw(ema=DECAY), "floor, 36 bytes", 1.05),
        "ema in bfloat16": Way(adamw(ema=DECAY, ema_dtype=mx.bfloat16), "AdamW"),
        "mlx.optimizers and tree_map, compiled": Way(peer(averages=True), "AdamW"),
    },
}
