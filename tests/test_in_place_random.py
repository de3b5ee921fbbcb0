"""Random training runs, of which nobody can tell that they reuse memory.

Hypothesis chooses a tree and what happens to it: steps of all kinds, references taken to anything,
weights and state replaced. ``Shadow`` does the same with copies of everything. Both must agree bit
for bit, and so must each held reference with what it was when it was taken.
"""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import flatstep as optim
import mlx.core as mx
import numpy as np
from cases import DTYPES, RULES, Case, leaves, random_array
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from mlx.utils import tree_map
from shadow import Run, Shadow, assert_same_bits, bits, copied, part_of, replaced

SHAPES = [(), (1,), (0,), (3,), (64,), (65,), (128,), (0, 4), (5, 7), (2, 3, 4), (700,), (33, 31)]
RATES: list[Callable[[], Any]] = [
    lambda: 0.01,
    lambda: optim.cosine_decay(0.1, 20),
    lambda: lambda step: 0.1 / (1 + step),
]

leaf_specs = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES))
trees = st.dictionaries(
    st.sampled_from("abcd"),
    st.recursive(
        st.builds(lambda spec: {"w": spec}, leaf_specs),
        lambda child: st.one_of(
            st.lists(child, max_size=4),
            st.lists(child, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("uvwxyz"), child, max_size=4),
        ),
        max_leaves=8,
    ),
    min_size=1,
    max_size=4,
)

EVALUATIONS = st.sampled_from(["eval", "nothing", "async_eval", "only parameters", "only state"])


def is_spec(node: Any) -> bool:
    return isinstance(node, tuple) and len(node) == 2 and isinstance(node[1], mx.Dtype)


def has_leaves(training: Any) -> bool:
    return hasattr(training, "run") and bool(training.paths())


# Ways to hold on to an array, lazily or not. What they give must stay what it is at first.
WAYS: dict[str, Callable[[mx.array], Any]] = {
    "the array": lambda a: a,
    "a lazy expression": lambda a: a * 2 + 1,
    "a lazy slice": lambda a: a.reshape(-1)[::2],
    "an evaluated transpose": lambda a: evaluated(a.T),
    "an evaluated slice": lambda a: evaluated(a.reshape(-1)[1:]),
    "NumPy's view": lambda a: np.array(
        a.view(mx.uint16) if a.dtype == mx.bfloat16 else a, copy=False
    ),
    "a NumPy buffer's array": lambda a: mx.from_dlpack(np.array(a.astype(mx.float32))),
}


def evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


def subtree(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[int(key) if isinstance(tree, list | tuple) else key]
    return tree


class Training(RuleBasedStateMachine):
    """A run and its shadow, and everything that somebody holds."""

    @initialize(
        specs=trees,
        case=st.sampled_from(RULES),
        rate=st.sampled_from(RATES),
        state_dtype=st.sampled_from([None, *DTYPES]),
        seed=st.integers(0, 2**32),
    )
    def start(self, specs: Any, case: Case, rate: Any, state_dtype: Any, seed: int) -> None:
        # Small buckets, so that these trees fill several.
        self.patch = mock.patch("flatstep.state.BUCKET_BYTES", 1024)
        self.patch.start()
        self.rng = np.random.default_rng(seed)
        params = tree_map(
            lambda spec: random_array(spec[0], self.rng, spec[1]), specs, is_leaf=is_spec
        )
        learning_rate = rate()

        def make() -> Any:
            rule = getattr(optim, case.rule)
            return rule(learning_rate, **case.arguments, state_dtype=state_dtype)

        self.slots = case.slots
        self.shadow = Shadow(make, params)
        self.run = Run(make(), params)
        self.held_now: list[tuple[Any, dict[str, bytes]]] = []
        self.older: list[Any] = []

    def teardown(self) -> None:
        if hasattr(self, "run"):
            for thing, expected in self.held_now:
                assert bits(thing) == expected
            assert_same_bits(self.run, self.shadow)
            self.patch.stop()

    # ---- Something to choose from ----

    def paths(self) -> list[str]:
        return list(leaves(self.shadow.params))

    def choose(self, data: st.DataObject) -> str:
        path: str = data.draw(st.sampled_from(self.paths()), label="leaf")
        return path

    def alike(self, path: str) -> list[str]:
        """The leaves that could stand at this place."""
        params = leaves(self.shadow.params)
        like = (params[path].shape, params[path].dtype)
        return [other for other, p in params.items() if (p.shape, p.dtype) == like]

    def state_leaf(self, path: str, slot: str) -> mx.array:
        array: mx.array = subtree(self.run.optimizer.state, path)[slot]
        return array

    def gradient(self, data: st.DataObject, path: str) -> mx.array:
        """One of the layouts and the owners of memory that a gradient may have."""
        parameter = leaves(self.run.params)[path]
        dtype = data.draw(st.sampled_from([parameter.dtype, mx.float32, mx.bfloat16]))
        fresh = random_array(parameter.shape, self.rng, dtype)
        kinds: dict[str, Callable[[], mx.array]] = {
            "fresh": lambda: fresh,
            "lazy": lambda: fresh * 0.5,
            "transposed": lambda: random_array(parameter.shape[::-1], self.rng, dtype).T,
            "broadcast": lambda: mx.ones_like(parameter),
            "the parameter": lambda: parameter,
            "of the parameter": lambda: mx.sin(parameter),
            "the state": lambda: self.state_leaf(path, self.slots[-1]),
        }
        return kinds[data.draw(st.sampled_from(list(kinds)))]()

    # ---- What may happen ----

    @rule(count=st.integers(1, 3), after=EVALUATIONS)
    def train(self, count: int, after: str) -> None:
        """Ordinary steps: from the second on, nothing but what is held is in the way of reuse."""
        for _ in range(count):
            params = self.shadow.params
            gradients = tree_map(lambda p: random_array(p.shape, self.rng, p.dtype), params)
            self.take_step(gradients, after)

    @rule(data=st.data(), everything=st.booleans(), after=EVALUATIONS)
    def step(self, data: st.DataObject, everything: bool, after: str) -> None:
        given = set(self.paths())
        if given and not everything:
            given = set(data.draw(st.lists(st.sampled_from(self.paths()))))
        chosen = {path: self.gradient(data, path) for path in sorted(given)}
        gradients = replaced(part_of(self.run.params, given), chosen)
        del chosen
        self.take_step(gradients, after)

    def take_step(self, gradients: Any, after: str) -> None:
        self.shadow.step(gradients)
        self.run.step(gradients, evaluate=False)
        state = self.run.optimizer.state
        if after == "eval":
            mx.eval(self.run.params, state)
        elif after == "async_eval":
            mx.async_eval(self.run.params, state)
        elif after == "only parameters":
            mx.eval(self.run.params)
        elif after == "only state":
            mx.eval(state)

    @rule(compiled=st.booleans())
    def compile_or_not(self, compiled: bool) -> None:
        self.run.use(compiled)

    @precondition(has_leaves)
    @rule(data=st.data(), way=st.sampled_from(list(WAYS)), state=st.booleans())
    def hold(self, data: st.DataObject, way: str, state: bool) -> None:
        path = self.choose(data)
        slot = data.draw(st.sampled_from(self.slots))
        source = self.state_leaf(path, slot) if state else leaves(self.run.params)[path]
        same = leaves(self.shadow.state)[f"{path}.{slot}"] if state else None
        expected = bits(
            WAYS[way](copied(leaves(self.shadow.params)[path] if same is None else same))
        )
        self.held_now.append((WAYS[way](source), expected))

    @rule(duplicate=st.sampled_from([copy.copy, copy.deepcopy, lambda s: tree_map(lambda a: a, s)]))
    def hold_the_state(self, duplicate: Callable[[Any], Any]) -> None:
        self.held_now.append((duplicate(self.run.optimizer.state), bits(self.shadow.state)))

    @rule()
    def hold_the_parameters(self) -> None:
        params = tree_map(lambda p: p, self.run.params)
        self.held_now.append((params, bits(self.shadow.params)))
        self.older.append(params)

    @rule()
    def forget_older_parameters(self) -> None:
        self.older.clear()

    @precondition(lambda self: self.held_now)
    @rule(data=st.data(), look=st.booleans())
    def let_go(self, data: st.DataObject, look: bool) -> None:
        thing, expected = self.held_now.pop(data.draw(st.integers(0, len(self.held_now) - 1)))
        assert not look or bits(thing) == expected

    @rule()
    def look_at_everything(self) -> None:
        assert_same_bits(self.run, self.shadow)

    @precondition(has_leaves)
    @rule(data=st.data(), lazily=st.booleans())
    def write_a_state_leaf(self, data: st.DataObject, lazily: bool) -> None:
        path, slot = self.choose(data), data.draw(st.sampled_from(self.slots))
        shape = leaves(self.shadow.params)[path].shape
        value = mx.abs(random_array(shape, self.rng))
        if not lazily:
            mx.eval(value)
        subtree(self.run.optimizer.state, path)[slot] = value
        dtype = leaves(self.shadow.state)[f"{path}.{slot}"].dtype
        self.shadow.state = replaced(self.shadow.state, {f"{path}.{slot}": value.astype(dtype)})

    @precondition(has_leaves)
    @rule(data=st.data(), kind=st.sampled_from(["fresh", "tied", "reversed", "NumPy", "older"]))
    def replace_a_parameter(self, data: st.DataObject, kind: str) -> None:
        path = self.choose(data)
        params = leaves(self.run.params)
        old = params[path]
        older = [leaves(thing)[path] for thing in self.older if path in leaves(thing)]
        kinds: dict[str, Callable[[], mx.array]] = {
            "fresh": lambda: random_array(old.shape, self.rng, old.dtype),
            "tied": lambda: params[data.draw(st.sampled_from(self.alike(path)))],
            "reversed": lambda: old.reshape(-1)[::-1].reshape(old.shape),
            "NumPy": lambda: mx.from_dlpack(np.array(old.astype(mx.float32))).astype(old.dtype),
            "older": lambda: data.draw(st.sampled_from([old, *older])),
        }
        self.run.params = replaced(self.run.params, {path: kinds[kind]()})
        self.shadow.params = copied(self.run.params)

    @precondition(has_leaves)
    @rule(data=st.data())
    def exchange_two_parameters(self, data: st.DataObject) -> None:
        a = self.choose(data)
        b = data.draw(st.sampled_from(self.alike(a)))
        params = leaves(self.run.params)
        self.run.params = replaced(self.run.params, {a: params[b], b: params[a]})
        self.shadow.params = copied(self.run.params)

    @rule()
    def go_back_to_plain_arrays(self) -> None:
        """What loading a checkpoint does."""
        self.run.optimizer.state = copied(self.run.optimizer.state)
        self.run = Run(self.run.optimizer, copied(self.run.params))

    @rule(duplicate=st.sampled_from([copy.copy, copy.deepcopy]), goes_on=st.booleans())
    def step_with_another_optimizer(self, duplicate: Callable[[Any], Any], goes_on: bool) -> None:
        """It starts from the same state and the same weights; either of the two goes on."""
        twin = self.shadow.make()
        twin.state = duplicate(self.run.optimizer.state)
        other = Run(twin, tree_map(lambda p: p, self.run.params))
        its_shadow = copy.copy(self.shadow)
        its_shadow.step(self.run.params)
        other.step(self.run.params)
        assert_same_bits(other, its_shadow)
        if goes_on:
            self.run, self.shadow = other, its_shadow


Training.TestCase.settings = settings(
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestRandomTraining = Training.TestCase
