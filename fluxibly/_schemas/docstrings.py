"""The descriptions in a function's docstring: of the function, and of its parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

_ARGUMENTS = {"args", "arguments", "parameters", "params", "keyword args", "keyword arguments", "other parameters"}
_OTHERS = {
    *("returns", "return", "yields", "yield", "raises", "warns", "example", "examples", "note", "notes", "attributes"),
    *("see also", "references", "warnings", "todo"),
}
_FIELD = re.compile(r":(?:param|parameter|arg|argument|key|keyword)\s+(?:[^:]*\s)?\*{0,2}(\w+)\s*:\s*(.*)")
"""A field of Sphinx that describes a parameter: `:param int days: the number of days`."""
_ANY_FIELD = re.compile(r":(?:\w+)(?:\s[^:]*)?:(?:\s|$)")
_GOOGLE = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")
"""A parameter of Google's style: `days (int): the number of days`."""
_NUMPY = re.compile(r"((?:\*{0,2}\w+\s*,\s*)*\*{0,2}\w+)\s*(?::.*)?$")
"""The parameters that a description in NumPy's style is for: `days : int`, or `low, high : int`."""


class Described(NamedTuple):
    """The contents of a docstring."""

    text: str
    """The text before the first section."""
    parameters: Mapping[str, str]
    """The descriptions of parameters, by name."""


def described(docstring: str, names: Collection[str]) -> Described:
    """Read a docstring in the style of Google, NumPy or Sphinx.

    Args:
        docstring: the docstring, as it stands in the source.
        names: the names of the parameters. A section "Args:" may have others, which are left out.
    """
    lines = inspect.cleandoc(docstring).splitlines()
    found: dict[str, str] = {}
    end: int | None = None
    """The number of the line at which the text ends."""
    number = 0
    while number < len(lines):
        section = _section(lines, number)
        if section is not None:
            end = number if end is None else end
            name, begin, numpy = section
            number = _end_of_section(lines, begin, numpy=numpy)
            if name in _ARGUMENTS:
                found |= _parameters(lines[begin:number], numpy=numpy)
        elif _ANY_FIELD.match(lines[number]):
            end = number if end is None else end
            number = _read_field(lines, number, found)
        else:
            number += 1
    return Described(
        "\n".join(lines[:end]).strip(), {name: text for name, text in found.items() if name in names and text}
    )


def _section(lines: Sequence[str], number: int) -> tuple[str, int, bool] | None:
    """Return the name of the section that begins at a line, the number of its first line, and whether it is NumPy's."""
    line = lines[number]
    name = line.strip().lower().removesuffix(":")
    if line[:1].isspace() or name not in _ARGUMENTS | _OTHERS:
        return None
    following = lines[number + 1].strip() if number + 1 < len(lines) else ""
    if following and not following.strip("-="):
        return name, number + 2, True
    return (name, number + 1, False) if line.rstrip().endswith(":") else None


def _end_of_section(lines: Sequence[str], begin: int, *, numpy: bool) -> int:
    """Return the number of the line after a section. Google's sections are indented; NumPy's go on to the next."""
    for number in range(begin, len(lines)):
        if _section(lines, number) is not None or (not numpy and lines[number] and not lines[number][0].isspace()):
            return number
    return len(lines)


def _parameters(lines: Sequence[str], *, numpy: bool) -> dict[str, str]:
    """Return the descriptions in a section, each of which begins at the section's indentation."""
    found: dict[str, list[str]] = {}
    depth = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    current: list[str] = []
    for line in lines:
        text = line.strip()
        if line[: depth + 1].strip() == "":
            current.append(text)
            continue
        match = (_NUMPY if numpy else _GOOGLE).match(text)
        current = []
        if match is not None:
            names = [name.strip().lstrip("*") for name in match[1].split(",")]
            current = [] if numpy else [match[2]]
            found.update(dict.fromkeys(names, current))
    return {name: _joined(words) for name, words in found.items()}


def _read_field(lines: Sequence[str], number: int, found: dict[str, str]) -> int:
    """Read a field of Sphinx, which goes on in indented lines. Return the number of the line after it."""
    match = _FIELD.match(lines[number])
    end = number + 1
    while end < len(lines) and lines[end][:1].isspace():
        end += 1
    if match is not None:
        found[match[1]] = _joined([match[2], *lines[number + 1 : end]])
    return end


def _joined(lines: Sequence[str]) -> str:
    return " ".join([line.strip() for line in lines if line.strip()])
