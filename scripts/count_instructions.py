"""Counts the instructions that AdamW takes for an element on a GPU: docs/metal.md, "Instructions".

A thread that updates two runs is compared with one that updates one. -v: which, in a run of four.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "metal"))

import kernel_text
from simulator import compiler
from simulator.clang import find_clang
from simulator.tokens import tokenize
from simulator.translate import translate

CODES = kernel_text.code_storages("Adam")
STORAGES = [["Float32"] * 3, *([p, *CODES] for p in ["Float32", *kernel_text.PARAMETER_STORAGES])]

# A shuffle becomes a call of a function that nobody defines and that touches no memory.
SHUFFLES = """
#include <metal_stdlib>
uint shuffled(uint x, uint lanes) __attribute__((const));
float shuffled(float x, uint lanes) __attribute__((const));
#define simd_shuffle shuffled
#define simd_shuffle_xor shuffled
"""
RUNS = """
template <bool TWICE, bool CHANGED, typename P, typename M, typename V, typename E>
[[kernel]] void run(
    constant Work<Adam, P, M, V, Float32, E>& given [[buffer(0)]],
    const device Run* g [[buffer(1)]],
    uint thread_index [[thread_position_in_grid]]) {
  Work<Adam, P, M, V, Float32, E> work = given;
  work.changes_gradients = CHANGED;
  work.clears_sums = false;
  uint64_t first = uint64_t(thread_index) * FLATSTEP_RUN;
  work.update_run(first, FLATSTEP_RUN, true, g[0]);
  if (TWICE) {
    work.update_run(first + FLATSTEP_THREADS * FLATSTEP_RUN, FLATSTEP_RUN, true, g[1]);
  }
}
"""

WIDTHS = {"zext", "sext", "trunc", "fpext", "fptrunc", "llvm.fabs.f32"}
# Memory, addresses and branches, and what only names a value.
LEFT_OUT = {"load", "store", "getelementptr", "inttoptr", "br", "phi", "ret", "bitcast"}
LEFT_OUT |= {"extractelement", "insertelement", "shufflevector"}


def compiled(text: str) -> str:
    """LLVM's code, not vectorized, with all inlined."""
    translation = translate(tokenize(compiler._preprocess(text, (), ())))
    flags = ["-O2", "-fno-vectorize", "-fno-slp-vectorize", "-mllvm", "-inline-threshold=100000"]
    command = [*find_clang(), *compiler._FLAT, *flags, "-S", "-emit-llvm", "-o", "-", "-"]
    return subprocess.check_output(command, input=translation.text, text=True)


def counted(code: str, function: str) -> Counter[str]:
    """How often a function has each instruction, or calls each other function."""
    _, after = re.split(rf"\ndefine [^\n]*{function}P.*\n", code)
    line = r"^ +(?:%[\w.]+ = )?(?:tail )?(?:call [^\n@]*@([\w.]+)\(|(\w+) )"
    found = re.findall(line, after.split("\n}")[0], re.MULTILINE)
    return Counter(called or instruction for called, instruction in found)


def counts(given: str) -> tuple[float, float, float, float]:
    """Of an element: arithmetic, widths, shuffles and all."""
    kernels = {f"run_{twice}": f"run, {twice}, {given}" for twice in ("false", "true")}
    code = compiled(SHUFFLES + kernel_text.source() + RUNS + kernel_text.instances(kernels))
    once, twice = (counted(code, f"simulator_enter_{k}") for k in (0, 1))
    more = {name: twice[name] - once[name] for name in twice if name not in LEFT_OUT}
    if "-v" in sys.argv:
        print(more)
    widths = sum(more.get(name, 0) for name in WIDTHS)
    shuffles = sum(number for name, number in more.items() if "shuffled" in name)
    total = sum(more.values())
    return (total - widths - shuffles) / 4, widths / 4, shuffles / 4, total / 4


print(f"{'parameters, m, v':50}arithmetic    widths  shuffles  together")
for storages in STORAGES:
    columns = counts(f"false, {', '.join(storages)}, Absent")
    print(f"{', '.join(storages):50}" + "".join(f"{column:10.2f}" for column in columns))
PLAIN = counts(f"false, {', '.join(STORAGES[0])}, Absent")
MORE = {"gradients scaled or clipped": "true, {}, Absent"}
MORE |= {f"an average, {ema}": f"false, {{}}, {ema}" for ema in ("Float32", "StochasticBfloat16")}
print("what is more, of float32:")
for name, given in MORE.items():
    more = zip(counts(given.format(", ".join(STORAGES[0]))), PLAIN, strict=True)
    print(f"{name:50}" + "".join(f"{column - plain:10.2f}" for column, plain in more))
