"""Where each leaf of a parameter tree lies in flat memory, as Python sees it."""

import json
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from .walk import CONTAINERS, Keys, children

# Small enough that gradients are freed while the backward pass goes on: with 32 MiB the peak of a
# whole step is above that of mlx.optimizers, with 4 MiB below it. Large enough that the cost of a
# bucket, some 20 microseconds, does not count.
BUCKET_BYTES = 4 << 20

# A segment starts on a boundary of so many elements, and a flat array has rows of them.
BLOCK = 64

FLOATING = (mx.float32, mx.float16, mx.bfloat16)


class Segment(NamedTuple):
    """Where one parameter lies: elements ``[offset, offset + size)`` of flat array ``bucket``."""

    path: str
    bucket: int
    offset: int
    size: int
    shape: tuple[int, ...]
    dtype: mx.Dtype


class LeafSpec(NamedTuple):
    """A leaf of the tree: the keys that lead to it, and what its parameter looks like."""

    keys: Keys
    shape: tuple[int, ...]
    dtype: mx.Dtype

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
        slots: Sequence[str],
        bucket_bytes: int,
    ):
        self.skeleton = skeleton
        self.leaves = list(leaves)
        self.slots = tuple(slots)
        self.engine = _ext.Layout(
            [leaf.path for leaf in self.leaves],
            [list(leaf.shape) for leaf in self.leaves],
            [leaf.dtype for leaf in self.leaves],
            bucket_bytes,
        )
        self.places = self.engine.segments
        self.bucket_shapes = [(blocks, BLOCK) for blocks in self.engine.bucket_blocks]
        self.text = json.dumps(
            {
                "slots": self.slots,
                "bucket_bytes": bucket_bytes,
                "leaves": [(leaf.shape, name_of(leaf.dtype)) for leaf in self.leaves],
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
            LeafSpec(keys[i], tuple(shape), getattr(mx, dtype))
            for i, (shape, dtype) in enumerate(data["leaves"])
        ]
        return cls(skeleton, leaves, data["slots"], data["bucket_bytes"])

    def segments(self) -> list[Segment]:
        """The place of each leaf, in the order of the tree."""
        return [
            Segment(leaf.path, bucket, offset, prod(leaf.shape), leaf.shape, leaf.dtype)
            for leaf, (bucket, offset) in zip(self.leaves, self.places, strict=True)
        ]

    def leaf_view(self, flat: Sequence[mx.array], number: int) -> mx.array:
        """Leaf ``number`` of one slot's flat arrays, sharing their memory."""
        bucket, offset = self.places[number]
        return _ext.views(flat[bucket], [(list(self.leaves[number].shape), offset)])[0]

    def write_leaf(self, flat: list[mx.array], number: int, value: mx.array | None) -> None:
        """Replaces leaf ``number`` in one slot's flat arrays; None is zero."""
        bucket, offset = self.places[number]
        old = flat[bucket]
        new = self._in_blocks(value, number, old.dtype)
        if 0 < new.shape[0] < old.shape[0]:
            new = mx.slice_update(old, new, mx.array([offset // BLOCK]), [0])
        flat[bucket] = new if new.shape[0] else old

    def pack(self, values: Sequence[Any], dtype: mx.Dtype) -> list[mx.array]:
        """One slot's flat arrays from its leaves; a leaf of None starts at zero."""
        by_bucket: list[list[int]] = [[] for _ in self.bucket_shapes]
        for number, (bucket, _) in enumerate(self.places):
            by_bucket[bucket].append(number)
        # Zeros are one element until a step writes them; evaluated mx.zeros take their full size.
        return [
            mx.broadcast_to(mx.array(0, dtype), shape)
            if all(values[number] is None for number in numbers)
            else mx.concatenate([self._in_blocks(values[n], n, dtype) for n in numbers])
            for shape, numbers in zip(self.bucket_shapes, by_bucket, strict=True)
        ]

    def _in_blocks(self, value: mx.array | None, number: int, dtype: mx.Dtype) -> mx.array:
        if value is None:
            return mx.zeros((-(-prod(self.leaves[number].shape) // BLOCK), BLOCK), dtype)
        return in_blocks(value.astype(dtype))


def single_step(
    parameter: mx.array,
    gradient: mx.array,
    rule: _ext.Rule,
    schedule: _ext.PlainSchedule | None,
    state: Sequence[mx.array],
    step: mx.array,
    learning_rate: mx.array | None,
) -> tuple[mx.array, tuple[mx.array, ...], mx.array, mx.array | None]:
    """A step of one array by itself: a tree of one leaf, whose state is as long as it likes."""
    layout = _ext.Layout(["parameter"], [parameter.shape], [parameter.dtype], 0)
    trees = ({"parameter": 0}, {"parameter": gradient}, {"parameter": parameter})
    buckets = [[array] for array in state]
    result: Any = _ext.step(layout, *trees, rule, schedule, buckets, step, learning_rate)
    updated, new_state, next_step, scheduled = result
    return updated["parameter"], tuple(array for (array,) in new_state), next_step, scheduled


def in_blocks(value: mx.array) -> mx.array:
    """The elements of an array, padded with zeros, as rows of a flat array.

    A dimension is an int32, so a large array must not become one-dimensional on the way.
    """
    rest = value.size % BLOCK
    if rest == 0:
        return value.reshape(value.size // BLOCK, BLOCK)
    return mx.pad(value.reshape(-1), (0, BLOCK - rest)).reshape(-1, BLOCK)


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
