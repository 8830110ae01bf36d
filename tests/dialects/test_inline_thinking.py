"""Inline reasoning, which a model writes into its answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st
from support.dialects import recut, sse

from fluxibly import LLMConfig
from fluxibly._inline_thinking import LEADING, InlineThinking
from fluxibly.errors import ConfigError
from fluxibly.providers.dialects.codec import Event
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_request import Quirks
from fluxibly.providers.openai import codec_of
from fluxibly.providers.services import OWN_SERVER, SERVICES
from fluxibly.types import Message, Request, Tool

END: dict[str, Any] = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def parted(pieces: list[str], *, opened: bool = False) -> tuple[str, str]:
    """Return the text and the reasoning of the pieces."""
    inline = InlineThinking(opened=opened)
    said = [*map(inline.split, pieces), inline.rest()]
    return "".join(text for text, _ in said), "".join(thought for _, thought in said)


@pytest.mark.parametrize(
    ("whole", "text", "thought"),
    [
        ("<think>Hm.</think>Paris.", "Paris.", "Hm."),
        ("\n<think>\nHm.\n</think>\n\nParis.", "Paris.", "Hm.\n"),
        ("<think></think>Paris.", "Paris.", ""),
        ("<think>\n\n</think>\n\nParis.", "Paris.", ""),
        ("<think>cut", "", "cut"),
        ("<think>cut</thi", "", "cut</thi"),
        ("<think>a</b></think>c", "c", "a</b>"),
        ("Paris.", "Paris.", ""),
        ("  Paris. ", "  Paris. ", ""),
        ("<thin", "<thin", ""),
        ("<thinking>", "<thinking>", ""),
        ("a <think>b</think>", "a <think>b</think>", ""),
        ("<think>a</think>b <think>c</think>", "b <think>c</think>", "a"),
        ("", "", ""),
        ("   ", "   ", ""),
        (" " * (LEADING + 1) + "<think>a", " " * (LEADING + 1) + "<think>a", ""),
        ("Hm.</think>Paris.", "Hm.</think>Paris.", ""),
    ],
)
def test_only_what_begins_an_answer_is_reasoning(whole: str, text: str, thought: str) -> None:
    """Only tags at the beginning mark reasoning, whether text arrives whole or character by character."""
    assert parted([whole]) == (text, thought)
    assert parted(list(whole)) == (text, thought)


@pytest.mark.parametrize(
    ("whole", "text", "thought"),
    [
        ("Hm.</think>Paris.", "Paris.", "Hm."),
        ("\nHm.\n</think>\n\nParis.", "Paris.", "Hm.\n"),
        ("<think>\nHm.</think>Paris.", "Paris.", "Hm."),
        ("</think>Paris.", "Paris.", ""),
        ("\n\n</think>\n\nParis.", "Paris.", ""),
        ("a <think> b</think>c </think>d", "c </think>d", "a <think> b"),
        ("<thin", "", "<thin"),
        ("<thinking>", "", "<thinking>"),
        ("cut", "", "cut"),
        ("cut</thi", "", "cut</thi"),
        ("", "", ""),
        ("  ", "  ", ""),
        (" " * (LEADING + 1) + "Hm.</think>a", "a", "Hm."),
    ],
)
def test_reasoning_that_the_prompt_has_opened(whole: str, text: str, thought: str) -> None:
    """If the prompt ends with the opening tag, all is reasoning up to the closing one."""
    assert parted([whole], opened=True) == (text, thought)
    assert parted(list(whole), opened=True) == (text, thought)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think>", "a", " ", "\n"])), st.data(), st.booleans())
def test_indifferent_to_cuts(tokens: list[str], data: st.DataObject, opened: bool) -> None:
    """Text cut anywhere gives the same result."""
    whole = "".join(tokens)[:LEADING]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert parted(pieces, opened=opened) == parted([whole], opened=opened)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think>", "a", " ", "\n"])), st.data())
def test_nothing_is_lost(tokens: list[str], data: st.DataObject) -> None:
    """The markup is all that was taken out of the text, however it is cut, and empty if no tag opened."""
    whole = "".join(tokens)[:LEADING]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    inline = InlineThinking()
    said = [inline.split(whole[start:end])[0] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    text = "".join([*said, inline.rest()[0]])
    assert inline.markup + text == whole
    begun = whole.lstrip()
    assert bool(inline.markup) == (begun.startswith("<think>") and begun != "<think>")


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think>", "a", " ", "\n"])))
def test_nothing_is_lost_of_what_the_prompt_has_opened(tokens: list[str]) -> None:
    """The markup and the text are all that came, also if the prompt has opened the reasoning."""
    inline = InlineThinking(opened=True)
    said = [inline.split(token)[0] for token in tokens]
    text = "".join([*said, inline.rest()[0]])
    assert inline.markup + text == "".join(tokens)


def test_something_else_interrupts() -> None:
    """Held text is let go before a tool call, and what comes later is text, unless reasoning is open."""
    inline = InlineThinking()
    assert inline.interrupt() == ""
    assert inline.split("\n<thi") == ("", "")
    assert (inline.interrupt(), inline.over, inline.markup) == ("\n<thi", True, "")
    assert inline.split("nk>a") == ("nk>a", "")
    inline = InlineThinking()
    assert inline.split("<think>a") == ("", "a")
    assert (inline.interrupt(), inline.over) == ("", False)
    assert inline.split("b</think>c") == ("c", "b")


def openai_answer(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()


def openai_event(text: str, reason: str | None = None) -> Event:
    return Event(json.dumps({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}).encode())


def ollama_line(text: str, done: bool = False) -> bytes:
    return json.dumps({"message": {"role": "assistant", "content": text}, "done": done}).encode()


def test_whole_answers() -> None:
    """Whole responses of both dialects are split."""
    for response in (
        OpenAICodec().decode(openai_answer("<think>Hm.</think>Paris.")),
        OllamaCodec().decode(ollama_line("<think>Hm.</think>Paris.", done=True)),
    ):
        assert (response.text, response.reasoning) == ("Paris.", "Hm.")


@pytest.mark.parametrize(
    ("said", "text", "thought"),
    [
        ("Hm.</think>\n\nParis.", "Paris.", "Hm."),
        ("<think>Hm.</think>Paris.", "Paris.", "Hm."),
        ("</think>Paris.", "Paris.", ""),
        ("Hm, cut", "", "Hm, cut"),
    ],
)
def test_a_template_that_opens_the_reasoning(said: str, text: str, thought: str) -> None:
    """With the quirk `thinks_first`, an answer begins with reasoning, whole and streamed, in each choice.

    Without it, what comes before a closing tag alone is out before the tag is seen: it stays text, in all modes.
    """
    for codec, expected in ((OpenAICodec(Quirks(thinks_first=True)), (text, thought)), (OpenAICodec(), None)):
        whole = codec.decode(openai_answer(said))
        assert (whole.text, whole.reasoning) == (expected or parted([said]))
        streamed = recut(codec, sse(*(json.loads(openai_event(letter).data) for letter in said), END))
        assert (streamed.text, streamed.reasoning, streamed.parts) == (whole.text, whole.reasoning, whole.parts)
        choices = [{"index": index, "message": {"content": said}, "finish_reason": "stop"} for index in (0, 1)]
        (other,) = codec.decode(json.dumps({"choices": choices}).encode()).alternatives
        deltas = [{"index": index, "delta": {"content": said}, "finish_reason": "stop"} for index in (0, 1)]
        (streamed_other,) = recut(codec, sse({"choices": deltas})).alternatives
        assert (
            (streamed_other.text, streamed_other.reasoning)
            == (other.text, other.reasoning)
            == (
                whole.text,
                whole.reasoning,
            )
        )


def test_a_tool_call_after_reasoning_that_the_prompt_has_opened() -> None:
    """In a conversation with tools, the reasoning goes back as the model wrote it, without the tag of the template."""
    codec = OpenAICodec(Quirks(thinks_first=True, **OWN_SERVER))
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    message = {"role": "assistant", "content": "Hm.\n</think>\n\n", "tool_calls": [call]}
    whole = codec.decode(
        json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}).encode()
    )
    assert (whole.text, whole.reasoning, whole.finish_reason) == ("", "Hm.\n", "tool_call")
    request = Request(
        model="m",
        messages=[Message.user("x"), whole.message, Message.tool("12:00", whole.tool_calls[0])],
        tools=[Tool("now")],
    )
    assert json.loads(codec.encode(request, stream=False).body)["messages"][1]["content"] == message["content"]


def test_the_quirk_in_a_configuration() -> None:
    """A user says of the own server that its template opens the reasoning."""
    config = LLMConfig(framework="vllm", model="m", quirks={"thinks_first": True})
    codec = codec_of(SERVICES["vllm"], config)
    assert codec.decode(openai_answer("Hm.</think>Paris.")).text == "Paris."
    with pytest.raises(ConfigError, match="thinks_first: expected"):
        LLMConfig(framework="vllm", model="m", quirks={"thinks_first": "yes"})


@pytest.mark.parametrize("end", ["Paris.", "<", ""])
def test_streams(end: str) -> None:
    """Text that could have become a tag is not lost at the end of a stream."""
    openai, ollama = OpenAICodec().decoder(), OllamaCodec().decoder()
    chunks_of = [
        [*openai.decode_event(openai_event("<thi")), *openai.decode_event(openai_event("nk>Hm.</think>\n"))],
        [
            *ollama.decode_event(Event(ollama_line("<thi"))),
            *ollama.decode_event(Event(ollama_line("nk>Hm.</think>\n"))),
        ],
    ]
    chunks_of[0] += [*openai.decode_event(openai_event(end, "stop")), *openai.end()]
    chunks_of[1] += [*ollama.decode_event(Event(ollama_line(end, done=True))), *ollama.end()]
    for chunks in chunks_of:
        assert ("".join(c.text for c in chunks), "".join(c.reasoning for c in chunks)) == (end, "Hm.")
        assert chunks[-1].finish_reason == "stop"


def test_an_answer_of_a_piece_of_a_tag() -> None:
    """An answer that is only the beginning of a tag arrives at the end of the stream."""
    decoder = OpenAICodec().decoder()
    chunks = [*decoder.decode_event(openai_event("<", "stop")), *decoder.end()]
    assert "".join(chunk.text for chunk in chunks) == "<"
