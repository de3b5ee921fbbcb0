"""Rewrites what MSL has and C++ cannot spell, and nothing else: attributes, kernels' entry points,
explicit instantiations with a host name, threadgroup variables, vector constructors, literals.

The result includes the shim, the kernels' text with its own lines, and one entry function and one
table of parameters for each kernel.
"""

import re
from dataclasses import dataclass, field

from simulator.errors import CompileError
from simulator.tokens import (
    Token,
    attributes,
    blank,
    end_of_angles,
    end_of_bracket,
    enumerators,
    function_bodies,
    is_variable,
    render,
    split_at_commas,
    words,
)

# In the order of the runtime's positions (Threadgroup::make_call).
ATTRIBUTES = (
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_grid",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "dispatch_threads_per_threadgroup",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "threads_per_simdgroup",
    "simdgroups_per_threadgroup",
    "thread_execution_width",
)
_VECTOR = re.compile(r"(?:u?(?:char|short|int|long)|half|bfloat|float|bool)[234]")
_FLOAT = re.compile(r"(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?")
_HALF = re.compile(r"([\d.]+(?:[eE][+-]?\d+)?)(h|H|bf|BF)")


@dataclass
class Parameter:
    kind: str  # "buffer", "threadgroup" or "position"
    index: int
    declaration: str
    place: str


@dataclass
class Kernel:
    name: str
    host_name: str
    is_template: bool
    parameters: list[Parameter]
    place: str
    body: tuple[int, int]


@dataclass
class Entry:
    """A kernel by its host name, and the expression that is the function."""

    host_name: str
    expression: str
    kernel: Kernel


@dataclass
class Translation:
    text: str
    entries: list[Entry]
    kernels: list[Kernel] = field(default_factory=list)


def translate(tokens: list[Token]) -> Translation:
    """Changes `tokens`. Raises CompileError where the text cannot be understood."""
    instantiations = _take_instantiations(tokens)
    kernels = _find_kernels(tokens)
    _rewrite_threadgroup_variables(tokens, kernels)
    for start, end in attributes(tokens):
        blank(tokens[start:end])
    for token in tokens:
        if token.text == "kernel":
            token.text = ""
    _blank_method_qualifiers(tokens)
    _rewrite_vectors(tokens)
    _rewrite_literals(tokens)
    entries = [Entry(k.host_name, k.name, k) for k in kernels if not k.is_template]
    entries += _entries(instantiations, kernels)
    text = "\n".join(["#include <metal_stdlib>", render(tokens), *_entry_points(entries)])
    return Translation(text + "\n", entries, kernels)


# ---- Explicit instantiations ----


@dataclass
class _Instantiation:
    host_name: str
    expression: str
    kernel_name: str
    place: str


def _take_instantiations(tokens: list[Token]) -> list[_Instantiation]:
    """`template [[host_name("x")]] [[kernel]] ...;`, which are blanked."""
    found = []
    for i, token in enumerate(tokens):
        if token.text != "template" or tokens[i + 1].text == "<":
            continue
        if i and tokens[i - 1].text in (".", "->", "::"):
            continue
        end = next(k for k in range(i, len(tokens)) if tokens[k].text in (";", ""))
        found.append(_instantiation(tokens[i:end], token.place))
        blank(tokens[i : end + 1])
    return found


def _instantiation(tokens: list[Token], place: str) -> _Instantiation:
    host_name = _host_name(tokens)
    if host_name is None:
        raise CompileError(f"{place}: error: an explicit instantiation without a host_name")
    plain = [t for t in _without_attributes(tokens[1:]) if t.text != "kernel"]
    # What is left out is the return type, or a decltype, after which the name comes again.
    plain = plain[end_of_bracket(plain, 1) if plain[0].text == "decltype" else 1 :]
    less = next((k for k, t in enumerate(plain) if t.text == "<"), None)
    if less is None:
        raise CompileError(f"{place}: error: instantiate a kernel with its template arguments")
    return _Instantiation(
        host_name, words(plain[: end_of_angles(plain, less)]), plain[less - 1].text, place
    )


def _entries(instantiations: list[_Instantiation], kernels: list[Kernel]) -> list[Entry]:
    by_name = {k.name: k for k in kernels}
    entries = []
    for one in instantiations:
        if one.kernel_name not in by_name:
            raise CompileError(f"{one.place}: error: {one.kernel_name} is not a kernel")
        entries.append(Entry(one.host_name, one.expression, by_name[one.kernel_name]))
    return entries


def _host_name(tokens: list[Token]) -> str | None:
    """Adjacent literals are one, as in C++."""
    for i, token in enumerate(tokens):
        if token.text == "host_name":
            literals = tokens[i + 2 : end_of_bracket(tokens, i + 1) - 1]
            return "".join(t.text.strip('"') for t in literals)
    return None


def _without_attributes(tokens: list[Token]) -> list[Token]:
    inside = {i for start, end in attributes(tokens) for i in range(start, end)}
    return [t for i, t in enumerate(tokens) if i not in inside and t.text]


# ---- Kernels ----


def _find_kernels(tokens: list[Token]) -> list[Kernel]:
    kernels = []
    values = enumerators(tokens)
    bodies = function_bodies(tokens)
    for body in bodies:
        start = body[0]
        while start and tokens[start - 1].text not in (";", "}", "{"):
            start -= 1
        head = tokens[start : body[0]]
        if any(t.text == "kernel" for t in head):
            kernels.append(_kernel(head, body, values))
    return kernels


def _kernel(head: list[Token], body: tuple[int, int], values: dict[str, int]) -> Kernel:
    host_name = _host_name(head)
    is_template = head[0].text == "template"
    start = end_of_angles(head, 1) if is_template else 0
    plain = _without_attributes(head[start:])
    paren = next(i for i, t in enumerate(plain) if t.text == "(")
    name = plain[paren - 1]
    first = head.index(name) + 1
    inside = head[first + 1 : end_of_bracket(head, first) - 1]
    parameters = [_parameter(part, name.text, values) for part in split_at_commas(inside)]
    return Kernel(name.text, host_name or name.text, is_template, parameters, name.place, body)


def _parameter(tokens: list[Token], kernel: str, values: dict[str, int]) -> Parameter:
    declaration = words(_without_attributes(tokens))
    place = tokens[0].place
    for start, end in attributes(tokens):
        inside = [t.text for t in tokens[start + 2 : end - 2]]
        if inside[0] in ("buffer", "threadgroup"):
            terms = "".join(inside[2:-1]).split("+")
            terms = [str(values.get(term, term)) for term in terms]
            if not all(term.isdigit() for term in terms):
                raise CompileError(
                    f"{place}: error: kernel {kernel}: the index of '{declaration}' is no sum of "
                    "literals and enumerators"
                )
            return Parameter(inside[0], sum(map(int, terms)), declaration, place)
        if inside[-1] in ATTRIBUTES:
            return Parameter("position", ATTRIBUTES.index(inside[-1]), declaration, place)
        raise CompileError(
            f"{place}: error: kernel {kernel}: the simulator does not know [[{''.join(inside)}]]"
        )
    raise CompileError(f"{place}: error: kernel {kernel}: '{declaration}' has no attribute")


# ---- Inside of functions ----


def _rewrite_threadgroup_variables(tokens: list[Token], kernels: list[Kernel]) -> None:
    """`threadgroup float a[32];` becomes a reference to memory that the runtime hands out."""
    count = 0
    for start, end in (kernel.body for kernel in kernels):
        i = start
        while i < end:
            if tokens[i].text == "threadgroup" and tokens[i - 1].text in ("{", "}", ";"):
                semicolon = next(k for k in range(i, end) if tokens[k].text == ";")
                count = _rewrite_variable(tokens[i:semicolon], count)
                i = semicolon
            i += 1


def _rewrite_variable(tokens: list[Token], count: int) -> int:
    if not is_variable(tokens):
        return count
    if any(t.text == "=" for t in tokens):
        raise CompileError(f"{tokens[0].place}: error: a threadgroup variable has no initializer")
    first, *others = split_at_commas(tokens[1:])
    bracket = next((k for k, t in enumerate(first) if t.text == "["), len(first))
    base, first = words(first[: bracket - 1]), first[bracket - 1 :]
    code = ""
    for declarator in (first, *others):
        name, extents = declarator[0].text, words(declarator[1:])
        kind = f"simulator_variable_{count}"
        code += (
            f"typedef {base} {kind}{extents}; threadgroup {kind}& {name} = *(threadgroup {kind}*)"
            f"(uintptr_t)simulator_threadgroup_variable({count}, sizeof({kind}), alignof({kind}));"
        )
        count += 1
    blank(tokens)
    tokens[0].text = code.rstrip(";")
    return count


def _blank_method_qualifiers(tokens: list[Token]) -> None:
    """`float f() const thread {`: clang makes objects in the generic address space."""
    for i in range(1, len(tokens) - 1):
        is_qualifier = tokens[i - 1].text in (")", "const") and tokens[i + 1].text in ("{", ";")
        if tokens[i].text == "thread" and is_qualifier:
            tokens[i].text = ""


def _rewrite_vectors(tokens: list[Token]) -> None:
    """`float4(a, b)` calls simulator_make; `float4 v(a, b)` becomes an initialization by it."""
    code = [t for t in tokens if t.text]
    for i in range(1, len(code) - 2):
        before, token, after = code[i - 1].text, code[i], code[i + 1]
        if token.text == "vec" and after.text == "<":
            end = end_of_angles(code, i + 1)
            if end < len(code) and code[end].text == "(" and before != "operator":
                token.text = "simulator_make<vec"
                code[end - 1].text = ">>"
                token.text = token.text if before == "::" else "metal::" + token.text
        elif _VECTOR.fullmatch(token.text) and before != "operator":
            if after.text == "(":
                token.text = f"simulator_make<{token.text}>"
                token.text = token.text if before == "::" else "metal::" + token.text
            elif after.is_name and code[i + 2].text == "(" and _is_variable(code, i + 2):
                after.text += f" = metal::simulator_make<{token.text}>"


def _is_variable(code: list[Token], paren: int) -> bool:
    """A function's declaration has a type first in its parentheses, or a body behind them."""
    end = end_of_bracket(code, paren)
    first = code[paren + 1].text
    is_type = bool(_VECTOR.fullmatch(first)) and code[paren + 2].text != "("
    is_type |= first in ("const", "device", "constant", "threadgroup", "thread", "float", "uint")
    return end < len(code) and code[end].text == ";" and not is_type and end > paren + 2


def _rewrite_literals(tokens: list[Token]) -> None:
    """Floating literals without a suffix are float in MSL; h and bf make half and bfloat."""
    for token in tokens:
        if _FLOAT.fullmatch(token.text):
            token.text += "f"
        elif match := _HALF.fullmatch(token.text):
            kind = "half" if match[2] in "hH" else "bfloat"
            number = match[1] if re.search("[.eE]", match[1]) else match[1] + "."
            token.text = f"(static_cast<{kind}>({number}f))"


# ---- Entry points ----


def _entry_points(entries: list[Entry]) -> list[str]:
    lines = ['# 1 "entry points"']
    for number, entry in enumerate(entries):
        lines += _entry_point(number, entry)
    lines.append('extern "C" void simulator_enter(int number, const thread simulator_call* call) {')
    lines.append("  switch (number) {")
    for number in range(len(entries)):
        lines.append(f"    case {number}: return simulator_enter_{number}(call);")
    lines += ["  }", "}", *_tables(entries)]
    return lines


def _entry_point(number: int, entry: Entry) -> list[str]:
    arguments = []
    for i, parameter in enumerate(entry.kernel.parameters):
        member = {
            "buffer": f"memory(call->buffers[{parameter.index}])",
            "threadgroup": f"memory(call->threadgroup_memory[{parameter.index}])",
            "position": f"position(call->positions[{parameter.index}])",
        }[parameter.kind]
        arguments.append(
            f"metal::simulator_argument<simulator_signature_{number}::argument<{i}>>::{member}"
        )
    expression = entry.expression
    return [
        f"typedef metal::simulator_signature<decltype({expression})> simulator_signature_{number};",
        # Kernels that end alike would be merged in simulator_enter, and lose their lines.
        "__attribute__((noinline))",
        f"static void simulator_enter_{number}(const thread simulator_call* call) {{",
        f"  {expression}({', '.join(arguments)});",
        "}",
    ]


def _tables(entries: list[Entry]) -> list[str]:
    """What runtime.h tells about each kernel. Only what runs needs it."""
    lines = [
        "#ifndef SIMULATOR_STRICT",
        "struct simulator_parameter {",
        "  int kind, index;",
        "  uint size, alignment;",
        "  int is_reference, is_writable;",
        "};",
        "struct simulator_kernel {",
        "  const char* name;",
        "  const simulator_parameter* parameters;",
        "  int num_parameters;",
        "};",
    ]
    for number, entry in enumerate(entries):
        lines.append(f"static const simulator_parameter simulator_parameters_{number}[] = {{")
        for i, parameter in enumerate(entry.kernel.parameters):
            kind = ("buffer", "threadgroup", "position").index(parameter.kind)
            of = f"metal::simulator_argument<simulator_signature_{number}::argument<{i}>>::"
            lines.append(
                f"  {{{kind}, {parameter.index}, {of}size, {of}alignment, {of}is_reference, "
                f"{of}is_writable}},"
            )
        lines.append("};")
    lines.append('extern "C" const simulator_kernel simulator_kernels[] = {')
    for number, entry in enumerate(entries):
        count = len(entry.kernel.parameters)
        lines.append(f'  {{"{entry.host_name}", simulator_parameters_{number}, {count}}},')
    lines.append("};")
    lines.append(f'extern "C" const int simulator_kernel_count = {len(entries)};')
    lines.append("#endif")
    return lines
