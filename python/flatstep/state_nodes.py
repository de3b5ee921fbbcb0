"""What a user sees inside ``optimizer.state``: dicts, lists and tuples that hold nothing.

Each question in Python is answered from the flat arrays as they are then, and each assignment
writes them, so that a node which somebody keeps is as MLX's own dict would be, and no array is held
by it. MLX's C++ functions read the storage underneath instead, which is filled only while a
function is traced, when a node may be what it returns: docs/engine.md, "The state".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import _ext
from .layout import Layout
from .live import LiveMapping, MixinList
from .slots import EMA
from .trees import check_leaf_state, leaf_values
from .walk import CONTAINERS, Inner, Keys, build, children, path_of, plain, shown, trees_equal

if TYPE_CHECKING:
    from .state import State


class LiveStateNeedsACopy:
    """What MLX finds in a node outside of a trace, and names when it refuses it as an argument."""


class Node:
    """A place in the tree of a state, by the keys that lead there."""

    plain_type: Any

    _state: State
    _keys: Keys
    _layout: Layout
    _place: Any  # in the layout's skeleton
    _replaced: int  # what the state's `replaced` was
    _is_filled: bool

    def __new__(cls, *items: Any, **named: Any) -> Any:
        # MLX's tree functions call the type of a container to make another one.
        return cls.plain_type(*items, **named)

    @classmethod
    def make(cls, state: State, layout: Layout, keys: Keys, place: Any, filling: Any = None) -> Any:
        node: Any = cls._holding(filling)
        node._state, node._layout, node._keys, node._place = state, layout, keys, place
        node._replaced, node._is_filled = state.replaced, filling is not None
        return node

    @classmethod
    def _holding(cls, filling: Any) -> Any:
        """A node with this in its storage."""
        raise NotImplementedError

    def _here(self) -> Any:
        """The place in the layout that the state has now."""
        layout = self._state.layout
        if layout is not self._layout:
            place: Any = layout.skeleton if layout else {}
            try:
                for key in self._keys:
                    place = place[key]
                fits = KINDS[type(place)] is type(self)
            except (KeyError, IndexError, TypeError):
                fits = False
            if layout is None or not fits:
                raise ValueError(
                    f"{path_of(self._keys)}: the optimizer's state has changed since this part of "
                    "it was taken; take it from optimizer.state again"
                )
            self._layout, self._place, self._is_filled = layout, place, False
        return self._place

    def _slots(self, number: int) -> tuple[str, ...]:
        return self._layout.slots_of(number)

    def _child(self, place: Any, key: Any) -> Any:
        # Filled or not as its parent: MLX's functions ask a list for its items.
        return KINDS[type(place)].make(self._state, self._layout, (*self._keys, key), place)

    def _write(self, items: dict[Any, Any]) -> None:
        assign(self._state, self._keys, self._here(), items)
        self._replaced = self._state.replaced

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            f"{path_of(self._keys)}: the parameters decide what an optimizer has state for; assign "
            "{} to start a part again from zero, or a whole tree to optimizer.state"
        )

    def __len__(self) -> int:
        place = self._here()
        return len(self._slots(place) if isinstance(place, int) else place)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.plain_type, (plain(self),)


class LiveDict(Node, LiveMapping):
    """A leaf's slots, or names that lead to leaves."""

    plain_type = dict

    @classmethod
    def _holding(cls, filling: Any) -> Any:
        node = dict.__new__(cls)
        dict.update(node, {"state": LiveStateNeedsACopy()} if filling is None else filling)
        return node

    def __getitem__(self, key: Any) -> Any:
        place = self._here()
        if isinstance(place, int):
            if key not in self._slots(place):
                raise KeyError(key)
            return self._layout.leaf_view(key, self._state.flat_arrays(key), place)
        child = place[key]
        return dict.__getitem__(self, key) if self._is_filled else self._child(child, key)

    def __iter__(self) -> Iterator[Any]:
        place = self._here()
        return iter(self._slots(place) if isinstance(place, int) else place)

    def __contains__(self, key: object) -> bool:
        place = self._here()
        return key in (self._slots(place) if isinstance(place, int) else place)

    def refill(self) -> None:
        """Brings the storage of a leaf up to date: see ``State``."""
        dict.update(self, {slot: self[slot] for slot in self})

    __delitem__ = Node._refuse


class LiveSequence(Node, Sequence[Any]):
    """Items that lead to leaves."""

    def __getitem__(self, index: Any) -> Any:
        place = self._here()
        if isinstance(index, slice):
            return self.plain_type(self[i] for i in range(len(place))[index])
        index = range(len(place))[index]
        if self._is_filled:
            return self.plain_type.__getitem__(self, index)
        return self._child(place[index], index)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def copy(self) -> Any:
        return self.plain_type(self)

    def __add__(self, other: Any) -> Any:
        return self.plain_type(self) + other

    def __radd__(self, other: Any) -> Any:
        return other + self.plain_type(self)

    def __mul__(self, times: Any) -> Any:
        return self.plain_type(self) * times

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, self.plain_type) and trees_equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(plain(self))


class LiveList(LiveSequence, MixinList):
    plain_type = list

    @classmethod
    def _holding(cls, filling: Any) -> Any:
        node = list.__new__(cls)
        list.extend(node, [LiveStateNeedsACopy()] if filling is None else filling.values())
        return node

    def __setitem__(self, index: Any, value: Any) -> None:
        numbers = range(len(self))[index]
        values = list(value) if isinstance(index, slice) else [value]
        numbers = numbers if isinstance(index, slice) else [numbers]
        if len(numbers) != len(values):
            self._refuse()
        self._write(dict(zip(numbers, values, strict=True)))

    def reverse(self) -> None:
        self[:] = self[::-1]

    __delitem__ = insert = sort = __imul__ = Node._refuse


class LiveTuple(LiveSequence, tuple[Any, ...]):  # type: ignore[misc]
    plain_type = tuple

    @classmethod
    def _holding(cls, filling: Any) -> Any:
        return tuple.__new__(cls, [LiveStateNeedsACopy()] if filling is None else filling.values())


KINDS = {int: LiveDict, dict: LiveDict, list: LiveList, tuple: LiveTuple}


def node_at(state: State, layout: Layout, keys: Keys, place: Any) -> Any:
    """What a user sees at a place of the layout's skeleton."""
    if not _ext.is_tracing():
        return KINDS[type(place)].make(state, layout, keys, place)

    def expand(below: Keys, place: Any) -> Any:
        def make(filling: dict[Any, Any]) -> Any:
            node = KINDS[type(place)].make(state, layout, (*keys, *below), place, filling)
            if isinstance(place, int):
                state.filled[id(node)] = node
            return node

        if isinstance(place, int):
            slots = layout.slots_of(place)
            return make({s: layout.leaf_view(s, state.flat_arrays(s), place) for s in slots})
        return Inner(make, children(place))

    return build(expand, place)


def refill(state: State) -> None:
    """Brings what a trace may return up to date after the state has changed."""
    if _ext.is_tracing():
        for node in list(state.filled.values()):
            node.refill()
    else:
        state.filled.clear()


def assign(state: State, keys: Keys, place: Any, items: dict[Any, Any]) -> None:
    """Assigns each item at its key below a place: all of them, or none and an error names the path.

    A subtree's value replaces all of it: what it does not name starts again from zero. The arrays
    of a leaf may be assigned one by one.
    """
    layout = state.layout
    assert layout is not None
    new: list[tuple[int, str, Any]] = []
    if isinstance(place, int):
        slots = layout.slots_of(place)
        for slot, value in items.items():
            if slot not in slots:
                raise ValueError(
                    f"{path_of((*keys, slot))}: this optimizer keeps {' and '.join(slots)}"
                )
            check_leaf_state((*keys, slot), value, layout.form, layout.leaves[place].shape)
            new.append((place, slot, value))
    else:
        for key, value in items.items():
            if isinstance(place, dict) and key not in place:
                raise _unknown((*keys, key))
            new += _replacements(state, layout, (*keys, key), place[key], value)
        state.replaced += bool(new)
    for number, slot, value in new:
        layout.write_leaf(slot, state.flat_arrays(slot), number, value)
    refill(state)


def _replacements(
    state: State, layout: Layout, keys: Keys, place: Any, value: Any
) -> list[tuple[int, str, Any]]:
    """(leaf, slot, value) for all that lies below a place to which a value is assigned."""
    is_here = isinstance(value, Node) and value._state is state and value._keys == keys
    if is_here and value._replaced == state.replaced:
        return []  # `node |= ...` writes, and then assigns the node to where it is
    new: list[tuple[int, str, Any]] = []
    todo = [(keys, place, value)]
    while todo:
        keys, place, value = todo.pop()
        if isinstance(value, Node) and value._state is state and value._replaced != state.replaced:
            raise ValueError(
                f"{path_of(keys)}: {path_of(value._keys)} is assigned here, taken before the last "
                "assignment; copy it first, with mlx.utils.tree_map(lambda leaf: leaf, ...)"
            )
        if isinstance(place, int):
            leaf = layout.leaves[place]
            values = leaf_values(keys, value, layout.form, leaf.dtype, leaf.shape)
            # Nothing says what an average would start again from.
            new += [(place, s, item) for s, item in values.items() if s != EMA or item is not None]
            continue
        if isinstance(value, CONTAINERS) and not value:
            todo += [((*keys, key), child, value) for key, child in children(place)]
        elif isinstance(place, dict):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{path_of(keys)}: a dict is needed here, {shown(value)} was assigned"
                )
            for key in value:
                if key not in place:
                    raise _unknown((*keys, key))
            todo += [((*keys, key), place[key], value.get(key, {})) for key in place]
        else:
            if not isinstance(value, (list, tuple)):
                raise ValueError(
                    f"{path_of(keys)}: a list is needed here, {shown(value)} was assigned"
                )
            if len(value) != len(place):
                raise ValueError(
                    f"{path_of(keys)}: {len(value)} items were assigned where there are "
                    f"{len(place)}"
                )
            todo += [((*keys, i), place[i], value[i]) for i in range(len(place))]
    return new


def _unknown(keys: Keys) -> ValueError:
    return ValueError(
        f"{path_of(keys)}: the optimizer was not initialised with this name; init makes state for "
        "new parameters, and a whole tree may be assigned to optimizer.state"
    )
