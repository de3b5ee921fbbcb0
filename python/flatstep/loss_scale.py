"""Loss scaling for float16: gradients too small for it are kept from becoming zero."""

import math
from typing import NamedTuple

import mlx.core as mx

from .checks import as_finite, misfit

# One that is 0 would never grow again.
LEAST = 2.0**-126


class _Settings(NamedTuple):
    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000


class DynamicLossScale(_Settings):
    """A loss scale that grows while gradients are finite, and shrinks when one is not.

    Passed as ``grad_scale=`` of an optimizer, whose steps are skipped as with ``skip_nonfinite``.
    Multiply the loss by ``optimizer.loss_scale``; gradients are divided by it as they are read. A
    step that is skipped multiplies the scale by ``backoff_factor``, ``growth_interval`` steps in a
    row that are not by ``growth_factor``. All of it happens on the device: the state has
    ``loss_scale`` (float32) and ``loss_scale_steps``, how many steps there were since it changed.

    Args:
        init_scale (float, optional): The scale of the first step. Default: ``2.0**16``
        growth_factor (float, optional): Above 1. Default: ``2.0``
        backoff_factor (float, optional): In (0, 1). Default: ``0.5``
        growth_interval (int, optional): In steps, at least 1. Default: ``2000``

    Raises:
        ValueError: an argument is not in its range.

    Source: ``torch.amp.GradScaler``; Micikevicius et al., Mixed precision training, ICLR 2018.

    Example:
        >>> import flatstep as optim, mlx.core as mx
        >>> optimizer = optim.Adam(1e-3, grad_scale=optim.DynamicLossScale())
        >>> optimizer.loss_scale
        array(65536, dtype=float32)
        >>> w = optimizer.apply_gradients({"w": mx.array([mx.inf])}, {"w": mx.zeros(1)})
        >>> optimizer.loss_scale, optimizer.state["skipped_steps"]
        (array(32768, dtype=float32), array(1, dtype=uint64))
    """

    __slots__ = ()

    def __new__(
        cls,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> "DynamicLossScale":
        scale = as_finite("init_scale", init_scale)
        growth = as_finite("growth_factor", growth_factor)
        backoff = as_finite("backoff_factor", backoff_factor)
        if scale < LEAST:
            raise ValueError(misfit("init_scale", "at least 2**-126", f"{scale:g}"))
        if growth <= 1:
            raise ValueError(misfit("growth_factor", "above 1", f"{growth:g}"))
        if not 0 < backoff < 1:
            raise ValueError(misfit("backoff_factor", "in (0, 1)", f"{backoff:g}"))
        is_whole = isinstance(growth_interval, int) and not isinstance(growth_interval, bool)
        if not is_whole or growth_interval < 1:
            raise ValueError(
                misfit("growth_interval", "a whole number above 0", repr(growth_interval))
            )
        return super().__new__(cls, scale, growth, backoff, growth_interval)

    def advanced(
        self, scale: mx.array, steps: mx.array, taken: mx.array, skipped: mx.array
    ) -> dict[str, mx.array]:
        """After a step that was taken, skipped, or neither."""
        steps = mx.where(skipped, 0, steps + taken.astype(mx.uint64))
        larger = scale * self.growth_factor
        grows = (steps >= self.growth_interval) & (larger < math.inf)
        smaller = mx.maximum(scale * self.backoff_factor, LEAST)
        scale = mx.where(skipped, smaller, mx.where(grows, larger, scale))
        return {
            "loss_scale": scale,
            "loss_scale_steps": mx.where(grows, 0, steps).astype(mx.uint64),
        }
