"""The tables of what is tested: the rules, each with arguments, and the rows of the self-test.

A row is a case, its dtypes, schedule, layout and mode. The tests in the repository run over the
same cases; one row here is all that a new rule needs.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import mlx.core as mx

from .. import optimizers

# At this rate float32 holds 1 - learning_rate * weight_decay well for the decays below. Elsewhere
# the rounding of that one factor moves MLX's weights by up to 3e-5 in 1,000 steps.
LEARNING_RATE = 2.2e-3


class Case(NamedTuple):
    """An update rule, by its optimizer's name, and the arguments that it is made with."""

    rule: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.rule}({', '.join(f'{k}={v}' for k, v in self.arguments.items())})"

    @property
    def slots(self) -> tuple[str, ...]:
        """The arrays that the rule keeps for each parameter."""
        slots: tuple[str, ...] = getattr(optimizers, self.rule).slots
        return slots

    def make(self, module: Any, learning_rate: Any = LEARNING_RATE, **options: Any) -> Any:
        """The optimizer from flatstep or from mlx.optimizers."""
        return getattr(module, self.rule)(learning_rate, **self.arguments, **options)


RULES = [
    Case("SGD", {}),
    Case("SGD", {"weight_decay": 0.01}),
    Case("SGD", {"momentum": 0.9, "dampening": 0.1}),
    Case("SGD", {"momentum": 0.9, "weight_decay": 0.01, "dampening": 0.3}),
    Case("SGD", {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    Case("Adam", {}),
    Case("Adam", {"betas": (0.8, 0.95), "eps": 1e-3, "bias_correction": True}),
    Case("AdamW", {"weight_decay": 0.1}),
    Case("AdamW", {"weight_decay": 0.1, "bias_correction": True}),
    Case("Lion", {}),
    Case("Lion", {"betas": (0.8, 0.95), "weight_decay": 0.1}),
]
MOMENTUM, ADAM, ADAMW, LION = RULES[3], RULES[6], RULES[8], RULES[10]

# A schedule is written (name, *arguments), which may hold others, or is a number or a callable.
SCHEDULES: dict[str, Any] = {
    "constant": LEARNING_RATE,
    "linear_schedule": ("linear_schedule", 1e-4, 3e-3, 4),
    "cosine_decay": ("cosine_decay", 3e-3, 5, 1e-4),
    "exponential_decay": ("exponential_decay", 3e-3, 0.9),
    "step_decay": ("step_decay", 3e-3, 0.5, 2),
    # With a jump, so that a boundary that is off by one shows.
    "join_schedules": (
        "join_schedules",
        [("linear_schedule", 0.0, 3e-3, 2), ("cosine_decay", 2e-3, 4)],
        [2],
    ),
    "callable": lambda step: 3e-3 / (1.0 + step),
    "join_schedules of a callable": (
        "join_schedules",
        [lambda step: 1e-3 * (1.0 + step), ("exponential_decay", 3e-3, 0.9)],
        [3],
    ),
}


def build_schedule(module: Any, schedule: Any) -> Any:
    """A schedule that is written as above, from flatstep or from mlx.optimizers."""
    if not isinstance(schedule, tuple):
        return schedule
    name, *arguments = schedule
    if name == "join_schedules":
        arguments[0] = [build_schedule(module, part) for part in arguments[0]]
    return getattr(module, name)(*arguments)


# What is stored otherwise than in a dtype.
STORAGES: dict[str, dict[str, Any]] = {
    "as the dtypes say": {},
    "24-bit weights": {"master_weight_bits": 24},
    "32-bit weights": {"master_weight_bits": 32},
    "stochastic rounding": {"stochastic_rounding": True},
    "8-bit state": {"state_dtype": mx.int8},
    "24-bit weights, 8-bit state": {"master_weight_bits": 24, "state_dtype": mx.int8},
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
class Row:
    """A few steps of a case over the tree of `SHAPES` or `LARGE_SHAPES`."""

    case: Case
    dtypes: Dtypes = FLOAT32  # of parameters, gradients and state
    schedule: str = "constant"
    storage: str = "as the dtypes say"
    layout: str = LAYOUTS[0]
    compiled: bool = False
    large: bool = False
    first_step: int = 0
    steps: int = 2

    def __str__(self) -> str:
        p, g, state = self.dtypes
        dtypes = f"{p} parameters, {g} gradients, {state} state"
        rate = "" if self.schedule == "constant" else f", {self.schedule}"
        storage = f", {self.storage}" if STORAGES[self.storage] else ""
        start = f", after {self.first_step:,} steps" if self.first_step else ""
        return (
            f"{self.case}{rate}, {f'all {p}' if p == g == state else dtypes}{storage}, "
            f"{self.layout}{', large tensors' if self.large else ''}, "
            f"{'compiled' if self.compiled else 'eager'}{start}"
        )

    @property
    def shapes(self) -> Shapes:
        return LARGE_SHAPES if self.large else SHAPES

    def make(self, module: Any, **options: Any) -> Any:
        """The optimizer from flatstep or from mlx.optimizers."""
        rate = build_schedule(module, SCHEDULES[self.schedule])
        return self.case.make(module, rate, **options)

    def dtype(self, kind: int) -> mx.Dtype:
        dtype: mx.Dtype = getattr(mx, self.dtypes[kind])
        return dtype


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


def all_rows() -> dict[str, list[Row]]:
    """The rows by their groups."""
    two, modes = (MOMENTUM, ADAMW), (False, True)
    halves: list[Dtypes] = [("bfloat16", "bfloat16", "float32"), ("float16", "float32", "float32")]
    stored = [name for name, options in STORAGES.items() if options]
    kinds_and_modes = [*((dtypes, False) for dtypes in MIXES), (FLOAT32, True)]
    schedules = [name for name in SCHEDULES if name != "constant"]
    return {
        "rules": [
            *(Row(case, d, compiled=mode) for case, (d, mode) in product(RULES, kinds_and_modes)),
            *(Row(case, first_step=n, steps=1) for case in (ADAM, ADAMW) for n in (1000, 10**6)),
        ],
        "dtypes": [Row(ADAMW, mix) for mix in product(KINDS, KINDS, KINDS) if mix not in MIXES],
        "storages": [
            *(Row(case, halves[0], storage=s) for s, case in product(stored, (*two, LION))),
            *(Row(ADAMW, halves[1], storage=s, compiled=True, layout=LAYOUTS[1]) for s in stored),
            Row(ADAMW, halves[0], storage=stored[-1], layout="gradients for a part"),
            Row(ADAMW, storage="8-bit state", large=True, layout=LAYOUTS[1]),
        ],
        "schedules": [
            Row(case, schedule=name, compiled=mode, steps=7)
            for name, case, mode in product(schedules, two, modes)
        ],
        "layouts": [
            Row(case, dtypes, layout=layout, compiled=mode)
            for layout, dtypes, case, mode in product(LAYOUTS[1:], MIXES[:2], two, modes)
        ],
        "large tensors": [
            Row(ADAMW, layout="transposed gradients", large=True),
            Row(MOMENTUM, MIXES[1], large=True),
            Row(ADAMW, MIXES[2], compiled=True, large=True),
        ],
    }


def quick_rows() -> dict[str, list[Row]]:
    """A part of the rows that has every rule, dtype, schedule and layout."""
    rows = all_rows()
    return {
        "rules": [row for row in rows["rules"] if row.dtypes in MIXES[:2]],
        "dtypes": rows["dtypes"][::4],
        "storages": rows["storages"][::3],
        "schedules": [row for row in rows["schedules"] if (row.case == MOMENTUM) == row.compiled],
        "layouts": [row for row in rows["layouts"] if (row.case == MOMENTUM) == row.compiled],
        "large tensors": rows["large tensors"][:1],
    }
