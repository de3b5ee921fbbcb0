"""Training of which each process has its slice of every weight, as MLX's fully_shard leaves it.

Run by mlx.launch, with a folder to which each process writes what it has seen. Without a group it
is the same training on the whole model.
"""

import sys
from pathlib import Path
from typing import Any

import flatstep
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

SHAPES = {"w": (66, 70), "b": (72,), "deep": [{"weight": (64, 3)}]}
BATCHES, STEPS = 2, 6
# What a step's gradients have for one element, which only the last process keeps.
SPOILT = {2: mx.nan, 4: mx.inf}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "clipping": {"max_grad_norm": 0.3},
    "clipping values": {"max_grad_norm": 0.3, "clip_value": 0.1, "groups": [flatstep.no_decay]},
    "skipping": {"skip_nonfinite": True},
    "scaling": {"grad_scale": flatstep.DynamicLossScale(4.0, growth_interval=2)},
    "all": {"max_grad_norm": 0.3, "skip_nonfinite": True, "accumulate_steps": 1, "ema": 0.9},
}


def whole_tree(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return tree_map(
        lambda shape: mx.array(rng.normal(size=shape).astype(np.float32)),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def gradients_of(step: int, batch: int) -> Any:
    """Of one of the batches that a step averages."""
    gradients = whole_tree(100 * step + batch)
    if step in SPOILT and batch == 1:
        is_last = mx.arange(72) == 71
        gradients["b"] = mx.where(is_last, SPOILT[step], gradients["b"])
    return gradients


def train(name: str, compiled: bool, group: mx.distributed.Group | None) -> dict[str, mx.array]:
    """What there is after each step, flat."""
    ranks, rank = (group.size(), group.rank()) if group else (1, 0)

    def shard(tree: Any) -> Any:
        return tree_map(lambda a: mx.split(a, ranks)[rank], tree)

    def reduced(step: int) -> Any:
        """The process's slice of the average of all batches' gradients: a sum_scatter."""
        if group is None:
            batches = [gradients_of(step, batch) for batch in range(BATCHES)]
            return tree_map(lambda *g: sum(g[1:], g[0]) / BATCHES, *batches)
        summed = tree_map(
            lambda g: mx.distributed.all_sum(g, group=group) / BATCHES, gradients_of(step, rank)
        )
        return shard(summed)

    optimizer = flatstep.AdamW(1e-2, norm_group=group, **OPTIMIZERS[name])
    params = shard(whole_tree(0))
    optimizer.init(params)
    apply, state = optimizer.apply_gradients, optimizer.state
    run: Any = mx.compile(apply, inputs=state, outputs=state) if compiled else apply
    seen: dict[str, mx.array] = {}
    for step in range(STEPS):
        params = run(reduced(step), params)
        mx.eval(params, optimizer.state)
        now = {"params": params, "state": {key: optimizer.state[key] for key in optimizer.state}}
        for path, array in tree_flatten(now):
            seen[f"{name}/{compiled}/{step}/{path}"] = mx.array(array)
    mx.eval(seen)
    return seen


def all_training(group: mx.distributed.Group | None) -> dict[str, mx.array]:
    seen = {}
    for name in OPTIMIZERS:
        for compiled in (False, True):
            seen |= train(name, compiled, group)
    return seen


if __name__ == "__main__":
    world = mx.distributed.init(strict=True, backend="ring")
    mx.save_safetensors(str(Path(sys.argv[1]) / f"{world.rank()}.safetensors"), all_training(world))
