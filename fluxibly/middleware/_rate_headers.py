"""The rate limits that services send with their answers, in the headers of OpenAI's and Anthropic's families."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import NamedTuple

from fluxibly._durations import date_of, duration, number_of

_SHORTEST = 0.001
"""Below this many seconds, rounding hides the rate."""
_LONGEST = 1e8
"""Above this many seconds, it is no limit but a mistake."""
_HORIZON = 60.0
"""The seconds over which what is left of a limit is spread."""
_SHARE = 0.95
"""The share of the rate at which a bucket fills that is used, so that it never gets quite empty: requests do not arrive as
evenly as they are sent."""


class Told(NamedTuple):
    """A limit as a service has it just now."""

    name: str
    """ "requests" or "tokens"."""
    rate: float
    """So many units a second are allowed now."""
    seconds: float
    """The seconds for which that holds."""


def told_limits(headers: Mapping[str, str]) -> Iterator[Told]:
    """Yield the limits of an answer's headers, which have lower-case names."""
    for name in ("requests", "tokens"):
        yield from _told(
            name,
            headers.get(f"x-ratelimit-limit-{name}"),
            headers.get(f"x-ratelimit-remaining-{name}"),
            duration(headers.get(f"x-ratelimit-reset-{name}", "")),
        )
        # Where a service counts input and output apart, the sum is that of the limit that is nearest.
        yield from _told(
            name,
            headers.get(f"anthropic-ratelimit-{name}-limit"),
            headers.get(f"anthropic-ratelimit-{name}-remaining"),
            _until(headers.get(f"anthropic-ratelimit-{name}-reset", ""), headers.get("date", "")),
        )


def _told(name: str, limit: str | None, remaining: str | None, seconds: float | None) -> Iterator[Told]:
    total, left = number_of(limit), number_of(remaining)
    if seconds is not None and seconds == int(seconds):
        seconds -= 1  # it is rounded up, as a rule, and to guess too low a rate would slow calls down for nothing
    if total is None or left is None or seconds is None or total < 1 or not _SHORTEST <= seconds <= _LONGEST:
        return
    # The reset is the time until all of the limit is there again, so a bucket fills at `used / seconds`. What is left may be
    # used as well, and is spread over a minute: the rate sinks to almost that at which the bucket fills as the bucket gets empty.
    # A limit for a day that is half used up thus slows nobody down. A window, which fills all at once at its end, looks the
    # same in the headers, and is not told apart.
    used = max(0.0, total - left)
    yield Told(name, left / _HORIZON + _SHARE * used / seconds, min(seconds, _HORIZON))


def _until(moment: str, date: str) -> float | None:
    """Return the seconds from a response's own date, or now, to a moment (RFC 3339)."""
    try:
        then = datetime.fromisoformat(moment).timestamp()
    except (ValueError, OverflowError):
        return None
    now = date_of(date)
    return max(0.0, then - (time.time() if now is None else now))
