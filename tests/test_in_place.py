"""Updates reuse memory, and nobody can tell: what somebody holds never changes."""

import copy
from collections.abc import Callable
from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from cases import Case, leaves, random_array
from mlx.utils import tree_map
from models import assert_trees_close, every_rule
from shadow import Run, Shadow, assert_same_bits, bits, copied, replaced

ours_or_compiled = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@pytest.fixture(autouse=True)
def several_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatstep.state.BUCKET_BYTES", 2560)


def new_params() -> Any:
    rng = np.random.default_rng(7)

    def array(*shape: int) -> mx.array:
        return random_array(shape, rng)

    return {
        "first": array(3),
        "a": array(130),
        "twin": array(130),
        "deep": [array(5, 7), {"scalar": array()}, (array(64), array(0, 3), array(300))],
    }


def new_gradients(seed: int, params: Any) -> Any:
    rng = np.random.default_rng(seed)
    return tree_map(lambda p: random_array(p.shape, rng, p.dtype), params)


def trained(case: Case, compiled: bool, steps: int = 2) -> Run:
    run = Run(case.make(optim), new_params(), compiled)
    for i in range(steps):
        run.step(new_gradients(i, run.params))
    return run


def evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


def state_leaf(run: Run, *keys: Any) -> mx.array:
    """One of the arrays that the rule keeps for a parameter."""
    node = run.optimizer.state
    for key in (*keys, run.optimizer.slots[-1]):
        node = node[key]
    return node


# What somebody may hold on to. Nothing is evaluated by holding it unless it says so.
HOLDERS: dict[str, Callable[[Run], Any]] = {
    "weight": lambda run: run.params["a"],
    "every weight": lambda run: tree_map(lambda p: p, run.params),
    "scalar weight": lambda run: run.params["deep"][1]["scalar"],
    "NumPy view of a weight": lambda run: np.array(run.params["a"], copy=False),
    "memoryview of a weight": lambda run: memoryview(run.params["deep"][0]),
    "lazy expression on a weight": lambda run: run.params["a"] * 2 + 1,
    "lazy slice of a weight": lambda run: run.params["a"][3:90:2],
    "lazy sum over the weights": lambda run: sum(mx.sum(p) for _, p in leaves(run.params).items()),
    "evaluated transpose": lambda run: evaluated(run.params["deep"][0].T),
    "evaluated slice": lambda run: evaluated(run.params["a"][64:]),
    "evaluated broadcast": lambda run: evaluated(mx.broadcast_to(run.params["a"], (3, 130))),
    "state leaf": lambda run: state_leaf(run, "a"),
    "evaluated state leaf": lambda run: evaluated(state_leaf(run, "deep", 0)),
    "every state leaf": lambda run: tree_map(lambda leaf: leaf, run.optimizer.state),
    "NumPy view of a state leaf": lambda run: np.array(state_leaf(run, "a"), copy=False),
    "lazy expression on a state leaf": lambda run: mx.sqrt(mx.abs(state_leaf(run, "a"))),
    "evaluated slice of a state leaf": lambda run: evaluated(state_leaf(run, "deep", 2, 0)[1:5]),
    "shallow copy of the state": lambda run: copy.copy(run.optimizer.state),
    "deep copy of the state": lambda run: copy.deepcopy(run.optimizer.state),
    "deep copy of the optimizer": lambda run: copy.deepcopy(run.optimizer).state,
    "step and learning rate": lambda run: [run.optimizer.step, run.optimizer.learning_rate],
}


@ours_or_compiled
@pytest.mark.parametrize("evaluate", [True, False], ids=["evaluated", "lazy"])
@pytest.mark.parametrize("name", HOLDERS)
@every_rule
def test_what_is_held_never_changes(case: Case, name: str, evaluate: bool, compiled: bool) -> None:
    hold = HOLDERS[name]
    expected = bits(hold(trained(case, compiled)))
    undisturbed = trained(case, compiled, 5)
    run = trained(case, compiled)
    held = hold(run)
    for i in range(2, 5):
        run.step(new_gradients(i, run.params), evaluate)
    assert bits(held) == expected
    assert bits(run.params) == bits(undisturbed.params)
    assert bits(run.optimizer.state) == bits(undisturbed.optimizer.state)
    assert bits(held) == expected


def state_leaf_for_each(run: Run) -> Any:
    slot = run.optimizer.slots[-1]
    return tree_map(
        lambda node: node[slot],
        {key: run.optimizer.state[key] for key in run.params},
        is_leaf=lambda node: isinstance(node, dict) and slot in node,
    )


# Gradients that lie where the step may want to write.
SHARED_GRADIENTS: dict[str, Callable[[Run], Any]] = {
    "the parameters": lambda run: run.params,
    "other parameters": lambda run: replaced(
        run.params, {"a": run.params["twin"], "twin": run.params["a"]}
    ),
    "reversed parameters": lambda run: tree_map(lambda p: p[::-1] if p.ndim else p, run.params),
    "functions of the parameters": lambda run: tree_map(mx.sin, run.params),
    "one parameter seen twice": lambda run: replaced(
        run.params,
        {"deep.2.2": mx.broadcast_to(run.params["deep"][1]["scalar"], (300,))},
    ),
    "the state": state_leaf_for_each,
    "functions of the state": lambda run: tree_map(mx.sin, state_leaf_for_each(run)),
}


@ours_or_compiled
@pytest.mark.parametrize("name", SHARED_GRADIENTS)
@every_rule
def test_gradients_that_share_memory_with_the_step_are_read_first(
    case: Case, name: str, compiled: bool
) -> None:
    run = trained(case, compiled)
    shadow = Shadow(lambda: case.make(optim), run.params)
    shadow.state = copied(run.optimizer.state)
    for _ in range(3):
        gradients = SHARED_GRADIENTS[name](run)
        shadow.step(gradients)
        run.step(gradients)
        del gradients
        assert_same_bits(run, shadow)


@ours_or_compiled
@pytest.mark.parametrize("evaluate", [True, False], ids=["evaluated", "lazy"])
@every_rule
def test_an_array_used_for_two_leaves_becomes_two(
    case: Case, evaluate: bool, compiled: bool
) -> None:
    run = trained(case, compiled)
    shadow = Shadow(lambda: case.make(optim), run.params)
    shadow.state = copied(run.optimizer.state)
    for i in range(4):
        if i % 2 == 0:
            run.params["twin"] = run.params["a"]
            shadow.params = copied(run.params)
        gradients = new_gradients(i, run.params)
        shadow.step(gradients)
        run.step(gradients, evaluate)
    assert_same_bits(run, shadow)


@ours_or_compiled
@every_rule
def test_weights_that_change_places_keep_their_values(case: Case, compiled: bool) -> None:
    run = trained(case, compiled)
    shadow = Shadow(lambda: case.make(optim), run.params)
    shadow.state = copied(run.optimizer.state)
    for i in range(3):
        run.params["a"], run.params["twin"] = run.params["twin"], run.params["a"]
        shadow.params = copied(run.params)
        gradients = new_gradients(i, run.params)
        shadow.step(gradients)
        run.step(gradients)
        assert_same_bits(run, shadow)


@ours_or_compiled
@every_rule
def test_weights_of_two_runs_may_be_mixed(case: Case, compiled: bool) -> None:
    run, other = trained(case, compiled, 2), trained(case, compiled, 3)
    shadow = Shadow(lambda: case.make(optim), run.params)
    shadow.state = copied(run.optimizer.state)
    # As many arrays share the first buffer as before, but one of them is held here.
    held = run.params["twin"]
    expected = bits(held)
    run.params["twin"] = other.params["twin"]
    shadow.params = copied(run.params)
    del other
    for i in range(3):
        gradients = new_gradients(i, run.params)
        shadow.step(gradients)
        run.step(gradients)
        assert_same_bits(run, shadow)
        assert bits(held) == expected


@ours_or_compiled
@every_rule
def test_a_parameter_may_be_the_learning_rate(case: Case, compiled: bool) -> None:
    run = trained(case, compiled)
    shadow = Shadow(lambda: case.make(optim), run.params)
    shadow.state = copied(run.optimizer.state)
    for i in range(3):
        run.optimizer.learning_rate = run.params["deep"][1]["scalar"]
        shadow.state["learning_rate"] = copied(run.params["deep"][1]["scalar"])
        gradients = new_gradients(i, run.params)
        shadow.step(gradients)
        run.step(gradients)
        assert_same_bits(run, shadow)


IMPORTS: dict[str, Callable[[Any], mx.array]] = {
    # The last two share the buffer on systems where MLX can.
    "mx.array": mx.array,
    "mx.asarray": mx.asarray,
    "mx.from_dlpack": mx.from_dlpack,
}


@ours_or_compiled
@pytest.mark.parametrize("name", IMPORTS)
@every_rule
def test_a_numpy_buffer_is_never_written(case: Case, name: str, compiled: bool) -> None:
    buffer = np.arange(128, dtype=np.float32)
    before = buffer.tobytes()
    run = Run(case.make(optim), {"w": IMPORTS[name](buffer)}, compiled)
    for slot in case.slots:
        run.optimizer.state["w"][slot] = IMPORTS[name](buffer)
    for _ in range(3):
        run.step({"w": IMPORTS[name](buffer)})
    assert buffer.tobytes() == before


@every_rule
def test_flat_updates_never_write_a_numpy_buffer_or_what_is_held(case: Case) -> None:
    buffer = np.arange(128, dtype=np.float32)
    optimizer = case.make(optim)
    state = tuple(mx.from_dlpack(buffer) for _ in case.slots)
    parameter, step = mx.from_dlpack(buffer), mx.array(0, mx.uint64)
    held: list[Any] = []
    expected: list[Any] = []
    for i in range(6):
        parameter, state, step, _ = optimizer.flat_update(
            parameter, mx.from_dlpack(buffer), *state, step=step
        )
        if i % 2 == 0:
            held.append([parameter, *state])
            expected.append(bits(held[-1]))
    assert buffer.tobytes() == np.arange(128, dtype=np.float32).tobytes()
    assert [bits(arrays) for arrays in held] == expected


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "dict": dict,
    "tree_map": lambda state: tree_map(lambda leaf: leaf, state),
}


@ours_or_compiled
@pytest.mark.parametrize("name", COPIES)
@every_rule
def test_two_optimizers_that_start_from_one_state_go_their_own_ways(
    case: Case, name: str, compiled: bool
) -> None:
    first = trained(case, compiled)
    shadow = Shadow(lambda: case.make(optim), first.params)
    shadow.state = copied(first.optimizer.state)
    other_shadow = copy.copy(shadow)
    twin = case.make(optim)
    twin.state = COPIES[name](first.optimizer.state)
    # Both start from the very same weights as well.
    second = Run(twin, tree_map(lambda p: p, first.params), compiled)
    for i in range(3):
        for run, its_shadow, seed in ((first, shadow, i), (second, other_shadow, 10 + i)):
            gradients = new_gradients(seed, run.params)
            its_shadow.step(gradients)
            run.step(gradients)
            assert_same_bits(first, shadow)
            assert_same_bits(second, other_shadow)


@every_rule
def test_mlx_may_go_on_with_our_very_arrays(case: Case) -> None:
    run, theirs, reference = trained(case, False), case.make(mlx.optimizers), case.make(optim)
    reference.state = copied(run.optimizer.state)
    expected = copied(run.params)
    theirs.state = tree_map(lambda leaf: leaf, run.optimizer.state)
    got = tree_map(lambda p: p, run.params)
    for i in range(3):
        gradients = new_gradients(i, got)
        got = theirs.apply_gradients(gradients, got)
        expected = reference.apply_gradients(gradients, expected)
        run.step(new_gradients(100 + i, run.params))
    assert_trees_close(got, expected)


@ours_or_compiled
@every_rule
def test_what_another_stream_still_reads_does_not_change(case: Case, compiled: bool) -> None:
    expected = bits(tree_map(mx.sin, trained(case, compiled).params))
    run = trained(case, compiled)
    with mx.stream(mx.new_stream(mx.cpu)):
        # Keeps the other stream busy, so that its reads come after the steps.
        busy = mx.random.normal((400, 400))
        for _ in range(20):
            busy = mx.tanh(busy @ busy)
        late = tree_map(lambda p: mx.sin(p + 0 * busy[0, 0]), run.params)
        mx.async_eval(late)
    for i in range(2, 5):
        run.step(new_gradients(i, run.params))
    assert bits(late) == expected
