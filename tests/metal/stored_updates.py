"""Updates of state in codes and of parameters in two parts or rounded by chance, held to the CPU
backend bit for bit."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import arguments as args
import kernel_text
import mlx.core as mx
import numpy as np
from cases import Case, random_values
from flatstep import _ext
from numpy.typing import NDArray
from simulator import guarded_array
from updates import BLOCK, FLOAT, Leaf, Type, Update, make_leaf, rule_of

KEEP_8, KEEP_16 = _ext.Rounding.KEEP_8_BITS, _ext.Rounding.KEEP_16_BITS
STOCHASTIC, NEAREST = _ext.Rounding.STOCHASTIC, _ext.Rounding.NEAREST

HELD_BLOCKS = "u1"
# Not a byte that lies in a gap between blocks is to change.
CANARY_BYTE = 0xC6


class Storages(NamedTuple):
    """Of the parameters, and whether the state is in codes."""

    p: Type
    rounding: _ext.Rounding
    has_codes: bool

    def __str__(self) -> str:
        return f"{self.p.name}-{'codes' if self.has_codes else 'float32'}"

    def kernel(self, rule: str, has_tiles: bool = True) -> str:
        codes = kernel_text.code_storages(rule)
        state = codes if self.has_codes else ["Float32"] * len(codes)
        return kernel_text.update(rule, has_tiles, [self.p.name, *state])


def _storages(name: str, rounding: _ext.Rounding, has_codes: bool) -> Storages:
    dtype = mx.bfloat16 if "Bfloat16" in name else mx.float16
    return Storages(Type(name, "u2" if dtype == mx.bfloat16 else "f2", dtype), rounding, has_codes)


ROUNDINGS = {"16And8": KEEP_8, "16And16": KEEP_16}
STORED = [
    Storages(FLOAT, NEAREST, True),
    _storages("Bfloat16", NEAREST, True),
    *[
        _storages(name, ROUNDINGS.get(name.partition("loat")[2], STOCHASTIC), has_codes)
        for name in kernel_text.PARAMETER_STORAGES
        for has_codes in (False, True)
    ],
]


class StoredUpdate(Update):
    """Arrays that lie as those of a layout whose first leaf gets no gradient, in bucket 1.

    The layout's bucket 0 has a leaf of another dtype.
    """

    BUCKET = 1
    UNTOUCHED = BLOCK + 6  # so the leaves' state starts in the third block

    def __init__(
        self,
        case: Case,
        leaves: Sequence[Leaf],
        storages: Storages,
        *,
        step: int = 3,
        seed: int = 0,
        rng_seed: int = 0,
    ) -> None:
        super().__init__(case, leaves, [storages.p, FLOAT], step=step, seed=rng_seed)
        self.storages, self.seed = storages, seed
        rng = np.random.default_rng(rng_seed)
        self.has_rests = storages.rounding in (KEEP_8, KEEP_16)
        if storages.has_codes:
            self.state = [
                self._blocks(
                    [
                        np.array(_ext.store_codes(mx.array(values), slot != "v"))
                        for values in self._values(rng, slot == "v")
                    ]
                )
                for slot in self.slots
            ]
        if self.has_rests:
            rests = []
            for values, leaf, at in zip(self._values(rng), leaves, self.p_offsets, strict=True):
                p, rest = _ext.store_split(mx.array(values), storages.p.dtype, storages.rounding)
                held = np.array(p.view(mx.uint16)).view(storages.p.held)
                self.p_in[at : at + leaf.size] = held.reshape(-1)[: leaf.size]
                rests.append(np.array(rest))
            self.state.append(self._blocks(rests))
        self.before = [array.copy() for array in (self.p_in, *self.state)]

    def _values(self, rng: np.random.Generator, positive: bool = False) -> list[NDArray[Any]]:
        """Of each leaf, in blocks."""
        result = []
        for leaf in self.leaves:
            values = np.zeros((-(-leaf.size // BLOCK), BLOCK), np.float32)
            random = random_values(leaf.size, rng)
            values.reshape(-1)[: leaf.size] = np.abs(random) if positive else random
            result.append(values)
        return result

    def _blocks(self, of_leaves: list[NDArray[Any]]) -> NDArray[Any]:
        bytes_of_block = of_leaves[0].shape[1]
        first = self.state_offsets[0] // BLOCK
        blocks = guarded_array(
            (first + sum(map(len, of_leaves))) * bytes_of_block, HELD_BLOCKS, at="start"
        ).reshape(-1, bytes_of_block)
        blocks[:first] = CANARY_BYTE
        blocks[first:] = np.concatenate(of_leaves)
        return blocks

    def _ranges(self, offsets: list[int], flat: NDArray[Any]) -> list[tuple[int, int]]:
        if flat.ndim == 1:
            return super()._ranges(offsets, flat)
        return [
            (at // BLOCK * flat.shape[1], -(-(at + leaf.size) // BLOCK) * flat.shape[1])
            for at, leaf in zip(offsets, self.leaves, strict=True)
        ]

    def indices(self) -> list[int]:
        indices = super().indices()
        return [*indices[:-1], args.RESTS] if self.has_rests else indices

    def kernel(self, rule: str = "", has_tiles: bool = True) -> str:
        return self.storages.kernel(rule or self.rules[0].type, has_tiles)

    def forget_rests(self, leaf: int) -> None:
        """Puts a parameter where the rests are those of another."""
        at = self.p_offsets[leaf] + self.leaves[leaf].size // 2
        self.p_in[at] = self.p_in[at] * 0 if self.storages.p.held == "f2" else 0x3F80

    def run_and_check(self, library: Any, **options: Any) -> None:
        """One step by the kernels and by the CPU backend; its result is the next one's input."""
        expected = self._on_cpu()
        self.run(library, seed=self.seed, **options)
        for leaf, at, p in zip(self.leaves, self.p_offsets, expected[0], strict=True):
            bits = self.p_out[at : at + leaf.size].view(f"u{self.p_out.itemsize}")
            np.testing.assert_array_equal(bits, p)
        for k, (array, new) in enumerate(zip(self.state, expected[1], strict=True)):
            if array.ndim == 2:
                np.testing.assert_array_equal(array, new, err_msg=f"state {k}")
                continue
            for leaf, at in zip(self.leaves, self.state_offsets, strict=True):
                part = slice(at, at + leaf.size)
                np.testing.assert_array_equal(array[part], new.reshape(-1)[part])
        self.check_gaps()

    def check_gaps(self) -> None:
        blocks = [array for array in self.state if array.ndim == 2]
        plain = [array for array in self.state if array.ndim == 1]
        self.state = plain
        super().check_gaps()
        self.state = [*plain, *blocks]
        for array in blocks:
            assert (array[: self.state_offsets[0] // BLOCK] == CANARY_BYTE).all()

    def _on_cpu(self) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
        """The bits of each leaf's parameters, and the state."""
        dtype = self.storages.p.dtype
        paths = ["other", "untouched", *map(str, range(len(self.leaves)))]
        other = mx.float32 if dtype != mx.float32 else mx.float16
        shapes = [(1,), (self.UNTOUCHED,), *[leaf.shape for leaf in self.leaves]]
        dtypes = [other, *[dtype] * (1 + len(self.leaves))]
        layout = _ext.Layout(paths, shapes, dtypes, [0] * len(paths), 1 << 40)
        assert [at for bucket, at in layout.segments if bucket == self.BUCKET] == [
            0,
            *self.state_offsets,
        ]
        gradients, parameters = {}, {}
        for number, (leaf, at) in enumerate(zip(self.leaves, self.p_offsets, strict=True)):
            gradients[str(number)] = mx.array(leaf.values.astype(np.float32)).reshape(leaf.shape)
            stored = self.storages.p.to_mx(self.p_in[at : at + leaf.size])
            parameters[str(number)] = stored.reshape(leaf.shape)
        empty = mx.zeros((1, BLOCK))
        state = []
        for array in self.state:
            shape = (-1, BLOCK) if array.ndim == 1 else array.shape
            state.append([empty, mx.array(array.reshape(shape))])
        result = _ext.step(
            layout,
            {path: number for number, path in enumerate(paths)},
            gradients,
            parameters,
            rule_of(self.cases[0]),
            None,
            state,
            {
                "step": mx.array(self.step, mx.uint64),
                "learning_rate": mx.array(self.learning_rate, mx.float32),
            },
            _ext.StepSettings(self.storages.rounding, self.seed),
        )
        assert result is not None
        updated: Any = result[0]
        bits = mx.uint32 if dtype == mx.float32 else mx.uint16
        leaves = [updated[str(n)].reshape(-1).view(bits) for n in range(len(self.leaves))]
        return [np.array(leaf) for leaf in leaves], [np.array(lists[1]) for lists in result[1]]


def stored_leaves(rng: np.random.Generator) -> list[Leaf]:
    """Of each layout, and of sizes about those of blocks."""
    return [
        make_leaf("aligned", (1,), FLOAT, rng),
        make_leaf("unaligned", (63,), FLOAT, rng),
        make_leaf("transposed", (37, 128), FLOAT, rng),
        make_leaf("aligned", (64,), FLOAT, rng),
        make_leaf("sliced", (5, 13), FLOAT, rng),
        make_leaf("aligned", (4097,), FLOAT, rng),
        make_leaf("broadcast", (131,), FLOAT, rng),
        make_leaf("transposed", (2, 3, 64), FLOAT, rng),
        strided(make_leaf("transposed", (40, 70), FLOAT, rng)),
        make_leaf("unaligned", (65,), FLOAT, rng),
    ]


def strided(leaf: Leaf) -> Leaf:
    """As the host has a transposed leaf whose rows end within blocks."""
    leaf.layout = args.STRIDED
    return leaf


ADAMW = Case("AdamW", {"weight_decay": 0.1, "bias_correction": True})
MOMENTUM = Case("SGD", {"momentum": 0.9, "weight_decay": 0.1})
# What the test of the tests runs.
FEW = [
    (ADAMW, next(s for s in STORED if str(s) == "Bfloat16And8-codes")),
    (MOMENTUM, next(s for s in STORED if str(s) == "Float16And16-codes")),
]


def check_stored(library: Any, case: Case, storages: Storages, **options: Any) -> None:
    """Several steps, the second with parameters of which some are not the rests' any more."""
    rng = np.random.default_rng(31)
    leaves = stored_leaves(rng)
    update = StoredUpdate(case, leaves, storages, seed=41)
    for step in range(3):
        if step == 1:
            update.forget_rests(5)
        update.run_and_check(library, **options)
        update.p_in[:] = update.p_out
        update.step += 1
        for leaf in leaves:
            values = random_values(leaf.memory.size, rng)
            leaf.memory[:] = leaf.type.encode(values)


def check_blocks_copy(library: Any) -> None:
    rng = np.random.default_rng(34)
    for word, stride in (("uint32_t", 1), ("uint8_t", 1), ("uint8_t", 0)):
        blocks = rng.integers(0, 256, 68 * 37, np.uint8)
        blocks[:68] = 0xFF  # a float that is NaN
        target = np.zeros_like(blocks)
        size = blocks.nbytes // np.dtype(word.removesuffix("_t")).itemsize
        arguments = np.array([(size, stride)], args.COPY_ARGUMENTS)
        source = blocks if stride else blocks[:1].copy()
        buffers = {0: source, 1: target, 2: arguments}
        library.run(f"copy, {word}", grid=(100,), threads=(32,), buffers=buffers)
        np.testing.assert_array_equal(target, blocks if stride else np.full_like(blocks, 0xFF))
