"""`python -m simulator build SOURCE.metal -o OUT.so [-I FOLDER] [--no-check]`

Like the compiler of a Metal device: a library, or what is wrong with the source on stderr and a
status that is not zero.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from simulator.clang import ClangNotFoundError
from simulator.compiler import build_file, check
from simulator.errors import CompileError


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulator")
    commands = parser.add_subparsers(required=True)
    building = commands.add_parser("build", help="a shared library out of a .metal file")
    building.add_argument("source", type=Path)
    building.add_argument("-o", dest="output", type=Path, required=True)
    building.add_argument("-I", dest="include_dirs", action="append", default=[])
    building.add_argument("--no-check", action="store_true", help="compile without the checks")
    arguments = parser.parse_args()
    try:
        if not arguments.no_check:
            check(arguments.source, arguments.include_dirs)
        library = build_file(arguments.source, arguments.include_dirs)
    except (ClangNotFoundError, CompileError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    # Whole or not at all: another process may be loading it.
    handle, partial = tempfile.mkstemp(dir=arguments.output.parent)
    os.close(handle)
    shutil.copyfile(library, partial)
    os.replace(partial, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
