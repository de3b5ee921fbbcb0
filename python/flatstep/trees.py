"""Trees of parameters, gradients and state put side by side: not what every step does."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import mlx.core as mx

from .layout import FLOATING, Layout, LeafSpec, unsupported
from .walk import (
    CONTAINERS,
    Inner,
    Keys,
    build,
    check_depth,
    children,
    inner_like,
    path_of,
    plain_name,
    shown,
)

# Names that a state has at its top beside those of the parameters.
FLAT_KEY = "__flatstep__"
RESERVED = ("step", "learning_rate", FLAT_KEY)
# In place of a parameter that only the state knows, or of one that there is not.
ABSENT = object()


def merge_trees(
    state: dict[Any, Any], parameters: Any, slots: Sequence[str], layout: Layout | None
) -> tuple[dict[str, Any], list[LeafSpec], list[list[mx.array | None]]]:
    """The union of a state's tree and a tree of parameters: (skeleton, leaves, state values).

    A leaf's dtype and shape are those of its parameter. A leaf that only the state has takes its
    shape from there, and its dtype from the state's `layout`. Parameters that no gradient can come
    for, quantized ones, are no leaves. Entries of the state at the top that are no leaves' state
    are left out.
    """
    known = {leaf.keys: leaf.dtype for leaf in layout.leaves} if layout else {}
    leaves: list[LeafSpec] = []
    values: list[list[mx.array | None]] = []

    def leaf(keys: Keys, parameter: mx.array | None, held: Any) -> int:
        if parameter is None:
            shape, dtype = next((a.shape, a.dtype) for a in held.values() if is_array(a))
            dtype = known.get(keys, dtype)
        else:
            shape, dtype = parameter.shape, parameter.dtype
        values.append(leaf_values(keys, held, slots, tuple(shape)))
        leaves.append(LeafSpec(keys, tuple(shape), dtype))
        return len(leaves) - 1

    def expand(keys: Keys, place: tuple[Any, Any]) -> Any:
        parameter, held = place
        if is_array(parameter):
            if parameter.dtype in FLOATING:
                return leaf(keys, parameter, held)
            if keys not in known:
                return {}  # MLX keeps state for it, which no step reads
            parameter = ABSENT
        kind = held if parameter is ABSENT else parameter
        if parameter is ABSENT:
            if isinstance(held, dict) and any(is_array(held.get(slot)) for slot in slots):
                return leaf(keys, None, held)
            if not isinstance(held, CONTAINERS):
                raise ValueError(
                    f"{path_of(keys)}: state should be dicts of {' and '.join(slots)}, found "
                    f"{type(held).__name__}; remove it, or assign {{}} there"
                )
        elif not isinstance(parameter, CONTAINERS):
            raise TypeError(
                f"{path_of(keys)}: a parameter should be an mlx.core.array, found "
                f"{type(parameter).__name__}"
            )
        fits = isinstance(held, dict) == isinstance(kind, dict) or not held
        if not isinstance(held, CONTAINERS) or not fits:
            raise ValueError(
                f"{path_of(keys)}: the state holds a {plain_name(held)} here, the parameters a "
                f"{plain_name(kind)}; mlx.utils.tree_unflatten makes lists of numbered names, "
                "and {} starts again from zero"
            )
        if isinstance(kind, dict):
            return Inner(dict, named(keys, {} if parameter is ABSENT else parameter, held or {}))
        ours = () if parameter is ABSENT else parameter
        if len(held) > len(ours) and parameter is not ABSENT and not known:
            raise ValueError(
                f"{path_of(keys)}: the state has {len(held)} items here, the parameters "
                f"{len(ours)}; remove the others"
            )
        make = tuple if isinstance(kind, tuple) else list
        pairs = zip_longest(ours, held, fillvalue=ABSENT)
        items = enumerate((mine, {} if its is ABSENT else its) for mine, its in pairs)
        return Inner(lambda made: make(made.values()), items)

    check_depth("parameters", parameters)
    for name in RESERVED:
        if name in parameters:
            raise ValueError(f"{name}: a top-level parameter can't have a name of the state's own")
    own = layout.skeleton if layout else {}
    held = {
        key: value
        for key, value in state.items()
        if key in parameters or key in own or (key not in RESERVED and _has_state(value, slots))
    }
    return build(expand, (parameters, held)), leaves, values


def named(keys: Keys, ours: Any, theirs: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """What parameters and state hold under each name, the state's names first."""
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        if not isinstance(key, str):
            raise TypeError(
                f"{path_of(keys) or 'parameters'}: names should be strings, {key!r} was found"
            )
        yield key, (ours.get(key, ABSENT), theirs.get(key, {}))


def leaf_values(
    keys: Keys, held: Any, slots: Sequence[str], shape: tuple[int, ...]
) -> list[mx.array | None]:
    """A leaf's state, an array for each slot; None, which is zero, for an empty container."""
    if isinstance(held, CONTAINERS) and not held:
        return [None] * len(slots)
    names = list(held) if isinstance(held, dict) else shown(held)
    if not isinstance(held, dict) or set(names) != set(slots):
        raise ValueError(
            f"{path_of(keys)}: state should be a dict of {' and '.join(slots)}, found {names}; "
            "{} starts again from zero"
        )
    values = [held[slot] for slot in slots]
    for slot, value in zip(slots, values, strict=True):
        check_leaf_state((*keys, slot), value, shape)
    return values


def check_leaf_state(keys: Keys, value: Any, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError, naming the path, when `value` is not state for `shape`."""
    path = path_of(keys)
    if not is_array(value):
        raise TypeError(f"{path}: state should be an mlx.core.array, found {type(value).__name__}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{path}: state of shape {tuple(value.shape)} does not match parameter {tuple(shape)}"
        )
    if value.dtype not in FLOATING:
        raise unsupported(f"{path}: state", value.dtype)


def _has_state(tree: Any, slots: Sequence[str]) -> bool:
    """Whether leaves' state is all that a subtree has for leaves."""
    check_depth("state", tree)
    todo, found = [tree], False
    while todo:
        node = todo.pop()
        if isinstance(node, dict) and all(is_array(node.get(slot)) for slot in slots):
            found = True
        elif isinstance(node, CONTAINERS):
            todo += [child for _, child in children(node)]
        else:
            return False
    return found


def is_array(node: Any) -> bool:
    return isinstance(node, mx.array)


def matching_part(gradients: Any, parameters: Any) -> Any:
    """The part of the parameters that the gradients cover."""

    def expand(keys: Keys, place: tuple[Any, Any]) -> Any:
        gradient, parameter = place
        if isinstance(gradient, CONTAINERS):
            items = ((key, (child, _item(parameter, key))) for key, child in children(gradient))
            return inner_like(gradient, items)
        if not is_array(gradient):
            raise TypeError(
                f"{path_of(keys) or 'the tree'}: a gradient should be an mlx.core.array, found "
                f"{type(gradient).__name__}"
            )
        if parameter is ABSENT:
            raise ValueError(f"{path_of(keys)}: there is a gradient but no parameter of this name")
        return parameter

    check_depth("gradients", gradients)
    return build(expand, (gradients, parameters))


def _item(container: Any, key: Any) -> Any:
    try:
        return container[key] if isinstance(container, CONTAINERS) else ABSENT
    except (KeyError, IndexError, TypeError):
        return ABSENT
