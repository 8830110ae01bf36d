"""Parts of a hostile server or a careless caller: deep, endless, and with content that no error may quote."""

from __future__ import annotations

import logging
import sys
from time import process_time
from typing import Any

import attrs
import pytest

from fluxibly._masking import mask_request
from fluxibly.aggregate import Aggregator, as_chunks
from fluxibly.errors import ServerError
from fluxibly.flow import CallNext, Flow, map_chunks
from fluxibly.middleware import Logging
from fluxibly.pipeline import Pipeline
from fluxibly.telemetry._content import Captured, Capturing
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Audio, Chunk, Image, Message, Opaque, Reasoning, Request, Response, Text, ToolCall

FIRST = Reasoning(text="secret A", signature="1")
SECOND = Reasoning(text="secret B", signature="2")


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"said": "what the user confided"}
    for _ in range(levels):
        value = {"a": value}
    return value


def circle() -> dict[str, Any]:
    value: dict[str, Any] = {"said": "what the user confided"}
    value["self"] = [value]
    return value


def asked(*parts: Any) -> Request:
    return Request(model="m", messages=(Message.user("hi"), Message.assistant(parts), Message.user("go on")))


class TestMasking:
    @pytest.mark.parametrize(
        "raw", [deep(900), deep(50_000), circle()], ids=["900 levels", "50,000 levels", "a circle"]
    )
    def test_deep_opaque_parts(self, raw: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
        """An error is logged, and its quote of an opaque part masked, however deep the part is."""
        error = ServerError("cannot read: what the user confided")
        pipeline = Pipeline(ScriptedProvider(error), [Logging()])
        with caplog.at_level(logging.INFO), pytest.raises(ServerError):
            pipeline.complete(asked(Opaque("anthropic", raw)))
        assert "cannot read" in caplog.text
        assert "confided" not in caplog.text

    def test_the_transcript_of_audio(self) -> None:
        """What a model said is content, too."""
        request = asked(Audio(data=b"", media_type="audio/wav", transcript="what the user confided"))
        assert "confided" not in mask_request("cannot read: what the user confided", request)

    def test_many_strings(self) -> None:
        """The time to mask a long message does not grow with its length times the number of strings."""
        results = [{"title": f"The tides of port number {number}"} for number in range(20_000)]
        request = asked(Opaque("anthropic", {"results": results}))
        begun = process_time()
        assert mask_request("error " * 300 + "The tides of port number 7", request).endswith("[…]")
        assert process_time() - begun < 3


class _Span:
    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        self.attributes |= attributes


class TestCapture:
    @pytest.mark.parametrize("redact", [None, str.upper])
    @pytest.mark.parametrize("mode", ["span", "both"])
    def test_deep_content_is_not_captured(self, mode: Any, redact: Any) -> None:
        """Content that is nested too deeply to be written is left out as a whole, and nothing is raised."""
        for raw in (deep(50_000), circle()):
            span: Any = _Span()
            captured = Captured(asked(Opaque("gemini", raw)), Response("hi"), whole=True)
            Capturing(mode, redact, None).record(captured, span, None, {})  # type: ignore[arg-type]  # the context is not read
            # Python 3.14 writes as deeply as its stack allows.
            assert span.attributes == {} or (sys.version_info >= (3, 14) and "a" in raw)


class TestRedactors:
    def test_each_block_of_reasoning_stays_with_its_signature(self) -> None:
        """A middleware that changes the reasoning of a whole answer changes it in every block."""

        def redact(request: Request, call_next: CallNext) -> Flow[Response]:
            def change(chunk: Chunk) -> Chunk:
                return attrs.evolve(chunk, reasoning=chunk.reasoning.replace("secret", "***"))

            return (yield from map_chunks(call_next(request), change))

        answer = Response.from_parts([FIRST, SECOND, Text("Yes")])
        whole = Pipeline(ScriptedProvider(answer), [redact]).complete(Request(model="m", messages="hi"))
        assert whole.reasoning == "*** A*** B"
        assert whole.parts == (
            attrs.evolve(FIRST, text="*** A"),
            attrs.evolve(SECOND, text="*** B"),
            Text("Yes"),
        )

    @pytest.mark.parametrize("whole", [True, False])
    def test_reasoning_without_signatures_joins(self, whole: bool) -> None:
        """If a middleware takes out the text between two pieces of reasoning, they are one piece in every mode."""

        def silent(request: Request, call_next: CallNext) -> Flow[Response]:
            return (yield from map_chunks(call_next(request), lambda chunk: attrs.evolve(chunk, text="")))

        script: list[str | Chunk] = [
            Chunk(reasoning="One. "),
            "text",
            Chunk(reasoning="Two."),
            Chunk(finish_reason="stop"),
        ]
        pipeline, request = Pipeline(ScriptedProvider([*script]), [silent]), Request(model="m", messages="hi")
        if whole:
            response = pipeline.complete(request)
        else:
            with pipeline.stream(request) as stream:
                list(stream)
            response = stream.response
        assert response.parts == (Reasoning(text="One. Two."),)

    def test_blocks_in_chunks(self) -> None:
        """Blocks that have only a signature or other fields need no chunk of their own."""
        opening = Reasoning(signature="0")
        chunks = as_chunks(Response.from_parts([opening, FIRST, SECOND, Text("Yes")], finish_reason="stop"))
        assert [(chunk.reasoning, chunk.text) for chunk in chunks] == [("", ""), ("secret A", ""), ("secret B", "Yes")]
        joined = Aggregator()
        for chunk in chunks:
            joined.add(chunk)
        assert joined.response().parts == (opening, FIRST, SECOND, Text("Yes"))


class TestJSON:
    @pytest.mark.parametrize(
        "fields",
        [
            {"tool_calls": "what the user confided"},
            {"is_error": "what the user confided"},
            {"audio": "what the user confided"},
            {"content": [{"type": "opaque", "dialect": "gemini", "raw": "what the user confided"}]},
        ],
    )
    def test_errors_quote_no_texts(self, fields: dict[str, Any]) -> None:
        """A text in the wrong place may be content."""
        with pytest.raises(ValueError, match=r"expected .*, got a str$") as caught:
            Message.from_dict({"role": "assistant", **fields})
        assert "confided" not in str(caught.value)

    @pytest.mark.parametrize(
        "part",
        [
            Audio(data=b"", media_type="audio/wav", transcript=""),
            Reasoning(signature=""),
            Image(url="https://x.test/a.png", media_type="", detail=""),
            ToolCall("", "", raw_arguments="no JSON", signature=""),
            Opaque("", {}),
        ],
    )
    def test_empty_fields_survive(self, part: Any) -> None:
        """An empty text is not the same as none."""
        message = Message.assistant([part])
        assert repr(Message.from_dict(message.to_dict())) == repr(message)


class TestTypes:
    @pytest.mark.parametrize("raw", ["text", [1], 3, b"x"])
    def test_raw_is_a_mapping(self, raw: Any) -> None:
        """Fields of another type are refused at once, where the caller can see it."""
        with pytest.raises(TypeError, match="an Opaque's raw: expected a mapping, got a"):
            Opaque("gemini", raw)
        with pytest.raises(TypeError, match="a ToolCall's raw: expected a mapping, got a"):
            ToolCall("1", "tide", raw=raw)
