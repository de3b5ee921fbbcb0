"""Training that reuses no memory, and one that may: both must give the same bits.

``Shadow`` is flatstep with every input copied first, so that no step can see another's memory.
``Run`` is flatstep as a user has it.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from cases import leaves
from mlx.utils import tree_map, tree_map_with_path


def copied(tree: Any) -> Any:
    """The tree with arrays of its own. float32 holds the half types and small counts exactly."""
    return tree_map(lambda a: mx.array(np.array(a.astype(mx.float32)), a.dtype), tree)


def bits(held: Any) -> dict[str, bytes]:
    """The bytes of whatever arrays, views or buffers are in a tree, by their paths.

    A NaN is a NaN: which one it is, MLX changes when it converts to float16.
    """
    found = {}
    for path, leaf in leaves(held).items():
        values = np.array(leaf.astype(mx.float32) if isinstance(leaf, mx.array) else leaf)
        if np.issubdtype(values.dtype, np.floating):
            values[np.isnan(values)] = np.nan
        found[path] = values.tobytes()
    return found


def replaced(tree: Any, new: dict[str, mx.array]) -> Any:
    """The tree with the leaves at these paths replaced."""
    return tree_map_with_path(lambda path, leaf: new.get(path, leaf), tree)


def part_of(tree: Any, paths: set[str], path: str = "") -> Any:
    """The tree with these leaves only: an empty dict stands for any other item of a list."""
    if isinstance(tree, mx.array):
        return tree if path in paths else {}
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
    parts = {k: part_of(child, paths, f"{path}.{k}" if path else str(k)) for k, child in items}
    if isinstance(tree, dict):
        return {key: part for key, part in parts.items() if part != {}}
    return type(tree)(parts.values())


def fails(
    work: Callable[[], Any], exception: type[Exception] | tuple[type[Exception], ...], *parts: str
) -> None:
    """Holds that `work` raises, and that the message says all of these."""
    with pytest.raises(exception) as caught:
        work()
    for part in parts:
        assert part in str(caught.value), str(caught.value)


class Run:
    """Parameters, their optimizer, and a step that is compiled or not."""

    def __init__(self, optimizer: Any, params: Any, compiled: bool = False):
        self.optimizer = optimizer
        self.params = params
        optimizer.init(params)
        self.use(compiled)

    def use(self, compiled: bool) -> None:
        apply = self.optimizer.apply_gradients
        state = self.optimizer.state
        self.apply: Callable[[Any, Any], Any] = (
            mx.compile(apply, inputs=state, outputs=state) if compiled else apply
        )

    def step(self, gradients: Any, evaluate: bool = True) -> None:
        # The old weights are dropped with the new ones in place: nobody holds them afterwards.
        self.params = replaced(self.params, leaves(self.apply(gradients, self.params)))
        if evaluate:
            mx.eval(self.params, self.optimizer.state)


class Shadow:
    """The same training, with a new optimizer and copies of everything at each step."""

    def __init__(self, make: Callable[[], Any], params: Any):
        self.make = make
        self.params = copied(params)
        optimizer = make()
        optimizer.init(copied(params))
        self.state = copied(optimizer.state)

    def step(self, gradients: Any) -> None:
        optimizer = self.make()
        optimizer.state = copied(self.state)
        updated = optimizer.apply_gradients(copied(gradients), copied(self.params))
        self.params = replaced(self.params, leaves(copied(updated)))
        self.state = copied(optimizer.state)


def assert_same_bits(run: Run, shadow: Shadow) -> None:
    for got, expected in ((run.params, shadow.params), (run.optimizer.state, shadow.state)):
        a, b = leaves(got), leaves(expected)
        assert a.keys() == b.keys()
        for path in b:
            assert (a[path].dtype, a[path].shape) == (b[path].dtype, b[path].shape), path
            assert bits(a[path]) == bits(b[path]), path


def train(run: Run, shadow: Shadow, new_tree: Callable[[int], Any]) -> tuple[Run, Shadow]:
    """Two steps of both, with the gradients that `new_tree` makes of a seed."""
    for seed in (2, 3):
        run.step(new_tree(seed))
        shadow.step(new_tree(seed))
    return run, shadow


def assert_it_goes_on(run: Run, shadow: Shadow, new_tree: Callable[[int], Any]) -> None:
    """Nothing has changed, and the next step is what it would have been."""
    assert_same_bits(run, shadow)
    run.step(new_tree(5))
    shadow.step(new_tree(5))
    assert_same_bits(run, shadow)
