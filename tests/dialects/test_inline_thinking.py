"""Inline reasoning, which a model writes into its answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from fluxibly.providers.dialects.codec import Event
from fluxibly.providers.dialects.decoding import LEADING, InlineThinking
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.providers.dialects.openai_chat import OpenAICodec


def parted(pieces: list[str]) -> tuple[str, str]:
    """Return the text and the reasoning of the pieces."""
    inline = InlineThinking()
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
    ],
)
def test_only_what_begins_an_answer_is_reasoning(whole: str, text: str, thought: str) -> None:
    """Only tags at the beginning mark reasoning, whether text arrives whole or character by character."""
    assert parted([whole]) == (text, thought)
    assert parted(list(whole)) == (text, thought)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think>", "a", " ", "\n"])), st.data())
def test_indifferent_to_cuts(tokens: list[str], data: st.DataObject) -> None:
    """Text cut anywhere gives the same result."""
    whole = "".join(tokens)[:LEADING]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert parted(pieces) == parted([whole])


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
