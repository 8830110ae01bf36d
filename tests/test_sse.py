"""Streams as server-sent events: the events of both shapes, and what clients of real servers get."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from support.serving import Endless, Outcomes, served, sharing

import fluxibly
from fluxibly import AsyncPipeline, Image, Message, Pipeline, ProviderError, Request, Tool, Usage
from fluxibly.errors import AuthenticationError, RateLimitError
from fluxibly.middleware import Retry, Tools
from fluxibly.parts import Audio, Reasoning
from fluxibly.testing import AsyncScriptedProvider, Cut, ScriptedProvider
from fluxibly.types import Chunk, Response, ToolCall, ToolCallDelta

pytestmark = pytest.mark.anyio
ASKED = "the quick brown fox jumps over it"


@pytest.fixture(scope="module", autouse=True)
def one_server() -> Iterator[None]:
    """All tests share a server, but not the application behind it."""
    with sharing():
        yield


def stream_of(*answers: Any, middleware: Any = (), **options: Any) -> Any:
    restarts = options.pop("restarts", False)
    options.setdefault("messages", ASKED)
    pipeline = AsyncPipeline(AsyncScriptedProvider(*answers), list(middleware))
    return pipeline.stream(Request(model="m", **options), restarts=restarts)


async def sent(*answers: Any, shape: Any = "text", usage: bool = True, **options: Any) -> bytes:
    """Return all events of a stream of these answers."""
    body = fluxibly.sse.events(stream_of(*answers, **options), shape, usage=usage)
    return b"".join([event async for event in body])


def read(data: bytes) -> list[tuple[str, str]]:
    """Return the events of a body as an EventSource would dispatch them: their names, and their data."""
    found: list[tuple[str, str]] = []
    name, lines = "", list[str]()
    text = data.decode().replace("\r\n", "\n").replace("\r", "\n")
    for line in text.split("\n"):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if lines:
                found.append((name or "message", "\n".join(lines)))
            name, lines = "", []
        elif field == "event":
            name = value
        elif field == "data":
            lines.append(value)
    return found


def said(data: bytes) -> str:
    return "".join([text for name, text in read(data) if name == "message"])


def objects(data: bytes) -> list[dict[str, Any]]:
    """Return the objects of a body of the shape "openai", which has to be complete."""
    *found, last = read(data)
    assert last == ("message", "[DONE]")
    assert {name for name, _ in found} == {"message"}
    return [json.loads(text) for _, text in found]


def deltas(data: bytes, index: int = 0) -> list[dict[str, Any]]:
    choices = [choice for each in objects(data) for choice in each["choices"] if choice["index"] == index]
    return [choice["delta"] for choice in choices if choice["delta"]]


class TestText:
    async def test_texts_and_their_end(self) -> None:
        """Each text is an event without a name, and the end has a name and data, without which no client would see it."""
        assert await sent("Hello there") == (
            b'data: Hello\n\ndata:  there\n\nevent: done\ndata: {"finish_reason":null}\n\n'
        )

    @pytest.mark.parametrize(
        "texts",
        [
            ["one\ntwo"],
            ["\n", "\n\n"],
            ["a\n", "\nb", " c"],
            [" leading", "  two", ": colon", "data: x\n\nevent: done"],
            ["\ufeffmark", "\x00null", "\u2028line\u0085"],
            ["id: 5", "retry: 1", "\n:comment"],
        ],
    )
    async def test_any_text_arrives_as_it_was_sent(self, texts: list[str]) -> None:
        """No text of a model can end an event, begin a field or name an event."""
        data = await sent(texts)
        assert said(data) == "".join(texts)
        assert [name for name, _ in read(data)] == ["message"] * len(texts) + ["done"]

    @pytest.mark.parametrize("texts", [["a\r\nb\rc\n"], ["a\r", "\nb\r", "c\n"], ["a\r", "", "\n", "b\rc\n"]])
    async def test_carriage_returns_are_line_ends(self, texts: list[str]) -> None:
        """A carriage return is a line end for clients, with a line feed or without, also where a chunk ends between them."""
        assert said(await sent(texts)) == "a\nb\nc\n"

    async def test_half_a_surrogate_pair_ends_nothing(self) -> None:
        """What UTF-8 cannot say is replaced."""
        assert said(await sent(["a\ud800b"])) == "a?b"

    async def test_an_error_after_output(self) -> None:
        """The error's event has its class, and its message without texts of the conversation. Nothing follows it."""
        data = await sent(["Hello", ProviderError(f"bad: {ASKED}", status=500)])
        *_, (name, text) = read(data)
        assert name == "error"
        assert json.loads(text) == {"type": "ProviderError", "message": "bad: […]"}
        assert "done" not in [name for name, _ in read(data)]

    async def test_a_cut_stream_is_an_error(self) -> None:
        """A stream that ends too early does not look complete."""
        *_, (name, text) = read(await sent(["Hello", Cut()]))
        assert (name, json.loads(text)["type"]) == ("error", "StreamProtocolError")

    async def test_an_error_before_output(self) -> None:
        """Without `begin`, an error before the answer is an event as well."""
        assert [name for name, _ in read(await sent(RateLimitError("slow down")))] == ["error"]

    async def test_other_exceptions_tell_their_class_alone(self) -> None:
        """The message of an exception that is not ours may have anything in it."""
        *_, (_, text) = read(await sent(["Hello", KeyError("/home/me/passwords")]))
        assert json.loads(text) == {"type": "KeyError", "message": "an internal error occurred"}

    async def test_a_refused_key_is_not_described(self) -> None:
        """What a service says of a key is for its owner."""
        data = await sent(AuthenticationError("Incorrect API key provided: sk-***cdef", status=401))
        assert b"sk-" not in data
        assert b"AuthenticationError" in data

    async def test_a_turn_with_tools(self) -> None:
        """The mark between two turns names the tools that ran, and neither their arguments nor their results."""

        def clock(zone: str) -> str:
            """Tell the time."""
            return f"noon in {zone}"

        call = ToolCall("c1", "clock", {"zone": "Rome"})
        data = await sent(Response("Let me see.", tool_calls=[call]), "It is noon.", middleware=[Tools([clock])])
        names = [name for name, _ in read(data)]
        assert ("turn", '{"tools":["clock"]}') in read(data)
        assert names.index("turn") == 3
        assert b"Rome" not in data

    async def test_restarts(self) -> None:
        """A stream that may begin again says so, and the client discards what it has."""
        retry = Retry(max_retries=1, base_delay=0, on_interrupt="restart")
        data = await sent(["Hel", ProviderError("x", retryable=True)], "Hello", middleware=[retry], restarts=True)
        assert [name for name, _ in read(data)] == ["message", "restart", "message", "done"]

    async def test_a_line_end_is_that_of_one_text(self) -> None:
        """A line feed at the start of a text is kept if the carriage return before it was of a text that is void, or a turn before."""
        retry = Retry(max_retries=1, base_delay=0, on_interrupt="restart")
        data = await sent(["a\r", ProviderError("x", retryable=True)], ["\nb"], middleware=[retry], restarts=True)
        assert read(data)[2] == ("message", "\nb")

        def clock() -> str:
            """Tell the time."""
            return "noon"

        first = Response("Look:\r", tool_calls=[ToolCall("c1", "clock", {})])
        data = await sent(first, ["\nnoon"], middleware=[Tools([clock])])
        assert read(data)[-2] == ("message", "\nnoon")


class TestOpenAI:
    async def test_a_stream(self) -> None:
        """One id and one model in all objects, the role first, a finish reason, the usage last, then [DONE]."""
        answer = Response("Hello there", usage=Usage(input_tokens=3, output_tokens=2), finish_reason="stop")
        found = objects(await sent(answer, shape="openai"))
        assert len({(each["id"], each["model"], each["created"], each["object"]) for each in found}) == 1
        assert found[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "".join([each["choices"][0]["delta"].get("content") or "" for each in found[:-1]]) == "Hello there"
        assert found[-2]["choices"][0]["finish_reason"] == "stop"
        assert (found[-1]["choices"], found[-1]["usage"]["total_tokens"]) == ([], 5)

    async def test_without_usage(self) -> None:
        """`usage=False` leaves the object without choices out."""
        answer = Response("Hello", usage=Usage(input_tokens=3, output_tokens=2))
        assert all(each["choices"] for each in objects(await sent(answer, shape="openai", usage=False)))

    async def test_reasoning_media_and_alternatives(self) -> None:
        """Reasoning, its signature, images, sound and other choices have their places."""
        image, sound = Image(data=b"png", media_type="image/png"), Audio(data=b"wav", media_type="audio/wav")
        answer = [
            Chunk(reasoning="Hm"),
            Chunk(reasoning="m."),
            Chunk(parts=(Reasoning(signature="sig"), image, sound)),
            Chunk("Yes", alternatives=((1, Chunk("No")),)),
            Chunk(alternatives=((1, Chunk(finish_reason="length")),), finish_reason="stop"),
        ]
        data = await sent(answer, shape="openai")
        first = deltas(data)
        assert [each["reasoning_content"] for each in first[:2]] == ["Hm", "m."]
        assert first[2]["reasoning_details"] == [{"type": "reasoning.text", "text": "Hmm.", "signature": "sig"}]
        assert first[2]["images"][0]["image_url"]["url"] == "data:image/png;base64,cG5n"
        assert first[2]["audio"]["data"] == "d2F2"
        assert [each["content"] for each in deltas(data, 1)] == ["No"]
        reasons = {
            choice["index"]: choice["finish_reason"]
            for each in objects(data)
            for choice in each["choices"]
            if choice["finish_reason"]
        }
        assert reasons == {0: "stop", 1: "length"}

    async def test_calls_of_the_request_s_tools_go_out_as_they_come(self) -> None:
        """The fragments of a call are numbered, whatever numbers they came with."""
        answer = [
            Chunk(tool_calls=(ToolCallDelta(id="a", name="look", arguments='{"at":'),)),
            Chunk(tool_calls=(ToolCallDelta(arguments='"x"}'),)),
            Chunk(tool_calls=(ToolCallDelta(index=0, id="b", name="look", arguments="{}"),), finish_reason="tool_call"),
        ]
        data = await sent(answer, shape="openai", tools=[Tool("look")])
        calls = [each["tool_calls"][0] for each in deltas(data)]
        assert [(call["index"], call.get("id")) for call in calls] == [(0, "a"), (0, None), (1, "b")]
        assert [call["function"]["arguments"] for call in calls] == ['{"at":', '"x"}', "{}"]
        assert objects(data)[-1]["choices"][0]["finish_reason"] == "tool_calls"

    async def test_calls_that_middleware_runs_are_left_out(self) -> None:
        """A client sees one message. It has never heard of the tools of the stack, and would try to run them."""
        call = ToolCall("c1", "clock", {})
        functions = Tools([fluxibly.tool(lambda: "noon", name="clock", description="Tell the time.")])
        data = await sent(
            Response("Let me see.", tool_calls=[call], finish_reason="tool_call"),
            "It is noon.",
            shape="openai",
            middleware=[functions],
            tools=[Tool("look")],
        )
        assert not any("tool_calls" in delta for delta in deltas(data))
        assert [delta["role"] for delta in deltas(data) if "role" in delta] == ["assistant"]
        assert "".join([delta["content"] for delta in deltas(data)]) == "Let me see.\n\nIt is noon."
        assert objects(data)[-1]["choices"][0]["finish_reason"] == "stop"

    async def test_calls_that_nobody_ran_go_out_at_the_end(self) -> None:
        """An answer that calls a tool of the request and one of the stack is the client's, with all its calls."""
        functions = Tools([fluxibly.tool(lambda: "noon", name="clock", description="Tell the time.")])
        calls = [ToolCall("c1", "clock", {}), ToolCall("c2", "look", {})]
        data = await sent(Response("", tool_calls=calls), shape="openai", middleware=[functions], tools=[Tool("look")])
        found = [call for delta in deltas(data) for call in delta.get("tool_calls", ())]
        assert {(call["index"], call["function"]["name"]) for call in found} == {(0, "look"), (1, "clock")}

    async def test_an_error_in_the_middle(self) -> None:
        """An error has OpenAI's shape, and no [DONE] follows: the answer is not complete."""
        data = await sent(["Hello", RateLimitError(f"slow down: {ASKED}")], shape="openai")
        *_, (name, text) = read(data)
        assert name == "error"
        assert json.loads(text)["error"] == {
            "message": "slow down: […]",
            "type": "rate_limit_error",
            "param": None,
            "code": "rate_limit_exceeded",
        }
        assert b"[DONE]" not in data

    async def test_what_cannot_be_written_is_an_error(self) -> None:
        """A value that is no JSON ends the answer as an error, and the provider's stream is closed."""
        provider = Endless(Chunk("Hello", details={"annotations": [object()]}))
        stream = AsyncPipeline(provider).stream(Request(model="m", messages="hi"))
        *_, last = [event async for event in fluxibly.sse.events(stream, "openai")]
        assert b"internal_error" in last
        assert provider.closed.is_set()

    async def test_restarts_are_refused(self) -> None:
        """OpenAI's clients have no word for a restart."""
        with pytest.raises(ValueError, match="restart"):
            fluxibly.sse.events(stream_of("hi", restarts=True), "openai")


class TestBegin:
    async def test_an_error_before_the_answer_is_raised(self) -> None:
        """A handler that awaits `begin` can answer with a status; the events have the error all the same."""
        body = fluxibly.sse.events(stream_of(RateLimitError("slow down")))
        with pytest.raises(RateLimitError):
            await body.begin()
        assert [event async for event in body] == [
            b'event: error\ndata: {"type":"RateLimitError","message":"slow down"}\n\n'
        ]

    async def test_the_first_event_is_not_lost(self) -> None:
        """What `begin` has waited for comes first. An empty answer begins with its end."""
        assert said(b"".join([event async for event in await fluxibly.sse.events(stream_of("a b")).begin()])) == "a b"
        body = fluxibly.sse.events(stream_of("a b"))
        assert [read(event)[0][0] async for event in body] == ["message", "message", "done"]
        assert [event async for event in await body.begin()] == []  # it has ended, and does so once
        empty = await fluxibly.sse.events(stream_of([Chunk(finish_reason="stop")])).begin()
        assert [name for name, _ in read(b"".join([event async for event in empty]))] == ["done"]

    async def test_an_error_after_output_is_not_raised(self) -> None:
        """Once there is output, errors are events."""
        body = await fluxibly.sse.events(stream_of(["Hello", ProviderError("x")])).begin()
        assert [name for name, _ in read(b"".join([event async for event in body]))] == ["message", "error"]

    async def test_what_is_no_async_stream(self) -> None:
        """A synchronous stream, or an unknown shape, is refused at once."""
        wrong: Any = Pipeline(ScriptedProvider("hi")).stream(Request(model="m", messages="hi"))
        with pytest.raises(TypeError, match="expected an AsyncStream, got a Stream"):
            fluxibly.sse.events(wrong)
        unknown: Any = "xml"
        with pytest.raises(ValueError, match="shape: expected one of 'text', 'openai'"):
            fluxibly.sse.events(stream_of("hi"), unknown)

    async def test_closing(self) -> None:
        """A close abandons the stream, and nothing comes after it."""
        provider, outcomes = Endless("one "), Outcomes()
        body = fluxibly.sse.events(AsyncPipeline(provider, [outcomes]).stream(Request(model="m", messages="hi")))
        assert await anext(body) == b"data: one \n\n"
        await body.aclose()
        await body.aclose()
        assert [event async for event in body] == []
        assert outcomes.seen == ["abandoned"]
        assert provider.closed.is_set()


# Real servers


def starlette_app(pipeline: AsyncPipeline, shape: Any) -> Any:
    from starlette.applications import Starlette
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    async def ask(_: Any) -> StreamingResponse:
        body = fluxibly.sse.events(pipeline.stream(Request(model="m", messages=ASKED)), shape)
        return StreamingResponse(body, media_type=fluxibly.sse.MEDIA_TYPE, headers=fluxibly.sse.HEADERS)

    return Starlette(routes=[Route("/chat/completions", ask, methods=["POST"])])


def fastapi_app(pipeline: AsyncPipeline, shape: Any) -> Any:
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import StreamingResponse

    app = FastAPI()

    @app.post("/chat/completions")
    async def ask() -> StreamingResponse:
        body = fluxibly.sse.events(pipeline.stream(Request(model="m", messages=ASKED)), shape)
        try:
            await body.begin()
        except RateLimitError:
            raise HTTPException(429) from None
        return StreamingResponse(body, media_type=fluxibly.sse.MEDIA_TYPE, headers=fluxibly.sse.HEADERS)

    ask.__annotations__["return"] = StreamingResponse  # FastAPI looks for the name in this module
    return app


def litestar_app(pipeline: AsyncPipeline, shape: Any) -> Any:
    litestar = pytest.importorskip("litestar")
    from litestar.response import Stream

    async def ask() -> Stream:
        body = fluxibly.sse.events(pipeline.stream(Request(model="m", messages=ASKED)), shape)
        return Stream(body, media_type=fluxibly.sse.MEDIA_TYPE, headers=dict(fluxibly.sse.HEADERS))

    ask.__annotations__["return"] = Stream
    return litestar.Litestar([litestar.post("/chat/completions", status_code=200)(ask)])


def sse_starlette_app(pipeline: AsyncPipeline, shape: Any) -> Any:
    from sse_starlette import EventSourceResponse
    from starlette.applications import Starlette
    from starlette.routing import Route

    async def ask(_: Any) -> EventSourceResponse:
        return EventSourceResponse(fluxibly.sse.events(pipeline.stream(Request(model="m", messages=ASKED)), shape))

    return Starlette(routes=[Route("/chat/completions", ask, methods=["POST"])])


@pytest.mark.parametrize("make", [starlette_app, fastapi_app, litestar_app, sse_starlette_app])
class TestFrameworks:
    def test_a_client_that_reads_all(self, make: Any) -> None:
        """The client gets every event, and a response that no cache keeps."""
        app = make(AsyncPipeline(AsyncScriptedProvider("Hello there")), "text")
        with served(app) as url:
            response = httpx.post(f"{url}/chat/completions")
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "no-" in response.headers["cache-control"]
        assert said(response.content) == "Hello there"
        assert read(response.content)[-1][0] == "done"

    def test_a_client_that_leaves(self, make: Any) -> None:
        """The call ends within a second of the client's leaving, and the provider's stream is closed."""
        provider, outcomes = Endless("one "), Outcomes()
        with served(make(AsyncPipeline(provider, [outcomes]), "text")) as url:
            with httpx.stream("POST", f"{url}/chat/completions") as response:
                assert next(response.iter_raw()) == b"data: one \n\n"
            assert provider.closed.wait(1)
            assert set(outcomes.within(1)) <= {"abandoned", "cancelled"}
            assert outcomes.seen

    def test_a_client_that_does_not_read(self, make: Any) -> None:
        """A client that leaves while the server waits for it to read ends the call as well."""

        class Torrent(Endless):
            async def stream(self, request: Request) -> Any:
                self.opened.set()
                try:
                    while True:
                        yield Chunk("x" * 100_000)
                finally:
                    self.closed.set()

        provider = Torrent()
        with served(make(AsyncPipeline(provider), "text")) as url:
            port = int(url.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"POST /chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
                assert provider.opened.wait(5)
                assert not provider.closed.wait(0.2)
            assert provider.closed.wait(1)

    def test_failures(self, make: Any) -> None:
        """A failure is an event: after output, and before it unless the handler has awaited `begin`."""
        script = AsyncScriptedProvider(["Hello", ProviderError("broken")], RateLimitError("slow down"))
        with served(make(AsyncPipeline(script), "text")) as url:
            after, before = (httpx.post(f"{url}/chat/completions") for _ in range(2))
        assert [name for name, _ in read(after.content)] == ["message", "error"]
        if make is fastapi_app:
            assert before.status_code == 429
        else:
            assert [name for name, _ in read(before.content)] == ["error"]

    def test_openai_s_client(self, make: Any) -> None:
        """The official client reads the shape "openai", and raises the error that comes after output."""
        whole = Response("Hello there", reasoning="Hm", usage=Usage(input_tokens=3, output_tokens=2))
        script = AsyncScriptedProvider(whole, ["Hello", RateLimitError("slow down")])
        with (
            served(make(AsyncPipeline(script), "openai")) as url,
            openai.OpenAI(api_key="x", base_url=url, max_retries=0) as client,
        ):
            ask: Any = client.chat.completions.create
            chunks = list(ask(model="m", messages=[], stream=True))
            assert "".join([each.choices[0].delta.content or "" for each in chunks[:-1]]) == "Hello there"
            assert chunks[-1].usage.total_tokens == 5
            got: list[str] = []
            with pytest.raises(openai.APIError, match="slow down"):
                got += [each.choices[0].delta.content for each in ask(model="m", messages=[], stream=True)]


async def test_messages_come_back() -> None:
    """What a client gets in OpenAI's shape, `Message.from_dict` reads: reasoning with its signature, images, calls."""
    from fluxibly.providers.dialects.openai_answers import completion

    answer = Response.from_parts(
        [
            Reasoning(text="Hm", signature="sig"),
            Image(url="https://x.example/y.png"),
            *Message.assistant("Yes").content,
            ToolCall("c1", "look", {"at": "x"}),
        ]
    )
    body = completion(answer, "m")
    message = Message.from_dict({key: value for key, value in body["choices"][0]["message"].items() if value})
    assert [part.signature for part in message.reasoning] == [None, "sig"]
    assert message.text == "Yes"
    assert message.tool_calls == answer.tool_calls
    assert any(isinstance(part, Image) for part in message.content)
