"""Compiles the unmodified text of a .metal file with clang and runs its kernels on the CPU.

No machine that tests this project need have a GPU. `check` finds what Metal's compiler would
refuse, `build` gives a library whose kernels run on NumPy's arrays, with every access to memory
checked.
"""

from simulator.arrays import bfloat16_bits, from_bfloat16_bits, guarded_array
from simulator.clang import ClangNotFoundError, find_clang
from simulator.compiler import build, build_file, check
from simulator.errors import CompileError, KernelError
from simulator.library import Library

__all__ = [
    "ClangNotFoundError",
    "CompileError",
    "KernelError",
    "Library",
    "bfloat16_bits",
    "build",
    "build_file",
    "check",
    "find_clang",
    "from_bfloat16_bits",
    "guarded_array",
]
