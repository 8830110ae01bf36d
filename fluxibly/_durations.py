"""Lengths of time and moments, as services write them into headers."""

from __future__ import annotations

import math
import re
from email.utils import parsedate_to_datetime

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?", re.ASCII)


def duration(text: str) -> float | None:
    """Return the seconds of "48s", "6m0s", "1.5s", "20ms", "1d2h", or of a bare number from 0; None for other text."""
    found = number_of(text)
    if found is not None:
        return found
    match = _DURATION.fullmatch(text.strip())
    if match is None or not match[0]:
        return None
    days, hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return _finite(days * 86_400 + hours * 3_600 + minutes * 60 + seconds + milliseconds / 1_000)


def number_of(text: str | None) -> float | None:
    """Return the number from 0 that a text is; None for other text."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return _finite(number) if number >= 0 else None


def date_of(text: str) -> float | None:
    """Return the seconds since 1970 of an HTTP date (RFC 9110 §5.6.7); None for other text."""
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
