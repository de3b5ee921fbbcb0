"""Put into build/macos what a build for macOS on arm64 needs on Linux: MLX's wheels, tools, an SDK.

clang and LLD are those in the packages ziglang and iree-base-compiler, the headers of C and libc++
those of ziglang. An SDK also says which symbols the system's libraries have. For libSystem ziglang
knows. For the others MLX is the witness: its binaries run on macOS 14.0, so what they import is
there. Nothing else is, but for the names in `ALSO_THERE`: a build that needs more does not link.
"""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import ziglang
from iree.compiler import _mlir_libs
from macho import (
    LIBCXX,
    LIBOBJC,
    LIBSYSTEM,
    MACOS,
    MLX,
    SDK,
    WEAK_LOOKUP,
    exports,
    imports,
    read,
    write_library,
)

FRAMEWORKS = SDK / "System/Library/Frameworks"
ZIG = Path(ziglang.__file__).parent
LLD = Path(_mlir_libs.__file__).parent / "iree-lld"
PYTHON_VERSION = "{}.{}".format(*sys.version_info)

# Symbols of the system that a build may use though MLX does not. The linker names those that are
# missing. Of libc++, what LLVM 16 exports, which is what macOS 14.0 has.
ALSO_THERE = {
    LIBCXX: [
        "__ZNSt3__19to_stringEl",  # std::to_string(long)
        "__ZTINSt3__112system_errorE",
        "__ZdlPvm",  # operator delete with a size, and with an alignment as well
        "__ZdlPvmSt11align_val_t",
    ],
}

CONFIG_SITE = "usr/include/c++/v1/__config_site"

# libc++ as Apple configures it. With the availability annotations its headers use no more than what
# the oldest supported macOS has; ziglang, which brings a libc++ of its own, turns them off.
LIBCXX_CONFIGURATION = """\
#pragma once
#define _LIBCPP_ABI_VERSION 1
#define _LIBCPP_ABI_NAMESPACE __1
#define _LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS 1
#define _LIBCPP_HAS_THREADS 1
#define _LIBCPP_HAS_MONOTONIC_CLOCK 1
#define _LIBCPP_HAS_MUSL_LIBC 0
#define _LIBCPP_HAS_TERMINAL 1
#define _LIBCPP_HAS_FILESYSTEM 1
#define _LIBCPP_HAS_RANDOM_DEVICE 1
#define _LIBCPP_HAS_LOCALIZATION 1
#define _LIBCPP_HAS_UNICODE 1
#define _LIBCPP_HAS_WIDE_CHARACTERS 1
#define _LIBCPP_PSTL_BACKEND_SERIAL
#define _LIBCPP_HARDENING_MODE_DEFAULT _LIBCPP_HARDENING_MODE_NONE
#define _LIBCPP_ASSERTION_SEMANTIC_DEFAULT _LIBCPP_ASSERTION_SEMANTIC_IGNORE
"""

# The part of Apple's headers that metal-cpp includes and ziglang does not have.
HEADERS = {
    "CoreFoundation/CoreFoundation.h": """\
#pragma once
#include <Availability.h>
#include <TargetConditionals.h>
#include <stdint.h>
#include <sys/types.h>
typedef double CFTimeInterval;
""",
    "IOSurface/IOSurfaceRef.h": """\
#pragma once
typedef struct __IOSurface* IOSurfaceRef;
""",
}


def write(path: Path, text: str, *, executable: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if executable:
        path.chmod(0o755)


def write_link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def link_entries(folder: Path, source: Path) -> None:
    """Make `folder` look like `source`, with room for further files."""
    for entry in source.iterdir():
        write_link(folder / entry.name, entry)


def download_mlx() -> None:
    version = importlib.metadata.version("mlx")
    wheels = MACOS / "wheels"
    command = [sys.executable, "-m", "pip", "-qq", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--platform", "macosx_14_0_arm64", "--python-version", PYTHON_VERSION]
    command += ["--dest", str(wheels), f"mlx=={version}", f"mlx-metal=={version}"]
    subprocess.run(command, check=True)
    # The folder keeps what was downloaded for other versions of Python.
    tag = "cp" + PYTHON_VERSION.replace(".", "")
    for name in (f"mlx-{version}-{tag}-*.whl", f"mlx_metal-{version}-*.whl"):
        for wheel in wheels.glob(name):
            zipfile.ZipFile(wheel).extractall(MLX.parent)
    # MLX's targets name the frameworks in the SDK that they were linked with.
    targets = MLX / "share/cmake/MLX/MLXTargets.cmake"
    targets.write_text(re.sub(r"/Applications/[^;\"]+?\.sdk(?=/)", str(SDK), targets.read_text()))


def write_tools() -> None:
    clang = f"{ZIG}/zig clang --driver-mode=g++ -resource-dir {ZIG}/lib"
    commands = {
        "clang++": f"{clang} -include {SDK}/{CONFIG_SITE}",
        "ar": f"{ZIG}/zig ar",
        "ranlib": f"{ZIG}/zig ranlib",
        "ld64.lld": f"{LLD} -flavor darwin",
    }
    for name, command in commands.items():
        write(MACOS / "bin" / name, f'#!/bin/sh\nexec {command} "$@"\n', executable=True)


def write_headers() -> None:
    include = SDK / "usr/include"
    link_entries(include, ZIG / "lib/libc/include/any-darwin-any")
    link_entries(include / "c++/v1", ZIG / "lib/libcxx/include")
    link_entries(include / "c++/v1", ZIG / "lib/libcxxabi/include")
    write(SDK / CONFIG_SITE, LIBCXX_CONFIGURATION)
    for path, text in HEADERS.items():
        framework, header = path.split("/")
        write(FRAMEWORKS / f"{framework}.framework/Headers/{header}", text)


def system_symbols() -> dict[str, set[str]]:
    """The system's libraries that MLX links, and the symbols that it or `ALSO_THERE` names."""
    binaries = [read(path) for path in [*MLX.glob("*.so"), *MLX.glob("lib/*.dylib")]]
    symbols = {library: set(names) for library, names in ALSO_THERE.items()}
    for binary in binaries:
        for library, names in imports(binary).items():
            symbols.setdefault(library, set()).update(names)
    # What any library may define, such as operator new, and none of MLX's does, is libc++'s.
    symbols[LIBCXX] |= symbols[WEAK_LOOKUP].difference(*map(exports, binaries))
    return {library: names for library, names in symbols.items() if library.startswith("/")}


def write_libraries() -> None:
    symbols = system_symbols()
    listed = {library: sorted(names) for library, names in symbols.items()}
    write(SDK / "symbols.json", json.dumps(listed, indent=1))
    # This list is that of a later macOS, but the C headers say what 14.0 does not have yet.
    write_link(SDK / "usr/lib/libSystem.tbd", ZIG / "lib/libc/darwin/libSystem.tbd")
    del symbols[LIBSYSTEM]
    for library, names in symbols.items():
        name = Path(library).name
        if "/Frameworks/" in library:
            reexports = LIBOBJC if name == "Foundation" else ""
            path = FRAMEWORKS / f"{name}.framework/{name}.tbd"
            write_library(path, library, names, reexports)
        else:
            path = SDK / "usr/lib" / f"{name.removesuffix('.dylib')}.tbd"
            write_library(path, library, names)
            write_link(path.with_name(name.split(".")[0] + ".tbd"), path)


def write_python() -> None:
    """Copy CPython's headers: the same on all systems, but for one that says what there is."""
    include = Path(sysconfig.get_path("include"))
    shutil.copytree(include, MACOS / "python")
    # Debian keeps that one apart, for each architecture.
    multiarch = include.parent / str(sysconfig.get_config_var("MULTIARCH")) / include.name
    config = next(p for p in (multiarch / "pyconfig.h", include / "pyconfig.h") if p.exists())
    write(MACOS / "python/pyconfig.h", config.read_text() + "\n#undef HAVE_CRYPT_H\n")


if __name__ == "__main__":
    for made in (MLX.parent, SDK, MACOS / "bin", MACOS / "python", MACOS / "build"):
        shutil.rmtree(made, ignore_errors=True)
    download_mlx()
    write_tools()
    write_headers()
    write_libraries()
    write_python()
    settings = {"CanonicalName": "macosx14.0", "Version": "14.0", "MaximumDeploymentTarget": "14.0"}
    write(SDK / "SDKSettings.json", json.dumps(settings))
