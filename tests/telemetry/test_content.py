"""The content of calls in spans and events: when it is captured, and how it is redacted."""

from __future__ import annotations

import json
import re

import pytest
from support.tracing_tools import ANSWER, CHAT, REQUEST, TOOL, Remote, everything, modes, remote

from fluxibly.errors import Overloaded, ProviderError
from fluxibly.middleware import Tracing
from fluxibly.pipeline import Pipeline
from fluxibly.testing.modes import run
from fluxibly.types import (
    Audio,
    Chunk,
    Image,
    Message,
    Opaque,
    Reasoning,
    Request,
    Response,
    Text,
    Tool,
    ToolCall,
)

pytestmark = pytest.mark.usefixtures("no_complaints")


# Content


CONVERSATION = Request(
    model="m-1",
    messages=[
        *CHAT,
        Message.assistant("Let me look.", tool_calls=[ToolCall("c1", "look", {"word": "life"})]),
        Message.tool("42", "c1", name="look"),
        Message.user(["And this?", Image(url="https://x.test/a.png"), Image(data=b"ab", media_type="image/png")]),
    ],
    tools=[TOOL],
)
INPUT = [
    {"role": "user", "parts": [{"type": "text", "content": "What is the meaning of life?"}]},
    {
        "role": "assistant",
        "parts": [
            {"type": "text", "content": "Let me look."},
            {"type": "tool_call", "id": "c1", "name": "look", "arguments": {"word": "life"}},
        ],
    },
    {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "42"}], "name": "look"},
    {
        "role": "user",
        "parts": [
            {"type": "text", "content": "And this?"},
            {"type": "uri", "modality": "image", "mime_type": None, "uri": "https://x.test/a.png"},
            {"type": "blob", "modality": "image", "mime_type": "image/png", "content": "YWI="},
        ],
    },
]
OUTPUT = [{"role": "assistant", "parts": [{"type": "text", "content": "forty two"}], "finish_reason": "stop"}]
CONTENT = {
    "gen_ai.system_instructions": [{"type": "text", "content": "Be terse."}],
    "gen_ai.input.messages": INPUT,
    "gen_ai.output.messages": OUTPUT,
    "gen_ai.tool.definitions": [
        {"type": "function", "name": "look", "description": "Looks things up", "parameters": TOOL.parameters}
    ],
}


@modes
@pytest.mark.parametrize("capture", ["none", "span", "event", "both"])
def test_content_goes_where_the_user_wants_it(mode, capture, recorder):
    """Spans have JSON strings, and the event has structured values. By default, content is recorded nowhere."""
    run(mode, remote(mode, ANSWER), [recorder.tracing(capture=capture)], CONVERSATION)
    on_span = {key: json.loads(recorder.call.attributes[key]) for key in CONTENT if key in recorder.call.attributes}
    assert on_span == (CONTENT if capture in ("span", "both") else {})
    if capture in ("none", "span"):
        assert recorder.events == []
    else:
        (event,) = recorder.events
        assert event.event_name == "gen_ai.client.inference.operation.details"
        assert event.span_id == recorder.call.context.span_id
        for key, value in CONTENT.items():
            assert json.loads(json.dumps(event.attributes[key], default=dict)) == value
        assert event.attributes["gen_ai.request.model"] == "m-1"
        assert event.attributes["gen_ai.usage.output_tokens"] == 2
    if capture in ("none", "event"):
        assert "meaning" not in everything(recorder.spans)
        assert "forty" not in everything(recorder.spans)


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        *(("NO_CONTENT", "none"), ("SPAN_ONLY", "span"), ("event_only", "event"), ("SPAN_AND_EVENT", "both")),
        *(("", "none"), (" ", "none"), (" span_only\n", "span")),
    ],
)
def test_the_standard_variable_decides_too(value, mode, monkeypatch, recorder):
    """The variable sets the default, and the parameter overrides it."""
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", value)
    Pipeline(Remote(ANSWER), [recorder.tracing()]).complete(REQUEST)
    assert ("gen_ai.input.messages" in recorder.call.attributes) == (mode in ("span", "both"))
    assert len(recorder.events) == (mode in ("event", "both"))
    recorder.exporter.clear()
    Pipeline(Remote(ANSWER), [recorder.tracing(capture="none")]).complete(REQUEST)
    assert "gen_ai.input.messages" not in recorder.call.attributes


def test_a_bad_value_of_the_variable_is_reported_once_and_captures_nothing(monkeypatch, capsys, recorder):
    """A bad value is not taken for consent."""
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    for _ in range(2):
        Pipeline(Remote(ANSWER), [recorder.tracing()]).complete(REQUEST)
    assert "meaning" not in everything(recorder.spans)
    assert (
        capsys.readouterr().err.count("expected one of NO_CONTENT, SPAN_ONLY, EVENT_ONLY, SPAN_AND_EVENT, got 'true'")
        == 1
    )


def test_a_bad_parameter_is_an_error():
    """The error names the valid values."""
    with pytest.raises(ValueError, match="expected one of 'none', 'span', 'event', 'both', got 'all'"):
        Tracing(capture="all")


def test_redact_sees_every_text(recorder):
    """`redact` gets messages, tool arguments, images and error messages. Only its results are recorded."""
    seen = []

    def redact(text):
        seen.append(text)
        return "x"

    stack = [recorder.tracing(capture="both", redact=redact)]
    Pipeline(Remote(ANSWER), stack).complete(CONVERSATION)
    assert {"Be terse.", "Let me look.", "life", "42", "And this?", "YWI=", "forty two", "Looks things up"} <= {*seen}
    named = Request(model="m-1", messages=[Message("user", "Hi", name="Jo Bloggs")])
    Pipeline(Remote(ANSWER), stack).complete(named)
    exported = everything(recorder.spans) + str([event.attributes for event in recorder.events])
    assert not [text for text in ("terse", "Let me", "YWI", "forty", "Bloggs") if text in exported]
    with pytest.raises(ProviderError):
        Pipeline(Remote(ProviderError("secret words")), stack).complete(CONVERSATION)
    assert "secret words" not in everything(recorder.spans)


EVERYWHERE = Request(
    model="m-1",
    messages=[
        Message.system("SECRET 1"),
        Message.user(
            [
                Image(url="https://x.test/SECRET2.png"),
                Image(url="data:image/png;base64,SECRET3+"),
                Audio(data=b"\x48\x40\x91\x11\x30\x54", media_type="audio/wav"),  # SECRETBU in base64
            ]
        ),
        Message.assistant(
            [Reasoning(text="SECRET 5"), Text("SECRET 6"), Opaque("anthropic", {"SECRET 7": ["SECRET 8"]})],
            tool_calls=[
                ToolCall("c1", "look", raw_arguments='{"who": "SECRET 9'),
                ToolCall("c2", "look", {"SECRET 10": "SECRET 11"}),
            ],
        ),
        Message("tool", ["SECRET 12", Image(url="https://x.test/SECRET13.png")], tool_call_id="c1"),
        Message("user", "SECRET 14", name="SECRET 15"),
        Message.system("SECRET 16"),
    ],
    tools=[Tool("look", "SECRET 17", {"type": "object", "examples": ("SECRET 18", {"who": "SECRET 19"})})],
)


@modes
@pytest.mark.parametrize("fails", [False, True])
def test_redact_sees_every_text_wherever_it_is(mode, fails, recorder):
    """Of no part of a call, its answer and its error a text is recorded that `redact` has not seen."""
    answer = Response(
        "SECRET 20",
        reasoning="SECRET 21",
        tool_calls=[ToolCall("c3", "look", {"a": ["SECRET 22"]})],
        alternatives=() if mode.streaming else [Response("SECRET 23")],
    )
    script = [Chunk("SECRET 24"), ProviderError("SECRET 25")] if mode.streaming else ProviderError("SECRET 25")
    seen = []

    def redact(text):
        seen.append(text)
        return text.replace("SECRET", "...")

    run(mode, remote(mode, script if fails else answer), [recorder.tracing(capture="both", redact=redact)], EVERYWHERE)
    (event,) = recorder.events
    recorded = everything(recorder.spans) + str(event.attributes)
    assert "SECRET" not in recorded
    expected = {*range(1, 20)} - {4} | ({25} | ({24} if mode.streaming else set()) if fails else {20, 21, 22})
    found = {int(number) for text in seen for number in re.findall(r"SECRET ?(\d+)", text)}
    assert found == expected | (set() if fails or mode.streaming else {23})
    assert recorded.count("... 16") == 2


def test_the_system_messages_within_a_conversation_stay_in_it(recorder):
    """Only the system messages that open a conversation are instructions. A later one is part of the conversation."""
    messages = [Message.system("a"), Message.system("b"), Message.user("c"), Message.system("d"), Message.user("e")]
    Pipeline(Remote(ANSWER), [recorder.tracing(capture="span")]).complete(Request(model="m-1", messages=messages))
    texts = [part["content"] for part in json.loads(recorder.call.attributes["gen_ai.system_instructions"])]
    inputs = json.loads(recorder.call.attributes["gen_ai.input.messages"])
    assert texts == ["a", "b"]
    assert [(each["role"], each["parts"][0]["content"]) for each in inputs] == [
        ("user", "c"),
        ("system", "d"),
        ("user", "e"),
    ]


def test_what_redact_raises_is_not_shown(recorder, capsys):
    """The report names the exception's type. Its message may quote a text."""

    def redact(text):
        raise ValueError(text)

    Pipeline(Remote(ANSWER), [recorder.tracing(capture="both", redact=redact)]).complete(REQUEST)
    shown = capsys.readouterr().err
    assert "redact raised ValueError;" in shown
    assert "meaning" not in shown


@modes
def test_an_error_may_quote_a_prompt_that_a_middleware_replaced(mode, recorder):
    """The error of a layer that changed the prompt is masked, whichever of both prompts it quotes."""

    def anonymise(request, call_next):
        try:
            return (yield from call_next(request.evolve(messages="I am an anonymous person")))
        except Overloaded as error:
            raise ProviderError(f"{error}; of 'I am Jo Bloggs of Ghent'") from None

    tracing = recorder.tracing(attempts="always")
    asked = Request(model="m-1", messages="I am Jo Bloggs of Ghent")
    busy = Overloaded("full: 'I am an anonymous person'")
    run(mode, remote(mode, busy), [tracing, anonymise], asked)
    assert recorder.call.status.description == "full: '[…]'; of '[…]'"
    assert recorder.attempts[0].status.description == "full: '[…]'"


def test_content_is_what_was_sent(recorder):
    """A middleware that removes names from the prompt also removes them from the trace."""

    def anonymise(request, call_next):
        return (yield from call_next(request.evolve(messages="I am ***")))

    Pipeline(Remote(ANSWER), [recorder.tracing(capture="span"), anonymise]).complete(
        Request(model="m-1", messages="I am Jo")
    )
    assert "Jo" not in everything(recorder.spans)


def test_half_a_character_harms_nothing(recorder):
    """A model may produce half of a surrogate pair."""
    Pipeline(Remote(Response("a\ud800")), [recorder.tracing(capture="span")]).complete(REQUEST)
    assert json.loads(recorder.call.attributes["gen_ai.output.messages"])[0]["parts"][0]["content"] == "a\ud800"
