"""Errors as services report them: their message, their class, and whether and when to retry.

A codec passes its data (an HTTP status, headers, a decoded body) to `error_of` and gets the `ProviderError`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, Final, cast

import attrs

from fluxibly import errors
from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.providers.dialects.json_values import as_object, as_text, describe, read_json
from fluxibly.providers.dialects.retry_after import retry_after_of

# Reports


EXCERPT_LENGTH: Final = 2_000
"""Maximum number of characters of a service's body that an error keeps."""
QUOTE_LENGTH: Final = 500
"""Maximum number of characters of a service's message that an error message quotes."""


@attrs.frozen(kw_only=True)
class Report:
    """A service's report of an error. `words` are its codes and types in lower case, the most specific first."""

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
    """Return the error of a non-2xx response. `headers` have lower-case names; `kind` is as for `error_of`."""
    try:
        payload: object = read_json(body)
    except StreamProtocolError:
        payload = None
    report = read_report(payload) or Report(message=_plain_text(body))
    return error_of(
        report, status=status, headers=headers, payload=payload, excerpt=excerpt(body), service=service, kind=kind
    )


def error_of_payload(payload: object, *, body: bytes = b"", service: str = "") -> ProviderError | None:
    """Return the error that a body or an event of a 200 reports; None if it does not report an error."""
    report = read_report(payload)
    if report is None:
        return None
    return error_of(report, status=report.status, payload=payload, excerpt=excerpt(body), service=service)


def error_of_event(data: bytes, *, service: str = "") -> ProviderError:
    """Return the error of a stream event that is named `error`, whatever its data."""
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
    """Return the `ProviderError` for a report.

    Args:
        report: the service's report.
        status: the HTTP status, or the status that the body of a 200 names.
        headers: the response headers, with lower-case names.
        payload: the decoded body.
        excerpt: the part of the body that the error keeps.
        service: the service's name for the message ("OpenRouter").
        kind: the error's class, if the dialect knows it better than the codes that all services use.
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
    """Return the beginning of a body, for an error to keep; None if the body is empty."""
    return body[: 4 * EXCERPT_LENGTH].decode(errors="replace")[:EXCERPT_LENGTH] or None


def request_id_of(headers: Mapping[str, str]) -> str | None:
    """Return the service's id of a request, which its support team asks for."""
    return next((headers[name] for name in _REQUEST_ID_HEADERS if headers.get(name)), None)


def _id_in(payload: object) -> str | None:
    """Return the request's id from a body that has it next to the error, as Anthropic's bodies do."""
    found: object = as_object(payload).get("request_id")
    return found if isinstance(found, str) and found else None


_REQUEST_ID_HEADERS: Final = (
    "x-request-id",
    "request-id",
    "apim-request-id",
    "x-amzn-requestid",
    "x-debug-trace-id",
    "x-generation-id",
    "mistral-correlation-id",
    "cf-ray",
)


# Reading reports


def read_report(payload: object) -> Report | None:
    """Return the error in a decoded body or event, in any shape that services use; None if there is no error."""
    if isinstance(payload, list):
        payload = next(iter(cast("list[object]", payload)), None)
    if not isinstance(payload, dict):
        return None
    outer = cast("dict[str, Any]", payload)
    for key in ("error", "errors", "detail"):
        if outer.get(key):
            inner: Any = outer[key]
            return _report(inner[0] if key == "errors" and isinstance(inner, list) else inner, outer)
    told = as_object(outer.get("base_resp"))
    code = told.get("status_code")
    if type(code) in (int, str) and str(code) not in ("0", ""):  # MiniMax says in each answer that it is none
        return Report(message=as_text(told.get("status_msg")), code=str(code), words=(f"base_resp:{code}",))
    if "choices" not in outer and isinstance(outer.get("message"), (str, dict)):
        return _report(outer["message"], outer)
    return None


def _report(inner: Any, outer: dict[str, Any]) -> Report:
    fields = as_object(inner)
    given = [
        *(fields.get(key) for key in ("code", "type", "status", "reason")),
        *(detail.get("reason") for detail in _dicts(fields.get("details"))),
        as_object(fields.get("innererror") or fields.get("inner_error")).get("code"),
        *(outer.get(key) for key in ("code", "type")),
    ]
    words = [str(word) for word in given if isinstance(word, (str, int)) and not isinstance(word, bool)]
    named = [word for word in words if word and word.lower() != "error"]
    code = next((word for word in named if _status(word) is None), named[0] if named else None)
    statuses = map(
        _status,
        (
            *(fields.get(key) for key in ("status_code", "code", "status", "http_code")),
            *(outer.get(key) for key in ("code", "status")),
        ),
    )
    message = _words_of(inner)
    upstream: object = as_object(fields.get("metadata")).get("raw")  # OpenRouter quotes the upstream service here
    if isinstance(upstream, str) and upstream not in message:
        message = f"{message}: {upstream}"
    return Report(
        message=message,
        code=code,
        status=next((status for status in statuses if status is not None), None),
        words=tuple(word.lower() for word in words),
    )


def _words_of(value: object, depth: int = 0) -> str:
    """Return the message of an error, which may be text, an object with the message in a field, or a list of these."""
    if isinstance(value, str):
        return value
    if depth > 4:
        return ""
    if isinstance(value, list):
        return "; ".join(filter(None, [_words_of(item, depth + 1) for item in cast("list[object]", value)[:10]]))
    fields = as_object(value)
    for key in ("message", "msg", "detail", "error"):
        found = _words_of(fields.get(key), depth + 1)
        if found:
            return found
    return ""


def _dicts(value: object) -> list[dict[str, Any]]:
    return [as_object(item) for item in cast("list[object]", value)] if isinstance(value, list) else []


def _status(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) == 3:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 400 <= value < 600 else None


def _plain_text(body: bytes) -> str:
    kind = describe(body)
    if kind == "an HTML page":
        title = re.search(rb"<title[^>]{0,200}>([^<]{1,200})", body[:10_000], re.IGNORECASE)
        name = f" titled {title[1].decode(errors='replace').strip()!r}" if title else ""
        return f"an HTML page{name}, probably from a proxy"
    return kind if kind != "text" else body[: 4 * QUOTE_LENGTH].decode(errors="replace")


def _shortened(text: str) -> str:
    text = " ".join(text[: 4 * QUOTE_LENGTH].split())
    return text if len(text) <= QUOTE_LENGTH else text[:QUOTE_LENGTH] + "…"


# Classes


_CONTEXT_LENGTH = re.compile(
    r"context[ _-]?(length|window|size)|maximum context|(exceeds?|exceeded) (the )?context limit|context limit exceeded"
    r"|maximum (model|prompt) length|(prompt|input|messages) is too long|prompt exceeds max length|prompt 超长"
    r"|input length\b.{0,40}\bexceeds?\b|range of input length|input tokens exceed(s|ed)"
    r"|too many (input |prompt )?tokens|(input|prompt) token count|user input tokens exceeds|exceeded model token limit"
    r"|(?<!\w )token limit (reached|exceeded)|exceeds? the (available|maximum) (context|number of tokens)"
    r"|`inputs` (tokens \+|must have less than)|reduce the length of the (messages|prompt|input)",
    re.IGNORECASE,
)
_OTHER_LIMIT = re.compile(
    r"\bper[ _-]?(second|min|minute|hour|day|week|month)\b|\b[tr]p[md]\b|rate[ _-]?limit|quota"
    r"|max_\w*tokens\W{1,3}must be less than or equal",  # Groq goes on about the context window
    re.IGNORECASE,
)
"""Messages about tokens that are not about a full context: limits in a time, and an answer longer than any may be."""
_NO_MONEY = re.compile(
    r"credit balance|(used|run out of|out of) (all )?(available )?credits|doesn't have any credits|purchase more credits"
    r"|spending limit|insufficient (balance|credits|funds)|余额不足|reached your (specified )?(\w+ )?api usage limit"
    r"|budget has been exceeded|exceeded ?budget|over budget|crossed budget|free allocated quota",
    re.IGNORECASE,
)
"""Messages for an account without credit, or over its budget, that come without a specific code.

Anthropic sends a 400, xAI a 403 or a 429. Gateways may quote GLM's message without its code. LiteLLM's proxy has a code
for some of its budgets only.
"""
_BAD_KEY = re.compile(r"(incorrect|invalid) api key", re.IGNORECASE)
"""The words of a 400 about the key: xAI has no code for it."""
_UNSUPPORTED = re.compile(
    r"\brequires? (the )?--?\w|not supported|unsupported|does(n't| not) support|not implemented",
    re.IGNORECASE,
)
"""llama.cpp's messages for a request that it cannot serve. Their status is 500."""

_TOKEN_RATE = re.compile(r"error-code#token-limit|(?<!free )allocated quota exceeded", re.IGNORECASE)
"""DashScope's messages for too many tokens in a minute. Their code is OpenAI's for an account without credit."""
_INSPECTED = re.compile(r"data_?inspection_?failed", re.IGNORECASE)
"""The name of DashScope's content filter, which some of its errors have in the message only."""

_WORDS: Final[Mapping[type[ProviderError], str]] = {
    errors.ContextLengthExceeded: "context_length_exceeded exceed_context_size_error model_context_window_exceeded"
    " too_many_prompt_tokens requested_too_many_tokens model_max_prompt_tokens_exceeded tokens_limit_reached"
    " 1261",  # GLM
    errors.ContentFiltered: "content_filter content_filter_error responsibleaipolicyviolation"
    " content_policy_violation moderation_blocked data_inspection_failed datainspectionfailed"
    " 1301"  # GLM
    " base_resp:1026 base_resp:1027",  # MiniMax: the prompt, the answer
    errors.QuotaExceeded: "insufficient_quota billing_hard_limit_reached billing_not_active billing_error"
    " insufficient_balance insufficient_credits exceeded_current_quota_error budget_exceeded"
    " arrearage allocationquota.freetieronly commoditynotpurchased prepaidbilloverdue postpaidbilloverdue"  # DashScope
    " 1113 1309 1311"  # GLM: no credit, no plan, a plan without the model
    " base_resp:1008 base_resp:1028 base_resp:1030 base_resp:2061",
    errors.AuthenticationError: "invalid_api_key incorrect_api_key api_key_invalid api_key_expired authentication_error"
    " invalid_authentication_error unauthenticated unauthorized invalidapikey"
    " base_resp:1004 base_resp:2049",
    errors.Overloaded: "overloaded_error overloaded engine_overloaded server_overloaded unavailable"
    " service_unavailable 1312",  # GLM
    errors.NotFound: "model_not_found not_found_error not_found deploymentnotfound 1211",  # GLM
    errors.PermissionDenied: "permission_error permission_denied access_denied forbidden",
    errors.RateLimitError: "rate_limit_exceeded rate_limit_error rate_limited too_many_requests resource_exhausted"
    " requests tokens"
    " throttling throttling.ratequota throttling.allocationquota throttling.burstrate throttling.concurrency"
    " limitrequests limit_requests limit_burst_rate"  # DashScope
    " 1302 1303 1304 1305 1308 1310"  # GLM
    " base_resp:1002 base_resp:1039 base_resp:1041 base_resp:2045 base_resp:2056",
    errors.RequestTimeout: "timeout timeout_error request_timeout deadline_exceeded"
    " requesttimeout internalerror.timeout"  # DashScope
    " base_resp:1001",
    errors.BadRequest: "invalid_request_error invalid_request invalid_argument bad_request failed_precondition"
    " base_resp:1042 base_resp:2013",
}
"""The error codes and types that services use, the most decisive first."""

_BY_WORD: Final = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_RANK: Final = {kind: rank for rank, kind in enumerate(_WORDS)}

_BY_STATUS: Final[Mapping[int, type[ProviderError]]] = {
    401: errors.AuthenticationError,
    402: errors.QuotaExceeded,
    403: errors.PermissionDenied,
    404: errors.NotFound,
    408: errors.RequestTimeout,
    410: errors.NotFound,
    425: errors.Overloaded,
    429: errors.RateLimitError,
    498: errors.Overloaded,  # Groq: the flex tier has no capacity
    499: errors.ServerError,  # Gemini cancelled the call
    501: errors.BadRequest,
    503: errors.Overloaded,
    504: errors.RequestTimeout,
    529: errors.Overloaded,  # Anthropic is overloaded
}

_DECISIVE: Final[tuple[type[ProviderError], ...]] = (
    errors.ContextLengthExceeded,
    errors.ContentFiltered,
    errors.QuotaExceeded,
)
"""Classes that a service's code selects whatever the status."""

ADVICE: Final[Mapping[type[ProviderError], str]] = {
    errors.AuthenticationError: "Check the API key: api_key in the config, or the provider's environment variable.",
    errors.PermissionDenied: "Check what the API key's account or project may use.",
    errors.NotFound: "Check the model's name and api_base.",
    errors.ContextLengthExceeded: "Shorten the prompt, lower max_tokens, or choose a model with a longer context.",
    errors.ContentFiltered: "Rephrase the prompt, or change the service's content filter.",
    errors.RateLimitError: "Try again later, or ask the service for higher limits.",
    errors.QuotaExceeded: "Waiting does not help: check the account's plan, billing and limits.",
    errors.ServerError: "The service failed; try again.",
    errors.Overloaded: "Try again later.",
    errors.RequestTimeout: "Try again, or ask for a shorter answer.",
    errors.BadRequest: "Change the request's parameters or messages.",
}
"""Advice for the user, by class of error."""


def class_of(status: int | None, words: tuple[str, ...], message: str) -> type[ProviderError]:
    """Return the class of an error.

    Args:
        status: the HTTP status; None in a stream that does not report a status.
        words: the service's codes and types, in lower case.
        message: the service's message. At some services, only the message reveals a full context or an empty account.
    """
    by_word = min((_BY_WORD[word] for word in words if word in _BY_WORD), key=_RANK.__getitem__, default=None)
    if by_word is errors.QuotaExceeded and _TOKEN_RATE.search(message):
        return errors.RateLimitError
    if by_word is not None and by_word in _DECISIVE:
        return by_word
    unspecific = status not in _BY_STATUS  # such as 400 and 500, and in most streams None
    if unspecific and _INSPECTED.search(message):
        return errors.ContentFiltered
    if (unspecific or status in {401, 403, 429}) and _NO_MONEY.search(message):
        return errors.QuotaExceeded
    if (
        unspecific
        and by_word is not errors.RateLimitError
        and _CONTEXT_LENGTH.search(message)
        and not _OTHER_LIMIT.search(message)
    ):
        return errors.ContextLengthExceeded
    if status is None:
        return by_word or errors.ServerError
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status == 400 and _BAD_KEY.search(message):
        return errors.AuthenticationError
    if status < 500:
        # Gemini reports an invalid API key with a 400
        return by_word if by_word in {errors.AuthenticationError, errors.NotFound} else errors.BadRequest
    if status == 500 and _UNSUPPORTED.search(message):
        return errors.BadRequest
    return by_word if by_word in {errors.Overloaded, errors.RequestTimeout} else errors.ServerError


def is_retryable(kind: type[ProviderError], status: int | None, headers: Mapping[str, str]) -> bool:
    """Whether the same request may succeed later, by the service's `x-should-retry`, else by class and status."""
    said = headers.get("x-should-retry")
    if said in {"true", "false"}:
        return said == "true"
    return kind.default_retryable or status == 409  # a lock conflict, which OpenAI's own client retries too
