"""Cohere's dialect: requests, whole responses, streams, errors, and the official client as a second reader."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from hypothesis import given, strategies as st
from support.cohere import USAGE, block, call, end, plan, start, stream_of
from support.dialects import PARAMETERS, PNG, WEATHER, answering, interrupted, recut, serving, sse, streamed
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
    RequestTimeout,
    ServerError,
    StreamProtocolError,
)
from fluxibly.providers.dialects.anthropic import AnthropicCodec
from fluxibly.providers.dialects.cohere import CohereCodec
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.testing import check_codec
from fluxibly.testing.codec_check import chunks_of
from fluxibly.types import (
    Audio,
    Document,
    Image,
    Message,
    Opaque,
    Reasoning,
    Request,
    Response,
    Text,
    Tool,
    ToolCall,
    Usage,
)

CODEC = CohereCodec()


def body_of(stream: bool = False, **fields: Any) -> dict[str, Any]:
    fields = {"model": "command-a-03-2025", "messages": "Hi", **fields}
    return json.loads(CODEC.encode(Request(**fields), stream=stream).body)


def messages_of(*messages: Message) -> list[dict[str, Any]]:
    return body_of(messages=messages)["messages"]


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


# Requests


def test_plain_request() -> None:
    """A plain request has its path, and nothing that was not requested."""
    encoded = CODEC.encode(Request(model="command-r", messages="Hi"), stream=True)
    assert (encoded.path, encoded.headers) == ("/chat", ())
    assert json.loads(encoded.body) == {
        "model": "command-r",
        "messages": [{"role": "user", "content": [text("Hi")]}],
        "stream": True,
    }


def test_parameters() -> None:
    """Each parameter is sent under the dialect's name."""
    body = body_of(
        **PARAMETERS,
        stop=["END", "FIN"],
        n=1,
        tools=[WEATHER, Tool("now", strict=True)],
        tool_choice="required",
        response_format={"type": "object"},
        reasoning_effort="low",
    )
    del body["messages"]
    assert body == {
        "model": "command-a-03-2025",
        "stream": False,
        "temperature": 0.5,
        "max_tokens": 7,
        "p": 0.9,
        "k": 40,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "seed": 3,
        "stop_sequences": ["END", "FIN"],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "The weather in a city.",
                    "parameters": dict(WEATHER.parameters),
                },
            },
            {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
        ],
        "strict_tools": True,
        "tool_choice": "REQUIRED",
        "response_format": {"type": "json_object", "json_schema": {"type": "object"}},
        "thinking": {"type": "enabled", "token_budget": 2048},
    }


@pytest.mark.parametrize(
    ("choice", "names", "sent"),
    [
        ("auto", ["weather", "now"], None),
        ("none", ["weather", "now"], "NONE"),
        ("required", ["weather", "now"], "REQUIRED"),
        ("now", ["now"], "REQUIRED"),
    ],
)
def test_tool_choice(choice: str, names: list[str], sent: str | None) -> None:
    """The service requires a call but not of which tool, so a tool that is required by name is sent alone."""
    body = body_of(tools=[WEATHER, Tool("now")], tool_choice=choice)
    assert [tool["function"]["name"] for tool in body["tools"]] == names
    assert body.get("tool_choice") == sent


@pytest.mark.parametrize(
    ("given", "sent"), [([True, None], True), ([False, False], False), ([None, None], None), ([None], None)]
)
def test_strict_tools(given: list[bool | None], sent: bool | None) -> None:
    """The request has one flag for all its tools."""
    body = body_of(tools=[Tool(f"t{n}", strict=strict) for n, strict in enumerate(given)])
    assert body.get("strict_tools") is sent
    assert all(tool["function"].keys() == {"name", "parameters"} for tool in body["tools"])


def test_strict_of_the_chosen_tool() -> None:
    """The flag follows the tools that are sent."""
    tools = [Tool("a", strict=True), Tool("b", strict=False)]
    assert body_of(tools=tools, tool_choice="b")["strict_tools"] is False


@pytest.mark.parametrize(
    ("wanted", "sent"),
    [
        ("text", {"type": "text"}),
        ("json", {"type": "json_object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "array"}}},
            {"type": "json_object", "json_schema": {"type": "array"}},
        ),
    ],
)
def test_response_formats(wanted: object, sent: dict[str, Any]) -> None:
    """A schema goes out bare: the service takes neither a name nor a strict mode for it."""
    assert body_of(response_format=wanted)["response_format"] == sent


@pytest.mark.parametrize(
    ("effort", "sent"),
    [
        ("none", {"type": "disabled"}),
        ("minimal", {"type": "enabled", "token_budget": 1024}),
        ("medium", {"type": "enabled", "token_budget": 8192}),
        ("high", {"type": "enabled"}),
    ],
)
def test_reasoning_effort(effort: str, sent: dict[str, Any]) -> None:
    """An effort is a budget of thinking; the highest has none, as the service recommends."""
    assert body_of(reasoning_effort=effort)["thinking"] == sent


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 2}, "n"),
        ({"reasoning_effort": "enormous"}, "one of none, minimal, low, medium, high for Cohere, got 'enormous'"),
        ({"tool_choice": "rain", "tools": [WEATHER]}, "one of auto, none, required, weather for Cohere, got 'rain'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [Tool("a", strict=True), Tool("b", strict=False)]}, "the same strict= in all tools"),
        ({"response_format": 3}, "response_format"),
        ({"extra": {"thing": object()}}, "object"),
        ({"messages": "a secret \ud83d"}, "surrogate"),
    ],
)
def test_refused_requests(fields: dict[str, Any], said: str) -> None:
    """A request that the dialect cannot express raises an error that says so, without quoting the prompt."""
    with pytest.raises(BadRequest, match=said) as caught:
        body_of(**fields)
    assert not caught.value.retryable
    assert "secret" not in str(caught.value)


def test_extra_wins() -> None:
    """`extra` is merged into the body, and wins."""
    body = body_of(
        temperature=0.5,
        response_format={"type": "object"},
        extra={"temperature": 1, "documents": ["Tides."], "response_format": {"json_schema": {"type": "array"}}},
    )
    assert (body["temperature"], body["documents"]) == (1, ["Tides."])
    assert body["response_format"] == {"type": "json_object", "json_schema": {"type": "array"}}


def test_system_messages() -> None:
    """System messages keep their places in the conversation."""
    sent = messages_of(Message.system("Be brief."), Message.user("Hi"), Message.system("Rhyme."))
    assert [(turn["role"], turn["content"]) for turn in sent] == [
        ("system", [text("Be brief.")]),
        ("user", [text("Hi")]),
        ("system", [text("Rhyme.")]),
    ]
    with pytest.raises(BadRequest, match="only text in a system message for Cohere, got an Image"):
        messages_of(Message("system", PNG), Message.user("Hi"))
    with pytest.raises(BadRequest, match="besides the system messages"):
        messages_of(Message.system("alone"))


def test_images() -> None:
    """Images are sent by URL, as bytes, and as data URLs, with their detail."""
    images = [Image(url="https://x.test/a.png", detail="low"), PNG, Image(url="data:image/gif;base64,R0lG")]
    (sent,) = messages_of(Message.user(["What is it?", *images]))
    assert sent["content"] == [
        text("What is it?"),
        {"type": "image_url", "image_url": {"url": "https://x.test/a.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}},
        {"type": "image_url", "image_url": {"url": "data:image/gif;base64,R0lG"}},
    ]


PDF = Document(data=b"%PDF", media_type="application/pdf")
WAV = Audio(data=b"RIFF", media_type="audio/wav")
NOTE = Document(data="Höchststand um vier.".encode(), media_type="text/markdown; charset=utf-8", name="tides.md")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (Message.user([WAV]), "text and images in a user's message for Cohere, got an Audio; transcribe it first"),
        (Message.user([NOTE]), r"got a Document; pass its text, or extra=\{'documents': "),
        (Message.tool([PNG], "c"), "text and documents of text in a tool's result for Cohere, got an Image; describe"),
        (Message.tool([PDF], "c"), "a document: expected text for Cohere, got 'application/pdf'; convert it first"),
        (Message.tool([Document(url="https://x.test/a.txt")], "c"), "its bytes or a data URL for Cohere"),
        (Message.tool([Document(url="data:text/plain;base64,a")], "c"), "expected base64 in its data URL"),
        (Message.assistant(["See:", PNG]), "got an Image in an assistant's message; leave it out"),
    ],
)
def test_media_that_the_service_does_not_take(message: Message, said: str) -> None:
    """Media in a place where the service takes none is an error that says what would be right."""
    with pytest.raises(BadRequest, match=said):
        messages_of(Message.user("Hi"), message)


def test_tool_results() -> None:
    """A result is text, or blocks if it has documents; that the tool failed has no field."""
    tide = ToolCall("tide_1", "tide")
    documents = [NOTE, Document(url="data:application/json,%7B%7D")]
    sent = messages_of(
        Message.user("When?"),
        Message.assistant([tide]),
        Message.tool(["at ", "four"], tide),
        Message.tool(["Found:", " ", *documents], tide),
        Message.tool("no such port", tide, is_error=True),
        Message.tool("", tide),
    )
    assert [(turn["role"], turn["tool_call_id"]) for turn in sent[2:]] == [("tool", "tide_1")] * 4
    assert [turn["content"] for turn in sent[2:]] == [
        "at four",
        [
            text("Found:"),
            {"type": "document", "document": {"data": {"text": "Höchststand um vier.", "title": "tides.md"}}},
            {"type": "document", "document": {"data": {"text": "{}"}}},
        ],
        "no such port",
        "",
    ]


def test_call_ids_that_repeat() -> None:
    """Ids that repeat from turn to turn, which the service refuses, become unique; each result keeps its call's id."""
    turns = [Message.user("Hi")]
    for call_id in ("call_0", "call_0", "functions.now:0", ""):
        now = ToolCall(call_id, "now")
        turns += [Message.assistant(tool_calls=[now]), Message.tool("noon", now)]
    sent = messages_of(*turns)[1:]
    ids = [turn["tool_calls"][0]["id"] for turn in sent[::2]]
    assert (ids[0], ids[2]) == ("call_0", "functions.now:0")
    assert len(set(ids)) == 4
    assert [turn["tool_call_id"] for turn in sent[1::2]] == ids


def test_text_of_another_model_beside_its_calls() -> None:
    """The service refuses text beside tool calls, so it goes out as the plan; elsewhere it stays text."""
    sent = messages_of(
        Message.user("When?"),
        Message.assistant(["I look ", "it up.", ToolCall("c", "tide")]),
        Message.tool("4", "c"),
        Message.assistant(["At ", "four."]),
    )
    assert sent[1] == {
        "role": "assistant",
        "tool_plan": "I look it up.",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "tide", "arguments": "{}"}}],
    }
    assert sent[3] == {"role": "assistant", "content": [text("At "), text("four.")]}


@pytest.mark.parametrize(
    ("made", "sent"),
    [
        (ToolCall("c", "tide", raw_arguments='{"a":1}'), '{"a":1}'),
        (ToolCall("c", "tide", raw_arguments='{"a'), '{"INVALID_JSON": "{\\"a"}'),
        (ToolCall("c", "shell", raw_arguments="date", raw={"type": "custom"}), '{"INVALID_JSON": "date"}'),
    ],
)
def test_arguments(made: ToolCall, sent: str) -> None:
    """Arguments go back as they came; text that is no JSON object is wrapped in one."""
    turn = messages_of(Message.user("x"), Message.assistant([made]), Message.tool("bad", made))[1]
    assert turn["tool_calls"][0]["function"]["arguments"] == sent


def test_white_space_is_not_sent() -> None:
    """The service refuses empty messages."""
    assert messages_of(
        Message.system(" "), Message.user([" ", "When?"]), Message.assistant("\n"), Message.user("Well?")
    ) == [{"role": "user", "content": [text("When?")]}, {"role": "user", "content": [text("Well?")]}]
    with pytest.raises(BadRequest, match="expected the last message to say something"):
        messages_of(Message.user("Hi"), Message.assistant("Hello"), Message.user(" \n"))


def test_parts_of_other_dialects_stay_behind() -> None:
    """Reasoning, opaque parts and fields that came from another dialect are not sent."""
    answer = Message.assistant(
        [
            Reasoning(text="a", signature="S"),
            Reasoning(text="b", raw={"type": "thinking", "thinking": "b", "signature": "S"}),
            Reasoning(text="c", raw={"thinking": "c"}),
            Opaque("anthropic", {"type": "server_tool_use"}),
            Text("Hi", raw={"type": "text", "citations": [{}]}),
        ]
    )
    assert messages_of(Message.user("x"), answer)[1] == {"role": "assistant", "content": [text("Hi")]}


def test_reasoning_goes_to_no_other_dialect() -> None:
    """Thoughts and plans of this service are not taken for those of another."""
    answer = CODEC.decode(whole(content=[thought("Hm."), text("Four.")], tool_plan="I plan.", citations=[CITED]))
    request = Request(model="m", messages=[Message.user("x"), answer.message], tools=[WEATHER])
    for codec in (AnthropicCodec(), OllamaCodec(), OpenAICodec()):
        sent = codec.encode(request, stream=False).body
        assert b"Four." in sent
        assert not [said for said in (b"Hm.", b"I plan.", b"Tides") if said in sent]


# Whole responses

CITED: dict[str, Any] = {
    "start": 0,
    "end": 4,
    "text": "Four",
    "sources": [
        {"type": "document", "id": "doc:0", "document": {"id": "doc:0", "text": "High at 4", "title": "Tides"}}
    ],
    "content_index": 1,
    "type": "TEXT_CONTENT",
}
PLANNED: dict[str, Any] = {
    "start": 2,
    "end": 6,
    "text": "plan",
    "sources": [{"type": "tool", "id": "port_1:0", "tool_output": {"port": "Ostend"}}],
    "type": "PLAN",
}
SURE = {"text": "Four", "token_ids": [7], "logprobs": [-0.1]}
STRANGE = {"type": "chart", "points": [1, 2], "note": "rising"}


def thought(said: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": said}


def called(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def whole(reason: str = "COMPLETE", **message: Any) -> bytes:
    answer = {"id": "id_1", "message": {"role": "assistant", **message}, "finish_reason": reason, "usage": USAGE}
    return json.dumps(answer).encode()


FULL: dict[str, Any] = {
    "content": [thought("Hm, Zürich."), text("Four "), text("o'clock."), STRANGE],
    "tool_plan": "I plan.",
    "tool_calls": [called("tide_1", "tide", '{"port": "Ostend"}'), called("now_2", "now", "{}")],
    "citations": [CITED, PLANNED],
}


def test_whole_answer() -> None:
    """A whole response has its parts in order, its finish reason, usage, id, details and raw body."""
    data = json.loads(whole("TOOL_CALL", **FULL)) | {"logprobs": [SURE], "new_field": [1]}
    response = CODEC.decode(b"\n\n  " + json.dumps(data).encode())
    assert response.text == "Four o'clock."
    assert response.reasoning == "Hm, Zürich.I plan."
    assert response.parts == (
        Reasoning(text="Hm, Zürich.", raw={"cohere": thought("Hm, Zürich.")}),
        Text("Four "),
        Text("o'clock."),
        Opaque("cohere", STRANGE),
        Reasoning(text="I plan.", raw={"tool_plan": "I plan."}),
        ToolCall("tide_1", "tide", {"port": "Ostend"}),
        ToolCall("now_2", "now"),
        Opaque("cohere", {"citations": [CITED, PLANNED]}),
    )
    assert (response.finish_reason, response.raw_finish_reason) == ("tool_call", "TOOL_CALL")
    assert response.usage == Usage(input_tokens=500, output_tokens=9, cached_tokens=480)
    assert response.details == {
        "billed_units": USAGE["billed_units"],
        "citations": [CITED, PLANNED],
        "logprobs": [SURE],
    }
    assert (response.id, response.model, response.raw) == ("id_1", None, data)


def test_a_plain_answer_is_a_text() -> None:
    """An answer of one text has no order of its own."""
    response = CODEC.decode(whole(content=[text("Hello")], tool_plan="", tool_calls=[], citations=None))
    assert (response.text, response.order, response.reasoning) == ("Hello", None, "")


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        ({"tokens": {"input_tokens": 12.0, "output_tokens": 3.0}, "cached_tokens": 4.0}, (12, 3, 4)),
        ({"tokens": {"input_tokens": 12}}, (12, None, None)),
        ({"billed_units": {"input_tokens": 12, "output_tokens": 3}}, None),
        ({"tokens": {"input_tokens": -1, "output_tokens": "3"}}, None),
        (None, None),
    ],
)
def test_usage(usage: object, read: tuple[int | None, ...] | None) -> None:
    """Usage is what the model read and wrote, also as floats; what is billed is something else."""
    found = CODEC.decode(json.dumps(json.loads(whole(content=[])) | {"usage": usage}).encode()).usage
    assert (found and (found.input_tokens, found.output_tokens, found.cached_tokens)) == read


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("COMPLETE", "stop"),
        ("STOP_SEQUENCE", "stop"),
        ("MAX_TOKENS", "length"),
        ("TOOL_CALL", "tool_call"),
        ("ERROR_TOXIC", "content_filter"),
        ("SOMETHING_NEW", "SOMETHING_NEW"),
    ],
)
def test_finish_reasons(raw: str, reason: str) -> None:
    """Known finish reasons are normalized and others are passed on, alike in both modes."""
    at_once = CODEC.decode(whole(raw, content=[text("a")]))
    stream = streamed(CODEC, sse(start(), *block("text", "a"), end(raw)))
    assert (at_once.finish_reason, at_once.raw_finish_reason) == (reason, raw)
    assert (stream.finish_reason, stream.raw_finish_reason) == (reason, raw)


@pytest.mark.parametrize(("reason", "kind"), [("ERROR", ServerError), ("TIMEOUT", RequestTimeout)])
def test_an_answer_that_was_given_up(reason: str, kind: type[ProviderError]) -> None:
    """An answer that the service gave up is an error, which may be tried again, and not half an answer."""
    with pytest.raises(kind) as caught:
        CODEC.decode(whole(reason, content=[text("Half an")]))
    partial, error = interrupted(CODEC, sse(start(), *block("text", "Half an"), end(reason)))
    assert isinstance(error, kind)
    assert (partial.text, str(error)) == ("Half an", str(caught.value))
    assert (caught.value.code, error.code, error.retryable) == (reason, reason, True)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>busy</html>",
        b"{}",
        b"[]",
        b"null",
        b'{"message": null, "finish_reason": "COMPLETE"}',
        b'{"message": {"content": [{"type": "text", "text": "Hi"}]}}',
        b'{"message": {}, "finish_reason": null}',
        b'{"message": {"content',
    ],
)
def test_not_an_answer(body: bytes) -> None:
    """A body that is not a whole answer never passes as one."""
    with pytest.raises(StreamProtocolError):
        CODEC.decode(body)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"message": "internal server error", "id": "i"}', ServerError),
        (
            b'{"message": "too many tokens: size limit exceeded", "error_type": "TOO_MANY_TOKENS"}',
            ContextLengthExceeded,
        ),
        (b'{"message": "limited to 1000 API calls / month"}', QuotaExceeded),
        (b'{"error": {"message": "no such model", "code": 404}, "message": {}}', NotFound),
    ],
)
def test_error_in_a_200(body: bytes, kind: type[ProviderError]) -> None:
    """An error in the body of a 200 is raised."""
    with pytest.raises(kind):
        CODEC.decode(body)


# Streams


def test_modes_agree() -> None:
    """The same answer whole and streamed gives the same response, wherever the reads are cut."""
    at_once = CODEC.decode(whole("TOOL_CALL", **FULL))
    stream = recut(CODEC, sse(*stream_of(FULL, "TOOL_CALL"), done=True))
    assert stream == at_once
    assert (stream.parts, stream.details) == (at_once.parts, at_once.details)
    assert (stream.id, stream.raw_finish_reason, stream.usage) == (at_once.id, "TOOL_CALL", at_once.usage)


def test_recorded_tools_stream() -> None:
    """The recorded stream has its plan, its call, its usage and its end, wherever its reads are cut."""
    body = load("50-").body
    response = recut(CODEC, body)
    assert response.parts == (
        Reasoning(
            text="I will use the weather tool to find the weather in Berlin.",
            raw={"tool_plan": "I will use the weather tool to find the weather in Berlin."},
        ),
        ToolCall("weather_vvavrb8p34fk", "weather", raw_arguments='{"latitude": "52.5200", "longitude": "13.4050"}'),
    )
    assert (response.text, response.finish_reason, response.raw_finish_reason) == ("", "tool_call", "TOOL_CALL")
    assert response.usage == Usage(input_tokens=1508, output_tokens=67, cached_tokens=1472)
    assert response.details == {"billed_units": {"input_tokens": 98, "output_tokens": 35}}
    assert response.id == "a0790929-b18f-4399-ae12-09b9659922bd"


def test_recorded_thinking() -> None:
    """The recorded answer has its thinking before its text."""
    recorded = load("51-")
    response = CODEC.decode(recorded.body)
    thinking, said = response.parts
    assert isinstance(thinking, Reasoning)
    assert isinstance(said, Text)
    assert thinking.text.startswith("Okay, let's try to figure out this magic mirror problem.")
    assert said.text.startswith("**Question to Ask the Mirror:**")
    assert thinking.raw == {"cohere": thought(response.reasoning)}
    assert (response.finish_reason, response.usage) == (
        "stop",
        Usage(input_tokens=1430, output_tokens=1786, cached_tokens=1392),
    )
    assert sent_back(response) == json.loads(recorded.body)["message"]


def test_recorded_parallel_tools() -> None:
    """The recorded answer has its plan and both its calls."""
    recorded = load("53-")
    response = CODEC.decode(recorded.body)
    assert response.reasoning.startswith("I will use the weather tool to find the weather in Berlin (52.5200, 13.4050)")
    assert response.tool_calls == (
        ToolCall("weather_5fdj252rgk1f", "weather", raw_arguments='{"latitude":"52.5200","longitude":"13.4050"}'),
        ToolCall("best_language_to_learn_qxep73hcps93", "best_language_to_learn", raw_arguments="{}"),
    )
    assert (response.finish_reason, response.id) == ("tool_call", "53fb2093-1922-4777-acc2-8f6335433e6f")
    assert response.usage == Usage(input_tokens=1568, output_tokens=132, cached_tokens=992)
    assert sent_back(response) == json.loads(recorded.body)["message"]


@pytest.mark.parametrize("name", ["50-", "51-", "53-"])
def test_recorded_requests_are_made_again(name: str) -> None:
    """The codec encodes the recorded calls as the recorded client did."""
    sent = load(name).request
    tools = [Tool(**each["function"]) for each in sent.get("tools", ())]
    effort = "high" if "thinking" in sent else None
    prompt = sent["messages"][0]["content"][0]["text"]
    assert sent == body_of(
        stream=sent["stream"], model=sent["model"], messages=prompt, tools=tools, reasoning_effort=effort
    )


def test_chunks_are_pieces_of_the_answer() -> None:
    """Each chunk has output; the id comes with the first, the finish reason and the usage with the last."""
    events = [start(), *block("thinking", "Hm", "."), *block("text", "Four", " o'clock", index=1), end()]
    chunks = list(chunks_of(CODEC, [sse(*events)]))
    assert [(chunk.reasoning, chunk.text) for chunk in chunks] == [
        ("Hm", ""),
        (".", ""),
        ("", "Four"),
        ("", " o'clock"),
        ("", ""),
    ]
    assert [chunk.id for chunk in chunks] == ["id_1", None, None, None, None]
    assert (chunks[-1].finish_reason, chunks[-1].usage) == (
        "stop",
        Usage(input_tokens=500, output_tokens=9, cached_tokens=480),
    )


@pytest.mark.parametrize("tail", [b"", b"data: [DONE]\n\n", b": bye\n\n"])
def test_the_end_of_a_stream(tail: bytes) -> None:
    """message-end is the end, with or without [DONE]."""
    assert streamed(CODEC, sse(start(), *block("text", "Hi"), end()) + tail).text == "Hi"


def test_a_bare_end() -> None:
    """An end that says nothing makes no chunk."""
    events = [start(), *block("text", "Four"), {"type": "message-end"}]
    assert [chunk.text for chunk in chunks_of(CODEC, [sse(*events)])] == ["Four"]


def test_bare_events() -> None:
    """Servers may leave out the names of the events, the indexes, and the starts of blocks."""
    chart = {"type": "chart", "note": "up"}
    events = [
        {"type": "message-start", "id": "id_1"},
        {"type": "content-start", "delta": {"message": {"content": chart}}},
        {"type": "content-end"},
        {"type": "content-delta", "delta": {"message": {"content": {"thinking": "Hm."}}}},
        {"type": "content-delta", "delta": {"message": {"content": {"type": "text", "text": "Hi"}}}},
        {"type": "tool-call-start", "delta": {"message": {"tool_calls": called("a", "now", "{}")}}},
        {"type": "tool-call-start", "delta": {"message": {"tool_calls": [called("b", "tide", "")]}}},
        {"type": "tool-call-delta", "delta": {"message": {"tool_calls": {"function": {"arguments": '{"x": 1}'}}}}},
        {"type": "message-end"},
    ]
    body = b"".join(b"data:" + json.dumps(each).encode() + b"\n\n" for each in events)
    response = recut(CODEC, body)
    assert (response.reasoning, response.text, response.finish_reason) == ("Hm.", "Hi", None)
    assert response.opaque == (Opaque("cohere", chart),)
    assert response.tool_calls == (ToolCall("a", "now"), ToolCall("b", "tide", {"x": 1}))


def test_a_call_that_goes_on_under_another_number() -> None:
    """A fragment with a new number but no id belongs to the call before."""
    begun, piece, done = call("a", "tide", '{"x": 1}')
    response = streamed(CODEC, sse(start(), begun, {**piece, "index": 3}, done, end("TOOL_CALL")))
    assert response.tool_calls == (ToolCall("a", "tide", {"x": 1}),)


def test_ignored_events() -> None:
    """Unknown events, comments, and events with other data than an object are ignored."""
    body = b": ping\n\n" + sse(
        start(),
        {"type": "debug", "prompt": "<|START|>", "message": "rendered"},
        {"type": "brand-new-event", "delta": {"message": {"content": {"text": "no"}}}},
        "null",
        "[]",
        *block("text", "Hi"),
        {"type": "citation-end", "index": 0},
        end(),
    )
    response = streamed(CODEC, body)
    assert (response.text, response.finish_reason, "citations" in response.details) == ("Hi", "stop", False)


@pytest.mark.parametrize("kept", [0, 1, 3, 6, -1])
@pytest.mark.parametrize("done", [False, True])
def test_truncated_stream(kept: int, done: bool) -> None:
    """A stream without message-end was cut off, wherever it ends, also with [DONE]."""
    events = [start(), *plan("I plan."), *block("text", "one ", "two"), end()][:kept]
    partial, error = interrupted(CODEC, sse(*events, done=done))
    assert isinstance(error, StreamProtocolError)
    assert "message-end" in str(error)
    assert "one two".startswith(partial.text)


def test_tool_call_cut_off_by_the_length_limit() -> None:
    """A truncated tool call reports that its arguments are broken."""
    response = streamed(CODEC, sse(start(), *call("a", "now", '{"ci')[:-1], end("MAX_TOKENS")))
    (made,) = response.tool_calls
    assert (response.finish_reason, made.raw_arguments) == ("length", '{"ci')
    assert made.error is not None


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize(
    ("reported", "kind", "said"),
    [
        ({"message": "internal server error, this has been reported", "id": "e"}, ServerError, "internal server error"),
        (
            {"message": "too many tokens: size limit exceeded", "error_type": "TOO_MANY_TOKENS"},
            ContextLengthExceeded,
            "",
        ),
        ({"message": "limited to 1000 API calls / month"}, QuotaExceeded, ""),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, Overloaded, "busy"),
        ({"type": "proxy", "error": {"code": 503, "message": "busy"}}, Overloaded, "busy"),
        (
            {"type": "message-end", "delta": {"finish_reason": "ERROR", "error": "worker died"}},
            ServerError,
            "worker died",
        ),
        (
            {"type": "message-end", "delta": {"finish_reason": "ERROR", "error": "too many tokens: TOO_MANY_TOKENS"}},
            ContextLengthExceeded,
            "",
        ),
        ({"type": "message-end", "delta": {"error": {"code": 503, "message": "busy"}}}, Overloaded, "busy"),
    ],
)
def test_error_in_a_stream(before: int, reported: dict[str, Any], kind: type[ProviderError], said: str) -> None:
    """An error is raised, in the middle of a stream or as its only event; earlier output is kept."""
    events = [start(), *block("text", "one ", "two")][:before]
    partial, raised = interrupted(CODEC, sse(*events, reported))
    assert type(raised) is kind
    assert said in str(raised)
    assert partial.text == ("one " if before == 3 else "")


def test_error_event_of_a_gateway() -> None:
    """An event that is named `error` is one, whatever its data."""
    partial, raised = interrupted(
        CODEC, sse(start(), *block("text", "one")) + b"event: error\ndata: upstream is gone\n\n"
    )
    assert (partial.text, type(raised)) == ("one", ServerError)
    assert "upstream is gone" in str(raised)


def test_the_law_of_whole_answers() -> None:
    """Streams cut anywhere give the same response, and streams that end anywhere too early give an error."""
    check_codec(CODEC, [load("50-").body])


def test_the_law_of_whole_answers_for_every_part() -> None:
    """The law holds for a stream with every kind of part."""
    check_codec(CODEC, [sse(*stream_of(FULL, "TOOL_CALL"))])


# Errors


@pytest.mark.parametrize(
    ("status", "message", "kind", "retryable"),
    [
        (400, "invalid request: message must be at least 1 token long", BadRequest, False),
        (400, "too many tokens: total number of tokens in the prompt cannot exceed 4081", ContextLengthExceeded, False),
        (400, "system turn must be the first in the list", BadRequest, False),
        (401, "invalid api token", AuthenticationError, False),
        (402, "Maximum billing reached for this API key as set in your dashboard", QuotaExceeded, False),
        (403, "no", PermissionDenied, False),
        (404, "model 'xyz' not found, make sure the correct model ID was used", NotFound, False),
        (422, "unsupported tool_choice", BadRequest, False),
        (429, "You are using a Trial key, which is limited to 20 API calls / minute.", RateLimitError, True),
        (429, "You are using a Trial key, which is limited to 1000 API calls / month.", QuotaExceeded, False),
        (429, "trial token rate limit exceeded, limit is 100000 tokens per minute", RateLimitError, True),
        (429, "Please wait and try again later", RateLimitError, True),
        (498, "blocked input", ContentFiltered, False),
        (499, "request cancelled", ServerError, True),
        (500, "internal server error", ServerError, True),
        (501, "not implemented", BadRequest, False),
        (503, "service unavailable", Overloaded, True),
        (504, "gateway timeout", RequestTimeout, True),
    ],
)
def test_errors(status: int, message: str, kind: type[ProviderError], retryable: bool) -> None:
    """Each error of the service becomes its error class, and those that a retry may mend are retryable."""
    body = json.dumps({"id": "e1", "message": message}).encode()
    raised = CODEC.decode_error(status, {"retry-after": "7"}, body)
    assert type(raised) is kind
    assert (raised.status, raised.retryable, raised.retry_after) == (status, retryable, 7.0)
    assert message.rstrip(".") in str(raised)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("size limit exceeded by 11326 tokens.", ContextLengthExceeded),
        ("too many tokens: size limit exceeded by 11326 tokens.", ContextLengthExceeded),
        (
            "too many tokens: max tokens must be less than or equal to 4096, the maximum output for this model - received 8192.",
            BadRequest,
        ),
    ],
)
def test_too_many_tokens(message: str, kind: type[ProviderError]) -> None:
    """The code of a prompt that is too long is that of max_tokens that are too many, too."""
    body = {"error_type": "TOO_MANY_TOKENS", "message": message, "id": "e"}
    assert type(CODEC.decode_error(400, {}, json.dumps(body).encode())) is kind


def test_recorded_context_length() -> None:
    """The recorded 400 is about the context, and not worth a retry."""
    recorded = load("52-")
    raised = CODEC.decode_error(recorded.status, recorded.headers, recorded.body)
    assert type(raised) is ContextLengthExceeded
    assert "size limit exceeded by 25836 tokens" in str(raised)
    assert (raised.status, raised.retryable) == (400, False)


@pytest.mark.parametrize("body", [b"", b"Bad Gateway", b"<html><title>502</title></html>", b"[1]", b"null"])
def test_errors_in_no_known_shape(body: bytes) -> None:
    """The status decides the class, whatever body a proxy sends."""
    assert type(CODEC.decode_error(502, {}, body)) is ServerError


# Answers that go back


def sent_back(response: Response) -> dict[str, Any] | None:
    """Return the message that the next request has for an answer, and check that storing it changes nothing."""
    stored = Message.from_dict(json.loads(json.dumps(response.message.to_dict())))
    assert stored == response.message
    first, second = (messages_of(Message.user("x"), each, Message.user("y")) for each in (response.message, stored))
    assert first == second
    return first[1] if len(first) == 3 else None


def came(message: dict[str, Any]) -> dict[str, Any] | None:
    """Return a message without its empty fields; None if there is nothing but citations."""
    said = {name: value for name, value in message.items() if value}
    return {"role": "assistant", **said} if said.keys() - {"citations"} else None


def numbered(calls: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**each, "id": f"{each['id']}_{n}"} for n, each in enumerate(calls)]


texts = st.sampled_from(["Four.", "o'clock é", "So.\n"]).map(text)
thoughts = st.sampled_from(["Hm.", "Well, "]).map(thought)
planned = st.sampled_from(["", "I plan."])
citations = st.lists(st.just(PLANNED), max_size=2)
answers = st.fixed_dictionaries(
    {
        "content": st.lists(st.one_of(texts, thoughts, st.just(STRANGE)), max_size=5),
        "tool_plan": planned,
        "tool_calls": st.just([]),
        "citations": citations,
    }
)
with_calls = st.fixed_dictionaries(
    {
        "content": st.lists(st.one_of(thoughts, st.just(STRANGE)), max_size=3),
        "tool_plan": planned,
        "tool_calls": st.lists(st.sampled_from(FULL["tool_calls"]), min_size=1, max_size=3).map(numbered),
        "citations": citations,
    }
)


@given(st.one_of(answers, with_calls))
def test_answers_go_back(message: dict[str, Any]) -> None:
    """A whole answer goes back as it came, and a streamed one has the same parts, details and message."""
    at_once = CODEC.decode(whole(**message))
    assert sent_back(at_once) == came(message)
    stream = streamed(CODEC, sse(*stream_of(message)))
    assert stream == at_once
    assert (stream.parts, stream.details) == (at_once.parts, at_once.details)


def test_empty_blocks() -> None:
    """Blocks without text are no parts, and the texts beside them stay apart, in both modes."""
    content = [text(""), text("a"), thought(""), text("b"), text(""), text("c"), {}]
    events = [each for n, part in enumerate(content[:-1]) for each in block(part["type"], part[part["type"]], index=n)]
    at_once = CODEC.decode(whole(content=content))
    assert at_once.parts == (Text("a"), Text("b"), Text("c"))
    assert streamed(CODEC, sse(start(), *events, end())).parts == at_once.parts


def test_log_probabilities() -> None:
    """Log probabilities are details, whole and streamed alike."""
    events = [start(), *block("text", "Four", "."), end()]
    items = [SURE, {**SURE, "text": "."}]
    for delta, item in zip(events[2:4], items, strict=True):
        delta["logprobs"] = item
    at_once = json.dumps(json.loads(whole(content=[text("Four.")])) | {"logprobs": items}).encode()
    assert CODEC.decode(at_once).details["logprobs"] == items
    assert streamed(CODEC, sse(*events)).details == CODEC.decode(at_once).details


# The official client reads the same bytes, and makes the same requests


def client(address: str) -> Any:
    """Return the official client. The server has no certificate, and reading the authorities' takes a while."""
    cohere = pytest.importorskip("cohere")
    return cohere.ClientV2(api_key="k", base_url=address, httpx_client=httpx.Client(verify=False))  # noqa: S501


HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
AT_ONCE = {"full": lambda: whole("TOOL_CALL", **FULL), "51": lambda: load("51-").body, "53": lambda: load("53-").body}


@pytest.mark.parametrize("name", AT_ONCE)
def test_the_official_client_agrees_about_whole_answers(name: str) -> None:
    """The `cohere` package reads the same text, thinking, plan, tool calls, citations, usage and finish reason."""
    body = AT_ONCE[name]()
    with serving(body, "application/json") as address, client(address) as theirs:
        answer = theirs.chat(model="m", messages=HELLO)
    ours, message = CODEC.decode(body), answer.message
    blocks = [
        each for each in message.content or () if not isinstance(each, dict)
    ]  # it leaves unknown ones as they are
    assert ours.text == "".join(each.text for each in blocks if each.type == "text")
    thinking = "".join(each.thinking for each in blocks if each.type == "thinking")
    assert ours.reasoning == thinking + (message.tool_plan or "")
    assert [(made.id, made.name, made.raw_arguments) for made in ours.tool_calls] == [
        (made.id, made.function.name, made.function.arguments) for made in message.tool_calls or ()
    ]
    cited = [each.dict(exclude_none=True) for each in message.citations or ()]
    assert ours.details.get("citations", []) == cited
    assert_same_end(ours, answer.id, answer.finish_reason, answer.usage)


STREAMS = {"full": lambda: sse(*stream_of(FULL, "TOOL_CALL")), "50": lambda: load("50-").body}


@pytest.mark.parametrize("name", STREAMS)
def test_the_official_client_agrees_about_streams(name: str) -> None:
    """The `cohere` package reads the same text, thinking, plan, tool calls, citations, usage and finish reason."""
    body = STREAMS[name]()
    with serving(body, "text/event-stream") as address, client(address) as theirs:
        events = list(theirs.chat_stream(model="m", messages=HELLO))
    ours = streamed(CODEC, body)
    contents = [each.delta.message.content for each in events if each.type == "content-delta"]
    assert ours.text == "".join(each.text or "" for each in contents)
    thinking = "".join(each.thinking or "" for each in contents)
    plans = "".join(each.delta.message.tool_plan for each in events if each.type == "tool-plan-delta")
    assert ours.reasoning == thinking + plans
    begun = [each.delta.message.tool_calls for each in events if each.type == "tool-call-start"]
    assert [(made.id, made.name) for made in ours.tool_calls] == [(made.id, made.function.name) for made in begun]
    pieces = [each.delta.message.tool_calls.function for each in events if each.type == "tool-call-delta"]
    assert "".join(made.raw_arguments for made in ours.tool_calls) == "".join(each.arguments for each in pieces)
    cited = [each.delta.message.citations for each in events if each.type == "citation-start"]
    assert ours.details.get("citations", []) == [each.dict(exclude_none=True) for each in cited]
    assert_same_end(ours, events[0].id, events[-1].delta.finish_reason, events[-1].delta.usage)


def assert_same_end(ours: Response, their_id: str, reason: str, usage: Any) -> None:
    assert (ours.id, ours.raw_finish_reason) == (their_id, reason)
    assert ours.usage == Usage(
        input_tokens=usage.tokens.input_tokens,
        output_tokens=usage.tokens.output_tokens,
        cached_tokens=usage.cached_tokens,
    )
    assert ours.details["billed_units"] == usage.billed_units.dict(exclude_none=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_official_client_sends_the_same_request(streaming: bool) -> None:
    """The official client makes the same body of the same conversation, with every parameter."""
    tool = {"name": "weather", "description": WEATHER.description, "parameters": dict(WEATHER.parameters)}
    picture = {"type": "image_url", "image_url": {"url": "https://x.test/a.png", "detail": "low"}}
    note = {"type": "document", "document": {"data": {"text": "Höchststand um vier.", "title": "tides.md"}}}
    before = [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [text("Tide here?"), picture]},
    ]
    results = [
        {"role": "tool", "tool_call_id": "tide_1", "content": "four"},
        {"role": "tool", "tool_call_id": "now_2", "content": [note]},
    ]
    answer = whole("TOOL_CALL", **{**FULL, "content": [thought("Hm.")]})
    with serving(answer, "application/json") as address, client(address) as theirs:
        message = theirs.chat(model="m", messages=HELLO).message
    kind, reply = ("text/event-stream", sse(end())) if streaming else ("application/json", answer)
    with answering(kind, reply) as (address, asked), client(address) as theirs:
        ask = theirs.chat_stream if streaming else theirs.chat
        read = ask(
            model="m",
            messages=[*before, message, *results],
            tools=[{"type": "function", "function": tool}],
            strict_tools=True,
            response_format={"type": "json_object", "json_schema": {"type": "object"}},
            max_tokens=7,
            stop_sequences=["END"],
            temperature=0.5,
            seed=3,
            frequency_penalty=0.1,
            presence_penalty=0.2,
            k=40,
            p=0.9,
            tool_choice="REQUIRED",
            thinking={"type": "enabled", "token_budget": 8192},
        )
        if streaming:
            list(read)
    ours = CODEC.decode(answer)
    tide, now = ours.tool_calls
    assert asked == [
        (
            "/v2/chat",
            body_of(
                stream=streaming,
                model="m",
                messages=[
                    Message.system("Be brief."),
                    Message.user(["Tide here?", Image(url="https://x.test/a.png", detail="low")]),
                    ours.message,
                    Message.tool("four", tide),
                    Message.tool(NOTE, now),
                ],
                **PARAMETERS,
                tools=[Tool(**tool, strict=True)],
                response_format={"type": "object"},
                stop="END",
                tool_choice="weather",
                reasoning_effort="medium",
            ),
        )
    ]
