"""Steps of the engine with all that it does besides a rule, for tests of the Metal backend."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from cases import Case
from flatstep import _ext
from on_standin_storages import BLOCK, Rounding, Training

Scalars = Mapping[str, float | list[float]]


class PassTraining(Training):
    """Steps with these settings, which may sum up gradients and keep an average."""

    def __init__(
        self,
        case: Case,
        start: dict[str, mx.array],
        rounding: _ext.Rounding = Rounding.NEAREST,
        state_dtype: mx.Dtype = mx.float32,
        *,
        rule: _ext.Rule | None = None,
        groups: _ext.LeafGroups | None = None,
        schedule: _ext.PlainSchedule | None = None,
        sums: mx.Dtype | None = None,
        average: mx.Dtype | None = None,
        scalars: Scalars | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(case, start, rounding, state_dtype)
        self.rule, self.groups, self.schedule = rule or self.rule, groups, schedule
        self.sums = sums
        for dtype in (average, sums):
            if dtype is not None:
                zero = mx.array(0, dtype)
                blocks = self.layout.bucket_blocks
                self.state.append([mx.broadcast_to(zero, (n, BLOCK)) for n in blocks])
        self.settings = _ext.StepSettings(rounding, self.seed, **settings)
        dtypes = {"skipped_steps": mx.uint64, "accumulated": mx.uint64}
        self.scalars = {
            name: mx.array(value, dtypes.get(name, mx.float32))
            for name, value in {"learning_rate": 1e-2, **(scalars or {})}.items()
        }
        self.scalars["step"] = self.step
        if sums is not None:
            self.scalars["accumulated"] = mx.array(0, mx.uint64)
        self.skeleton = {name: number for number, name in enumerate(self.paths)}

    def add(self, gradients: dict[str, mx.array]) -> None:
        counted = {name: self.scalars[name] for name in ("step", "accumulated")}
        self.state[-1], after = _ext.accumulate(
            self.layout, self.skeleton, gradients, [self.state[-1]], counted, self.seed, self.groups
        )
        self.scalars["accumulated"] = after["accumulated"]

    def build_step(self, gradients: dict[str, mx.array]) -> None:
        """Not yet evaluated."""
        if self.sums is not None:
            self.add(gradients)
        result: Any = _ext.step(
            self.layout,
            self.skeleton,
            gradients,
            {name: self.parameters[name] for name in gradients},
            self.rule,
            self.schedule,
            self.state,
            self.scalars,
            self.settings,
            self.groups,
        )
        updated, self.state, self.scalars = result
        self.parameters.update(updated)

    def take_step(self, gradients: dict[str, mx.array]) -> None:
        self.build_step(gradients)
        mx.eval(self.parameters, self.state, self.scalars)
        mx.synchronize()

    def bits(self) -> dict[str, Any]:
        everything = super().bits()
        return everything | {name: np.array(value) for name, value in self.scalars.items()}


def whole(steps: list[dict[str, mx.array]]) -> list[dict[str, mx.array]]:
    """The same with whole numbers from -4 to 4, and a power of two for the leaf apart."""
    result = [
        {name: mx.round(mx.clip(g, -4, 4)).astype(g.dtype) for name, g in given.items()}
        for given in steps
    ]
    mx.eval(result)
    return result


def with_value(
    given: dict[str, mx.array], name: str, index: int, value: float
) -> dict[str, mx.array]:
    changed = np.array(given[name].astype(mx.float32)).reshape(-1)
    changed[index] = value
    array = mx.array(changed.reshape(given[name].shape)).astype(given[name].dtype)
    mx.eval(array)
    return {**given, name: array}
