"""What a user sees inside ``optimizer.state``: dicts and lists that read and write flat arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .trees import check_leaf_state, trees_equal

if TYPE_CHECKING:
    from .layout import Layout
    from .state import State


class Node(dict[Any, Any]):
    """A dict inside the tree: a leaf's slots, or names that lead to leaves.

    What it holds as a dict are the views at the time when it was last asked for something; every
    question in Python is answered from the state as it is then, as MLX's own dicts would.
    """

    def __init__(self, state: State, skeleton: Any, path: str):
        self._state = state
        self._path = path
        self._place = skeleton
        self._refresh()

    def _refresh(self) -> None:
        dict.clear(self)
        if isinstance(self._place, dict):
            for key, child in self._place.items():
                dict.__setitem__(self, key, make_node(self._state, child, f"{self._path}.{key}"))
            return
        layout = self._state.layout
        if layout is not None:
            for slot in layout.slots:
                view = layout.leaf_view(self._state.flat_arrays(slot), self._place)
                dict.__setitem__(self, slot, view)

    def __getitem__(self, key: Any) -> Any:
        self._refresh()
        return dict.__getitem__(self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(self._place, dict):
            if key not in self._place:
                raise KeyError(
                    f"{self._path}.{key}: the optimizer was not initialised with this parameter"
                )
            write_subtree(self._state, self._place[key], value, f"{self._path}.{key}")
        else:
            write_subtree(self._state, self._place, {key: value}, self._path)
        self._refresh()

    def get(self, key: Any, default: Any = None) -> Any:
        self._refresh()
        return dict.get(self, key, default)

    def items(self) -> Any:
        self._refresh()
        return dict.items(self)

    def values(self) -> Any:
        self._refresh()
        return dict.values(self)

    def update(self, *others: Any, **items: Any) -> None:
        for key, value in dict(*others, **items).items():
            self[key] = value

    def __ior__(self, other: Any) -> Node:  # type: ignore[misc]
        self.update(other)
        return self

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def copy(self) -> dict[Any, Any]:
        return dict(self.items())

    def __eq__(self, other: object) -> bool:
        return trees_equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __repr__(self) -> str:
        return repr(dict(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (detached(self),)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "entries of an initialised optimizer's state cannot be removed; assign new values, or "
            "assign a whole tree to optimizer.state"
        )

    __delitem__ = pop = popitem = clear = _refuse


class NodeList(list[Any]):
    """A list inside the tree. Its items are live; assigning to one writes the state."""

    def __init__(
        self,
        items: Iterable[Any] = (),
        state: State | None = None,
        place: Sequence[Any] = (),
        path: str = "",
    ):
        super().__init__(items)
        self._state = state
        self._place = place
        self._path = path

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._state is None:
            super().__setitem__(index, value)
        else:
            write_subtree(self._state, self._place[index], value, f"{self._path}.{index}")

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (detached(self),)

    def __delitem__(self, index: Any) -> None:
        self._refuse_if_live()
        super().__delitem__(index)

    def append(self, item: Any) -> None:
        self._refuse_if_live()
        super().append(item)

    def extend(self, items: Iterable[Any]) -> None:
        self._refuse_if_live()
        super().extend(items)

    def insert(self, index: Any, item: Any) -> None:
        self._refuse_if_live()
        super().insert(index, item)

    def pop(self, index: Any = -1) -> Any:
        self._refuse_if_live()
        return super().pop(index)

    def _refuse_if_live(self) -> None:
        if self._state is not None:
            raise TypeError(
                f"{self._path}: the items of an initialised optimizer's state are those of its "
                "parameters; assign new values to them"
            )


def make_node(state: State, skeleton: Any, path: str) -> Any:
    """What a user sees at a place of the tree."""
    if isinstance(skeleton, (list, tuple)):
        items = [make_node(state, child, f"{path}.{i}") for i, child in enumerate(skeleton)]
        return (
            tuple(items) if isinstance(skeleton, tuple) else NodeList(items, state, skeleton, path)
        )
    return Node(state, skeleton, path)


def detached(node: Any) -> Any:
    """A node as plain containers that no later step changes."""
    if isinstance(node, dict):
        return {key: detached(child) for key, child in node.items()}
    if isinstance(node, (list, tuple)):
        items = [detached(child) for child in node]
        return items if isinstance(node, list) else tuple(items)
    return node


def write_subtree(state: State, skeleton: Any, value: Any, path: str) -> None:
    """Assigns a subtree: every leaf below `skeleton` takes the slots that `value` has for it.

    All of it is checked before any of it is written.
    """
    layout = state.layout
    assert layout is not None
    for leaf, slot, array in list(_assignments(layout, skeleton, value, path)):
        layout.write_leaf(state.flat_arrays(slot), leaf, array)


def _assignments(
    layout: Layout, skeleton: Any, value: Any, path: str
) -> Iterator[tuple[int, str, mx.array]]:
    """(leaf, slot, array) for each array that `value` assigns. Raises errors that name the path."""
    if isinstance(skeleton, int):
        spec = layout.leaves[skeleton]
        if not isinstance(value, dict):
            raise TypeError(
                f"{spec.path}: state should be a dict of arrays, {value!r} was assigned"
            )
        for slot, array in value.items():
            if slot not in layout.slots:
                raise KeyError(
                    f"{spec.path}.{slot}: this optimizer keeps {', '.join(layout.slots)}"
                )
            check_leaf_state(f"{spec.path}.{slot}", array, spec.shape)
            yield skeleton, slot, array
    elif isinstance(skeleton, dict):
        if not isinstance(value, dict):
            raise TypeError(f"{path}: a dict is needed here, {value!r} was assigned")
        for key, child in value.items():
            if key not in skeleton:
                raise KeyError(f"{path}.{key}: the optimizer was not initialised with this name")
            yield from _assignments(layout, skeleton[key], child, f"{path}.{key}")
    else:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{path}: a list is needed here, {value!r} was assigned")
        if len(value) != len(skeleton):
            raise ValueError(
                f"{path}: {len(value)} items were assigned where there are {len(skeleton)}"
            )
        for i, (child, item) in enumerate(zip(skeleton, value, strict=True)):
            yield from _assignments(layout, child, item, f"{path}.{i}")
