"""Which class an error is, by the service's own words and its HTTP status, and what its user can do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from fluxibly import errors
from fluxibly.errors import ProviderError

_CONTEXT_LENGTH = re.compile(
    r"context[ _-]?(length|window|size)|maximum context|prompt is too long|input is too long|too many (input )?tokens"
    r"|exceeds? the (available|maximum) (context|number of tokens)|input token count",
    re.IGNORECASE,
)
_NO_MONEY = re.compile(
    r"credit balance|(used|run out of|out of) (all )?(available )?credits|doesn't have any credits|purchase more credits"
    r"|spending limit|insufficient (balance|credits|funds)",
    re.IGNORECASE,
)
"""Of an account without money: Anthropic says it with a 400, xAI with a 403 or a 429, and no code tells."""
_UNSUPPORTED = re.compile(
    r"\brequires? (the )?--?\w|not supported|unsupported|does(n't| not) support|not implemented",
    re.IGNORECASE,
)
"""llama.cpp's words for a request that it cannot serve; its status is 500."""

_WORDS: Final[Mapping[type[ProviderError], str]] = {
    errors.ContextLengthExceeded: "context_length_exceeded exceed_context_size_error model_context_window_exceeded",
    errors.ContentFiltered: "content_filter content_filter_error responsibleaipolicyviolation"
    " content_policy_violation moderation_blocked data_inspection_failed",
    errors.QuotaExceeded: "insufficient_quota billing_hard_limit_reached billing_not_active billing_error"
    " insufficient_balance insufficient_credits exceeded_current_quota_error",
    errors.AuthenticationError: "invalid_api_key incorrect_api_key api_key_invalid api_key_expired authentication_error"
    " invalid_authentication_error unauthenticated unauthorized",
    errors.Overloaded: "overloaded_error overloaded engine_overloaded server_overloaded unavailable"
    " service_unavailable",
    errors.NotFound: "model_not_found not_found_error not_found deploymentnotfound",
    errors.PermissionDenied: "permission_error permission_denied access_denied forbidden",
    errors.RateLimitError: "rate_limit_exceeded rate_limit_error rate_limited too_many_requests resource_exhausted"
    " requests tokens",
    errors.RequestTimeout: "timeout timeout_error request_timeout deadline_exceeded",
    errors.BadRequest: "invalid_request_error invalid_request invalid_argument bad_request failed_precondition",
}
"""The codes and types of errors that services use, most decisive first."""

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
    501: errors.BadRequest,
    503: errors.Overloaded,
    504: errors.RequestTimeout,
    529: errors.Overloaded,  # Anthropic's
}

_DECISIVE: Final[tuple[type[ProviderError], ...]] = (
    errors.ContextLengthExceeded,
    errors.ContentFiltered,
    errors.QuotaExceeded,
)
"""Classes that a service's own word chooses whatever the status."""

ADVICE: Final[Mapping[type[ProviderError], str]] = {
    errors.AuthenticationError: "Check the API key: api_key in the config, or the provider's environment variable.",
    errors.PermissionDenied: "Check what the API key's account or project may use.",
    errors.NotFound: "Check the model's name and api_base.",
    errors.ContextLengthExceeded: "Shorten the prompt, lower max_tokens, or choose a model with a longer context.",
    errors.ContentFiltered: "Rephrase the prompt, or change the service's content filter.",
    errors.RateLimitError: "Try again later, or ask the service for higher limits.",
    errors.QuotaExceeded: "Waiting does not help: check the account's plan, billing and limits.",
    errors.ServerError: "The failure is the service's; try again.",
    errors.Overloaded: "Try again later.",
    errors.RequestTimeout: "Try again, or ask for a shorter answer.",
    errors.BadRequest: "Change the request's parameters or messages.",
}
"""What a user can do about each."""


def class_of(status: int | None, words: tuple[str, ...], message: str) -> type[ProviderError]:
    """The class of an error.

    Args:
        status: the HTTP status; None in a stream that does not say.
        words: the service's codes and types, in lower case.
        message: its message, which alone tells of a full context, or of an empty account, at some services.
    """
    by_word = min((_BY_WORD[word] for word in words if word in _BY_WORD), key=_RANK.__getitem__, default=None)
    if by_word is not None and by_word in _DECISIVE:
        return by_word
    if status in {None, 400, 413, 422, 500} and _CONTEXT_LENGTH.search(message):
        return errors.ContextLengthExceeded
    if status in {None, 400, 403, 429} and _NO_MONEY.search(message):
        return errors.QuotaExceeded
    if status is None:
        return by_word or errors.ServerError
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status < 500:
        # Gemini says that an API key is wrong with a 400
        return by_word if by_word in {errors.AuthenticationError, errors.NotFound} else errors.BadRequest
    if status == 500 and _UNSUPPORTED.search(message):
        return errors.BadRequest
    return errors.Overloaded if by_word is errors.Overloaded else errors.ServerError


def is_retryable(kind: type[ProviderError], status: int | None, headers: Mapping[str, str]) -> bool:
    """Whether the same request may succeed later: as the service says (`x-should-retry`), else by class and status."""
    said = headers.get("x-should-retry")
    if said in {"true", "false"}:
        return said == "true"
    return kind.default_retryable or status == 409  # a lock, as OpenAI's own client takes it
