"""Weights in more bits than their parameters, as the optimizer keeps them."""

from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from .checks import check_array, check_shape
from .layout import Layout, unsupported
from .slots import FLOATING, HALVES, MASTER, ROUNDINGS, from_blocks, in_blocks
from .state import State
from .state_nodes import refill
from .trees import item_of
from .walk import CONTAINERS, Keys, build, check_depth, children, inner_like, path_of


def joined(state: State | None, parameters: Any) -> Any:
    """A tree of parameters in float32, with what the state keeps beside them."""
    layout = state.layout if state is not None else None
    numbers = _with_rests(layout)
    check_depth("parameters", parameters)
    found: list[int] = []

    def expand(keys: Keys, node: Any) -> Any:
        if isinstance(node, CONTAINERS):
            return inner_like(node, children(node))
        check_array(f"{path_of(keys)}: a parameter", node)
        if node.dtype not in FLOATING:
            return node
        number = numbers.get(keys)
        if number is None or state is None or layout is None:
            return node.astype(mx.float32)
        leaf = layout.leaves[number]
        found.append(number)
        check_shape(leaf, node)
        if leaf.dtype != node.dtype:
            return node.astype(mx.float32)
        rests = layout.leaf_rows(state.flat_arrays(MASTER), number)
        floats = _ext.load_split(in_blocks(node), rests, ROUNDINGS[_bits(layout)])
        return from_blocks(floats, leaf.shape)

    weights = build(expand, parameters)
    if numbers and not found:
        assert layout is not None
        path = layout.leaves[next(iter(numbers.values()))].path
        raise ValueError(f"none of the parameters has master weights here; {path}, say, does")
    return weights


class SplitWeights(NamedTuple):
    """Parameters in their own dtypes, and rows of rests by the number of their leaf."""

    parameters: Any
    rests: dict[int, mx.array]


def split(layout: Layout, parameters: Any, weights: Any) -> SplitWeights:
    """Weights as the parameters of these dtypes and what is kept beside them."""
    numbers = _with_rests(layout)
    rests: dict[int, mx.array] = {}

    def expand(keys: Keys, place: tuple[Any, Any]) -> Any:
        weight, parameter = place
        if isinstance(weight, CONTAINERS):
            items = ((key, (child, item_of(parameter, key))) for key, child in children(weight))
            return inner_like(weight, items)
        check_array(f"{path_of(keys)}: a weight", weight)
        if isinstance(parameter, mx.array) and parameter.dtype not in FLOATING:
            if weight.dtype == parameter.dtype and weight.shape == parameter.shape:
                return weight  # quantized, and none of the optimizer's
            raise unsupported(f"{path_of(keys)}: the parameter", parameter.dtype)
        if weight.dtype not in FLOATING:
            raise unsupported(f"{path_of(keys)}: the weight", weight.dtype)
        if not isinstance(parameter, mx.array):
            raise ValueError(f"{path_of(keys)}: there is a weight but no parameter of this name")
        if tuple(weight.shape) != tuple(parameter.shape):
            raise ValueError(
                f"{path_of(keys)}: weight {tuple(weight.shape)} does not match parameter "
                f"{tuple(parameter.shape)}"
            )
        number = numbers.get(keys)
        if number is None or layout.leaves[number].dtype != parameter.dtype:
            return weight.astype(parameter.dtype)
        floats = in_blocks(weight.astype(mx.float32))
        stored, rests[number] = _ext.store_split(floats, parameter.dtype, ROUNDINGS[_bits(layout)])
        return from_blocks(stored, tuple(parameter.shape))

    check_depth("weights", weights)
    return SplitWeights(build(expand, (weights, parameters)), rests)


def keep(state: State, layout: Layout, rests: dict[int, mx.array]) -> None:
    """Makes these the rests that the state has."""
    for number, rows in rests.items():
        layout.write_rows(state.flat_arrays(MASTER), number, rows)
    refill(state)


def _bits(layout: Layout) -> int:
    return layout.form.master_weight_bits or 0


def _with_rests(layout: Layout | None) -> dict[Keys, int]:
    """The leaves that have a rest, by their keys."""
    if layout is None or not _bits(layout):
        return {}
    return {leaf.keys: n for n, leaf in enumerate(layout.leaves) if leaf.dtype in HALVES}
