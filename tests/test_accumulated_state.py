"""Sums of gradients are written in place, and saved and loaded like the rest of the state."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flatstep as optim
import mlx.core as mx
import mlx.nn as nn
import pytest
from flatstep import _ext
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from pass_reference import model_of
from reference import relative_distance, to_float64
from shadow import bits
from test_accumulation import modes, new_tree

ways = pytest.mark.parametrize("way", ["accumulate", "accumulate_steps"])


# ---- Memory ----


@modes
@ways
def test_sums_are_written_in_place(way: str, compiled: bool) -> None:
    options = {"accumulate_dtype": mx.float32} if way == "accumulate" else {way: 2}
    optimizer, model = optim.AdamW(0.1, **options), model_of(new_tree(1))
    optimizer.init(model.parameters())
    state = [model.state, optimizer.state]

    def micro(gradients: Any, is_last: bool) -> None:
        if way == "accumulate":
            optimizer.accumulate(gradients)
            if is_last:
                optimizer.update(model)
        else:
            optimizer.update(model, gradients)

    run = mx.compile(micro, inputs=state, outputs=state) if compiled else micro
    counted: dict[str, int] = {}
    for i in range(8):
        if i == 4:
            counted = _ext.reuse_counters()
        run(new_tree(i), i % 2 == 1)
        mx.eval(state)
    grown = {key: count - counted[key] for key, count in _ext.reuse_counters().items()}
    assert grown["state_fresh"] == grown["parameters_fresh"] == 0
    # The sums of four, and two steps of all, or four where each call is one.
    assert grown["state_in_place"] == 4 + 3 * (2 if way == "accumulate" else 4)


@pytest.fixture(scope="module")
def peaks() -> dict[str, dict[str, int]]:
    """What four batches in one step need, each in a process of its own."""
    program = str(Path(__file__).with_name("peaks.py"))
    results = {}
    for way in ("none", "accumulate", "accumulate_steps", "tree_map"):
        mode = "compiled" if way == "accumulate" else "eager"
        command = [sys.executable, program, "flatstep", mode, "--accumulation", way]
        command += ["--dims", "256", "--layers", "2", "--steps", "4"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[way] = json.loads(output)
    print({way: f"{memory['peak'] / 1e6:.1f} MB" for way, memory in results.items()})
    return results


@ways
def test_a_peak_is_one_flat_gradient_above_a_step_without(
    peaks: dict[str, dict[str, int]], way: str
) -> None:
    above = peaks[way]["peak"] - peaks["none"]["peak"]
    assert above <= 1.03 * peaks["none"]["parameters"]


# ---- Saved and loaded ----


def saved(state: Any, folder: Path) -> Any:
    path = str(folder / "state.safetensors")
    mx.save_safetensors(path, dict(tree_flatten(state)))
    return tree_unflatten(list(mx.load(path).items()))


COPIES: dict[str, Callable[[Any, Path], Any]] = {
    "saved": saved,
    "pickled": lambda state, _: pickle.loads(pickle.dumps(state)),
    "copied": lambda state, _: copy.deepcopy(state),
    "flattened": lambda state, _: tree_map(mx.array, state),
}
SAVED: dict[str, tuple[mx.Dtype, dict[str, Any]]] = {
    "accumulate": (mx.float32, {}),
    "accumulate in bfloat16": (mx.float32, {"accumulate_dtype": mx.bfloat16}),
    "accumulate_steps": (mx.float32, {"accumulate_steps": 3}),
    "everything": (
        mx.bfloat16,
        {
            "accumulate_steps": 3,
            "accumulate_dtype": mx.bfloat16,
            "state_dtype": mx.int8,
            "master_weight_bits": 24,
            "max_grad_norm": 1.0,
            "ema": 0.9,
            "ema_dtype": mx.bfloat16,
            "grad_scale": optim.DynamicLossScale(8.0, growth_interval=2),
            "groups": [optim.Group("b", learning_rate=0.3), optim.no_decay],
        },
    ),
}


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("name", SAVED)
def test_what_is_loaded_in_the_middle_goes_on_to_the_same_bits(
    name: str, duplicate: str, tmp_path: Path
) -> None:
    dtype, options = SAVED[name]
    make = partial(optim.AdamW, optim.cosine_decay(0.1, 9), **options)
    optimizer, model = make(), model_of(new_tree(1, dtype))
    optimizer.init(model.parameters())

    def micro(optimizer: Any, model: nn.Module, i: int) -> None:
        gradients = new_tree(i, mx.bfloat16)
        if "accumulate_steps" in options:
            optimizer.update(model, gradients)
        else:
            optimizer.accumulate(gradients)
            if i % 3 == 2:
                optimizer.update(model)

    for i in range(5):
        micro(optimizer, model, i)
    assert optimizer.state["accumulated"].item() == 2
    resumed, loaded = make(), model_of(tree_map(mx.array, model.parameters()))
    resumed.state = COPIES[duplicate](optimizer.state, tmp_path)
    resumed.init(loaded.parameters())
    assert bits(resumed.state) == bits(optimizer.state)
    for i in range(5, 13):
        for each, its in ((optimizer, model), (resumed, loaded)):
            micro(each, its, i)
        assert bits(resumed.state) == bits(optimizer.state)
        assert bits(loaded.parameters()) == bits(model.parameters())


def test_sums_of_another_dtype_are_kept() -> None:
    optimizer = optim.AdamW(0.1, accumulate_dtype=mx.bfloat16, state_dtype=mx.int8)
    optimizer.init(new_tree(1))
    optimizer.accumulate(new_tree(2))
    for options in ({"accumulate_dtype": mx.float32}, {"accumulate_steps": 4}):
        other = optim.AdamW(0.1, state_dtype=mx.int8, **options)
        other.state = optimizer.state
        for path in ("w", "b"):
            got, expected = (o.state[path]["gradient_sum"] for o in (other, optimizer))
            assert got.dtype == mx.float32
            assert relative_distance(to_float64(got), to_float64(expected)) == 0
        assert other.state["accumulated"].item() == 1
