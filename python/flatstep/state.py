"""The optimizer's state: flat arrays underneath, MLX's tree in the hand.

``State`` is a dict whose storage and whose interface differ on purpose. Its storage, which is what
MLX's C++ tree walkers (``mx.eval``, ``mx.compile``) see, holds ``step``, ``learning_rate`` and,
under one reserved key, the flat arrays with their layout. Its Python interface shows the tree that
``mlx.optimizers`` has, with leaves made as views of the flat arrays when somebody asks. Assigning
to a leaf writes its segment.

Until the optimizer is initialised, and after a user has set a tree of their own, there are no flat
arrays: storage and interface are then the same, those of a plain dict.
"""

from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import mlx.core as mx

from .layout import BUCKET_BYTES, FLOATING, Layout, LeafSpec

FLAT_KEY = "__flatstep__"
LAYOUT_KEY = "layout"


class State(dict):
    """The ``state`` of a flatstep optimizer; use it as the dict that ``mlx.optimizers`` has."""

    # The layout that the reserved entry's text describes, read once.
    _known_layout: Optional[Layout] = None

    @classmethod
    def adopt(cls, value: Any) -> Any:
        """A state from anything that a user may set: a ``State`` itself, a tree of MLX, or the
        plain dict with the reserved key that a compiled function returns."""
        if isinstance(value, cls) or not isinstance(value, dict):
            return value
        state = cls()
        for key, item in value.items():
            dict.__setitem__(state, key, item)
        return state

    # ---- What the optimizers use ----

    @property
    def layout(self) -> Optional[Layout]:
        """The layout of the flat arrays; None while there are none."""
        flat = dict.get(self, FLAT_KEY)
        if flat is None:
            return None
        if self._known_layout is None or self._known_layout.text != flat[LAYOUT_KEY]:
            self._known_layout = Layout.from_text(flat[LAYOUT_KEY])
        return self._known_layout

    def flat_arrays(self, slot: str) -> List[mx.array]:
        """The flat arrays of a slot, one for each bucket."""
        return dict.__getitem__(self, FLAT_KEY)[slot]

    def set_flat(self, layout: Layout, arrays: Dict[str, List[mx.array]]) -> None:
        """Makes these flat arrays the state of all of the layout's leaves."""
        self._known_layout = layout
        for key in layout.skeleton:
            dict.pop(self, key, None)
        flat = {LAYOUT_KEY: layout.text, **arrays}
        if FLAT_KEY in self._storage_keys():
            # mx.compile captures containers by identity: keep them, replace what they hold.
            held = dict.__getitem__(self, FLAT_KEY)
            held.clear()
            held.update(flat)
        else:
            dict.__setitem__(self, FLAT_KEY, flat)

    def make_flat(
        self, parameters: Any, slots: Sequence[str], dtype: mx.Dtype
    ) -> Tuple[Layout, Dict[str, List[mx.array]]]:
        """The layout and flat arrays for `parameters` and all leaves that the state has already.

        Nothing is changed: the caller hands the result to ``set_flat``.
        """
        skeleton, leaves, values = merge_trees(self._tree(), parameters, slots)
        layout = Layout(skeleton, leaves, slots, BUCKET_BYTES)
        arrays = {slot: layout.pack([value[i] for value in values], dtype)
                  for i, slot in enumerate(slots)}
        return layout, arrays

    def _storage_keys(self) -> Sequence[Any]:
        return list(dict.keys(self))

    def _tree(self) -> Dict[Any, Any]:
        """The tree as plain dicts, lists and tuples, with the leaves as views."""
        layout = self.layout
        raw = {k: v for k, v in dict.items(self) if k != FLAT_KEY}
        if layout is None:
            return raw
        return {**raw, **{k: _detached(_node(self, c)) for k, c in layout.skeleton.items()}}

    # ---- The dict that users see ----

    def _skeleton(self) -> Dict[Any, Any]:
        layout = self.layout
        return layout.skeleton if layout else {}

    def __getitem__(self, key: Any) -> Any:
        if dict.__contains__(self, key):
            return dict.__getitem__(self, key)
        return _node(self, self._skeleton()[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        skeleton = self._skeleton()
        if key in skeleton and not dict.__contains__(self, key):
            _write(self, skeleton[key], value, str(key))
        else:
            dict.__setitem__(self, key, _checked_scalar(key, value))

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
        return _equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(dict(self.items()))

    def __or__(self, other: Any) -> Any:
        return {**self.copy(), **other}

    def __ior__(self, other: Any) -> "State":
        self.update(other)
        return self

    def __reversed__(self) -> Iterator[Any]:
        return reversed(list(self.keys()))

    def __reduce__(self) -> tuple:
        storage = dict(dict.items(self))
        if FLAT_KEY in storage:
            storage[FLAT_KEY] = {k: v if k == LAYOUT_KEY else list(v)
                                 for k, v in storage[FLAT_KEY].items()}
        return State.adopt, (storage,)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default

    def keys(self) -> Any:
        raw = {k: None for k in dict.keys(self) if k != FLAT_KEY}
        return {**raw, **self._skeleton()}.keys()

    def items(self) -> Any:
        return {k: self[k] for k in self.keys()}.items()

    def values(self) -> Any:
        return {k: self[k] for k in self.keys()}.values()

    def copy(self) -> Dict[Any, Any]:
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
        value = _detached(self[key])
        del self[key]
        return value

    def popitem(self) -> Tuple[Any, Any]:
        if not len(self):
            raise KeyError("popitem(): dictionary is empty")
        key = list(self.keys())[-1]
        return key, self.pop(key)


class _Node(dict):
    """A dict inside the tree: a leaf's slots, or names that lead to leaves.

    What it holds as a dict are the views at the time when it was last asked for something; every
    question in Python is answered from the state as it is then, as MLX's own dicts would.
    """

    def __init__(self, state: State, skeleton: Any):
        self._state = state
        self._place = skeleton
        self._refresh()

    def _refresh(self) -> None:
        dict.clear(self)
        if isinstance(self._place, dict):
            for key, child in self._place.items():
                dict.__setitem__(self, key, _node(self._state, child))
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
                raise KeyError(f"{key}: the optimizer was not initialised with this parameter")
            _write(self._state, self._place[key], value, str(key))
        else:
            _write_slot(self._state, self._place, key, value)
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

    def copy(self) -> Dict[Any, Any]:
        return dict(self.items())

    def __eq__(self, other: object) -> bool:
        return _equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(dict(self.items()))

    def __reduce__(self) -> tuple:
        return dict, (_detached(self),)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "entries of an initialised optimizer's state cannot be removed; assign new values, or "
            "assign a whole tree to optimizer.state"
        )

    __delitem__ = pop = popitem = clear = _refuse


class _NodeList(list):
    """A list inside the tree. Its items are live; assigning to one writes the state."""

    def __init__(self, items: Sequence[Any] = (), state: Optional[State] = None, place: Any = ()):
        super().__init__(items)
        self._state = state
        self._place = place

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._state is None:
            super().__setitem__(index, value)
        else:
            _write(self._state, self._place[index], value, str(index))

    def __reduce__(self) -> tuple:
        return list, (_detached(self),)


def _node(state: State, skeleton: Any) -> Any:
    """What a user sees at a place of the tree."""
    if isinstance(skeleton, list):
        return _NodeList([_node(state, child) for child in skeleton], state, skeleton)
    if isinstance(skeleton, tuple):
        return tuple(_node(state, child) for child in skeleton)
    return _Node(state, skeleton)


def _detached(node: Any) -> Any:
    """A node as plain containers that no later step changes."""
    if isinstance(node, dict):
        return {key: _detached(child) for key, child in node.items()}
    if isinstance(node, (list, tuple)):
        items = [_detached(child) for child in node]
        return items if isinstance(node, list) else tuple(items)
    return node


def _write(state: State, skeleton: Any, value: Any, path: str) -> None:
    """Assigns a subtree: every leaf below `skeleton` takes the slots that `value` has for it."""
    if isinstance(skeleton, int):
        if not isinstance(value, dict):
            raise TypeError(f"{path}: state should be a dict of arrays, {value!r} was assigned")
        for slot, array in value.items():
            _write_slot(state, skeleton, slot, array, path)
    elif isinstance(skeleton, dict):
        for key, child in value.items():
            if key not in skeleton:
                raise KeyError(f"{path}.{key}: the optimizer was not initialised with this name")
            _write(state, skeleton[key], child, f"{path}.{key}")
    else:
        if len(value) != len(skeleton):
            raise ValueError(f"{path}: {len(value)} items were assigned to {len(skeleton)}")
        for i, (child, item) in enumerate(zip(skeleton, value)):
            _write(state, child, item, f"{path}.{i}")


def _write_slot(state: State, leaf: int, slot: Any, value: Any, path: str = "") -> None:
    layout = state.layout
    assert layout is not None
    spec = layout.leaves[leaf]
    if slot not in layout.slots:
        raise KeyError(f"{spec.path}.{slot}: this optimizer keeps {', '.join(layout.slots)}")
    if not isinstance(value, mx.array):
        value = mx.array(value)
    _check_leaf(f"{spec.path}.{slot}", value, spec.shape)
    layout.write_leaf(state.flat_arrays(slot), leaf, value)


def _check_leaf(path: str, value: mx.array, shape: Tuple[int, ...]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{path}: state of shape {tuple(value.shape)} does not match parameter {tuple(shape)}"
        )
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{path}: state has dtype {value.dtype}; float32, float16 and bfloat16 are supported"
        )


def _checked_scalar(key: Any, value: Any) -> Any:
    """``step`` and ``learning_rate`` as the kernels read them; any other entry as it is."""
    if key == "step":
        if isinstance(value, mx.array):
            return value if value.dtype == mx.uint64 else value.astype(mx.uint64)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**64:
            raise ValueError(f"step should be a whole number >= 0, {value!r} was provided instead")
        return mx.array(value, mx.uint64)
    if key == "learning_rate" and isinstance(value, mx.array) and value.dtype in FLOATING:
        return value if value.dtype == mx.float32 else value.astype(mx.float32)
    return value


def _equal(a: Any, b: Any) -> bool:
    """Equality of trees, with arrays equal when their dtypes, shapes and values are."""
    if isinstance(a, mx.array) and isinstance(b, mx.array):
        return bool(a.dtype == b.dtype and mx.array_equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def merge_trees(
    state: Any, parameters: Any, slots: Sequence[str]
) -> Tuple[Dict[str, Any], List[LeafSpec], List[List[Optional[mx.array]]]]:
    """The union of a state's tree and a tree of parameters: (skeleton, leaves, state values).

    A leaf's dtype and shape are those of its parameter; of a leaf that only the state has, those
    of its state. Entries of the state at the top that are no leaves' state are left out.
    """
    leaves: List[LeafSpec] = []
    values: List[List[Optional[mx.array]]] = []

    def add_leaf(keys: Tuple[Any, ...], parameter: Optional[mx.array], held: Any) -> int:
        held = held if isinstance(held, dict) else {}
        first = next((held[slot] for slot in slots if slot in held), None)
        source = parameter if parameter is not None else first
        assert source is not None
        spec = LeafSpec(keys, tuple(source.shape), source.dtype)
        if source.dtype not in FLOATING:
            raise TypeError(
                f"{spec.path}: parameter has dtype {source.dtype}; float32, float16 and bfloat16 "
                "are supported"
            )
        for slot in slots:
            if slot in held:
                _check_leaf(f"{spec.path}.{slot}", held[slot], spec.shape)
        leaves.append(spec)
        values.append([held.get(slot) for slot in slots])
        return len(leaves) - 1

    def merge(keys: Tuple[Any, ...], parameter: Any, held: Any) -> Any:
        if isinstance(parameter, mx.array):
            return add_leaf(keys, parameter, held)
        if isinstance(parameter, dict) or (parameter is None and isinstance(held, dict)):
            if parameter is None and _is_leaf_state(held, slots):
                return add_leaf(keys, None, held)
            ours = parameter or {}
            theirs = held if isinstance(held, dict) else {}
            for key in ours:
                if not isinstance(key, str):
                    raise TypeError(
                        f"{'.'.join(map(str, keys)) or 'parameters'}: names should be strings, "
                        f"{key!r} was found"
                    )
            names = list(ours) + [key for key in theirs if key not in ours]
            return {key: merge(keys + (key,), ours.get(key), theirs.get(key)) for key in names}
        if isinstance(parameter, (list, tuple)) or isinstance(held, (list, tuple)):
            ours_list = list(parameter or ())
            held_list = list(held) if isinstance(held, (list, tuple)) else []
            length = max(len(ours_list), len(held_list))
            ours_list += [None] * (length - len(ours_list))
            held_list += [None] * (length - len(held_list))
            items = [merge(keys + (i,), ours_list[i], held_list[i]) for i in range(length)]
            is_tuple = isinstance(parameter if parameter is not None else held, tuple)
            return tuple(items) if is_tuple else items
        if parameter is None:
            return {}
        raise TypeError(
            f"{'.'.join(map(str, keys))}: a parameter should be an mlx.core.array, found "
            f"{type(parameter).__name__}"
        )

    if not isinstance(parameters, dict):
        raise TypeError(
            f"parameters should be a dict (or a module), {type(parameters).__name__} was provided"
        )
    for name in ("step", "learning_rate", FLAT_KEY):
        if name in parameters:
            raise ValueError(f"{name}: a top-level parameter can't have a name of the state's own")
    inner = {
        key: value
        for key, value in state.items()
        if key in parameters or (key not in ("step", "learning_rate") and _has_state(value, slots))
    }
    return merge((), parameters, inner), leaves, values


def _is_leaf_state(node: Any, slots: Sequence[str]) -> bool:
    return bool(node) and all(isinstance(node.get(slot), mx.array) for slot in slots)


def _has_state(node: Any, slots: Sequence[str]) -> bool:
    """Whether a subtree consists of leaves' state and nothing else."""
    if isinstance(node, dict):
        return _is_leaf_state(node, slots) or (
            bool(node) and all(_has_state(child, slots) for child in node.values())
        )
    if isinstance(node, (list, tuple)):
        return bool(node) and all(_has_state(child, slots) for child in node)
    return False
