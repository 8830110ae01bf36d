"""`as_chat_model`: fluxibly as a LangChain chat model."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

pytest.importorskip("langchain")

from langchain_core.exceptions import OutputParserException
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
from fluxibly.parts import Audio, Document, Image, Opaque, Reasoning, Text
from fluxibly.providers.langchain import as_chat_model
from fluxibly.testing import ScriptedProvider
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
        Chunk(parts=(signed,), finish_reason="tool_call"),
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


def joined(model: Any) -> Any:
    """Return a streamed answer, joined by LangChain."""
    whole: Any = None
    for chunk in model.stream("hi"):
        whole = chunk if whole is None else whole + chunk
    return whole


def heard(message: AIMessage, *later: Any) -> Message:
    """Return an answer as a provider gets it in the next turn."""
    provider = Scripted()
    as_chat_model(Pipeline(provider), model="m").invoke([HumanMessage("hi"), message, *later])
    return provider.asked[0].messages[1]


ANSWER = (
    Chunk(reasoning="hm", parts=(Reasoning(text="hm", signature="s", raw={"type": "thinking", "signature": "s"}),)),
    Chunk("Let me "),
    Chunk("look. "),
    Chunk(parts=(Text("", raw={"citations": [1]}), Opaque("anthropic", {"type": "server_tool_use", "index": 1}))),
    Chunk(parts=(Image(data=b"\x89PNG", media_type="image/png", raw={"id": "ig_1"}),), text="Here: "),
    Chunk(parts=(Audio(url="data:audio/wav;base64,UklGRg==", transcript="hi"),)),
    Chunk(parts=(Document(url="https://e.org/a.pdf", name="a"),)),
    Chunk(tool_calls=(ToolCallDelta(id="a", name="weather", arguments='{"city":  "Oslo"}', raw={"caller": 1}),)),
    Chunk("After.", finish_reason="tool_call"),
)


def test_all_parts_of_an_answer_come_back() -> None:
    """An answer of many parts, whole or joined by LangChain, is the same message in the next turn."""
    model = as_chat_model(Pipeline(Scripted(*ANSWER)), model="m")
    expected = Scripted(*ANSWER).complete(Request(model="m", messages="hi"))
    speech = Audio(data=b"RIFF", media_type="audio/wav", transcript="hi")
    for message in (model.invoke("hi"), joined(model)):
        assert isinstance(message, AIMessage)
        assert str(message.text) == "Let me look. Here: After."
        pictures = [block for block in message.content if isinstance(block, dict)]
        assert pictures[0] == {"type": "image", "base64": "iVBORw==", "mime_type": "image/png"}
        assert "iVBORw" not in str(message.additional_kwargs)
        answer = heard(message, ToolMessage("no", tool_call_id="a", status="error"))
        assert answer.parts == tuple(speech if isinstance(part, Audio) else part for part in expected.parts)


def test_the_result_of_a_tool_that_failed_is_an_error() -> None:
    """LangChain's status of a tool's result is kept."""
    provider = Scripted()
    as_chat_model(Pipeline(provider), model="m").invoke(
        [
            HumanMessage("hi"),
            AIMessage("", tool_calls=[{"id": "a", "name": "weather", "args": {}}]),
            ToolMessage("no", tool_call_id="a", status="error"),
        ]
    )
    assert provider.asked[0].messages[-1].is_error


def test_what_was_changed_in_an_answer_counts() -> None:
    """Text and tool calls of a message that LangChain's user has changed are as changed; the other parts stay."""
    message = joined(as_chat_model(Pipeline(Scripted(*ANSWER)), model="m"))
    message.content = [block for block in message.content if isinstance(block, dict) and block["type"] != "image"]
    message.content.append("Changed")
    message.tool_calls[0]["args"] = {"city": "Rome"}
    answer = heard(message)
    assert answer.text == "Changed"
    (call,) = answer.tool_calls
    assert (call.arguments, call.raw) == ({"city": "Rome"}, {"caller": 1})
    kinds = [type(part).__name__ for part in answer.parts]
    assert kinds == ["Reasoning", "Text", "Audio", "Document", "Opaque", "ToolCall"]


def test_an_answer_of_another_chat_model_keeps_its_blocks() -> None:
    """The blocks of an answer that LangChain's own integration made stay in their order, for that integration."""
    thought = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
    search = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    use = {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Oslo"}}
    message = AIMessage(
        [thought, {"type": "text", "text": "See"}, search, use, {"type": "text", "text": "so"}],
        tool_calls=[{"id": "a", "name": "weather", "args": {"city": "Oslo"}}],
        response_metadata={"model_provider": "anthropic"},
    )
    assert heard(message).parts == (
        Reasoning(text="hm", signature="c2ln", raw=thought),
        Text("See"),
        Opaque("langchain-anthropic", search),
        ToolCall("a", "weather", {"city": "Oslo"}),
        Text("so"),
    )


def test_media_of_a_user_come_through() -> None:
    """Audio and files of a user's message are parts of the prompt."""
    provider = Scripted()
    blocks: list[Any] = [
        {"type": "audio", "base64": "UklGRg==", "mime_type": "audio/wav"},
        {"type": "file", "base64": "JVBERg==", "mime_type": "application/pdf", "filename": "a.pdf"},
        {"type": "file", "url": "https://e.org/a.pdf", "mime_type": "application/pdf"},
    ]
    as_chat_model(Pipeline(provider), model="m").invoke([HumanMessage(blocks)])
    assert provider.asked[0].messages[0].content == (
        Audio(data=b"RIFF", media_type="audio/wav"),
        Document(data=b"%PDF", media_type="application/pdf", name="a.pdf"),
        Document(url="https://e.org/a.pdf", media_type="application/pdf"),
    )


def test_unsupported_content_is_an_error() -> None:
    """Content that a prompt cannot hold is an error rather than left out."""
    model = as_chat_model(Pipeline(Scripted()), model="m")
    with pytest.raises(ValueError, match="expected text, images, audio or files"):
        model.invoke([HumanMessage([{"type": "video", "base64": "AAAA", "mime_type": "video/mp4"}])])


def test_keywords_reach_the_request() -> None:
    """Bound keywords and keywords of the call reach the request. `stop` is a separate parameter in LangChain."""
    provider = Scripted()
    model = as_chat_model(Pipeline(provider), model="m").bind(temperature=0.3, extra={"odd": 1})
    model.invoke("hi", stop=["END"], max_tokens=9, response_format={"type": "json_object"})
    (request,) = provider.asked
    assert (request.model, request.temperature, request.max_tokens) == ("m", 0.3, 9)
    assert (request.stop, request.extra, request.response_format) == (
        ("END",),
        {"odd": 1},
        {"type": "json_object"},
    )


def test_an_unknown_keyword_is_named() -> None:
    """An unknown keyword raises the same error as in an LLM."""
    model = as_chat_model(LLM(LLMConfig(framework="echo", model="parrot"), middleware=[]))
    with pytest.raises(TypeError, match="temperature"):
        model.invoke("hi", temprature=1)


class City(BaseModel):
    """A city."""

    name: str


@pytest.mark.parametrize("include_raw", [False, True])
@pytest.mark.parametrize("strict", [None, True, False])
def test_structured_output_by_response_format(include_raw: bool, strict: bool | None) -> None:
    """`method="json_schema"` sends the schema as `response_format`, and returns an instance of the class, or a dict."""
    text = '{"name": "Paris"}'
    for schema, expected in ((City, City(name="Paris")), (City.model_json_schema(), json.loads(text))):
        provider = ScriptedProvider(text)
        model = as_chat_model(Pipeline(provider), model="m")
        found = model.with_structured_output(
            schema, method="json_schema", include_raw=include_raw, strict=strict, temperature=0
        ).invoke("Paris?")
        assert (found["parsed"] if include_raw else found) == expected
        (sent,) = provider.requests
        assert sent.tools == ()
        assert sent.temperature == 0
        wanted = sent.response_format if strict is None else sent.response_format["json_schema"]["schema"]
        assert wanted["properties"].keys() == {"name"}
        assert strict is None or sent.response_format["json_schema"]["strict"] is strict


def test_structured_output_that_does_not_fit() -> None:
    """An answer of another form is LangChain's error of parsing; with `include_raw` it is returned."""
    model = as_chat_model(Pipeline(ScriptedProvider('{"name": 5}', '{"name": 5}', "{}")), model="m")
    with pytest.raises(OutputParserException):
        model.with_structured_output(City, method="json_schema").invoke("Paris?")
    found = model.with_structured_output(City, method="json_schema", include_raw=True).invoke("Paris?")
    assert found["parsed"] is None
    assert isinstance(found["parsing_error"], OutputParserException)
    assert model.with_structured_output({"title": "x"}, method="json_mode").invoke("Paris?") == {}


def test_structured_output_in_an_unknown_way() -> None:
    """A method that does not exist, and a setting of another method, say what is right."""
    model = as_chat_model(Pipeline(ScriptedProvider("x")), model="m")
    with pytest.raises(
        ValueError, match="method: expected 'json_schema', 'json_mode' or 'function_calling', got 'xml'"
    ):
        model.with_structured_output(City, method="xml")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match="strict: expected it with method='json_schema'"):
        model.with_structured_output(City, strict=True)


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
