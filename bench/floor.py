"""The floor: the time that memory allows for a step, with next to no arithmetic.

flatstep's own threads pass over flat float32 arrays that hold what a step reads and writes: p, g
and the state are read, p and the state written. Every process measures it beside its contenders,
so a ratio compares runs that are milliseconds apart.

With float32 parameters it moves exactly the bytes of the step. With bfloat16 parameters and
gradients the float32 arrays are shortened until the sum of the bytes is that of the case: AdamW
moves 22 bytes an element, so the arrays have 22/28 of the elements. Of the floor's bytes 43 % are
writes (AdamW; 40 % with SGD), of the case's 45 % (43 %), so this floor is the stricter by a little
where writes cost more.
"""

import mlx.core as mx
from flatstep import _ext

from .cases import Setting

# Models larger than this are moved in several passes over the same arrays: far too long for any
# cache, and short enough to leave memory for the model.
MAX_BYTES = 2 * 2**30


def floor_size(setting: Setting) -> tuple[int, int]:
    """The elements of each of the floor's arrays, and how often a run passes over them."""
    elements = setting.step_bytes // (4 * (3 + 2 * setting.slots))
    passes = -(-elements * 4 * (2 + setting.slots) // MAX_BYTES)
    return elements // passes, passes


class Floor:
    def __init__(self, setting: Setting) -> None:
        elements, self._passes = floor_size(setting)
        arrays = [
            mx.contiguous(mx.full((elements,), value))
            for value in (1.0, 1e-6, *([1.0] * setting.slots))
        ]
        mx.eval(arrays)
        self._p, self._g, *self._state = arrays

    def run(self) -> None:
        for _ in range(self._passes):
            _ext.floor_pass(self._p, self._g, self._state)
