"""Peak memory of whole training steps by what is done in them, each in a process of its own.

A transformer with more parameters than activations; loss, weights and state are evaluated at once,
and nothing holds the gradients meanwhile.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from mlx.utils import tree_flatten, tree_map

import flatstep

from .._command_line import print_table, print_wrapped

TOKENS = 17
STEPS = 3
UNSTEADY = 2  # first steps, which compile and lay out the parameters
MICRO_BATCHES = 4
FLOAT = 4  # bytes


class Way(NamedTuple):
    """Options of flatstep's AdamW, or of the loop around that of mlx.optimizers."""

    options: dict[str, Any] | None
    micro_batches: int = 1
    clips: bool = False


MANY = MICRO_BATCHES
WAYS: dict[str, Way] = {
    "AdamW": Way({}),
    "clip_value": Way({"clip_value": 1.0}),
    "max_grad_norm": Way({"max_grad_norm": 1.0}),
    "max_grad_norm, bfloat16 sum": Way({"max_grad_norm": 1.0, "accumulate_dtype": mx.bfloat16}),
    "accumulate": Way({"accumulate_steps": MANY}, MANY),
    "accumulate, max_grad_norm": Way({"accumulate_steps": MANY, "max_grad_norm": 1.0}, MANY),
    "the same in bfloat16": Way(
        {"accumulate_steps": MANY, "max_grad_norm": 1.0, "accumulate_dtype": mx.bfloat16}, MANY
    ),
    "mlx.optimizers": Way(None),
    "mlx.optimizers, clip_grad_norm": Way(None, clips=True),
    "mlx.optimizers, tree_map": Way(None, MANY),
    "the same, clip_grad_norm": Way(None, MANY, clips=True),
}


class Transformer(nn.Module):
    def __init__(self, dims: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, dims)
        self.encoder = nn.TransformerEncoder(layers, dims, 8, norm_first=True)
        self.out = nn.Linear(dims, 256)

    def __call__(self, tokens: mx.array) -> mx.array:
        mask = nn.MultiHeadAttention.create_additive_causal_mask(tokens.shape[1])
        logits: mx.array = self.out(self.encoder(self.embedding(tokens), mask))
        return logits


def loss_fn(model: nn.Module, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def measure(name: str, compiled: bool, quick: bool) -> dict[str, int]:
    """Bytes of the parameters, and at most in a step of all its micro-batches."""
    options, micro_batches, clips = WAYS[name]
    mx.random.seed(0)
    model = Transformer(*((256, 4) if quick else (512, 12)))
    optimizer: Any = (
        flatstep.AdamW(1e-4, **options) if options is not None else mlx.optimizers.AdamW(1e-4)
    )
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    tokens = mx.random.randint(0, 256, (1, TOKENS))
    mx.eval(state, tokens)
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    def step(tokens: mx.array) -> Any:
        loss, gradients = loss_and_grad(model, tokens)
        optimizer.update(model, gradients)
        return loss, None

    def step_of_loop(tokens: mx.array, before: Any = None, is_last: bool = True) -> Any:
        """As mlx-lm's trainer has it."""
        loss, gradients = loss_and_grad(model, tokens)
        if before is not None:
            gradients = tree_map(mx.add, gradients, before)
        if not is_last:
            return loss, gradients
        if micro_batches > 1:
            gradients = tree_map(lambda g: g / micro_batches, gradients)
        if clips:
            gradients, _ = mlx.optimizers.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        return loss, None

    taken: Any = step if options is not None else step_of_loop
    if compiled:
        taken = partial(mx.compile, inputs=state, outputs=state)(taken)
    gradients = None
    for number in range(STEPS * micro_batches):
        if number == UNSTEADY * micro_batches:
            mx.reset_peak_memory()
        if options is not None:
            loss, gradients = taken(tokens)
        else:
            is_last = number % micro_batches == micro_batches - 1
            loss, gradients = taken(tokens, gradients, is_last)
        mx.eval(loss, gradients, state)
    leaves: Any = tree_flatten(model.parameters())
    return {"parameters": sum(leaf.size for _, leaf in leaves), "peak": mx.get_peak_memory()}


def print_peaks(quick: bool) -> dict[str, dict[str, Any]]:
    peaks: dict[str, dict[str, Any]] = {}
    rows = []
    for name in WAYS:
        peaks[name] = {mode: _ask(name, mode, quick) for mode in ("eager", "compiled")}
        cells = []
        for mode, measured in peaks[name].items():
            of_all = FLOAT * measured["parameters"]
            above = (measured["peak"] - peaks["AdamW"][mode]["peak"]) / of_all
            cells += [f"{measured['peak'] / measured['parameters']:.2f}", f"{above:+.2f}"]
        rows.append((name, *cells))
    count = peaks["AdamW"]["eager"]["parameters"]
    head = ("", "eager", "beside AdamW", "compiled", "beside AdamW")
    print_table(f"Peak of training steps, {count / 1e6:.1f}M parameters", head, rows)
    print_wrapped(
        "Bytes of a parameter, in a step of all its micro-batches; beside AdamW in buffers that "
        f"hold all gradients. {MICRO_BATCHES} micro-batches where they are accumulated."
    )
    return peaks


def _ask(name: str, mode: str, quick: bool) -> dict[str, int]:
    command = [sys.executable, "-m", "flatstep.benchmark.in_pass_peaks", name, mode]
    process = subprocess.run(
        command + ["--quick"] * quick, stdout=subprocess.PIPE, text=True, check=True
    )
    measured: dict[str, int] = json.loads(process.stdout)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description="One row, as JSON, of what in_pass.py prints.")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("mode", choices=["eager", "compiled"])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    print(json.dumps(measure(arguments.way, arguments.mode == "compiled", arguments.quick)))


if __name__ == "__main__":
    main()
