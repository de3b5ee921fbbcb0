"""Checks of what a user passes: errors name the argument, its value and what is allowed."""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from . import _ext
from .layout import Layout, LeafSpec, name_of, unsupported
from .slots import FLOATING
from .walk import CONTAINERS, Keys, build, check_depth, children, inner_like, path_of

# The nearest float32 of a number from here on is infinite.
FLOAT32_LIMIT = 2.0**128 - 2.0**103


def misfit(name: str, wanted: str, found: Any) -> str:
    """What an error says of an argument."""
    return f"{name} should be {wanted}, {found} was provided instead"


def as_number(name: str, value: Any) -> float:
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        is_traced = isinstance(value, mx.array) and _ext.is_tracing()
        shown = "an array that a compiled function is given" if is_traced else repr(value)
        raise TypeError(misfit(name, "a number", shown)) from None


def as_finite(name: str, value: Any, at_least: float = -math.inf) -> float:
    """A number that is finite in float32, and not below the least that is allowed."""
    number = value if type(value) is float else as_number(name, value)
    if not (abs(number) < FLOAT32_LIMIT and number >= at_least):
        allowed = "finite in float32" + (f" and >={at_least:g}" if at_least > -math.inf else "")
        raise ValueError(misfit(name, allowed, f"{number:g}"))
    return number


def as_betas(name: str, values: Any) -> list[float]:
    """Two numbers in [0, 1)."""
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(misfit(f"{name} betas", "two numbers", repr(values)))
    betas: list[float] = []
    for value in values:
        if not (type(value) is float and 0 <= value < 1):
            label = f"{name} beta{len(betas) + 1}"
            value = as_number(label, value)
            if not 0 <= value < 1:
                raise ValueError(misfit(label, "in [0, 1)", f"{value:g}"))
        betas.append(value)
    if len(betas) != 2:
        raise ValueError(f"{name} betas should be two numbers, {len(betas)} were provided instead")
    return betas


def kind_of(value: Any) -> str:
    """What a value is, for a message that says what came."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def check_tree(name: str, tree: Any) -> None:
    """Raises TypeError when a tree of parameters or gradients is no dict; a module is one."""
    if isinstance(tree, dict):
        return
    hint = ""
    if name == "gradients" and isinstance(tree, tuple):
        hint = "; nn.value_and_grad's function returns (loss, gradients): pass the second of them"
    raise TypeError(misfit(name, "a dict (or an mlx.nn.Module)", kind_of(tree)) + hint)


def with_state(tree: Any) -> Any:
    """A tree of parameters, with {} for those that get no state.

    Raises TypeError, naming the path, when it has something else in it.
    """
    check_tree("parameters", tree)
    check_depth("parameters", tree)

    def expand(keys: Keys, node: Any) -> Any:
        if isinstance(node, CONTAINERS):
            return inner_like(node, children(node))
        check_array(f"{path_of(keys)}: a parameter", node)
        return node if node.dtype in FLOATING else {}

    return build(expand, tree)


def check_state(state: Any) -> None:
    if not isinstance(state, dict):
        raise TypeError(f"optimizer.state should be a dict, it was set to {kind_of(state)}")
    if "step" not in state or "learning_rate" not in state:
        found = f"a dict of {', '.join(map(repr, state))}" if len(state) else "{}"
        raise ValueError(
            f"optimizer.state should have 'step' and 'learning_rate', it was set to {found}"
        )


def check_layout(old: Layout | None, new: Layout) -> None:
    """Raises ValueError when a trace would give a state another layout: a replay does not."""
    if old is not None and old.text != new.text and _ext.is_tracing():
        raise ValueError(
            "init would lay the state out anew; call optimizer.init(parameters) outside the "
            "compiled function"
        )


def check_array(name: str, value: Any) -> None:
    if not isinstance(value, mx.array):
        raise TypeError(misfit(name, "an mlx.core.array", repr(value)))


def check_shape(leaf: LeafSpec, parameter: mx.array) -> None:
    """Raises ValueError, naming the path, when a parameter is not the leaf that a state is for."""
    if leaf.shape != tuple(parameter.shape):
        raise ValueError(
            f"{path_of(leaf.keys)}: parameter {tuple(parameter.shape)} does not match state for "
            f"{leaf.shape}"
        )


def check_flat_arrays(arrays: dict[str, Any]) -> None:
    """Of the arrays of ``flat_update`` by their names, the parameter first."""
    parameter = arrays["parameter"]
    for name, array in arrays.items():
        check_array(f"flat_update: {name}", array)
        shape, found = tuple(parameter.shape), tuple(array.shape)
        if len(shape) != 1:
            of_shape = f"one of shape {shape}"
            raise ValueError(misfit("flat_update: parameter", "one-dimensional", of_shape))
        if found != shape:
            raise ValueError(
                f"flat_update: {name} should have the parameter's shape {shape}, one of {found} "
                "was provided instead"
            )
        if array.dtype not in FLOATING:
            raise unsupported(f"flat_update: {name}", array.dtype)


def check_scalar(name: str, kind: str, value: mx.array, is_of_kind: bool) -> None:
    if value.size != 1 or not is_of_kind:
        found = f"an array of shape {tuple(value.shape)} and {name_of(value.dtype)}"
        raise ValueError(misfit(name, f"one {kind} number", found))


def as_float_scalar(name: str, value: Any) -> mx.array:
    """A float32 scalar, as the kernels read it. An array that is not evaluated is not looked at."""
    if isinstance(value, mx.array):
        check_scalar(name, "real", value, value.dtype != mx.complex64)
        known = _ext.known_value(value)
        if known is not None:
            as_finite(name, known)
        if value.dtype == mx.float32 and value.ndim == 0:
            return value
        return value.astype(mx.float32).reshape(())
    return mx.array(as_finite(name, value), mx.float32)


def as_learning_rate(value: Any) -> mx.array:
    return as_float_scalar("learning_rate", value)


def as_count(name: str, value: Any) -> mx.array:
    """A uint64 scalar, as the kernels read it."""
    if isinstance(value, mx.array):
        check_scalar(name, "whole", value, mx.issubdtype(value.dtype, mx.integer))
        if value.dtype == mx.uint64 and value.ndim == 0:
            return value
        if mx.issubdtype(value.dtype, mx.signedinteger):
            return as_count(name, value.reshape(()).item())
        return value.astype(mx.uint64).reshape(())
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_whole or not 0 <= operator.index(value) < 2**63:
        raise ValueError(misfit(name, "a whole number from 0 to 2**63 - 1", repr(value)))
    return mx.array(operator.index(value), mx.uint64)


def as_step(value: Any) -> mx.array:
    return as_count("step", value)


def as_rates(value: Any) -> mx.array:
    """The learning rates of groups of parameters."""
    check_array("group_learning_rates", value)
    if value.dtype != mx.float32 or value.ndim != 1:
        found = f"one of shape {tuple(value.shape)} and {name_of(value.dtype)}"
        raise ValueError(misfit("group_learning_rates", "one-dimensional in float32", found))
    rates: mx.array = value
    return rates


def as_loss_scale(value: Any) -> mx.array:
    scale = as_float_scalar("loss_scale", value)
    known = _ext.known_value(scale)
    if known is not None and known <= 0:
        raise ValueError(misfit("loss_scale", "above 0", f"{known:g}"))
    return scale


# What a state has at its top beside parameters' state, and how each is checked when it is set.
SCALARS: dict[str, Callable[[Any], mx.array]] = {
    "step": as_step,
    "learning_rate": as_learning_rate,
    "group_learning_rates": as_rates,
    "grad_norm": lambda value: mx.array(value, mx.float32),
    "grad_scale": partial(as_float_scalar, "grad_scale"),
    "loss_scale": as_loss_scale,
    **{
        name: partial(as_count, name)
        for name in ("skipped_steps", "accumulated", "loss_scale_steps")
    },
}
