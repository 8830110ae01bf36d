"""The text of an explanation, 80 columns wide."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import attrs

from fluxibly.explain.layers import about
from fluxibly.explain.worst import WorstCase, shown_number

if TYPE_CHECKING:
    from fluxibly.explain.chain import Chain, Layer
    from fluxibly.explain.explanation import Explanation
    from fluxibly.explain.rules import Finding

WIDTH = 80
_NO_TOKENS = "no limit: set max_tokens"


@attrs.frozen
class Cap:
    """What a Budget of each call allows."""

    by: str
    tokens: float | None
    cost: float | None


def text_of(explanation: Explanation, chain: Chain) -> str:
    """Return the text: the tree, the worst case, the warnings and the notes."""
    lines = [*_wrapped(f"{explanation.title}, outermost first", ""), ""]
    for layer in explanation.layers:
        lines += _tree_of(layer, chain)
    lines += _wrapped(
        explanation.provider or "not known", "      ", first=f"{len(explanation.layers) + 1:>3}  (provider) "
    )
    lines += ["", "The worst case of a call:", *_worst(explanation)]
    lines += ["", *_found("warning", explanation.warnings)]
    if explanation.notes:
        lines += ["", *_found("note", explanation.notes)]
    return "\n".join(line.rstrip() for line in lines)


def _tree_of(layer: Layer, chain: Chain) -> Iterator[str]:
    side = "  │  "
    name = f"{layer.position:>3}  {layer.name}"
    yield from _wrapped(layer.settings, f"{side}  ", first=f"{name}  " if layer.settings else name)
    said = about(layer)
    whole, stream = chain.clean(said.whole), chain.clean(said.stream)
    if stream and stream != whole:
        yield from _wrapped(whole, f"{side}          ", first=f"{side}  whole:  ")
        yield from _wrapped(stream, f"{side}          ", first=f"{side}  stream: ")
    else:
        yield from _wrapped(whole, f"{side}  ", first=f"{side}  ")
    for place, branch in enumerate(layer.branches, 1):
        last = place == len(layer.branches)
        yield from _wrapped(
            f"{branch.name}: {branch.what}",
            f"{side}  {'   ' if last else '│  '}",
            first=f"{side}  {'└─ ' if last else '├─ '}",
        )
    yield side


def _worst(explanation: Explanation) -> Iterator[str]:
    whole, stream = explanation.worst_case.whole, explanation.worst_case.stream
    yield from _both("requests", _requests(whole), _requests(stream))
    yield from _both("longest wait", _wait(whole), _wait(stream))
    yield from _both("output tokens", _tokens(whole, explanation.caps), _tokens(stream, explanation.caps))
    money = [f"${cap.cost:g} by {cap.by}" for cap in explanation.caps if cap.cost is not None]
    if money:
        yield from _row("cost", ", ".join(money))
    more = dict.fromkeys([*whole.not_counted, *stream.not_counted])
    if more:
        yield from _row("not counted", "; ".join(more))


def _both(name: str, whole: str, stream: str) -> Iterator[str]:
    if whole == stream:
        yield from _row(name, whole)
    else:
        yield from _row(name, f"whole: {whole}")
        yield from _row("", f"stream: {stream}")


def _row(name: str, value: str) -> Iterator[str]:
    return _wrapped(value, " " * 19, first=f"  {name:<15}  ")


def _requests(case: WorstCase) -> str:
    number = shown_number(case.requests)
    return f"{number} = {case.formula}" if case.formula else number


def _wait(case: WorstCase) -> str:
    if math.isinf(case.seconds):
        return f"no limit: {'; '.join(case.unlimited) or 'longer than any clock can tell'}"
    parts = [f"{duration(seconds)} {'in ' if who == 'attempts' else 'by '}{who}" for who, seconds in case.waits.items()]
    if len(parts) < 2:
        return "".join(parts) or "none"
    return f"{duration(case.seconds)} = {' + '.join(parts)}"


def _tokens(case: WorstCase, caps: Sequence[Cap]) -> str:
    limits = [cap for cap in caps if cap.tokens is not None and (case.tokens is None or cap.tokens < case.tokens)]
    if limits:
        least = min(limits, key=lambda cap: cap.tokens or 0.0)
        return f"{least.tokens:,.0f} with the input, by {least.by}"
    if case.tokens is None:
        return _NO_TOKENS
    if case.requests > 1 and case.tokens % case.requests == 0:
        number = shown_number(case.tokens // case.requests)
        return f"{shown_number(case.tokens)} = {shown_number(case.requests)} requests × {number}"
    return shown_number(case.tokens)


def _found(kind: str, found: Sequence[Finding]) -> Iterator[str]:
    if not found:
        yield f"No {kind}s."
        return
    yield f"{len(found)} {kind}{'' if len(found) == 1 else 's'}:"
    for place, each in enumerate(found, 1):
        yield from _wrapped(f"{each.rule.name}: {each.what}", "     ", first=f"{place:>3}. ")
        yield from _wrapped(f"Why: {each.rule.reason}.", "       ", first="     ")
        yield from _wrapped(f"Instead: {each.rule.cure}.", "       ", first="     ")


def duration(seconds: float) -> str:
    """Return a time as people read it: two units at most."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    for unit, length, smaller, parts in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= length:
            many, rest = divmod(seconds, length)
            fewer = int(rest // parts)
            number = f"{many:,.0f}" if many < 10**9 else f"{many:.1e}"
            return f"{number} {unit} {fewer} {smaller}" if fewer else f"{number} {unit}"
    raise AssertionError("unreachable: less than a minute was handled first")


def _wrapped(text: str, indent: str, *, first: str | None = None) -> Iterator[str]:
    first = indent if first is None else first
    if len(first) > WIDTH // 2:  # a long name stands alone
        yield from textwrap.wrap(first, WIDTH, subsequent_indent=indent, drop_whitespace=True)
        if not text:
            return
        first = indent
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
    yield from lines or [first]
