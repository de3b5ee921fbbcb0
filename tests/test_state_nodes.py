"""What lies inside ``optimizer.state``: as live as MLX's own dicts, and holding nothing."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from cases import Case, leaves, random_tree
from flatstep import _ext, state_nodes
from mlx.utils import tree_flatten, tree_map
from models import assert_trees_close, assert_trees_equal, every_rule
from shadow import Run, copied, fails

SHAPES = {"a": (3,), "layers": [{"w": (4, 5), "b": (4,)}, {}, {"w": (5, 6)}], "pair": [(2,), ()]}


def new_tree(seed: int) -> Any:
    tree = random_tree(SHAPES, np.random.default_rng(seed))
    return {**tree, "pair": tuple(tree["pair"])}


def started(case: Case) -> tuple[Any, Any]:
    optimizer = case.make(optim)
    return optimizer, optimizer.apply_gradients(new_tree(1), new_tree(2))


DICT_READERS: list[Callable[[Any], Any]] = [
    dict,
    lambda node: {**node},
    lambda node: node | {},
    lambda node: {} | node,
    lambda node: node.copy(),
    lambda node: (lambda **named: named)(**node),
    lambda node: dict(node.items()),
    lambda node: dict(zip(node.keys(), node.values(), strict=True)),
    lambda node: {key: node[key] for key in reversed(node)},
    lambda node: {key: node.get(key) for key in node},
    copy.copy,
    copy.deepcopy,
    lambda node: pickle.loads(pickle.dumps(node)),
    lambda node: tree_map(lambda leaf: leaf, node),
]
LIST_READERS: list[Callable[[Any], Any]] = [
    list,
    lambda node: [*node],
    lambda node: node + [],  # noqa: RUF005
    lambda node: [] + node,  # noqa: RUF005
    lambda node: node * 1,
    lambda node: node[:],
    lambda node: node.copy(),
    lambda node: list(reversed(node))[::-1],
    lambda node: list((lambda *items: items)(*node)),
    copy.copy,
    copy.deepcopy,
    lambda node: pickle.loads(pickle.dumps(node)),
    lambda node: tree_map(lambda leaf: leaf, node),
]


@every_rule
def test_a_node_that_was_kept_reads_the_state_as_it_is_now(case: Case) -> None:
    optimizer, params = started(case)
    state = optimizer.state
    leaf, layers, pair, items = state["a"], state["layers"], state["pair"], state["a"].items()
    optimizer.apply_gradients(new_tree(3), params)
    now = copied(optimizer.state)
    assert leaf == now["a"] and layers == now["layers"] and pair == now["pair"]
    assert repr(leaf) == repr(now["a"]) and repr(layers) == repr(now["layers"])
    assert_trees_equal(dict(items), now["a"])
    for read in DICT_READERS:
        assert type(read(leaf)) is dict
        assert_trees_equal(read(leaf), now["a"])
        assert_trees_equal(read(layers[0]), now["layers"][0])
    for read in LIST_READERS:
        assert type(read(layers)) is list
        assert_trees_equal(read(layers), now["layers"])
    assert_trees_equal(tuple(pair), now["pair"])
    assert isinstance(leaf, dict) and isinstance(layers, list) and isinstance(pair, tuple)
    assert repr(leaf.keys()) == repr(dict(leaf).keys()) and len(layers) == 3


def test_a_part_of_the_state_is_saved_as_it_is(tmp_path: Path) -> None:
    optimizer, _ = started(Case("Adam", {}))
    path = str(tmp_path / "leaf.safetensors")
    mx.save_safetensors(path, optimizer.state["a"])
    assert_trees_equal(mx.load(path), optimizer.state["a"])


@every_rule
def test_a_kept_node_follows_an_init_with_other_parameters(case: Case) -> None:
    optimizer, params = started(case)
    pair = optimizer.state["pair"]
    expected = copied(pair)
    optimizer.init({"0": mx.ones((7,)), **params, "layers": [{}, {"new": mx.ones((2,))}]})
    assert_trees_equal(pair, expected)
    layers = optimizer.state["layers"]
    del optimizer.state["layers"]
    fails(lambda: layers[0], ValueError, "layers", "again")


@every_rule
def test_kept_nodes_let_a_step_reuse_the_state(case: Case) -> None:
    run = Run(case.make(optim), new_tree(2))
    kept = [run.optimizer.state[key] for key in run.params]
    kept += [node["w"] for node in run.optimizer.state["layers"] if node]
    run.step(new_tree(3))
    run.step(new_tree(3))
    before = _ext.reuse_counters()
    run.step(new_tree(3))
    after = _ext.reuse_counters()
    assert after["state_fresh"] == before["state_fresh"]
    assert after["state_in_place"] > before["state_in_place"]
    assert kept[0] == run.optimizer.state["a"]


def test_a_state_is_freed_when_nobody_holds_it() -> None:
    def work() -> Any:
        optimizer, params = started(Case("Adam", {}))
        state, kept = optimizer.state, [optimizer.state["layers"], optimizer.state["a"]]

        @partial(mx.compile, inputs=state, outputs=state)
        def step(g: Any, p: Any) -> Any:
            return optimizer.apply_gradients(g, p), optimizer.state["layers"]

        mx.eval(step(new_tree(3), params), kept)
        return weakref.ref(state)

    gc.disable()
    try:
        assert work()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", [list, tuple])
def test_reading_by_path_costs_the_path(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = state_nodes.Node.make.__func__  # type: ignore[attr-defined]
    counted = classmethod(lambda cls, *place: made.append(cls) or make(cls, *place))
    monkeypatch.setattr(state_nodes.Node, "make", counted)
    optimizer = optim.AdamW(1e-3)
    optimizer.init({"model": {"layers": kind({"w": mx.ones(3)} for _ in range(1000))}})
    made.clear()
    for i in range(1000):
        assert optimizer.state["model"]["layers"][i]["w"]["v"].size == 3
    assert len(made) == 4 * 1000


# ---- MLX's C++ functions ----


@every_rule
def test_a_compiled_function_returns_parts_of_the_state(case: Case) -> None:
    ours, theirs = case.make(optim), case.make(mlx.optimizers)
    results = []
    for optimizer in (ours, theirs):
        optimizer.init(new_tree(2))

        @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
        def step(g: Any, p: Any, optimizer: Any = optimizer) -> Any:
            before, pair = optimizer.state["layers"], optimizer.state["pair"]
            p = optimizer.apply_gradients(g, p)
            return p, before, pair, optimizer.state["layers"][0], dict(optimizer.state["a"])

        for _ in range(3):
            result = step(new_tree(3), new_tree(2))
        results.append(result)
    assert_trees_close(*results)
    assert leaves(results[0]).keys() == leaves(results[1]).keys()
    assert_trees_equal(results[0][1], ours.state["layers"])
    assert_trees_equal(results[0][2], ours.state["pair"])


def test_a_node_is_no_argument_of_a_transformed_function() -> None:
    optimizer, _ = started(Case("Adam", {}))

    def total(tree: Any) -> Any:
        return sum(leaf.sum() for _, leaf in tree_flatten(tree))

    for node in (optimizer.state["a"], optimizer.state["layers"], optimizer.state["pair"]):
        mx.eval(node)
        fails(partial(mx.compile(total), node), ValueError, "NeedsACopy")
        fails(partial(mx.grad(total), node), ValueError, "only arrays")
        copy_of_it = tree_map(lambda leaf: leaf, node)
        assert mx.compile(total)(copy_of_it).item() == total(node).item()


# ---- Assignments ----


def assert_zero(tree: Any) -> None:
    assert leaves(tree) and not any(leaf.any().item() for leaf in leaves(tree).values())


@every_rule
def test_an_empty_container_starts_a_part_again_from_zero(case: Case) -> None:
    for path in (["a"], ["layers", 0, "w"], ["layers", 0], ["layers"], ["pair"]):
        for empty in ({}, [], ()):
            optimizer, params = started(case)
            expected = copied(optimizer.state)
            node, other = optimizer.state, expected
            for key in path[:-1]:
                node, other = node[key], other[key]
            node[path[-1]] = empty
            assert_zero(node[path[-1]])
            other[path[-1]] = tree_map(mx.zeros_like, other[path[-1]])
            assert_trees_equal(optimizer.state, expected)
            optimizer.init(params)
            assert_trees_equal(optimizer.state, expected)


@every_rule
def test_what_an_assigned_tree_does_not_name_starts_again_from_zero(case: Case) -> None:
    optimizer, _ = started(case)
    bias = copied(optimizer.state["layers"][0]["b"])
    optimizer.state["layers"][0] = {"b": tree_map(lambda leaf: leaf + 1, bias)}
    assert_zero(optimizer.state["layers"][0]["w"])
    assert_trees_equal(optimizer.state["layers"][0]["b"], tree_map(lambda leaf: leaf + 1, bias))


@every_rule
def test_half_of_a_leaf_is_refused(case: Case) -> None:
    optimizer, _ = started(case)
    before = copied(optimizer.state)
    ones = mx.ones(3)
    first = dict.fromkeys(case.slots[:-1], ones)
    for half in ({"u": ones}, {**before["a"], "u": ones}, first or {"u": ones}):
        fails(lambda: optimizer.state.update(a=half), ValueError, "a: ", "{}")  # noqa: B023
    assert optimizer.state == before


def test_items_of_a_list_change_places() -> None:
    params = {"layers": [{"w": mx.full((2,), float(i))} for i in range(3)]}
    optimizer = optim.SGD(0.1, momentum=0.9)
    optimizer.apply_gradients(params, params)
    layers = optimizer.state["layers"]

    def values() -> list[float]:
        return [layer["w"]["v"][0].item() for layer in layers]

    assert values() == [0, 1, 2]
    layers.reverse()
    assert values() == [2, 1, 0]
    layers[1:] = [layers[2], layers[1]]
    assert values() == [2, 0, 1]
    # MLX's dicts would go to their new places; here the first has its new values already.
    fails(lambda: swap(layers, 0, 1), ValueError, "layers.1", "layers.0", "copy")


def swap(items: Any, i: int, j: int) -> None:
    items[i], items[j] = items[j], items[i]


# ---- The dtype ----


@pytest.mark.parametrize("through", ["state", "compiled"])
def test_a_state_is_cast_to_what_its_new_optimizer_keeps(through: str) -> None:
    first, params = started(Case("Adam", {}))
    first.state["note"] = mx.array(7.0)
    second, third = optim.Adam(1e-3, state_dtype=mx.bfloat16), optim.Adam(1e-3)
    state = first.state
    if through == "compiled":
        del first.state["note"]
        state = mx.compile(lambda state: state)(first.state)
    second.state = third.state = state
    assert {leaf.dtype for leaf in leaves(second.state["layers"]).values()} == {mx.bfloat16}
    assert {leaf.dtype for leaf in leaves(first.state["layers"]).values()} == {mx.float32}
    assert second.step.item() == 1
    if through == "state":
        assert third.state is first.state and second.state["note"].item() == 7
    expected = optim.Adam(1e-3, state_dtype=mx.bfloat16)
    expected.state = copied(first.state)
    second.state.pop("note", None)
    expected.state.pop("note", None)
    for optimizer in (second, expected):
        optimizer.apply_gradients(new_tree(3), params)
    assert_trees_equal(second.state, expected.state)


# ---- Parts of a state in other states ----


def trained_with_a_list() -> tuple[Any, Any, Any]:
    optimizer = optim.AdamW(1e-2)
    params = {"l": [{"w": mx.ones((4,))}, {"w": mx.ones((4,)) * 2}], "b": mx.ones((3,))}
    gradients = {"l": [{"w": mx.ones((4,))}, {"w": mx.ones((4,))}], "b": mx.ones((3,))}
    params = optimizer.apply_gradients(gradients, params)
    return optimizer, params, gradients


@pytest.mark.parametrize("of_another", [False, True])
def test_a_dict_of_a_states_parts_is_a_state_that_compiles(of_another: bool) -> None:
    optimizer, params, gradients = trained_with_a_list()
    expected = optimizer.apply_gradients(gradients, params)
    optimizer, params, gradients = trained_with_a_list()
    target = optim.AdamW(1e-2) if of_another else optimizer
    target.state = {**optimizer.state, "learning_rate": mx.array(1e-2)}

    def step() -> Any:
        return target.apply_gradients(gradients, params)

    state = target.state
    assert_trees_equal(mx.compile(step, inputs=state, outputs=state)(), expected)
    mx.eval(target.state)
    assert target.state["step"].item() == 2


def test_a_state_goes_into_mlx_as_it_is() -> None:
    optimizer, params, gradients = trained_with_a_list()
    theirs = mlx.optimizers.AdamW(1e-2)
    theirs.state = optimizer.state
    got = theirs.apply_gradients(gradients, params)
    optimizer, params, gradients = trained_with_a_list()
    expected = optimizer.apply_gradients(gradients, params)
    for (_, a), (_, b) in zip(tree_flatten(got), tree_flatten(expected), strict=True):
        assert mx.allclose(a, b, rtol=1e-5)


def test_a_part_that_was_taken_before_an_assignment_is_not_put_back_in_silence() -> None:
    optimizer, _, _ = trained_with_a_list()
    saved = optimizer.state["b"]
    copy_of_it = tree_map(lambda leaf: leaf, saved)
    optimizer.state["b"] = {}
    with pytest.raises(ValueError, match="copy it first"):
        optimizer.state["b"] = saved
    optimizer.state["b"] = copy_of_it
    assert_trees_equal(optimizer.state["b"], copy_of_it)


def test_frozen_quantized_weights_have_no_state_whatever_mlx_keeps_for_them() -> None:
    params = {"q": mx.ones((4, 2), mx.uint32), "w": mx.ones((3,))}
    theirs = mlx.optimizers.AdamW(1e-2)
    theirs.init(params)
    optimizer = optim.AdamW(1e-2)
    optimizer.state = theirs.state
    optimizer.init(params)
    assert optimizer.state["q"] == {}
    params |= optimizer.apply_gradients({"w": mx.ones((3,))}, params)
    params |= optimizer.apply_gradients({"w": mx.ones((3,))}, params)
    assert optimizer.is_flat(params)
