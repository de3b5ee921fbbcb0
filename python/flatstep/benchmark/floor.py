"""The floor: the time that memory allows for a step, with next to no arithmetic.

Every process measures it beside its contenders, so a ratio compares runs that are milliseconds
apart. On the CPU flatstep's own threads pass over flat float32 arrays that hold what a step reads
and writes: p, g and the state are read, p and the state written. On a GPU MLX adds one array to
another in place, over as many bytes.

With float32 parameters it moves exactly the bytes of the step. With bfloat16 parameters and
gradients the float32 arrays are shortened until the sum of the bytes is that of the case: AdamW
moves 22 bytes an element, so the arrays have 22/28 of the elements. Of the floor's bytes 43 % are
writes (AdamW; 40 % with SGD), of the case's 45 % (43 %), so this floor is the stricter by a little
where writes cost more. Of a sum in place 33 % are writes.
"""

from collections.abc import Callable

import mlx.core as mx

from .. import _ext
from .cases import Setting

# A step that moves more is several passes over the same arrays: far too long for any cache, and
# short enough to leave memory for the model.
MAX_BYTES = 2**29
ADDED_BYTES = 12  # of an element of a sum: two read, one written


class Floor:
    """Passes of flatstep's threads over the memory of a step; the state has up to three arrays."""

    def __init__(self, elements: int, slots: int, passes: int = 1) -> None:
        self._passes = passes
        arrays = [
            mx.contiguous(mx.full((elements,), value)) for value in (1.0, 1e-6, *([1.0] * slots))
        ]
        mx.eval(arrays)
        self._p, self._g, *self._state = arrays

    def __call__(self) -> None:
        for _ in range(self._passes):
            _ext.floor_pass(self._p, self._g, self._state)


class Sum:
    """MLX's a + b into the memory of a, so often over arrays so long that they move these bytes."""

    def __init__(self, moved_bytes: int, passes: int = 1) -> None:
        self._passes = passes
        length = moved_bytes // (ADDED_BYTES * passes)
        self._a = mx.contiguous(mx.full((length,), 1.0))
        self._b = mx.contiguous(mx.zeros((length,)))
        mx.eval(self._a, self._b)

    def __call__(self) -> None:
        for _ in range(self._passes):
            self._a += self._b
        mx.eval(self._a)


def floor_for(setting: Setting, device: mx.Device) -> Callable[[], None]:
    """The floor of a setting where a device's steps run."""
    elements = setting.step_bytes // (4 * (3 + 2 * setting.slots))
    if device.type == mx.DeviceType.cpu:
        return cpu_floor(elements, setting.slots)
    return Sum(setting.step_bytes, _passes(elements, setting.slots))


def cpu_floor(elements: int, slots: int) -> Floor:
    """Of a step of so many float32 elements, each with so many values of state."""
    passes = _passes(elements, slots)
    return Floor(elements // passes, slots, passes)


def _passes(elements: int, slots: int) -> int:
    return -(-elements * 4 * (2 + slots) // MAX_BYTES)
