"""The table of what the self-test runs: a row is a rule, its dtypes, schedule, layout and mode."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from . import formulas

LEARNING_RATE = 2.2e-3


@dataclass(frozen=True)
class Schedule:
    """A learning rate as both libraries take it, and its value in float64."""

    make: Callable[[Any], Any]
    value: Callable[[int], float]
    # Evaluated by the kernels, to an ulp of float64, and not by MLX operations.
    in_kernel: bool = True


def _joined(step: int) -> float:
    # With a jump, so that a boundary that is off by one shows.
    if step < 2:
        return formulas.linear_schedule(step, 0.0, 3e-3, 2)
    return formulas.cosine_decay(step - 2, 2e-3, 4)


SCHEDULES = {
    "constant": Schedule(lambda optim: LEARNING_RATE, lambda step: LEARNING_RATE),
    "linear_schedule": Schedule(
        lambda optim: optim.linear_schedule(1e-4, 3e-3, 4),
        lambda step: formulas.linear_schedule(step, 1e-4, 3e-3, 4),
    ),
    "cosine_decay": Schedule(
        lambda optim: optim.cosine_decay(3e-3, 5, 1e-4),
        lambda step: formulas.cosine_decay(step, 3e-3, 5, 1e-4),
    ),
    "exponential_decay": Schedule(
        lambda optim: optim.exponential_decay(3e-3, 0.9),
        lambda step: formulas.exponential_decay(step, 3e-3, 0.9),
    ),
    "step_decay": Schedule(
        lambda optim: optim.step_decay(3e-3, 0.5, 2),
        lambda step: formulas.step_decay(step, 3e-3, 0.5, 2),
    ),
    "join_schedules": Schedule(
        lambda optim: optim.join_schedules(
            [optim.linear_schedule(0.0, 3e-3, 2), optim.cosine_decay(2e-3, 4)], [2]
        ),
        _joined,
    ),
    "callable": Schedule(
        lambda optim: lambda step: 3e-3 / (1.0 + step),
        lambda step: 3e-3 / (1.0 + step),
        in_kernel=False,
    ),
    "join_schedules of a callable": Schedule(
        lambda optim: optim.join_schedules(
            [lambda step: 1e-3 * (1.0 + step), optim.exponential_decay(3e-3, 0.9)], [3]
        ),
        lambda step: (
            1e-3 * (1.0 + step) if step < 3 else formulas.exponential_decay(step - 3, 3e-3, 0.9)
        ),
        in_kernel=False,
    ),
}

# How a gradient lies in memory, or which leaves have one.
LAYOUTS = (
    "contiguous gradients",
    "transposed gradients",
    "sliced gradients",
    "broadcast gradients",
    "transposed parameters",
    "gradients for a part",
    "gradients that are the parameters",
)

Shapes = dict[str, tuple[int, ...]]
SHAPES: Shapes = {
    "one": (1,),
    "scalar": (),
    "odd.0": (63,),
    "odd.1": (65,),
    "empty": (0, 3),
    "matrix": (65, 130),
    "vector": (4097,),
}
PART = ("odd.1", "matrix")
# Tensors beyond a bucket, and work for several threads.
LARGE_SHAPES: Shapes = {
    "odd.0": (63,),
    "odd.1": (65,),
    "matrix": (1030, 1100),
    "vector": (500_001,),
}

Dtypes = tuple[str, str, str]
FLOAT32: Dtypes = ("float32", "float32", "float32")


@dataclass(frozen=True)
class Case:
    """A few steps of an optimizer over the tree of `SHAPES` or `LARGE_SHAPES`."""

    rule: str
    arguments: dict[str, Any] = field(default_factory=dict)
    dtypes: Dtypes = FLOAT32  # of parameters, gradients and state
    schedule: str = "constant"
    layout: str = LAYOUTS[0]
    compiled: bool = False
    large: bool = False
    first_step: int = 0
    steps: int = 2

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        p, g, state = self.dtypes
        dtypes = f"{p} parameters, {g} gradients, {state} state"
        if p == g == state:
            dtypes = f"all {p}"
        start = f", after {self.first_step:,} steps" if self.first_step else ""
        mode = "compiled" if self.compiled else "eager"
        rate = f"{LEARNING_RATE:g}" if self.schedule == "constant" else self.schedule
        call = ", ".join(filter(None, (rate, arguments)))
        size = ", large tensors" if self.large else ""
        return f"{self.rule}({call}), {dtypes}, {self.layout}{size}, {mode}{start}"

    @property
    def shapes(self) -> Shapes:
        return LARGE_SHAPES if self.large else SHAPES

    @property
    def slots(self) -> tuple[str, ...]:
        return ("v",) if self.rule == "SGD" else ("m", "v")

    def make(self, module: Any, **options: Any) -> Any:
        """The optimizer from flatstep or from mlx.optimizers."""
        learning_rate = SCHEDULES[self.schedule].make(module)
        return getattr(module, self.rule)(learning_rate, **self.arguments, **options)

    def dtype(self, kind: int) -> mx.Dtype:
        dtype: mx.Dtype = getattr(mx, self.dtypes[kind])
        return dtype


RULES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.01}),
    ("SGD", {"momentum": 0.9, "dampening": 0.1}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.01, "dampening": 0.3}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    ("Adam", {}),
    ("Adam", {"betas": (0.8, 0.95), "eps": 1e-3, "bias_correction": True}),
    ("AdamW", {"weight_decay": 0.1}),
    ("AdamW", {"weight_decay": 0.1, "bias_correction": True}),
]
MOMENTUM, ADAMW = RULES[3], RULES[8]

# Every kind of load and store. All 27 mixes follow for one rule.
MIXES: list[Dtypes] = [
    FLOAT32,
    ("bfloat16", "bfloat16", "float32"),
    ("float16", "float16", "float32"),
    ("float32", "bfloat16", "float32"),
    ("bfloat16", "float32", "bfloat16"),
    ("float16", "bfloat16", "float16"),
]
KINDS = ("float32", "float16", "bfloat16")


def all_cases() -> dict[str, list[Case]]:
    """The rows by their groups."""
    return {
        "rules": list(_rules()),
        "dtypes": list(_dtypes()),
        "schedules": list(_schedules()),
        "layouts": list(_layouts()),
        "large tensors": list(_large()),
    }


def _rules() -> Iterator[Case]:
    for rule in RULES:
        for dtypes in MIXES:
            yield Case(*rule, dtypes)
        yield Case(*rule, compiled=True)
    for rule in RULES[6:9:2]:
        for first_step in (1_000, 1_000_000):
            yield Case(*rule, first_step=first_step, steps=1)


def _dtypes() -> Iterator[Case]:
    for p in KINDS:
        for g in KINDS:
            for state in KINDS:
                if (p, g, state) not in MIXES:
                    yield Case(*ADAMW, (p, g, state))


def _schedules() -> Iterator[Case]:
    for name in SCHEDULES:
        for rule in (MOMENTUM, ADAMW):
            for compiled in (False, True):
                if name != "constant":
                    yield Case(*rule, schedule=name, compiled=compiled, steps=7)


def _layouts() -> Iterator[Case]:
    for layout in LAYOUTS[1:]:
        for dtypes in (FLOAT32, MIXES[1]):
            for rule in (MOMENTUM, ADAMW):
                for compiled in (False, True):
                    yield Case(*rule, dtypes, layout=layout, compiled=compiled)


def _large() -> Iterator[Case]:
    yield Case(*ADAMW, layout="transposed gradients", large=True)
    yield Case(*MOMENTUM, MIXES[1], large=True)
    yield Case(*ADAMW, MIXES[2], compiled=True, large=True)


def quick_cases() -> dict[str, list[Case]]:
    """A part of the rows that has every rule, dtype, schedule and layout."""
    cases = all_cases()
    return {
        "rules": [c for c in cases["rules"] if c.dtypes in MIXES[:2]],
        "dtypes": cases["dtypes"][::4],
        "schedules": [c for c in cases["schedules"] if (c.rule == "SGD") == c.compiled],
        "layouts": [c for c in cases["layouts"] if (c.rule == "SGD") == c.compiled],
        "large tensors": cases["large tensors"][:1],
    }
