"""Check an extension module built for macOS: would Python on a Mac load it, and mlx.core accept it?

Prints a line for each property and fails if one does not hold. Nothing is run: the answers are in
the file, in MLX's binaries for macOS and in the SDK's list of symbols, which prepare.py has made.
"""

import ctypes
import hashlib
import json
import posixpath
import re
import struct
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import lief
from macho import (
    DYNAMIC_LOOKUP,
    LIBCXX,
    LIBMLX,
    LIBSYSTEM,
    MLX,
    SDK,
    WEAK_LOOKUP,
    exports,
    imports,
    read,
)

SUPERBLOB, CODE_DIRECTORY = 0xFADE0CC0, 0xFADE0C02


class Finding(NamedTuple):
    topic: str
    holds: bool
    detail: str


@cache
def system_symbols() -> dict[str, set[str]]:
    symbols = json.loads((SDK / "symbols.json").read_text(encoding="utf-8"))
    return {library: set(names) for library, names in symbols.items()}


def all_in(topic: str, names: set[str], known: set[str], where: str) -> Finding:
    others = sorted(names - known)
    if others:
        return Finding(topic, False, f"not {where}: " + " ".join(others[:5]))
    return Finding(topic, True, f"{len(names)}, all {where}")


def is_python_api(name: str) -> bool:
    return name.startswith(("_Py", "__Py")) and hasattr(ctypes.pythonapi, name[1:])


def c_strings(binary: lief.MachO.Binary) -> set[bytes]:
    return set(bytes(binary.get_section("__cstring").content).split(b"\0"))


def nanobind_key(strings: set[bytes]) -> set[str]:
    return {s.decode() for s in strings if re.fullmatch(rb"nanobind_\w+_v\d+", s)}


def check_header(binary: lief.MachO.Binary, module: str) -> Iterator[Finding]:
    kind = f"{binary.header.cpu_type.name} {binary.header.file_type.name}"
    yield Finding("architecture", kind == "ARM64 BUNDLE", kind)

    version = binary.build_version
    minimum = ".".join(map(str, version.minos[:2]))
    holds = version.platform.name == "MACOS" and minimum == "14.0"
    yield Finding("oldest system", holds, f"{version.platform.name} {minimum}")

    entries = exports(binary)
    yield Finding("exports", entries == {f"_PyInit_{module}"}, " ".join(sorted(entries)))


def check_libraries(binary: lief.MachO.Binary) -> Iterator[Finding]:
    libraries = {str(library.name) for library in binary.libraries}
    known = {LIBMLX, *system_symbols()}
    finding = all_in("libraries", libraries, known, "MLX's or also linked by it")
    required = {LIBMLX, LIBCXX, LIBSYSTEM}
    yield finding._replace(holds=finding.holds and required <= libraries)

    # Both packages lie in site-packages, side by side.
    rpaths = [str(rpath.path) for rpath in binary.rpaths]
    reached = [posixpath.normpath(path.replace("@loader_path", "flatstep")) for path in rpaths]
    yield Finding("rpath", reached == ["mlx/lib"], " ".join(rpaths) or "none")


def check_imports(binary: lief.MachO.Binary) -> Iterator[Finding]:
    imported = imports(binary)
    from_mlx = imported.pop(LIBMLX, set())
    exported = exports(read(MLX / "lib/libmlx.dylib"))
    yield all_in("MLX's symbols", from_mlx, exported, "in libmlx.dylib")

    anywhere = imported.pop(DYNAMIC_LOOKUP, set())
    api = {name for name in anywhere if is_python_api(name)}
    yield all_in("dynamic lookup", anywhere, api, "of CPython's API")

    weak = imported.pop(WEAK_LOOKUP, set()) - exports(binary)
    cxx = imported.pop(LIBCXX, set()) | weak
    yield all_in("libc++'s symbols", cxx, system_symbols()[LIBCXX], "in macOS 14.0")

    # The linker has found these in ziglang's list, and the headers say since when they are there.
    imported.pop(LIBSYSTEM, None)
    others = {f"{library}:{name}" for library, names in imported.items() for name in names}
    known = {f"{library}:{name}" for library, names in system_symbols().items() for name in names}
    yield all_in("frameworks' symbols", others, known, "also imported by MLX")


def check_nanobind(binary: lief.MachO.Binary) -> Iterator[Finding]:
    strings = c_strings(binary)
    (core,) = MLX.glob("core.*-darwin.so")
    key, expected = nanobind_key(strings), nanobind_key(c_strings(read(core)))
    yield Finding("nanobind's key", len(key) == 1 and key == expected, " ".join(key))
    # A string of its own in the file: the name under which modules share their types.
    yield Finding("nanobind's domain", b"mlx" in strings, "mlx" if b"mlx" in strings else "not mlx")


def check_signature(binary: lief.MachO.Binary, content: bytes) -> Finding:
    """On arm64 the kernel ends a process that touches a page whose hash is not the signed one."""
    topic = "signature"
    if not binary.has_code_signature:
        return Finding(topic, False, "none")
    start = binary.code_signature.data_offset
    magic, _, count = struct.unpack_from(">3I", content, start)
    if magic != SUPERBLOB:
        return Finding(topic, False, f"unknown format {magic:#x}")
    for i in range(count):
        at = start + struct.unpack_from(">I", content, start + 16 + 8 * i)[0]
        if struct.unpack_from(">I", content, at)[0] == CODE_DIRECTORY:
            hashes, _, _, pages, limit = struct.unpack_from(">5I", content, at + 16)
            size, _, _, page_bits = struct.unpack_from(">4B", content, at + 36)
            break
    else:
        return Finding(topic, False, "no code directory")
    wrong = []
    for page in range(pages):
        code = content[page << page_bits : min((page + 1) << page_bits, limit)]
        signed = content[at + hashes + page * size :][:size]
        if hashlib.sha256(code).digest() != signed:
            wrong.append(str(page))
    whole = limit == start and pages == -(-limit >> page_bits)
    if wrong or not whole:
        return Finding(topic, False, "wrong pages: " + " ".join(wrong))
    return Finding(topic, True, f"ad hoc, the hashes of {pages} pages are right")


def check(path: Path) -> list[Finding]:
    binary = read(path)
    return [
        *check_header(binary, path.name.split(".")[0]),
        *check_libraries(binary),
        *check_imports(binary),
        *check_nanobind(binary),
        check_signature(binary, path.read_bytes()),
    ]


if __name__ == "__main__":
    findings = check(Path(sys.argv[1]))
    for finding in findings:
        print(f"{'ok' if finding.holds else 'FAIL':<6}{finding.topic:<21}{finding.detail}")
    sys.exit(not all(finding.holds for finding in findings))
