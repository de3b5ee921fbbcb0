"""What Metal's compiler refuses and clang, in either dialect, does not. Each finding is one line,
`file:line: error: ...`."""

import re
from pathlib import Path

from simulator.tokens import Token, function_bodies, is_attribute, is_variable, words
from simulator.translate import ATTRIBUTES, Entry, Kernel

MAX_BUFFER_INDEX = 30
_FORBIDDEN = {
    "asm": "inline assembly",
    "catch": "exceptions",
    "delete": "memory of one's own",
    "double": "double",
    "dynamic_cast": "run-time type information",
    "goto": "goto",
    "new": "memory of one's own",
    "noexcept": "exceptions",
    "printf": "printf",
    "std": "the C++ standard library",
    "thread_local": "thread_local",
    "throw": "exceptions",
    "try": "exceptions",
    "typeid": "run-time type information",
    "virtual": "virtual functions",
}
# Legal, but nobody here needs them, and the simulator would have to hand them out.
_UNSUPPORTED = {"function_constant", "texture2d", "sampler"}
_ADDRESS_SPACES = {"device", "constant", "threadgroup", "thread"}
_QUALIFIERS = {"const", "volatile", "static", "inline", "constexpr", "typename", "struct"}
_SCALAR = re.compile(
    r"u?(char|short|int|long)[234]?|(bool|half|bfloat|float)[234]?|u?int\d+_t|void"
)


def lint_text(tokens: list[Token]) -> list[str]:
    """Of the text as it was preprocessed, before it is translated."""
    findings = [f"{t.place}: error: MSL has no {_FORBIDDEN[t.text]}" for t in _forbidden(tokens)]
    findings += [
        f"{t.place}: error: the simulator has no {t.text}" for t in tokens if t.text in _UNSUPPORTED
    ]
    findings += [f"{t.place}: error: MSL has no long long" for t in _long_longs(tokens)]
    findings += [f"{t.place}: error: MSL 3.1 has no lambda expressions" for t in _lambdas(tokens)]
    findings += _pointers_without_address_space(tokens)
    findings += _threadgroup_variables_outside_kernels(tokens)
    return findings


def lint_kernels(kernels: list[Kernel], entries: list[Entry]) -> list[str]:
    findings = []
    instantiated = {entry.kernel.name for entry in entries}
    for kernel in kernels:
        problems = _parameter_problems(kernel) + _position_problems(kernel)
        if kernel.name not in instantiated:
            problems.append("the template is never instantiated")
        findings += [f"{kernel.place}: error: kernel {kernel.name}: {p}" for p in problems]
    names = [entry.host_name for entry in entries]
    for name in sorted({n for n in names if names.count(n) > 1}):
        place = next(e.kernel.place for e in entries if e.host_name == name)
        findings.append(f"{place}: error: two kernels have the host name {name}")
    return findings


def lint_characters(tokens: list[Token], name: str, text: str) -> list[str]:
    """Comments too: Metal's compiler is given the text as it lies in the files."""
    texts = {name: text}
    for file in {t.file for t in tokens}:
        if file not in texts and Path(file).is_file():
            texts[file] = Path(file).read_text(encoding="utf-8", errors="replace")
    return [
        f"{file}:{number}: error: a character that is not ASCII"
        for file, content in sorted(texts.items())
        for number, line in enumerate(content.split("\n"), 1)
        if not line.isascii()
    ]


def recursive_functions(ir: str) -> list[str]:
    """Functions that reach themselves in LLVM's unoptimized code, by their mangled names."""
    calls: dict[str, set[str]] = {}
    current = ""
    for line in ir.splitlines():
        if match := re.match(r'define .*?@"?([\w.$]+)"?\(', line):
            current = match[1]
            calls[current] = set()
        elif current:
            calls[current].update(re.findall(r'call .*?@"?([\w.$]+)"?\(', line))
    # What is left when all that call nothing, or only what calls nothing, are gone.
    live = dict(calls)
    while leaves := [f for f, called in live.items() if not called & live.keys()]:
        for leaf in leaves:
            del live[leaf]
    return [f for f in live if f in _reachable(f, live)]


def _reachable(function: str, calls: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [function]
    while waiting:
        for called in calls.get(waiting.pop(), ()):
            if called not in seen:
                seen.add(called)
                waiting.append(called)
    return seen


def _forbidden(tokens: list[Token]) -> list[Token]:
    return [
        t
        for i, t in enumerate(tokens)
        if t.text in _FORBIDDEN and not (t.text == "delete" and tokens[i - 1].text == "=")
    ]


def _long_longs(tokens: list[Token]) -> list[Token]:
    return [t for i, t in enumerate(tokens) if i and t.text == tokens[i - 1].text == "long"]


def _lambdas(tokens: list[Token]) -> list[Token]:
    found = []
    for i in range(1, len(tokens) - 1):
        if tokens[i].text != "[" or is_attribute(tokens, i) or tokens[i - 1].text == "[":
            continue
        if tokens[i - 1].text in ("=", "(", ",", "return", "{"):
            found.append(tokens[i])
    return found


def _type_names(tokens: list[Token]) -> set[str]:
    """Structs, classes and the type parameters of templates."""
    before = ("struct", "class", "typename")
    return {t.text for i, t in enumerate(tokens) if i and tokens[i - 1].text in before}


def _pointers_without_address_space(tokens: list[Token]) -> list[str]:
    """`const float* p`, where neither part of the declaration names an address space."""
    types = _type_names(tokens)
    findings = []
    for i in range(1, len(tokens) - 2):
        if tokens[i].text not in ("*", "&") or not tokens[i + 1].is_name:
            continue
        if tokens[i + 2].text not in (",", ")", "=", ";", "["):
            continue
        start = i
        while start and tokens[start - 1].text not in ("(", ",", ";", "{", "}", "<", ")", ">", "]"):
            start -= 1
        declared = [t.text for t in tokens[start:i]]
        core = [t for t in declared if t not in _QUALIFIERS]
        is_type = len(core) == 1 and (core[0] in types or _SCALAR.fullmatch(core[0]))
        if is_type and not _ADDRESS_SPACES & set(declared):
            findings.append(
                f"{tokens[i].place}: error: no address space: {words(tokens[start : i + 2])}"
            )
    return findings


def _threadgroup_variables_outside_kernels(tokens: list[Token]) -> list[str]:
    findings = []
    for start, end in function_bodies(tokens):
        head = start
        while head and tokens[head - 1].text not in (";", "}", "{"):
            head -= 1
        if any(t.text == "kernel" for t in tokens[head:start]):
            continue
        for i in range(start, end):
            if tokens[i].text != "threadgroup" or tokens[i - 1].text not in ("{", "}", ";"):
                continue
            semicolon = next(k for k in range(i, end) if tokens[k].text == ";")
            if is_variable(tokens[i:semicolon]):
                findings.append(
                    f"{tokens[i].place}: error: a threadgroup variable outside of a kernel"
                )
    return findings


def _parameter_problems(kernel: Kernel) -> list[str]:
    problems = []
    seen: set[tuple[str, int]] = set()
    for parameter in kernel.parameters:
        if parameter.kind == "position":
            continue
        slot = f"[[{parameter.kind}({parameter.index})]]"
        if parameter.index > MAX_BUFFER_INDEX:
            problems.append(f"{slot} is past {MAX_BUFFER_INDEX}")
        if (parameter.kind, parameter.index) in seen:
            problems.append(f"{slot} is used twice")
        seen.add((parameter.kind, parameter.index))
        if not {"*", "&"} & set(parameter.declaration.split()):
            problems.append(f"'{parameter.declaration}' is neither a pointer nor a reference")
    return problems


def _position_problems(kernel: Kernel) -> list[str]:
    """Positions of the grid agree in their width, those of one level in their type."""
    types = {
        ATTRIBUTES[p.index]: next(w for w in p.declaration.split() if w != "const")
        for p in kernel.parameters
        if p.kind == "position"
    }
    in_grid = ATTRIBUTES[:7]
    problems = []
    widths = {t[-1] if t[-1] in "23" else "1" for a, t in types.items() if a in in_grid}
    if len(widths) > 1:
        problems.append("positions in the grid differ in their width")
    for level in ((0, 3), (1, 4, 6), (2, 5)):
        names = [ATTRIBUTES[i] for i in level if ATTRIBUTES[i] in types]
        if len({types[name] for name in names}) > 1:
            problems.append(f"{' and '.join(names)} differ in their type")
    return problems
