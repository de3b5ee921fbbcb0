"""The optimizer's state: MLX's tree in the hand, whatever it is underneath."""

import copy
import pickle
import re
import textwrap
from pathlib import Path
from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from cases import DTYPES, Case, case_id, leaves, random_shapes, random_tree
from mlx.utils import tree_map, tree_unflatten
from models import assert_trees_close, assert_trees_equal, batch, every_rule, loss, new_model


def problem() -> tuple[Any, Any]:
    rng = np.random.default_rng(23)
    shapes = random_shapes([(3,), (64,), (5, 7), ()])
    return random_tree(shapes, rng), random_tree(shapes, rng)


def run(optimizer: Any, params: Any, grads: Any, steps: int) -> Any:
    for _ in range(steps):
        params = optimizer.apply_gradients(grads, params)
        mx.eval(params, optimizer.state)
    return params


def test_the_documented_keys() -> None:
    optimizer = optim.SGD(learning_rate=1e-1, momentum=0.9)
    optimizer.init(nn.Linear(2, 2).trainable_parameters())
    assert repr(optimizer.state.keys()) == "dict_keys(['step', 'learning_rate', 'weight', 'bias'])"


@every_rule
def test_the_state_reads_like_a_plain_dict(case: Case) -> None:
    params, grads = problem()
    ours, theirs = case.make(optim), case.make(mlx.optimizers)
    run(ours, params, grads, 1)
    run(theirs, params, grads, 1)
    state, expected = ours.state, theirs.state
    assert isinstance(state, dict)
    assert list(state) == list(expected) == list(state.keys())
    assert len(state) == len(expected) == len(state.values()) == len(state.items())
    assert all(key in state for key in expected) and "third" not in state
    assert state.get("third") is None and state.get("third", 3) == 3
    assert [key for key, _ in state.items()] == list(expected)
    assert {**state}.keys() == dict(state).keys() == (state | {}).keys() == expected.keys()
    assert isinstance(state["first"], list) and isinstance(state["second"]["deep"][1], dict)
    assert list(state["first"][0]) == list(expected["first"][0])
    with pytest.raises(KeyError, match="third"):
        state["third"]
    for view in (state, dict(state), {**state}, dict(state.items()), state | {}, state.copy()):
        assert_trees_close(view, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@every_rule
def test_state_is_float32_unless_the_caller_says_otherwise(case: Case, dtype: mx.Dtype) -> None:
    params = {"w": mx.ones((5,), dtype)}
    make = getattr(optim, case.rule)
    for asked, kept in [(None, mx.float32), (mx.float32, mx.float32), (dtype, dtype)]:
        optimizer = make(0.1, **case.arguments, state_dtype=asked)
        updated = optimizer.apply_gradients(params, params)
        assert updated["w"].dtype == dtype
        assert {slot.dtype for slot in optimizer.state["w"].values()} == {kept}
        assert optimizer.state["learning_rate"].dtype == mx.float32


def test_anything_can_be_kept_in_the_state() -> None:
    optimizer = optim.SGD(0.1, momentum=0.9)
    optimizer.state["hello"] = "world"
    assert optimizer.state["hello"] == "world"
    optimizer.state = {0: 1}
    assert optimizer.state == {0: 1}


def test_a_users_entry_survives_updates() -> None:
    optimizer = optim.AdamW(0.1)
    params = {"w": mx.ones((3,))}
    optimizer.init(params)
    optimizer.state["hello"] = "world"
    optimizer.state["tokens"] = mx.array(5)
    run(optimizer, params, params, 2)
    assert optimizer.state["hello"] == "world"
    assert optimizer.state["tokens"].item() == 5
    del optimizer.state["hello"]
    assert "hello" not in optimizer.state
    assert optimizer.state.pop("tokens").item() == 5
    assert list(optimizer.state) == ["step", "learning_rate", "w"]


@every_rule
def test_an_assigned_leaf_is_what_the_next_step_reads(case: Case) -> None:
    params, grads = problem()
    ours, theirs = case.make(optim), case.make(mlx.optimizers)
    for optimizer in (ours, theirs):
        run(optimizer, params, grads, 2)
        optimizer.state["first"][1][case.slots[-1]] = mx.full((64,), 0.25)
        optimizer.state["second"]["deep"][1] = {
            slot: mx.array(0.5) for slot in optimizer.state["second"]["deep"][1]
        }
        optimizer.state["step"] = mx.array(10, mx.uint64)
    assert ours.state["first"][1][case.slots[-1]].tolist() == [0.25] * 64
    assert ours.state["second"]["deep"][1][case.slots[-1]].item() == 0.5
    assert_trees_close(run(ours, params, grads, 2), run(theirs, params, grads, 2))
    assert_trees_close(ours.state, theirs.state)
    assert ours.step.item() == 12


def test_an_assigned_subtree_is_what_the_next_step_reads() -> None:
    params = {"a": mx.zeros((2,)), "b": {"w": mx.zeros((3,))}}
    optimizer = optim.SGD(1.0, momentum=0.5)
    optimizer.init(params)
    optimizer.state["b"] = {"w": {"v": mx.full((3,), 8.0)}}
    optimizer.state.update(a={"v": mx.full((2,), 4.0)})
    updated = optimizer.apply_gradients(tree_map(mx.zeros_like, params), params)
    assert updated["a"].tolist() == [-2.0] * 2
    assert updated["b"]["w"].tolist() == [-4.0] * 3


def plain_copy(state: Any) -> Any:
    return tree_map(mx.array, state)


def as_it_is(state: Any) -> Any:
    return state


@every_rule
@pytest.mark.parametrize("hand_over", [plain_copy, as_it_is])
@pytest.mark.parametrize("ours_first", [True, False])
def test_a_run_continues_in_the_other_library(case: Case, hand_over: Any, ours_first: bool) -> None:
    first, second = (optim, mlx.optimizers) if ours_first else (mlx.optimizers, optim)
    params, grads = problem()
    before, after, reference = case.make(first), case.make(second), case.make(mlx.optimizers)
    expected = run(reference, params, grads, 9)
    halfway = run(before, params, grads, 5)
    after.state = hand_over(before.state)
    assert_trees_close(run(after, halfway, grads, 4), expected)
    assert_trees_close(after.state, reference.state)
    assert after.step.item() == 9


@every_rule
def test_a_state_flattens_saves_and_loads(case: Case, tmp_path: Path) -> None:
    params, grads = problem()
    whole, before, after = case.make(optim), case.make(optim), case.make(optim)
    expected = run(whole, params, grads, 6)
    halfway = run(before, params, grads, 3)
    path = str(tmp_path / "optimizer.safetensors")
    mx.save_safetensors(path, leaves(before.state))
    after.state = tree_unflatten(list(mx.load(path).items()))
    assert_trees_equal(run(after, halfway, grads, 3), expected)
    assert_trees_equal(after.state, whole.state)


@pytest.mark.parametrize("duplicate", [copy.copy, dict, lambda state: state.copy()])
def test_a_shallow_copy_has_a_top_level_of_its_own(duplicate: Any) -> None:
    params, grads = problem()
    optimizer = optim.AdamW(0.1)
    run(optimizer, params, grads, 2)
    kept = duplicate(optimizer.state)
    kept["hello"] = "world"
    assert "hello" not in optimizer.state
    optimizer.update({}, {})
    assert kept["step"].item() == 2


@every_rule
def test_a_deep_or_pickled_copy_resumes_with_the_same_bits(case: Case) -> None:
    params, grads = problem()
    optimizer = case.make(optim)
    halfway = run(optimizer, params, grads, 2)
    copies = [copy.deepcopy(optimizer.state), pickle.loads(pickle.dumps(optimizer.state))]
    expected = run(optimizer, halfway, grads, 2)
    for state in copies:
        resumed = case.make(optim)
        resumed.state = state
        assert_trees_equal(run(resumed, halfway, grads, 2), expected)
        assert_trees_equal(resumed.state, optimizer.state)


@every_rule
@pytest.mark.parametrize(
    ("duplicate", "rate"),
    [
        (copy.deepcopy, optim.cosine_decay(0.1, 100)),
        (lambda it: pickle.loads(pickle.dumps(it)), 0.1),
    ],
    ids=["deepcopy", "pickle"],
)
def test_a_copied_optimizer_goes_its_own_way(case: Case, duplicate: Any, rate: Any) -> None:
    params, grads = problem()
    optimizer = case.make(optim, rate)
    halfway = run(optimizer, params, grads, 2)
    twin = duplicate(optimizer)
    assert_trees_equal(twin.state, optimizer.state)
    expected = run(optimizer, halfway, grads, 2)
    assert twin.step.item() == 2
    assert_trees_equal(run(twin, halfway, grads, 2), expected)
    assert_trees_equal(twin.state, optimizer.state)


def test_a_leaf_taken_before_an_update_keeps_its_values() -> None:
    optimizer = optim.SGD(1.0, momentum=0.5)
    params = {"w": mx.zeros((100,))}
    run(optimizer, params, {"w": mx.ones((100,))}, 1)
    leaf = optimizer.state["w"]["v"]
    run(optimizer, params, {"w": mx.ones((100,))}, 3)
    assert leaf.tolist() == [1.0] * 100
    assert optimizer.state["w"]["v"].tolist() == [1.875] * 100


@every_rule
def test_mlx_tree_functions_see_the_tree(case: Case) -> None:
    params, grads = problem()
    optimizer = case.make(optim)
    run(optimizer, params, grads, 1)
    expected = [f"{path}.{slot}" for path in leaves(params) for slot in case.slots]
    assert list(leaves(optimizer.state)) == ["step", "learning_rate", *expected]
    doubled = tree_map(lambda leaf: leaf * 2, optimizer.state)
    for slot, array in optimizer.state["first"][0].items():
        assert mx.array_equal(doubled["first"][0][slot], array * 2)


def test_writing_a_leaf_leaves_a_returned_state_as_it_was() -> None:
    optimizer = optim.Adam(1e-3)
    params = {"w": mx.ones((3, 4))}
    optimizer.init(params)
    step = mx.compile(lambda state: state)
    returned = step(optimizer.state)
    optimizer.state = returned
    optimizer.state["w"]["m"] = mx.full((3, 4), 7.0)
    other = optim.Adam(1e-3)
    other.state = returned
    assert other.state["w"]["m"].max().item() == 0
    assert optimizer.state["w"]["m"].min().item() == 7


def test_lists_and_dicts_of_a_live_state_lose_no_writes() -> None:
    optimizer = optim.Adam(1e-3)
    params = {"layers": [{"w": mx.ones(3)}, {"w": mx.ones(4)}]}
    optimizer.init(params)
    layers = optimizer.state["layers"]
    layers[0]["w"] |= {"m": mx.full((3,), 2.0)}
    assert optimizer.state["layers"][0]["w"]["m"].tolist() == [2.0] * 3
    for change in (lambda: layers.append({}), lambda: layers.pop(), lambda: layers.extend([{}])):
        with pytest.raises(ValueError, match="layers"):
            change()
    with pytest.raises(ValueError, match=r"layers\.1\.w\.u"):
        layers[1]["w"].setdefault("u", mx.ones(4))
    # A copy made by tree_map is the caller's own.
    tree_map(lambda leaf: leaf, optimizer.state)["layers"].append({})


def cast(tree: Any, dtype: mx.Dtype) -> Any:
    return tree_map(lambda leaf: leaf.astype(dtype), tree)


def compiled(optimizer: optim.AdamW) -> Any:
    state = [optimizer.state]
    return mx.compile(optimizer.apply_gradients, inputs=state, outputs=state)


@pytest.mark.parametrize("where", ["before", "between", "inside", "init inside"])
@pytest.mark.parametrize("value_and_grad", [False, True])
def test_parameters_cast_since_init_are_refused_in_a_compiled_step(
    where: str, value_and_grad: bool
) -> None:
    optimizer, model = optim.AdamW(1e-2), new_model()
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def step(x: mx.array) -> None:
        if "inside" in where:
            model.set_dtype(mx.bfloat16)
        if where == "init inside":
            optimizer.init(model.trainable_parameters())
        grads: Any = model.trainable_parameters()
        if value_and_grad:
            _, grads = nn.value_and_grad(model, loss)(model, x)
        optimizer.update(model, grads)

    step = mx.compile(step, inputs=state, outputs=state)
    if where == "between":
        step(batch(0))
    if where != "inside":
        model.set_dtype(mx.bfloat16)
    with pytest.raises(ValueError, match=r"optimizer\.init\(parameters\) outside the compiled"):
        step(batch(1))


@pytest.mark.parametrize("inside", [False, True])
def test_a_compiled_step_that_makes_the_state_may_cast_before(inside: bool) -> None:
    optimizer, model, eager, expected = (
        optim.AdamW(1e-2),
        new_model(),
        optim.AdamW(1e-2),
        new_model(),
    )
    state = [model.state, optimizer.state]
    expected.set_dtype(mx.bfloat16)

    def step(x: mx.array) -> None:
        if inside:
            model.set_dtype(mx.bfloat16)
        _, grads = nn.value_and_grad(model, loss)(model, x)
        optimizer.update(model, grads)

    if not inside:
        model.set_dtype(mx.bfloat16)
    step = mx.compile(step, inputs=state, outputs=state)
    for i in range(4):
        step(batch(i))
        _, grads = nn.value_and_grad(expected, loss)(expected, batch(i))
        eager.update(expected, grads)
    assert_trees_close(model.parameters(), expected.parameters())
    assert {segment.dtype for segment in optimizer.layout} == {mx.bfloat16}
    assert optimizer.step.item() == 4


def test_parameters_may_be_cast_between_compiled_steps_with_an_init() -> None:
    optimizer, eager = optim.AdamW(1e-2), optim.AdamW(1e-2)
    params = expected = {str(i): mx.ones((600, 1000)) for i in range(4)}
    optimizer.init(params)
    step = compiled(optimizer)
    for dtype in (mx.float32, mx.bfloat16, mx.float32, mx.bfloat16, mx.float32):
        params, expected = cast(params, dtype), cast(expected, dtype)
        optimizer.init(params)
        params, expected = step(params, params), eager.apply_gradients(expected, expected)
        assert_trees_equal(params, expected)
        assert optimizer.state == eager.state


def test_leaves_that_a_step_leaves_out_keep_their_dtype_in_the_layout() -> None:
    optimizer = optim.AdamW(1e-2)
    params = {name: mx.ones(100, mx.float32) for name in "ab"}
    optimizer.init(params)
    params = {name: p.astype(mx.bfloat16) for name, p in params.items()}
    for name in "abab":
        params.update(optimizer.apply_gradients({name: params[name]}, params))
    before = [segment.dtype for segment in optimizer.layout]
    assert before == [mx.bfloat16, mx.bfloat16]


def readme_code(part: str) -> str:
    """The block of Python in the README that has this in it."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if part in b]
    return textwrap.dedent(block)


@every_rule
@pytest.mark.parametrize("mixed", [False, True])
def test_mlx_goes_on_with_a_half_precision_model_as_the_readme_says(
    case: Case, mixed: bool
) -> None:
    model = new_model()
    model.set_dtype(mx.bfloat16)
    if mixed:
        model.layers[0].set_dtype(mx.float16)
        model.nested["pair"][0].set_dtype(mx.float32)
    dtypes = {path: p.dtype for path, p in leaves(model.trainable_parameters()).items()}
    grads = tree_map(mx.ones_like, model.trainable_parameters())
    optimizer, theirs = case.make(optim), case.make(mlx.optimizers)
    optimizer.update(model, grads)
    optimizer.state["step"] = 300

    names = {"optimizer": optimizer, "theirs": theirs, "model": model}
    exec(readme_code("theirs.state"), names)
    for step in range(301, 304):
        theirs.update(model, grads)
        assert theirs.step.item() == step and theirs.step.dtype == mx.uint64
    assert theirs.learning_rate.dtype == mx.float32
    for path, p in leaves(model.trainable_parameters()).items():
        assert p.dtype == dtypes[path], path
    for path, value in leaves(theirs.state).items():
        if path not in ("step", "learning_rate"):
            assert value.dtype == dtypes[path.rpartition(".")[0]], path
