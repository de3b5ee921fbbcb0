"""Preprocessed MSL as tokens. What stands between two of them, line markers included, belongs to
the later one, so that a token can be blanked or replaced and every line keeps its number."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_BLANK = r"(?:\n\#[^\n]*|\s)+"
_TOKEN = re.compile(
    rf"""(?P<blank>{_BLANK})
    | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*'
    | [A-Za-z_]\w*
    | (?:\d|\.\d)(?:[eEpP][+-]|[\w.])*
    | ::|->|<<=?|==|!=|<=|&&|\|\||\+\+|--|[-+*/%&|^]=
    | .""",
    re.VERBOSE | re.DOTALL,
)
_MARKER = re.compile(r'# (\d+) "((?:\\.|[^"\\])*)"')

OPENING = {"(": ")", "[": "]", "{": "}"}


@dataclass
class Token:
    text: str
    before: str
    file: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def is_name(self) -> bool:
        return self.text[:1].isalpha() or self.text[:1] == "_"


def tokenize(text: str) -> list[Token]:
    """The last token is empty and carries what stands at the end."""
    tokens: list[Token] = []
    file, line, before = "", 0, ""
    for match in _TOKEN.finditer("\n" + text):
        if match["blank"] is None:
            tokens.append(Token(match[0], before, file, line))
            before = ""
            continue
        before += match[0]
        for piece in match[0].split("\n")[1:]:
            marker = _MARKER.match(piece)
            if marker:
                # The marker names the line that follows it.
                file, line = marker[2], int(marker[1]) - 1
            else:
                line += 1
    return [*tokens, Token("", before, file, line)]


def render(tokens: list[Token]) -> str:
    return "".join(t.before + t.text for t in tokens)[1:]


def words(tokens: list[Token]) -> str:
    """On one line, for messages and for types that move elsewhere."""
    return " ".join(t.text for t in tokens if t.text)


def blank(tokens: list[Token]) -> None:
    for token in tokens:
        token.text = ""


def end_of_bracket(tokens: list[Token], start: int) -> int:
    """Just past the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(tokens)):
        if tokens[i].text in OPENING:
            depth += 1
        elif tokens[i].text in OPENING.values():
            depth -= 1
            if depth == 0:
                return i + 1
    return len(tokens)


def end_of_angles(tokens: list[Token], start: int) -> int:
    """Just past the `>` that closes the `<` at `start`; what is in brackets does not count."""
    depth, i = 0, start
    while i < len(tokens):
        text = tokens[i].text
        if text in OPENING:
            i = end_of_bracket(tokens, i)
            continue
        depth += (text == "<") - (text == ">")
        i += 1
        if depth == 0:
            return i
    return i


def is_attribute(tokens: list[Token], i: int) -> bool:
    """`[[`, which in MSL is never a subscript of a subscript."""
    return i + 1 < len(tokens) and tokens[i].text == "[" and tokens[i + 1].text == "["


def attributes(tokens: list[Token]) -> Iterator[tuple[int, int]]:
    """Where each `[[...]]` begins and ends."""
    i = 0
    while i < len(tokens):
        if is_attribute(tokens, i):
            end = end_of_bracket(tokens, i)
            yield i, end
            i = end
        else:
            i += 1


def split_at_commas(tokens: list[Token]) -> list[list[Token]]:
    """At the commas that are in no bracket and no template's arguments."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += token.text in ("(", "[", "{", "<")
        depth -= token.text in (")", "]", "}", ">")
        if token.text == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]


def enumerators(tokens: list[Token]) -> dict[str, int]:
    """Those whose values are literals, or follow from the place."""
    values: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if token.text != "enum":
            continue
        start = next(k for k in range(i, len(tokens)) if tokens[k].text in ("{", ";", ")"))
        if tokens[start].text != "{":
            continue
        following: int | None = 0
        for part in split_at_commas(tokens[start + 1 : end_of_bracket(tokens, start) - 1]):
            if len(part) > 1:
                following = int(part[2].text) if part[2].text.isdigit() and len(part) == 3 else None
            if following is not None:
                values[part[0].text] = following
                following += 1
    return values


def function_bodies(tokens: list[Token]) -> list[tuple[int, int]]:
    """From the `{` of each function to just past its `}`."""
    bodies = []
    i = 0
    while i < len(tokens):
        before = tokens[i - 1].text if i else ""
        if tokens[i].text == "{" and before in (")", "const", "thread", "device", "constant"):
            end = end_of_bracket(tokens, i)
            bodies.append((i, end))
            i = end
        else:
            i += 1
    return bodies


def is_variable(declaration: list[Token]) -> bool:
    """Of the tokens of a declaration up to its `;`: no pointer and no reference."""
    for token in declaration:
        if token.text in ("[", "="):
            break
        if token.text in ("*", "&"):
            return False
    return True
