"""Gemini's dialect: requests, whole responses, streams in both framings, and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.dialects import PARAMETERS, PNG, WEATHER, interrupted, recut, sse, streamed
from support.gemini import WHOLE, answer
from support.recordings import load

from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    ContentFiltered,
    ContextLengthExceeded,
    NotFound,
    Overloaded,
    PermissionDenied,
    ProviderError,
    QuotaExceeded,
    RateLimitError,
    ServerError,
    StreamProtocolError,
)
from fluxibly.providers.dialects.gemini import GeminiCodec
from fluxibly.testing import check_codec
from fluxibly.testing.codec_check import chunks_of
from fluxibly.types import Image, Message, Reasoning, Request, Response, Tool, ToolCall, Usage

CODEC = GeminiCodec()
NO_ID = {"functionCall": {"id": None}}
"""`ToolCall.raw` of a call that came without an id."""


def body_of(**fields: Any) -> dict[str, Any]:
    fields = {"model": "gemini-2.5-flash", "messages": "Hi", **fields}
    return json.loads(CODEC.encode(Request(**fields), stream=False).body)


# Requests


def test_paths() -> None:
    """The path has the model and the method, and not the key."""
    request = Request(model="gemini-3-pro", messages="Hi")
    assert CODEC.encode(request, stream=False).path == "/models/gemini-3-pro:generateContent"
    assert CODEC.encode(request, stream=True).path == "/models/gemini-3-pro:streamGenerateContent?alt=sse"
    tuned = CODEC.encode(Request(model="tunedModels/my model?", messages="Hi"), stream=False)
    assert tuned.path == "/tunedModels/my%20model%3F:generateContent"


def test_plain_request() -> None:
    """A plain request has nothing that was not requested."""
    assert body_of() == {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}


def test_parameters() -> None:
    """Each parameter is sent under the dialect's name."""
    body = body_of(
        messages=[Message.system("Be brief."), Message.user("Hi"), Message.system("Rhyme.")],
        **PARAMETERS,
        n=2,
        stop=["END"],
        tools=[WEATHER, Tool("now")],
        response_format={"type": "object"},
        reasoning_effort="low",
    )
    assert body == {
        "contents": [{"role": "user", "parts": [{"text": "Hi"}]}],
        "systemInstruction": {"parts": [{"text": "Be brief.\n\nRhyme."}]},
        "tools": [
            {
                "functionDeclarations": [
                    {
                        "name": "weather",
                        "description": "The weather in a city.",
                        "parametersJsonSchema": dict(WEATHER.parameters),
                    },
                    {"name": "now", "parametersJsonSchema": {"type": "object", "properties": {}}},
                ]
            }
        ],
        "generationConfig": {
            "temperature": 0.5,
            "maxOutputTokens": 7,
            "topP": 0.9,
            "topK": 40,
            "frequencyPenalty": 0.1,
            "presencePenalty": 0.2,
            "seed": 3,
            "candidateCount": 2,
            "stopSequences": ["END"],
            "responseMimeType": "application/json",
            "responseJsonSchema": {"type": "object"},
            "thinkingConfig": {"thinkingBudget": 1024, "includeThoughts": True},
        },
    }


@pytest.mark.parametrize(
    ("choice", "config"),
    [
        ("auto", {"mode": "AUTO"}),
        ("none", {"mode": "NONE"}),
        ("required", {"mode": "ANY"}),
        ("weather", {"mode": "ANY", "allowedFunctionNames": ["weather"]}),
    ],
)
def test_tool_choice(choice: str, config: dict[str, Any]) -> None:
    """A tool choice other than the keywords is a tool's name."""
    assert body_of(tools=[WEATHER], tool_choice=choice)["toolConfig"] == {"functionCallingConfig": config}


def test_strict_tools() -> None:
    """A strict tool requests calls that are validated against the schemas."""
    assert body_of(tools=[Tool("now", strict=True)])["toolConfig"] == {"functionCallingConfig": {"mode": "VALIDATED"}}


@pytest.mark.parametrize(("wanted", "kind"), [("json", "application/json"), ("text", "text/plain")])
def test_response_formats(wanted: str, kind: str) -> None:
    """The response format may be JSON without a schema, or text."""
    assert body_of(response_format=wanted)["generationConfig"] == {"responseMimeType": kind}


@pytest.mark.parametrize(
    ("model", "effort", "config"),
    [
        ("gemini-2.5-pro", "high", {"thinkingBudget": 24_576, "includeThoughts": True}),
        ("gemini-2.5-flash", "none", {"thinkingBudget": 0}),
        ("gemini-3-pro-preview", "high", {"thinkingLevel": "high", "includeThoughts": True}),
        ("gemini-flash-latest", "minimal", {"thinkingLevel": "minimal", "includeThoughts": True}),
    ],
)
def test_reasoning_effort(model: str, effort: str, config: dict[str, Any]) -> None:
    """Models before Gemini 3 take a budget, and later models a level."""
    assert body_of(model=model, reasoning_effort=effort)["generationConfig"] == {"thinkingConfig": config}


@pytest.mark.parametrize(("model", "effort"), [("gemini-2.5-pro", "enormous"), ("gemini-3-pro", "none")])
def test_refused_efforts(model: str, effort: str) -> None:
    """An unsupported effort raises an error that lists the supported efforts."""
    with pytest.raises(BadRequest, match=r"reasoning_effort: .*minimal, low, medium, high"):
        body_of(model=model, reasoning_effort=effort)


def test_extra_wins() -> None:
    """`extra` is merged into the objects that hold parameters, and replaces everything else."""
    body = body_of(temperature=0.5, extra={"generationConfig": {"topK": 1}, "safetySettings": [], "contents": []})
    assert body == {"contents": [], "generationConfig": {"temperature": 0.5, "topK": 1}, "safetySettings": []}


def test_images() -> None:
    """Images are sent as bytes, as data URLs and by URL."""
    images = [
        PNG,
        Image(url="data:image/gif;base64,R0lG"),
        Image(url="https://x.test/a.jpg?size=2"),
        Image(url="https://generativelanguage.googleapis.com/v1beta/files/abc"),
    ]
    assert body_of(messages=[Message.user(["What?", *images])])["contents"][0]["parts"] == [
        {"text": "What?"},
        {"inlineData": {"mimeType": "image/png", "data": "iVBORw=="}},
        {"inlineData": {"mimeType": "image/gif", "data": "R0lG"}},
        {"fileData": {"fileUri": "https://x.test/a.jpg?size=2", "mimeType": "image/jpeg"}},
        {"fileData": {"fileUri": "https://generativelanguage.googleapis.com/v1beta/files/abc"}},
    ]


def test_messages_that_cannot_be_sent() -> None:
    """An image in a system message, a conversation without turns, and a result without its tool's name are errors."""
    with pytest.raises(BadRequest, match="system message"):
        body_of(messages=[Message("system", PNG), Message.user("Hi")])
    with pytest.raises(BadRequest, match="besides the system"):
        body_of(messages=[Message.system("alone")])
    with pytest.raises(BadRequest, match="name="):
        body_of(messages=[Message.user("Hi"), Message.tool("sunny", "call_9")])


def test_tool_conversation() -> None:
    """Calls are sent back with ids and signatures, results with their tools' names; results share a turn."""
    calls = [
        ToolCall("8hd01vsf", "weather", {"city": "Rome"}, signature="sig"),
        ToolCall("call_1", "now", {}),
    ]
    body = body_of(
        model="gemini-3-pro",
        messages=[
            Message.user("Weather?"),
            Message.assistant("Let me look.", tool_calls=calls),
            Message.tool('{"sky": "blue"}', calls[0]),
            Message.tool(["noon", PNG], "call_1"),
            Message.user("And then?"),
        ],
    )
    assert body["contents"][1:] == [
        {
            "role": "model",
            "parts": [
                {"text": "Let me look."},
                {
                    "functionCall": {"name": "weather", "args": {"city": "Rome"}, "id": "8hd01vsf"},
                    "thoughtSignature": "sig",
                },
                {"functionCall": {"name": "now", "args": {}, "id": "call_1"}},
            ],
        },
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"name": "weather", "response": {"sky": "blue"}, "id": "8hd01vsf"}},
                {
                    "functionResponse": {
                        "name": "now",
                        "response": {"output": "noon"},
                        "id": "call_1",
                        "parts": [{"inlineData": {"mimeType": "image/png", "data": "iVBORw=="}}],
                    }
                },
            ],
        },
        {"role": "user", "parts": [{"text": "And then?"}]},
    ]


def test_the_names_of_results() -> None:
    """A result with only an id belongs to the last call with that id, because generated ids repeat in each turn."""
    turns = [Message.user("x")]
    for name in ("first", "second"):
        turns += [Message.assistant("", tool_calls=[ToolCall("call_0", name)]), Message.tool("1", "call_0")]
    contents = body_of(messages=turns)["contents"]
    assert [contents[n]["parts"][0]["functionResponse"]["name"] for n in (2, 4)] == ["first", "second"]


def test_calls_of_other_models() -> None:
    """An unsigned first call gets Google's stand-in signature, because Gemini 3 rejects the turn without it."""
    messages = [
        Message.user("x"),
        Message.assistant("", tool_calls=[ToolCall("toolu_1", "a"), ToolCall("toolu_2", "b")]),
        Message.tool("1", "toolu_1"),
        Message.tool("{broken", "toolu_2"),
    ]
    parts = body_of(model="gemini-3-pro", messages=messages)["contents"][1]["parts"]
    assert [part.get("thoughtSignature") for part in parts] == ["skip_thought_signature_validator", None]
    older = body_of(model="gemini-2.5-pro", messages=messages)["contents"]
    assert "thoughtSignature" not in older[1]["parts"][0]
    assert older[2]["parts"][1]["functionResponse"]["response"] == {"output": "{broken"}


def test_reasoning_of_other_dialects_stays_behind() -> None:
    """Signed parts of other dialects are not sent."""
    message = Message("assistant", "Hi", reasoning=[Reasoning(text="a", signature="s", raw={"type": "thinking"})])
    assert body_of(messages=[Message.user("x"), message])["contents"][1]["parts"] == [{"text": "Hi"}]


# Whole responses


def test_whole_answer() -> None:
    """A whole response has its text, thoughts, signed calls, finish reason, usage, id, model and raw body."""
    response = CODEC.decode(b"\n " + json.dumps(WHOLE).encode())
    assert (response.text, response.reasoning) == ("Let me look.", "Hm.So.")
    assert response.tool_calls == (ToolCall("call_0", "weather", {"city": "Zürich"}, signature="t3", raw=NO_ID),)
    assert (response.finish_reason, response.raw_finish_reason) == ("tool_call", "STOP")
    assert response.usage == Usage(input_tokens=12, output_tokens=11, cached_tokens=4, reasoning_tokens=6)
    assert (response.id, response.model, response.raw) == ("r1", "gemini-x", WHOLE)


def test_whole_answer_goes_back() -> None:
    """All parts are sent back as they came, each with its own signature."""
    response = CODEC.decode(json.dumps(WHOLE).encode())
    body = body_of(messages=[Message.user("x"), Message.assistant(response)])
    assert body["contents"][1] == WHOLE["candidates"][0]["content"] | {"role": "model"}


def test_a_signature_on_an_empty_text() -> None:
    """The signed empty text at the end of a stream is sent back unchanged, after the text."""
    response = streamed(
        CODEC, sse(answer({"text": "Hi"}), answer({"text": "", "thoughtSignature": "t"}, reason="STOP"))
    )
    body = body_of(messages=[Message.user("x"), Message.assistant(response)])
    assert body["contents"][1]["parts"] == [{"text": "Hi"}, {"text": "", "thoughtSignature": "t"}]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("SAFETY", "content_filter"),
        ("RECITATION", "content_filter"),
        ("PROHIBITED_CONTENT", "content_filter"),
        ("MALFORMED_FUNCTION_CALL", "error"),
        ("OTHER", "OTHER"),
    ],
)
def test_finish_reasons(raw: str, reason: str) -> None:
    """Known finish reasons are normalized and others are passed on, alike in both modes."""
    for response in (CODEC.decode(json.dumps(answer(reason=raw)).encode()), streamed(CODEC, sse(answer(reason=raw)))):
        assert (response.finish_reason, response.raw_finish_reason) == (reason, raw)


def test_several_candidates() -> None:
    """The candidates after the first are alternatives, even if they interleave in a stream."""
    whole = {"candidates": [answer({"text": t}, reason="STOP", index=i)["candidates"][0] for i, t in enumerate("ab")]}
    stream = sse(
        answer({"text": "b1"}, index=1),
        answer({"text": "a1"}, index=0),
        answer({"text": "a2"}, reason="STOP", index=0, usageMetadata={"promptTokenCount": 1}),
        answer({"text": "b2"}, {"functionCall": {"name": "f"}}, reason="STOP", index=1),
    )
    response = CODEC.decode(json.dumps(whole).encode())
    assert [response.text, *(other.text for other in response.alternatives)] == ["a", "b"]
    response = streamed(CODEC, stream)
    assert (response.text, response.finish_reason) == ("a1a2", "stop")
    (other,) = response.alternatives
    assert (other.text, other.finish_reason, other.tool_calls[0].name) == ("b1b2", "tool_call", "f")


@pytest.mark.parametrize("feedback", [{"blockReason": "SAFETY"}, {"blockReason": "OTHER", "blockReasonMessage": "No."}])
def test_blocked_prompt(feedback: dict[str, str]) -> None:
    """A prompt that the filter blocked raises ContentFiltered in both modes."""
    body = {"promptFeedback": feedback, "usageMetadata": {"promptTokenCount": 3}}
    with pytest.raises(ContentFiltered, match=feedback["blockReason"]) as caught:
        CODEC.decode(json.dumps(body).encode())
    assert caught.value.code == feedback["blockReason"]
    _, error = interrupted(CODEC, sse(body))
    assert isinstance(error, ContentFiltered)


@pytest.mark.parametrize(
    "body", [b"", b"<html>busy</html>", b"{}", b"[]", b"null", b'{"usageMetadata": {}}', b'{"cand']
)
def test_not_an_answer(body: bytes) -> None:
    """A body without a candidate never passes as an empty response."""
    with pytest.raises(StreamProtocolError):
        CODEC.decode(body)


# Streams


def test_recorded_parallel_tool_calls() -> None:
    """Two calls, the first signed, decode the same wherever the reads are cut."""
    body = load("32-").body
    response = streamed(CODEC, body)
    assert [(call.id, call.name, call.arguments) for call in response.tool_calls] == [
        ("8hd01vsf", "add", {"a": 2, "b": 3}),
        ("k0srpqrc", "multiply", {"b": 3, "a": 2}),
    ]
    assert response.tool_calls[0].signature is not None
    assert response.tool_calls[1].signature is None
    assert response.usage == Usage(input_tokens=157, output_tokens=32 + 438, reasoning_tokens=438)
    assert (response.finish_reason, response.raw_finish_reason) == ("tool_call", "STOP")
    assert (response.model, response.id) == ("gemini-3.1-pro-preview", "UwCzaaGdI_aEz7IPqoinwQM")
    assert recut(CODEC, body) == response


def test_recorded_calls_go_back() -> None:
    """The recorded calls are sent back as the parts that arrived."""
    events = [json.loads(line[6:]) for line in load("32-").body.decode().splitlines() if line]
    came = [event["candidates"][0]["content"]["parts"][0] for event in events[:2]]
    response = streamed(CODEC, load("32-").body)
    messages = [Message.user("x"), Message.assistant(response), *(Message.tool("5", c) for c in response.tool_calls)]
    contents = body_of(model="gemini-3-pro-preview", messages=messages)["contents"]
    assert contents[1] == {"role": "model", "parts": came}
    assert [part["functionResponse"]["id"] for part in contents[2]["parts"]] == ["8hd01vsf", "k0srpqrc"]


def test_json_array() -> None:
    """A JSON array of events, which the service sends without `alt=sse`, decodes like the stream."""
    events = [
        answer({"text": "Hé ["}),
        answer({"text": '"}],\\'}),
        answer(reason="STOP", usageMetadata=WHOLE["usageMetadata"]),
    ]
    response = streamed(CODEC, sse(*events))
    body = json.dumps(events, indent=2, ensure_ascii=False).encode()
    assert CODEC.decode(body) == response


def test_chunks_are_pieces_of_the_answer() -> None:
    """Usage in every event does not make separate chunks, and the last usage counts."""
    usages = [{"promptTokenCount": 3}, {"promptTokenCount": 3, "candidatesTokenCount": 1}, {"candidatesTokenCount": 2}]
    body = sse(
        answer(usageMetadata=usages[0]),
        answer({"text": "a"}, usageMetadata=usages[1]),
        answer({"text": ""}, reason="STOP", usageMetadata=usages[2]),
    )
    chunks = list(chunks_of(CODEC, [body]))
    assert [chunk.text for chunk in chunks] == ["a", ""]
    assert chunks[-1].usage == Usage(input_tokens=3, output_tokens=2)


def test_finish_reason_in_every_event() -> None:
    """Older models send STOP in every event; with a call, the finish reason is tool_call."""
    body = sse(answer({"text": "a"}, reason="STOP"), answer({"functionCall": {"name": "f", "args": None}}))
    response = streamed(CODEC, body)
    assert (response.finish_reason, response.tool_calls) == ("tool_call", (ToolCall("call_0", "f", raw=NO_ID),))


def test_truncated_stream() -> None:
    """A stream without a finish reason for each candidate was cut off."""
    for events in (
        [],
        [answer({"text": "one"})],
        [answer({"text": "one"}, reason="STOP"), answer({"text": "x"}, index=1)],
    ):
        partial, error = interrupted(CODEC, sse(*events))
        assert isinstance(error, StreamProtocolError)
        assert partial.text == ("one" if events else "")


ERROR = {"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}}


@pytest.mark.parametrize(
    "error", [json.dumps(ERROR, indent=2).encode(), b"data: " + json.dumps(ERROR).encode() + b"\n\n"]
)
@pytest.mark.parametrize("before", [b"", sse(answer({"text": "one"}))])
def test_error_in_a_stream(error: bytes, before: bytes) -> None:
    """An error is raised with `data:` or without, after events or alone; earlier output is kept."""
    partial, raised = interrupted(CODEC, before + error)
    assert isinstance(raised, Overloaded)
    assert raised.retryable
    assert partial.text == ("one" if before else "")


def test_error_beside_candidates() -> None:
    """An error next to candidates is still an error."""
    _, raised = interrupted(CODEC, sse({**answer({"text": "one"}), **ERROR}))
    assert isinstance(raised, Overloaded)


def test_error_in_an_array() -> None:
    """An error is raised as an element of the array, or instead of the array."""
    for body in (json.dumps([answer({"text": "one"}), ERROR]), json.dumps(ERROR), json.dumps([ERROR])):
        with pytest.raises(Overloaded):
            CODEC.decode(body.encode())


def test_the_law_of_whole_answers() -> None:
    """Streams cut anywhere give the same response, and streams that end anywhere too early give an error."""
    check_codec(CODEC, [load("32-").body])


# Errors


def test_recorded_invalid_key() -> None:
    """An invalid key is a 400 with plain JSON, although the content type is that of a stream."""
    recorded = load("36-")
    error = CODEC.decode_error(recorded.status, recorded.headers, recorded.body)
    assert type(error) is AuthenticationError
    assert (error.status, error.retryable) == (400, False)


def test_recorded_rate_limit() -> None:
    """A quota per minute recovers after the delay in RetryInfo."""
    error = CODEC.decode_error(429, {}, load("37-").body)
    assert type(error) is RateLimitError
    assert (error.retry_after, error.retryable, error.code) == (48.0, True, "RESOURCE_EXHAUSTED")


def failure(code: int, status: str, message: str = "No.", details: list[Any] | None = None) -> bytes:
    return json.dumps(
        {"error": {"code": code, "message": message, "status": status, "details": details or []}}
    ).encode()


def test_quota_of_a_day() -> None:
    """An exhausted quota per day is not retryable."""
    details = [
        {"@type": "QuotaFailure", "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}
    ]
    error = CODEC.decode_error(429, {}, failure(429, "RESOURCE_EXHAUSTED", details=details))
    assert type(error) is QuotaExceeded
    assert not error.retryable


@pytest.mark.parametrize(
    ("code", "status", "message", "kind"),
    [
        (400, "INVALID_ARGUMENT", "Unknown name", BadRequest),
        (
            400,
            "INVALID_ARGUMENT",
            "The input token count (9) exceeds the maximum number of tokens allowed (8).",
            ContextLengthExceeded,
        ),
        (400, "FAILED_PRECONDITION", "User location is not supported", BadRequest),
        (403, "PERMISSION_DENIED", "No.", PermissionDenied),
        (404, "NOT_FOUND", "models/x is not found", NotFound),
        (500, "INTERNAL", "No.", ServerError),
        (503, "UNAVAILABLE", "overloaded", Overloaded),
    ],
)
def test_errors(code: int, status: str, message: str, kind: type[ProviderError]) -> None:
    """Each of Google's statuses becomes its error class; the body may be wrapped in an array."""
    body = failure(code, status, message)
    for given_body in (body, b"[" + body + b"]"):
        error = CODEC.decode_error(code, {}, given_body)
        assert type(error) is kind
        assert (error.status, error.code) == (code, status)


def test_responses_are_alike_in_both_modes() -> None:
    """A whole body decodes to the same response as the only event of a stream."""
    whole: Response = CODEC.decode(json.dumps(WHOLE).encode())
    assert streamed(CODEC, sse(WHOLE)) == whole
