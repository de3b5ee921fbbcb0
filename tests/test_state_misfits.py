"""State that doesn't fit is named by its path, and nothing has changed afterwards."""

import copy
from collections.abc import Callable
from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from cases import FULLEST, Case, random_tree
from models import assert_trees_equal, every_rule
from shadow import Run, Shadow, assert_it_goes_on, bits, copied, fails, replaced, train

SHAPES = {"w": (3, 4), "layers": [{"weight": (8, 4), "bias": (8,)}, {}], "pair": [(2,), ()]}
WEIGHT = "layers.0.weight"
ONES = mx.ones((8, 4))


def new_tree(seed: int) -> Any:
    tree = random_tree(SHAPES, np.random.default_rng(seed))
    return {**tree, "pair": tuple(tree["pair"])}


def trained(case: Case) -> tuple[Run, Shadow]:
    run = Run(case.make(optim), new_tree(1))
    return train(run, Shadow(lambda: case.make(optim), new_tree(1)), new_tree)


def state_with(path: str, value: Any) -> Callable[[Any], Any]:
    return lambda state: replaced(state, {path: value})


def without(state: Any, *keys: Any) -> Any:
    """The state with one entry removed."""
    state = copy.deepcopy(state)
    node = state
    for key in keys[:-1]:
        node = node[key]
    del node[keys[-1]]
    return state


def changed(state: Any, change: Callable[[Any], Any]) -> Any:
    state = copy.deepcopy(state)
    change(state)
    return state


def numbered(items: Any) -> dict[str, Any]:
    return {str(i): item for i, item in enumerate(items)}


# A name, what is done to a state, and the error: its type, and what it says.
Misfit = tuple[str, Callable[[Any], Any], type[Exception], tuple[str, ...]]


def for_every_rule(misfits: Callable[[str], list[Misfit]]) -> pytest.MarkDecorator:
    """All misfits, of one of the arrays that a rule keeps, for each rule."""
    rows = [(case, *row) for case in FULLEST for row in misfits(case.slots[-1])]
    return pytest.mark.parametrize(
        ("case", "change", "exception", "parts"),
        [(case, change, exception, parts) for case, _, change, exception, parts in rows],
        ids=[f"{case.rule}-{name}" for case, name, *_ in rows],
    )


# Plain trees that somebody loads. Whether they fit can only be known when parameters come.
BAD_STATES: list[Misfit] = [
    ("array for slots", lambda state: {**state, "w": ONES}, ValueError, ("w", "dict", "array")),
    ("a list for a dict", lambda state: {**state, "w": [ONES]}, ValueError, ("w", "dict", "list")),
    ("no slots", lambda state: {**state, "w": None}, ValueError, ("w: ", "None", "{}")),
    (
        "a dict for a list",
        lambda state: {**state, "layers": numbered(state["layers"])},
        ValueError,
        ("layers: ", "dict", "list", "tree_unflatten"),
    ),
    (
        "a list in a list",
        lambda state: {**state, "layers": [list(state["layers"][0].values()), {}]},
        ValueError,
        ("layers.0: ", "list", "dict"),
    ),
    ("None for a list", lambda s: {**s, "layers": None}, ValueError, ("layers: ", "None", "list")),
    ("None in a list", lambda s: {**s, "layers": [None, {}]}, ValueError, ("layers.0: ", "None")),
    (
        "a long list",
        lambda state: {**state, "layers": [*state["layers"], state["layers"][0]]},
        ValueError,
        ("layers: ", "3", "2"),
    ),
    (
        "one slot more",
        lambda state: changed(state, lambda s: s["w"].update(u=mx.ones((3, 4)))),
        ValueError,
        ("w: ", "'u'"),
    ),
    (
        "an unknown name",
        lambda state: changed(state, lambda s: s["layers"][0].update(junk=5)),
        ValueError,
        ("layers.0.junk: ", "int"),
    ),
    (
        "an unknown array",
        lambda state: changed(state, lambda s: s["layers"][1].update(junk=ONES)),
        ValueError,
        ("layers.1.junk: ", "array"),
    ),
    ("no step", lambda state: without(state, "step"), ValueError, ("step", "set to a dict of")),
    ("no rate", lambda state: without(state, "learning_rate"), ValueError, ("learning_rate",)),
    ("negative step", lambda state: {**state, "step": -1}, ValueError, ("step", "-1")),
    ("string", lambda state: "state", TypeError, ("state", "dict", "str")),
    ("None for all", lambda state: None, TypeError, ("state", "dict", "set to None")),
    ("nothing", lambda state: {}, ValueError, ("'step' and 'learning_rate'", "set to {}")),
]


def bad_states(slot: str) -> list[Misfit]:
    weight, w = f"{WEIGHT}.{slot}", f"w.{slot}"
    return [
        ("shape", state_with(weight, mx.ones((4, 8))), ValueError, (WEIGHT, "(4, 8)", "(8, 4)")),
        ("flat", state_with(weight, mx.ones((32,))), ValueError, (WEIGHT, "(32,)", "(8, 4)")),
        ("integers", state_with(w, mx.ones((3, 4), mx.int32)), TypeError, (w, "int32")),
        ("NumPy", state_with(w, np.ones((3, 4))), TypeError, (w, "ndarray")),
        ("None", state_with(w, None), TypeError, (w, "NoneType")),
        *BAD_STATES,
    ]


@for_every_rule(bad_states)
def test_a_state_that_does_not_fit_is_named(
    case: Case,
    change: Callable[[Any], Any],
    exception: type[Exception],
    parts: tuple[str, ...],
) -> None:
    run, shadow = trained(case)
    good = copied(run.optimizer.state)
    before = bits(run.params)

    def load_and_step() -> None:
        run.optimizer.state = change(good)
        run.apply(new_tree(4), run.params)

    fails(load_and_step, exception, *parts)
    assert bits(run.params) == before
    run.optimizer.state = good
    assert_it_goes_on(run, shadow, new_tree)


@every_rule
def test_what_a_short_list_lacks_starts_at_zero_as_in_mlx(case: Case) -> None:
    params = {"layers": [{"w": mx.ones((3,))} for _ in range(2)]}
    for module in (optim, mlx.optimizers):
        optimizer = case.make(module)
        optimizer.apply_gradients(params, params)
        state = copied(optimizer.state)
        kept = [float(array.max()) for array in state["layers"].pop()["w"].values()]
        optimizer.state = state
        optimizer.init(params)
        first, second = optimizer.state["layers"]
        assert [float(array.max()) for array in first["w"].values()] == kept
        assert not any(array.any() for array in second["w"].values())


def test_a_state_without_one_of_its_slots_is_named() -> None:
    optimizer, params = optim.AdamW(0.1), new_tree(1)
    optimizer.init(params)
    optimizer.state = without(copied(optimizer.state), "layers", 0, "weight", "m")
    fails(lambda: optimizer.apply_gradients(params, params), ValueError, WEIGHT, "m")


@every_rule
def test_what_half_a_state_lacks_starts_at_zero(case: Case) -> None:
    run, _ = trained(case)
    half = without(copied(run.optimizer.state), "layers", 0, "weight")
    resumed, expected = case.make(optim), case.make(optim)
    resumed.state = half
    zero = {f"{WEIGHT}.{slot}": mx.zeros((8, 4)) for slot in case.slots}
    expected.state = replaced(copied(run.optimizer.state), zero)
    got = [o.apply_gradients(new_tree(4), copied(run.params)) for o in (resumed, expected)]
    assert_trees_equal(*got)
    assert_trees_equal(resumed.state, expected.state)


def assignments(slot: str) -> list[Misfit]:
    def leaf(state: Any) -> Any:
        return state["layers"][0]["weight"]

    def assign(node: Any, key: Any, value: Any) -> None:
        node[key] = value

    return [
        ("shape", lambda s: assign(leaf(s), slot, mx.ones((4, 8))), ValueError, (WEIGHT, "(4, 8)")),
        ("dtype", lambda s: assign(leaf(s), slot, ONES.astype(mx.int8)), TypeError, (slot, "int8")),
        ("string", lambda s: assign(leaf(s), slot, "ones"), TypeError, (f"{WEIGHT}.{slot}", "str")),
        ("None", lambda s: assign(leaf(s), slot, None), TypeError, (f"{WEIGHT}.{slot}", "None")),
        ("slot", lambda s: assign(leaf(s), "u", ONES), ValueError, (f"{WEIGHT}.u", slot)),
        ("name", lambda s: assign(s["layers"][0], "other", {slot: ONES}), ValueError, ("other",)),
        ("number for slots", lambda s: assign(s, "w", 3), ValueError, ("w", "dict", "3")),
        ("number in a list", lambda s: assign(s["layers"], 0, 3), ValueError, ("layers.0", "3")),
        ("short list", lambda s: assign(s, "layers", [{}]), ValueError, ("layers", "1", "2")),
        (
            "half",
            lambda s: assign(s, "w", {slot: mx.ones((3, 4)), "u": 1}),
            ValueError,
            ("w: ", "u"),
        ),
        (
            "dict for a list",
            lambda s: assign(s, "layers", {"0": {}}),
            ValueError,
            ("layers", "list"),
        ),
        (
            "list for a dict",
            lambda s: assign(s["layers"], 0, [{}]),
            ValueError,
            ("layers.0", "dict"),
        ),
        ("None for slots", lambda s: assign(s, "w", None), ValueError, ("w: ", "None")),
        (
            "two at once",
            lambda s: s["layers"][0].update(weight={}, other={}),
            ValueError,
            ("layers.0.other",),
        ),
        ("two at the top", lambda s: s.update(w={}, layers=3), ValueError, ("layers: ", "3")),
        ("flat", lambda s: assign(s, "__flatstep__", {}), ValueError, ("optimizer.state",)),
        ("clear", lambda s: s["layers"][0].clear(), ValueError, ("layers.0", "assign {}")),
        ("popitem", lambda s: leaf(s).popitem(), ValueError, (WEIGHT, "assign {}")),
        ("clear a list", lambda s: s["layers"].clear(), ValueError, ("layers", "assign {}")),
        ("remove", lambda s: s["layers"].remove({}), ValueError, ("layers", "assign {}")),
        ("sort", lambda s: s["layers"].sort(), ValueError, ("layers", "assign {}")),
        ("add", lambda s: s["layers"].__iadd__([{}]), ValueError, ("layers", "assign {}")),
        ("times", lambda s: s["layers"].__imul__(2), ValueError, ("layers", "assign {}")),
        ("delete an item", lambda s: s["layers"].__delitem__(0), ValueError, ("assign {}",)),
        ("short slice", lambda s: assign(s["layers"], slice(0, 2), [{}]), ValueError, ("layers",)),
        ("delete", lambda s: leaf(s).pop(slot), ValueError, (WEIGHT, "assign {}")),
    ]


@for_every_rule(assignments)
def test_a_bad_assignment_to_the_state_changes_nothing(
    case: Case,
    change: Callable[[Any], Any],
    exception: type[Exception],
    parts: tuple[str, ...],
) -> None:
    run, shadow = trained(case)
    fails(lambda: change(run.optimizer.state), exception, *parts)
    assert_it_goes_on(run, shadow, new_tree)


@pytest.mark.parametrize("count", [0, 2])
def test_flat_state_with_another_number_of_arrays_is_refused(count: int) -> None:
    optimizer = optim.Adam(1e-3)
    optimizer.init({"w": mx.zeros(3)})
    storage = dict(dict.items(optimizer.state))
    flat = storage["__flatstep__"]
    storage["__flatstep__"] = {**flat, "m": flat["m"] * count}
    with pytest.raises(ValueError, match="not what an optimizer of flatstep returned: m has"):
        optimizer.state = storage
