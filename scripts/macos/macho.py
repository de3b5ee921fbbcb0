"""What files for macOS say about symbols: reading binaries, writing the text form of a library."""

from functools import cache
from pathlib import Path

import lief

MACOS = Path(__file__).resolve().parents[2] / "build" / "macos"
SDK = MACOS / "sdk"
MLX = MACOS / "site-packages" / "mlx"

LIBMLX = "@rpath/libmlx.dylib"
LIBCXX = "/usr/lib/libc++.1.dylib"
LIBOBJC = "/usr/lib/libobjc.A.dylib"
LIBSYSTEM = "/usr/lib/libSystem.B.dylib"

# Where the loader looks for a symbol for which no library is named: in all that are loaded, or
# among those of its name that may stand in for one another, as each operator new may.
DYNAMIC_LOOKUP = "dynamic lookup"
WEAK_LOOKUP = "weak lookup"
ORDINALS = {-2: DYNAMIC_LOOKUP, -3: WEAK_LOOKUP}


@cache  # keeps the binary for as long as something that was read from it may be in use
def read(path: Path) -> lief.MachO.Binary:
    binaries = lief.MachO.parse(path)
    if binaries is None or binaries.size != 1:
        raise ValueError(f"{path} is not a Mach-O file of one architecture")
    binary = binaries.take(binaries.at(0).header.cpu_type)
    assert binary is not None
    return binary


def exports(binary: lief.MachO.Binary) -> set[str]:
    return {str(symbol.name) for symbol in binary.exported_symbols}


def imports(binary: lief.MachO.Binary) -> dict[str, set[str]]:
    """Names that the loader has to find, under the library it is told to look in."""
    found: dict[str, set[str]] = {str(library.name): set() for library in binary.libraries}
    for binding in binary.bindings:
        ordinal = binding.library_ordinal
        source = binding.library.name if binding.has_library else ORDINALS.get(ordinal, ordinal)
        found.setdefault(str(source), set()).add(str(binding.symbol.name))
    return found


def write_library(path: Path, install_name: str, symbols: set[str], reexports: str = "") -> None:
    """Write a library's text form, which says what it exports and holds no code."""
    targets = "targets: [ arm64-macos ]"
    lines = ["--- !tapi-tbd", "tbd-version: 4", targets, f"install-name: '{install_name}'"]
    if reexports:
        lines += ["reexported-libraries:", f"  - {targets}", f"    libraries: [ '{reexports}' ]"]
    if symbols:
        names = ", ".join(f"'{symbol}'" for symbol in sorted(symbols))
        lines += ["exports:", f"  - {targets}", f"    symbols: [ {names} ]"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "...", ""]), encoding="utf-8")
