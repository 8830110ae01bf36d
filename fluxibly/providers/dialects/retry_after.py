"""When a service says to try again: headers, fields and sentences of an error as seconds to wait."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, cast

_EPOCH_SECONDS = 1e9
"""A reset "time" above this is seconds since 1970 rather than a wait; above a thousand times this, milliseconds."""

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?", re.ASCII)
_TRY_AGAIN_IN = re.compile(
    r"(?:try again|retry) (?:in|after) ((?:\d+(?:\.\d+)?(?:ms|[dhms]))+)", re.ASCII | re.IGNORECASE
)


def retry_after_of(headers: Mapping[str, str], payload: object, message: str, *, now: float) -> float | None:
    """Return the seconds to wait before a retry, if the service asked for a delay, else None.

    A date in the past is a wait of 0. What is no time (a negative or an endless number, other text) is passed over.

    In order of trust: `retry-after-ms`, `retry-after` (seconds or an HTTP date, RFC 9110 §10.2.3), Google's
    `RetryInfo` in the body, the reset of an exhausted `x-ratelimit-*` or `ratelimit-*`, and "try again in 20s" in the
    message.

    Args:
        headers: the response headers, with lower-case names.
        payload: the decoded body.
        message: the service's message.
        now: the current time in seconds since 1970, for the dates.
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
    return next((hint for hint in hints if hint is not None), None)


def retry_info(payload: object) -> float | None:
    """Return the seconds of a `google.rpc.RetryInfo` in the body of an error; None if there is no RetryInfo."""
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
    """Return the seconds of "48s", "6m0s", "1.5s", "20ms", "1d2h", or of a bare number from 0; None for other text."""
    number = _number(text)
    if number is not None:
        return number
    match = _DURATION.fullmatch(text.strip())
    if match is None or not match[0]:
        return None
    days, hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return _finite(days * 86_400 + hours * 3_600 + minutes * 60 + seconds + milliseconds / 1_000)


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
    server_now = _date(headers.get("date", ""))  # the server's clock may differ from the local clock
    return max(0.0, moment - (now if server_now is None else server_now))


def _reset(headers: Mapping[str, str], now: float) -> float | None:
    """Return the wait until the exhausted limits reset; None if the headers do not report an exhausted limit."""
    waits = [
        duration(value)
        for name, value in headers.items()
        if "ratelimit-reset" in name and headers.get(name.replace("-reset", "-remaining")) == "0"
    ]
    longest = max((wait for wait in waits if wait is not None), default=None)
    if longest is None or longest < _EPOCH_SECONDS:
        return longest
    return max(0.0, (longest if longest < _EPOCH_SECONDS * 1_000 else longest / 1_000) - now)


def _headers_inside(payload: object) -> Mapping[str, str]:
    """Return the headers in a body: OpenRouter's 429 may have them there."""
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
    """Return the number from 0 that a text is; None for other text."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return _finite(number) if number >= 0 else None


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _date(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
