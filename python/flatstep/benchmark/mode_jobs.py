"""The ways to store parameters and state that are compared, the models, and what is run of them."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers

import flatstep

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
LION = 5  # its rate is so many times smaller than AdamW's, its weight decay as much larger
FINE_TUNING_RATE = 1e-5

Make = Callable[..., mlx.optimizers.Optimizer]


def _lion(learning_rate: Any, weight_decay: float, seed: int) -> mlx.optimizers.Optimizer:
    return flatstep.Lion(learning_rate, weight_decay=LION * weight_decay, seed=seed)


def _lion_8bit(learning_rate: Any, weight_decay: float, seed: int) -> mlx.optimizers.Optimizer:
    return flatstep.Lion8bit(
        learning_rate, weight_decay=LION * weight_decay, master_weight_bits=24, seed=seed
    )


def _adamw(**storage: Any) -> Make:
    def make(learning_rate: Any, weight_decay: float, seed: int) -> mlx.optimizers.Optimizer:
        return flatstep.AdamW(
            learning_rate, weight_decay=weight_decay, bias_correction=True, seed=seed, **storage
        )

    return make


def _mlx(learning_rate: Any, weight_decay: float, seed: int) -> mlx.optimizers.Optimizer:
    return mlx.optimizers.AdamW(learning_rate, weight_decay=weight_decay, bias_correction=True)


class Mode(NamedTuple):
    """A name in tables, the parameters' dtype, and an optimizer from rate, decay and seed."""

    label: str
    dtype: mx.Dtype
    make: Make
    rate: float = LEARNING_RATE

    @property
    def optim(self) -> ModuleType:
        """Where its schedules come from."""
        return mlx.optimizers if self.make is _mlx else flatstep


MODES = {
    "float32": Mode("float32", mx.float32, _adamw()),
    "mlx-bfloat16": Mode("mlx.optimizers, bfloat16", mx.bfloat16, _mlx),
    "bfloat16": Mode("bfloat16, float32 state", mx.bfloat16, _adamw()),
    "24": Mode("24 bits, float32 state", mx.bfloat16, _adamw(master_weight_bits=24)),
    "24-int8": Mode(
        "24 bits, int8 state", mx.bfloat16, _adamw(master_weight_bits=24, state_dtype=mx.int8)
    ),
    "stochastic-int8": Mode(
        "stochastic, int8 state", mx.bfloat16, _adamw(stochastic_rounding=True, state_dtype=mx.int8)
    ),
    "lion": Mode("Lion8bit, 24 bits", mx.bfloat16, _lion_8bit, LEARNING_RATE / LION),
    "lion-float32": Mode("Lion, float32", mx.float32, _lion, LEARNING_RATE / LION),
    "mlx-float32": Mode("mlx.optimizers, float32", mx.float32, _mlx),
}
# What it costs is measured of this one too; it learns what float32 does.
ONLY_COSTS = "mlx-float32"
FINE_TUNED_MODELS = ("tiny", "demo")
FINE_TUNED = ["float32", "mlx-bfloat16", "24-int8", "stochastic-int8", "bfloat16"]
RELEASED = ["float32", "mlx-float32", "mlx-bfloat16", "24-int8"]


class Model(NamedTuple):
    """A class of examples/transformer.py with its arguments, and a batch."""

    name: str
    dims: int
    layers: int
    heads: int
    batch: int = 2

    def make(self, transformer: Any) -> Any:
        return getattr(transformer, self.name)(self.dims, self.layers, self.heads)


MODELS = {
    "tiny": Model("ByteTransformer", 32, 1, 2),
    "demo": Model("ByteTransformer", 192, 3, 4),
    "large": Model("TrigramTransformer", 192, 1, 4),
    "27M": Model("ByteTransformer", 512, 7, 8),
    "310M": Model("ByteTransformer", 1024, 24, 16),
}


@dataclass(frozen=True)
class Job:
    """One process: `kind` is train, finetune or cost.

    What is trained in float32 leaves its weights in `folder`, for fine-tuning to start from.
    """

    kind: str
    model: str
    mode: str
    seed: int = 0
    compiled: bool = True
    steps: int = 0
    updates: int = 0  # to measure alone
    folder: str = ""
    examples: str = ""

    @property
    def key(self) -> str:
        last = ("compiled" if self.compiled else "eager") if self.kind == "cost" else self.seed
        return f"{self.kind} {self.model} {self.mode} {last}"


def schedule(optim: ModuleType, rate: float, steps: int) -> Any:
    """A linear warmup joined to a cosine decay."""
    warmup = max(1, steps // 10)
    rise = optim.linear_schedule(0.0, rate, warmup)
    fall = optim.cosine_decay(rate, steps - warmup, 0.1 * rate)
    return optim.join_schedules([rise, fall], [warmup])
