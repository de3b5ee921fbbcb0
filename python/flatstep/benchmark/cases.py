"""What is measured: trees of tensors with the shapes of real models, update rules, dtypes.

A `Setting` names one measurement.
"""

import math
from dataclasses import dataclass

import mlx.core as mx

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

COST_ELEMENTS = 10**6
COST_TENSORS = (10, 30, 100, 300, 1_000, 3_000, 10_000)


def attention_block(width: int, norms: tuple[str, str], inner: tuple[str, str]) -> Shapes:
    """A transformer layer with biases, a fused query-key-value projection and a GELU between."""
    return {
        f"{norms[0]}.weight": (width,),
        f"{norms[0]}.bias": (width,),
        "attention.qkv.weight": (3 * width, width),
        "attention.qkv.bias": (3 * width,),
        "attention.out.weight": (width, width),
        "attention.out.bias": (width,),
        f"{norms[1]}.weight": (width,),
        f"{norms[1]}.bias": (width,),
        f"{inner[0]}.weight": (4 * width, width),
        f"{inner[0]}.bias": (4 * width,),
        f"{inner[1]}.weight": (width, 4 * width),
        f"{inner[1]}.bias": (width,),
    }


def stack(layers: int, block: Shapes) -> Shapes:
    return {
        f"layers.{layer}.{path}": shape for layer in range(layers) for path, shape in block.items()
    }


def gpt2() -> Shapes:
    """GPT-2 124M, whose output layer is its embedding."""
    block = attention_block(768, ("norm_1", "norm_2"), ("mlp.up", "mlp.down"))
    return {
        "embedding.weight": (50257, 768),
        "positions.weight": (1024, 768),
        **stack(12, block),
        "norm.weight": (768,),
        "norm.bias": (768,),
    }


def vit_b16() -> Shapes:
    """ViT-B/16 at 224 pixels with 1,000 classes; convolution weights as MLX lays them out."""
    block = attention_block(768, ("norm_1", "norm_2"), ("mlp.up", "mlp.down"))
    return {
        "class_token": (1, 1, 768),
        "positions": (1, 197, 768),
        "patches.weight": (768, 16, 16, 3),
        "patches.bias": (768,),
        **stack(12, block),
        "norm.weight": (768,),
        "norm.bias": (768,),
        "head.weight": (1000, 768),
        "head.bias": (1000,),
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


def tinyllama() -> Shapes:
    """TinyLlama 1.1B: grouped queries, a gated feed-forward layer, an output layer of its own."""
    width, inner, vocabulary = 2048, 5632, 32000
    block: Shapes = {
        "query.weight": (width, width),
        "key.weight": (256, width),
        "value.weight": (256, width),
        "out.weight": (width, width),
        "gate.weight": (inner, width),
        "up.weight": (inner, width),
        "down.weight": (width, inner),
        "norm_1.weight": (width,),
        "norm_2.weight": (width,),
    }
    return {
        "embedding.weight": (vocabulary, width),
        **stack(22, block),
        "norm.weight": (width,),
        "head.weight": (vocabulary, width),
    }


def equal_tensors(count: int, elements: int) -> Shapes:
    return {f"tensors.{i}": (elements,) for i in range(count)}


CASES: dict[str, tuple[str, Shapes]] = {
    "gpt2": ("GPT-2 124M, 148 tensors", gpt2()),
    "lora": ("LoRA 14.7M, 448 tensors", lora()),
    "vit": ("ViT-B/16 86.6M, 152 tensors", vit_b16()),
    "flat": ("one flat buffer of 64M", {"buffer": (64 * 2**20,)}),
    "tiny": ("2,000 tensors of 1,000", equal_tensors(2_000, 1_000)),
    "tinyllama": ("TinyLlama 1.1B, 201 tensors", tinyllama()),
    **{
        f"cost-{count}": (
            f"10⁶ elements in {count:,}",
            equal_tensors(count, COST_ELEMENTS // count),
        )
        for count in COST_TENSORS
    },
}

COMMAND_CASES = ("gpt2", "lora", "flat", "tiny")  # of ``python -m flatstep bench``


@dataclass(frozen=True)
class Rule:
    """An update rule: its class in mlx.optimizers, and the state arrays that it keeps."""

    label: str
    slots: int


RULES = {"sgd": Rule("SGD", 1), "adam": Rule("Adam", 2), "adamw": Rule("AdamW", 2)}
DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16}
ITEMSIZE = {name: dtype.size for name, dtype in DTYPES.items()}
STATE_ITEMSIZE = 4  # flatstep keeps float32 state whatever the parameters are


@dataclass(frozen=True)
class Setting:
    """One measurement; `threads` is None for all cores, which labels don't mention."""

    case: str
    rule: str = "adamw"
    dtype: str = "fp32"
    threads: int | None = None

    @property
    def shapes(self) -> Shapes:
        return CASES[self.case][1]

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def slots(self) -> int:
        return RULES[self.rule].slots

    @property
    def state_bytes(self) -> int:
        return self.elements * self.slots * STATE_ITEMSIZE

    @property
    def step_bytes(self) -> int:
        """What a step must move: it reads p, g and the state, and writes p and the state."""
        return 3 * self.elements * ITEMSIZE[self.dtype] + 2 * self.state_bytes

    @property
    def is_cost(self) -> bool:
        """Whether this is one point of the curve of cost against the number of tensors."""
        return self.case.startswith("cost-")

    @property
    def manner(self) -> str:
        """How the case's tensors are updated."""
        threads = {None: "", 1: ", 1 thread"}.get(self.threads, f", {self.threads} threads")
        return f"{RULES[self.rule].label} {self.dtype}{threads}"

    @property
    def label(self) -> str:
        return f"{CASES[self.case][0]}, {self.manner}"
