"""The optimizer's state: flat arrays underneath, MLX's tree in the hand.

``State`` is a dict whose storage and whose interface differ on purpose. Its storage, which is what
MLX's C++ tree walkers (``mx.eval``, ``mx.compile``) see, holds ``step``, ``learning_rate`` and,
under one reserved key, the flat arrays with their layout. Its Python interface shows the tree that
``mlx.optimizers`` has, with leaves made as views of the flat arrays when somebody asks. Assigning
to a leaf writes its segment.

Until the optimizer is initialised, and after a user has set a tree of their own, there are no flat
arrays: storage and interface are then the same, those of a plain dict.
"""

from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

import mlx.core as mx

from . import _ext
from .checks import SCALARS
from .layout import BUCKET_BYTES, Layout
from .live import LiveMapping
from .slots import GRADIENT_SUM, HALVES, StateForm
from .state_nodes import Node, assign, node_at, refill
from .trees import FLAT_KEY, merge_trees
from .walk import CONTAINERS, check_depth, children, plain

LAYOUT_KEY = "layout"


class State(LiveMapping):
    """The ``state`` of a flatstep optimizer; use it as the dict that ``mlx.optimizers`` has."""

    # The layout that the reserved entry's text describes, read once.
    _known_layout: Layout | None = None
    replaced = 0  # how often an assignment has replaced something

    def __init__(self, *items: Any):
        dict.__init__(self, *items)
        # The leaves whose storage a trace may return.
        self.filled: WeakValueDictionary[int, Any] = WeakValueDictionary()

    @classmethod
    def adopt(cls, value: Any) -> Any:
        """A state from anything that a user may set: a ``State`` itself, a tree of MLX, or the
        plain dict with the reserved key that a compiled function returns."""
        if isinstance(value, cls) or not isinstance(value, dict):
            return value
        _check_tree(value)
        state = cls({key: _normal(key, item) for key, item in value.items()})
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

    def flat(self) -> dict[str, list[mx.array]]:
        """The flat arrays of all slots, in the engine's order."""
        assert self.layout is not None
        return {slot: self.flat_arrays(slot) for slot in self.layout.form.flat_slots}

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
        refill(self)

    def in_form(self, form: StateForm) -> "State":
        """This state itself, or a copy of it as an optimizer with this form would keep it."""
        layout = self.layout
        form = form._replace(full_precision=None)
        if layout is None or layout.form == form:
            return self
        has_other_sums = layout.form.gradient_sum and form.gradient_sum
        if not has_other_sums and layout.form._replace(gradient_sum=form.gradient_sum) == form:
            return self.with_sums(form.gradient_sum)
        if layout.form.master_weight_bits != form.master_weight_bits:
            raise ValueError(
                f"state with master_weight_bits={layout.form.master_weight_bits} was set on an "
                f"optimizer with master_weight_bits={form.master_weight_bits}; set what "
                "dequantized_state() gives, and the weights with set_master_weights"
            )
        if form.ema and not layout.form.ema:
            return State(plain(self))  # the next step has the weights that the average starts from
        state = State(dict.items(self))
        state.commit(*self.make_flat({}, form), {})
        return state

    def has_sums(self) -> bool:
        """Whether it has sums of gradients; without a layout, whether any leaf has."""
        if self.layout is not None:
            return self.layout.form.gradient_sum is not None
        todo: list[Any] = [dict(dict.items(self))]
        for node in todo:
            if isinstance(node, dict) and GRADIENT_SUM in node:
                return True
            if isinstance(node, CONTAINERS):
                todo += [child for _, child in children(node)]
        return False

    def with_sums(self, dtype: str | None) -> "State":
        """A copy that has sums of gradients in this dtype, of none yet, or no sums."""
        layout = self.layout
        assert layout is not None
        layout = layout.in_form(layout.form._replace(gradient_sum=dtype))
        flat = {
            slot: self.flat_arrays(slot) for slot in layout.form.flat_slots if slot != GRADIENT_SUM
        }
        if dtype:
            flat[GRADIENT_SUM] = layout.pack(GRADIENT_SUM, [None] * len(layout.leaves))
        state = State(dict.items(self))
        state.commit(layout, flat, {})
        return state

    def make_flat(
        self, parameters: Any, form: StateForm
    ) -> tuple[Layout, dict[str, list[mx.array]]]:
        """The layout and flat arrays for `parameters` and all leaves that the state has already.

        Nothing is changed: the caller hands the result to ``commit``.
        """
        skeleton, leaves, values = merge_trees(self, parameters, form, self.layout)
        has_halves = any(leaf.dtype in HALVES for leaf in leaves)
        # As its text has it: the leaves say what `full_precision` said of them.
        form = form._replace(full_precision=None)
        layout = Layout(skeleton, leaves, form, BUCKET_BYTES // (2 if has_halves else 1))
        return layout, {
            slot: layout.pack(slot, [value.get(slot) for value in values])
            for slot in form.flat_slots
        }

    # ---- The dict that users see ----

    def _skeleton(self) -> dict[Any, Any]:
        layout = self.layout
        return layout.skeleton if layout else {}

    def _write(self, items: dict[Any, Any]) -> None:
        skeleton = self._skeleton()
        inner = {key: value for key, value in items.items() if key in skeleton}
        outer = {key: _checked(key, value) for key, value in items.items() if key not in skeleton}
        if inner:
            assign(self, (), skeleton, inner)
        dict.update(self, outer)

    def __getitem__(self, key: Any) -> Any:
        layout = self.layout
        if layout is not None and key in layout.skeleton:
            return node_at(self, layout, (key,), layout.skeleton[key])
        if key == FLAT_KEY:
            raise KeyError(key)
        return dict.__getitem__(self, key)

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        if dict.__contains__(self, key):
            dict.__delitem__(self, key)
            return
        # No flat arrays can leave a leaf out: go back to a plain tree, as before `init`.
        tree = plain(self)
        del tree[key]
        dict.clear(self)
        dict.update(self, tree)

    def __contains__(self, key: object) -> bool:
        return (dict.__contains__(self, key) and key != FLAT_KEY) or key in self._skeleton()

    def __iter__(self) -> Iterator[Any]:
        own: list[Any] = [*dict.__iter__(self)]
        own = [key for key in own if key != FLAT_KEY]
        return iter([*own, *self._skeleton()])

    def __len__(self) -> int:
        return dict.__len__(self) - dict.__contains__(self, FLAT_KEY) + len(self._skeleton())

    def __reduce__(self) -> tuple[Any, ...]:
        storage: dict[Any, Any] = dict(dict.items(self))
        if FLAT_KEY in storage:
            storage[FLAT_KEY] = _copied(storage[FLAT_KEY])
        return State.adopt, (storage,)

    def pop(self, key: Any, *default: Any) -> Any:
        if key not in self and default:
            return default[0]
        value = plain(self[key])
        del self[key]
        return value


def _checked(key: Any, value: Any) -> Any:
    """``step``, ``learning_rate`` and the like as the kernels read them; others as they are."""
    if key == FLAT_KEY:
        raise ValueError(
            f"{FLAT_KEY!r} is the flat state itself; assign the whole dict to optimizer.state"
        )
    if key in SCALARS:
        return SCALARS[key](value)
    _check_tree({key: value})
    return _owned(value)


def _normal(key: Any, value: Any) -> Any:
    """An entry of a whole state: step and rate are looked at when a step reads them."""
    is_checked = key in SCALARS and key not in ("step", "learning_rate")
    return SCALARS[key](value) if is_checked else _owned(value)


def _owned(value: Any) -> Any:
    """An entry of a plain state: of a part of another state, which lives on with that, a copy."""
    return plain(value) if isinstance(value, Node) else value


def _check_tree(tree: Any) -> None:
    # A level more than parameters have: a leaf's state is a dict.
    check_depth("state", tree, _ext.MAX_TREE_DEPTH + 1)


def _copied(flat: dict[str, Any]) -> dict[str, Any]:
    """A reserved entry of its own: to write a leaf into one leaves the other as it was."""
    return {key: item if key == LAYOUT_KEY else list(item) for key, item in flat.items()}


def _checked_flat(flat: Any) -> Layout:
    """The layout of a reserved entry. Raises ValueError when that is none that flatstep made."""
    try:
        layout = Layout.from_text(flat[LAYOUT_KEY])
        for slot in layout.form.flat_slots:
            shapes = [tuple(array.shape) for array in flat[slot]]
            if shapes != [layout.flat_shape(slot, b) for b in range(len(layout.buckets))]:
                raise ValueError(f"{slot} has arrays of shapes {shapes}")
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the state's entry {FLAT_KEY!r} is not what an optimizer of flatstep returned: {error}"
        ) from error
    return layout
