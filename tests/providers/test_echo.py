"""The framework `echo`."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from fluxibly import LLM, AsyncLLM, AsyncPipeline, LLMConfig, Message, Pipeline, Request
from fluxibly.errors import BadRequest
from fluxibly.messages import Tool
from fluxibly.parts import Image
from fluxibly.providers.echo import AsyncEchoProvider, EchoProvider

CONFIG = LLMConfig(framework="echo", model="parrot")


def test_the_last_user_message_comes_back() -> None:
    """The last user message comes back, whatever the other messages are; words count as tokens."""
    messages = [Message.user("one"), Message.assistant("two"), Message.user("three  four\n"), Message.system("five")]
    response = Pipeline(EchoProvider(CONFIG)).complete(Request(model="parrot", messages=messages))
    assert response.text == "three  four\n"
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (5, 2)
    assert (response.finish_reason, response.model) == ("stop", "parrot")


@pytest.mark.parametrize("text", ["one two  three\n\nfour ", "  leading", "\n \n", "x"])
def test_a_stream_comes_word_by_word_and_adds_up(text: str) -> None:
    """White space is kept everywhere."""
    with Pipeline(EchoProvider(CONFIG)).stream(Request(model="m", messages=text)) as stream:
        chunks = [chunk.text for chunk in stream]
    assert "".join(chunks) == text == stream.response.text
    assert len([chunk for chunk in chunks if chunk]) == max(len(text.split()), 1)


def test_max_tokens_cuts_after_so_many_words() -> None:
    """An answer cut at `max_tokens` has the finish reason "length"."""
    response = Pipeline(EchoProvider(CONFIG)).complete(Request(model="m", messages="a b c d", max_tokens=2))
    assert response.text == "a b "
    assert response.finish_reason == "length"


@pytest.mark.parametrize("stop", ["c", ["x", "c d", "d"], ["c d", "c"]])
def test_stop_ends_the_text(stop: str | list[str]) -> None:
    """The answer ends before the first stop sequence."""
    request = Request(model="m", messages="a b c d", stop=stop)  # type: ignore[arg-type]
    assert Pipeline(EchoProvider(CONFIG)).complete(request).text == "a b "


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"tools": [Tool("look")]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "n"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"extra": {"user": "me"}}, r"extra \(or additional_params\)"),
        (
            {"messages": [Message.user(["What is this?", Image(url="https://a.test/b.png")])]},
            "images, audio or files",
        ),
        ({"n": 2, "tools": [Tool("look")]}, "tools, n"),
    ],
)
def test_a_call_that_it_cannot_answer_is_refused(asked: dict[str, Any], named: str) -> None:
    """Nothing that a call asks for is silently left out; the error names it."""
    request = Request(**{"model": "m", "messages": "hi", **asked})
    for ask in (EchoProvider(CONFIG).complete, lambda request: list(EchoProvider(CONFIG).stream(request))):
        with pytest.raises(BadRequest, match=f"only repeats text: leave out {named} "):
            ask(request)


def test_sampling_and_empty_wishes_are_accepted() -> None:
    """Parameters of sampling change nothing, and neither does asking for what echo does anyway."""
    request = Request(
        model="m",
        messages="hi",
        temperature=0.5,
        top_p=0.5,
        top_k=3,
        seed=1,
        n=1,
        tool_choice="none",
        response_format={"type": "text"},
        reasoning_effort="none",
    )
    assert Pipeline(EchoProvider(CONFIG)).complete(request).text == "hi"


def test_without_a_user_message_the_answer_is_empty() -> None:
    """An empty answer is still a complete response."""
    response = Pipeline(EchoProvider(CONFIG)).complete(Request(model="m", messages=[Message.system("be brief")]))
    assert (response.text, response.finish_reason) == ("", "stop")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_async_provider_says_the_same(backend: str) -> None:
    """The async provider gives the same responses as the sync provider, whole and streamed."""
    request = Request(model="m", messages="hello there you", max_tokens=2)

    async def run() -> None:
        pipeline = AsyncPipeline(AsyncEchoProvider(CONFIG))
        whole = await pipeline.complete(request)
        async with pipeline.stream(request) as stream:
            streamed = [chunk async for chunk in stream]
        assert whole == stream.response == Pipeline(EchoProvider(CONFIG)).complete(request)
        assert [chunk.text for chunk in streamed] == ["hello ", "there ", ""]
        assert pipeline.info == EchoProvider.info

    anyio.run(run, backend=backend)


def test_it_is_found_by_its_name() -> None:
    """The framework name finds the provider, with the default stack, sync and async."""
    assert LLM(CONFIG).forward("hello") == "hello"

    async def run() -> None:
        async with AsyncLLM(CONFIG) as llm:
            assert await llm.forward("hello") == "hello"

    anyio.run(run)
