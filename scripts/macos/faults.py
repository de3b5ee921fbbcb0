"""See that the check for macOS finds what it is there for: give the module faults, one at a time.

Some come about as they would, by linking the objects of the build again; some are written into the
finished file. Each has to show in the property it belongs to, and in no other.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from check import check
from macho import LIBCXX, LIBMLX, LIBOBJC, MACOS, write_library

BUILD = MACOS / "build"
NINJA = Path(sys.executable).with_name("ninja")

IS_NAX_AVAILABLE = "__ZN3mlx4core5metal16is_nax_availableEv"
GET_BLOCK_DIMS = "__ZN3mlx4core14get_block_dimsEiiii"
HASH_MEMORY = "__ZNSt3__113__hash_memoryEPKvm"  # since LLVM 21
RPATH = "-Wl,-rpath,@loader_path/../mlx/lib"
NEEDED = "-Wl,-needed_library,{folder}/library.tbd"
LOOKUP = "-Wl,-undefined,dynamic_lookup"

FROM_CHARS = """
#include <charconv>
auto parse(const char* begin, const char* end, double& value) {
  return std::from_chars(begin, end, value);
}
"""


class Linked(NamedTuple):
    name: str
    found_in: str
    uses: str = ""  # a symbol ...
    exported_by: str = ""  # ... that a library of this name has
    replace: tuple[str, str] = ("", "")  # in the command that links
    options: str = ""


class Written(NamedTuple):
    name: str
    found_in: str
    old: bytes
    new: bytes


LINKED = [
    Linked("a function that MLX only declares", "link", IS_NAX_AVAILABLE),
    Linked("another one", "link", GET_BLOCK_DIMS),
    Linked("the first, left to dynamic lookup", "dynamic lookup", IS_NAX_AVAILABLE, options=LOOKUP),
    Linked("the first, from another MLX", "MLX's symbols", IS_NAX_AVAILABLE, LIBMLX),
    Linked("a symbol of a later libc++", "link", HASH_MEMORY),
    Linked("the same, from a later SDK", "libc++'s symbols", HASH_MEMORY, LIBCXX),
    Linked("a framework's unknown symbol", "frameworks' symbols", "_f", LIBOBJC),
    Linked("a library from elsewhere", "libraries", "", "/opt/lib/libf.dylib", options=NEEDED),
    Linked("a later macOS", "oldest system", replace=("-min=14.0", "-min=15.0")),
    Linked("no rpath", "rpath", replace=(RPATH, "")),
    Linked("a wrong rpath", "rpath", replace=("@loader_path/../mlx", "@loader_path/mlx")),
    Linked("no signature", "signature", options="-Wl,-no_adhoc_codesign"),
]
WRITTEN = [
    Written("a damaged page", "signature", b"Hyper", b"hyper"),
    Written("a nanobind of another version", "nanobind's key", b"_a1_v22\0", b"_a1_v21\0"),
    Written("a domain of its own", "nanobind's domain", b"\0mlx\0", b"\0own\0"),
    Written("another entry point", "exports", b"_PyInit__ext\0", b"_PyInit_next\0"),
    Written("code for Intel", "architecture", b"\x0c\0\0\1", b"\7\0\0\1"),
]


def run(command: str, source: str = "") -> str:
    """Run a command in the build folder; return what it complains of."""
    pipes = {"input": source, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, shell=True, cwd=BUILD, text=True, **pipes)
    return "" if done.returncode == 0 else done.stdout


def compile_source(source: str, to: Path) -> str:
    target = f"--target=arm64-apple-macos14.0 -isysroot {MACOS}/sdk -std=gnu++20"
    return run(f"{MACOS}/bin/clang++ {target} -c -x c++ - -o {to}", source)


def link(fault: Linked, command: str, to: Path) -> str:
    words = [command.replace(*fault.replace), fault.options.format(folder=to.parent)]
    if fault.uses:
        declaration = f'extern "C" int f() asm("{fault.uses}");'
        use = "__attribute__((used)) static auto* g = &f;"
        compile_source(f"{declaration}\n{use}\n", to.with_name("use.o"))
        words.append(str(to.with_name("use.o")))
    if fault.exported_by:
        library = to.with_name("library.tbd")
        write_library(library, fault.exported_by, {fault.uses})
        words.append(str(library))
    return run(f"{' '.join(words)} -o {to}")


def find(fault: Linked | Written, module: Path, command: str, copy: Path) -> set[str]:
    """Where the fault shows."""
    if isinstance(fault, Linked):
        complaint = link(fault, command, copy)
        if complaint:
            assert not fault.uses or "undefined symbol" in complaint, complaint
            return {"link"}
        return {finding.topic for finding in check(copy) if not finding.holds}
    content = module.read_bytes()
    assert fault.old in content, f"nothing to change for {fault.name}"
    copy.write_bytes(content.replace(fault.old, fault.new, 1))
    found = {finding.topic for finding in check(copy) if not finding.holds}
    return found if fault.found_in == "signature" else found - {"signature"}


def main(module: Path) -> int:
    listed = [NINJA, "-C", BUILD, "-t", "commands", "-s", module.name]
    command = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
    command = re.sub(r" -o \S+", "", command.strip().removeprefix(": && ").removesuffix(" && :"))
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        complaint = compile_source(FROM_CHARS, Path(folder) / "from_chars.o")
        found = {"compile"} if "is unavailable: introduced in macOS" in complaint else set()
        seen = [("a function of a later libc++", "compile", found)]
        for i, fault in enumerate([*LINKED, *WRITTEN]):
            copy = Path(folder) / str(i) / module.name
            copy.parent.mkdir()
            found = find(fault, module, command, copy)
            seen.append((fault.name, fault.found_in, found))
    for name, expected, found in seen:
        right = found == {expected}
        missed += not right
        print(f"{'ok' if right else 'FAIL':<6}{name:<36}found in: {', '.join(found) or 'nothing'}")
    return missed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])) > 0)
