"""Numbers, sums and times as the command says them."""

from __future__ import annotations

from collections.abc import Mapping

from fluxibly.batch import Report
from fluxibly.cli.trace.facts import money

_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def short(number: float) -> str:
    """Return a number in three digits: 950, 1.2k, 300k, 1.25M."""
    if number < 999.5:
        return f"{number:.0f}"
    rounded = float(f"{number:.3g}")
    size, unit = next(each for each in _UNITS if rounded >= each[0])
    return f"{rounded / size:.4g}{unit}"


def rows(count: int) -> str:
    """Return a number of rows."""
    return f"{count:,} row{'' if count == 1 else 's'}"


def spent(report: Report) -> list[str]:
    """Return the tokens and the cost of a run, as far as they are known."""
    found: list[str] = []
    if report.input_tokens or report.output_tokens:
        found.append(f"{short(report.input_tokens)} + {short(report.output_tokens)} tokens")
    if report.cost is not None:
        found.append(money(report.cost))
    return found


def lasting(seconds: float) -> str:
    """Return a time in its two largest units: 12.3 s, 3 min 12 s, 16 h 40 min, 2 days 3 h."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h"


SHOWN = 4
"""The most classes of errors that are named."""


def most_frequent(errors: Mapping[str, int]) -> list[str]:
    """Return the classes of errors that are named, the most frequent first."""
    return sorted(errors, key=lambda name: (-errors[name], name))[:SHOWN]


def by_class(errors: Mapping[str, int]) -> str:
    """Return the numbers of errors by class, the most frequent first: 8 RateLimitError, 3 RequestTimeout."""
    names = most_frequent(errors)
    shown = [f"{errors[name]:,} {name}" for name in names]
    others = sum(errors.values()) - sum(errors[name] for name in names)
    return ", ".join([*shown, f"{others:,} others"] if others else shown)
