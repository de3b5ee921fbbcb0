"""``state_dtype=mx.int8``: what the optimizers of that name hold, show, save and learn."""

import copy
import gc
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flatstep
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from cases import leaves
from mlx.utils import tree_flatten, tree_map, tree_unflatten

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW8bit": flatstep.AdamW8bit,
    "Adam8bit": partial(flatstep.Adam8bit, bias_correction=True),
    "Lion8bit": flatstep.Lion8bit,
    "SGD8bit": partial(flatstep.SGD8bit, momentum=0.9),
}
by_name = pytest.mark.parametrize("name", OPTIMIZERS)
modes = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def model(dtype: mx.Dtype = mx.float32) -> nn.Module:
    """Two tensors that get codes, one of them with a ragged end, and five that do not."""
    mx.random.seed(3)
    made = nn.Sequential(nn.Linear(70, 99), nn.LayerNorm(99), nn.Linear(99, 70))
    made.set_dtype(dtype)
    mx.eval(made.parameters())
    return made


def loss(net: nn.Module, x: mx.array) -> mx.array:
    return ((net(x) - mx.sin(3 * x)) ** 2).mean()


class Run:
    """Steps of a model, eager or compiled, over batches that the number of the step decides."""

    def __init__(self, optimizer: Any, net: nn.Module, compiled: bool = False) -> None:
        self.optimizer, self.net = optimizer, net
        optimizer.init(net.trainable_parameters())
        self._step: Callable[[mx.array], mx.array] = self._one
        if compiled:
            state = [net.state, optimizer.state]
            self._step = mx.compile(self._one, inputs=state, outputs=state)

    def _one(self, x: mx.array) -> mx.array:
        value, gradients = nn.value_and_grad(self.net, loss)(self.net, x)
        self.optimizer.update(self.net, gradients)
        return value

    def steps(self, first: int, count: int) -> float:
        value = mx.array(0.0)
        for number in range(first, first + count):
            x = mx.random.normal((16, 70), key=mx.random.key(number))
            value = self._step(x)
            mx.eval(value, self.net.parameters(), self.optimizer.state)
        return float(value.item())


def same(a: Any, b: Any) -> bool:
    a, b = leaves(a), leaves(b)
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]).item() for k in a)


@modes
@by_name
def test_it_learns_as_with_float32_state(name: str, compiled: bool) -> None:
    rate = 1e-2 if name == "SGD8bit" else 1e-3
    exact = Run(OPTIMIZERS[name](rate, state_dtype=mx.float32), model())
    coded = Run(OPTIMIZERS[name](rate), model(), compiled)
    start = exact.steps(0, 1)
    coded.steps(0, 1)
    expected, got = exact.steps(1, 60), coded.steps(1, 60)
    assert expected < 0.9 * start
    assert got == pytest.approx(expected, rel=0.05)


def test_eager_and_compiled_give_the_same_bits() -> None:
    runs = [Run(flatstep.AdamW8bit(1e-3), model(), compiled) for compiled in (False, True)]
    for run in runs:
        run.steps(0, 5)
    assert same(runs[0].optimizer.state, runs[1].optimizer.state)
    assert same(runs[0].net.parameters(), runs[1].net.parameters())


@by_name
def test_a_leaf_shows_codes_and_scales_if_it_is_large_enough(name: str) -> None:
    run = Run(OPTIMIZERS[name](1e-3), model())
    run.steps(0, 1)
    state = run.optimizer.state["layers"]
    for slot in run.optimizer.slots:
        blocks = state[0]["weight"][slot]
        assert list(blocks) == ["codes", "scales"]
        assert (blocks["codes"].shape, blocks["codes"].dtype) == ((99, 70), mx.uint8)
        assert (blocks["scales"].shape, blocks["scales"].dtype) == ((109,), mx.float32)
        assert mx.any(blocks["codes"] != 0).item()
        assert state[0]["bias"][slot].dtype == mx.float32


def test_full_precision_names_what_keeps_float32() -> None:
    asked: list[str] = []

    def full_precision(path: str, weight: mx.array) -> bool:
        asked.append(path)
        return weight.shape[0] == 99

    run = Run(flatstep.AdamW8bit(1e-3, full_precision=full_precision), model())
    run.steps(0, 1)
    state = run.optimizer.state["layers"]
    assert state[0]["weight"]["v"].dtype == mx.float32
    assert list(state[2]["weight"]["v"]) == ["codes", "scales"]
    assert set(asked) == {"layers.0.weight", "layers.2.weight"}
    # State that this optimizer made is its own: it is not asked again, nor laid out anew.
    number, own = len(asked), run.optimizer.state
    run.optimizer.state = own
    assert run.optimizer.state is own and len(asked) == number


def transformer_shapes() -> dict[str, tuple[int, ...]]:
    """A transformer of 27 million parameters."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (16000, 512)}
    for layer in range(6):
        for name in ("query", "key", "value", "out"):
            shapes[f"{layer}.{name}"] = (512, 512)
        shapes |= {f"{layer}.up": (2048, 512), f"{layer}.down": (512, 2048)}
        shapes |= {f"{layer}.norm{k}": (512,) for k in range(2)}
    return shapes


@pytest.mark.parametrize(("bits", "most"), [(None, 4.13), (24, 5.2), (32, 6.2)])
def test_bytes_held(bits: int | None, most: float) -> None:
    gc.collect()
    before = mx.get_active_memory()
    optimizer = flatstep.AdamW8bit(1e-3, master_weight_bits=bits)
    parameters: Any = {k: mx.zeros(s, mx.bfloat16) for k, s in transformer_shapes().items()}
    count = sum(p.size for p in parameters.values())
    mx.eval(parameters)
    for _ in range(2):
        gradients = tree_map(mx.ones_like, parameters)
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    del gradients
    held = sum(a.nbytes for _, a in tree_flatten(optimizer.state)) + 2 * count
    assert held / count < most
    assert mx.get_active_memory() - before < 1.01 * held


def test_state_that_is_saved_and_loaded_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    run = Run(flatstep.AdamW8bit(1e-3, master_weight_bits=24), model(mx.bfloat16))
    run.steps(0, 3)
    path = str(tmp_path / "state.safetensors")
    flat: Any = dict(tree_flatten(run.optimizer.state))
    mx.save_safetensors(path, flat)
    loaded: Any = mx.load(path)
    ways = {
        "a file": tree_unflatten(sorted(loaded.items())),
        "a pickle": pickle.loads(pickle.dumps(run.optimizer.state)),
        "a copy": copy.deepcopy(run.optimizer.state),
        "a map": tree_map(lambda leaf: leaf, run.optimizer.state),
    }
    others = {}
    for way, state in ways.items():
        optimizer = flatstep.AdamW8bit(1e-3, master_weight_bits=24)
        optimizer.state = state
        others[way] = Run(optimizer, copy.deepcopy(run.net))
    run.steps(3, 2)
    for way, other in others.items():
        other.steps(3, 2)
        assert same(other.net.parameters(), run.net.parameters()), way
        assert same(other.optimizer.state, run.optimizer.state), way


@by_name
def test_float_state_loads_and_comes_back(name: str) -> None:
    theirs = Run(OPTIMIZERS[name](1e-3, state_dtype=mx.float32), model())
    theirs.steps(0, 3)
    optimizer = OPTIMIZERS[name](1e-3)
    optimizer.state = copy.deepcopy(theirs.optimizer.state)
    optimizer.init(theirs.net.trainable_parameters())
    back = optimizer.dequantized_state()
    state = leaves(theirs.optimizer.state)
    assert leaves(back).keys() == state.keys()
    for path, value in leaves(back).items():
        near = 0.07 * np.abs(np.array(state[path])) + 1e-3 * float(mx.max(mx.abs(value)).item())
        assert np.all(np.abs(np.array(value) - np.array(state[path])) <= near), path
    # Onto MLX's own, and onto one of ours with float32 state.
    base = getattr(mlx.optimizers, name.removesuffix("8bit"))(1e-3)
    base.state = tree_map(lambda leaf: leaf, back)
    base.apply_gradients(theirs.net.parameters(), theirs.net.parameters())
    ours = OPTIMIZERS[name](1e-3, state_dtype=mx.float32)
    ours.state = optimizer.state
    ours.init(theirs.net.trainable_parameters())
    for path, value in leaves(ours.state).items():
        assert mx.array_equal(value, leaves(back)[path]).item(), path


def test_what_is_kept_of_the_state_stays_as_it_was() -> None:
    run = Run(flatstep.AdamW8bit(1e-3, master_weight_bits=24), model(mx.bfloat16))
    run.steps(0, 2)
    kept = tree_map(lambda leaf: leaf, run.optimizer.state)
    copied = tree_map(lambda leaf: np.array(leaf), run.optimizer.state)
    run.steps(2, 2)
    for (path, value), (_, old) in zip(tree_flatten(kept), tree_flatten(copied), strict=True):
        assert np.array_equal(np.array(value), old), path


def test_leaves_without_gradients_keep_their_codes() -> None:
    net = model(mx.bfloat16)
    run = Run(flatstep.AdamW8bit(1e-3, master_weight_bits=24), net)
    run.steps(0, 2)
    before = leaves(tree_map(lambda leaf: np.array(leaf), run.optimizer.state["layers"][0]))
    part = {"layers": [{}, {}, tree_map(mx.ones_like, net.layers[2].parameters())]}
    net.update(run.optimizer.apply_gradients(part, net.parameters()))
    mx.eval(net.parameters(), run.optimizer.state)
    for path, value in leaves(run.optimizer.state["layers"][0]).items():
        assert np.array_equal(np.array(value), before[path]), path


def test_a_leaf_may_be_assigned_as_codes_or_as_floats() -> None:
    run = Run(flatstep.AdamW8bit(1e-3), model())
    run.steps(0, 2)
    leaf = run.optimizer.state["layers"][0]["weight"]
    old = {name: mx.array(value) for name, value in leaf["m"].items()}
    other = mx.array(run.optimizer.state["layers"][2]["weight"]["m"]["codes"])
    leaf["m"] = run.optimizer.dequantized_state()["layers"][0]["weight"]["m"] * 2
    assert mx.allclose(leaf["m"]["scales"], 2 * old["scales"], rtol=1e-6).item()
    leaf["m"] = old
    assert same(leaf["m"], old)
    leaf["m"] = mx.zeros((99, 70), mx.bfloat16)
    assert not mx.any(leaf["m"]["codes"]).item()
    leaf |= {"m": old}
    assert same(leaf["m"], old)
    untouched = run.optimizer.state["layers"][2]["weight"]["m"]["codes"]
    assert mx.array_equal(untouched, other).item()


CODES, SCALES = mx.zeros((99, 70), mx.uint8), mx.zeros(109)
MISFITS: dict[str, tuple[Any, type[Exception], str]] = {
    "names": ({"codes": CODES}, ValueError, "m: state should be a dict of codes and scales"),
    "shape of codes": (
        {"codes": mx.zeros((70, 99), mx.uint8), "scales": SCALES},
        ValueError,
        r"m\.codes: state of shape \(70, 99\) does not match parameter \(99, 70\)",
    ),
    "number of scales": (
        {"codes": CODES, "scales": mx.zeros(108)},
        ValueError,
        r"m\.scales: state of shape \(108,\) does not match",
    ),
    "dtype": (
        {"codes": CODES.astype(mx.int8), "scales": SCALES},
        TypeError,
        r"m\.codes: state should have dtype uint8, found int8",
    ),
    "no array": ({"codes": [1], "scales": SCALES}, TypeError, r"m\.codes: state .* found list"),
    "integers": (mx.zeros((99, 70), mx.int32), TypeError, "m: state has dtype int32"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_codes_that_do_not_fit_are_refused_and_change_nothing(misfit: str) -> None:
    value, error, message = MISFITS[misfit]
    run = Run(flatstep.AdamW8bit(1e-3), model())
    run.steps(0, 1)
    before = tree_map(lambda leaf: np.array(leaf), run.optimizer.state)
    with pytest.raises(error, match=message):
        run.optimizer.state["layers"][0]["weight"]["m"] = value
    tree: Any = tree_map(lambda leaf: leaf, run.optimizer.state)
    tree["layers"][0]["weight"]["m"] = value
    fresh = flatstep.AdamW8bit(1e-3)
    fresh.state = tree
    with pytest.raises(error, match=message):
        fresh.init(run.net.trainable_parameters())
    for (_, now), (_, old) in zip(
        tree_flatten(run.optimizer.state), tree_flatten(before), strict=True
    ):
        assert np.array_equal(np.array(now), old)


def test_codes_are_not_changed_one_by_one() -> None:
    run = Run(flatstep.AdamW8bit(1e-3), model())
    blocks = run.optimizer.state["layers"][0]["weight"]["m"]
    with pytest.raises(ValueError, match="assign a dict of them, or a float array"):
        blocks["codes"] = CODES
    with pytest.raises(ValueError, match="assign a dict of them"):
        del blocks["scales"]


class Halving(flatstep.AdamW):
    def apply_single(self, gradient: Any, parameter: Any, state: Any) -> Any:
        return super().apply_single(gradient / 2, parameter, state)


@pytest.mark.parametrize("options", [{"state_dtype": mx.int8}, {"master_weight_bits": 24}])
def test_a_loop_over_single_parameters_has_no_place_for_it(options: Any) -> None:
    optimizer = Halving(1e-3, **options)
    with pytest.raises(ValueError, match="one parameter at a time"):
        optimizer.init({"w": mx.zeros((64, 64))})


def test_two_optimizers_of_one_model() -> None:
    """MultiOptimizer, whose state is a list of ours."""
    net = model(mx.bfloat16)
    both = flatstep.MultiOptimizer(
        [flatstep.AdamW8bit(1e-3, master_weight_bits=24), flatstep.Lion8bit(1e-4)],
        [lambda path, _: "layers.0" in path],
    )
    run = Run(both, net, compiled=True)
    start = run.steps(0, 1)
    assert run.steps(1, 30) < start
