"""Services in `services.py`: their rows, their errors, and the fields that only they have."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from support import dialects
from support.dialects import answering, ask, interrupted, recut
from support.readme import ROOT

from fluxibly import errors
from fluxibly.config import LLMConfig
from fluxibly.errors import BadRequest, ProviderError
from fluxibly.providers.dialects.codec import Codec
from fluxibly.providers.openai import OpenAIProvider, codec_of
from fluxibly.providers.services import SERVICES
from fluxibly.registry import frameworks
from fluxibly.testing.modes import MODES, Mode
from fluxibly.types import Message, Opaque, Reasoning, Request, Response, Text, Tool, ToolCall, Usage

sse = partial(dialects.sse, done=True)
SEEN = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}


def codec(framework: str) -> Codec:
    return codec_of(SERVICES[framework], LLMConfig(framework=framework, model="m"))


def whole(framework: str, message: dict[str, Any], finish: str = "stop", **body: Any) -> Response:
    """Return the response of a whole answer."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return codec(framework).decode(json.dumps({"choices": [choice], **body}).encode())


def chunk(delta: dict[str, Any], finish: str | None = None, **body: Any) -> dict[str, Any]:
    """Return an event of a stream."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **body}


def same(framework: str, whole_answer: Response, *events: dict[str, Any], done: bool = True) -> Response:
    """Return the response of a stream, and check that it is the whole answer's wherever the stream is cut."""
    response = recut(codec(framework), dialects.sse(*events, done=done))
    assert response == whole_answer
    assert response.parts == whole_answer.parts
    assert response.details == whole_answer.details
    return response


def sent(framework: str, model: str = "m", **parameters: Any) -> dict[str, Any]:
    """Return the body of a request."""
    request = Request(model=model, messages=[Message.user("Hi")], **parameters)
    body: dict[str, Any] = json.loads(codec(framework).encode(request, stream=False).body)
    return body


def error(framework: str, status: int, body: object, headers: dict[str, str] | None = None) -> ProviderError:
    return codec(framework).decode_error(status, headers or {}, json.dumps(body).encode())


# Rows


@pytest.mark.parametrize(
    ("framework", "address", "key"),
    [
        ("dashscope", "https://dashscope-intl.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY"),
        ("github", "https://models.github.ai/inference", "GITHUB_TOKEN"),
        ("minimax", "https://api.minimax.io/v1", "MINIMAX_API_KEY"),
        ("sambanova", "https://api.sambanova.ai/v1", "SAMBANOVA_API_KEY"),
        ("xai-responses", "https://api.x.ai/v1", "XAI_API_KEY"),
        ("zai", "https://api.z.ai/api/paas/v4", "ZAI_API_KEY"),
    ],
)
def test_the_address_and_the_key_of_a_service(
    framework: str, address: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key comes from the variable that the vendor documents."""
    monkeypatch.delenv("ZAI_BASE_URL", raising=False)
    monkeypatch.delenv(key, raising=False)
    with pytest.raises(errors.AuthenticationError, match=key):
        OpenAIProvider(LLMConfig(framework=framework, model="m"))
    monkeypatch.setenv(key, "k")
    assert address in repr(OpenAIProvider(LLMConfig(framework=framework, model="m")))


@pytest.mark.parametrize(
    ("framework", "variable"),
    [("perplexity", "PERPLEXITY_BASE_URL"), ("sambanova", "SAMBA_NOVA_BASE_URL"), ("zai", "ZAI_BASE_URL")],
)
def test_the_address_variable_of_a_vendor(framework: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable of the vendor's own client holds the whole address, version and all."""
    monkeypatch.setenv(variable, "https://proxy.test/v9")
    assert "https://proxy.test/v9)" in repr(OpenAIProvider(LLMConfig(framework=framework, model="m", api_key="k")))


@pytest.mark.parametrize(
    ("framework", "taken", "refused"),
    [
        ("dashscope", ("top_k", "seed", "presence_penalty"), ("frequency_penalty",)),
        ("minimax", ("top_p", "temperature"), ("top_k", "seed", "n", "frequency_penalty", "presence_penalty")),
        ("sambanova", ("top_k", "seed", "n"), ("frequency_penalty", "presence_penalty")),
        ("github", ("seed", "frequency_penalty", "presence_penalty"), ("top_k", "n")),
        ("zai", ("seed", "top_p"), ("top_k", "n", "frequency_penalty", "presence_penalty")),
        ("xai-responses", ("top_p", "temperature"), ("top_k", "n", "seed")),
    ],
)
def test_parameters_that_a_service_lacks(framework: str, taken: tuple[str, ...], refused: tuple[str, ...]) -> None:
    """A parameter that the service would ignore is an error before anything is sent."""
    parameters: dict[str, Any] = dict.fromkeys(taken, 1)
    body = sent(framework, **parameters)
    assert {name: body[name] for name in taken} == parameters
    for name in refused:
        parameters = {name: 2}
        with pytest.raises(BadRequest, match=rf"\b{name}\b"):
            sent(framework, **parameters)


@pytest.mark.parametrize("framework", ["deepseek", "minimax", "zai"])
def test_services_without_schemas(framework: str) -> None:
    """DeepSeek, MiniMax and Z.AI write JSON, but to no schema: the model is told it in words."""
    assert sent(framework, response_format="json")["response_format"] == {"type": "json_object"}
    schema = {"type": "object", "properties": {"tide": {"type": "integer"}}}
    body = sent(framework, response_format=schema)
    assert body["response_format"] == {"type": "json_object"}
    assert "It has to match this JSON Schema" in body["messages"][0]["content"]
    assert '"tide"' in body["messages"][0]["content"]


@pytest.mark.parametrize("framework", ["dashscope", "minimax", "sambanova", "zai", "github"])
def test_usage_of_streams(framework: str) -> None:
    """These services count the tokens of a stream only on request."""
    request = Request(model="m", messages=[Message.user("Hi")])
    body = json.loads(codec(framework).encode(request, stream=True).body)
    assert body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("model", "name"),
    [("openai/gpt-5", "max_completion_tokens"), ("openai/o4-mini", "max_completion_tokens"), ("x/phi-4", "max_tokens")],
)
def test_github_names_max_tokens_as_the_models_publisher_does(model: str, name: str) -> None:
    """The publisher stands before the model's name."""
    assert sent("github", model, max_tokens=5)[name] == 5


def test_the_page_lists_every_framework() -> None:
    """Each framework has a row in `docs/services.md`, which names the variables that are read for it."""
    lines = (ROOT / "docs" / "services.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ", 1) for line in lines if line.startswith("| `")]
    for framework in frameworks().values():
        row = next((others for name, others in rows if f"`{framework.name}`" in name), "")
        assert row, framework.name
        for variable in filter(None, (framework.env_var, *framework.instead, framework.url_var)):
            assert f"`{variable}`" in row, framework.name


# Errors


@pytest.mark.parametrize(
    ("status", "code", "message", "kind"),
    [
        (400, "Arrearage", "Access denied, please make sure your account is in good standing.", errors.QuotaExceeded),
        (403, "AllocationQuota.FreeTierOnly", "The free tier of the model has been exhausted.", errors.QuotaExceeded),
        (429, "Throttling.AllocationQuota", "Free allocated quota exceeded.", errors.QuotaExceeded),
        (429, "PrepaidBillOverdue", "The prepaid bill is overdue.", errors.QuotaExceeded),
        (400, "DataInspectionFailed", "Input data may contain inappropriate content.", errors.ContentFiltered),
        (400, "data_inspection_failed", "Output data may contain inappropriate content.", errors.ContentFiltered),
        (400, "invalid", "<400> InternalError.Algo.DataInspectionFailed: Input data …", errors.ContentFiltered),
        (401, "InvalidApiKey", "Invalid API-key provided.", errors.AuthenticationError),
        (400, "InvalidApiKey", "Invalid API-key provided.", errors.AuthenticationError),
        (429, "Throttling.RateQuota", "Requests rate limit exceeded, please try again later.", errors.RateLimitError),
        (429, "Throttling.AllocationQuota", "Allocated quota exceeded.", errors.RateLimitError),
        (429, "LimitRequests", "You exceeded your current requests list.", errors.RateLimitError),
        (
            429,
            "insufficient_quota",
            "You exceeded your current quota. See https://help.example/model-studio/error-code#token-limit",
            errors.RateLimitError,
        ),
        (429, "insufficient_quota", "You exceeded your current quota.", errors.QuotaExceeded),
        (
            400,
            "invalid_parameter_error",
            "<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 129024]",
            errors.ContextLengthExceeded,
        ),
        (400, "InvalidParameter", "Range of max_tokens should be [1, 8192]", errors.BadRequest),
        (403, "AccessDenied.Unpurchased", "Access to model denied.", errors.PermissionDenied),
        (404, "ModelNotFound", "The model m does not exist.", errors.NotFound),
        (500, "RequestTimeOut", "Request timed out, please try again later.", errors.RequestTimeout),
        (500, "InternalError", "An internal error has occurred.", errors.ServerError),
        (503, "ModelUnavailable", "The model is unavailable.", errors.Overloaded),
    ],
)
def test_dashscope_errors(status: int, code: str, message: str, kind: type[ProviderError]) -> None:
    """The code stands in `error`, as at OpenAI, or at the top, as in DashScope's own API."""
    for fields in (
        {"error": {"message": message, "type": code, "param": None, "code": code}},
        {"code": code, "message": message},
    ):
        found = error("dashscope", status, {**fields, "request_id": "r-1"})
        assert (type(found), found.code, found.request_id) == (kind, code, "r-1")
        assert found.retryable == kind.default_retryable
        assert message in str(found)


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        ("Throttling.RateQuota", "Requests rate limit exceeded.", errors.RateLimitError),
        ("limit_requests", "You exceeded your current requests list.", errors.RateLimitError),
        ("InvalidApiKey", "Invalid API-key provided.", errors.AuthenticationError),
        ("internalerror.timeout", "Request timed out.", errors.RequestTimeout),
        ("DataInspectionFailed", "Output data may contain inappropriate content.", errors.ContentFiltered),
    ],
)
def test_dashscope_errors_in_a_stream(code: str, message: str, kind: type[ProviderError]) -> None:
    """An error that comes after the answer has begun has no status, so its code decides."""
    events = sse(chunk({"content": "Hi"}), {"error": {"code": code, "message": message}, "request_id": "r-1"})
    partial_response, found = interrupted(codec("dashscope"), events)
    assert (partial_response.text, type(found)) == ("Hi", kind)


@pytest.mark.parametrize(
    ("status", "code", "message", "kind"),
    [
        (401, "1000", "Authentication Failed", errors.AuthenticationError),
        (401, "1002", "Authorization token is invalid", errors.AuthenticationError),
        (429, "1113", "Insufficient balance or no resource package. Please recharge.", errors.QuotaExceeded),
        (400, "1210", "Invalid API parameters, please check the documentation.", errors.BadRequest),
        (400, "1211", "Unknown model, please check the model code.", errors.NotFound),
        (403, "1220", "You do not have permission to access m.", errors.PermissionDenied),
        (400, "1261", "Prompt exceeds max length", errors.ContextLengthExceeded),
        (400, "1301", "System detected potentially unsafe content in the input.", errors.ContentFiltered),
        (429, "1302", "Rate limit reached for requests", errors.RateLimitError),
        (429, "1305", "The service may be temporarily overloaded, please try again later", errors.RateLimitError),
        (429, "1308", "Usage limit reached for 5 hour. Your limit will reset at 18:00", errors.RateLimitError),
        (429, "1309", "Your plan has expired.", errors.QuotaExceeded),
        (429, "1311", "Your plan does not yet include access to m.", errors.QuotaExceeded),
        (500, "1234", "Network error, please contact customer service.", errors.ServerError),
    ],
)
def test_zai_errors(status: int, code: str, message: str, kind: type[ProviderError]) -> None:
    """The codes are numbers, as text; a stream has no status beside them."""
    found = error("zai", status, {"error": {"code": code, "message": message}})
    assert (type(found), found.code) == (kind, code)
    if code not in ("1000", "1002", "1210", "1220"):
        _, in_stream = interrupted(codec("zai"), sse({"error": {"code": code, "message": message}}))
        assert type(in_stream) is kind


@pytest.mark.parametrize(
    ("code", "message", "kind", "retryable"),
    [
        (1000, "unknown error", errors.ServerError, True),
        (1001, "request timeout", errors.RequestTimeout, True),
        (1002, "rate limit exceeded(RPM)", errors.RateLimitError, True),
        (1004, "login fail: Please carry the API secret key", errors.AuthenticationError, False),
        (1008, "insufficient balance", errors.QuotaExceeded, False),
        (1013, "internal service error", errors.ServerError, True),
        (1024, "internal error", errors.ServerError, True),
        (1026, "input new_sensitive", errors.ContentFiltered, False),
        (1027, "output new_sensitive", errors.ContentFiltered, False),
        (1033, "system error", errors.ServerError, True),
        (1039, "token limit", errors.RateLimitError, True),
        (1041, "conn limit", errors.RateLimitError, True),
        (1042, "invisible character ratio limit", errors.BadRequest, False),
        (2013, "invalid params, unknown model", errors.BadRequest, False),
        (2013, "invalid params, context window exceeds limit", errors.ContextLengthExceeded, False),
        (2045, "rate growth limit", errors.RateLimitError, True),
        (2049, "invalid api key", errors.AuthenticationError, False),
        (2056, "usage limit exceeded, 5-hour usage limit reached", errors.RateLimitError, True),
        (2061, "your current token plan not support model", errors.QuotaExceeded, False),
        ("1002", "rate limit", errors.RateLimitError, True),
        (9999, "something new", errors.ServerError, True),
    ],
)
def test_minimax_errors(code: object, message: str, kind: type[ProviderError], retryable: bool) -> None:
    """An error is a 200 whose `base_resp` names it: a whole answer, or the only event of a stream."""
    told = {"base_resp": {"status_code": code, "status_msg": message}}
    cases: list[dict[str, Any]] = [{}, {"choices": None}, {"choices": []}]
    for choices in cases:
        body = {"id": "i", "model": "m", **choices, "created": 1, "usage": {"total_tokens": 0}, **told}
        with pytest.raises(ProviderError, match=f"MiniMax answered {code}: {message.partition('(')[0]}") as caught:
            codec("minimax").decode(json.dumps(body).encode())
        _, streamed_error = interrupted(codec("minimax"), dialects.sse(body))
        for found in (caught.value, streamed_error):
            assert isinstance(found, ProviderError)
            assert (type(found), found.code, found.retryable) == (kind, str(code), retryable)


def test_minimax_errors_after_the_answer_began() -> None:
    """The output of the same event counts, and what came before it."""
    failed: dict[str, Any] = {"base_resp": {"status_code": 1027, "status_msg": "output new_sensitive"}}
    for last in ({"choices": None, **failed}, chunk({"content": "!"}, "stop", **failed)):
        partial_response, found = interrupted(codec("minimax"), sse(chunk({"content": "Hi"}), last))
        assert partial_response.text == ("Hi" if last["choices"] is None else "Hi!")
        assert isinstance(found, errors.ContentFiltered)
    with pytest.raises(errors.ContentFiltered):
        whole("minimax", {"content": "Hi"}, **failed)


NO_ERRORS: list[Any] = [0, "0", "", None, False, True, 1.5, [], {"a": 1}]


@pytest.mark.parametrize("base_resp", [None, {}, [], "x", 3, *({"status_code": code} for code in NO_ERRORS)])
def test_no_error_of_minimax(base_resp: object) -> None:
    """Every answer has a `base_resp`, and only a number other than 0 in it is an error."""
    response = whole("minimax", {"content": "Hi"}, base_resp=base_resp)
    events = (chunk({"content": "Hi"}, base_resp=base_resp), chunk({}, "stop", base_resp=base_resp))
    assert same("minimax", response, *events).text == "Hi"


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (
            400,
            errors.ContextLengthExceeded,
            ("bad_request_error", "invalid params, context window exceeds limit (2013)"),
        ),
        (400, errors.BadRequest, ("bad_request_error", "invalid params, chat content is empty (2013)")),
        (401, errors.AuthenticationError, ("authorized_error", "invalid api key (2049)")),
        (429, errors.RateLimitError, ("rate_limit_error", "rate limit exceeded (1002)")),
        (429, errors.QuotaExceeded, ("insufficient_balance_error", "insufficient balance (1008)")),
        (500, errors.ServerError, ("server_error", "unknown error, 520 (1000)")),
    ],
)
def test_minimax_errors_with_an_http_code(status: int, kind: type[ProviderError], body: tuple[str, str]) -> None:
    """Newer models report errors as Anthropic does, with the status inside, which a stream has nowhere else."""
    name, message = body
    told = {
        "type": "error",
        "error": {"type": name, "message": message, "http_code": str(status)},
        "request_id": "r-1",
    }
    found = error("minimax", status, told)
    assert (type(found), found.status, found.request_id) == (kind, status, "r-1")
    events = dialects.sse(told)
    _, in_stream = interrupted(codec("minimax"), events)
    assert isinstance(in_stream, ProviderError)
    assert (type(in_stream), in_stream.status) == (kind, status)


@pytest.mark.parametrize(
    ("framework", "status", "body", "kind"),
    [
        (
            "sambanova",
            400,
            {"error": {"code": "decimal_above_max_value", "message": "top_p", "type": "invalid_request_error"}},
            errors.BadRequest,
        ),
        (
            "sambanova",
            400,
            {"error": {"code": "context_length_exceeded", "message": "too long", "type": "invalid_request_error"}},
            errors.ContextLengthExceeded,
        ),
        ("sambanova", 410, {"error": {"code": None, "message": "The model m is gone."}}, errors.NotFound),
        (
            "github",
            413,
            {
                "error": {
                    "code": "tokens_limit_reached",
                    "message": "Request body too large for m. Max size: 8000 tokens.",
                    "details": "Request body too large for m. Max size: 8000 tokens.",
                }
            },
            errors.ContextLengthExceeded,
        ),
        (
            "github",
            429,
            {"error": {"code": "RateLimitReached", "message": "Rate limit of 10 per 60s exceeded.", "details": "x"}},
            errors.RateLimitError,
        ),
        ("github", 401, {"error": {"code": "unauthorized", "message": "Bad credentials"}}, errors.AuthenticationError),
        ("github", 410, {"error": {"code": "gone", "message": "GitHub Models has been retired."}}, errors.NotFound),
        ("xai", 410, {"error": "Live search is deprecated."}, errors.NotFound),
    ],
)
def test_other_errors(framework: str, status: int, body: object, kind: type[ProviderError]) -> None:
    """Errors of services that report them as OpenAI does, but with codes of their own."""
    assert type(error(framework, status, body)) is kind


def test_the_limits_of_sambanova() -> None:
    """The delay until the next try is that of the limit that is used up, of a minute or of a day."""
    refused = {"error": {"message": "Rate limit exceeded", "type": "rate_limit_error"}}
    headers = {
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "12",
        "x-ratelimit-remaining-requests-day": "90",
        "x-ratelimit-reset-requests-day": "3600",
    }
    found = error("sambanova", 429, refused, headers)
    assert isinstance(found, errors.RateLimitError)
    assert found.retry_after == 12


# MiniMax

STAYS = {"name": "MiniMax AI", "audio_content": ""}
"""The fields that stay the same in all messages of MiniMax."""
ENDS: dict[str, Any] = {
    "model": "MiniMax-M2",
    "usage": {**SEEN, "total_characters": 0, "completion_tokens_details": {"reasoning_tokens": 1}},
    "input_sensitive": False,
    "output_sensitive": False,
    "base_resp": {"status_code": 0, "status_msg": ""},
}


def detail(text: str) -> dict[str, Any]:
    return {
        "type": "reasoning.text",
        "id": "reasoning-text-1",
        "format": "MiniMax-response-v1",
        "index": 0,
        "text": text,
    }


def turn(framework: str, response: Response) -> dict[str, Any]:
    """Return the message that goes back for a response, in a conversation with tools."""
    turns = [Message.user("Hi"), response.message, Message.user("And?")]
    request = Request(model="m", messages=turns, tools=[Tool("clock")])
    body = json.loads(codec(framework).encode(request, stream=False).body)
    message: dict[str, Any] = body["messages"][1]
    return message


def test_minimax_thinks_in_the_text() -> None:
    """Unless asked otherwise, M2 writes its reasoning into the text, and gets it back there."""
    said = "<think>\nHm.\n</think>\n\nTen."
    response = whole("minimax", {**STAYS, "content": said}, **ENDS)
    assert response.parts == (Reasoning(text="Hm.\n", raw={"content": said.removesuffix("Ten.")}), Text("Ten."))
    last = {"content": said, **STAYS}
    same(
        "minimax",
        response,
        *[chunk({"role": role, "content": text}) for role, text in (("assistant", "<thi"), ("", "nk>\nHm."))],
        *[chunk({"content": text}) for text in ("\n</think>\n\nT", "en.")],
        {"choices": [{"index": 0, "message": last, "finish_reason": "stop"}], "object": "chat.completion", **ENDS},
        done=False,
    )
    assert turn("minimax", response) == {"role": "assistant", "content": said}


def test_minimax_may_repeat_the_thoughts_of_the_text() -> None:
    """Reasoning beside a text that has it already is not read twice."""
    said = "<think>\nHm, hm.\n</think>\n\nTen."
    response = whole("minimax", {**STAYS, "content": said, "reasoning_content": "Hm, hm.\n"}, **ENDS)
    assert response.parts == (Reasoning(text="Hm, hm.\n", raw={"content": said.removesuffix("Ten.")}), Text("Ten."))
    same(
        "minimax",
        response,
        chunk({"content": "<think>\nHm, ", "reasoning_content": "Hm, "}),
        chunk({"content": "hm.\n", "reasoning_content": "Hm, hm.\n"}),
        chunk({"content": "</think>\n\nTen.", "reasoning_content": "Hm, hm.\n"}),
        chunk({"content": ""}, "stop", **ENDS),
    )


def test_minimax_thinks_beside_the_text() -> None:
    """With `reasoning_split` the reasoning comes in blocks, which go back as they came, also before tool calls."""
    assert sent("minimax", extra={"reasoning_split": True})["reasoning_split"] is True
    message = {"content": "Ten.", "reasoning_content": "Hm, hm.", "reasoning_details": [detail("Hm, hm.")]}
    response = whole("minimax", {**STAYS, **message, "tool_calls": [CALL]}, "tool_calls", **ENDS)
    assert response.parts == (
        Reasoning(text="Hm, hm.", raw=detail("Hm, hm.")),
        Text("Ten."),
        ToolCall("c1", "clock", raw_arguments="{}"),
    )
    assert response.usage == Usage(input_tokens=9, output_tokens=2, reasoning_tokens=1)
    pieces = [
        {"role": "", "content": "", "reasoning_content": said, "reasoning_details": [detail(said)]}
        for said in ("Hm, ", "hm.")
    ]
    message["tool_calls"] = [{**CALL, "index": 0}]
    last = {"index": 0, "message": {**STAYS, **message}, "finish_reason": "tool_calls"}
    same(
        "minimax",
        response,
        *[chunk(each) for each in pieces],
        chunk({"content": "Ten.", "reasoning_content": ""}),
        chunk({"tool_calls": [{**CALL, "index": 0}]}, "tool_calls"),
        {"choices": [last], "object": "chat.completion", **ENDS},
        done=False,
    )
    assert turn("minimax", response) == {
        "role": "assistant",
        "content": "Ten.",
        "reasoning_details": [detail("Hm, hm.")],
        "tool_calls": [CALL],
    }


def test_minimax_repeats_a_thought_without_an_answer() -> None:
    """The whole message at the end of a stream adds nothing, even if the answer ended while the model was thinking."""
    response = whole("minimax", {"content": "", "reasoning_content": "Hm."}, "length", **ENDS)
    assert (response.parts, response.finish_reason) == (
        (Reasoning(text="Hm.", raw={"reasoning_content": "Hm."}),),
        "length",
    )
    last = {"index": 0, "message": {"content": "", "reasoning_content": "Hm."}, "finish_reason": "length"}
    same("minimax", response, chunk({"reasoning_content": "Hm."}), {"choices": [last], **ENDS}, done=False)


def config(framework: str, address: str, **settings: Any) -> LLMConfig:
    return LLMConfig(framework=framework, model="m", api_key="k", api_base=address, **settings)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_minimax_over_http(mode: Mode) -> None:
    """A call has the same answer in all modes, and fails with the same error."""
    message = {**STAYS, "content": "<think>\nHm.\n</think>\n\nTen."}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    answer = json.dumps({"id": "i", "choices": [choice], **ENDS}).encode()
    refusal = {"id": "i", "choices": None, "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}
    refused, kind = json.dumps(refusal).encode(), "application/json"
    if mode.streaming:
        pieces = [chunk({"content": said}, id="i") for said in ("<think>\nHm", ".\n</think>\n\n", "Ten.")]
        answer = dialects.sse(*pieces, {"id": "i", "choices": [choice], **ENDS})
        refused, kind = dialects.sse(refusal), "text/event-stream"
    with answering(kind, answer, refused) as (address, asked):
        settings = config("minimax", address)
        response = ask(settings, mode, "Hi", max_tokens=7)
        with pytest.raises(errors.QuotaExceeded, match="MiniMax answered 1008: insufficient balance"):
            ask(settings, mode, "Hi")
    assert (response.reasoning, response.text) == ("Hm.\n", "Ten.")
    assert (response.id, response.model, response.finish_reason) == ("i", "MiniMax-M2", "stop")
    assert response.usage == Usage(input_tokens=9, output_tokens=2, reasoning_tokens=1)
    assert [(path, body.get("max_tokens")) for path, body in asked] == [
        ("/chat/completions", 7),
        ("/chat/completions", None),
    ]


# Search

PAGES = [{"title": f"Page {n}", "url": f"https://example.test/{n}", "date": "2026-11-01"} for n in range(3)]
PICTURE = {"image_url": "https://example.test/a.png", "origin_url": "https://example.test", "height": 5, "width": 4}
FOUND: dict[str, Any] = {
    "citations": [page["url"] for page in PAGES],
    "search_results": PAGES,
    "images": [PICTURE],
    "related_questions": ["Why?", "When?"],
    "videos": [{"url": "https://example.test/v"}],
}
COST = {"input_tokens_cost": 0.1, "output_tokens_cost": 0.2, "request_cost": 0.005, "total_cost": 0.305}
SEARCH = {
    "search_mode": "academic",
    "search_recency_filter": "week",
    "search_domain_filter": ["example.test", "-other.test"],
    "search_after_date_filter": "3/1/2026",
    "return_images": True,
    "return_related_questions": True,
    "web_search_options": {"search_context_size": "low", "user_location": {"country": "DE"}},
    "a_setting_of_the_future": 1,
}


def counted(tokens: int, cost: dict[str, float]) -> dict[str, Any]:
    """Return a usage of Perplexity's. Each event of a stream has the counts so far, and costs only at the end."""
    return {
        "prompt_tokens": 9,
        "completion_tokens": tokens,
        "total_tokens": 9 + tokens,
        "search_context_size": "low",
        "num_search_queries": 2,
        "citation_tokens": 0,
        "cost": cost,
    }


def perplexity_events() -> list[dict[str, Any]]:
    """Return the events of a stream that repeat what was found, and the whole message."""
    free = dict.fromkeys(COST, 0.0)
    events: list[dict[str, Any]] = []
    for tokens, said, before in ((1, "Te", ""), (2, "n.", "Te")):
        choice = {
            "index": 0,
            "finish_reason": None,
            "message": {"role": "assistant", "content": before + said},
            "delta": {"role": "assistant", "content": said},
        }
        found = FOUND if tokens == 2 else {"citations": FOUND["citations"], "search_results": PAGES}
        events.append({"id": "i", "model": "sonar", "usage": counted(tokens, free), **found, "choices": [choice]})
    last = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": "Ten."},
        "delta": {"role": "assistant", "content": ""},
    }
    done = {"id": "i", "model": "sonar", "object": "chat.completion.done"}
    return [*events, {**done, "usage": counted(2, COST), **FOUND, "choices": [last]}]


def perplexity_answer() -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Ten."}}
    return {"id": "i", "model": "sonar", "usage": counted(2, COST), **FOUND, "choices": [choice]}


def test_what_perplexity_found() -> None:
    """The answer has what the search found once, though each event of a stream repeats it."""
    response = codec("perplexity").decode(json.dumps(perplexity_answer()).encode())
    assert response.details == {
        **FOUND,
        "usage": {"search_context_size": "low", "num_search_queries": 2, "cost": COST},
    }
    assert (response.text, response.usage) == ("Ten.", Usage(input_tokens=9, output_tokens=2))
    same("perplexity", response, *perplexity_events(), done=False)


def test_lists_that_grow() -> None:
    """Items that a later event adds to a list are added."""
    events = [
        chunk({"content": said}, "stop" if n == 3 else None, search_results=PAGES[:n], citations=None)
        for n, said in ((1, "a"), (2, "b"), (3, "c"))
    ]
    assert recut(codec("perplexity"), sse(*events)).details == {"search_results": PAGES}


@pytest.mark.parametrize("value", [None, "x", 3, {}, [None], [[]], [1, 1]])
def test_lists_of_any_type(value: object) -> None:
    """No field is trusted to be of the type that is documented."""
    names = (*FOUND, "web_search")
    beside: dict[str, Any] = {
        **dict.fromkeys(names, value),
        "usage": {**SEEN, "cost": value, "num_sources_used": value},
    }
    response = whole("perplexity", {"content": "Hi"}, **beside)
    assert response.text == "Hi"
    same("perplexity", response, chunk({"content": "Hi"}, **beside), chunk({}, "stop", **beside))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("by", ["extra", "additional_params"])
def test_a_search_of_perplexity_over_http(mode: Mode, by: str) -> None:
    """The settings of the search go into the body as they are, in all modes, and its results come back."""
    answer, kind = json.dumps(perplexity_answer()).encode(), "application/json"
    if mode.streaming:
        answer, kind = dialects.sse(*perplexity_events()), "text/event-stream"
    with answering(kind, answer) as (address, asked):
        if by == "extra":
            response = ask(config("perplexity", address), mode, "Hi", extra=SEARCH)
        else:
            response = ask(config("perplexity", address, additional_params=SEARCH), mode, "Hi")
    [(path, body)] = asked
    assert path == "/chat/completions"
    assert {name: body[name] for name in SEARCH} == SEARCH
    assert {name: response.details[name] for name in FOUND} == FOUND
    assert response.details["usage"]["cost"] == COST
    assert response.usage == Usage(input_tokens=9, output_tokens=2)


def test_citations_of_grok() -> None:
    """Grok's citations come with the last event of a stream, and its sources with the tokens."""
    search = {"search_parameters": {"mode": "auto", "return_citations": True}}
    assert sent("xai", extra=search)["search_parameters"] == search["search_parameters"]
    ends: dict[str, Any] = {"citations": FOUND["citations"], "usage": {**SEEN, "num_sources_used": 3}}
    response = whole("xai", {"content": "Ten."}, **ends)
    assert response.details == {"citations": FOUND["citations"], "usage": {"num_sources_used": 3}}
    assert response.usage == Usage(input_tokens=9, output_tokens=2)
    begun = chunk({"content": "Ten."}, usage={**SEEN, "completion_tokens": 1})
    same("xai", response, begun, chunk({}, "stop"), {"choices": [], **ends})


def test_no_sources_are_no_detail() -> None:
    """A count of zero says nothing."""
    assert whole("xai", {"content": "Ten."}, usage={**SEEN, "num_sources_used": 0}).details == {}


def test_pages_that_glm_found() -> None:
    """The results of Z.AI's search stand beside the answer."""
    tools = [{"type": "web_search", "web_search": {"enable": True}}]
    assert sent("zai", extra={"tools": tools})["tools"] == tools
    response = whole("zai", {"content": "Ten.", "reasoning_content": "Hm."}, web_search=PAGES, usage=SEEN)
    assert response.details == {"web_search": PAGES}
    events = [chunk({"reasoning_content": "Hm."}), chunk({"content": "Ten."}), chunk({}, "stop", usage=SEEN)]
    same("zai", response, {**events[0], "web_search": PAGES}, events[1], {**events[2], "web_search": PAGES})


# xAI's Responses API

SEARCHED: list[dict[str, Any]] = [
    {
        "id": "ws_1",
        "type": "web_search_call",
        "status": "completed",
        "action": {"type": "search", "query": "ten", "sources": []},
    },
    {"id": "xs_1", "type": "x_search_call", "status": "completed", "action": {"type": "search", "query": "ten"}},
]
CITED = {
    "type": "url_citation",
    "url": "https://example.test/1",
    "title": "1",
    "start_index": 0,
    "end_index": 3,
}


def xai_response() -> dict[str, Any]:
    content = {"type": "output_text", "text": "Ten.", "logprobs": [], "annotations": [CITED]}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [content]}
    usage = {"input_tokens": 9, "output_tokens": 2, "total_tokens": 11, "num_sources_used": 1}
    head = {"id": "r-1", "object": "response", "model": "grok-4", "status": "completed"}
    return {**head, "output": [*SEARCHED, message], "usage": usage}


def xai_events() -> list[dict[str, Any]]:
    """Return the events of a stream, in which the citation comes as an event and with the finished content and item."""
    answer = xai_response()
    message: dict[str, Any] = answer["output"][2]
    [content] = message["content"]
    place = {"output_index": 2, "content_index": 0, "item_id": "msg_1"}
    begun: dict[str, Any] = {**message, "status": "in_progress", "content": []}
    events: list[dict[str, Any]] = []
    for number, item in enumerate(SEARCHED):
        events += [
            {"type": "response.output_item.added", "output_index": number, "item": {**item, "status": "in_progress"}},
            {"type": "response.output_item.done", "output_index": number, "item": item},
        ]
    return [
        {"type": "response.created", "response": {**answer, "status": "in_progress", "output": []}},
        *events,
        {"type": "response.output_item.added", "output_index": 2, "item": begun},
        {"type": "response.output_text.delta", **place, "delta": "Te"},
        {"type": "response.output_text.delta", **place, "delta": "n."},
        {"type": "response.output_text.annotation.added", **place, "annotation_index": 0, "annotation": CITED},
        {"type": "response.output_text.done", **place, "text": "Ten."},
        {"type": "response.content_part.done", **place, "part": content},
        {"type": "response.output_item.done", "output_index": 2, "item": message},
        {"type": "response.completed", "response": answer},
    ]


def test_searches_of_grok() -> None:
    """The searches that xAI ran are parts, the citations are details once, and both go back with the conversation."""
    response = codec("xai-responses").decode(json.dumps(xai_response()).encode())
    *searches, text = response.parts
    assert searches == [Opaque("openai-responses", item) for item in SEARCHED]
    assert (response.text, response.finish_reason, response.tool_calls) == ("Ten.", "stop", ())
    assert response.details == {"annotations": [CITED]}
    assert isinstance(text, Text)
    same("xai-responses", response, *xai_events(), done=False)
    turns = [Message.user("Hi"), response.message, Message.user("And?")]
    encoded = codec("xai-responses").encode(Request(model="m", messages=turns), stream=False)
    assert encoded.path == "/responses"
    assert json.loads(encoded.body)["input"][1:4] == xai_response()["output"]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_searches_of_grok_over_http(mode: Mode) -> None:
    """The tools that xAI runs are given as they are, in `extra`."""
    tools = [{"type": "web_search", "filters": {"allowed_domains": ["example.test"]}}, {"type": "x_search"}]
    answer, kind = json.dumps(xai_response()).encode(), "application/json"
    if mode.streaming:
        answer, kind = dialects.sse(*xai_events()), "text/event-stream"
    with answering(kind, answer) as (address, asked):
        response = ask(config("xai-responses", address), mode, "Hi", extra={"tools": tools})
    [(path, body)] = asked
    assert (path, body["tools"], body["store"]) == ("/responses", tools, False)
    assert (response.text, response.details) == ("Ten.", {"annotations": [CITED]})
    assert [part for part in response.parts if isinstance(part, Opaque)] == [
        Opaque("openai-responses", item) for item in SEARCHED
    ]


def test_an_error_of_xais_responses_names_xai() -> None:
    """The error of a path that two services share names the right one."""
    refused = {"code": "Client specified an invalid argument", "error": "Argument not supported on this model"}
    assert str(error("xai-responses", 400, refused)).startswith("xAI answered 400")


# Other answers


@pytest.mark.parametrize(
    ("raw", "meaning"),
    [
        ("sensitive", "content_filter"),
        ("network_error", "error"),
        ("model_context_window_exceeded", "length"),
        ("tool_calls", "tool_call"),
    ],
)
def test_finish_reasons_of_glm(raw: str, meaning: str) -> None:
    """The reasons that only Z.AI has mean the same as those of others."""
    response = whole("zai", {"content": "Ten."}, raw)
    assert (response.finish_reason, response.raw_finish_reason) == (meaning, raw)
    same("zai", response, chunk({"content": "Ten."}), chunk({}, raw))


def test_thoughts_of_sambanova() -> None:
    """Its models think in `reasoning`, which goes back, or in the text."""
    response = whole("sambanova", {"content": "Ten.", "reasoning": "Hm.", "channel": "final"})
    same("sambanova", response, chunk({"reasoning": "Hm."}), chunk({"content": "Ten."}), chunk({}, "stop"))
    assert turn("sambanova", response) == {"role": "assistant", "content": "Ten.", "reasoning": "Hm."}
    inline = whole("sambanova", {"content": "<think>Hm.</think>Ten."})
    assert (inline.reasoning, inline.text) == ("Hm.", "Ten.")


def test_the_cache_of_qwen() -> None:
    """Tokens that DashScope wrote into its cache have a name of their own."""
    usage = {**SEEN, "prompt_tokens_details": {"cached_tokens": 4, "cache_creation_input_tokens": 3}}
    response = whole("dashscope", {"content": "Ten.", "reasoning_content": "Hm."}, usage=usage)
    assert response.usage == Usage(input_tokens=9, output_tokens=2, cached_tokens=4, cache_write_tokens=3)
    pieces = [
        chunk({"content": None, "reasoning_content": "Hm."}),
        chunk({"content": "Ten.", "reasoning_content": None}),
    ]
    same("dashscope", response, *pieces, chunk({"content": ""}, "stop"), {"choices": [], "usage": usage})
    assert turn("dashscope", response)["reasoning_content"] == "Hm."


def test_searches_of_x_are_no_calls() -> None:
    """Searches of X, which xAI runs itself, are no calls for the user, and xAI refuses them in a conversation."""
    search = {
        "id": "ctc_1",
        "type": "custom_tool_call",
        "call_id": "xs_call_1",
        "name": "x_keyword_search",
        "input": '{"query":"ten"}',
        "status": "completed",
    }
    answer = xai_response()
    message = answer["output"][2]
    answer["output"] = [search, message]
    response = codec("xai-responses").decode(json.dumps(answer).encode())
    assert response.parts[0] == Opaque("openai-responses", search)
    assert (response.text, response.finish_reason, response.tool_calls) == ("Ten.", "stop", ())
    place = {"output_index": 0, "item_id": "ctc_1"}
    begun = {**search, "status": "in_progress", "input": ""}
    same(
        "xai-responses",
        response,
        {"type": "response.output_item.added", "output_index": 0, "item": begun},
        {"type": "response.custom_tool_call_input.delta", **place, "delta": '{"query":"ten"}'},
        {"type": "response.custom_tool_call_input.done", **place, "input": '{"query":"ten"}'},
        {"type": "response.output_item.done", "output_index": 0, "item": search},
        {"type": "response.output_item.done", "output_index": 1, "item": message},
        {"type": "response.completed", "response": answer},
        done=False,
    )
    turns = [Message.user("Hi"), response.message, Message.user("And?")]
    body = codec("xai-responses").encode(Request(model="m", messages=turns), stream=False).body
    assert json.loads(body)["input"][1:-1] == [message]
