"""From MSL to a shared library: preprocess, check, translate, compile by clang, link with the
runtime, which the system's C++ compiler makes once. Everything is cached by its content."""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from simulator.clang import find_clang
from simulator.errors import CompileError
from simulator.library import Library
from simulator.lint import lint_characters, lint_kernels, lint_text, recursive_functions
from simulator.tokens import Token, tokenize
from simulator.translate import Translation, translate

HERE = Path(__file__).parent
SHIM = HERE / "shim"
RUNTIME_SOURCES = (
    "bindings.cpp",
    "callbacks.cpp",
    "fiber.cpp",
    "memory_check.cpp",
    "runtime.cpp",
    "threadgroup.cpp",
)

# The name that Metal gives to source that came as text.
TEXT_NAME = "program_source"

_COMMON = [
    "-nostdinc",
    "-DSIMULATOR_COMPILES",
    f"-I{SHIM}",
    "-Wno-unknown-attributes",
    "-Wno-unknown-pragmas",
    "-Wno-unused",
    "-Werror=global-constructors",
    "-Werror=return-type",
    # half and bfloat round after each operation.
    *("-Xclang", "-ffloat16-excess-precision=none"),
    *("-Xclang", "-fbfloat16-excess-precision=none"),
    "-ffp-contract=off",
]
_FLAT = ["-x", "c++", "-std=c++17", "-nostdinc++", "-fno-exceptions", "-fno-rtti", *_COMMON]
_STRICT = [
    *("-x", "cl", "-cl-std=clc++2021", "-cl-no-stdinc", "-cl-single-precision-constant"),
    "-Xclang",
    "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space,+__cl_clang_function_pointers",
    *_COMMON,
]
# A call before every load and store, copies of structs too; nothing is vectorized or left out.
_CHECKED = [
    "-fsanitize=kernel-address",
    *("-mllvm", "-asan-instrumentation-with-call-threshold=0"),
    *("-mllvm", "-asan-kernel-mem-intrinsic-prefix=1"),
    *("-mllvm", "-asan-mapping-scale=4"),  # tell 16 bytes that are aligned from those that are not
    *("-mllvm", "-asan-opt=0"),
    *("-mllvm", "-asan-globals=0"),
    *("-mllvm", "-asan-stack=0"),
    "-fno-vectorize",
    "-fno-slp-vectorize",
    # Arrays of a thread's own, and what on a CPU would end the process.
    "-fsanitize=array-bounds,integer-divide-by-zero,signed-integer-overflow",
]
_OBJECT = ["-O2", "-gline-tables-only", "-fdebug-compilation-dir=.", "-fPIC", "-fvisibility=hidden"]


def cache_folder() -> Path:
    return Path(os.environ.get("FLATSTEP_SIMULATOR_CACHE", HERE.parents[2] / "build/simulator"))


def build(
    source: str | Path,
    include_dirs: Sequence[str | Path] = (),
    defines: Iterable[str] = (),
    fast_math: bool = False,
) -> Library:
    """The library of a .metal file, or of text (a string with a newline). Raises CompileError.

    With fast math the compiler may rearrange, contract, and take it that there is no NaN.
    """
    return Library(build_file(source, include_dirs, defines, fast_math))


def check(
    source: str | Path,
    include_dirs: Sequence[str | Path] = (),
    defines: Iterable[str] = (),
    warnings_are_errors: bool = False,
) -> None:
    """Raises CompileError with all that is wrong: address spaces, bfloat's conversions, lint."""
    preprocessed = _preprocess(source, include_dirs, defines)
    warnings = ["-Wall", "-Wextra", "-Wunused", "-Werror"] if warnings_are_errors else []
    stamp = cache_folder() / f"checked-{_digest(preprocessed, *_read(source), *warnings)}"
    if stamp.exists():
        return
    tokens = tokenize(preprocessed)
    findings = lint_characters(tokens, *_read(source)) + lint_text(tokens)
    try:
        translation = translate(tokens)
        findings += lint_kernels(translation.kernels, translation.entries)
        findings += _compile_checks(translation, warnings)
    except CompileError as error:
        findings.append(str(error))
    if findings:
        raise CompileError("\n".join(dict.fromkeys(f.rstrip() for f in findings)))
    _publish(stamp, lambda path: path.touch())


def build_file(
    source: str | Path,
    include_dirs: Sequence[str | Path] = (),
    defines: Iterable[str] = (),
    fast_math: bool = False,
) -> Path:
    """As `build`, but only the path of the shared library."""
    preprocessed = _preprocess(source, include_dirs, defines)
    math = ["-ffast-math", "-ffp-contract=fast"] if fast_math else []
    library = cache_folder() / f"kernels-{_digest(preprocessed, *math)}.so"
    if not library.exists():
        translation = translate(tokenize(preprocessed))
        if not translation.entries:
            raise CompileError(f"{_read(source)[0]}: error: there is no kernel in it")
        _publish(library, lambda path: _compile_library(translation, math, path))
    return library


# ---- Steps ----


def _read(source: str | Path) -> tuple[str, str]:
    """Name and text."""
    if isinstance(source, str) and "\n" in source:
        return TEXT_NAME, source
    return str(source), Path(source).read_text(encoding="utf-8")


def _preprocess(
    source: str | Path, include_dirs: Sequence[str | Path], defines: Iterable[str]
) -> str:
    """The shim's headers are empty here, so that what comes back is the kernels' own text."""
    name, text = _read(source)
    include_dirs = [*include_dirs, *([] if name == TEXT_NAME else [Path(name).parent])]
    command = [*find_clang(), "-E", "-x", "c++", "-std=c++17", "-nostdinc", "-undef"]
    command += ["-D__METAL_VERSION__=310", "-D__METAL__=1", "-D__METAL_MACOS__=1", f"-I{SHIM}"]
    command += [f"-I{folder}" for folder in include_dirs] + [f"-D{d}" for d in defines] + ["-"]
    return _run(command, stdin=f'#line 1 "{name}"\n{text}').stdout


def _compile_checks(translation: Translation, warnings: list[str]) -> list[str]:
    """The strict dialect, and bfloat as a class, whose code also shows who calls whom."""
    clang = find_clang()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernels")
        file.write_text(translation.text)
        strict = _start([*clang, *_STRICT, *warnings, "-fsyntax-only", str(file)])
        bfloat = [
            *_FLAT,
            *warnings,
            "-DSIMULATOR_BFLOAT_CLASS",
            "-O0",
            "-S",
            "-emit-llvm",
            "-o",
            "-",
        ]
        flat = _start([*clang, *bfloat, str(file)])
        findings = []
        for process in (strict, flat):
            out, errors = process.communicate()
            if process.returncode != 0:
                findings.append(errors)
            elif process is flat:
                names = recursive_functions(out)
                findings += [f"error: MSL has no recursion: {_demangled(n)}" for n in names]
    return findings


def _compile_library(translation: Translation, math: list[str], library: Path) -> None:
    machine = platform.machine()
    # Without these, half and fma are calls into libraries.
    target = ["-mfma", "-mf16c"] if machine == "x86_64" else []
    with tempfile.TemporaryDirectory() as folder:
        file, kernels = Path(folder, "kernels"), Path(folder, "kernels.o")
        file.write_text(translation.text)
        flags = [*_FLAT, *_CHECKED, *_OBJECT, *target, *math, "-c"]
        _run([*find_clang(), *flags, str(file), "-o", str(kernels)])
        link = ["-shared", "-Wl,--no-undefined", f"-Wl,--version-script={HERE / 'exports.map'}"]
        link += [str(kernels), *map(str, _runtime()), "-o", str(library), "-lm"]
        _run([*_cxx(), *link])


def _runtime() -> list[Path]:
    """The objects of the runtime, compiled once."""
    headers = sorted(HERE.glob("*.h"))
    texts = [p.read_text() for p in (*headers, *(HERE / s for s in RUNTIME_SOURCES))]
    folder = cache_folder() / f"runtime-{_digest(*_cxx(), *texts)}"
    if not folder.exists():
        _publish(folder, _compile_runtime)
    return [folder / f"{Path(s).stem}.o" for s in RUNTIME_SOURCES]


def _compile_runtime(folder: Path) -> None:
    folder.mkdir()
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-c"]
    running = []
    for source in RUNTIME_SOURCES:
        output = folder / f"{Path(source).stem}.o"
        running.append(_start([*_cxx(), *flags, str(HERE / source), "-o", str(output)]))
    for process in running:
        _, errors = process.communicate()
        if process.returncode != 0:
            raise CompileError(errors)


# ---- Small things ----


def _cxx() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def _start(command: list[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def _run(command: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CompileError(result.stderr)
    return result


def _digest(*parts: str) -> str:
    """Of the parts, the compiler, and everything here that shapes the result."""
    shared = [p.read_text() for p in sorted([*SHIM.rglob("*"), *HERE.glob("*.*")]) if p.is_file()]
    content = "\0".join([*parts, *find_clang(), *_cxx(), *shared])
    return hashlib.sha256(content.encode()).hexdigest()[:20]


def _publish(path: Path, make: Callable[[Path], None]) -> None:
    """Makes `path` whole or not at all, whichever of several processes is first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix="making-"))
    try:
        make(folder / path.name)
        try:
            os.rename(folder / path.name, path)
        except OSError:
            if not path.exists():  # another process was first: folders are not replaced
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _demangled(name: str) -> str:
    """Good enough for a message: the identifiers of an Itanium name, without a library's help."""
    parts, rest = [], name
    while match := re.search(r"(\d+)(?=[A-Za-z_])", rest):
        length = int(match[1])
        parts.append(rest[match.end() : match.end() + length])
        rest = rest[match.end() + length :]
        if not rest[:1].isdigit():
            break
    return "::".join(parts) or name


__all__ = ["Token", "build", "build_file", "cache_folder", "check"]
