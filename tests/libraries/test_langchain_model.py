"""`as_chat_model`: fluxibly as a LangChain chat model."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

pytest.importorskip("langchain")

from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from pydantic import BaseModel

from fluxibly import (
    LLM,
    AsyncLLM,
    AsyncPipeline,
    CallNext,
    Chunk,
    Flow,
    LLMConfig,
    Message,
    Pipeline,
    ProviderError,
    Request,
    Response,
    ToolCall,
    Usage,
)
from fluxibly.messages import Image, Reasoning, Text
from fluxibly.providers.langchain import as_chat_model
from fluxibly.types import ToolCallDelta

USAGE = Usage(input_tokens=7, output_tokens=3, cached_tokens=2, reasoning_tokens=1)


class Scripted:
    """A provider that answers from a script and keeps the requests."""

    def __init__(self, *chunks: Chunk) -> None:
        self.chunks = chunks or (
            Chunk("Hel", model="m-1", id="id-1"),
            Chunk("lo", reasoning="hm", finish_reason="stop", usage=USAGE),
        )
        self.asked: list[Request] = []

    def stream(self, request: Request) -> Any:
        self.asked.append(request)
        yield from self.chunks

    def complete(self, request: Request) -> Response:
        with Pipeline(Replay(self.stream(request))).stream(request) as stream:
            for _ in stream:
                pass
        return stream.response


class Replay:
    """A provider that replays an existing stream."""

    def __init__(self, chunks: Any) -> None:
        self.chunks = chunks

    def complete(self, request: Request) -> Response:
        raise AssertionError("streamed only")

    def stream(self, request: Request) -> Any:
        yield from self.chunks


def calls(*fragments: ToolCallDelta) -> tuple[Chunk, ...]:
    return (*[Chunk(tool_calls=(each,)) for each in fragments], Chunk(finish_reason="tool_call"))


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def test_a_chain_runs_on_an_llm_with_its_middleware() -> None:
    """A chain, prompt | model | parser, runs through the middleware, whole and streamed."""
    seen: list[str] = []

    def spy(request: Request, call_next: CallNext) -> Flow[Response]:
        seen.append(request.messages[-1].text)
        return (yield from call_next(request))

    llm = LLM(LLMConfig(framework="echo", model="parrot"), middleware=[spy])
    chain = ChatPromptTemplate([("system", "Echo."), ("human", "Say {word} twice")]) | as_chat_model(llm)
    chain |= StrOutputParser()
    assert chain.invoke({"word": "hi"}) == "Say hi twice"
    assert list(chain.stream({"word": "ho"}))[:3] == ["Say ", "ho ", "twice"]
    assert seen == ["Say hi twice", "Say ho twice"]


@pytest.mark.parametrize("how", ["thread", "async"])
def test_a_chain_runs_asynchronously(how: str) -> None:
    """A chain runs asynchronously on an AsyncLLM, and on an LLM in a thread."""
    config = LLMConfig(framework="echo", model="parrot")
    llm = LLM(config, middleware=[]) if how == "thread" else AsyncLLM(config, middleware=[])
    chain = ChatPromptTemplate([("human", "Say {word} twice")]) | as_chat_model(llm) | StrOutputParser()

    async def run() -> None:
        assert await chain.ainvoke({"word": "hi"}) == "Say hi twice"
        assert [text async for text in chain.astream({"word": "ho"})][:3] == ["Say ", "ho ", "twice"]

    anyio.run(run)


def test_an_async_llm_cannot_be_invoked() -> None:
    """The error for a synchronous call on an AsyncLLM names the asynchronous methods."""
    model = as_chat_model(AsyncLLM(LLMConfig(framework="echo", model="parrot"), middleware=[]))
    with pytest.raises(TypeError, match="runs on an AsyncLLM, which is asynchronous: use ainvoke"):
        model.invoke("hi")
    with pytest.raises(TypeError, match="use ainvoke, astream"):
        list(model.stream("hi"))


def test_a_whole_answer_is_a_message_with_everything() -> None:
    """A message has usage, metadata and reasoning where LangChain's users look for them."""
    message = as_chat_model(Pipeline(Scripted()), model="m").invoke("hi")
    assert isinstance(message, AIMessage)
    assert message.content == "Hello"
    assert message.additional_kwargs["reasoning_content"] == "hm"
    assert message.response_metadata["finish_reason"] == "stop"
    assert (message.response_metadata["model_name"], message.response_metadata["id"]) == ("m-1", "id-1")
    assert message.usage_metadata == {
        "input_tokens": 7,
        "output_tokens": 3,
        "total_tokens": 10,
        "input_token_details": {"cache_read": 2},
        "output_token_details": {"reasoning": 1},
    }


def test_a_streamed_answer_adds_up_to_the_whole_one() -> None:
    """The chunks, which LangChain joins itself, add up to the whole message."""
    model = as_chat_model(Pipeline(Scripted()), model="m")
    joined: AIMessageChunk | None = None
    for chunk in model.stream("hi"):
        assert isinstance(chunk, AIMessageChunk)
        joined = chunk if joined is None else joined + chunk
    whole = model.invoke("hi")
    assert joined is not None
    assert isinstance(whole, AIMessage)
    assert (joined.content, joined.usage_metadata) == (whole.content, whole.usage_metadata)
    assert joined.response_metadata.items() >= whole.response_metadata.items()
    assert joined.additional_kwargs == whole.additional_kwargs


@pytest.mark.parametrize(
    "fragments",
    [
        (
            ToolCallDelta(index=0, id="a", name="weather"),
            ToolCallDelta(index=0, arguments='{"city":'),
            ToolCallDelta(index=0, arguments=' "Oslo"}'),
            ToolCallDelta(index=1, id="b", name="weather", arguments='{"city": "Rome"}'),
        ),
        (
            ToolCallDelta(id="a", name="weather", arguments='{"city":'),
            ToolCallDelta(arguments=' "Oslo"}'),
            ToolCallDelta(id="b", name="weather", arguments='{"city": "Rome"}'),
        ),
        (
            ToolCallDelta(index=0, id="a", name="weather", arguments='{"city": "Oslo"}'),
            ToolCallDelta(index=0, id="b", name="weather", arguments='{"city": "Rome"}'),
        ),
    ],
    ids=["by index", "by id", "all numbered 0"],
)
def test_tool_calls_come_through(fragments: tuple[ToolCallDelta, ...]) -> None:
    """Tool calls come through whole and in fragments, regardless of the service's numbers."""
    provider = Scripted(*calls(*fragments))
    model = as_chat_model(Pipeline(provider), model="m").bind_tools([weather], tool_choice="any")
    whole = model.invoke("hi")
    joined: Any = None
    for chunk in model.stream("hi"):
        joined = chunk if joined is None else joined + chunk
    for message in (whole, joined):
        assert [(call["id"], call["args"]) for call in message.tool_calls] == [
            ("a", {"city": "Oslo"}),
            ("b", {"city": "Rome"}),
        ]
    request = provider.asked[0]
    assert request.tools[0].name == "weather"
    assert request.tools[0].parameters["properties"]["city"] == {"type": "string"}
    assert request.tool_choice == "required"


def test_a_broken_tool_call_is_invalid() -> None:
    """A tool call with broken arguments is an invalid tool call with the model's own text."""
    provider = Scripted(*calls(ToolCallDelta(index=0, id="a", name="weather", arguments='{"city')))
    message = as_chat_model(Pipeline(provider), model="m").invoke("hi")
    assert isinstance(message, AIMessage)
    assert message.tool_calls == []
    assert message.invalid_tool_calls[0]["args"] == '{"city'


def test_a_conversation_comes_through() -> None:
    """Each kind of message comes through, with images and with the data that must go back to the service."""
    signed = Reasoning(text="hm", signature="c2ln", raw={"type": "thinking", "signature": "c2ln"})
    first = Scripted(
        Chunk(tool_calls=(ToolCallDelta(index=0, id="a", name="weather", arguments="{}", signature="s"),)),
        Chunk(reasoning_parts=(signed,), finish_reason="tool_call"),
    )
    model = as_chat_model(Pipeline(first), model="m")
    answers = [model.invoke("hi")]
    joined: Any = None
    for chunk in model.stream("hi"):
        joined = chunk if joined is None else joined + chunk
    answers.append(joined)
    for answer in answers:
        provider = Scripted()
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}}
        as_chat_model(Pipeline(provider), model="m").invoke(
            [
                SystemMessage("be brief"),
                HumanMessage([{"type": "text", "text": "look"}, picture]),
                answer,
                ToolMessage("sunny", tool_call_id="a"),
            ]
        )
        system, user, assistant, result = provider.asked[0].messages
        assert system == Message.system("be brief")
        assert user.content == (Text("look"), Image(data=b"\x89PNG", media_type="image/png"))
        assert assistant.tool_calls == (ToolCall("a", "weather", {}, "{}", signature="s"),)
        assert assistant.reasoning == (signed,)
        assert (result.role, result.text, result.tool_call_id) == ("tool", "sunny", "a")


def test_unsupported_content_is_an_error() -> None:
    """Content that a prompt cannot hold is an error rather than left out."""
    model = as_chat_model(Pipeline(Scripted()), model="m")
    with pytest.raises(ValueError, match="expected text or images"):
        model.invoke([HumanMessage([{"type": "audio", "base64": "AAAA", "mime_type": "audio/wav"}])])


def test_keywords_reach_the_request() -> None:
    """Bound keywords and keywords of the call reach the request. `stop` is a separate parameter in LangChain."""
    provider = Scripted()
    model = as_chat_model(Pipeline(provider), model="m").bind(temperature=0.3, extra={"odd": 1})
    model.invoke("hi", stop=["END"], max_tokens=9, response_format={"type": "json_object"})
    (request,) = provider.asked
    assert (request.model, request.temperature, request.max_tokens) == ("m", 0.3, 9)
    assert (request.stop, request.extra, request.response_format) == (("END",), {"odd": 1}, "json")


def test_an_unknown_keyword_is_named() -> None:
    """An unknown keyword raises the same error as in an LLM."""
    model = as_chat_model(LLM(LLMConfig(framework="echo", model="parrot"), middleware=[]))
    with pytest.raises(TypeError, match="temperature"):
        model.invoke("hi", temprature=1)


class City(BaseModel):
    """A city."""

    name: str


def test_structured_output_works() -> None:
    """LangChain's own structured output, which requests a call to a tool named after the class, works."""
    provider = Scripted(*calls(ToolCallDelta(index=0, id="a", name="City", arguments='{"name": "Oslo"}')))
    model = as_chat_model(Pipeline(provider), model="m").with_structured_output(City)
    assert model.invoke("hi") == City(name="Oslo")


def test_errors_reach_langchain_as_they_are() -> None:
    """Errors reach LangChain unchanged, so that `with_fallbacks` and similar methods can handle them."""

    class Failing:
        def complete(self, request: Request) -> str:
            raise ProviderError("no")

    primary = as_chat_model(Pipeline(Failing()), model="m")
    with pytest.raises(ProviderError, match="no"):
        primary.invoke("hi")
    fallback = as_chat_model(Pipeline(Scripted()), model="m")
    assert primary.with_fallbacks([fallback], exceptions_to_handle=(ProviderError,)).invoke("hi").content == "Hello"


def test_an_async_pipeline_streams_too() -> None:
    """An AsyncPipeline streams the same pieces as a Pipeline."""

    async def run() -> None:
        model = as_chat_model(AsyncPipeline(Scripted()), model="m")
        assert (await model.ainvoke("hi")).content == "Hello"
        assert [chunk.content async for chunk in model.astream("hi")][:2] == ["Hel", "lo"]

    anyio.run(run)


def test_invalid_objects_for_as_chat_model() -> None:
    """The error for an invalid object names the valid types."""
    with pytest.raises(TypeError, match="expected an LLM, AsyncLLM, Pipeline or AsyncPipeline, got a str"):
        as_chat_model("gpt-4o")
    with pytest.raises(TypeError, match="needs model= for a Pipeline"):
        as_chat_model(Pipeline(Scripted()))
