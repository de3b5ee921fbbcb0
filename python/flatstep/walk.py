"""Trees walked without recursion: a tree may be deep, and Python's stack is not."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext

Keys = tuple[Any, ...]

CONTAINERS = (dict, list, tuple)

# The first and the last keys are enough of a long path.
PATH_ENDS = 10


def path_of(keys: Keys) -> str:
    """The path as an error names it."""
    names = [str(key) for key in keys]
    if len(names) > 2 * PATH_ENDS:
        return ".".join(names[:PATH_ENDS]) + ". ... ." + ".".join(names[-PATH_ENDS:])
    return ".".join(names)


def plain_name(value: Any) -> str:
    """What a value is to a user: a part of a state is a dict, list or tuple."""
    return next(k.__name__ for k in (*CONTAINERS, type(value)) if isinstance(value, k))


def shown(value: Any) -> str:
    """A misfit as an error names it."""
    return plain_name(value) if isinstance(value, (*CONTAINERS, mx.array)) else repr(value)


def children(container: Any) -> Iterable[tuple[Any, Any]]:
    return container.items() if isinstance(container, dict) else enumerate(container)


def check_depth(what: str, tree: Any, limit: int = _ext.MAX_TREE_DEPTH) -> None:
    """Raises ValueError when a tree contains itself, or nests deeper than the limit."""
    if not isinstance(tree, CONTAINERS):
        return
    keys: list[Any] = []
    above, levels = [tree], [iter(children(tree))]
    while levels:
        for key, child in levels[-1]:
            if not isinstance(child, CONTAINERS):
                continue
            keys.append(key)
            if any(child is container for container in above):
                raise ValueError(f"{what}: {path_of(tuple(keys))}: the tree contains itself here")
            if len(above) == limit:
                raise ValueError(
                    f"{what}: {path_of(tuple(keys))}: trees nest at most {limit} levels deep, "
                    "this one more"
                )
            above.append(child)
            levels.append(iter(children(child)))
            break
        else:
            levels.pop()
            above.pop()
            del keys[-1:]


class Inner(NamedTuple):
    """A container that ``build`` is to make, of what `items` become."""

    make: Callable[[dict[Any, Any]], Any]
    items: Iterable[tuple[Any, Any]]


def build(expand: Callable[[Keys, Any], Any], root: Any) -> Any:
    """A tree made from its root, in order: `expand` gives an ``Inner`` or a leaf for each place."""
    levels: list[tuple[Keys, Inner, Any, dict[Any, Any]]] = []
    keys: Keys = ()
    made = expand(keys, root)
    while True:
        if isinstance(made, Inner):
            levels.append((keys, made, iter(made.items), {}))
        elif levels:
            levels[-1][3][keys[-1]] = made
        else:
            return made
        above, inner, items, done = levels[-1]
        for key, place in items:
            keys = (*above, key)
            made = expand(keys, place)
            break
        else:
            levels.pop()
            keys, made = above, inner.make(done)


def inner_like(container: Any, items: Iterable[tuple[Any, Any]]) -> Inner:
    """A container of the same type, in plain form."""

    def make(made: dict[Any, Any]) -> Any:
        if isinstance(container, dict):
            return made
        kind = type(container)
        return kind(*made.values()) if hasattr(kind, "_fields") else kind(made.values())

    return Inner(make, items)


def plain(tree: Any) -> Any:
    """A tree as plain containers that no later step changes."""
    return build(
        lambda _, node: inner_like(node, children(node)) if isinstance(node, CONTAINERS) else node,
        tree,
    )


def trees_equal(a: Any, b: Any) -> bool:
    """Equality of trees, with arrays equal when their dtypes, shapes and values are."""
    todo = [(a, b)]
    while todo:
        a, b = todo.pop()
        if isinstance(a, mx.array) and isinstance(b, mx.array):
            same = a.dtype == b.dtype and bool(mx.array_equal(a, b))
        elif isinstance(a, dict) and isinstance(b, dict):
            same = a.keys() == b.keys()
            todo += [(a[key], b[key]) for key in a] if same else []
        elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            same = len(a) == len(b)
            todo += zip(a, b, strict=True) if same else []
        else:
            same = bool(a == b)
        if not same:
            return False
    return True
