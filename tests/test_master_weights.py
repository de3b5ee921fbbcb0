"""Half-precision parameters that learn: ``master_weight_bits`` and ``stochastic_rounding``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatstep
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cases import leaves
from mlx.utils import tree_map
from test_eight_bit_state import Run, model, modes, same

# How far a weight of so many bits may be from float32, relative to it: less than a last place.
ERRORS = {
    (24, mx.bfloat16): 2.0**-15,
    (32, mx.bfloat16): 0.0,
    (24, mx.float16): 2.0**-18,
    (32, mx.float16): 0.0,
}
HALF_PLACE = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}
kinds = pytest.mark.parametrize(("bits", "dtype"), ERRORS, ids=lambda v: str(v).split(".")[-1])


def weights_of(net: nn.Module) -> Any:
    """Values of all sizes, for the parameters of `model`."""
    rng = np.random.default_rng(0)

    def random(parameter: mx.array) -> mx.array:
        values = 10.0 ** rng.uniform(-3, 1, parameter.shape) * rng.choice([-1, 1], parameter.shape)
        return mx.array(values.astype(np.float32))

    return tree_map(random, net.parameters())


@kinds
def test_weights_that_are_set_are_those_that_are_kept(bits: int, dtype: mx.Dtype) -> None:
    net = model(dtype)
    optimizer = flatstep.AdamW(1e-3, master_weight_bits=bits)
    weights = weights_of(net)
    optimizer.set_master_weights(net, weights)
    got = leaves(optimizer.master_weights(net))
    for path, weight in leaves(weights).items():
        assert got[path].dtype == mx.float32
        error = mx.abs(got[path] - weight)
        assert mx.all(error <= ERRORS[bits, dtype] * mx.abs(weight)).item(), path
        parameter = leaves(net.parameters())[path]
        assert parameter.dtype == dtype
        off = mx.abs(parameter.astype(mx.float32) - got[path])
        assert mx.all(off <= HALF_PLACE[dtype] * mx.abs(got[path])).item(), path


@modes
@kinds
def test_small_steps_add_up(bits: int, dtype: mx.Dtype, compiled: bool) -> None:
    """Each far below the parameter's last place: as in float32, and not at all without."""
    nets = {None: model(dtype), bits: model(dtype)}
    exact = model()
    exact.update(tree_map(lambda p: p.astype(mx.float32), nets[None].parameters()))
    start = nets[None].parameters()
    runs = {
        None: Run(flatstep.Lion(3e-7), nets[None]),
        bits: Run(flatstep.Lion(3e-7, master_weight_bits=bits), nets[bits], compiled),
        "exact": Run(flatstep.Lion(3e-7), exact),
    }
    for run in runs.values():
        run.steps(0, 40)
    expected = leaves(exact.parameters())
    got = leaves(runs[bits].optimizer.master_weights(nets[bits]))
    still = leaves(nets[None].parameters())
    path = "layers.0.weight"
    moved = mx.abs(expected[path] - leaves(start)[path].astype(mx.float32)).mean().item()
    off = mx.abs(expected[path] - got[path]).mean().item()
    assert off < 0.35 * moved
    if dtype == mx.bfloat16:
        stayed = mx.mean(still[path] == leaves(start)[path]).item()
        assert stayed > 0.9


@modes
def test_what_was_kept_of_other_weights_is_never_used(compiled: bool) -> None:
    net = model(mx.bfloat16)
    run = Run(flatstep.AdamW(1e-5, master_weight_bits=24), net, compiled)
    run.steps(0, 3)
    kept = run.optimizer.master_weights(net)
    assert not same(kept, tree_map(lambda p: p.astype(mx.float32), net.parameters()))
    old = net.parameters()
    # Other weights in one layer, some other values in another; the norm is loaded as it was.
    weight = mx.array(np.array(net.layers[2].weight.astype(mx.float32)))
    weight[3, 5] += 1
    net.load_weights(
        [
            ("layers.0.weight", net.layers[0].weight * 1.5),
            ("layers.1.weight", mx.array(net.layers[1].weight)),
            ("layers.2.weight", weight.astype(mx.bfloat16)),
        ],
        strict=False,
    )
    got, before = leaves(run.optimizer.master_weights(net)), leaves(kept)
    assert mx.array_equal(got["layers.0.weight"], net.layers[0].weight.astype(mx.float32)).item()
    assert mx.array_equal(got["layers.1.weight"], before["layers.1.weight"]).item()
    differ = (got["layers.2.weight"] != before["layers.2.weight"]).reshape(-1)
    block = (3 * 99 + 5) // 64
    outside = mx.concatenate([differ[: 64 * block], differ[64 * (block + 1) :]])
    assert mx.any(differ).item()
    assert not mx.any(outside).item()
    # A step starts from there too.
    rate = run.optimizer.learning_rate.item()
    run.steps(3, 1)
    after = leaves(run.optimizer.master_weights(net))
    for path, weight in got.items():
        assert mx.max(mx.abs(after[path] - weight)).item() < 10 * rate, path
    del old


def test_float32_parameters_keep_nothing_beside_them() -> None:
    net = model(mx.bfloat16)
    net.layers[1].weight = net.layers[1].weight.astype(mx.float32)
    run = Run(flatstep.AdamW(1e-3, master_weight_bits=32), net)
    run.steps(0, 2)
    state = run.optimizer.state["layers"]
    assert list(state[1]["weight"]) == ["m", "v"]
    assert list(state[1]["bias"]) == ["m", "v", "master"]
    rests = state[0]["weight"]["master"]
    assert (rests["rests"].dtype, rests["checksums"].dtype) == (mx.int16, mx.uint32)
    mine = run.optimizer.master_weights(net)["layers"][1]["weight"]
    assert mx.array_equal(mine, net.layers[1].weight).item()


def test_a_float32_checkpoint_goes_into_a_model_in_bfloat16(tmp_path: Path) -> None:
    path = str(tmp_path / "weights.safetensors")
    source = model()
    source.save_weights(path)
    net = model(mx.bfloat16)
    optimizer = flatstep.AdamW8bit(1e-3, master_weight_bits=32)
    loaded = model()
    loaded.load_weights(path)
    optimizer.set_master_weights(net, loaded.parameters())
    assert same(optimizer.master_weights(net), source.parameters())


WRONG: dict[str, tuple[Callable[[Any, nn.Module], Any], type[Exception], str]] = {
    "shape": (
        lambda o, m: o.set_master_weights(m, {"layers": [{"weight": mx.zeros((70, 99))}]}),
        ValueError,
        r"layers\.0\.weight: weight \(70, 99\) does not match parameter \(99, 70\)",
    ),
    "name": (
        lambda o, m: o.set_master_weights(m, {"layers": [{"wait": mx.zeros((99, 70))}]}),
        ValueError,
        r"layers\.0\.wait: there is a weight but no parameter",
    ),
    "integers": (
        lambda o, m: o.set_master_weights(m, {"layers": [{"bias": mx.zeros(99, mx.int32)}]}),
        TypeError,
        r"layers\.0\.bias: the weight has dtype int32",
    ),
    "no array": (
        lambda o, m: o.set_master_weights(m, {"layers": [{"bias": 1.0}]}),
        TypeError,
        r"layers\.0\.bias: a weight should be an mlx\.core\.array",
    ),
    "no model": (
        lambda o, m: o.set_master_weights(m.parameters(), m.parameters()),
        TypeError,
        "model should be an mlx.nn.Module",
    ),
    "weights of no dict": (
        lambda o, m: o.set_master_weights(m, [("layers.0.bias", mx.zeros(99))]),
        TypeError,
        "weights should be a dict",
    ),
    "parameters of no dict": (
        lambda o, _: o.master_weights([mx.zeros(3)]),
        TypeError,
        "parameters should be a dict",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused_and_changes_nothing(wrong: str) -> None:
    call, error, message = WRONG[wrong]
    net = model(mx.bfloat16)
    optimizer = flatstep.AdamW(1e-3, master_weight_bits=24)
    Run(optimizer, net).steps(0, 1)
    before = tree_map(lambda leaf: leaf + 0, [net.parameters(), optimizer.state])
    with pytest.raises(error, match=message):
        call(optimizer, net)
    assert same([net.parameters(), optimizer.state], before)


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "bits": ({"master_weight_bits": 16}, ValueError, "master_weight_bits should be 24, 32 or None"),
    "bits as a float": ({"master_weight_bits": 24.0}, ValueError, "24, 32 or None, 24.0 was"),
    "both": (
        {"master_weight_bits": 24, "stochastic_rounding": True},
        ValueError,
        "stochastic_rounding and master_weight_bits exclude each other",
    ),
    "rounding": ({"stochastic_rounding": 1}, TypeError, "should be True or False, 1 was"),
    "state": (
        {"state_dtype": mx.uint8},
        ValueError,
        "state_dtype should be mx.float32",
    ),
    "predicate": (
        {"state_dtype": mx.int8, "full_precision": "norm"},
        TypeError,
        "full_precision should be a function of path and parameter, 'norm' was",
    ),
    "predicate without codes": (
        {"full_precision": lambda path, weight: True},
        ValueError,
        "full_precision names what state_dtype=mx.int8 is not for",
    ),
    "seed": ({"seed": -1}, ValueError, "seed should be a whole number from 0 to"),
    "seed of another type": ({"seed": 1.0}, ValueError, "seed should be a whole number"),
    "name": ({"master_bits": 24}, TypeError, "master_bits"),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("rule", ["SGD", "Adam", "AdamW", "Lion"])
def test_arguments_that_are_not_allowed(rule: str, argument: str) -> None:
    options, error, message = ARGUMENTS[argument]
    with pytest.raises(error, match=message):
        getattr(flatstep, rule)(1e-3, **options)


def test_flat_update_has_no_place_for_master_weights() -> None:
    optimizer = flatstep.SGD(1e-3, master_weight_bits=24)
    p = mx.zeros(64, mx.bfloat16)
    with pytest.raises(ValueError, match="flat_update: master_weight_bits"):
        optimizer.flat_update(p, p, step=0)


def test_state_with_other_bits_is_refused() -> None:
    run = Run(flatstep.AdamW(1e-3, master_weight_bits=24), model(mx.bfloat16))
    run.steps(0, 1)
    other = flatstep.AdamW(1e-3, master_weight_bits=32)
    with pytest.raises(ValueError, match="master_weight_bits=24 was set on"):
        other.state = run.optimizer.state
    other.state = tree_map(lambda leaf: leaf, run.optimizer.state)
    with pytest.raises(TypeError, match="rests: state should have dtype int16, found int8"):
        other.init(run.net.trainable_parameters())
    plain = flatstep.AdamW(1e-3)
    plain.state = run.optimizer.dequantized_state()
    plain.init(run.net.trainable_parameters())
    assert list(plain.state["layers"][0]["weight"]) == ["m", "v"]


def test_state_goes_on_where_fewer_layers_are_trained() -> None:
    net = model(mx.bfloat16)
    run = Run(flatstep.AdamW(1e-3, master_weight_bits=24), net)
    run.steps(0, 2)
    weights = run.optimizer.master_weights(net)
    state = tree_map(lambda leaf: leaf, run.optimizer.state)
    net.layers[0].freeze()
    other = flatstep.AdamW(1e-3, master_weight_bits=24)
    other.state = state
    # Known before a step or `init` has laid it out.
    assert same(other.master_weights(net), weights)
    floats = leaves(other.dequantized_state())
    assert all(leaf.dtype != mx.uint8 for leaf in floats.values())
    assert not any("master" in path for path in floats)
    frozen = Run(other, net)
    frozen.steps(2, 1)
    assert same(other.state["layers"][0], run.optimizer.state["layers"][0])
    net.layers[0].unfreeze()
    frozen.steps(3, 1)


def test_a_model_may_be_cast_to_float32_and_back() -> None:
    net = model(mx.bfloat16)
    run = Run(flatstep.AdamW8bit(1e-3, master_weight_bits=24), net)
    run.steps(0, 2)
    net.update(run.optimizer.master_weights(net))
    run.steps(2, 1)
    assert list(run.optimizer.state["layers"][0]["weight"]) == ["m", "v"]
    net.set_dtype(mx.bfloat16)
    run.steps(3, 1)
    assert list(run.optimizer.state["layers"][0]["weight"]) == ["m", "v", "master"]
    assert run.optimizer.step.item() == 4


def test_options_are_read_and_not_assigned() -> None:
    optimizer = flatstep.AdamW(1e-3, master_weight_bits=24, seed=3)
    assert (optimizer.master_weight_bits, optimizer.seed) == (24, 3)
    for name in ("master_weight_bits", "stochastic_rounding", "full_precision", "seed"):
        with pytest.raises(AttributeError):
            setattr(optimizer, name, None)


def test_master_weights_of_another_tree_are_refused() -> None:
    net = model(mx.bfloat16)
    optimizer = flatstep.AdamW(1e-3, master_weight_bits=24)
    Run(optimizer, net).steps(0, 1)
    with pytest.raises(ValueError, match="none of the parameters has master weights here"):
        optimizer.master_weights(net.layers[0])
    with pytest.raises(ValueError, match=r"layers\.0\.bias: parameter \(3,\) does not match"):
        optimizer.master_weights({"layers": [{"bias": mx.zeros(3, mx.bfloat16)}]})


def test_quantized_layers_pass_through_both_ways() -> None:
    net = nn.Sequential(nn.QuantizedLinear(64, 64), nn.Linear(64, 64))
    net.layers[1].set_dtype(mx.bfloat16)
    optimizer = flatstep.AdamW(1e-3, master_weight_bits=24)
    optimizer.init(net.trainable_parameters())
    weights = optimizer.master_weights(net)
    optimizer.set_master_weights(net, weights)
    assert same(optimizer.master_weights(net), weights)


def test_a_gradient_whose_square_overflows_makes_no_large_update_afterwards() -> None:
    optimizer = flatstep.AdamW8bit(1e-2)
    parameters: Any = {"w": mx.ones((64, 64))}
    spike = mx.ones((64, 64))
    spike[3, 3] = 1e25
    for gradient in (mx.ones((64, 64)), spike, *[mx.ones((64, 64))] * 5):
        parameters = optimizer.apply_gradients({"w": gradient}, parameters)
    moved = mx.abs(parameters["w"] - 1)
    assert mx.max(moved[3]).item() < mx.max(moved[0]).item() < 0.4


# ---- Stochastic rounding. ----


def drift(seed: int, steps: int, compiled: bool = False) -> Any:
    """Weights of 1 after steps down of a tenth of their last place below them."""
    optimizer = flatstep.SGD(1.0, stochastic_rounding=True, seed=seed)
    apply = optimizer.apply_gradients
    parameters = {"w": mx.ones(20_000, mx.bfloat16)}
    optimizer.init(parameters)
    if compiled:
        apply = mx.compile(apply, inputs=optimizer.state, outputs=optimizer.state)
    gradients = {"w": mx.full(20_000, 0.1 * 2.0**-8)}
    for _ in range(steps):
        parameters = apply(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    return parameters["w"]


@modes
def test_steps_below_the_last_place_are_taken_in_the_mean(compiled: bool) -> None:
    weights = np.array(drift(0, 50, compiled).astype(mx.float32), np.float64)
    expected = 1 - 50 * 0.1 * 2.0**-8
    assert abs(weights.mean() - expected) < 4 * weights.std() / np.sqrt(weights.size)
    assert len(np.unique(weights)) > 5


def test_the_seed_decides() -> None:
    first = drift(0, 5)
    assert mx.array_equal(first, drift(0, 5, compiled=True)).item()
    assert not mx.array_equal(first, drift(1, 5)).item()


@pytest.mark.parametrize(("dtype", "top"), [(mx.float16, 65504.0), (mx.bfloat16, 3.3895314e38)])
def test_what_is_finite_is_not_rounded_to_infinity(dtype: mx.Dtype, top: float) -> None:
    optimizer = flatstep.SGD(1.0, stochastic_rounding=True)
    parameters = {"w": mx.full(4096, top, dtype)}
    updated = optimizer.apply_gradients({"w": mx.full(4096, -top / 2**12)}, parameters)["w"]
    assert mx.all(mx.isfinite(updated)).item()


def test_parameters_of_one_value_are_rounded_each_in_its_own_way() -> None:
    optimizer = flatstep.SGD(1.0, stochastic_rounding=True)
    parameters = {name: mx.ones(4096, mx.bfloat16) for name in "ab"}
    gradients = {name: mx.full(4096, 2.0**-9) for name in "ab"}
    once = optimizer.apply_gradients(gradients, parameters)
    assert not mx.array_equal(once["a"], once["b"]).item()
    both = (once["a"] < 1) & (once["b"] < 1)
    assert 0.2 < mx.mean(both).item() < 0.3
