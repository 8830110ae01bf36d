"""The parts of answers and messages: their order, their way through chunks, and their form as JSON values."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from hypothesis import given, strategies as st

from fluxibly.aggregate import Aggregator, as_chunk, as_chunks
from fluxibly.types import (
    Audio,
    Chunk,
    Document,
    Image,
    Message,
    Opaque,
    Part,
    Reasoning,
    Response,
    StreamStats,
    Text,
    ToolCall,
    ToolCallDelta,
    Usage,
)

PNG = Image(data=b"\x89PNG", media_type="image/png")
SEARCH = Opaque("anthropic", {"type": "server_tool_use", "id": "s1", "input": {"query": "tides"}})
CALL = ToolCall("c1", "tide", {"port": "Ostend"})

raws = st.none() | st.dictionaries(st.sampled_from(["a", "b"]), st.integers() | st.text(max_size=3), min_size=1)
words = st.text(min_size=1, max_size=5)
media = st.one_of(
    st.builds(Image, data=st.binary(max_size=4), media_type=st.just("image/png"), raw=raws),
    st.builds(Audio, data=st.binary(max_size=4), media_type=st.just("audio/wav"), transcript=st.none() | words),
    st.builds(Document, url=st.just("https://x.test/a.pdf"), name=st.none() | words, raw=raws),
)
parts = st.lists(
    st.one_of(
        st.builds(Text, words, raw=raws),
        st.builds(Text, words),
        st.builds(Reasoning, text=words, signature=st.none() | words, raw=raws),
        st.builds(Reasoning, signature=words),
        st.builds(ToolCall, words, words, st.dictionaries(words, st.integers()), signature=st.none() | words, raw=raws),
        media,
        st.builds(Opaque, st.sampled_from(["anthropic", "gemini"]), st.just({"type": "thing", "list": [1, None]})),
    ),
    max_size=7,
)
"""Parts in any order. Empty texts do not occur in answers."""


def joined(*chunks: Chunk) -> Response:
    answer = Aggregator()
    for chunk in chunks:
        answer.add(chunk)
    return answer.response()


class TestOrder:
    @given(parts)
    def test_an_answer_keeps_its_parts(self, given_parts: list[Part]) -> None:
        """`parts` is what the answer was made of, and the views show it by kind."""
        response = Response.from_parts(given_parts, finish_reason="stop")
        assert list(response.parts) == given_parts
        assert response.text == "".join(part.text for part in given_parts if isinstance(part, Text))
        assert response.reasoning == "".join(part.text for part in given_parts if isinstance(part, Reasoning))
        assert list(response.tool_calls) == [part for part in given_parts if isinstance(part, ToolCall)]
        assert list(response.media) == [part for part in given_parts if isinstance(part, (Image, Audio, Document))]

    @given(parts)
    def test_the_message_of_an_answer_has_the_same_parts(self, given_parts: list[Part]) -> None:
        """What an answer consists of goes back in the same order."""
        response = Response.from_parts(given_parts)
        assert repr([*response.message.parts]) == repr(given_parts)
        assert Message.assistant(given_parts) == response.message

    @given(parts)
    def test_parts_survive_chunks(self, given_parts: list[Part]) -> None:
        """An answer that is turned into chunks and aggregated again is the same answer."""
        response = Response.from_parts(given_parts, finish_reason="stop", usage=Usage(output_tokens=3))
        again = joined(*as_chunks(response))
        assert (again, again.order, repr(again.parts)) == (response, response.order, repr(response.parts))

    @given(parts)
    def test_one_chunk_has_all_parts(self, given_parts: list[Part]) -> None:
        """A single chunk loses at most the order."""
        response = Response.from_parts(given_parts)
        again = joined(as_chunk(response))
        assert (again.text, again.reasoning, again.tool_calls, again.media) == (
            response.text,
            response.reasoning,
            response.tool_calls,
            response.media,
        )
        assert [p for p in again.parts if isinstance(p, Opaque)] == [p for p in given_parts if isinstance(p, Opaque)]

    def test_a_plain_answer_has_the_usual_order(self) -> None:
        """Reasoning, media, text and tool calls in this order need no order of their own, and are one chunk."""
        response = Response("hi", reasoning="hm", media=[PNG], tool_calls=[CALL])
        assert response.order is None
        assert Response.from_dict(response.to_dict()) == response
        assert response.parts == (Reasoning(text="hm"), PNG, Text("hi"), CALL)
        assert len(as_chunks(response)) == 1
        assert Response.from_parts(response.parts).order is None

    def test_changed_text_takes_the_place_of_the_first(self) -> None:
        """A middleware that changes the text keeps the other parts where they stand, and none of the old text."""
        response = Response.from_parts([Text("one", raw={"citations": [1]}), SEARCH, Text("two"), CALL])
        assert response.evolve(text="changed").parts == (Text("changed"), SEARCH, CALL)
        assert response.evolve(text="").parts == (SEARCH, CALL)
        assert response.evolve(text="ONETWO").parts == (
            Text("ONE", raw={"citations": [1]}),
            SEARCH,
            Text("TWO"),
            CALL,
        )

    def test_changed_tool_calls(self) -> None:
        """Calls that a middleware takes out leave the rest in place; new ones stand at the end if there were none."""
        other = ToolCall("c2", "wind")
        response = Response.from_parts([CALL, Reasoning(text="hm"), other, Text("so")])
        assert response.evolve(tool_calls=[other]).parts == (other, Reasoning(text="hm"), Text("so"))
        assert Response.from_parts([SEARCH]).evolve(tool_calls=[CALL]).parts == (SEARCH, CALL)

    def test_reasoning_added_to_an_order_without_it_comes_first(self) -> None:
        """Reasoning stands before what it led to."""
        response = Response.from_parts([Text("a"), SEARCH]).evolve(reasoning="hm")
        assert response.parts == (Reasoning(text="hm"), Text("a"), SEARCH)

    def test_a_changed_message(self) -> None:
        """A message whose content was changed keeps its other parts in place."""
        message = Message.assistant([Text("a"), SEARCH, Text("b"), CALL])
        assert attrs.evolve(message, content="c").parts == (Text("c"), SEARCH, CALL)

    @pytest.mark.parametrize("make", [Response.from_parts, Message.assistant])
    def test_values_that_are_no_parts(self, make: Any) -> None:
        """A value of another type is refused."""
        with pytest.raises(TypeError, match=r"expected .*Opaque.*, got a dict"):
            make([{"type": "text"}])

    def test_opaque_parts_count_in_comparisons(self) -> None:
        """An answer without them is another answer."""
        assert Response.from_parts([Text("a"), SEARCH]) != Response("a")
        assert Response.from_parts([Text("a"), SEARCH]) == Response.from_parts([Text("a"), SEARCH])
        assert Response("a") == Response("a")
        assert Response("a") != "a"

    def test_output(self) -> None:
        """Media, opaque parts and readable reasoning count as output; a signature alone does not."""
        assert Response(media=[PNG]).has_output
        assert Response.from_parts([SEARCH]).has_output
        assert not Response().has_output
        assert Chunk(parts=(PNG,)).has_output
        assert Chunk(parts=(SEARCH,)).has_output
        assert Chunk(parts=(Reasoning(text="Hm."),)).has_output
        assert not Chunk(parts=(Reasoning(signature="s"), Text("", raw={"a": 1}))).has_output


class TestStreams:
    def test_completed_reasoning_takes_the_place_of_what_was_streamed(self) -> None:
        """Signed blocks stand where their reasoning was streamed, between texts and calls."""
        first, second = Reasoning(text="First.", signature="S1"), Reasoning(text="Then.", signature="S2")
        call = ToolCallDelta(index=0, id="c1", name="tide", arguments='{"port": "Ostend"}')
        response = joined(
            Chunk(reasoning="Fir"),
            Chunk(reasoning="st."),
            Chunk("I look", parts=(first,)),
            Chunk(" it up."),
            Chunk(reasoning="Then."),
            Chunk(parts=(second,), tool_calls=(call,)),
        )
        assert response.parts == (first, Text("I look it up."), second, CALL)
        assert response.reasoning == "First.Then."

    def test_reasoning_completed_at_the_end_of_the_stream(self) -> None:
        """A service that signs only at the end does not move its reasoning there."""
        signed = Reasoning(text="Hm.", signature="S")
        response = joined(Chunk(reasoning="Hm."), Chunk("Yes"), Chunk(parts=(signed,), finish_reason="stop"))
        assert response.parts == (signed, Text("Yes"))
        assert response.order is None

    def test_completed_reasoning_that_was_not_streamed(self) -> None:
        """A provider may send reasoning as a whole block only."""
        signed = Reasoning(text="Hm.", signature="S")
        response = joined(Chunk(parts=(signed,)), Chunk("Yes"))
        assert (response.reasoning, response.parts) == ("Hm.", (signed, Text("Yes")))

    def test_reasoning_goes_on_after_text(self) -> None:
        """Text between two pieces of reasoning makes them two."""
        response = joined(Chunk(reasoning="a"), Chunk(reasoning="b"), Chunk("x"), Chunk(reasoning="c"))
        assert response.parts == (Reasoning(text="ab"), Text("x"), Reasoning(text="c"))

    def test_completed_texts(self) -> None:
        """An empty text completes the text before it, with the fields beside it."""
        response = joined(
            Chunk("a"), Chunk("b", parts=(Text(""),)), Chunk("c", parts=(Text("", raw={"cited": 1}),)), Chunk("d")
        )
        assert response.parts == (Text("a"), Text("b", raw={"cited": 1}), Text("cd"))

    def test_a_signature_without_text_keeps_its_place(self) -> None:
        """Fields beside an empty text are kept."""
        response = joined(
            Chunk(tool_calls=(ToolCallDelta(index=0, id="c", name="f"),)), Chunk(parts=(Text("", raw={"s": 1}),))
        )
        assert response.parts == (ToolCall("c", "f"), Text("", raw={"s": 1}))

    @pytest.mark.parametrize("part", [Text("secret"), CALL])
    def test_text_and_calls_are_no_parts_of_a_chunk(self, part: Part) -> None:
        """Text and tool calls in `parts` would bypass a guard, so they are refused."""
        with pytest.raises((TypeError, ValueError), match="a Chunk's parts: expected"):
            joined(Chunk(parts=(part,)))

    def test_details_add_up(self) -> None:
        """Tables are merged, lists appended, and other values replaced."""
        response = joined(
            Chunk("a", details={"logprobs": {"content": [1]}, "container": "x"}),
            Chunk("b", details={"logprobs": {"content": [2], "refusal": [3]}, "container": "y"}),
        )
        assert response.details == {"logprobs": {"content": [1, 2], "refusal": [3]}, "container": "y"}

    def test_details_of_a_response_do_not_grow(self) -> None:
        """A response that was asked for early keeps what it had, and the chunks keep theirs."""
        answer, first = Aggregator(), {"logprobs": {"content": [1]}}
        answer.add(Chunk("a", details=first))
        early = answer.response()
        answer.add(Chunk("b", details={"logprobs": {"content": [2]}}))
        assert early.details == first == {"logprobs": {"content": [1]}}
        assert answer.response().details == {"logprobs": {"content": [1, 2]}}

    def test_deep_details(self) -> None:
        """Details that a server nests deeply are kept; only the first levels are merged."""
        deep: dict[str, Any] = {}
        for _ in range(900):
            deep = {"a": deep}
        chunk = Chunk("x", details={"deep": deep, "list": [1]})
        details = joined(chunk, chunk).details
        assert details["list"] == [1, 1]
        for _ in range(900):
            deep, details = deep["a"], details.get("deep", details.get("a"))
        assert details is not None

    def test_fields_beside_a_call_add_up(self) -> None:
        """Fragments of a call may each bring fields beside it."""
        response = joined(
            Chunk(tool_calls=(ToolCallDelta(index=0, id="c", name="f", raw={"a": 1}),)),
            Chunk(tool_calls=(ToolCallDelta(index=0, arguments="{}", raw={"b": 2}),)),
        )
        assert response.tool_calls[0].raw == {"a": 1, "b": 2}


class TestJSON:
    @given(parts)
    def test_messages_survive(self, given_parts: list[Part]) -> None:
        """A message that was stored as JSON is the same message."""
        message = Message.assistant(given_parts)
        again = Message.from_dict(json.loads(json.dumps(message.to_dict())))
        assert again == message
        assert repr(again) == repr(message)

    @given(parts, st.none() | st.builds(Usage, input_tokens=st.integers(0, 9)), st.text())
    def test_responses_survive(self, given_parts: list[Part], usage: Usage | None, reason: str) -> None:
        """A response that was stored as JSON is the same response."""
        response = Response.from_parts(given_parts, usage=usage, finish_reason=reason or None)
        again = Response.from_dict(json.loads(json.dumps(response.to_dict())))
        assert (again, again.order, repr(again.parts)) == (response, response.order, repr(response.parts))

    @given(parts, st.integers(0, 2))
    def test_chunks_survive(self, given_parts: list[Part], number: int) -> None:
        """A chunk that was stored as JSON is the same chunk; it has only the fields that it sets."""
        response = Response.from_parts(given_parts, usage=Usage(input_tokens=3), details={"a": [None]})
        for chunk in as_chunks(response):
            both = attrs.evolve(chunk, alternatives=((number, chunk),), added=(Message.assistant(given_parts),))
            for each in (chunk, both):
                again = Chunk.from_dict(json.loads(json.dumps(each.to_dict())))
                assert (again, again.details, again.text_only) == (each, each.details, each.text_only)

    def test_all_fields_of_a_chunk_survive(self) -> None:
        """Also those that equality leaves out, and an empty mark."""
        delta = ToolCallDelta(index=0, id="", name="f", arguments="{}", signature="S", raw={"a": None})
        chunk = Chunk(
            "x",
            reasoning="hm",
            parts=(PNG, Reasoning(signature="S"), Text("", raw={"cited": True}), SEARCH),
            tool_calls=(delta, ToolCallDelta(arguments="}")),
            finish_reason="",
            raw_finish_reason="END",
            usage=Usage(),
            model="m",
            id="1",
            added=(),
            request_id="r",
            rate_limits={"x-ratelimit-limit": "3"},
            details={"citations": ["u"]},
        )
        again = Chunk.from_dict(json.loads(json.dumps(chunk.to_dict())))
        assert again == chunk
        assert repr(again) == repr(chunk)
        assert Chunk("x").to_dict() == {"text": "x"}
        assert Chunk().to_dict() == {}

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"text": 3}, "a chunk.text: expected a str, got 3"),
            ({"txt": "secret"}, "a chunk.txt: unknown field; did you mean 'text'?"),
            ({"text_only": True}, "a chunk.text_only: unknown field; did you mean 'text'?"),
            ({"usage": {"input": 1}}, "a chunk.usage.input: unknown field; did you mean 'input_tokens'?"),
            ({"added": "secret"}, "a chunk.added: expected a list, got a str"),
            ({"parts": [{"type": "secret"}]}, "a chunk.parts[0].type: expected one of"),
            ({"tool_calls": [{"index": "0"}]}, "a chunk.tool_calls[0].index: expected a whole number, got a str"),
            (
                {"alternatives": [[1, {"txt": ""}], [0]]},
                "a chunk.alternatives[1]: expected a pair of a number and a chunk",
            ),
            ({"alternatives": [[1, {"txt": "secret"}]]}, "a chunk.alternatives[0][1].txt: unknown field"),
        ],
        ids=str,
    )
    def test_mistakes_in_a_chunk(self, fields: dict[str, Any], message: str) -> None:
        """They are named with their path."""
        with pytest.raises(ValueError, match="a chunk") as caught:
            Chunk.from_dict(fields)
        assert str(caught.value).startswith(message)

    def test_all_fields_of_a_response_survive(self) -> None:
        """Also those that equality leaves out."""
        response = Response(
            "hi",
            reasoning="summary",
            reasoning_parts=[Reasoning(signature="S")],
            finish_reason="stop",
            raw_finish_reason="end_turn",
            model="m",
            id="1",
            request_id="r",
            elapsed=0.5,
            rate_limits={"x-ratelimit-limit": "3"},
            details={"citations": ["u"]},
            stats=StreamStats(chunks=2, gap_p50=0.1),
            alternatives=[Response("other", tool_calls=[CALL])],
            raw={"choices": []},
            parsed={"a": [1]},
        )
        again = Response.from_dict(json.loads(json.dumps(response.to_dict())))
        assert again == response
        assert again.to_dict() == response.to_dict()
        assert (again.raw, again.parsed, again.elapsed, again.stats) == (
            {"choices": []},
            {"a": [1]},
            0.5,
            response.stats,
        )

    def test_values_that_are_not_json_are_left_out(self) -> None:
        """`parsed` and `raw` may be objects of the user's or of a library."""
        assert Response("hi", parsed=object(), raw={"a": object()}).to_dict() == {"text": "hi"}

    def test_values_that_json_cannot_hold(self) -> None:
        """Values nested too deeply or in a circle are an error that says so; `raw` is left out."""
        deep: list[Any] = []
        for _ in range(5_000):
            deep = [deep]
        circle: dict[str, Any] = {}
        circle["self"] = circle
        for raw in ({"deep": deep}, circle):
            with pytest.raises(TypeError, match="they are nested too deeply"):
                Message.assistant([Opaque("gemini", raw)]).to_dict()
            assert Response("hi", raw=raw).to_dict() == {"text": "hi"}
        with pytest.raises(TypeError, match="expected JSON values: got an object"):
            Message.assistant([Opaque("gemini", {"a": object()})]).to_dict()

    def test_plain_messages_are_openais(self) -> None:
        """Text alone is in the form that everybody has."""
        assert Message.user("hi").to_dict() == {"role": "user", "content": "hi"}
        assert Message.tool("18 °C", CALL, is_error=True).to_dict() == {
            "role": "tool",
            "content": "18 °C",
            "tool_call_id": "c1",
            "name": "tide",
            "is_error": True,
        }

    @pytest.mark.parametrize(
        ("given_fields", "message"),
        [
            ({"role": "developer", "content": "Be brief."}, Message.system("Be brief.")),
            ({"role": "user", "content": "hi", "name": "Ada"}, Message("user", "hi", name="Ada")),
            (
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What?"},
                        {"type": "image_url", "image_url": {"url": "https://x.test/a.png", "detail": "low"}},
                        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
                        {
                            "type": "file",
                            "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERg=="},
                        },
                    ],
                },
                Message.user(
                    [
                        "What?",
                        Image(url="https://x.test/a.png", detail="low"),
                        Audio(data=b"RIFF", media_type="audio/wav"),
                        Document(url="data:application/pdf;base64,JVBERg==", name="a.pdf"),
                    ]
                ),
            ),
            (
                {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "annotations": [],
                    "audio": None,
                    "function_call": None,
                    "reasoning_content": "Hm.",
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "tide", "arguments": '{"port": "Ostend"}'},
                        },
                        {"id": "c2", "type": "custom", "custom": {"name": "sql", "input": "SELECT 1"}},
                    ],
                },
                Message.assistant(
                    [
                        Reasoning(text="Hm.", raw={"reasoning_content": "Hm."}),
                        CALL,
                        ToolCall("c2", "sql", raw_arguments="SELECT 1", raw={"type": "custom"}),
                    ]
                ),
            ),
            (
                {"role": "assistant", "content": None, "refusal": "No."},
                Message.assistant([Text("No.", raw={"type": "refusal"})]),
            ),
            (
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}], "signature": "s"},
                        {"type": "text", "text": "See:"},
                    ],
                    "extra_content": {"google": {"thought_signature": "t"}},
                    "images": [{"type": "image_url", "index": 0, "image_url": {"url": "https://x.test/a.png"}}],
                },
                Message.assistant(
                    [
                        Reasoning(
                            text="Hm.",
                            signature="s",
                            raw={"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}], "signature": "s"},
                        ),
                        Text("See:", raw={"extra_content": {"google": {"thought_signature": "t"}}}),
                        Image(url="https://x.test/a.png", raw={"images": {"type": "image_url", "index": 0}}),
                    ]
                ),
            ),
            ({"role": "tool", "tool_call_id": "c1", "content": "4"}, Message.tool("4", "c1")),
            (
                {"role": "function", "name": "tide", "content": "4"},
                Message("tool", "4", name="tide", tool_call_id="call_tide"),
            ),
        ],
    )
    def test_openais_shape(self, given_fields: dict[str, Any], message: Message) -> None:
        """Messages as OpenAI's clients write them are understood."""
        assert Message.from_dict(given_fields) == message

    @pytest.mark.parametrize(
        ("given_fields", "error"),
        [
            ({"content": "x"}, "a message.role: expected one of system, .*, function, got nothing"),
            (
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]},
                r"^a message.content\[0\]: an Image's url: .* path",
            ),
            (
                {"role": "assistant", "images": [{"image_url": {"url": "a.png"}}]},
                r"^a message.images\[0\]: an Image's url: .* path",
            ),
            ({"role": 3}, "a message.role: expected one of system, .*, got an int"),
            ({"role": "usr"}, "a message.role: expected one of system, user, assistant, .*, got 'usr'"),
            ({"role": "user", "content": 3}, "a message.content: expected a str or a list of parts, got 3"),
            ({"role": "user", "contents": "x"}, "a message.contents: unknown field; did you mean 'content'"),
            ({"role": "user", "content": [3]}, r"content\[0\]: expected a mapping, got 3"),
            ({"role": "user", "content": [{"type": "img"}]}, r"content\[0\].type: expected one of text, .*, got 'img'"),
            ({"role": "user", "content": [{"type": "text"}]}, r"content\[0\].text: expected a str, got nothing"),
            (
                {"role": "user", "content": [{"type": "image", "data": "*", "media_type": "image/png"}]},
                r"content\[0\].data: expected base64, got other text",
            ),
            (
                {"role": "user", "content": [{"type": "image", "url": "a.png"}]},
                r"content\[0\]: an Image's url: .* path",
            ),
            ({"role": "user", "content": [{"type": "reasoning", "text": "x"}]}, "only from an assistant"),
            ({"role": "assistant", "tool_calls": [{"id": "1"}]}, r"tool_calls\[0\].function: expected a mapping"),
            ({"role": "tool", "is_error": 1}, "is_error: expected true or false, got 1"),
            (3, "a message: expected a mapping, got 3"),
        ],
    )
    def test_bad_messages(self, given_fields: Any, error: str) -> None:
        """An error names the path of the fault."""
        with pytest.raises(ValueError, match=error):
            Message.from_dict(given_fields)

    @pytest.mark.parametrize(
        ("given_fields", "error"),
        [
            ({"text": 3}, "a response.text: expected a str, got 3"),
            ({"txt": "x"}, "a response.txt: unknown field; did you mean 'text'"),
            ({"usage": {"input": 3}}, "a response.usage.input: unknown field; did you mean 'input_tokens'"),
            ({"usage": {"input_tokens": "3"}}, "a response.usage.input_tokens: expected a number, got '3'"),
            ({"alternatives": [{"id": 3}]}, r"a response.alternatives\[0\].id: expected a str, got 3"),
        ],
    )
    def test_bad_responses(self, given_fields: Any, error: str) -> None:
        """An error names the path of the fault."""
        with pytest.raises(ValueError, match=error):
            Response.from_dict(given_fields)


class TestMedia:
    @pytest.mark.parametrize(
        ("kind", "name", "media_type"),
        [
            (Image, "a.png", "image/png"),
            (Audio, "a.mp3", "audio/mpeg"),
            (Audio, "a.wav", "audio/wav"),
            (Document, "a.pdf", "application/pdf"),
        ],
    )
    def test_from_a_file(self, tmp_path: Any, kind: Any, name: str, media_type: str) -> None:
        """The media type follows from the suffix."""
        path = tmp_path / name
        path.write_bytes(b"bytes")
        named = {"name": name} if kind is Document else {}
        assert kind.from_file(path) == kind(data=b"bytes", media_type=media_type, **named)
        assert kind.from_file(str(path), media_type="x/y").media_type == "x/y"

    def test_from_a_file_with_more(self, tmp_path: Any) -> None:
        """Other fields are passed on."""
        path = tmp_path / "report.pdf"
        path.write_bytes(b"%PDF")
        assert Document.from_file(path, name="Report").name == "Report"

    @pytest.mark.parametrize(
        ("make", "error"),
        [
            (lambda: Image.from_file("a.wav"), "Image.from_file: expected an image, got audio/wav; use Audio"),
            (lambda: Image.from_file("a.pdf"), "expected an image, got application/pdf; use Document.from_file"),
            (lambda: Audio.from_file("a.txt"), "expected an audio, got text/plain; use Document.from_file"),
            (lambda: Image(data=b"", media_type="png"), "an Image's media_type: expected a media type, .*, got 'png'"),
            (lambda: Image(data=b"", media_type=""), "an Image's media_type: expected a media type, .*, got ''"),
            (lambda: Audio.from_file("a.png"), "got image/png; use Image.from_file"),
            (lambda: Document.from_file("a.unknown"), "cannot tell the media type of 'a.unknown'; pass media_type="),
            (lambda: Image(url="cat.png"), r"an Image's url: .*, got a path; read a file with Image.from_file\(path\)"),
            (lambda: Audio(url="/home/a.wav"), "an Audio's url: .*, got a path"),
            (lambda: Document(url="C:\\a.pdf"), "a Document's url: .*, got a path"),
            (lambda: Image(url="file:///a.png"), "got a path"),
            (lambda: Image(url=""), "got an empty str"),
            (lambda: Audio(data=b""), "an Audio with data= needs media_type=, e.g. 'audio/wav'"),
        ],
    )
    def test_bad_media(self, make: Any, error: str) -> None:
        """A path is no URL, and a kind of file belongs to its own class."""
        with pytest.raises(ValueError, match=error):
            make()

    def test_a_missing_file(self) -> None:
        """The operating system's own error passes."""
        with pytest.raises(FileNotFoundError):
            Image.from_file("missing.png")

    def test_urls_of_services(self) -> None:
        """Other schemes may be known to a service."""
        assert Image(url="gs://bucket/a.png").url == "gs://bucket/a.png"
        assert Document(url="data:text/plain,hi").url == "data:text/plain,hi"


_pieces = st.sampled_from(
    [
        Chunk("a"),
        Chunk(" b"),
        Chunk(""),
        Chunk(reasoning="hm"),
        Chunk("c", reasoning="so"),
        Chunk(parts=[Reasoning(text="hm", signature="S")]),
        Chunk(parts=[Opaque("anthropic", {"type": "x"})]),
        Chunk(parts=[Text("", raw={"citations": [1]})]),
        Chunk(tool_calls=[ToolCallDelta(index=0, id="c1", name="tide", arguments="{")]),
        Chunk(tool_calls=[ToolCallDelta(index=0, arguments="}")]),
    ]
)


@given(st.lists(st.tuples(_pieces, st.booleans()), max_size=12))
def test_texts_that_are_joined_on_the_way(pieces):
    """The response is the same, with each part in its place."""
    plain, joined = Aggregator(), Aggregator()
    for chunk, join in pieces:
        plain.add(chunk)
        joined.add(chunk)
        if join:
            joined.join_texts()
        assert joined.response() == plain.response()
        assert joined.response().parts == plain.response().parts
