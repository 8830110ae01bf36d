"""Errors as services report them: what they say, whether and when to try again, and what to tell the user.

A codec gives `error_of` what it has (an HTTP status, headers, a decoded body) and gets the `ProviderError`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, Final, cast

import attrs

from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.providers.error_classes import ADVICE, class_of, is_retryable
from fluxibly.providers.json_reading import describe, read_json, table
from fluxibly.providers.retry_hints import retry_after_of

EXCERPT_LENGTH: Final = 2_000
"""Characters of a service's body that an error keeps."""
QUOTE_LENGTH: Final = 500
"""Characters of a service's words that a message quotes."""


@attrs.frozen(kw_only=True)
class Report:
    """What a service said of an error. `words` are its codes and types in lower case, the most telling first."""

    message: str = ""
    code: str | None = None
    status: int | None = None
    words: tuple[str, ...] = ()


def error_of_response(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    service: str = "",
    kind: type[ProviderError] | None = None,
) -> ProviderError:
    """The error of an answer whose status is not 2xx. `headers` have lower-case names; `kind` as for `error_of`."""
    try:
        payload: object = read_json(body)
    except StreamProtocolError:
        payload = None
    report = read_report(payload) or Report(message=_plain_text(body))
    return error_of(
        report, status=status, headers=headers, payload=payload, excerpt=excerpt(body), service=service, kind=kind
    )


def error_of_payload(payload: object, *, body: bytes = b"", service: str = "") -> ProviderError | None:
    """The error that a body or an event of a 200 reports; None if it reports none."""
    report = read_report(payload)
    if report is None:
        return None
    return error_of(report, status=report.status, payload=payload, excerpt=excerpt(body), service=service)


def error_of_event(data: bytes, *, service: str = "") -> ProviderError:
    """The error of a stream's event that is named one, whatever stands in it."""
    try:
        reported = error_of_payload(read_json(data), body=data, service=service)
    except StreamProtocolError:
        reported = None
    report = Report(message=data[: 4 * QUOTE_LENGTH].decode(errors="replace"))
    return reported or error_of(report, excerpt=excerpt(data), service=service)


def error_of(
    report: Report,
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
    payload: object = None,
    excerpt: str | None = None,
    service: str = "",
    kind: type[ProviderError] | None = None,
) -> ProviderError:
    """The `ProviderError` of a report.

    Args:
        status: the HTTP status, or what a body says it would have been.
        headers: with lower-case names.
        payload: the decoded body.
        excerpt: what the error keeps of the body.
        service: a name for the message ("OpenRouter").
        kind: its class, where the dialect knows better than the words that all services use.
    """
    headers = headers or {}
    kind = kind or class_of(status, report.words, report.message)
    label = " ".join(dict.fromkeys(filter(None, (str(status or ""), report.code))))
    said = _shortened(report.message)
    message = f"{service or 'the service'} answered {label or 'with an error'}{': ' if said else ''}{said}"
    message += "" if message.endswith((".", "!", "?", "…")) else "."
    return kind(
        f"{message} {ADVICE[kind]}" if kind in ADVICE else message,
        retryable=is_retryable(kind, status, headers),
        retry_after=retry_after_of(headers, payload, report.message, now=time.time()),
        status=status,
        code=report.code,
        request_id=request_id_of(headers) or _id_in(payload),
        body=excerpt,
    )


def excerpt(body: bytes) -> str | None:
    """The beginning of a body, for an error to keep; None if there is no body."""
    return body[: 4 * EXCERPT_LENGTH].decode(errors="replace")[:EXCERPT_LENGTH] or None


def request_id_of(headers: Mapping[str, str]) -> str | None:
    """The service's id of a request, which its support asks for."""
    return next((headers[name] for name in _REQUEST_ID_HEADERS if headers.get(name)), None)


def _id_in(payload: object) -> str | None:
    """A request's id where it stands beside the error in a body, as Anthropic sends it."""
    found: object = table(payload).get("request_id")
    return found if isinstance(found, str) and found else None


_REQUEST_ID_HEADERS: Final = (
    "x-request-id",
    "request-id",
    "apim-request-id",
    "x-generation-id",
    "mistral-correlation-id",
    "cf-ray",
)


# What the service said


def read_report(payload: object) -> Report | None:
    """The error in a decoded body or event, in any of the shapes that services use; None if there is none."""
    if isinstance(payload, list):
        payload = next(iter(cast("list[object]", payload)), None)
    if not isinstance(payload, dict):
        return None
    outer = cast("dict[str, Any]", payload)
    for key in ("error", "errors", "detail"):
        if outer.get(key):
            inner: Any = outer[key]
            return _report(inner[0] if key == "errors" and isinstance(inner, list) else inner, outer)
    if "choices" not in outer and isinstance(outer.get("message"), (str, dict)):
        return _report(outer["message"], outer)
    return None


def _report(inner: Any, outer: dict[str, Any]) -> Report:
    fields = table(inner)
    given = [
        *(fields.get(key) for key in ("code", "type", "status", "reason")),
        *(detail.get("reason") for detail in _dicts(fields.get("details"))),
        table(fields.get("innererror") or fields.get("inner_error")).get("code"),
        *(outer.get(key) for key in ("code", "type")),
    ]
    words = [str(word) for word in given if isinstance(word, (str, int)) and not isinstance(word, bool)]
    named = [word for word in words if word and word.lower() != "error"]
    code = next((word for word in named if _status(word) is None), named[0] if named else None)
    statuses = map(
        _status,
        (fields.get("status_code"), fields.get("code"), fields.get("status"), outer.get("code"), outer.get("status")),
    )
    message = _words_of(inner)
    upstream: object = table(fields.get("metadata")).get("raw")  # OpenRouter's quote of the service behind it
    if isinstance(upstream, str) and upstream not in message:
        message = f"{message}: {upstream}"
    return Report(
        message=message,
        code=code,
        status=next((status for status in statuses if status is not None), None),
        words=tuple(word.lower() for word in words),
    )


def _words_of(value: object, depth: int = 0) -> str:
    """The message in an error, which may be text, an object that has it under some name, or a list of either."""
    if isinstance(value, str):
        return value
    if depth > 4:
        return ""
    if isinstance(value, list):
        return "; ".join(filter(None, [_words_of(item, depth + 1) for item in cast("list[object]", value)[:10]]))
    fields = table(value)
    for key in ("message", "msg", "detail", "error"):
        found = _words_of(fields.get(key), depth + 1)
        if found:
            return found
    return ""


def _dicts(value: object) -> list[dict[str, Any]]:
    return [table(item) for item in cast("list[object]", value)] if isinstance(value, list) else []


def _status(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) == 3:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 400 <= value < 600 else None


def _plain_text(body: bytes) -> str:
    kind = describe(body)
    if kind == "an HTML page":
        title = re.search(rb"<title[^>]{0,200}>([^<]{1,200})", body[:10_000], re.IGNORECASE)
        name = f" titled {title[1].decode(errors='replace').strip()!r}" if title else ""
        return f"an HTML page{name}, as proxies send it"
    return kind if kind != "text" else body[: 4 * QUOTE_LENGTH].decode(errors="replace")


def _shortened(text: str) -> str:
    text = " ".join(text[: 4 * QUOTE_LENGTH].split())
    return text if len(text) <= QUOTE_LENGTH else text[:QUOTE_LENGTH] + "…"
