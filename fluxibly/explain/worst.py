"""The worst case of a call: how many requests it may send, how long it may take, and how many tokens it may bring."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import attrs

from fluxibly._checks import mapping, number, problem, text, validator, whole

ATTEMPTS = "attempts"
"""The part of the longest wait that providers take."""
_LONGEST_FORMULA = 400


def _seconds(name: str, value: object) -> str | None:
    """Check a mapping of names to seconds."""
    if (found := mapping(name, value, keys=str)) is not None:
        return found
    waits = cast("Mapping[str, object]", value)
    return next(filter(None, [number(f"{name}.{who}", wait, 0, finite=False) for who, wait in waits.items()]), None)


def _texts(name: str, value: Any) -> str | None:
    """Check a tuple of str."""
    if isinstance(value, tuple) and all(isinstance(each, str) for each in cast("tuple[object, ...]", value)):
        return None
    return problem(name, "a tuple of str", cast("object", value))


@attrs.frozen(kw_only=True)
class WorstCase:
    """The most that one call may come to, in one mode: whole or streamed.

    A middleware of your own that sends several requests, or waits, says so by a method
    `worst_case(self, inner: WorstCase) -> WorstCase`. `inner` is the worst case of one `call_next(request)`::

        class Vote:
            def worst_case(self, inner):
                return inner.repeated(3, "votes")

    Raises:
        ValueError: a number is negative or NaN, or a value is of another type.
    """

    requests: int = attrs.field(default=1, validator=validator(whole, 0))
    """The most requests that are sent to providers."""
    formula: str = attrs.field(default="", validator=validator(text, empty=True))
    """How the number comes about, such as "3 targets (Fallback (2)) × 4 attempts (Retry (3))"; empty for one request."""
    tokens: int | None = attrs.field(default=None, validator=attrs.validators.optional(validator(whole, 0)))
    """The most tokens of output; None: no limit."""
    waits: Mapping[str, float] = attrs.field(factory=dict[str, float], validator=validator(_seconds))
    """The most seconds, by who takes them: "attempts" are the providers'. `math.inf` is no limit."""
    unlimited: tuple[str, ...] = attrs.field(default=(), validator=validator(_texts))
    """Why there is no limit of time."""
    not_counted: tuple[str, ...] = attrs.field(default=(), validator=validator(_texts))
    """Costs that may come on top: requests and waits of your own functions."""
    by: str = ""
    """The layer that is being explained."""

    @property
    def seconds(self) -> float:
        """The longest wait in seconds; `math.inf` if there is no limit."""
        return math.inf if self.unlimited else sum(self.waits.values())

    def repeated(self, times: int, what: str) -> WorstCase:
        """Return the case in which this happens several times, one after the other. `what` is a word for that: "attempts"."""
        if times == 1:
            return self
        return attrs.evolve(
            self,
            requests=times * self.requests,
            formula=_product(f"{shown_number(times)} {what} ({self.by})", self.formula) if self.requests else "",
            tokens=None if self.tokens is None else times * self.tokens,
            waits={who: times * seconds for who, seconds in self.waits.items()},
        )

    def waiting(self, seconds: float) -> WorstCase:
        """Return the case in which the layer also waits for some seconds."""
        if not seconds:
            return self
        if math.isinf(seconds):
            return self.without_limit(f"{self.by} waits without a limit")
        return attrs.evolve(self, waits={**self.waits, self.by: self.waits.get(self.by, 0.0) + seconds})

    def within(self, seconds: float) -> WorstCase:
        """Return the case in which the layer ends everything after some seconds."""
        if seconds >= self.seconds:
            return self
        return attrs.evolve(self, waits={self.by: seconds}, unlimited=())

    def without_limit(self, reason: str) -> WorstCase:
        """Return the case in which nothing limits the time, for a reason."""
        return attrs.evolve(self, unlimited=_with(self.unlimited, reason))

    def besides(self, what: str) -> WorstCase:
        """Return the case with something that may come on top, and is not counted."""
        return attrs.evolve(self, not_counted=_with(self.not_counted, what))


@attrs.frozen
class CallBudget:
    """The tokens that a `Budget` allows each call."""

    by: str
    tokens: float | None
    """Tokens of input and output together; None: no limit."""
    cost: float | None
    """US dollars; None: no limit."""


@attrs.frozen(kw_only=True)
class WorstCases:
    """The worst case of a whole answer and that of a stream, and what budgets allow a call, whatever these say."""

    whole: WorstCase
    stream: WorstCase
    budgets: Sequence[CallBudget] = ()


def in_turn(cases: Iterable[WorstCase], what: str) -> WorstCase:
    """Return the case in which several things happen, one after the other. `what` is a word for them: "targets"."""
    first, *others = cases
    count = 1 + len(others)
    total = first
    for case in others:
        total = attrs.evolve(
            total,
            requests=total.requests + case.requests,
            tokens=None if total.tokens is None or case.tokens is None else total.tokens + case.tokens,
            waits={who: total.waits.get(who, 0.0) + case.waits.get(who, 0.0) for who in {**total.waits, **case.waits}},
            unlimited=_with(total.unlimited, *case.unlimited),
            not_counted=_with(total.not_counted, *case.not_counted),
        )
    formulas = [case.formula or str(case.requests) for case in (first, *others)]
    if count == 1:
        formula = first.formula
    elif len(set(formulas)) == 1:
        formula = _product(f"{count} {what} ({first.by})", first.formula)
    else:
        formula = _short(f"{what} ({first.by}): ({' + '.join(formulas)})")
    return attrs.evolve(total, formula=formula)


def at_once(cases: Sequence[WorstCase], what: str, apart: float) -> WorstCase:
    """Return the case in which each thing begins some seconds after the one before, unless all are over by then.

    Args:
        apart: the seconds; `math.inf` if they are not known.
    """
    total = in_turn(cases, what)
    slowest = max(cases, key=lambda case: case.seconds)
    spread = apart * (len(cases) - 1) if len(cases) > 1 else 0.0
    # A thing begins only while another is under way, so they never take longer than one after the other.
    if total.unlimited or spread + slowest.seconds >= total.seconds:
        return total
    return attrs.evolve(total, waits=slowest.waits).waiting(spread)


def shown_number(number: int) -> str:
    """Return a number as people read it."""
    return f"{number:,}" if number < 10**9 else f"over 10^{int((number.bit_length() - 1) * math.log10(2))}"


def _product(one: str, other: str) -> str:
    return _short(f"{one} × {other}" if other else one)


def _short(formula: str) -> str:
    return formula if len(formula) <= _LONGEST_FORMULA else f"{formula[: _LONGEST_FORMULA - 2]} …"


def _with(known: tuple[str, ...], *more: str) -> tuple[str, ...]:
    return (*known, *dict.fromkeys(each for each in more if each not in known))
