"""The JSON values of an exchange: its request, its answer, and its error, which a replay makes anew."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any, cast

from fluxibly import errors
from fluxibly._checks import is_secret, public_headers, secrets_in, without_secrets
from fluxibly._dicts import Reader, plain
from fluxibly._masking import error_message, mask_request, mask_secrets
from fluxibly.errors import (
    FluxiblyError,
    GuardRefused,
    ProviderError,
    RequestTimeout,
    ResponseInvalid,
    StreamInterrupted,
    root_cause,
)
from fluxibly.types import ProviderInfo, Request, Response

_SETTINGS = (
    "tool_choice",
    "temperature",
    "max_tokens",
    "top_p",
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "stop",
    "seed",
    "n",
    "reasoning_effort",
    "response_format",
)


def request_fields(request: Request, info: ProviderInfo) -> dict[str, Any]:
    """Return what a line says of a request. Secret headers are left out, and secrets in `extra` masked.

    Raises:
        TypeError: the request has something that JSON does not have. (Some of that has a key.)
    """
    found: dict[str, Any] = {
        "provider": info.key,
        "model": request.model,
        "messages": [message.to_dict() for message in request.messages],
    }
    if request.tools:
        names = ("name", "description", "parameters", "strict")
        found["tools"] = [
            {name: value for name in names if (value := getattr(tool, name)) not in (None, "")}
            for tool in request.tools
        ]
    for name in _SETTINGS:
        value = getattr(request, name)
        if value not in (None, ()):
            found[name] = value
    if request.extra:
        found["extra"] = without_secrets(request.extra)
    headers = public_headers(request.headers)
    if headers:
        found["headers"] = dict(sorted(headers.items()))
    try:
        return cast("dict[str, Any]", plain(found, request))
    except TypeError as error:
        raise TypeError(f"the request: {str(error).partition(': ')[2]}") from None


_LEFT_OUT = ("elapsed", "stats", "total_usage", "cost", "cache_hit", "raw")
"""The fields of a response that the call gives it, and `raw`, which says the same again in the service's words."""


def answer_fields(response: Response, info: ProviderInfo) -> dict[str, Any]:
    """Return what a line says of an answer. Its provider is named if it is another than the asked one."""
    found = response.to_dict()
    for name in _LEFT_OUT:
        found.pop(name, None)
    if found.get("provider") == info.telemetry_name:
        del found["provider"]
    return found


_OF_A_PROVIDER = ("status", "code", "retryable", "retry_after", "provider", "model", "request_id")
_OF_AN_ERROR = (
    "class",
    "raised",
    "message",
    "interrupted",
    *_OF_A_PROVIDER,
    "rate_limits",
    "phase",
    "reason",
    "problem",
    "response",
)


def error_fields(error: Exception, request: Request) -> dict[str, Any]:
    """Return what a line says of an error. Its message is masked as in logs, and free of the request's secrets."""
    cause = root_cause(error)
    secrets = [*secrets_in(request.extra), *[value for name, value in request.headers.items() if is_secret(name)]]
    kind = _known_class(type(cause))
    found: dict[str, Any] = {
        "class": kind.__name__,
        "raised": None if type(cause) is kind else type(cause).__qualname__,
        "message": mask_secrets(error_message(error, (request,)), secrets),
        "interrupted": True if cause is not error else None,
    }
    if isinstance(cause, ProviderError):
        found |= {name: getattr(cause, name) for name in _OF_A_PROVIDER}
        found["rate_limits"] = dict(cause.rate_limits) or None
    if isinstance(cause, RequestTimeout) and cause.phase != type(cause).phase:
        found["phase"] = cause.phase
    if isinstance(cause, GuardRefused):
        found["reason"] = mask_secrets(mask_request(cause.reason, request), secrets)
    if isinstance(cause, ResponseInvalid):
        found["problem"] = mask_secrets(mask_request(cause.problem, request, [cause.response.message]), secrets)
        found["response"] = cause.response.to_dict()
    return {name: plain(value, cause) for name, value in found.items() if value is not None}


def _known_class(kind: type[BaseException]) -> type[Exception]:
    """Return the nearest base of a class that every program has, of `fluxibly.errors` or Python's own."""
    for base in kind.__mro__:
        if base is Exception:
            break
        if getattr(errors, base.__name__, None) is base or _takes_a_message(base):
            return cast("type[Exception]", base)
    return FluxiblyError


def _takes_a_message(kind: type) -> bool:
    """Whether a class is Python's own, and made with a message alone."""
    if getattr(builtins, kind.__name__, None) is not kind:
        return False
    try:
        kind("")
    except TypeError:
        return False
    return True


def error_of(given: Mapping[str, Any], partial: Response) -> tuple[Exception, bool]:
    """Return the error that a line describes, and whether it interrupted a stream. `partial` is what came before it.

    Raises:
        TypeError: the class is not made with a message alone.
        ValueError: a field is unknown or of the wrong type. The error names its path.
    """
    fields = Reader(given, "error")
    name, raised, message = fields.needed("class"), fields.text("raised"), fields.text("message", "")
    is_interruption = fields.take("interrupted", bool, "true or false", default=False)
    # A user's provider may give a code that is a number, for example; nothing depends on these.
    found = {each: fields.value(each) for each in ("status", "code", "provider", "model", "request_id")}
    found["retryable"] = fields.take("retryable", bool, "true or false")
    found["retry_after"] = fields.take("retry_after", (int, float), "a number")
    found["rate_limits"] = fields.table("rate_limits")
    phase, reason, problem = fields.text("phase"), fields.text("reason", ""), fields.text("problem", "")
    response = fields.table("response")
    fields.done(_OF_AN_ERROR)
    kind: Any = getattr(errors, name, None) or getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind, raised = FluxiblyError if found["retryable"] is None else ProviderError, name
    text = message if raised is None else f"{raised}: {message}"
    error: Exception
    if issubclass(kind, ProviderError):
        error = kind(text, **found)
        if phase is not None:
            cast("Any", error).phase = phase
    elif issubclass(kind, StreamInterrupted):
        error = kind(text, partial=partial)
    elif issubclass(kind, GuardRefused):
        error = kind(text, reason=reason)
    elif issubclass(kind, ResponseInvalid):
        error = kind(text, response=Response.from_dict(response or {}), problem=problem)
    else:
        error = kind(text)
    return error, is_interruption
