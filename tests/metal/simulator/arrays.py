"""Arrays for kernels: beside a page that must not be touched, and in bfloat16."""

import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0


def guarded_array(shape: int | tuple[int, ...], dtype: DTypeLike, at: str = "end") -> NDArray[Any]:
    """Zeros whose last byte (`at="start"`: first byte) lies against an unmapped page.

    What touches the byte beyond dies, whether or not memory is checked: it proves what the code of
    the machine really does.
    """
    array_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    page = mmap.PAGESIZE
    inside = (array_bytes + page - 1) // page * page
    memory = mmap.mmap(-1, inside + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (base, base + page + inside):
        if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = {"start": page, "end": page + inside - array_bytes}[at]
    return np.frombuffer(memory, np.uint8, array_bytes, offset).view(dtype).reshape(shape)


def bfloat16_bits(values: Any) -> NDArray[np.uint16]:
    """float32 rounded to bfloat16, nearest and ties to even, as the bits that a kernel reads."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def from_bfloat16_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
