"""What an update does besides its rule, held to float64: gradients that are scaled and clipped,
steps that are not taken, sums of gradients, and averages. The tests of the kernels run it, and
those of the mistakes in them."""

from collections.abc import Mapping, Sequence
from typing import Any

import arguments as args
import kernel_text
import mlx.core as mx
import numpy as np
import reference
from advances import pass_of
from block_reference import random_bits, rounding_keys
from cases import Case
from flatstep import _ext
from flatstep.diagnosis.formulas import PARAMETER_ULPS
from numpy.typing import NDArray
from updates import BFLOAT, CANARY, FLOAT, HALF, TYPES, Leaf, Type, Update, make_leaf

# As tests/pass_reference.py has it: that of the rule and of a gradient that was multiplied.
ULPS = PARAMETER_ULPS + 12
# Where bits are few, averages and sums are rounded by chance.
CHANCE = Type("StochasticBfloat16", "u2", mx.bfloat16)
KEYED = Type("Keyed", "u4", mx.uint32)
AVERAGES = [FLOAT, CHANCE]

ADAMW = Case("AdamW", {"weight_decay": 0.1, "bias_correction": True})
SGD = Case("SGD", {"weight_decay": 0.1})
CLIPPING: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "scale": ({}, {"grad_scale": 0.3}),
    "value": ({"clip_value": 0.5}, {}),
    "norm": ({"has_norm": 1, "max_grad_norm": 2.0}, {"sum_of_squares": 9.0}),
    "a norm that is less": ({"has_norm": 1, "max_grad_norm": 3.0}, {"sum_of_squares": 1.0}),
    "all": (
        {"has_norm": 1, "max_grad_norm": 2.0, "clip_value": 0.25},
        {"grad_scale": 0.3, "sum_of_squares": 9.0},
    ),
}


class PassUpdate(Update):
    """An update that may keep an average, and take its gradients from their sums."""

    def __init__(
        self,
        case: Case | Sequence[Case],
        leaves: Sequence[Leaf],
        types: Sequence[Type],
        *,
        average: Type | None = None,
        sums: Type | None = None,
        settings: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(case, leaves, types, settings=args.settings(**(settings or {})), **options)
        rng = np.random.default_rng(1)
        self.average_type, self.sums_type = average, sums
        self.gradients = [leaf.values for leaf in leaves]
        self.average = self._flat(average, self.state_offsets, rng) if average else None
        self.sums = self._flat(sums, self.state_offsets, rng) if sums else None
        if sums and self.sums is not None:
            for number, at in enumerate(self.state_offsets):
                part = self.sums[at : at + leaves[number].size]
                self.gradients[number] = sums.decode(part.copy())
        self.average_before = None if self.average is None else self.average.copy()
        self.sums_before = None if self.sums is None else self.sums.copy()

    def sources(self) -> tuple[list[NDArray[Any]], list[tuple[int, int]]]:
        if self.sums is None:
            return super().sources()
        size = self.sums.itemsize
        return [], [(args.SUM_AS_SOURCE, at * size) for at in self.state_offsets]

    def spoil_average(self) -> None:
        """What an average was before it starts."""
        if self.average is not None and self.average_type is not None:
            at = self.state_offsets[0] + 3
            self.average[at : at + 2] = self.average_type.encode(np.array([np.inf, np.nan]))
            self.average_before = self.average.copy()

    def more_buffers(self) -> dict[int, NDArray[Any]]:
        of_index = {args.EMA: self.average, args.ACCUMULATED: self.sums}
        return {index: array for index, array in of_index.items() if array is not None}

    def source_type(self, leaf: Leaf) -> Type:
        return self.sums_type or leaf.type

    def kernel(self, rule: str = "", has_tiles: bool = True) -> str:
        ema = self.average_type.name if self.average_type else "Absent"
        names = [stored.name for stored in self.types]
        return kernel_text.update(rule or self.rules[0].type, has_tiles, names, ema)

    def used(self, constants: args.Struct, g: NDArray[np.float64]) -> NDArray[np.float64]:
        limit = float(self.settings["clip_value"])
        return np.clip(g * constants["grad_scale"], -limit, limit) * constants["clip_factor"]

    def check_pass(self, library: Any) -> None:
        """After `run` with seed 0: what the constants' action says, and no gap is written."""
        constants = pass_of(self.constants(library, 0))
        if constants["action"] == args.UPDATE:
            self._check_update(constants)
        else:
            self._check_kept()
        if self.sums is not None and self.sums_before is not None:
            is_kept = constants["action"] == args.HOLD
            for leaf, at in zip(self.leaves, self.state_offsets, strict=True):
                part = slice(at, at + leaf.size)
                np.testing.assert_array_equal(self.sums[part], self.sums_before[part] * is_kept)
        self.check_gaps()
        for array in self.more_buffers().values():
            self._check_gaps_of(array)

    def _check_gaps_of(self, flat: NDArray[Any]) -> None:
        gap = np.ones(flat.size, bool)
        for leaf, at in zip(self.leaves, self.state_offsets, strict=True):
            gap[at : at + leaf.size] = False
        assert (flat[gap] == CANARY[flat.dtype.str[1:]]).all(), "a gap was written"

    def _check_update(self, constants: args.Struct) -> None:
        for number, leaf in enumerate(self.leaves):
            case = self.cases[number % len(self.cases)]
            arrays = {slot: np.zeros(leaf.size) for slot in case.slots}
            arrays["g"] = self.used(constants, self.gradients[number])
            places = list(zip(("p", *self.slots), self.types, self.places(number), strict=True))
            for (slot, stored, (_, at)), before in zip(places, self.before, strict=True):
                arrays[slot] = stored.decode(before[at : at + leaf.size])
            terms = reference.RULES[case.rule](
                arrays, self.learning_rate, self.step + 1, **case.arguments
            )
            for slot, stored, (after, at) in places:
                result = stored.to_mx(after[at : at + leaf.size])
                reference.assert_sum(result, terms[slot], ULPS)
            self._check_average(constants, number, terms["p"])

    def _check_average(self, constants: args.Struct, number: int, p: reference.Terms) -> None:
        if self.average is None or self.average_before is None or self.average_type is None:
            return
        at, size = self.state_offsets[number], self.leaves[number].size
        stored, part = self.average_type, slice(at, at + size)
        before = stored.decode(self.average_before[part])
        decay, weight = float(constants["ema_decay"]), float(constants["ema_weight"])
        if weight == 0:
            np.testing.assert_array_equal(self.average[part], self.average_before[part])
            return
        terms = [weight * term for term in p]
        if decay != 0:
            terms.append(decay * before)
        expected = np.sum(terms, axis=0)
        largest = np.max(np.abs([np.broadcast_to(term, size) for term in terms]), axis=0)
        allowed = ULPS * np.spacing(largest.astype(np.float32)).astype(np.float64)
        if stored == CHANCE:
            allowed += 2.0**-7 * np.abs(expected)
        assert (np.abs(stored.decode(self.average[part]) - expected) <= allowed).all()

    def _check_kept(self) -> None:
        """Bit for bit, parameters that are copied too."""
        for leaf, at in zip(self.leaves, self.p_offsets, strict=True):
            part = slice(at, at + leaf.size)
            np.testing.assert_array_equal(self.p_out[part], self.p_in[part])
        for array, before in zip(self.state, self.before[1:], strict=True):
            np.testing.assert_array_equal(array, before)
        if self.average is not None:
            np.testing.assert_array_equal(self.average, self.average_before)


def pass_leaves(rng: np.random.Generator) -> list[Leaf]:
    return [
        make_leaf("aligned", (4097,), FLOAT, rng),
        make_leaf("transposed", (37, 70), HALF, rng),
        make_leaf("unaligned", (65,), BFLOAT, rng),
        make_leaf("sliced", (5, 7), FLOAT, rng),
        make_leaf("transposed", (2, 64, 64), FLOAT, rng),
        make_leaf("broadcast", (131,), HALF, rng),
        make_leaf("aligned", (64,), FLOAT, rng),
        make_leaf("aligned", (1,), FLOAT, rng),
    ]


def sum_leaves(rng: np.random.Generator, stored: Type) -> list[Leaf]:
    return [make_leaf("aligned", (n,), stored, rng) for n in (4097, 1, 63, 64, 2050, 65)]


def check_clipping(library: Any) -> None:
    rng = np.random.default_rng(51)
    for settings, scalars in CLIPPING.values():
        for case, types in ((ADAMW, [FLOAT]), (SGD, [BFLOAT])):
            update = PassUpdate(case, pass_leaves(rng), types, settings=settings, scalars=scalars)
            update.run(library, passes=2, order="shuffled")
            update.check_pass(library)


SKIPPING = {"has_norm": 1, "skips_nonfinite": 1, "max_grad_norm": 1.0, "ema": 0.9}
NOT_TAKEN: list[tuple[dict[str, Any], dict[str, float]]] = [
    (SKIPPING, {"sum_of_squares": np.nan}),
    (SKIPPING, {"sum_of_squares": np.inf}),
    ({"accumulate_steps": 4}, {"accumulated": 3}),
    ({**SKIPPING, "accumulate_steps": 4}, {"accumulated": 3, "sum_of_squares": np.nan}),
    ({**SKIPPING, "accumulate_steps": 4}, {"accumulated": 4, "sum_of_squares": np.nan}),
]


def check_not_taken(library: Any) -> None:
    """Parameters that are NaN of any kind, and rests, among what stays bit for bit."""
    rng = np.random.default_rng(52)
    for settings, scalars in NOT_TAKEN:
        for in_place, sums in ((False, None), (False, FLOAT), (True, BFLOAT)):
            for types in ([FLOAT], [BFLOAT, FLOAT, FLOAT]):
                leaves = sum_leaves(rng, FLOAT) if sums else pass_leaves(rng)
                update = PassUpdate(
                    ADAMW,
                    leaves,
                    types,
                    average=FLOAT if types == [FLOAT] else None,
                    sums=sums,
                    settings=settings,
                    scalars=scalars,
                )
                if types != [FLOAT]:
                    update.p_in[7], update.p_in[-70] = 0xFF81, 0x7F83
                update.run(library, in_place=in_place, passes=3, threads=96)
                update.check_pass(library)


def check_averages(library: Any) -> None:
    rng = np.random.default_rng(53)
    settings = {"ema": 0.95, "ema_start": 3, "ema_every": 2}
    for average in AVERAGES:
        for case, types in ((ADAMW, [FLOAT]), (SGD, [BFLOAT])):
            for step in range(1, 6):
                update = PassUpdate(
                    case, pass_leaves(rng), types, average=average, settings=settings, step=step
                )
                if step + 1 <= settings["ema_start"]:
                    update.spoil_average()
                update.run(library, in_place=bool(step % 2))
                update.check_pass(library)


def check_average_keys(library: Any) -> None:
    """The average's numbers are those of the array after all state that a rule may have."""
    leaves = sum_leaves(np.random.default_rng(54), FLOAT)
    update = PassUpdate(SGD, leaves, [FLOAT], average=KEYED, settings={"ema": 0.5}, step=7)
    update.run(library, seed=77)
    assert update.average is not None
    for number, (leaf, at) in enumerate(zip(leaves, update.state_offsets, strict=True)):
        expected = rounding_keys(leaf.size, 7, 77, str(number), 4)
        np.testing.assert_array_equal(update.average[at : at + leaf.size], expected)


def check_consuming(library: Any) -> None:
    """Gradients from their sums, which are then zero."""
    rng = np.random.default_rng(55)
    settings = {"accumulate_steps": 4, "clip_value": 0.4}
    scalars = {"accumulated": 4, "grad_scale": 0.7}
    for sums in TYPES:
        for case, types in ((ADAMW, [FLOAT]), (SGD, [BFLOAT])):
            leaves = sum_leaves(rng, FLOAT)
            update = PassUpdate(
                case, leaves, types, sums=sums, settings=settings, scalars=scalars, p_start=64
            )
            update.run(library, passes=2, threads=64, has_tiles=case == ADAMW)
            update.check_pass(library)


def check_adding(library: Any) -> None:
    """To the bit: a gradient is added to its sum and rounded by chance, once."""
    rng = np.random.default_rng(56)
    rule = _ext.Rule("accumulate", {})
    step, accumulated, seed = 5, 3, 9
    for stored in AVERAGES:
        leaves = pass_leaves(rng)
        update = Update(
            (),
            leaves,
            [stored],
            rules=[rule],
            step=step,
            settings=args.settings(is_accumulation=1, accumulate_steps=1),
            scalars={"accumulated": accumulated},
        )
        update.p_offsets = update.state_offsets
        update.p_in = update._flat(stored, update.p_offsets, rng)
        update.p_out = np.zeros_like(update.p_in)
        update.run(library, in_place=True, seed=seed, passes=2)
        for number, (leaf, at) in enumerate(zip(leaves, update.p_offsets, strict=True)):
            part = slice(at, at + leaf.size)
            sums = stored.decode(update.p_in[part]).astype(np.float32)
            sums += leaf.values.astype(np.float32)
            if stored == CHANCE:
                tick, own_seed = step * 4099 + accumulated, seed ^ 0x5BD1E995
                keys = rounding_keys(leaf.size, tick, own_seed, str(number), 0)
                places = sums.view(np.uint32) + (random_bits(keys) >> np.uint32(16))
                np.testing.assert_array_equal(update.p_out[part], places >> np.uint32(16))
            else:
                np.testing.assert_array_equal(update.p_out[part], sums)
        update.check_gaps()


CHECKS = [
    check_clipping,
    check_not_taken,
    check_averages,
    check_average_keys,
    check_consuming,
    check_adding,
]


def kernels() -> list[str]:
    """All that the checks run."""
    wanted = [kernel_text.advance(rule) for rule in ("Adam", "Sgd", "Lion", "Accumulate")]
    for ema in ("Absent", "Float32", CHANCE.name):
        wanted.append(kernel_text.update("Adam", True, ["Float32"] * 3, ema))
        wanted.append(kernel_text.update("Sgd", True, ["Bfloat16"], ema))
    wanted.append(kernel_text.update("Adam", True, ["Bfloat16", "Float32", "Float32"]))
    wanted.append(kernel_text.update("Sgd", False, ["Bfloat16"]))
    wanted.append(kernel_text.update("Sgd", True, ["Float32"], "Keyed"))
    wanted += [kernel_text.update("Accumulate", True, [stored.name]) for stored in AVERAGES]
    return wanted
