"""When a service says to try again: headers, fields and sentences of an error as seconds to wait."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from fluxibly._durations import date_of, duration, number_of

_EPOCH_SECONDS = 1e9
"""A reset "time" above this is seconds since 1970 rather than a wait; above a thousand times this, milliseconds."""

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
    milliseconds = number_of(headers.get("retry-after-ms"))
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


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    value = headers.get("retry-after")
    if not value:
        return None
    seconds = duration(value)
    if seconds is not None:
        return seconds
    moment = date_of(value)
    if moment is None:
        return None
    server_now = date_of(headers.get("date", ""))  # the server's clock may differ from the local clock
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
