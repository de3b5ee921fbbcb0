"""What a step does besides its rule, in float64: groups, scale, clipping, skipping, sums, averages.

A step is predicted from all that the optimizer held before it, so that no error adds up and any
storage can be held to it.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import flatstep
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from cases import LEARNING_RATE, Case, leaves
from flatstep.diagnosis import formulas
from flatstep.diagnosis.cases import build_schedule
from flatstep.diagnosis.formulas import PARAMETER_ULPS
from reference import RULES, Float64, Terms, in_mlx, schedule_value, to_float64, total, ulp

# How far from the terms a float32 may be: that of the rule, and of its gradient, which is scaled,
# multiplied by a factor that is known to a few ulp, and squared.
ULPS = PARAMETER_ULPS + 12
# Of what a master weight holds, relative to it.
MASTER_ERRORS = {24: 2.0**-15, 32: 2.0**-23}


class Parameters(NamedTuple):
    """A group: what it matches, its own learning rate, as `schedule_value` takes it, and so on."""

    match: str | Sequence[str] | Callable[[str, mx.array], bool]
    rate: Any = None
    scale: float = 1.0
    frozen: bool = False
    arguments: Mapping[str, Any] = {}

    def make(self) -> flatstep.Group:
        own = {} if self.rate is None else {"learning_rate": build_schedule(flatstep, self.rate)}
        return flatstep.Group(
            self.match, lr_scale=self.scale, frozen=self.frozen, **own, **self.arguments
        )

    def matches(self, path: str, parameter: Float64) -> bool:
        if callable(self.match):
            return self.match(path, mx.array(parameter.astype(np.float32)))
        globs = [self.match] if isinstance(self.match, str) else self.match
        return any(fnmatchcase(path, glob) for glob in globs)


class Array(NamedTuple):
    """An array of a leaf, and what a value may be off where it is stored, by its exact value."""

    values: Float64
    dtype: mx.Dtype
    rounding: str = "nearest"  # or "chance", "codes", "codes without sign", "24" or "32"


class Held(NamedTuple):
    """All that an optimizer and its parameters hold: arrays by path and name, and scalars."""

    leaves: dict[str, dict[str, Array]]
    scalars: dict[str, Any]


def held(optimizer: Any, parameters: Any) -> Held:
    """Copies; `p` is what the optimizer knows of a parameter."""
    weights = optimizer.master_weights(parameters)
    state, floats = optimizer.state, leaves(optimizer.dequantized_state())
    shown = leaves(state)
    scalars = {name: np.array(state[name]) for name in state if isinstance(state[name], mx.array)}
    arrays: dict[str, dict[str, Array]] = {}
    for path, p in leaves(parameters).items():
        chance = "chance" if optimizer.stochastic_rounding else "nearest"
        bits = f"{optimizer.master_weight_bits}" if optimizer.master_weight_bits else chance
        is_half = p.dtype != mx.float32
        arrays[path] = {
            "p": Array(to_float64(leaves(weights)[path]), p.dtype, bits if is_half else "nearest")
        }
        for slot in optimizer.slots:
            value = floats[f"{path}.{slot}"]
            codes = "codes without sign" if (slot, len(optimizer.slots)) == ("v", 2) else "codes"
            is_coded = f"{path}.{slot}.codes" in shown
            arrays[path][slot] = Array(
                to_float64(value), value.dtype, codes if is_coded else "nearest"
            )
        for slot in ("ema", "gradient_sum"):
            if (value := shown.get(f"{path}.{slot}")) is not None:
                arrays[path][slot] = Array(to_float64(value), value.dtype, "chance")
    return Held(arrays, scalars)


class Expected(NamedTuple):
    """Terms of what changes, by path and name; what else there is stays bit for bit."""

    leaves: dict[str, dict[str, Terms]]
    scalars: dict[str, float]
    action: str = "update"  # or "hold" or "drop"


class PassReference:
    """An optimizer as `make` gives it, and what its calls should do."""

    def __init__(
        self,
        case: Case,
        rate: Any = LEARNING_RATE,
        groups: Sequence[Parameters] = (),
        **options: Any,
    ):
        self.case, self.rate, self.groups, self.options = case, rate, groups, options

    def make(self, **more: Any) -> Any:
        given = {"groups": [group.make() for group in self.groups]} if self.groups else {}
        rate = build_schedule(flatstep, self.rate)
        return self.case.make(flatstep, rate, **given, **self.options, **more)

    def group_of(self, path: str, parameter: Float64) -> Parameters | None:
        return next((g for g in self.groups if g.matches(path, parameter)), None)

    @property
    def some_have_momentum(self) -> bool:
        of_all = [self.case.arguments, *(group.arguments for group in self.groups)]
        return any(arguments.get("momentum") for arguments in of_all)

    def is_frozen(self, before: Held, path: str) -> bool:
        group = self.group_of(path, before.leaves[path]["p"].values)
        return group is not None and group.frozen

    def rate_of_all(self, scalars: Mapping[str, Any]) -> float:
        is_number = isinstance(self.rate, float | int)
        if is_number:
            return float(scalars["learning_rate"])
        return schedule_value(self.rate, int(scalars["step"]))

    def rate_of(self, group: Parameters, scalars: Mapping[str, Any]) -> float:
        if isinstance(group.rate, float | int):
            return float(scalars["group_learning_rates"][self.groups.index(group)])
        if group.rate is None:
            return group.scale * self.rate_of_all(scalars)
        return group.scale * schedule_value(group.rate, int(scalars["step"]))

    # ---- What the calls do ----

    def accumulate(self, before: Held, gradients: Mapping[str, mx.array]) -> Expected:
        sums = {
            path: {"gradient_sum": [before.leaves[path]["gradient_sum"].values, to_float64(g)]}
            for path, g in gradients.items()
            if not self.is_frozen(before, path)
        }
        return Expected(sums, {"accumulated": before.scalars["accumulated"] + 1}, "hold")

    def step(self, before: Held, gradients: Mapping[str, mx.array] | None) -> Expected:
        """With gradients, or with what was accumulated."""
        steps = self.options.get("accumulate_steps")
        if gradients is None:
            if before.scalars["accumulated"] == 0:
                return Expected({}, {}, "hold")
            sums = {path: arrays["gradient_sum"].values for path, arrays in before.leaves.items()}
            return self._update(before, sums, int(before.scalars["accumulated"]))
        if "gradient_sum" not in next(iter(before.leaves.values())):
            return self._update(before, {path: to_float64(g) for path, g in gradients.items()}, 1)
        added = self.accumulate(before, gradients)
        if added.scalars["accumulated"] < (steps or 1):
            return added
        # Rounded as they are stored: where they cancel, that is more than a few ulp of them.
        sums = {path: in_float32(terms["gradient_sum"]) for path, terms in added.leaves.items()}
        return self._update(before, sums, int(added.scalars["accumulated"]))

    def _update(self, before: Held, gradients: Mapping[str, Float64], count: int) -> Expected:
        now, options = before.scalars, self.options
        given = {path: g for path, g in gradients.items() if not self.is_frozen(before, path)}
        scale = 1 / now["loss_scale"] if "loss_scale" in now else now.get("grad_scale", 1.0)
        limit = options.get("clip_value") or np.inf
        used = {
            path: np.clip(g * (float(scale) / count), -limit, limit) for path, g in given.items()
        }
        norm = sum(float(np.sum(np.square(g))) for g in used.values()) ** 0.5
        scalars: dict[str, Any] = {}
        if "accumulated" in now:
            scalars["accumulated"] = 0
        if "skipped_steps" in now:
            is_finite = all(np.isfinite(g).all() for g in given.values()) and norm < 1.8e19
            scalars |= self._loss_scale(now, is_finite)
            if not is_finite:
                scalars["skipped_steps"] = now["skipped_steps"] + 1
                return Expected(self._cleared(before, given), scalars, "drop")
        if "grad_norm" in now:
            scalars["grad_norm"] = norm
        if (largest := options.get("max_grad_norm")) is not None:
            factor = min(1.0, largest / (norm + 1e-6))
            used = {path: g * factor for path, g in used.items()}
        scalars |= {"step": now["step"] + 1, "learning_rate": self.rate_of_all(now)}
        if self.groups:
            scalars["group_learning_rates"] = [self.rate_of(g, now) for g in self.groups]
        updated = {path: self._leaf(before, path, g) for path, g in used.items()}
        for path, cleared in self._cleared(before, given).items():
            updated[path] |= cleared
        return Expected(updated, scalars)

    def _cleared(self, before: Held, given: Mapping[str, Float64]) -> dict[str, dict[str, Terms]]:
        return {
            path: {"gradient_sum": [np.zeros_like(g)]}
            for path, g in given.items()
            if "gradient_sum" in before.leaves[path]
        }

    def _loss_scale(self, now: Mapping[str, Any], is_finite: bool) -> dict[str, float]:
        """As torch.amp.GradScaler's update."""
        if "loss_scale" not in now:
            return {}
        rule, scale, steps = self.options["grad_scale"], now["loss_scale"], now["loss_scale_steps"]
        if not is_finite:
            return {"loss_scale": scale * rule.backoff_factor, "loss_scale_steps": 0}
        if steps + 1 == rule.growth_interval:
            return {"loss_scale": scale * rule.growth_factor, "loss_scale_steps": 0}
        return {"loss_scale_steps": steps + 1}

    def _leaf(self, before: Held, path: str, gradient: Float64) -> dict[str, Terms]:
        arrays = {name: array.values for name, array in before.leaves[path].items()}
        group = self.group_of(path, arrays["p"])
        rate = self.rate_of(group, before.scalars) if group else self.rate_of_all(before.scalars)
        arguments = {**self.case.arguments, **(group.arguments if group else {})}
        if self.some_have_momentum and not arguments.get("momentum"):
            # Its velocity is the gradient, and dampening is of momentum.
            arguments |= {"momentum": 1e-300, "dampening": 0.0}
        t = int(before.scalars["step"]) + 1
        terms = RULES[self.case.rule]({**arrays, "g": gradient}, rate, t, **arguments)
        if "ema" in arrays:
            start, every = (self.options.get(f"ema_{k}", least) for k, least in EMA_DEFAULTS)
            decay = self.options["ema"]
            if t <= start:
                terms["ema"] = terms["p"]
            elif (t - start) % every == 0:
                terms["ema"] = [decay * arrays["ema"], *((1 - decay) * x for x in terms["p"])]
        return {name: x for name, x in terms.items() if name in arrays}


def in_float32(terms: Terms) -> Float64:
    return total(terms).astype(np.float32).astype(np.float64)


EMA_DEFAULTS = (("start", 0), ("every", 1))


# ---- What came of it ----


def tolerance(array: Array, terms: Terms, ulps: float) -> Float64:
    """How far from the terms' sum an array may be, stored as it is."""
    exact = total(terms)
    with mx.stream(mx.cpu):
        as_mlx = [in_mlx(np.where(np.isfinite(term), term, 0)) for term in terms]
        off = np.array(formulas.tolerance(as_mlx, mx.float32, ulps))
        if array.rounding.startswith("codes"):
            has_sign = array.rounding == "codes"
            step = formulas.code_step(in_mlx(exact).reshape(-1), has_sign).reshape(exact.shape)
            return off + 1.01 * np.array(step)
        if array.dtype == mx.float32:
            return off
        if array.rounding == "nearest":
            return np.array(formulas.tolerance(as_mlx, array.dtype, ulps))
    if array.rounding == "chance":
        return off + ulp(np.abs(exact) + off, array.dtype)
    return off + MASTER_ERRORS[int(array.rounding)] * np.abs(exact)


def assert_step(before: Held, after: Held, expected: Expected, ulps: float = ULPS) -> None:
    """What should change has changed as expected, all else is what it was."""
    for name, value in before.scalars.items():
        got = after.scalars[name]
        if name in expected.scalars:
            np.testing.assert_allclose(got, expected.scalars[name], 2e-6, 1e-37, err_msg=name)
        else:
            np.testing.assert_array_equal(got, value, err_msg=name)
    assert before.scalars.keys() == after.scalars.keys()
    for path, arrays in after.leaves.items():
        for name, array in arrays.items():
            where = f"{path} {name}, {expected.action}"
            terms = expected.leaves.get(path, {}).get(name)
            if terms is None:
                kept = before.leaves[path][name].values
                # A step leaves no sum behind, of what it is not given neither.
                is_dropped = name == "gradient_sum" and after.scalars["accumulated"] == 0
                kept = np.zeros_like(kept) if is_dropped else kept
                np.testing.assert_array_equal(array.values, kept, where)
                continue
            with np.errstate(invalid="ignore"):
                error = np.abs(array.values - total(terms))
            most = tolerance(array, terms, ulps)
            # A sum that is not finite is kept until the step that it makes fail.
            is_same = ~np.isfinite(total(terms)) & ~np.isfinite(array.values)
            wrong = ~(is_same | (error <= most))
            assert not wrong.any(), (
                f"{where}: {wrong.sum()} of {wrong.size} are wrong, such as "
                f"{array.values[wrong][0]!r} instead of {total(terms)[wrong][0]!r}, by "
                f"{error[wrong][0] / most[wrong][0]:.3g} times what is allowed"
            )


# ---- Training ----


def model_of(tree: Mapping[str, Any]) -> nn.Module:
    """A module with these parameters."""
    model = nn.Module()
    for name, parameter in tree.items():
        setattr(model, name, parameter)
    return model


class Training:
    """A model whose every step is held to the reference."""

    def __init__(
        self,
        reference: PassReference,
        tree: Mapping[str, Any],
        compiled: bool = False,
        **more: Any,
    ):
        optimizer, model = reference.make(**more), model_of(tree)
        optimizer.init(model.trainable_parameters())
        self._start(reference, optimizer, model, compiled)

    @classmethod
    def of(
        cls, reference: PassReference, optimizer: Any, model: nn.Module, compiled: bool = False
    ) -> "Training":
        """Of what has been trained before."""
        training = cls.__new__(cls)
        training._start(reference, optimizer, model, compiled)
        return training

    def _start(
        self, reference: PassReference, optimizer: Any, model: nn.Module, compiled: bool
    ) -> None:
        self.reference, self.optimizer, self.model = reference, optimizer, model
        state = [self.model.state, self.optimizer.state]

        def maybe_compiled(work: Callable[..., None]) -> Callable[..., None]:
            return mx.compile(work, inputs=state, outputs=state) if compiled else work

        self._update = maybe_compiled(lambda g: self.optimizer.update(self.model, g))
        self._update_alone = maybe_compiled(lambda: self.optimizer.update(self.model))
        self._accumulate = maybe_compiled(self.optimizer.accumulate)

    def held(self) -> Held:
        mx.eval(self.model.parameters(), self.optimizer.state)
        return held(self.optimizer, self.model.parameters())

    def update(self, gradients: Any = None) -> Expected:
        before = self.held()
        expected = self.reference.step(before, None if gradients is None else leaves(gradients))
        if gradients is None:
            self._update_alone()
        else:
            self._update(gradients)
        assert_step(before, self.held(), expected)
        return expected

    def accumulate(self, gradients: Any) -> None:
        before = self.held()
        expected = self.reference.accumulate(before, leaves(gradients))
        self._accumulate(gradients)
        assert_step(before, self.held(), expected)
