"""Vertex AI's codec: the paths of models, and two dialects whose answers it tells apart."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any
from urllib.parse import unquote

import attrs
import pytest
from hypothesis import given, strategies as st
from support.anthropic import finish, start, text_block
from support.dialects import PARAMETERS, PNG, WEATHER, interrupted, recut, sse, streamed
from support.gemini import answer
from support.recordings import load
from support.synthetic import ANSWERS

from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    ContentFiltered,
    ContextLengthExceeded,
    FluxiblyError,
    NotFound,
    Overloaded,
    PermissionDenied,
    ProviderError,
    QuotaExceeded,
    RateLimitError,
    ServerError,
    StreamProtocolError,
)
from fluxibly.providers.dialects.anthropic import AnthropicCodec
from fluxibly.providers.dialects.codec import Codec
from fluxibly.providers.dialects.gemini import GeminiCodec
from fluxibly.providers.dialects.vertex import VertexCodec
from fluxibly.testing import check_codec
from fluxibly.testing.codec_check import outcome_of
from fluxibly.types import Message, Reasoning, Request, Response, Tool, ToolCall

PLACE = "projects/p-1/locations/global"
CODEC = VertexCodec(PLACE)
KEYED = VertexCodec(None)
GEMINI, CLAUDE = "gemini-2.5-flash", "claude-sonnet-4-5@20250929"
DIRECT: dict[str, Codec] = {"gemini": GeminiCodec(), "messages": AnthropicCodec()}
"""The codecs of the two dialects, by the dialects' names in the recordings."""
OURS = [pytest.param(each, id=each.name) for each in ANSWERS if each.dialect in DIRECT]
STREAMS = [param for param in OURS if param.values[0].streaming]


def encoded(model: str = GEMINI, *, codec: VertexCodec = CODEC, stream: bool = False, **fields: Any) -> tuple[str, Any]:
    """Return the path and the decoded body of a request."""
    made = codec.encode(Request(**{"model": model, "messages": "Hi", **fields}), stream=stream)
    assert made.headers == ()
    return made.path, json.loads(made.body)


# Paths


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("gemini-2.5-flash", f"/v1beta1/{PLACE}/publishers/google/models/gemini-2.5-flash:generateContent"),
        ("models/gemini-2.5-flash", f"/v1beta1/{PLACE}/publishers/google/models/gemini-2.5-flash:generateContent"),
        ("google/gemini-3-pro", f"/v1beta1/{PLACE}/publishers/google/models/gemini-3-pro:generateContent"),
        (
            "publishers/google/models/gemini-3-pro",
            f"/v1beta1/{PLACE}/publishers/google/models/gemini-3-pro:generateContent",
        ),
        ("claude-opus-4-6", f"/v1/{PLACE}/publishers/anthropic/models/claude-opus-4-6:rawPredict"),
        (CLAUDE, f"/v1/{PLACE}/publishers/anthropic/models/{CLAUDE}:rawPredict"),
        (f"anthropic/{CLAUDE}", f"/v1/{PLACE}/publishers/anthropic/models/{CLAUDE}:rawPredict"),
        (f"publishers/anthropic/models/{CLAUDE}", f"/v1/{PLACE}/publishers/anthropic/models/{CLAUDE}:rawPredict"),
        ("endpoints/123", f"/v1beta1/{PLACE}/endpoints/123:generateContent"),
        (
            "projects/p-2/locations/us-east5/endpoints/123",
            "/v1beta1/projects/p-2/locations/us-east5/endpoints/123:generateContent",
        ),
        (
            "projects/example.com:p/locations/eu/publishers/google/models/gemini-3-pro",
            "/v1beta1/projects/example.com:p/locations/eu/publishers/google/models/gemini-3-pro:generateContent",
        ),
        (
            f"projects/p-2/locations/us-east5/publishers/anthropic/models/{CLAUDE}",
            f"/v1/projects/p-2/locations/us-east5/publishers/anthropic/models/{CLAUDE}:rawPredict",
        ),
    ],
)
def test_paths(model: str, path: str) -> None:
    """A model goes to its publisher's path and method, however its name is written."""
    assert encoded(model)[0] == path
    assert encoded(model, codec=VertexCodec(PLACE, versioned=True))[0] == path.removeprefix("/v1beta1").removeprefix(
        "/v1"
    )
    method = path.rpartition(":")[2]
    streaming = "streamRawPredict" if method == "rawPredict" else "streamGenerateContent?alt=sse"
    assert encoded(model, stream=True)[0] == f"{path.removesuffix(method)}{streaming}"


def test_paths_with_an_api_key() -> None:
    """An API key has a project of its own, so that a model's path begins with its publisher."""
    path, _ = encoded(codec=KEYED)
    assert path == "/v1beta1/publishers/google/models/gemini-2.5-flash:generateContent"
    path, _ = encoded("projects/p-2/locations/us/endpoints/1", codec=KEYED)
    assert path == "/v1beta1/projects/p-2/locations/us/endpoints/1:generateContent"
    for model in (CLAUDE, "endpoints/1"):
        with pytest.raises(
            BadRequest, match="expected a project besides the API key for Vertex AI, got none: set project"
        ):
            encoded(model, codec=KEYED)


@pytest.mark.parametrize(
    "model",
    [
        "meta/llama-4-maverick",
        "publishers/mistralai/models/mistral-medium-3",
        "projects/p-2/locations/us/publishers/qwen/models/qwen3",
    ],
)
def test_other_publishers(model: str) -> None:
    """The error for another publisher's model says how to reach it."""
    with pytest.raises(
        BadRequest, match=r"one of '(meta|mistralai|qwen)': use framework 'openai' with api_base .*/endpoints/openapi"
    ) as caught:
        encoded(model)
    assert not caught.value.retryable
    assert caught.value.model == model


@pytest.mark.parametrize(
    "model",
    [
        *(
            "",
            ".",
            "..",
            "/",
            "a/b/c",
            "google/",
            "/gemini",
            "google//gemini",
            "google/..",
            "publishers/google/models/",
        ),
        *("projects/p/locations/l", "projects/p/locations/l/", "projects/../locations/l/endpoints/1"),
        *(
            "projects/p/locations/./endpoints/1",
            "projects/p/locations/l/endpoints/..",
            "projects//locations/l/endpoints/1",
        ),
        *("projects/p/locations/l/endpoints/1/../../x", "https://example.test/gemini"),
    ],
)
def test_names_that_are_none(model: str) -> None:
    """The error for a malformed name shows the forms of names."""
    with pytest.raises(BadRequest, match="expected the name of a model for Vertex AI, such as"):
        encoded(model)


PATH = re.compile(
    r"/(v1|v1beta1)/projects/[^/?]+/locations/[^/?]+/(publishers/(google|anthropic)/models|endpoints)/([^/?:]+)"
    r":(generateContent|rawPredict)"
)


@given(
    st.text()
    | st.text("a/.:?#%@;&\\ \n\r\tü\ud83d").map(lambda name: f"gemini{name}")
    | st.text("a/.:?#%@;&\\ \n\r\tü\ud83d").map(lambda name: f"projects/p{name}/locations/l/endpoints/1")
)
def test_odd_names_keep_the_path(model: str) -> None:
    """Whatever a name contains, it is refused or is one segment of the path; the rest of the path stays as it is."""
    try:
        path, _ = encoded(model)
    except BadRequest:
        return
    found = PATH.fullmatch(path)
    assert found, path
    assert re.fullmatch(r"[!-~]+", path)
    assert not {"#", "\\"} & set(path)
    assert {"", ".", ".."}.isdisjoint(path.removeprefix("/").split("/"))
    assert unquote(found[4]) == model.rpartition("/")[2].encode(errors="replace").decode()


# Bodies

CONVERSATION = [
    Message.system("Be brief."),
    Message.user(["What is it?", PNG]),
    Message.assistant([Reasoning(text="Hm."), ToolCall("c_1", "weather", {"city": "Ostend"})]),
    Message.tool("4", "c_1", name="weather"),
]
FIELDS: dict[str, Any] = {"messages": CONVERSATION, "tools": [WEATHER, Tool("now")], "tool_choice": "required"}


@pytest.mark.parametrize("stream", [False, True])
def test_bodies_of_gemini(stream: bool) -> None:
    """The body for a model of Google's is that of the Gemini API."""
    fields = {**FIELDS, **PARAMETERS, "stop": ["E"], "response_format": {"type": "object"}, "reasoning_effort": "low"}
    request = Request(model=GEMINI, **fields)
    assert encoded(**fields, stream=stream)[1] == json.loads(DIRECT["gemini"].encode(request, stream=stream).body)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "model", [CLAUDE, f"anthropic/{CLAUDE}", "claude-opus-4-6", "publishers/anthropic/models/claude-opus-4-6"]
)
def test_bodies_of_claude(model: str, stream: bool) -> None:
    """The body for Claude is that of Anthropic's API, with the version and without the model."""
    fields = {**FIELDS, "reasoning_effort": "low", "temperature": 1, "top_k": 40, "stop": ["E"]}
    expected = json.loads(DIRECT["messages"].encode(Request(model=model, **fields), stream=stream).body)
    del expected["model"]
    assert encoded(model, **fields, stream=stream)[1] == {"anthropic_version": "vertex-2023-10-16", **expected}


@pytest.mark.parametrize(
    ("model", "thinking"),
    [
        (CLAUDE, {"type": "enabled", "budget_tokens": 2048}),
        ("claude-opus-4@20250514", {"type": "enabled", "budget_tokens": 2048}),
        ("anthropic/claude-opus-4-6", {"type": "adaptive", "display": "summarized"}),
    ],
)
def test_the_version_of_claude(model: str, thinking: dict[str, Any]) -> None:
    """A date after the model's name is not taken for its version."""
    assert encoded(model, reasoning_effort="low")[1]["thinking"] == thinking


@pytest.mark.parametrize("model", [GEMINI, CLAUDE])
def test_extra_wins(model: str) -> None:
    """`extra` is merged into the body, and wins."""
    extra = {"labels": {"team": "harbour"}, "anthropic_version": "vertex-2099", "top_k": None}
    _, body = encoded(model, extra=extra, top_k=3)
    assert (body["labels"], body["anthropic_version"]) == ({"team": "harbour"}, "vertex-2099")
    assert "top_k" not in body


@pytest.mark.parametrize("model", [GEMINI, CLAUDE])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": "a secret \ud83d"}, "surrogate"),
        ({"extra": {"thing": object()}}, "object"),
        ({"messages": [Message.system("alone")]}, "besides the system messages"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
    ],
)
def test_refused_requests(model: str, fields: dict[str, Any], said: str) -> None:
    """A request that the dialect cannot express raises an error that says so, without quoting the prompt."""
    with pytest.raises(BadRequest, match=said) as caught:
        encoded(model, **fields)
    assert "secret" not in str(caught.value)


# Answers


def read_by(codec: Codec, recording: Any) -> Response:
    return streamed(codec, recording.body) if recording.streaming else codec.decode(recording.body)


@pytest.mark.parametrize("recording", OURS)
def test_answers_of_both_dialects(recording: Any) -> None:
    """An answer is what the codec of its dialect reads: thoughts, signatures, tools, images, citations, usage."""
    ours = recut(CODEC, recording.body) if recording.streaming else CODEC.decode(recording.body)
    assert ours == read_by(DIRECT[recording.dialect], recording)


@pytest.mark.parametrize("name", ["27-", "28-", "32-"])
def test_recorded_answers(name: str) -> None:
    """So are the recorded answers of the two services."""
    recording = load(name)
    assert read_by(CODEC, recording) == read_by(DIRECT[recording.dialect], recording)


def test_law_11() -> None:
    """No stream that ends early passes for a whole answer."""
    check_codec(CODEC, [param.values[0].body for param in STREAMS])


@pytest.mark.parametrize("recording", OURS)
def test_answers_go_back_as_they_came(recording: Any) -> None:
    """An answer goes back to its model as the codec of its dialect would send it, with its signatures."""
    response = read_by(CODEC, recording)
    model = CLAUDE if recording.dialect == "messages" else "gemini-3-pro"
    results = [Message.tool("4", call) for call in response.tool_calls] or [Message.user("And then?")]
    request = Request(model=model, messages=[Message.user("Hi"), response.message, *results], tools=[WEATHER])
    body = json.loads(CODEC.encode(request, stream=False).body)
    body.pop("anthropic_version", None)
    expected = json.loads(DIRECT[recording.dialect].encode(request, stream=False).body)
    expected.pop("model", None)
    assert body == expected
    signatures = set(re.findall(rb'"c2ln[0-9A-Za-z]*=*"', recording.body))
    assert signatures <= set(re.findall(rb'"c2ln[0-9A-Za-z]*=*"', json.dumps(body).encode()))


def test_signatures_of_one_model_do_not_go_to_the_other() -> None:
    """A conversation may change from Gemini to Claude and back; each gets only the thoughts that it signed."""
    thought = {"text": "Hm.", "thought": True, "thoughtSignature": "c2lnMQ=="}
    gemini = CODEC.decode(json.dumps(answer(thought, {"text": "Four."}, reason="STOP")).encode())
    block = {"type": "thinking", "thinking": "Ho.", "signature": "c2lnMg=="}
    said = {"type": "message", "content": [block, {"type": "text", "text": "Five."}], "stop_reason": "end_turn"}
    claude = CODEC.decode(json.dumps(said).encode())
    turns = [Message.user("a"), gemini.message, Message.user("b"), claude.message, Message.user("c")]
    for model, own, other in ((GEMINI, "c2lnMQ==", "c2lnMg=="), (CLAUDE, "c2lnMg==", "c2lnMQ==")):
        body = json.dumps(encoded(model, messages=turns)[1])
        assert own in body
        assert other not in body


def test_usage() -> None:
    """Cached tokens are counted as each dialect means them."""
    counts = {"promptTokenCount": 10, "cachedContentTokenCount": 4, "candidatesTokenCount": 5, "thoughtsTokenCount": 6}
    usage = CODEC.decode(json.dumps(answer({"text": "a"}, reason="STOP", usageMetadata=counts)).encode()).usage
    assert usage is not None
    assert (usage.input_tokens, usage.cached_tokens, usage.output_tokens, usage.reasoning_tokens) == (10, 4, 11, 6)
    stream = sse(
        start(input_tokens=3, cache_read_input_tokens=4, cache_creation_input_tokens=2),
        *text_block("a"),
        *finish("end_turn", output_tokens=8),
    )
    usage = streamed(CODEC, stream).usage
    assert usage is not None
    assert (usage.input_tokens, usage.cached_tokens, usage.cache_write_tokens, usage.output_tokens) == (9, 4, 2, 8)


@pytest.mark.parametrize(
    "stream",
    [
        sse({"type": "ping"}, start(), *text_block("Hi"), *finish("end_turn")),
        b": keep-alive\n\n" + sse(start(), *text_block("Hi"), *finish("end_turn")),
        re.sub(rb"event: \w+\n", b"", sse(start(), *text_block("Hi"), *finish("end_turn"))),
        sse(start(), *text_block("Hi"), *finish("end_turn"), done=True),
        sse({"usageMetadata": {"promptTokenCount": 1}}, answer({"text": "Hi"}, reason="STOP")),
        sse({}, answer({"text": "Hi"}, reason="STOP")),
        b"\xef\xbb\xbf" + sse(answer({"text": "Hi"}, reason="STOP")),
        sse([answer({"text": "Hi"}, reason="STOP")]),
    ],
)
def test_beginnings(stream: bytes) -> None:
    """The dialect is known from the first event, whatever that event is."""
    response = recut(CODEC, stream)
    assert (response.text, response.finish_reason) == ("Hi", "stop")


def test_what_comes_after_the_end() -> None:
    """A stream of Claude's ends with its last event, whatever comes after it."""
    whole = sse(start(), *text_block("Hi"), *finish("end_turn"))
    assert streamed(CODEC, whole + sse(OVERLOADED)) == streamed(DIRECT["messages"], whole)


# Errors

GOOGLE = {"error": {"code": 429, "message": "Resource exhausted.", "status": "RESOURCE_EXHAUSTED"}}
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
BEGUN = {"gemini": sse(answer({"text": "Hel"})), "messages": sse(start(), *text_block("Hel")[:-1])}


@pytest.mark.parametrize("dialect", BEGUN)
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (sse(OVERLOADED), Overloaded),
        (sse(GOOGLE), RateLimitError),
        (sse([GOOGLE]), RateLimitError),
        (json.dumps(GOOGLE, indent=2).encode(), RateLimitError),
        (json.dumps([GOOGLE], indent=2).encode(), RateLimitError),
        (b"event: error\ndata: broken\n\n", ServerError),
        (b"event: error\ndata: " + json.dumps(GOOGLE).encode() + b"\n\n", RateLimitError),
        (sse("<html>"), StreamProtocolError),
    ],
)
def test_errors_in_a_stream(dialect: str, error: bytes, kind: type[FluxiblyError]) -> None:
    """An error in the middle of a stream, or as its first event, is raised; what came before it is kept."""
    for before, text in ((BEGUN[dialect], "Hel"), (b"", "")):
        partial, caught = interrupted(CODEC, before + error)
        assert (partial.text, type(caught)) == (text, kind)
        _, direct = interrupted(DIRECT[dialect], before + error)
        assert type(direct) is kind


@pytest.mark.parametrize("stream", [b"", b": ping\n\n", *BEGUN.values(), sse(answer({"text": "Hi"})), sse(start())])
def test_streams_that_were_cut_off(stream: bytes) -> None:
    """A stream that ends early, even before its first event, is an error."""
    _, error = interrupted(CODEC, stream)
    assert isinstance(error, StreamProtocolError)
    assert "cut off" in str(error)
    assert error.retryable


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, {"status": "INVALID_ARGUMENT", "message": "Invalid value"}, BadRequest),
        (
            400,
            {"status": "INVALID_ARGUMENT", "message": "The input token count (9) exceeds the maximum (8)"},
            ContextLengthExceeded,
        ),
        (
            400,
            {"status": "FAILED_PRECONDITION", "message": "Project `p-1` is not allowed to use Publisher Model"},
            BadRequest,
        ),
        (
            401,
            {"status": "UNAUTHENTICATED", "message": "Request had invalid authentication credentials."},
            AuthenticationError,
        ),
        (403, {"status": "PERMISSION_DENIED", "message": "Vertex AI API has not been used"}, PermissionDenied),
        (404, {"status": "NOT_FOUND", "message": "Publisher Model `x` was not found"}, NotFound),
        (
            429,
            {"status": "RESOURCE_EXHAUSTED", "message": "Quota exceeded for aiplatform.googleapis.com/x"},
            RateLimitError,
        ),
        (500, {"status": "INTERNAL", "message": "Internal error encountered."}, ServerError),
        (503, {"status": "UNAVAILABLE", "message": "The service is currently unavailable."}, Overloaded),
    ],
)
@pytest.mark.parametrize("as_array", [False, True])
def test_errors(status: int, error: dict[str, Any], kind: type[ProviderError], as_array: bool) -> None:
    """Google's errors, also those in an array, have their class, and their message names the service, not a dialect."""
    payload: Any = {"error": {"code": status, **error}}
    found = CODEC.decode_error(status, {}, json.dumps([payload] if as_array else payload).encode())
    assert type(found) is kind
    assert str(found).startswith(f"Vertex AI answered {status} {error['status']}: {error['message']}")
    assert found.retryable == (status in {429, 500, 503})
    assert found.status == status


def test_errors_of_anthropic() -> None:
    """Errors in Anthropic's shape, which come from Claude itself, have their class."""
    body = {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "prompt is too long"},
        "request_id": "req_1",
    }
    found = CODEC.decode_error(400, {}, json.dumps(body).encode())
    assert type(found) is ContextLengthExceeded
    assert found.request_id == "req_1"
    assert str(found).startswith("Vertex AI answered 400 invalid_request_error")
    with pytest.raises(Overloaded):
        CODEC.decode(json.dumps(OVERLOADED).encode())


def test_retry_hints() -> None:
    """A 429 says when to come back; a quota for a day does not recover in time."""
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}]
    found = CODEC.decode_error(429, {}, json.dumps({"error": {**GOOGLE["error"], "details": details}}).encode())
    assert (type(found), found.retry_after, found.retryable) == (RateLimitError, 7.0, True)
    violation = {"quotaId": "GenerateRequestsPerDayPerProject", "quotaValue": "50"}
    details.append({"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [violation]})
    found = CODEC.decode_error(429, {}, json.dumps({"error": {**GOOGLE["error"], "details": details}}).encode())
    assert (type(found), found.retryable) == (QuotaExceeded, False)


def test_the_recorded_errors() -> None:
    """The recorded errors of the Gemini API have the class that its own codec gives them."""
    for name in ("36-", "37-"):
        recording = load(name)
        ours = CODEC.decode_error(recording.status, recording.headers, recording.body)
        theirs = DIRECT["gemini"].decode_error(recording.status, recording.headers, recording.body)
        assert (type(ours), ours.retry_after, ours.code) == (type(theirs), theirs.retry_after, theirs.code)


def test_a_blocked_prompt() -> None:
    """A prompt that Google blocks is an error in both modes."""
    blocked = {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}
    with pytest.raises(ContentFiltered):
        CODEC.decode(json.dumps(blocked).encode())
    _, error = interrupted(CODEC, sse(blocked))
    assert isinstance(error, ContentFiltered)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "error", "candidates", "content", "message", "delta", "parts"]), inner
        )
    ),
    max_leaves=6,
)


@given(JSON, st.booleans())
def test_any_json(value: object, named: bool) -> None:
    """JSON of any shape, as a body, an event or an error, leads to an answer or to an error of fluxibly."""
    body = json.dumps(value).encode()
    with contextlib.suppress(ProviderError):
        CODEC.decode(body)
    stream = (b"event: error\n" if named else b"") + b"data: " + body + b"\n\n"
    failure = outcome_of(CODEC, [stream, stream]).failure
    assert failure is None or isinstance(failure, ProviderError)
    for status in (400, 401, 429, 500):
        assert isinstance(CODEC.decode_error(status, {}, body), ProviderError)


def test_a_model_of_another_region() -> None:
    """A model whose name has its place in another region than the calls go to is refused before anything is sent."""
    codec = VertexCodec("projects/p-1/locations/europe-west4", region="europe-west4")
    path = codec.encode(
        Request(model="projects/p-2/locations/europe-west4/endpoints/7", messages="Hi"), stream=False
    ).path
    assert path == "/v1beta1/projects/p-2/locations/europe-west4/endpoints/7:generateContent"
    elsewhere = Request(model="projects/p-2/locations/us-east1/endpoints/7", messages="Hi")
    with pytest.raises(
        BadRequest, match="expected a model in 'europe-west4', where the calls go, got one in 'us-east1'"
    ):
        codec.encode(elsewhere, stream=False)
    assert attrs.evolve(codec, region=None).encode(elsewhere, stream=False).path.startswith("/v1beta1/projects/p-2/")
