"""When a service says to try again: headers and bodies into seconds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, cast

_EPOCH_SECONDS = 1e9
"""A reset "time" above this is a moment since 1970, not a wait; above a thousand times it, one in milliseconds."""

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?", re.ASCII)
_TRY_AGAIN_IN = re.compile(
    r"(?:try again|retry) (?:in|after) ((?:\d+(?:\.\d+)?(?:ms|[dhms]))+)", re.ASCII | re.IGNORECASE
)


def retry_after_of(headers: Mapping[str, str], payload: object, message: str, *, now: float) -> float | None:
    """Seconds to wait before a retry, as a service asked for; None if it did not.

    In the order of trust: `retry-after-ms`, `retry-after` (seconds or an HTTP date, RFC 9110 §10.2.3), Google's
    `RetryInfo` in the body, the reset of an exhausted `x-ratelimit-*` or `ratelimit-*`, and "try again in 20s" in the
    message.

    Args:
        headers: with lower-case names.
        payload: the decoded body.
        now: seconds since 1970, for the dates.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    hints = (
        None if milliseconds is None else milliseconds / 1_000,
        _retry_after(headers, now),
        retry_info(payload),
        _reset(headers, now),
        _reset(_headers_inside(payload), now),
        _in_message(message),
    )
    return next((max(0.0, hint) for hint in hints if hint is not None), None)


def retry_info(payload: object) -> float | None:
    """Seconds of a `google.rpc.RetryInfo` in the body of an error."""
    if isinstance(payload, list):
        payload = next(iter(cast("list[object]", payload)), None)
    error = _field(payload, "error")
    details = _field(error, "details")
    for detail in cast("list[object]", details) if isinstance(details, list) else []:
        delay = _field(detail, "retryDelay")
        if isinstance(delay, str):
            return duration(delay)
    return None


def duration(text: str) -> float | None:
    """Seconds of "48s", "6m0s", "1.5s", "20ms", "1d2h", or of a bare number; None if it is none of these."""
    number = _number(text)
    if number is not None:
        return number
    match = _DURATION.fullmatch(text.strip())
    if match is None or not match[0]:
        return None
    days, hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return days * 86_400 + hours * 3_600 + minutes * 60 + seconds + milliseconds / 1_000


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    value = headers.get("retry-after")
    if not value:
        return None
    seconds = duration(value)
    if seconds is not None:
        return seconds
    moment = _date(value)
    if moment is None:
        return None
    server_now = _date(headers.get("date", ""))  # its clock may differ from ours
    return moment - (now if server_now is None else server_now)


def _reset(headers: Mapping[str, str], now: float) -> float | None:
    """The wait until the limits that are used up are reset; where none is said to be, there is no hint."""
    waits = [
        duration(value)
        for name, value in headers.items()
        if "ratelimit-reset" in name and headers.get(name.replace("-reset", "-remaining")) == "0"
    ]
    longest = max((wait for wait in waits if wait is not None), default=None)
    if longest is None or longest < _EPOCH_SECONDS:
        return longest
    return (longest if longest < _EPOCH_SECONDS * 1_000 else longest / 1_000) - now


def _headers_inside(payload: object) -> Mapping[str, str]:
    """OpenRouter's 429 may have the headers in the body."""
    headers = _field(_field(_field(payload, "error"), "metadata"), "headers")
    if not isinstance(headers, dict):
        return {}
    return {name.lower(): str(value) for name, value in cast("dict[str, object]", headers).items()}


def _in_message(message: str) -> float | None:
    match = _TRY_AGAIN_IN.search(message[:4_000])
    return None if match is None else duration(match[1])


def _field(value: object, name: str) -> Any:
    return cast("dict[str, Any]", value).get(name) if isinstance(value, dict) else None


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _date(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
