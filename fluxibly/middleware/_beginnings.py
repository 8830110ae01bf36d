"""The beginnings of a regular expression: all that it may still match when the text goes on.

Python's `re` does not say whether more text could change what it finds. So a second expression is made of the first one's
syntax tree: it matches from a place to the end of the text if a match that begins at that place may need more text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

NEVER = "(?!)"
_END = r"\Z"
_FLAGS = {re.IGNORECASE: "i", re.MULTILINE: "m", re.DOTALL: "s", re.ASCII: "a", re.UNICODE: "u"}
_CATEGORIES = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}
_PLACES = {
    "AT_BEGINNING": "^",
    "AT_BEGINNING_STRING": r"\A",
    "AT_BOUNDARY": r"\b",
    "AT_NON_BOUNDARY": r"\B",
    "AT_END": "$",
    "AT_END_STRING": r"\Z",
}
_CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_REPEATS = {"MAX_REPEAT": "", "MIN_REPEAT": "?", "POSSESSIVE_REPEAT": "+"}


class Beginnings(NamedTuple):
    """The facts about an expression."""

    regex: re.Pattern[str]
    """Matches from a place in the text to its end, if a match that begins there may depend on what follows."""
    ahead: float
    """The most characters from its beginning on that a match may depend on; infinity if there is no bound."""
    behind: int
    """The most characters before a place that it looks at."""


def beginnings(regex: re.Pattern[str], unknown: int) -> Beginnings:
    """Return the beginnings of an expression.

    Of an expression with references to its own groups, every text is taken for a beginning.

    Args:
        unknown: the characters that such an expression is taken to look back.
    """
    flags = regex.flags & ~(re.VERBOSE | re.DEBUG)
    try:
        # The module has no public name. It has been the same for many years, and the test of this module would notice.
        items = list(import_module("re._parser").parse(regex.pattern, regex.flags & ~re.DEBUG))
        multiline = bool(flags & re.MULTILINE)
        sources = _begun(items, multiline, first=True) or [NEVER]
        return Beginnings(re.compile("|".join(sources), flags), _ahead(items)[1], _behind(items))
    except (ImportError, AttributeError, _Unknown):
        return Beginnings(re.compile("(?s:.)"), math.inf, unknown)


class _Unknown(Exception):
    """The syntax tree has something that has no beginnings."""


def _source(items: Sequence[Any]) -> str:
    """Return the source of a part of the tree, with groups that capture nothing."""
    return "".join([_source_of(str(op), value) for op, value in items])


def _source_of(op: str, value: Any) -> str:
    match op:
        case "LITERAL":
            return re.escape(chr(value))
        case "NOT_LITERAL":
            return f"[^{re.escape(chr(value))}]"
        case "ANY":
            return "."
        case "IN":
            return f"[{''.join([_member(str(kind), each) for kind, each in value])}]"
        case "AT":
            return _PLACES[str(value)]
        case "BRANCH":
            return f"(?:{'|'.join(map(_source, value[1]))})"
        case "SUBPATTERN":
            return _grouped(value, _source)
        case "ATOMIC_GROUP":
            return f"(?>{_source(value)})"
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            low, high, repeated = value
            return f"(?:{_source(repeated)}){_times(low, high)}{_REPEATS[op]}"
        case "ASSERT":
            return f"(?{'=' if value[0] > 0 else '<='}{_source(value[1])})"
        case "ASSERT_NOT":
            return f"(?{'!' if value[0] > 0 else '<!'}{_source(value[1])})"
        case "FAILURE":
            return NEVER
        case _:
            raise _Unknown(op)


def _member(kind: str, value: Any) -> str:
    """Return the source of a member of a set of characters."""
    match kind:
        case "NEGATE":
            return "^"
        case "LITERAL":
            return re.escape(chr(value))
        case "RANGE":
            return f"{re.escape(chr(value[0]))}-{re.escape(chr(value[1]))}"
        case "CATEGORY":
            _, *negated, name = str(value).split("_")
            return _CATEGORIES[name].upper() if negated else _CATEGORIES[name]
        case _:
            raise _Unknown(kind)


def _grouped(value: Any, source: Callable[[Sequence[Any]], str]) -> str:
    _, added, removed, items = value
    letters = ["".join([letter for flag, letter in _FLAGS.items() if flags & flag]) for flags in (added, removed)]
    return f"(?{letters[0]}{'-' if letters[1] else ''}{letters[1]}:{source(items)})"


def _times(low: int, high: Any) -> str:
    return f"{{{low},{'' if _is_endless(high) else int(high)}}}"


def _is_endless(high: Any) -> bool:
    return str(high) == "MAXREPEAT"


def _begun(items: Sequence[Any], multiline: bool, *, first: bool = False) -> list[str]:
    """Return the sources of expressions for the texts that end within `items`.

    Args:
        first: whether they stand at the beginning of the whole expression. The empty text is no beginning.
    """
    if not items:
        return []
    (op, value), *rest = items
    found = _begun_in(str(op), value, multiline, first=first)
    after = _begun(rest, multiline)
    return [*found, f"{_source_of(str(op), value)}{_any(after)}"] if after else found


def _any(sources: list[str]) -> str:
    return sources[0] if len(sources) == 1 else f"(?:{'|'.join(sources)})"


def _begun_in(op: str, value: Any, multiline: bool, *, first: bool) -> list[str]:
    match op:
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
            return [] if first else [_END]
        case "AT":
            place = str(value)
            if place == "AT_END" and not multiline:
                return [rf"\n?{_END}"]
            return [] if first or place.startswith("AT_BEGINNING") else [_END]
        case "BRANCH":
            return [source for items in value[1] for source in _begun(items, multiline, first=first)]
        case "SUBPATTERN":
            inner = multiline or bool(value[1] & re.MULTILINE)
            found = _begun(value[3], inner, first=first)
            return [_grouped(value, lambda _: _any(found))] if found else []
        case "ATOMIC_GROUP":
            return _begun(value, multiline, first=first)
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            _, high, repeated = value
            last = _begun(repeated, multiline)
            if not last or (not _is_endless(high) and high < 1):
                return []
            # Fewer characters of the same kind do not reach the end if the most do not, so none are given back.
            plain = "+" if len(repeated) == 1 and str(repeated[0][0]) in _CHARACTERS else ""
            before = f"(?:{_source(repeated)}){_times(0, high if _is_endless(high) else high - 1)}{plain}"
            return [f"{before}{_any(last)}"]
        case "ASSERT" | "ASSERT_NOT":
            return _begun(value[1], multiline) if value[0] > 0 else []
        case "FAILURE":
            return []
        case _:
            raise _Unknown(op)


def _ahead(items: Sequence[Any]) -> tuple[float, float]:
    """Return the most characters that `items` match, and the most that they look at."""
    matched = looked = 0.0
    for op, value in items:
        taken, seen = _ahead_in(str(op), value)
        looked = max(looked, matched + seen)
        matched += taken
    return matched, max(matched, looked)


def _ahead_in(op: str, value: Any) -> tuple[float, float]:
    if op in _CHARACTERS:
        return 1, 1
    if op == "AT":
        return 0, 2
    if op == "BRANCH":
        found = [_ahead(items) for items in value[1]]
        return max(taken for taken, _ in found), max(seen for _, seen in found)
    if op == "SUBPATTERN":
        return _ahead(value[3])
    if op == "ATOMIC_GROUP":
        return _ahead(value)
    if op in _REPEATS:
        taken, seen = _ahead(value[2])
        times = math.inf if _is_endless(value[1]) else int(value[1])
        return (taken * times, taken * (times - 1) + seen) if taken and times else (0, seen)
    if op in ("ASSERT", "ASSERT_NOT"):
        return 0, _ahead(value[1])[1] if value[0] > 0 else 0
    return 0, 0


def _behind(items: Sequence[Any]) -> int:
    """Return the most characters that lookbehinds and borders look back."""
    found = 0
    for op, value in items:
        name = str(op)
        if name == "AT":
            found = max(found, 1)
        elif name == "BRANCH":
            found = max(found, *map(_behind, value[1]))
        elif name == "SUBPATTERN":
            found = max(found, _behind(value[3]))
        elif name == "ATOMIC_GROUP":
            found = max(found, _behind(value))
        elif name in _REPEATS:
            found = max(found, _behind(value[2]))
        elif name in ("ASSERT", "ASSERT_NOT"):
            back = 0 if value[0] > 0 else int(_ahead(value[1])[0])
            found = max(found, back, _behind(value[1]) + back)
    return found
