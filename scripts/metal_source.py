"""The GPU kernels as one text: includes resolved, line numbers kept.

Metal compiles the kernels on the user's machine, where there are no headers, so the text that the
extension carries has to be complete. Run without arguments it prints the text; `--cpp PATH` writes
a C++ file that holds it, and `--all-instances` appends every kernel that the engine may ask for,
for a compiler that should see them all.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
KERNELS = REPOSITORY / "metal"
INCLUDE = re.compile(r'#include "([^"]+)"')
# A string literal may be no longer than this in every C++ compiler.
LITERAL_LIMIT = 60_000
MAX_STATES = 3
# The rule that adds gradients up, for which these are the parameters.
SUMMING = "Accumulate"
# Kernels that no rule has a part in.
WHOLE = ["copy, uint32_t", "copy, uint8_t", "sum_squares, 256", "add_sums, 256"]


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


def rows(header: str, macro: str) -> list[str]:
    """The structs that a header's table of this name lists."""
    text = (REPOSITORY / "csrc" / header).read_text(encoding="ascii")
    _, table = text.split(f"#define {macro}(", 1)
    row, lines = table.split(")", 1)
    return re.findall(rf"\b{row}\((\w+),", re.split(r"[^\\]\n", lines)[0])


def code_storages(rule: str) -> list[str]:
    """Of a rule's states: the second of the table where they are never below zero."""
    text = (REPOSITORY / "csrc" / "rules.h").read_text(encoding="ascii")
    template = re.search(rf"typedef (\w+)<(\d+)> {rule};", text)
    struct, argument = template.groups() if template else (rule, "")
    enum = re.search(
        rf"struct {struct} \{{\s+enum \{{ NUM_STATES = (\w+), UNSIGNED_STATES = (\d+)", text
    )
    if enum is None:
        raise ValueError(f"rules.h has no {struct} that says how many states it has")
    num_states = int(enum[1] if enum[1].isdigit() else argument)
    codes = rows("storage.h", "FLATSTEP_CODE_STORAGES")
    return [codes[int(enum[2]) >> k & 1] for k in range(num_states)]


def update(rule: str, tiles: str, p: str, state: Sequence[str], ema: str = "Absent") -> str:
    """What a rule does not have of state is named float32's."""
    states = [*state, *["Float32"] * (MAX_STATES - len(state))]
    return ", ".join(["update", rule, tiles, p, *states, ema])


def all_instances() -> str:
    """Every kernel that a step may ask for, whose state has one storage, or is in codes.

    State of several storages, which only a flat_update has, takes no other templates, and nor does
    an average beside state that is not float32.
    """
    rules = rows("rules.h", "FLATSTEP_RULES")
    rules.remove(SUMMING)
    storages = rows("storage.h", "FLATSTEP_STORAGES")
    by_chance = rows("storage.h", "FLATSTEP_STOCHASTIC_STORAGES")
    of_parameters = [*storages, *by_chance, *rows("storage.h", "FLATSTEP_SPLIT_STORAGES")]
    of_sums = ["Float32", *by_chance]
    kernels = {f"advance, {rule}": None for rule in [*rules, SUMMING]}
    kernels |= dict.fromkeys(WHOLE)
    for tiles in ("false", "true"):
        kernels |= {update("Copy", tiles, p, []): None for p in storages}
        kernels |= {update(SUMMING, tiles, p, []): None for p in of_sums}
        for rule, p in product(rules, of_parameters):
            codes = code_storages(rule)
            for state in (*([storage] * len(codes) for storage in storages), codes):
                kernels[update(rule, tiles, p, state)] = None
            for ema in of_sums:
                kernels[update(rule, tiles, p, ["Float32"] * len(codes), ema)] = None
    return instances({f"kernel_{number}": kernel for number, kernel in enumerate(kernels)})


def instances(kernels: Mapping[str, str]) -> str:
    """Of names, and the templates with their arguments."""
    lines = [f'FLATSTEP_INSTANTIATE("{name}", {kernel})' for name, kernel in kernels.items()]
    return "\n".join(lines) + "\n"


def as_cpp(text: str) -> str:
    pieces = [text[i : i + LITERAL_LIMIT] for i in range(0, len(text), LITERAL_LIMIT)]
    literals = "\n".join(f'R"metal({piece})metal"' for piece in pieces)
    return (
        "// Written by scripts/metal_source.py.\n"
        '#include "backend/metal_dispatch.h"\n\n'
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
