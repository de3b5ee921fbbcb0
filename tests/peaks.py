"""Memory of an update and of a training step, as MLX counts it.

Run as a program it measures one kind of training step in a process of its own, where no cache of
another kind's memory is in the way: `python peaks.py flatstep eager` prints numbers as JSON, and
`--dims 512 --layers 12 --bucket-mib 32` gives a row of the table in docs/engine.md.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flatstep
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from cases import leaves
from mlx.utils import tree_map

sys.path.append(str(Path(__file__).parents[1] / "examples"))


class Memory(NamedTuple):
    """Bytes held before something ran, at most while it ran, and after it."""

    before: int
    peak: int
    after: int


def measured(work: Callable[[], Any]) -> Memory:
    """What `work`, which has to evaluate its results, needs."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    return Memory(before, mx.get_peak_memory(), mx.get_active_memory())


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in leaves(tree).values())


# How gradients of four batches become one step: by the optimizer, or as trees that a loop adds up.
ACCUMULATIONS = ("none", "accumulate", "accumulate_steps", "tree_map")


def training_step_memory(
    module: Any,
    compiled: bool,
    dims: int = 512,
    layers: int = 4,
    steps: int = 6,
    accumulation: str = "none",
) -> dict[str, int]:
    """Peak memory of whole training steps, each evaluated at once, of a transformer whose
    parameters need more memory than its activations."""
    from transformer import ByteTransformer, loss_fn

    mx.random.seed(0)
    model = ByteTransformer(dims=dims, layers=layers, heads=8)
    options = {"accumulate_steps": 4} if accumulation == "accumulate_steps" else {}
    if accumulation == "accumulate":
        options = {"accumulate_dtype": mx.float32}
    optimizer = module.AdamW(1e-3, **options)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)
    state = [model.state, optimizer.state]

    def step(x: mx.array, y: mx.array, so_far: Any = None, is_last: bool = True) -> Any:
        loss, gradients = nn.value_and_grad(model, loss_fn)(model, x, y)
        if accumulation == "accumulate":
            optimizer.accumulate(gradients)
            if is_last:
                optimizer.update(model)
            return loss, None
        if so_far is not None:
            gradients = tree_map(mx.add, gradients, so_far)
        if not is_last and accumulation == "tree_map":
            return loss, gradients
        optimizer.update(model, gradients)
        return loss, None

    if compiled:
        step = partial(mx.compile, inputs=state, outputs=state)(step)
    tokens = mx.array(np.random.default_rng(0).integers(0, 256, (1, 33)))
    mx.eval(tokens)

    def work() -> None:
        so_far, batches = None, 1 if accumulation == "none" else 4
        for i in range(batches):
            loss, so_far = step(tokens[:, :-1], tokens[:, 1:], so_far, i == batches - 1)
            mx.eval(loss, so_far, model.parameters(), optimizer.state)

    memory = [measured(work) for _ in range(steps)]
    return {
        "parameters": nbytes(model.parameters()),
        "held": memory[-1].after,
        # The first steps move the parameters to flat memory.
        "peak": max(m.peak for m in memory[2:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=training_step_memory.__doc__)
    parser.add_argument("library", choices=["flatstep", "mlx"])
    parser.add_argument("mode", choices=["eager", "compiled"])
    parser.add_argument("--dims", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--accumulation", choices=ACCUMULATIONS, default="none")
    parser.add_argument("--bucket-mib", type=int, default=flatstep.state.BUCKET_BYTES >> 20)
    chosen = parser.parse_args()
    flatstep.state.BUCKET_BYTES = chosen.bucket_mib << 20
    module = flatstep if chosen.library == "flatstep" else mlx.optimizers
    compiled = chosen.mode == "compiled"
    memory = training_step_memory(
        module, compiled, chosen.dims, chosen.layers, chosen.steps, chosen.accumulation
    )
    print(json.dumps(memory))


if __name__ == "__main__":
    main()
