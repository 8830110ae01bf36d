"""Errors as services report them: their class, whether and when to retry, and their message."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from support.dialects import interrupted, sse
from support.recordings import load

from fluxibly import errors
from fluxibly._durations import duration
from fluxibly.errors import ProviderError
from fluxibly.providers.dialects.errors import EXCERPT_LENGTH, error_of_payload, error_of_response, read_report
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.retry_after import retry_after_of

NOW = 1_700_000_000.0


def error(status: int, body: object, headers: dict[str, str] | None = None) -> ProviderError:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return error_of_response(status, headers or {}, data, service="Acme")


@pytest.mark.parametrize(
    ("status", "body", "kind", "retryable"),
    [
        (400, {"error": {"message": "bad", "type": "invalid_request_error"}}, errors.BadRequest, False),
        (401, {"error": {"message": "no", "code": "invalid_api_key"}}, errors.AuthenticationError, False),
        (402, {"error": {"message": "Insufficient Balance"}}, errors.QuotaExceeded, False),
        (403, {"error": {"message": "no"}}, errors.PermissionDenied, False),
        (404, {"error": {"code": "model_not_found", "message": "no"}}, errors.NotFound, False),
        (408, b"", errors.RequestTimeout, True),
        (409, {"error": {"message": "locked"}}, errors.BadRequest, True),
        (413, b"<html><title>413 Request Entity Too Large</title></html>", errors.BadRequest, False),
        (422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, errors.BadRequest, False),
        (429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, errors.RateLimitError, True),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, errors.QuotaExceeded, False),
        (429, {"error": {"message": "pay", "type": "insufficient_quota", "code": None}}, errors.QuotaExceeded, False),
        (400, {"error": {"message": "Your credit balance is too low to access the API."}}, errors.QuotaExceeded, False),
        (
            429,
            {
                "code": "Some resource has been exhausted",
                "error": "Your team t-1 has either used all available credits or reached its monthly spending limit.",
            },
            errors.QuotaExceeded,
            False,
        ),
        (403, {"error": "You have run out of credits or need a subscription."}, errors.QuotaExceeded, False),
        (429, {"error": {"message": "Rate limit reached: 3 of 3 requests"}}, errors.RateLimitError, True),
        (500, {"error": {"message": "broken"}}, errors.ServerError, True),
        (500, {"error": {"message": "tools param requires --jinja flag", "code": 500}}, errors.BadRequest, False),
        (500, {"error": {"message": "audio is not supported"}}, errors.BadRequest, False),
        (501, b"", errors.BadRequest, False),
        (502, b"<html><h1>Bad gateway</h1></html>", errors.ServerError, True),
        (503, b"", errors.Overloaded, True),
        (504, b"", errors.RequestTimeout, True),
        (529, {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, errors.Overloaded, True),
        (500, {"error": {"type": "overloaded_error", "message": "busy"}}, errors.Overloaded, True),
        (599, b"", errors.ServerError, True),
        (400, {"error": {"code": "context_length_exceeded", "message": "…"}}, errors.ContextLengthExceeded, False),
        (400, {"error": {"type": "exceed_context_size_error", "code": 400}}, errors.ContextLengthExceeded, False),
        (
            400,
            {"object": "error", "message": "maximum context length is 4 tokens"},
            errors.ContextLengthExceeded,
            False,
        ),
        (400, {"error": {"code": "content_filter", "message": "…"}}, errors.ContentFiltered, False),
        (
            400,
            {"error": {"code": None, "innererror": {"code": "ResponsibleAIPolicyViolation"}}},
            errors.ContentFiltered,
            False,
        ),
        (
            400,
            {"error": {"code": 400, "status": "INVALID_ARGUMENT", "details": [{"reason": "API_KEY_INVALID"}]}},
            errors.AuthenticationError,
            False,
        ),
    ],
)
def test_the_class_of_an_error(status: int, body: object, kind: type[ProviderError], retryable: bool) -> None:
    """The service's own codes decide the class first, then its status."""
    found = error(status, body)
    assert type(found) is kind
    assert (found.retryable, found.status) == (retryable, status)


def invalid(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", **fields}}


TOO_LONG: list[tuple[int, dict[str, Any]]] = [
    (400, {"error": {"message": "The total length of all messages is too long.", "type": "too_many_prompt_tokens"}}),
    (400, {"error": {"message": "User input tokens exceeds 127072 tokens", "type": "x", "code": 400}}),
    (
        400,
        {
            "error": {
                "message": "Requested 115120 to generate tokens, following a prompt of length 40055, which exceeds the "
                "max limit of 128000 tokens.",
                "type": "requested_too_many_tokens",
                "code": 400,
            }
        },
    ),
    (400, {"error": {"message": "Token limit reached", "code": 400}}),
    (502, {"error": {"message": "Provider returned error", "code": 502, "metadata": {"raw": "Token limit reached"}}}),
    (400, invalid("This endpoint's maximum context length is 131072 tokens. However, you requested about 138956.")),
    (
        400,
        invalid(
            "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000, decrease input length or "
            "`max_tokens` and try again"
        ),
    ),
    (400, invalid("prompt is too long: 208310 tokens > 200000 maximum")),
    (
        400,
        {
            "code": "Client specified an invalid argument",
            "error": "This model's maximum prompt length is 131072 but the request contains 150000 tokens.",
        },
    ),
    (400, invalid("Invalid request: Your request exceeded model token limit: 262144 (requested: 269030)")),
    (
        400,
        invalid(
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4097. Given: 4000 `inputs` tokens and "
            "500 `max_new_tokens`"
        ),
    ),
    (422, {"error": "Input validation error: `inputs` must have less than 2048 tokens. Given: 3000"}),
    (400, {"error": {"message": "Input length 5000 exceeds maximum allowed token size 4096"}}),
    (400, {"error": {"message": "Input length 30000 exceeds the maximum allowed input length of 26214 tokens."}}),
    (400, {"error": {"message": "prompt token count of 7 exceeds the limit of 6", "code": "invalid_request_body"}}),
    (400, {"error": {"message": "no", "code": "model_max_prompt_tokens_exceeded"}}),
    (400, invalid("Range of input length should be [1, 30720]", code="invalid_parameter_error")),
    (400, {"error": {"message": "Prompt exceeds max length", "code": "1261"}}),
    (400, {"error": {"message": "Prompt 超长", "code": "1261"}}),
    (500, {"error": {"message": "Prompt exceeds max length"}}),
    (400, {"error": {"message": "The input token count (1196265) exceeds the maximum number of tokens allowed"}}),
    (400, {"error": {"message": "the request exceeds the available context size. try increasing it"}}),
    (400, {"error": {"message": "The decoder prompt (length 9) is longer than the maximum model length of 8."}}),
    (
        400,
        invalid(
            "'max_tokens' or 'max_completion_tokens' is too large: 9000. This model's maximum context length is 8192 "
            "tokens and your request has 20 input tokens (9000 > 8192 - 20)."
        ),
    ),
    (400, {"error": {"message": "Please reduce the length of the messages or completion."}}),
    (400, {"message": "too many tokens: total number of tokens in the prompt cannot exceed 4081"}),
]
NO_MONEY: list[tuple[int, dict[str, Any]]] = [
    (400, invalid("You have reached your specified API usage limits. You will regain access on 2026-04-01.")),
    (400, invalid("You have reached your specified workspace API usage limits.")),
    (429, {"error": {"code": "1113", "message": "Insufficient balance or no resource package. Please recharge."}}),
    (429, {"error": {"code": "1113", "message": "…"}}),
    (429, {"error": {"message": "余额不足或无可用资源包,请充值。"}}),
    (429, {"error": {"message": "Your allowance has been reached.", "type": "budget_exceeded", "code": "429"}}),
    (400, {"error": {"message": "Budget has been exceeded! Current cost: 26.075, Max budget: 0.25", "code": "400"}}),
    (401, {"error": {"message": "ExceededBudget: End User=ann over budget. Spend=2, Budget=1", "type": "auth_error"}}),
    (429, {"error": {"message": "No deployments available - crossed budget: Exceeded budget for deployment x"}}),
    (500, {"error": {"message": "Insufficient credits"}}),
]
NEITHER: list[tuple[int, dict[str, Any], type[ProviderError]]] = [
    (
        429,
        {
            "error": {
                "message": "Request too large for o3 in organization org-1 on tokens per min (TPM): Limit 30000, "
                "Requested 31756. The input or output tokens must be reduced in order to run successfully.",
                "type": "tokens",
                "code": "rate_limit_exceeded",
            }
        },
        errors.RateLimitError,
    ),
    (
        413,
        {"error": {"message": "Request too large on tokens per minute (TPM): Limit 6000, Requested 7000"}},
        errors.BadRequest,
    ),
    (400, {"error": {"message": "Token limit exceeded: 90,000 input tokens per minute"}}, errors.BadRequest),
    (400, {"error": {"message": "Daily token limit reached. Upgrade your plan."}}, errors.BadRequest),
    (400, {"error": {"message": "Rate limit: too many tokens"}}, errors.BadRequest),
    (429, {"error": {"message": "Quota exceeded for metric: input token count"}}, errors.RateLimitError),
    (429, {"error": {"message": "Token limit reached"}}, errors.RateLimitError),
    (
        400,
        invalid("max_tokens is too large: 65535. This model supports at most 16384 completion tokens."),
        errors.BadRequest,
    ),
    (
        400,
        invalid("max_tokens: 100000 > 64000, which is the maximum allowed number of output tokens for claude"),
        errors.BadRequest,
    ),
    (400, invalid("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]"), errors.BadRequest),
    (400, invalid("Range of max_tokens should be [1, 8192]"), errors.BadRequest),
    (400, invalid("Input validation error: `max_new_tokens` must be <= 512. Given: 600"), errors.BadRequest),
    (
        400,
        invalid(
            "`max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens` is less than the "
            "`context_window` for this model"
        ),
        errors.BadRequest,
    ),
    (400, invalid("thinking.budget_tokens: the budget must be less than max_tokens"), errors.BadRequest),
    (
        499,
        {"error": {"code": 499, "message": "The operation was cancelled.", "status": "CANCELLED"}},
        errors.ServerError,
    ),
]
WORDS: list[tuple[int, dict[str, Any], type[ProviderError]]] = [
    *[(status, body, errors.ContextLengthExceeded) for status, body in TOO_LONG],
    *[(status, body, errors.QuotaExceeded) for status, body in NO_MONEY],
    *NEITHER,
]


@pytest.mark.parametrize(("status", "body", "kind"), WORDS)
def test_what_services_say_of_length_and_money(status: int, body: dict[str, Any], kind: type[ProviderError]) -> None:
    """A full context and an empty account are known by each service's words, and told from other limits."""
    found = error(status, body)
    assert type(found) is kind
    assert found.retryable is kind.default_retryable


@pytest.mark.parametrize(("body", "kind"), [(body, kind) for _, body, kind in WORDS if kind is not errors.BadRequest])
def test_what_services_say_in_a_200(body: dict[str, Any], kind: type[ProviderError]) -> None:
    """The same words count in the body of a 200, and in a stream after its first text."""
    if kind is errors.RateLimitError:
        body = {"error": {"code": 429, **body["error"]}}
    data = json.dumps(body).encode()
    codec = OpenAICodec()
    with pytest.raises(kind) as caught:
        codec.decode(data)
    assert type(caught.value) is kind
    partial, failure = interrupted(codec, sse({"choices": [{"index": 0, "delta": {"content": "Hel"}}]}, body))
    assert (partial.text, type(failure)) == ("Hel", kind)


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ({"error": {"message": "what", "type": "t", "code": "c"}}, "c", "what"),
        ({"error": {"message": "what", "type": "t", "code": None}}, "t", "what"),
        ({"error": {"message": "what", "code": 400}}, "400", "what"),
        ({"error": "what"}, None, "what"),
        ({"code": "The model does not exist", "error": "what"}, "The model does not exist", "what"),
        ({"detail": "what"}, None, "what"),
        ({"detail": [{"msg": "what"}, {"msg": "else"}]}, None, "what; else"),
        ({"detail": {"message": "what"}}, None, "what"),
        ({"object": "error", "message": "what", "type": "t", "code": "1500"}, "1500", "what"),
        ({"message": {"detail": [{"msg": "what"}]}, "code": None}, None, "what"),
        ({"errors": [{"message": "what", "code": 7003}]}, "7003", "what"),
        ([{"error": {"message": "what", "code": 400, "status": "S"}}], "S", "what"),
        ({"error": {"message": "short", "code": 400, "metadata": {"raw": "what"}}}, "400", "short: what"),
        (b"what", None, "what"),
        (b" \n", None, "white space"),
        (b"", None, "an empty body"),
        (b"<!DOCTYPE html><title>what</title>", None, "an HTML page titled 'what'"),
        (b"\xff\xfe", None, "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_the_shapes_of_errors(body: object, code: str | None, says: str) -> None:
    """Every shape of error body is read; the message names the service, quotes its message and gives advice."""
    found = error(400, body)
    assert found.code == code
    assert str(found).startswith("Acme answered 400")
    assert f": {says}" in str(found)
    assert str(found).endswith("Change the request's parameters or messages.")


@pytest.mark.parametrize(
    "payload",
    [None, 3, "text", [], {}, {"error": None}, {"error": ""}, {"choices": [], "message": "x"}, {"detail": None}],
)
def test_bodies_without_an_error(payload: object) -> None:
    """Bodies that do not report an error are not errors."""
    assert read_report(payload) is None
    assert error_of_payload(payload) is None


def test_an_error_without_a_status() -> None:
    """In a stream, a numeric code of any type serves as the status; otherwise the service's codes decide."""
    assert type(error_of_payload({"error": {"code": "429", "message": "slow"}})) is errors.RateLimitError
    assert type(error_of_payload({"error": {"status_code": 400, "code": "tool_use_failed"}})) is errors.BadRequest
    assert type(error_of_payload({"error": {"type": "overloaded_error"}})) is errors.Overloaded
    assert type(error_of_payload({"error": {"code": "context_length_exceeded"}})) is errors.ContextLengthExceeded
    assert type(error_of_payload({"error": {"message": "prompt is too long"}})) is errors.ContextLengthExceeded
    assert type(error_of_payload({"error": "model runner has stopped"})) is errors.ServerError


def test_what_an_error_keeps() -> None:
    """An error keeps an excerpt of the body and the request's id, and shortens the message to fit a log line."""
    found = error(400, {"error": {"message": "x" * 10_000}}, {"x-request-id": "req_1"})
    assert found.request_id == "req_1"
    assert found.body is not None
    assert len(found.body) == EXCERPT_LENGTH
    assert len(str(found)) < 700
    assert error(400, b"").body is None


def test_a_service_says_itself_whether_to_retry() -> None:
    """`x-should-retry` takes precedence over the class."""
    assert error(400, b"", {"x-should-retry": "true"}).retryable
    assert not error(503, b"", {"x-should-retry": "false"}).retryable
    assert error(503, b"", {"x-should-retry": "perhaps"}).retryable


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "2s"}, 2),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT"}, 30),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT", "date": "Tue, 14 Nov 2023 22:13:45 GMT"}, 5),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:10 GMT"}, 0),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "-0.5", "retry-after-ms": "-1"}, None),
        ({"retry-after": "5", "retry-after-ms": "-1"}, 5),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": "9" * 400 + "s"}, None),
        ({"retry-after": "1e300"}, 1e300),
        ({"retry-after": "Tue, 99 Nov 2023 22:13:10 GMT"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": ""}, None),
        ({"x-ratelimit-reset-requests": "6m0s", "x-ratelimit-remaining-requests": "0"}, 360),
        ({"x-ratelimit-reset-requests": "1h", "x-ratelimit-remaining-requests": "5",
          "x-ratelimit-reset-tokens": "20ms", "x-ratelimit-remaining-tokens": "0"}, 0.02),
        ({"x-ratelimit-reset-tokens-minute": "33.5", "x-ratelimit-remaining-tokens-minute": "0",
          "x-ratelimit-reset-requests-day": "9000", "x-ratelimit-remaining-requests-day": "3"}, 33.5),
        ({"ratelimit-reset": "12", "ratelimit-remaining": "0"}, 12),
        ({"x-ratelimit-reset-requests": "2s", "x-ratelimit-remaining-requests": "0",
          "x-ratelimit-reset-tokens": "1m", "x-ratelimit-remaining-tokens": "0"}, 60),
        ({"x-ratelimit-reset-requests": "1h"}, None),
        ({"x-ratelimit-reset": "1700000012", "x-ratelimit-remaining": "0"}, 12),
        ({"x-ratelimit-reset": "1700000012000", "x-ratelimit-remaining": "0"}, 12),
        ({"x-ratelimit-reset": "1699999990", "x-ratelimit-remaining": "0"}, 0),
        ({"x-ratelimit-reset": "-3", "x-ratelimit-remaining": "0"}, None),
        ({"x-ratelimit-reset": "soon", "x-ratelimit-remaining": "0"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_retry_hints_in_headers(headers: dict[str, str], seconds: float | None) -> None:
    """Headers give seconds, milliseconds, an HTTP date by the server's clock, or the reset of an exhausted limit."""
    found = retry_after_of(headers, None, "", now=NOW)
    assert found == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("payload", "message", "seconds"),
    [
        ({"error": {"details": [{"@type": "x"}, {"@type": "google.rpc.RetryInfo", "retryDelay": "48s"}]}}, "", 48),
        ([{"error": {"details": [{"retryDelay": "1.5s"}]}}], "", 1.5),
        ({"error": {"details": [{"retryDelay": "-1.5s"}]}}, "", None),
        ({"error": {"details": [{"retryDelay": "-2"}]}}, "Please retry in 3s.", 3),
        ({"error": {"details": [{"retryDelay": "NaN"}]}}, "", None),
        (
            {"error": {"metadata": {"headers": {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": 1700000060000}}}},
            "",
            60,
        ),
        (None, "Please try again in 7m12s.", 432),
        (None, "Please retry in 48.9s.", 48.9),
        (None, "Rate limit reached. Please try again in 250ms. Visit …", 0.25),
        (None, "Try again later.", None),
        (None, "Please try again in -5s.", None),
        (None, f"Please try again in {'9' * 400}s.", None),
        ({"error": {"details": "none"}}, "", None),
        ({"error": []}, "", None),
    ],
)
def test_retry_hints_in_bodies(payload: object, message: str, seconds: float | None) -> None:
    """Bodies give Google's RetryInfo, headers that OpenRouter quotes, or a delay in the message."""
    found = retry_after_of({}, payload, message, now=NOW)
    assert found == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("text", "seconds"), [("1d2h3m4s", 93_784), ("12", 12), ("5ms", 0.005), ("", None), ("x", None)]
)
def test_durations(text: str, seconds: float | None) -> None:
    """Durations are written as in Go, as most services do."""
    assert duration(text) == seconds


@pytest.mark.parametrize(
    ("name", "kind", "retryable", "retry_after", "code"),
    [
        ("11-", errors.RateLimitError, True, None, "429"),
        ("26-", errors.BadRequest, False, None, "server_error"),
        ("36-", errors.AuthenticationError, False, None, "INVALID_ARGUMENT"),
        ("37-", errors.RateLimitError, True, 48, "RESOURCE_EXHAUSTED"),
        ("39-", errors.NotFound, False, None, None),
    ],
)
def test_recorded_errors(
    name: str, kind: type[ProviderError], retryable: bool, retry_after: float | None, code: str | None
) -> None:
    """Recorded: OpenRouter's 429, llama.cpp's 500, Gemini's invalid key and exhausted limit, Ollama's missing model."""
    recording = load(name)
    found = error_of_response(recording.status, recording.headers, recording.body, service="Acme")
    assert type(found) is kind
    assert (found.retryable, found.retry_after, found.code) == (retryable, retry_after, code)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["error", "errors", "detail", "details", "message", "code", "type", "status", "metadata", "raw",
                         "headers", "innererror", "retryDelay", "x-ratelimit-reset", "x-ratelimit-remaining"]),
        inner,
        max_size=4,
    ),
)  # fmt: skip


@settings(deadline=None)
@given(
    st.integers(300, 600),
    st.dictionaries(
        st.sampled_from(["retry-after", "retry-after-ms", "date", "x-ratelimit-reset"]), st.text(max_size=30)
    ),
    JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=50),
)
def test_any_answer_is_an_error_of_ours(status: int, headers: dict[str, Any], body: bytes) -> None:
    """A response of any shape becomes a ProviderError, whose retry hint is a number of seconds that can be slept."""
    found = error_of_response(status, headers, body)
    assert isinstance(found, ProviderError)
    assert found.retry_after is None or 0 <= found.retry_after < float("inf")
