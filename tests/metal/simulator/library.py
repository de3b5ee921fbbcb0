"""A library of kernels from Python: dispatch them on NumPy's arrays, where they lie."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import KernelError

NUM_SLOTS = 31
ABI = 2
ORDERS = ("forward", "reverse", "shuffled")
Ranges = Mapping[int, Sequence[tuple[int, int]]]


class _Range(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_uint64), ("end", ctypes.c_uint64))


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("readable", ctypes.POINTER(_Range)),
        ("num_readable", ctypes.c_uint64),
        ("writable", ctypes.POINTER(_Range)),
        ("num_writable", ctypes.c_uint64),
        ("before", ctypes.c_uint64),
    )


class _Dispatch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_int32),
        ("grid_is_threads", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("threads_per_threadgroup", ctypes.c_uint32 * 3),
        ("buffers", _Buffer * NUM_SLOTS),
        ("threadgroup_lengths", ctypes.c_uint32 * NUM_SLOTS),
        ("order", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("flush_to_zero", ctypes.c_int32),
        ("check_memory", ctypes.c_int32),
    )


class Parameter(ctypes.Structure):
    """SimulatorParameter of runtime.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("index", ctypes.c_int32),
        ("size", ctypes.c_uint32),
        ("alignment", ctypes.c_uint32),
        ("is_reference", ctypes.c_int32),
        ("is_writable", ctypes.c_int32),
    )


class Library:
    """The kernels of one source. `path` is the shared library, of the interface in runtime.h."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.simulator_kernel_name.restype = ctypes.c_char_p
        self._library.simulator_error.restype = ctypes.c_char_p
        self._library.simulator_parameter.restype = ctypes.POINTER(Parameter)
        if self._library.simulator_abi() != ABI:
            raise RuntimeError(f"{path}: another version of the simulator made it")
        count = self._library.simulator_num_kernels()
        self.kernels = [self._library.simulator_kernel_name(k).decode() for k in range(count)]

    def parameters(self, kernel: str) -> list[Parameter]:
        number = self._number(kernel)
        count = self._library.simulator_num_parameters(number)
        return [self._library.simulator_parameter(number, p).contents for p in range(count)]

    def run(
        self,
        kernel: str,
        *,
        threads: tuple[int, ...],
        buffers: Mapping[int, NDArray[Any] | bytes],
        threadgroups: tuple[int, ...] | None = None,
        grid: tuple[int, ...] | None = None,
        threadgroup_memory: Mapping[int, int] | None = None,
        readable: Ranges | None = None,
        writable: Ranges | None = None,
        order: str = "forward",
        seed: int = 0,
        flush_to_zero: bool = False,
        check_memory: bool = True,
    ) -> None:
        """Dispatches `threadgroups` of `threads` each, or a `grid` that counts threads.

        Arrays are read and written where they lie; they must be contiguous. Bytes are what setBytes
        would copy. `readable` and `writable` narrow what may be touched: for a buffer's index, the
        (begin, end) in bytes; buffers that are not named there may be touched everywhere.
        Raises KernelError.
        """
        if (threadgroups is None) == (grid is None):
            raise ValueError("Give either threadgroups or grid.")
        dispatch = _Dispatch()
        dispatch.kernel = self._number(kernel)
        dispatch.grid_is_threads = grid is not None
        dispatch.grid[:] = _three(grid or threadgroups or ())
        dispatch.threads_per_threadgroup[:] = _three(threads)
        alive: list[Any] = []  # what the dispatch points to
        for index, buffer in buffers.items():
            _bind(dispatch.buffers[index], buffer, alive)
        for index, ranges in (readable or {}).items():
            _limit(dispatch.buffers[index], "readable", ranges, alive)
        for index, ranges in (writable or {}).items():
            _limit(dispatch.buffers[index], "writable", ranges, alive)
        for index, length in (threadgroup_memory or {}).items():
            dispatch.threadgroup_lengths[index] = length
        dispatch.order = ORDERS.index(order)
        dispatch.seed = seed
        dispatch.flush_to_zero = flush_to_zero
        dispatch.check_memory = check_memory
        if self._library.simulator_run(ctypes.byref(dispatch)) != 0:
            raise KernelError(self._with_line(self._library.simulator_error().decode()))

    def _number(self, kernel: str) -> int:
        if kernel not in self.kernels:
            raise KernelError(f"There is no kernel {kernel}, only {', '.join(self.kernels)}.")
        return self.kernels.index(kernel)

    def _with_line(self, message: str) -> str:
        """A machine address as file and line, where binutils are installed."""
        match = re.search(r" \[at 0x([0-9a-f]+)\]", message)
        if not match:
            return message
        offset = int(match[1], 16) - 1  # a return address: the call is before it
        tool = shutil.which("addr2line")
        if not tool:
            return message.replace(match[0], "")
        command = [tool, "-i", "-e", str(self.path), hex(offset)]
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        lines = [re.sub(r"^(\./)+| \(.*", "", line) for line in output.splitlines()]
        hidden = ("?", "/simulator/shim/", "entry points:")
        known = [line for line in lines if not any(text in line for text in hidden)]
        return message.replace(match[0], "".join(f"\n  {line}" for line in known))


def _three(extents: Sequence[int]) -> list[int]:
    return [*extents, 1, 1, 1][:3]


def _bind(slot: _Buffer, buffer: NDArray[Any] | bytes, alive: list[Any]) -> None:
    if isinstance(buffer, bytes):
        # Aligned to 16 bytes, which bytes are not.
        buffer = np.frombuffer(buffer, np.uint8).copy()
    if not buffer.flags.c_contiguous:
        raise ValueError("The arrays of a dispatch are contiguous.")
    alive.append(buffer)
    slot.address = buffer.ctypes.data
    slot.size = buffer.nbytes


def _limit(slot: _Buffer, what: str, ranges: Sequence[tuple[int, int]], alive: list[Any]) -> None:
    # One more than there are: no ranges must not be a null pointer, which means everything.
    array = (_Range * (len(ranges) + 1))(*[_Range(begin, end) for begin, end in ranges])
    alive.append(array)
    setattr(slot, what, ctypes.cast(array, ctypes.POINTER(_Range)))
    setattr(slot, f"num_{what}", len(ranges))
