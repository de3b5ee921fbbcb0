"""How an optimizer was told to store parameters and state."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import mlx.core as mx

from . import _ext
from .checks import misfit
from .slots import FLOATING, ROUNDINGS


class StorageOptions(TypedDict, total=False):
    """What :class:`FusedOptimizer` takes besides the learning rate, and says more of."""

    state_dtype: mx.Dtype | None
    master_weight_bits: int | None
    stochastic_rounding: bool
    full_precision: Callable[[str, mx.array], bool] | None
    seed: int


class Precision(NamedTuple):
    state_dtype: str  # by name: an mx.Dtype can be neither copied nor pickled
    master_weight_bits: int | None
    stochastic_rounding: bool
    full_precision: Callable[[str, mx.array], bool] | None
    seed: int

    @classmethod
    def of(
        cls,
        state_dtype: Any,
        master_weight_bits: Any = None,
        stochastic_rounding: Any = False,
        full_precision: Any = None,
        seed: Any = 0,
    ) -> "Precision":
        """Raises ValueError or TypeError, naming the argument, for what is not allowed."""
        if state_dtype not in (*FLOATING, mx.int8):
            wanted = "mx.float32, mx.float16, mx.bfloat16 or mx.int8"
            raise ValueError(misfit("state_dtype", wanted, repr(state_dtype)))
        if master_weight_bits is not None and not (
            isinstance(master_weight_bits, int) and master_weight_bits in (24, 32)
        ):
            raise ValueError(
                misfit("master_weight_bits", "24, 32 or None", repr(master_weight_bits))
            )
        if not isinstance(stochastic_rounding, bool):
            raise TypeError(
                misfit("stochastic_rounding", "True or False", repr(stochastic_rounding))
            )
        if stochastic_rounding and master_weight_bits:
            raise ValueError(
                "stochastic_rounding and master_weight_bits exclude each other: what is kept needs "
                "no chance"
            )
        if full_precision is not None and not callable(full_precision):
            raise TypeError(
                misfit("full_precision", "a function of path and parameter", repr(full_precision))
            )
        if full_precision is not None and state_dtype != mx.int8:
            raise ValueError("full_precision names what state_dtype=mx.int8 is not for; set that")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(misfit("seed", "a whole number from 0 to 2**32 - 1", repr(seed)))
        name = str(state_dtype).rsplit(".", 1)[-1]
        return cls(name, master_weight_bits, stochastic_rounding, full_precision, seed)

    @property
    def rounding(self) -> _ext.Rounding:
        if self.master_weight_bits:
            return ROUNDINGS[self.master_weight_bits]
        return _ext.Rounding.STOCHASTIC if self.stochastic_rounding else _ext.Rounding.NEAREST

    def check_plain(self, where: str) -> None:
        """Raises ValueError where state is kept parameter by parameter, in arrays of floats."""
        kept = f"master_weight_bits={self.master_weight_bits}" if self.master_weight_bits else ""
        if kept or self.state_dtype == "int8":
            raise ValueError(
                f"{where} is called for one parameter at a time, where "
                f"{kept or 'state_dtype=mx.int8'} can't be kept; make the optimizer without it"
            )
