"""What is measured: trees of tensors with the shapes of real models, update rules, dtypes.

A `Setting` names one measurement.
"""

import math
from dataclasses import dataclass

import mlx.core as mx

from .. import _ext

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def stack(layers: int, block: Shapes) -> Shapes:
    return {
        f"layers.{layer}.{path}": shape for layer in range(layers) for path, shape in block.items()
    }


def gpt2(width: int = 768) -> Shapes:
    """GPT-2 124M, whose output layer is its embedding; with a smaller width as many tensors."""
    block: Shapes = {
        "norm_1.weight": (width,),
        "norm_1.bias": (width,),
        "attention.qkv.weight": (3 * width, width),
        "attention.qkv.bias": (3 * width,),
        "attention.out.weight": (width, width),
        "attention.out.bias": (width,),
        "norm_2.weight": (width,),
        "norm_2.bias": (width,),
        "mlp.up.weight": (4 * width, width),
        "mlp.up.bias": (4 * width,),
        "mlp.down.weight": (width, 4 * width),
        "mlp.down.bias": (width,),
    }
    return {
        "embedding.weight": (50257, width),
        "positions.weight": (1024, width),
        **stack(12, block),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }


def lora() -> Shapes:
    """Rank 8 adapters for all seven projections of 32 layers, in the widths of Qwen3-4B."""
    rank, width, inner = 8, 2560, 9728
    sizes = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    sizes |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    block: Shapes = {}
    for name, (inputs, outputs) in sizes.items():
        block[f"{name}.lora_a"] = (inputs, rank)
        block[f"{name}.lora_b"] = (rank, outputs)
    return stack(32, block)


def equal_tensors(count: int, elements: int) -> Shapes:
    return {f"tensors.{i}": (elements,) for i in range(count)}


CASES: dict[str, tuple[str, Shapes]] = {
    "gpt2": ("GPT-2 124M, 148 tensors", gpt2()),
    "lora": ("LoRA 14.7M, 448 tensors", lora()),
    "flat": ("one flat buffer of 64M", {"buffer": (64 * 2**20,)}),
    "tiny": ("2,000 tensors of 1,000", equal_tensors(2_000, 1_000)),
    "many": ("10,000 tensors of 100", equal_tensors(10_000, 100)),
}
# An update rule: its class in mlx.optimizers, and the number of state arrays that it keeps.
RULES = {"sgd": ("SGD", 1), "adamw": ("AdamW", 2)}
DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16}
STATE_ITEMSIZE = 4  # flatstep keeps float32 state whatever the parameters are


@dataclass(frozen=True)
class Setting:
    """One measurement, with all cores and the fastest loops unless it says otherwise."""

    case: str
    rule: str = "adamw"
    dtype: str = "fp32"
    threads: int | None = None
    loops: str | None = None

    @property
    def shapes(self) -> Shapes:
        return CASES[self.case][1]

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].size

    @property
    def slots(self) -> int:
        return RULES[self.rule][1]

    @property
    def state_bytes(self) -> int:
        return self.elements * self.slots * STATE_ITEMSIZE

    @property
    def step_bytes(self) -> int:
        """What a step must move: it reads p, g and the state, and writes p and the state."""
        return 3 * self.elements * self.itemsize + 2 * self.state_bytes

    @property
    def has_peers(self) -> bool:
        """Whether others can be measured the same way: the threads and loops are flatstep's."""
        return self.threads is None and self.loops is None

    def runs_on(self, device: str) -> bool:
        """Whether it says something of a device. Slower loops do where they are not the fastest."""
        if self.loops and "avx512" not in _ext.available_cpu_loops():
            return False
        return self.has_peers or device == "cpu"

    @property
    def label(self) -> str:
        threads = "" if self.threads is None else f", threads: {self.threads}"
        loops = f", {self.loops} loops" if self.loops else ""
        return f"{CASES[self.case][0]}, {RULES[self.rule][0]} {self.dtype}{threads}{loops}"


# Every case, rule and dtype, one thread and slower loops, but not every combination of them.
PLAN = (
    Setting("gpt2"),
    Setting("gpt2", "sgd"),
    Setting("gpt2", dtype="bf16"),
    Setting("gpt2", threads=1),
    Setting("gpt2", loops="avx2"),
    Setting("flat"),
    Setting("flat", threads=1),
    Setting("lora"),
    Setting("lora", "sgd"),
    Setting("lora", dtype="bf16"),
    Setting("tiny"),
    Setting("many"),
)
