"""Trees of arrays in Python: what a step does once, not at every step."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from .layout import FLOATING, LeafSpec, unsupported

# Names that a state has at its top beside those of the parameters.
FLAT_KEY = "__flatstep__"
RESERVED = ("step", "learning_rate", FLAT_KEY)
# In place of a parameter that only the state knows.
ABSENT = object()


def merge_trees(
    state: Any, parameters: Any, slots: Sequence[str], known: dict[tuple[Any, ...], mx.Dtype]
) -> tuple[dict[str, Any], list[LeafSpec], list[list[mx.array | None]]]:
    """The union of a state's tree and a tree of parameters: (skeleton, leaves, state values).

    A leaf's dtype and shape are those of its parameter. A leaf that only the state has takes its
    shape from there, and its dtype from `known`, what is known of the leaves by their keys.
    Entries of the state at the top that are no leaves' state are left out.
    """
    leaves: list[LeafSpec] = []
    values: list[list[mx.array | None]] = []

    def add_leaf(keys: tuple[Any, ...], parameter: mx.array | None, held: Any) -> int:
        held = _checked_leaf_state(keys, held, slots)
        first = next((held[slot] for slot in slots if slot in held), None)
        source = parameter if parameter is not None else first
        assert source is not None
        dtype = source.dtype if parameter is not None else known.get(keys, source.dtype)
        spec = LeafSpec(keys, tuple(source.shape), dtype)
        if source.dtype not in FLOATING:
            raise unsupported(
                f"{spec.path}: parameter", source.dtype, "; init takes model.trainable_parameters()"
            )
        for slot in held:
            check_leaf_state(f"{spec.path}.{slot}", held[slot], spec.shape)
        leaves.append(spec)
        values.append([held.get(slot) for slot in slots])
        return len(leaves) - 1

    def merge(keys: tuple[Any, ...], parameter: Any, held: Any) -> Any:
        if isinstance(parameter, mx.array):
            return add_leaf(keys, parameter, held)
        if parameter is ABSENT and _is_leaf_state(held, slots):
            return add_leaf(keys, None, held)
        kind = held if parameter is ABSENT else parameter
        if isinstance(kind, dict):
            return merge_dicts(keys, kind if parameter is not ABSENT else {}, held)
        if isinstance(kind, (list, tuple)):
            ours = list(kind) if parameter is not ABSENT else []
            theirs = list(held) if isinstance(held, (list, tuple)) else []
            length = max(len(ours), len(theirs))
            ours += [ABSENT] * (length - len(ours))
            theirs += [None] * (length - len(theirs))
            items = [merge((*keys, i), ours[i], theirs[i]) for i in range(length)]
            return tuple(items) if isinstance(kind, tuple) else items
        if parameter is ABSENT:
            return {}
        raise TypeError(
            f"{'.'.join(map(str, keys))}: a parameter should be an mlx.core.array, found "
            f"{type(parameter).__name__}"
        )

    def merge_dicts(keys: tuple[Any, ...], ours: dict[Any, Any], held: Any) -> dict[str, Any]:
        for key in ours:
            if not isinstance(key, str):
                raise TypeError(
                    f"{'.'.join(map(str, keys)) or 'parameters'}: names should be strings, "
                    f"{key!r} was found"
                )
        theirs = held if isinstance(held, dict) else {}
        names = [*theirs, *(key for key in ours if key not in theirs)]
        return {key: merge((*keys, key), ours.get(key, ABSENT), theirs.get(key)) for key in names}

    for name in RESERVED:
        if name in parameters:
            raise ValueError(f"{name}: a top-level parameter can't have a name of the state's own")
    inner = {
        key: value
        for key, value in state.items()
        if key in parameters or (key not in RESERVED and _has_state(value, slots))
    }
    return merge((), parameters, inner), leaves, values


def _checked_leaf_state(
    keys: tuple[Any, ...], held: Any, slots: Sequence[str]
) -> dict[str, mx.array]:
    """The arrays that a state has for a leaf: all of the slots, or none."""
    path = ".".join(map(str, keys))
    if held is None:
        return {}
    if not isinstance(held, dict):
        raise TypeError(f"{path}: state should be a dict of arrays, found {type(held).__name__}")
    missing = [slot for slot in slots if slot not in held]
    if held and missing:
        raise ValueError(f"{path}: state has {', '.join(held)} but not {', '.join(missing)}")
    return {slot: held[slot] for slot in slots if held}


def _is_leaf_state(node: Any, slots: Sequence[str]) -> bool:
    return isinstance(node, dict) and all(isinstance(node.get(slot), mx.array) for slot in slots)


def _has_state(node: Any, slots: Sequence[str]) -> bool:
    """Whether a subtree consists of leaves' state and nothing else."""
    if isinstance(node, dict):
        return _is_leaf_state(node, slots) or (
            bool(node) and all(_has_state(child, slots) for child in node.values())
        )
    if isinstance(node, (list, tuple)):
        return bool(node) and all(_has_state(child, slots) for child in node)
    return False


def check_leaf_state(path: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError, naming the path, when `value` is not state for `shape`."""
    if not isinstance(value, mx.array):
        raise TypeError(f"{path}: state should be an mlx.core.array, found {type(value).__name__}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{path}: state of shape {tuple(value.shape)} does not match parameter {tuple(shape)}"
        )
    if value.dtype not in FLOATING:
        raise unsupported(f"{path}: state", value.dtype)


def trees_equal(a: Any, b: Any) -> bool:
    """Equality of trees, with arrays equal when their dtypes, shapes and values are."""
    if isinstance(a, mx.array) and isinstance(b, mx.array):
        return bool(a.dtype == b.dtype and mx.array_equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(trees_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(trees_equal, a, b))
    return bool(a == b)


def matching_part(gradients: Any, parameters: Any, path: str = "") -> Any:
    """The part of the parameters that the gradients cover."""
    if isinstance(gradients, mx.array):
        return parameters
    if isinstance(gradients, dict):
        items: Any = gradients.items()
    elif isinstance(gradients, (list, tuple)):
        items = enumerate(gradients)
    else:
        raise TypeError(
            f"{path or 'the tree'}: a gradient should be an mlx.core.array, found "
            f"{type(gradients).__name__}"
        )
    result = {}
    for key, child in items:
        here = f"{path}.{key}" if path else str(key)
        try:
            if not isinstance(parameters, (dict, list, tuple)):
                raise KeyError(key)
            parameter = parameters[key]
        except (KeyError, IndexError, TypeError):
            if tree_flatten(child):
                raise ValueError(
                    f"{here}: there is a gradient but no parameter of this name"
                ) from None
            result[key] = child
        else:
            result[key] = matching_part(child, parameter, here)
    if isinstance(gradients, dict):
        return result
    return (
        type(gradients)(*result.values())
        if hasattr(gradients, "_fields")
        else type(gradients)(result.values())
    )


def arrays_of(parameters: Any) -> Any:
    """A module as the tree of its parameters; any other tree as it is."""
    return (
        parameters.parameters()
        if hasattr(parameters, "parameters")
        else tree_map(lambda leaf: leaf, parameters)
    )
