"""Groups of parameters: which are in them, what is other there, and what of it is seen and set."""

from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from cases import Case, leaves, random_tree
from flatstep.diagnosis.cases import MOMENTUM, SCHEDULES
from mlx.utils import tree_map
from models import assert_trees_equal
from pass_reference import Parameters, PassReference, Training, model_of
from reference import relative_distance, schedule_value, to_float64
from shadow import bits

SHAPES = {
    "embed": {"weight": (30, 8)},
    "layers": [{"weight": (8, 8), "bias": (8,)}, {"weight": (70, 8), "bias": (70,)}],
    "norm": {"weight": (8,)},
}
PATHS = list(leaves(random_tree(SHAPES, np.random.default_rng(0))))
ADAMW = Case("AdamW", {"weight_decay": 0.1, "bias_correction": True})

modes = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def new_tree(seed: int) -> Any:
    return random_tree(SHAPES, np.random.default_rng(seed))


def train(reference: PassReference, steps: int, compiled: bool = False) -> Training:
    training = Training(reference, new_tree(1), compiled)
    for seed in range(steps):
        training.update(new_tree(seed + 2))
    return training


def grouped(*groups: optim.Group, **options: Any) -> Any:
    optimizer = optim.AdamW(1e-2, groups=groups, **options)
    optimizer.init(new_tree(1))
    return optimizer


def paths_of(*groups: optim.Group) -> list[list[str]]:
    return [group.paths for group in grouped(*groups).groups]


# ---- Which parameters are in a group ----

MATCHES: dict[str, tuple[Any, list[str]]] = {
    "a path": ("norm.weight", ["norm.weight"]),
    "a glob": ("*.bias", ["layers.0.bias", "layers.1.bias"]),
    "a glob in the middle": ("layers.*.weight", ["layers.0.weight", "layers.1.weight"]),
    "one character": ("layers.?.bias", ["layers.0.bias", "layers.1.bias"]),
    "a set": ("layers.[1-9].bias", ["layers.1.bias"]),
    "everything": ("*", PATHS),
    "nothing": ("bias", []),
    "another case": ("NORM.weight", []),
    "no prefix": ("layers", []),
    "globs": (["norm.*", "embed.*"], ["embed.weight", "norm.weight"]),
    "a tuple of globs": (("norm.*", "nothing"), ["norm.weight"]),
    "no globs": ([], []),
    "of the path": (lambda path, _: "1" in path, ["layers.1.weight", "layers.1.bias"]),
    "of the weight": (lambda _, p: p.shape[0] == 70, ["layers.1.weight", "layers.1.bias"]),
    "of its dtype": (lambda _, p: p.dtype == mx.float16, []),
}


@pytest.mark.parametrize("name", MATCHES)
def test_a_match_names_the_parameters_of_a_group(name: str) -> None:
    match, expected = MATCHES[name]
    inside, rest = paths_of(optim.Group(match, weight_decay=0.0))
    assert sorted(inside) == sorted(expected)
    assert sorted(inside + rest) == sorted(PATHS)


def test_the_first_match_wins() -> None:
    groups = [optim.Group(match) for match in ("layers.0.*", "*.bias", "layers.*", "*.bias")]
    of_groups = [set(paths) for paths in paths_of(*groups)]
    assert of_groups == [
        {"layers.0.weight", "layers.0.bias"},
        {"layers.1.bias"},
        {"layers.1.weight"},
        set(),
        {"embed.weight", "norm.weight"},
    ]


def test_a_predicate_is_given_the_parameter_itself() -> None:
    tree, seen = new_tree(1), {}

    def keep(path: str, parameter: mx.array) -> bool:
        seen[path] = parameter
        return False

    optimizers = [optim.AdamW(1e-2, groups=[optim.Group(keep)]) for _ in range(3)]
    optimizers[0].apply_gradients(new_tree(2), tree)
    optimizers[1].init(tree)
    optimizers[2].state = optim.AdamW(1e-2).state
    optimizers[2].apply_gradients(new_tree(2), tree)
    for optimizer in optimizers:
        assert optimizer.groups[1].paths == PATHS
    for path, parameter in leaves(tree).items():
        assert (seen[path].shape, seen[path].dtype) == (parameter.shape, parameter.dtype)
        assert mx.array_equal(seen[path], parameter), path


def test_a_predicate_of_values_is_asked_of_the_first_weights() -> None:
    """A compiled function has none to look at; neither has who only asks for the groups."""
    group = optim.Group(lambda _, p: bool(mx.any(p > 0.5).item()), lr_scale=0.0)
    optimizer, params = optim.SGD(1.0, groups=[group]), {"a": mx.ones(3), "b": mx.zeros(3)}
    optimizer.init(params)
    assert [g.paths for g in optimizer.groups] == [["a"], ["b"]]
    apply, state = optimizer.apply_gradients, optimizer.state
    params = mx.compile(apply, inputs=state, outputs=state)(tree_map(mx.ones_like, params), params)
    assert (params["a"].tolist(), params["b"].tolist()) == ([1.0] * 3, [-1.0] * 3)
    other = optim.SGD(1.0)
    other.init(params)
    other.groups = [group]
    assert [g.paths for g in other.groups] == [[], ["a", "b"]]  # no weights are known here
    other.apply_gradients(params, params)
    assert [g.paths for g in other.groups] == [["a"], ["b"]]


def test_no_decay_is_for_all_that_is_no_matrix() -> None:
    inside, rest = paths_of(optim.no_decay)
    assert sorted(inside) == ["layers.0.bias", "layers.1.bias", "norm.weight"]
    assert len(rest) == 3
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 4))
    optimizer = optim.AdamW(0.1, weight_decay=0.5, groups=[optim.no_decay])
    before = model.trainable_parameters()
    optimizer.update(model, tree_map(mx.zeros_like, before))
    for path, p in leaves(model.trainable_parameters()).items():
        old = leaves(before)[path]
        expected = old if old.ndim < 2 else 0.95 * old
        assert mx.allclose(p, expected, 1e-6, 0), path


def test_groups_before_and_without_init() -> None:
    optimizer = optim.AdamW(1e-2, groups=[optim.no_decay])
    assert [group.paths for group in optimizer.groups] == [[], []]
    assert [group.group for group in optimizer.groups] == [optim.no_decay, None]
    assert [group.paths for group in optim.AdamW(1e-2).groups] == [[]]
    assert "group_learning_rates" not in optim.AdamW(1e-2).state


# ---- What is other in a group ----

OTHERS: dict[str, tuple[Case, list[Parameters]]] = {
    "a decay": (ADAMW, [Parameters("*.bias", arguments={"weight_decay": 0.0})]),
    "betas": (ADAMW, [Parameters("layers.*", arguments={"betas": (0.5, 0.7), "eps": 1e-2})]),
    "no bias correction": (ADAMW, [Parameters("*.bias", arguments={"bias_correction": False})]),
    "a rate": (ADAMW, [Parameters("embed.*", 0.3), Parameters("*.bias", 0.0)]),
    "a scale": (ADAMW, [Parameters("embed.*", scale=0.1), Parameters("*.bias", scale=0.0)]),
    "a rate with a scale": (ADAMW, [Parameters("embed.*", 0.3, 0.5)]),
    "frozen": (ADAMW, [Parameters("embed.*", frozen=True), Parameters("*.bias", scale=2.0)]),
    "nothing": (ADAMW, [Parameters("*.bias")]),
    "no parameters": (ADAMW, [Parameters("nobody", 0.1)]),
    "no rest": (ADAMW, [Parameters("layers.*", 0.1), Parameters("*", scale=3.0)]),
    "momentum in one group": (
        Case("SGD", {"weight_decay": 0.01}),
        [Parameters("layers.*", arguments={"momentum": 0.9, "dampening": 0.1})],
    ),
    "no momentum in one group": (MOMENTUM, [Parameters("layers.*", arguments={"momentum": 0.0})]),
    "nesterov in one group": (
        Case("SGD", {"momentum": 0.9}),
        [Parameters("layers.*", arguments={"nesterov": True})],
    ),
    "Lion": (Case("Lion", {}), [Parameters("*.bias", 0.02, arguments={"weight_decay": 0.5})]),
}


@modes
@pytest.mark.parametrize("name", OTHERS)
def test_what_a_group_does_not_name_it_takes_from_the_optimizer(name: str, compiled: bool) -> None:
    case, groups = OTHERS[name]
    train(PassReference(case, groups=groups), 4, compiled)


@modes
@pytest.mark.parametrize("rate", ["cosine_decay", "callable"])
@pytest.mark.parametrize("own", SCHEDULES)
def test_a_schedule_of_a_group_is_evaluated_like_the_main_one(
    own: str, rate: str, compiled: bool
) -> None:
    groups = [
        Parameters("embed.*", SCHEDULES[own], 0.5),
        Parameters("*.bias", scale=0.1),
        Parameters("norm.*", SCHEDULES[rate]),
    ]
    reference = PassReference(ADAMW, SCHEDULES[rate], groups)
    initial = [schedule_value(SCHEDULES[name], 0) for name in (own, rate, rate)]
    expected = [0.5 * initial[0], 0.1 * initial[1], initial[2]]
    rates = reference.make().state["group_learning_rates"]
    np.testing.assert_allclose(to_float64(rates), expected, 1e-6, 1e-12)
    assert rates.dtype == mx.float32
    training = train(reference, 4, compiled)
    # Those of the last step are what the state has, and each group by itself.
    seen = [group.learning_rate.item() for group in training.optimizer.groups]
    state = training.optimizer.state
    assert seen == [*state["group_learning_rates"].tolist(), state["learning_rate"].item()]


def multi(groups: list[Parameters]) -> Any:
    """A MultiOptimizer of as many AdamW."""
    rates = [1e-2 * g.scale if g.rate is None else g.rate * g.scale for g in groups]
    pairs = zip(rates, groups, strict=True)
    all_of_them = [mlx.optimizers.AdamW(rate, **g.arguments) for rate, g in pairs]
    filters = [lambda path, p, g=g: g.matches(path, np.array(p)) for g in groups]
    return mlx.optimizers.MultiOptimizer([*all_of_them, mlx.optimizers.AdamW(1e-2)], filters)


def own_decay(i: int) -> Parameters:
    return Parameters(f"layers.{i}.weight", 1e-3 * (i + 1), arguments={"weight_decay": 0.01 * i})


MANY = {"layers": [{"weight": (3, 4), "bias": (3,)} for _ in range(40)]}


@modes
@pytest.mark.parametrize("count", [1, 2, 10, 33, 40])
def test_groups_are_as_many_optimizers_of_mlx(count: int, compiled: bool) -> None:
    groups = [Parameters("*.bias", arguments={"weight_decay": 0.0}), *map(own_decay, range(count))]
    training = Training(
        PassReference(Case("AdamW", {}), 1e-2, groups),
        random_tree(MANY, np.random.default_rng(3)),
        compiled,
    )
    theirs = multi(groups)
    expected: Any = training.model.parameters()
    start = leaves(expected)
    for seed in range(5):
        gradients = random_tree(MANY, np.random.default_rng(seed))
        training.update(gradients)
        expected = theirs.apply_gradients(gradients, expected)
        mx.eval(expected, theirs.state)
    got = leaves(training.model.parameters())
    for path, p in leaves(expected).items():
        a, b, c = (to_float64(x) for x in (got[path], p, start[path]))
        assert relative_distance(a, b, c) < 1e-6, path
    of_groups = [len(group.paths) for group in training.optimizer.groups]
    assert of_groups == [40, *[1] * count, 40 - count]


# ---- Frozen groups ----


def evaluated_when_read() -> mx.array:
    """A gradient whose evaluation fails."""
    return mx.linalg.inv(mx.zeros((30, 30)), stream=mx.cpu)[:, :8]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "ema": 0.9, "accumulate_steps": 1}])
def test_a_frozen_gradient_is_not_read(options: dict[str, Any]) -> None:
    optimizer = grouped(optim.Group("embed.*", frozen=True), **options)
    params = new_tree(1)
    before = bits([params["embed"], optimizer.state["embed"]])
    for seed in range(3):
        gradients = new_tree(seed)
        gradients["embed"]["weight"] = evaluated_when_read()
        updated = optimizer.apply_gradients(gradients, params)
        assert mx.array_equal(updated["embed"]["weight"], params["embed"]["weight"])
        params = updated
        mx.eval(params, optimizer.state)
    assert bits([params["embed"], optimizer.state["embed"]]) == before
    moved = bits([params["layers"], params["norm"]])
    assert moved.items().isdisjoint(bits([new_tree(1)["layers"], new_tree(1)["norm"]]).items())


@modes
def test_a_frozen_group_is_not_in_the_norm(compiled: bool) -> None:
    groups = [Parameters("embed.*", frozen=True)]
    training = Training(
        PassReference(ADAMW, groups=groups, max_grad_norm=0.5, skip_nonfinite=True),
        new_tree(1),
        compiled,
    )
    gradients = new_tree(2)
    gradients["embed"]["weight"] = mx.full((30, 8), mx.nan)
    training.update(gradients)
    rest = [to_float64(g) for path, g in leaves(gradients).items() if "embed" not in path]
    norm = np.sqrt(sum(np.sum(g**2) for g in rest))
    assert training.optimizer.state["grad_norm"].item() == pytest.approx(norm, rel=1e-6)
    assert training.optimizer.state["skipped_steps"].item() == 0


def test_all_may_be_frozen() -> None:
    optimizer = grouped(optim.Group("*", frozen=True), max_grad_norm=1.0)
    params = optimizer.apply_gradients(new_tree(2), new_tree(1))
    assert_trees_equal(params, new_tree(1))
    assert optimizer.step.item() == 1 and optimizer.state["grad_norm"].item() == 0


# ---- Set between steps ----


@modes
def test_a_rate_that_is_set_is_what_the_next_step_takes(compiled: bool) -> None:
    groups = [Parameters("embed.*", 0.1, 0.5), Parameters("*.bias", scale=2.0)]
    training = Training(PassReference(ADAMW, 1e-2, groups), new_tree(1), compiled)
    optimizer = training.optimizer
    of_embed = optimizer.groups[0]
    assert of_embed.learning_rate.item() == np.float32(0.05)
    rates: list[Any] = [None, 0.2, mx.array(0.3), mx.array([0.4], mx.bfloat16), 0.0]
    for seed, rate in enumerate(rates):
        if rate is not None:
            of_embed.learning_rate = rate
            assert optimizer.groups[0].learning_rate.item() == np.float32(mx.array(rate).item())
        training.update(new_tree(seed))
    # The others follow the optimizer's.
    optimizer.learning_rate = 0.7
    training.update(new_tree(9))
    assert optimizer.state["group_learning_rates"].tolist() == np.float32([0, 1.4]).tolist()
    optimizer.groups[-1].learning_rate = 0.25
    training.update(new_tree(10))
    assert optimizer.learning_rate.item() == 0.25


@modes
def test_groups_that_are_assigned_keep_the_state(compiled: bool) -> None:
    first = [Parameters("layers.*", 0.1), Parameters("*.bias", arguments={"weight_decay": 0.0})]
    training = train(PassReference(ADAMW, 1e-2, first), 3)
    kept = bits({key: training.optimizer.state[key] for key in SHAPES})
    for groups in (
        [Parameters("layers.0.*", scale=0.1), Parameters("layers.1.*", ("cosine_decay", 0.1, 9))],
        [Parameters("embed.*", frozen=True)],
        [],
        [Parameters("*", 0.5)],
    ):
        reference = PassReference(ADAMW, 1e-2, groups)
        training.optimizer.groups = [group.make() for group in groups]
        assert bits({key: training.optimizer.state[key] for key in SHAPES}) == kept
        assert ("group_learning_rates" in training.optimizer.state) == bool(groups)
        going_on = Training.of(reference, training.optimizer, training.model, compiled)
        for seed in (5, 6):
            going_on.update(new_tree(seed))
        kept = bits({key: training.optimizer.state[key] for key in SHAPES})


def test_a_layer_that_changes_groups_goes_on_as_if_it_had_been_there() -> None:
    """Unfreezing layer by layer, as fine-tuning does."""
    optimizer = grouped(optim.Group("layers.*", frozen=True))
    alone = optim.AdamW(1e-2)
    params = new_tree(1)
    params = optimizer.apply_gradients(new_tree(2), params)
    optimizer.groups = [optim.Group("layers.0.*", frozen=True)]
    params = optimizer.apply_gradients(new_tree(3), params)
    layer = new_tree(1)["layers"][1]
    alone.init(layer)
    alone.state["step"] = 1
    layer = alone.apply_gradients(new_tree(3)["layers"][1], layer)
    assert_trees_equal(params["layers"][1], layer)
    assert_trees_equal(params["layers"][0], new_tree(1)["layers"][0])
    assert optimizer.groups[0].paths == ["layers.0.weight", "layers.0.bias"]


def test_a_hyperparameter_that_is_set_is_that_of_the_groups_without_their_own() -> None:
    groups = [Parameters("*.bias", arguments={"weight_decay": 0.0}), Parameters("embed.*", 0.1)]
    training = train(PassReference(ADAMW, groups=groups), 1)
    training.optimizer.weight_decay, training.optimizer.betas = 0.7, [0.5, 0.6]
    arguments = {**ADAMW.arguments, "weight_decay": 0.7, "betas": [0.5, 0.6]}
    reference = PassReference(Case("AdamW", arguments), groups=groups)
    Training.of(reference, training.optimizer, training.model).update(new_tree(5))


def test_parameters_that_are_added_find_their_groups() -> None:
    groups = [Parameters("embed.*", frozen=True), Parameters("*.bias", scale=3.0)]
    reference = PassReference(ADAMW, groups=groups)
    whole = new_tree(1)
    training = Training(reference, {"layers": whole["layers"]})
    training.update({"layers": new_tree(2)["layers"]})
    optimizer, model = training.optimizer, model_of(whole)
    optimizer.init(model.parameters())
    biases = ["layers.0.bias", "layers.1.bias"]
    assert [sorted(group.paths) for group in optimizer.groups][:2] == [["embed.weight"], biases]
    Training.of(reference, optimizer, model).update(new_tree(3))
