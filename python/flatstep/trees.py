"""Trees of parameters, gradients and state put side by side: not what every step does."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import mlx.core as mx

from .checks import SCALARS
from .layout import Layout, LeafSpec, name_of, unsupported
from .slots import CODES, EMA, FLOATING, GRADIENT_SUM, MASTER, RESTS, StateForm, num_blocks
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
RESERVED = (*SCALARS, FLAT_KEY)
# In place of a parameter that only the state knows, or of one that there is not.
ABSENT = object()


def merge_trees(
    state: dict[Any, Any], parameters: Any, form: StateForm, layout: Layout | None
) -> tuple[dict[str, Any], list[LeafSpec], list[dict[str, Any]]]:
    """The union of a state's tree and a tree of parameters: (skeleton, leaves, values by slot).

    A leaf's dtype and shape are those of its parameter. A leaf that only the state has takes its
    shape from there, and its dtype from the state's `layout`. Parameters that no gradient can come
    for, quantized ones, are no leaves. Entries of the state at the top that are no leaves' state
    are left out.
    """
    known = {leaf.keys: leaf.dtype for leaf in layout.leaves} if layout else {}
    leaves: list[LeafSpec] = []
    values: list[dict[str, Any]] = []
    slots = form.slots

    def leaf(keys: Keys, parameter: mx.array | None, held: Any) -> int:
        if parameter is None:
            value = next(held[slot] for slot in slots if is_state(held.get(slot)))
            array = value if is_array(value) else value[CODES.names[0]]
            # Of a half-precision parameter, if there is something of its master weight; which one
            # the parameter will say.
            guess = mx.bfloat16 if form.master_weight_bits and MASTER in held else array.dtype
            dtype = known.get(keys, guess if guess in FLOATING else mx.float32)
            if form.ema and EMA not in held:
                raise ValueError(
                    f"{path_of(keys)}: the state has no average of this parameter yet, which "
                    "starts from it; call optimizer.init(model.trainable_parameters())"
                )
            parameter = mx.broadcast_to(mx.array(0, dtype), array.shape)
        shape, dtype = tuple(parameter.shape), parameter.dtype
        value = leaf_values(keys, held, form, dtype, shape)
        if form.ema and value[EMA] is None:
            value[EMA] = parameter
        values.append(value)
        leaves.append(LeafSpec(keys, shape, dtype, form.leaf_state(keys, shape, parameter)))
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
            if isinstance(held, dict) and any(is_state(held.get(slot)) for slot in slots):
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
    keys: Keys, held: Any, form: StateForm, dtype: mx.Dtype, shape: tuple[int, ...]
) -> dict[str, Any]:
    """A leaf's state by its slots; None, which is zero, for an empty container."""
    slots = form.leaf_slots(dtype)
    if isinstance(held, CONTAINERS) and not held:
        return dict.fromkeys(slots)
    names = list(held) if isinstance(held, dict) else shown(held)
    # State from elsewhere knows nothing of master weights, and a parameter that was cast to float32
    # has left behind what was kept beside it.
    if not isinstance(held, dict) or not set(form.slots) <= set(names) <= set(form.flat_slots):
        advice = "{} starts again from zero"
        if isinstance(held, dict) and (EMA in held or GRADIENT_SUM in held):
            advice = "this optimizer keeps no more; set what dequantized_state() gives"
        elif isinstance(held, dict) and MASTER in held:
            advice = "set what dequantized_state() gives, and the weights with set_master_weights"
        raise ValueError(
            f"{path_of(keys)}: state should be a dict of {' and '.join(slots)}, found {names}; "
            f"{advice}"
        )
    for slot, value in held.items():
        check_leaf_state((*keys, slot), value, form, shape)
    return {slot: held.get(slot) for slot in slots}


def check_leaf_state(keys: Keys, value: Any, form: StateForm, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError, naming the path, when `value` is not state for `shape`."""
    blocks = RESTS[form.master_weight_bits or 24] if keys[-1] == MASTER else CODES
    if isinstance(value, dict) or keys[-1] == MASTER:
        names = list(value) if isinstance(value, dict) else shown(value)
        if not isinstance(value, dict) or set(names) != set(blocks.names):
            raise ValueError(
                f"{path_of(keys)}: state should be a dict of {' and '.join(blocks.names)}, "
                f"found {names}"
            )
        shapes = (shape, (num_blocks(shape),))
        for name, dtype, of in zip(blocks.names, blocks.dtypes, shapes, strict=True):
            _check_array((*keys, name), value[name], of)
            if value[name].dtype != dtype:
                raise TypeError(
                    f"{path_of((*keys, name))}: state should have dtype {name_of(dtype)}, found "
                    f"{name_of(value[name].dtype)}"
                )
        return
    _check_array(keys, value, shape)
    if value.dtype not in FLOATING:
        raise unsupported(f"{path_of(keys)}: state", value.dtype)


def _check_array(keys: Keys, value: Any, shape: tuple[int, ...]) -> None:
    path = path_of(keys)
    if not is_array(value):
        raise TypeError(f"{path}: state should be an mlx.core.array, found {type(value).__name__}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{path}: state of shape {tuple(value.shape)} does not match parameter {tuple(shape)}"
        )


def _has_state(tree: Any, slots: Sequence[str]) -> bool:
    """Whether leaves' state is all that a subtree has for leaves."""
    check_depth("state", tree)
    todo, found = [tree], False
    while todo:
        node = todo.pop()
        if isinstance(node, dict) and all(is_state(node.get(slot)) for slot in slots):
            found = True
        elif isinstance(node, CONTAINERS):
            todo += [child for _, child in children(node)]
        else:
            return False
    return found


def is_array(node: Any) -> bool:
    return isinstance(node, mx.array)


def is_state(node: Any) -> bool:
    """Whether a node is what a leaf has in a slot."""
    return is_array(node) or (isinstance(node, dict) and set(node) == set(CODES.names))


def matching_part(gradients: Any, parameters: Any) -> Any:
    """The part of the parameters that the gradients cover."""

    def expand(keys: Keys, place: tuple[Any, Any]) -> Any:
        gradient, parameter = place
        if isinstance(gradient, CONTAINERS):
            items = ((key, (child, item_of(parameter, key))) for key, child in children(gradient))
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


def item_of(container: Any, key: Any) -> Any:
    try:
        return container[key] if isinstance(container, CONTAINERS) else ABSENT
    except (KeyError, IndexError, TypeError):
        return ABSENT
