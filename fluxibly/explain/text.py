"""The text of an explanation, 80 columns wide."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fluxibly.explain.layers import about
from fluxibly.explain.worst import ATTEMPTS, CallBudget, WorstCase, WorstCases, shown_number

if TYPE_CHECKING:
    from fluxibly.explain.chain import Chain, Layer
    from fluxibly.explain.rules import Finding

WIDTH = 80
_NO_TOKENS = "no limit: set max_tokens"


def text_of(chain: Chain, worst: WorstCases, warnings: Sequence[Finding], notes: Sequence[Finding]) -> str:
    """Return the text: the tree, the worst case, the warnings and the notes."""
    lines = [*_wrapped(f"{chain.title}, outermost first", ""), ""]
    for layer in chain.layers:
        lines += _tree_of(layer, chain)
    provider = f"{len(chain.layers) + 1:>3}  (provider)  "
    lines += _wrapped(chain.provider_shown or "not known", "       ", first=provider)
    lines += ["", "The worst case of a call:", *_worst(worst)]
    lines += ["", *_found("warning", warnings)]
    if notes:
        lines += ["", *_found("note", notes)]
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


def _worst(worst: WorstCases) -> Iterator[str]:
    whole, stream = worst.whole, worst.stream
    yield from _both("requests", _requests(whole), _requests(stream))
    yield from _both("longest wait", _wait(whole), _wait(stream))
    yield from _both("output tokens", _tokens(whole, worst.budgets), _tokens(stream, worst.budgets))
    money = [f"${budget.cost:g} by {budget.by}" for budget in worst.budgets if budget.cost is not None]
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
    parts = [f"{duration(seconds)} {'in ' if who == ATTEMPTS else 'by '}{who}" for who, seconds in case.waits.items()]
    if len(parts) < 2:
        return "".join(parts) or "none"
    return f"{duration(case.seconds)} = {' + '.join(parts)}"


def _tokens(case: WorstCase, budgets: Sequence[CallBudget]) -> str:
    caps = [(budget.tokens, budget.by) for budget in budgets if budget.tokens is not None]
    if caps and (case.tokens is None or min(caps)[0] < case.tokens):
        return f"about {min(caps)[0]:,.0f} with the input, by {min(caps)[1]}"
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
