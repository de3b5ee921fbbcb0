"""Where each leaf of a parameter tree lies in flat memory, as Python sees it."""

import json
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from .slots import BLOCK, Codes, StateForm, Storage, Values, num_blocks
from .walk import CONTAINERS, Keys, children

# Small enough that gradients are freed while the backward pass goes on: with 32 MiB the peak of a
# whole step is above that of mlx.optimizers, with 4 MiB below it. Large enough that the cost of a
# bucket, some 20 microseconds, does not count. In half precision it is half of this: MLX has the
# gradients of so many buckets at once, not of so many bytes.
BUCKET_BYTES = 4 << 20


class Segment(NamedTuple):
    """Where one parameter lies: elements ``[offset, offset + size)`` of flat array ``bucket``."""

    path: str
    bucket: int
    offset: int
    size: int
    shape: tuple[int, ...]
    dtype: mx.Dtype


class LeafSpec(NamedTuple):
    """A leaf of the tree: the keys that lead to it, what its parameter looks like, and how its
    state is stored, as the name of a dtype."""

    keys: Keys
    shape: tuple[int, ...]
    dtype: mx.Dtype
    state: str

    @property
    def path(self) -> str:
        return ".".join(map(str, self.keys))


class Layout:
    """A tree's structure and the place of its leaves in the buckets.

    ``skeleton`` is the tree with each leaf replaced by its number. ``text`` says all of it as JSON;
    it travels with the flat state, so that a state is complete wherever it goes.
    """

    def __init__(
        self,
        skeleton: dict[str, Any],
        leaves: Sequence[LeafSpec],
        form: StateForm,
        bucket_bytes: int,
    ):
        self.skeleton = skeleton
        self.leaves = list(leaves)
        self.form = form
        self.bucket_bytes = bucket_bytes
        self.engine = _ext.Layout(
            [leaf.path for leaf in self.leaves],
            [list(leaf.shape) for leaf in self.leaves],
            [leaf.dtype for leaf in self.leaves],
            [int(leaf.state == "int8") for leaf in self.leaves],
            bucket_bytes,
        )
        self.places = self.engine.segments
        self.bucket_blocks = self.engine.bucket_blocks
        # What lies in a bucket is stored alike.
        self.buckets: list[list[int]] = [[] for _ in self.bucket_blocks]
        for number, (bucket, _) in enumerate(self.places):
            self.buckets[bucket].append(number)
        self.text = json.dumps(
            {
                "slots": form.slots,
                "unsigned": form.unsigned,
                "state_dtype": form.state_dtype,
                "master_weight_bits": form.master_weight_bits,
                "ema": form.ema,
                "gradient_sum": form.gradient_sum,
                "bucket_bytes": bucket_bytes,
                "leaves": [(leaf.shape, name_of(leaf.dtype), leaf.state) for leaf in self.leaves],
                "tree": _to_tokens(skeleton),
            }
        )

    @classmethod
    def from_text(cls, text: str) -> "Layout":
        """Reads what ``text`` holds."""
        data = json.loads(text)
        skeleton = _from_tokens(data["tree"])
        keys = _keys_of_leaves(skeleton)
        leaves = [
            LeafSpec(keys[i], tuple(shape), getattr(mx, dtype), state)
            for i, (shape, dtype, state) in enumerate(data["leaves"])
        ]
        form = StateForm(
            tuple(data["slots"]),
            tuple(data["unsigned"]),
            data["state_dtype"],
            data["master_weight_bits"],
            ema=data["ema"],
            gradient_sum=data["gradient_sum"],
        )
        return cls(skeleton, leaves, form, data["bucket_bytes"])

    def in_form(self, form: StateForm) -> "Layout":
        """The same leaves in the same places, with another form."""
        return Layout(self.skeleton, self.leaves, form, self.bucket_bytes)

    def segments(self) -> list[Segment]:
        """The place of each leaf, in the order of the tree."""
        return [
            Segment(leaf.path, bucket, offset, prod(leaf.shape), leaf.shape, leaf.dtype)
            for leaf, (bucket, offset) in zip(self.leaves, self.places, strict=True)
        ]

    def slots_of(self, number: int) -> tuple[str, ...]:
        """The names of what the state has for a leaf."""
        return self.form.leaf_slots(self.leaves[number].dtype)

    def storage(self, slot: str, number: int) -> Storage | None:
        leaf = self.leaves[number]
        return self.form.storage(slot, leaf.state, leaf.dtype)

    def flat_shape(self, slot: str, bucket: int) -> tuple[int, int]:
        """Of one slot's flat array."""
        storage = self.storage(slot, self.buckets[bucket][0])
        return (self.bucket_blocks[bucket], storage.row) if storage else (0, 1)

    def leaf_view(self, slot: str, flat: Sequence[mx.array], number: int) -> Any:
        """What a user sees of a slot of leaf ``number``, from the slot's flat arrays."""
        bucket, offset = self.places[number]
        storage = self.storage(slot, number)
        assert storage is not None
        return storage.shown(flat[bucket], offset // BLOCK, self.leaves[number].shape)

    def leaf_rows(self, flat: Sequence[mx.array], number: int) -> mx.array:
        """The rows of one slot's flat arrays that are leaf ``number``."""
        bucket, offset = self.places[number]
        first = offset // BLOCK
        return flat[bucket][first : first + num_blocks(self.leaves[number].shape)]

    def leaf_floats(self, slot: str, flat: Sequence[mx.array], number: int) -> mx.array:
        """A slot of leaf ``number`` as floats, from the slot's flat arrays."""
        storage = self.storage(slot, number)
        assert isinstance(storage, (Values, Codes))
        bucket, offset = self.places[number]
        return storage.floats(flat[bucket], offset // BLOCK, self.leaves[number].shape)

    def write_leaf(self, slot: str, flat: list[mx.array], number: int, value: Any) -> None:
        """Replaces leaf ``number`` in one slot's flat arrays; None is zero."""
        self.write_rows(flat, number, self._rows(slot, number, value))

    def write_rows(self, flat: list[mx.array], number: int, new: mx.array) -> None:
        """Replaces the rows of leaf ``number`` in one slot's flat arrays."""
        bucket, offset = self.places[number]
        old = flat[bucket]
        if 0 < new.shape[0] < old.shape[0]:
            new = mx.slice_update(old, new, mx.array([offset // BLOCK]), [0])
        flat[bucket] = new if new.shape[0] else old

    def pack(self, slot: str, values: Sequence[Any]) -> list[mx.array]:
        """One slot's flat arrays from its leaves; a leaf of None starts at zero."""
        # Zeros are one element until a step writes them; evaluated mx.zeros take their full size.
        return [
            self._zeros(slot, bucket)
            if all(values[number] is None for number in numbers)
            else mx.concatenate([self._rows(slot, n, values[n]) for n in numbers])
            for bucket, numbers in enumerate(self.buckets)
        ]

    def _zeros(self, slot: str, bucket: int) -> mx.array:
        storage = self.storage(slot, self.buckets[bucket][0])
        dtype = storage.dtype if storage else mx.uint8
        return mx.broadcast_to(mx.array(0, dtype), self.flat_shape(slot, bucket))

    def _rows(self, slot: str, number: int, value: Any) -> mx.array:
        storage = self.storage(slot, number)
        if storage is None:
            return mx.zeros((0, 1), mx.uint8)
        if value is None:
            return mx.zeros((num_blocks(self.leaves[number].shape), storage.row), storage.dtype)
        return storage.rows(value)


def single_step(
    parameter: mx.array,
    gradient: mx.array,
    rule: _ext.Rule,
    schedule: _ext.PlainSchedule | None,
    state: Sequence[mx.array],
    step: mx.array,
    learning_rate: mx.array | None,
    settings: _ext.StepSettings,
) -> tuple[mx.array, tuple[mx.array, ...], mx.array, mx.array]:
    """A step of one array by itself: a tree of one leaf, whose state is as long as it likes."""
    layout = _ext.Layout(["parameter"], [parameter.shape], [parameter.dtype], [0], 0)
    trees = ({"parameter": 0}, {"parameter": gradient}, {"parameter": parameter})
    buckets = [[array] for array in state]
    scalars = {"step": step}
    if learning_rate is not None:
        scalars["learning_rate"] = learning_rate
    result: Any = _ext.step(layout, *trees, rule, schedule, buckets, scalars, settings)
    updated, new_state, scalars = result
    arrays = tuple(array for (array,) in new_state)
    return updated["parameter"], arrays, scalars["step"], scalars["learning_rate"]


def name_of(dtype: mx.Dtype) -> str:
    """A dtype's name as C++ prints it: "float32"."""
    return str(dtype).rsplit(".", 1)[-1]


def unsupported(what: str, dtype: mx.Dtype, advice: str = "") -> TypeError:
    """The error for an array that is stored in another dtype than those in FLOATING."""
    return TypeError(
        f"{what} has dtype {name_of(dtype)}; float32, float16 and bfloat16 are supported{advice}"
    )


def _to_tokens(skeleton: Any) -> list[Any]:
    """A skeleton from the root, each container as its names or its length before what it holds.

    Without nesting: JSON is read and written by functions that call themselves.
    """
    tokens: list[Any] = []
    todo = [skeleton]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            tokens.append({"dict": list(node)})
            todo += reversed(node.values())
        elif isinstance(node, (list, tuple)):
            tokens.append({type(node).__name__: len(node)})
            todo += reversed(node)
        else:
            tokens.append(node)
    return tokens


def _from_tokens(tokens: Sequence[Any]) -> Any:
    made: list[Any] = []
    for token in reversed(tokens):
        if isinstance(token, int):
            made.append(token)
            continue
        ((kind, shape),) = token.items()
        items = [made.pop() for _ in range(len(shape) if kind == "dict" else shape)]
        if kind == "dict":
            made.append(dict(zip(shape, items, strict=True)))
        else:
            made.append(items if kind == "list" else tuple(items))
    (skeleton,) = made
    return skeleton


def _keys_of_leaves(skeleton: Any) -> dict[int, Keys]:
    found: dict[int, Keys] = {}
    todo: list[tuple[Keys, Any]] = [((), skeleton)]
    for keys, node in todo:
        if isinstance(node, CONTAINERS):
            todo += [((*keys, key), child) for key, child in children(node)]
        else:
            found[node] = keys
    return found
