"""The optimizer's state: flat arrays underneath, MLX's tree in the hand.

``State`` is a dict whose storage and whose interface differ on purpose. Its storage, which is what
MLX's C++ tree walkers (``mx.eval``, ``mx.compile``) see, holds ``step``, ``learning_rate`` and,
under one reserved key, the flat arrays with their layout. Its Python interface shows the tree that
``mlx.optimizers`` has, with leaves made as views of the flat arrays when somebody asks. Assigning
to a leaf writes its segment.

Until the optimizer is initialised, and after a user has set a tree of their own, there are no flat
arrays: storage and interface are then the same, those of a plain dict.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from .checks import as_learning_rate, as_step
from .layout import BUCKET_BYTES, Layout
from .state_nodes import detached, make_node, write_subtree
from .trees import FLAT_KEY, merge_trees, trees_equal

LAYOUT_KEY = "layout"


class State(dict[Any, Any]):
    """The ``state`` of a flatstep optimizer; use it as the dict that ``mlx.optimizers`` has."""

    # The layout that the reserved entry's text describes, read once.
    _known_layout: Layout | None = None

    @classmethod
    def adopt(cls, value: Any) -> Any:
        """A state from anything that a user may set: a ``State`` itself, a tree of MLX, or the
        plain dict with the reserved key that a compiled function returns."""
        if isinstance(value, cls) or not isinstance(value, dict):
            return value
        state = cls()
        for key, item in value.items():
            dict.__setitem__(state, key, item)
        if FLAT_KEY in value:
            state._known_layout = _checked_flat(value[FLAT_KEY])
            dict.__setitem__(state, FLAT_KEY, _copied(value[FLAT_KEY]))
        return state

    # ---- What the optimizers use ----

    @property
    def layout(self) -> Layout | None:
        """The layout of the flat arrays; None while there are none."""
        flat = dict.get(self, FLAT_KEY)
        if flat is None:
            return None
        if self._known_layout is None or self._known_layout.text != flat[LAYOUT_KEY]:
            self._known_layout = Layout.from_text(flat[LAYOUT_KEY])
        return self._known_layout

    def flat_arrays(self, slot: str) -> list[mx.array]:
        """The flat arrays of a slot, one for each bucket."""
        arrays: list[mx.array] = dict.__getitem__(self, FLAT_KEY)[slot]
        return arrays

    def commit(
        self, layout: Layout, arrays: dict[str, list[mx.array]], scalars: dict[str, mx.array]
    ) -> None:
        """Makes these flat arrays the state of all of the layout's leaves, with these scalars.

        In one call that no Ctrl-C can interrupt: a state is never half a step ahead.
        """
        self._known_layout = layout
        dict.update(self, {**scalars, FLAT_KEY: {LAYOUT_KEY: layout.text, **arrays}})
        for key in layout.skeleton:
            dict.pop(self, key, None)

    def make_flat(
        self, parameters: Any, slots: Sequence[str], dtype: mx.Dtype
    ) -> tuple[Layout, dict[str, list[mx.array]]]:
        """The layout and flat arrays for `parameters` and all leaves that the state has already.

        Nothing is changed: the caller hands the result to ``commit``.
        """
        known = {leaf.keys: leaf.dtype for leaf in self.layout.leaves} if self.layout else {}
        skeleton, leaves, values = merge_trees(self._tree(), parameters, slots, known)
        layout = Layout(skeleton, leaves, slots, BUCKET_BYTES)
        arrays = {
            slot: layout.pack([value[i] for value in values], dtype) for i, slot in enumerate(slots)
        }
        return layout, arrays

    def _tree(self) -> dict[Any, Any]:
        """The tree as plain dicts, lists and tuples, with the leaves as views."""
        layout = self.layout
        raw = {k: v for k, v in dict.items(self) if k != FLAT_KEY}
        if layout is None:
            return raw
        return {**raw, **{k: detached(make_node(self, c, k)) for k, c in layout.skeleton.items()}}

    # ---- The dict that users see ----

    def _skeleton(self) -> dict[Any, Any]:
        layout = self.layout
        return layout.skeleton if layout else {}

    def __getitem__(self, key: Any) -> Any:
        skeleton = self._skeleton()
        return (
            make_node(self, skeleton[key], str(key))
            if key in skeleton
            else dict.__getitem__(self, key)
        )

    def __setitem__(self, key: Any, value: Any) -> None:
        skeleton = self._skeleton()
        if key in skeleton:
            write_subtree(self, skeleton[key], value, str(key))
        else:
            dict.__setitem__(self, key, _checked(key, value))

    def __delitem__(self, key: Any) -> None:
        if dict.__contains__(self, key) and key != FLAT_KEY:
            dict.__delitem__(self, key)
            return
        if key not in self._skeleton():
            raise KeyError(key)
        # No flat arrays can leave a leaf out: go back to a plain tree, as before `init`.
        tree = self._tree()
        del tree[key]
        dict.clear(self)
        dict.update(self, tree)

    def __contains__(self, key: object) -> bool:
        return (dict.__contains__(self, key) and key != FLAT_KEY) or key in self._skeleton()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __eq__(self, other: object) -> bool:
        return trees_equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __repr__(self) -> str:
        return repr(dict(self.items()))

    def __or__(self, other: Any) -> Any:
        return {**self.copy(), **other}

    def __ior__(self, other: Any) -> "State":
        self.update(other)
        return self

    def __reversed__(self) -> Iterator[Any]:
        return iter(list(self.keys())[::-1])

    def __reduce__(self) -> tuple[Any, ...]:
        storage = dict(dict.items(self))
        if FLAT_KEY in storage:
            storage[FLAT_KEY] = _copied(storage[FLAT_KEY])
        return State.adopt, (storage,)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

    def keys(self) -> Any:
        raw = {k: None for k in dict.keys(self) if k != FLAT_KEY}
        return {**raw, **self._skeleton()}.keys()

    def items(self) -> Any:
        return {k: self[k] for k in self.keys()}.items()

    def values(self) -> Any:
        return {k: self[k] for k in self.keys()}.values()

    def copy(self) -> dict[Any, Any]:
        return dict(self.items())

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *others: Any, **items: Any) -> None:
        for key, value in dict(*others, **items).items():
            self[key] = value

    def pop(self, key: Any, *default: Any) -> Any:
        if key not in self:
            if default:
                return default[0]
            raise KeyError(key)
        value = detached(self[key])
        del self[key]
        return value

    def popitem(self) -> tuple[Any, Any]:
        if not len(self):
            raise KeyError("popitem(): dictionary is empty")
        key = list(self.keys())[-1]
        return key, self.pop(key)


def _checked(key: Any, value: Any) -> Any:
    """``step`` and ``learning_rate`` as the kernels read them; any other entry as it is."""
    if key == "step":
        return as_step(value)
    return as_learning_rate(value) if key == "learning_rate" else value


def _copied(flat: dict[str, Any]) -> dict[str, Any]:
    """A reserved entry of its own: to write a leaf into one leaves the other as it was."""
    return {key: item if key == LAYOUT_KEY else list(item) for key, item in flat.items()}


def _checked_flat(flat: Any) -> Layout:
    """The layout of a reserved entry. Raises ValueError when that is none that flatstep made."""
    try:
        layout = Layout.from_text(flat[LAYOUT_KEY])
        for slot in layout.slots:
            shapes = [tuple(array.shape) for array in flat[slot]]
            if shapes != layout.bucket_shapes:
                raise ValueError(f"{slot} has arrays of shapes {shapes}")
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the state's entry {FLAT_KEY!r} is not what an optimizer of flatstep returned: {error}"
        ) from error
    return layout
