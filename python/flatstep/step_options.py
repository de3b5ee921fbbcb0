"""What an optimizer was told to do in a step besides its rule."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import inf
from typing import Any, NamedTuple, TypedDict

import mlx.core as mx

from . import _ext
from .checks import as_number, misfit
from .groups import Group
from .loss_scale import DynamicLossScale
from .precision import StorageOptions


class StepOptions(TypedDict, total=False):
    """What :class:`FusedOptimizer` takes of it, and says more of."""

    max_grad_norm: float | None
    norm_group: Any
    clip_value: float | None
    skip_nonfinite: bool
    grad_scale: float | mx.array | DynamicLossScale | None
    accumulate_steps: int | None
    accumulate_dtype: mx.Dtype | None
    ema: float | None
    ema_start: int
    ema_every: int
    ema_dtype: mx.Dtype | None
    groups: Sequence[Group]


class Options(StorageOptions, StepOptions, total=False):
    """What every optimizer here takes besides what its namesake in MLX does."""


class Pass(NamedTuple):
    """All of it but the groups, which may change, and a scale, which the state has."""

    max_grad_norm: float | None = None
    norm_group: Any = None
    clip_value: float | None = None
    loss_scale: DynamicLossScale | None = None
    skip_nonfinite: bool = False
    accumulate_steps: int | None = None
    accumulate_dtype: str | None = None  # by name: an mx.Dtype can be neither copied nor pickled
    ema: float | None = None
    ema_start: int = 0
    ema_every: int = 1
    ema_dtype: str | None = None

    @classmethod
    def of(cls, options: StepOptions) -> "Pass":
        """Raises ValueError or TypeError, naming the argument, for what is not allowed."""
        given: dict[str, Any] = {
            name: value for name, value in options.items() if value is not None
        }
        scale = given.pop("grad_scale", None)
        given.pop("groups", None)
        is_dynamic = isinstance(scale, DynamicLossScale)
        for name in ("max_grad_norm", "clip_value"):
            if name in given:
                given[name] = _above_zero(name, given[name])
        for name, least in (("accumulate_steps", 1), ("ema_start", 0), ("ema_every", 1)):
            if name in given:
                given[name] = _whole(name, given[name], least)
        skips = given.get("skip_nonfinite", False)
        if not isinstance(skips, bool):
            raise TypeError(misfit("skip_nonfinite", "True or False", repr(skips)))
        if "ema" in given:
            given["ema"] = as_number("ema", given["ema"])
            if not 0 <= given["ema"] < 1:
                raise ValueError(misfit("ema", "in [0, 1)", f"{given['ema']:g}"))
        elif any(name in given for name in ("ema_start", "ema_every", "ema_dtype")):
            raise ValueError("ema_start, ema_every and ema_dtype say more of ema=; set that")
        if given.get("accumulate_steps") is not None:
            given.setdefault("accumulate_dtype", mx.float32)
        if "ema" in given:
            given.setdefault("ema_dtype", mx.float32)
        for name in ("accumulate_dtype", "ema_dtype"):
            if name in given:
                if given[name] not in (mx.float32, mx.bfloat16):
                    raise ValueError(misfit(name, "mx.float32 or mx.bfloat16", repr(given[name])))
                given[name] = str(given[name]).rsplit(".", 1)[-1]
        has_norm = "max_grad_norm" in given or skips or is_dynamic
        if "norm_group" in given:
            if not isinstance(given["norm_group"], mx.distributed.Group):
                raise TypeError(
                    misfit("norm_group", "an mx.distributed.Group", repr(given["norm_group"]))
                )
            if not has_norm:
                raise ValueError("norm_group says more of max_grad_norm= or skip_nonfinite=")
        if is_dynamic:
            given |= {"skip_nonfinite": True, "loss_scale": scale}
        return cls(**given)

    @property
    def has_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    @lru_cache(64)  # noqa: B019 - a training loop asks for the same at every step
    def settings(
        self, rounding: _ext.Rounding, seed: int, accumulate_steps: int
    ) -> _ext.StepSettings:
        return _ext.StepSettings(
            rounding,
            seed,
            inf if self.max_grad_norm is None else self.max_grad_norm,
            inf if self.clip_value is None else self.clip_value,
            self.has_norm,
            self.skip_nonfinite,
            accumulate_steps,
            self.ema,
            self.ema_start,
            self.ema_every,
        )

    def check_without(self, where: str, *names: str) -> None:
        """Raises ValueError where these, or all if none are named, have no place."""
        for name in names or self._fields:
            value = getattr(self, name)
            if value != self._field_defaults[name]:
                name = "grad_scale" if name == "loss_scale" else name
                raise ValueError(
                    f"{where} has no place for {name}={value}; make the optimizer without it"
                )


@lru_cache(64)
def defaults_of(options: Pass) -> dict[str, Callable[[], mx.array]]:
    """What the state has for a step's options, and what it is before the first one."""
    names: dict[str, Callable[[], mx.array]] = {}
    if options.has_norm:
        names["grad_norm"] = partial(mx.array, 0.0)
    if options.skip_nonfinite:
        names["skipped_steps"] = _zero
    if options.accumulate_dtype:
        names["accumulated"] = _zero
    if options.loss_scale is not None:
        names["loss_scale"] = partial(mx.array, options.loss_scale.init_scale)
        names["loss_scale_steps"] = _zero
    return names


def _zero() -> mx.array:
    return mx.array(0, mx.uint64)


def _above_zero(name: str, value: Any) -> float:
    number = as_number(name, value)
    if not number > 0:
        raise ValueError(misfit(name, "above 0", f"{number:g}"))
    return number


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(misfit(name, "a whole number", repr(value)))
    number = value.__index__()
    if not least <= number < 2**63:
        raise ValueError(misfit(name, f"from {least} to 2**63 - 1", str(number)))
    return int(number)
