"""The GPU kernels as one text: includes resolved, line numbers kept.

Metal compiles the kernels on the user's machine, where there are no headers, so the text that the
extension carries has to be complete. Run without arguments it prints the text; `--cpp PATH` writes
a C++ file that holds it, and `--all-instances` appends every kernel that the engine may ask for,
for a compiler that should see them all.
"""

import argparse
import re
from itertools import product
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent / "metal"
INCLUDE = re.compile(r'#include "([^"]+)"')
# A string literal may be no longer than this in every C++ compiler.
LITERAL_LIMIT = 60_000

RULES = [
    "Adam",
    "Sgd<false, false, false>",
    "Sgd<true, false, false>",
    "Sgd<false, true, false>",
    "Sgd<true, true, false>",
    "Sgd<false, true, true>",
    "Sgd<true, true, true>",
]
DTYPES = ["float", "half", "bfloat"]


def resolved(path: Path, included: set[Path]) -> list[str]:
    """The lines of a file, with those that it includes by name in their place, each file once."""
    path = path.resolve()
    included.add(path)
    lines = [f'#line 1 "{path.name}"']
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), start=1):
        include = INCLUDE.match(line)
        if include:
            header = (path.parent / include[1]).resolve()
            if header not in included:
                lines += resolved(header, included)
            lines.append(f'#line {number + 1} "{path.name}"')
        elif line.strip() == "#pragma once":
            lines.append("")
        else:
            lines.append(line)
    return lines


def source() -> str:
    included: set[Path] = set()
    lines: list[str] = []
    for path in sorted(KERNELS.glob("*.metal")):
        lines += resolved(path, included)
    return "\n".join(lines) + "\n"


def all_instances() -> str:
    """Every kernel that csrc/backend/metal.cpp may ask for."""
    kernels = [(rule, *dtypes) for rule in RULES for dtypes in product(DTYPES, repeat=3)] + [
        ("Copy", dtype, "float", "float") for dtype in DTYPES
    ]
    lines = []
    for number, (kernel, tiles) in enumerate(product(kernels, ("false", "true"))):
        arguments = ", ".join([*kernel, tiles])
        lines.append(f'FLATSTEP_INSTANTIATE("update_{number}", {arguments})')
    return "\n".join(lines) + "\n"


def as_cpp(text: str) -> str:
    pieces = [text[i : i + LITERAL_LIMIT] for i in range(0, len(text), LITERAL_LIMIT)]
    literals = "\n".join(f'R"metal({piece})metal"' for piece in pieces)
    return (
        "// Written by scripts/metal_source.py.\n"
        '#include "backend/metal_source.h"\n\n'
        "namespace flatstep {\n"
        f"const char* const kMetalSource =\n{literals};\n"
        "}  // namespace flatstep\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpp", type=Path, metavar="PATH", help="write a C++ file that holds it")
    parser.add_argument("--all-instances", action="store_true", help="append every kernel")
    arguments = parser.parse_args()
    text = source() + (all_instances() if arguments.all_instances else "")
    if arguments.cpp:
        arguments.cpp.write_text(as_cpp(text))
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
