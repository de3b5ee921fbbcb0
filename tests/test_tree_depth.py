"""Trees as deep as the limit work, and none ends the process: deeper ones are an error."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import flatstep as optim
import mlx.core as mx
import pytest
from cases import Case
from flatstep import _ext
from models import every_rule
from shadow import fails

KINDS: dict[str, Callable[[Any], Any]] = {
    "dict": lambda inner: {"a": inner},
    "list": lambda inner: [inner],
    "tuple": lambda inner: (inner,),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def nested(kind: str, depth: int) -> Any:
    tree: Any = mx.ones((3,))
    for _ in range(depth - 1):
        tree = KINDS[kind](tree)
    return {"root": tree}


def looped(kind: str) -> Any:
    inner: list[Any] = [mx.ones((3,))]
    inner.append(KINDS[kind](inner))
    return {"root": inner}


@every_kind
@every_rule
def test_trees_nest_to_the_limit(case: Case, kind: str) -> None:
    params = nested(kind, _ext.MAX_TREE_DEPTH)
    optimizer = case.make(optim)
    params = optimizer.apply_gradients(params, params)
    optimizer.init(params)
    params = optimizer.apply_gradients(params, params)
    assert optimizer.is_flat(params)
    leaf: Any = optimizer.state["root"]
    while not isinstance(leaf, dict) or case.slots[0] not in leaf:
        leaf = leaf["a" if kind == "dict" else 0]
    assert leaf[case.slots[0]].any().item()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.state == optimizer.state
    loaded = case.make(optim)
    del optimizer.state["learning_rate"]
    loaded.state = {"learning_rate": 0.1, **optimizer.state}
    loaded.apply_gradients(params, params)
    assert loaded.step.item() == 3


def entries(tree: Any) -> dict[str, Callable[[Any], Any]]:
    one = {"root": mx.ones((3,))}
    return {
        "init": lambda optimizer: optimizer.init(tree),
        "first step": lambda optimizer: optim.AdamW(0.1).apply_gradients(tree, tree),
        "step": lambda optimizer: optimizer.apply_gradients(tree, tree),
        "gradients": lambda optimizer: optimizer.apply_gradients(tree, one),
        "is_flat": lambda optimizer: optimizer.is_flat(tree),
        "state": lambda optimizer: setattr(optimizer, "state", tree),
        "entry": lambda optimizer: optimizer.state.update(root=tree),
        "new entry": lambda optimizer: optimizer.state.update(other=tree),
        "inner entry": lambda optimizer: optimizer.state["list"].__setitem__(0, tree),
    }


@pytest.mark.parametrize("entry", entries(None))
@every_kind
def test_deeper_trees_are_refused_and_nothing_has_changed(kind: str, entry: str) -> None:
    optimizer = optim.AdamW(0.1)
    params = {"root": mx.ones((3,)), "list": [mx.ones((3,))]}
    optimizer.apply_gradients(params, params)
    before = pickle.loads(pickle.dumps(optimizer.state))
    for tree in (nested(kind, _ext.MAX_TREE_DEPTH + 2), nested(kind, 300_000), looped(kind)):
        fails(lambda: entries(tree)[entry](optimizer), ValueError, "root")  # noqa: B023
        assert optimizer.state == before


def test_a_small_stack_is_enough() -> None:
    results: list[Any] = []

    def work() -> None:
        optimizer, params = optim.AdamW(0.1), nested("dict", _ext.MAX_TREE_DEPTH)
        params = optimizer.apply_gradients(params, params)
        results.append(optimizer.is_flat(params))

    before = threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert results == [True]
