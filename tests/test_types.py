"""The data classes: short forms, refused values, and chunks that add up to responses."""

from __future__ import annotations

import json
import re

import attrs
import pytest
from hypothesis import given, settings, strategies as st

from fluxibly.aggregate import Aggregator, as_chunk, as_chunks
from fluxibly.types import (
    CallRecord,
    Chunk,
    Image,
    Message,
    Opaque,
    Reasoning,
    Request,
    Response,
    StreamStats,
    Text,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
)

REQUEST = Request(model="m", messages="hi")
CALL = ToolCall("call-1", "look")


def joined(*chunks):
    answer = Aggregator()
    for chunk in chunks:
        answer.add(chunk)
    return answer.response()


class TestMessages:
    def test_short_forms(self):
        """Each role has a constructor."""
        assert Message.system("be brief").role == "system"
        assert Message.user("hi").content == (Text("hi"),)
        assert Message.assistant("yes").role == "assistant"
        assert Message.tool("42", "call-1", name="answer").tool_call_id == "call-1"
        call = ToolCall("call-2", "look", {"at": 1})
        assert attrs.asdict(Message.tool("42", call), recurse=False)["name"] == "look"

    def test_parts(self):
        """Text and images stay in order, and `text` joins all texts."""
        image = Image(data=b"png", media_type="image/png")
        message = Message.user(["what is ", image, Text("this?")])
        assert message.content == (Text("what is "), image, Text("this?"))
        assert message.text == "what is this?"
        assert "png'" not in repr(image).replace("image/png", "")

    def test_an_answer_goes_back(self):
        """An assistant's message from a response keeps the tool calls and the reasoning that must be sent back."""
        response = Response("a", tool_calls=[ToolCall("1", "f")], reasoning_parts=[Reasoning(text="hm", signature="s")])
        message = Message.assistant(response)
        assert (message.text, message.tool_calls, message.reasoning) == (
            "a",
            response.tool_calls,
            response.reasoning_parts,
        )

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (
                lambda: Message("robot", "hi"),
                ValueError,
                "role: expected one of system, user, assistant, tool, got 'robot'",
            ),
            (lambda: Message.user(3), TypeError, "content: expected a str, Text, Image, Audio, .*, got an int"),
            (lambda: Message.user(["a", 3]), TypeError, "expected a str, .* or Document as a part, got an int"),
            (Image, ValueError, "expected either url= or data=, got neither"),
            (lambda: Image(url="u", data=b"d"), ValueError, "expected either url= or data=, got both"),
            (lambda: Image(data=b"d"), ValueError, "needs media_type="),
            (lambda: Image(url=3), TypeError, "an Image's url: expected a str, got an int"),
            (lambda: Image(data="cG5n", media_type="image/png"), TypeError, "bytes, got a str; decode base64 first"),
            (lambda: Message.user({"type": "text"}), TypeError, "content: expected a str, .*, got a dict"),
            (lambda: Message.tool({"degrees": 20}, "call-1"), TypeError, "content: expected a str, .*, got a dict"),
            (lambda: Message.user(b"hi"), TypeError, "content: expected a str, .*, got a bytes"),
            (lambda: Message.tool("20", 1), TypeError, "the ToolCall that it answers, or its id, got an int"),
            (lambda: Message.assistant("", tool_calls=3), TypeError, "a sequence of ToolCall, got an int"),
            (
                lambda: Message.assistant("", tool_calls=[{"id": "1"}]),
                TypeError,
                "tool_calls: expected a sequence of ToolCall, got a dict in the sequence",
            ),
            (lambda: Message("assistant", reasoning=["hm"]), TypeError, "a sequence of Reasoning, got a str"),
            (lambda: Request(model="m", messages=""), ValueError, "the prompt is empty"),
            (
                lambda: Request(model="m", messages="hi", stop=5),
                TypeError,
                "stop: expected a str or a sequence .*, got an int",
            ),
            (
                lambda: Request(model="m", messages="hi", stop=["a", 5]),
                TypeError,
                "stop: .*, got an int in the sequence",
            ),
            (lambda: Request(model="m", messages="hi").evolve(stop=0), TypeError, "stop: expected a str or a sequence"),
            (
                lambda: Request(model="m", messages="hi", tools=3),
                TypeError,
                "tools: expected a sequence of Tool .*, got an int",
            ),
            (lambda: Request(model="m", messages="hi", tools=Tool("a")), TypeError, "tools: expected .*, got a Tool"),
            (
                lambda: Request(model="m", messages="hi", tools={"name": "a"}),
                TypeError,
                "tools: expected .*, got a dict",
            ),
            (lambda: Request(model="m", messages=[]), ValueError, "the prompt has no messages"),
            (lambda: Request(model="m", messages=3), TypeError, "the prompt: expected a str or a sequence of Message"),
            (
                lambda: Request(model="m", messages=None),
                TypeError,
                "the prompt: expected a str or a sequence of Message, got None",
            ),
            (
                lambda: Request(model="m", messages=["hi"]),
                TypeError,
                r"a str in the sequence; write Message.user",
            ),
            (
                lambda: Request(model="m", messages={"a": 1}),
                ValueError,
                r"messages\[0\].role: expected one of .*, got nothing",
            ),
            (lambda: Tool(len), TypeError, "a Tool's name: expected a str, got a builtin"),
            (lambda: Tool("f", "", "{}"), TypeError, r"parameters: expected a JSON Schema \(a mapping\), got a str"),
            (lambda: Request(model="m", messages="hi", tools=[3]), TypeError, "a tool: expected a Tool or a mapping"),
            (lambda: Request(model="m", messages="hi", tools=[{}]), ValueError, "needs a 'name'"),
            (
                lambda: Request(model="m", messages="hi").evolve(temp=1),
                TypeError,
                "a Request has no 'temp'; it has model, ",
            ),
            (lambda: Response("x").evolve(txt="y"), TypeError, "a Response has no 'txt'"),
        ],
    )
    def test_refusals(self, make, error, message):
        """A wrong value is refused when the object is made."""
        with pytest.raises(error, match=message):
            make()

    @pytest.mark.parametrize(
        "messages",
        [
            Message.user(""),
            [Message.user([])],
            [Message.user(["", Text("")])],
            [Message.system("be brief"), Message.user("")],
            [Message.user("hi"), Message.assistant("hello"), Message.user("")],
            [Message.system("")],
            [Message.assistant("")],
        ],
        ids=str,
    )
    def test_an_empty_prompt(self, messages):
        """A prompt is empty if its last message is an empty message of a user, or if no message has content."""
        for make in (lambda: Request(model="m", messages=messages), lambda: REQUEST.evolve(messages=messages)):
            with pytest.raises(ValueError, match="the prompt is empty") as caught:
                make()
            assert str(caught.value) == "the prompt is empty; give a non-empty string or a sequence of Message"

    @pytest.mark.parametrize(
        "messages",
        [
            [Message.user(Image(url="https://x.org/a.png"))],
            [Message.user(""), Message.assistant("How can I help?"), Message.user("hi")],
            [Message.user("hi"), Message.assistant("", tool_calls=[CALL])],
            [Message.user("hi"), Message.assistant("", tool_calls=[CALL]), Message.tool("", CALL)],
            [Message("assistant", reasoning=[Reasoning(signature="s")])],
            [Message.system("say hi")],
        ],
        ids=str,
    )
    def test_a_prompt_without_much_text(self, messages):
        """Images, tool calls, their empty results and signed reasoning count as content."""
        assert Request(model="m", messages=messages).messages == tuple(messages)


class TestToolCalls:
    def test_arguments_both_ways(self):
        """Each form of the arguments is derived from the other."""
        assert ToolCall("1", "f", {"a": "ü"}).raw_arguments == '{"a": "ü"}'
        assert ToolCall("1", "f", raw_arguments='{"a": 1}').arguments == {"a": 1}
        assert ToolCall("1", "f", raw_arguments="  ").error is None

    @pytest.mark.parametrize(
        ("raw", "error"),
        [
            ("{", "not JSON"),
            ("[1]", "expected a JSON object, got a list"),
            ("[" * 100_000, "nested too deeply|not JSON"),
        ],
        ids=["cut", "list", "deep"],
    )
    def test_arguments_that_are_not_an_object(self, raw, error):
        """The text stays unchanged, and `error` says what is wrong with it."""
        call = ToolCall("1", "f", raw_arguments=raw)
        assert call.arguments == {}
        assert call.raw_arguments == raw
        assert re.search(error, call.error)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: ToolCall("1", "f", '{"a": 1}'),
                "arguments: expected a mapping, got a str; pass text as raw_arguments=",
            ),
            (
                lambda: ToolCall("1", "f", raw_arguments={"a": 1}),
                "raw_arguments: expected a str, got a dict; pass a mapping as arguments=",
            ),
        ],
    )
    def test_arguments_in_the_wrong_place(self, make, message):
        """Text as `arguments` and a mapping as `raw_arguments` are refused."""
        with pytest.raises(TypeError, match=message):
            make()

    def test_tools_of_mappings(self):
        """Mappings in OpenAI's and in Anthropic's form are accepted as tools."""
        schema = {"type": "object", "properties": {"a": {}}}
        request = Request(
            model="m",
            messages="hi",
            tools=[
                {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}},
                {"name": "g", "description": "d", "input_schema": schema},
                Tool("h"),
            ],
        )
        assert request.tools == (Tool("f", "", schema, strict=True), Tool("g", "d", schema), Tool("h"))


class TestRequests:
    def test_evolve_shares_the_record(self):
        """`evolve` shares the call's record and converts the changes."""
        request = Request(model="m", messages="hi", stop="end")
        other = request.evolve(messages="ho", temperature=0.5, stop=["a", "b"])
        assert other.call is request.call
        assert other.messages == (Message.user("ho"),)
        assert (other.stop, other.temperature, other.model) == (("a", "b"), 0.5, "m")
        assert (request.temperature, request.stop) == (None, ("end",))

    def test_requests_cannot_be_changed(self):
        """Requests, responses and messages are immutable."""
        for thing in Request(model="m", messages="hi"), Response("x"), Message.user("hi"):
            with pytest.raises(attrs.exceptions.FrozenInstanceError):
                thing.model = "other"

    def test_prompt_length(self):
        """`prompt_length` counts the characters of all texts."""
        messages = [Message.system("abc"), Message.user(["de", Image(url="http://x"), "f"])]
        assert Request(model="m", messages=messages).prompt_length == 6

    def test_records_are_apart(self):
        """The records of two calls share no data."""
        one, two = CallRecord(), CallRecord()
        one.notes["a"] = 1
        one.timings["b"] = 2.0
        assert two.notes == {}
        assert two.timings == {}


class TestNumbers:
    def test_usage(self):
        """The total is known if either count is known."""
        assert Usage().total_tokens is None
        assert Usage(output_tokens=3).total_tokens == 3
        assert Usage(input_tokens=2, output_tokens=3).total_tokens == 5

    def test_stream_stats(self):
        """Rates are None if no time passed or no tokens were counted."""
        stats = StreamStats(chunks=4, characters=20, streaming_time=2.0, tokens=6)
        assert stats.average_chunk_size == 5.0
        assert stats.characters_per_second == 10.0
        assert stats.tokens_per_second == 3.0
        empty = StreamStats()
        assert (empty.average_chunk_size, empty.characters_per_second, empty.tokens_per_second) == (0.0, None, None)
        assert StreamStats(streaming_time=1.0).tokens_per_second is None


tool_calls = st.lists(
    st.builds(
        ToolCall,
        st.uuids().map(str),
        st.text(min_size=1),
        st.dictionaries(st.text(), st.integers() | st.text(), min_size=1),
        signature=st.none() | st.text(min_size=1),
    ),
    max_size=3,
    unique_by=lambda call: call.id,
)
flat_responses = st.builds(
    Response,
    st.text(),
    tool_calls=tool_calls,
    reasoning=st.text(),
    finish_reason=st.sampled_from([None, "stop", "tool_call"]),
    raw_finish_reason=st.none() | st.text(min_size=1),
    usage=st.none() | st.builds(Usage, input_tokens=st.integers(0)),
    model=st.none() | st.text(min_size=1),
    id=st.none() | st.text(min_size=1),
)
responses = st.builds(
    lambda one, others: one.evolve(alternatives=others), flat_responses, st.lists(flat_responses, max_size=2)
)


class TestAggregation:
    @settings(deadline=None)
    @given(responses)
    def test_a_response_as_one_chunk(self, response):
        """A response that is turned into a chunk and aggregated again is the same response."""
        assert joined(as_chunk(response)) == response

    @settings(deadline=None)
    @given(st.lists(st.text()), st.lists(st.text()))
    def test_texts_add_up(self, texts, reasoning):
        """Texts and reasoning are each joined in order, whatever chunks lie between."""
        response = joined(*map(Chunk, texts), Chunk(), *(Chunk(reasoning=r) for r in reasoning))
        assert response.text == "".join(texts)
        assert response.reasoning == "".join(reasoning)

    @settings(deadline=None)
    @given(st.data())
    def test_tool_calls_in_fragments(self, data):
        """Tool calls that are cut anywhere and interleaved by index are joined again."""
        calls = data.draw(st.lists(st.text(alphabet="{}a", max_size=5), min_size=1, max_size=3))
        pieces = [
            [ToolCallDelta(index=n, id=f"c{n}", name="f"), *(ToolCallDelta(index=n, arguments=x) for x in text)]
            for n, text in enumerate(calls)
        ]
        chunks = []
        while any(pieces):
            chosen = data.draw(st.sampled_from([p for p in pieces if p]))
            chunks.append(Chunk(tool_calls=(chosen.pop(0),)))
        got = {call.id: call.raw_arguments for call in joined(*chunks).tool_calls}
        assert got == {f"c{n}": text or "{}" for n, text in enumerate(calls)}

    def test_fragments_without_an_index(self):
        """A fragment without an index continues the call with its id, else the last call."""
        response = joined(
            Chunk(tool_calls=(ToolCallDelta(id="a", name="f", arguments="{"), ToolCallDelta(id="b", name="g"))),
            Chunk(tool_calls=(ToolCallDelta(id="a", arguments="}"), ToolCallDelta(arguments="{ }"))),
        )
        assert [(c.id, c.raw_arguments) for c in response.tool_calls] == [("a", "{}"), ("b", "{ }")]

    def test_calls_that_are_all_numbered_0(self):
        """A fragment with a new id and a name begins a new call, whatever its index."""
        response = joined(
            Chunk(tool_calls=(ToolCallDelta(index=0, id="a", name="f", arguments="{}"),)),
            Chunk(tool_calls=(ToolCallDelta(index=0, id="b", name="g", arguments="{}"),)),
        )
        assert [c.name for c in response.tool_calls] == ["f", "g"]

    def test_the_last_word_counts(self):
        """The last finish reason, usage, model and id count; a later empty value changes nothing."""
        response = joined(
            Chunk(finish_reason="length", model="a", usage=Usage(input_tokens=1)),
            Chunk(finish_reason="stop", usage=Usage(input_tokens=2), raw_finish_reason="END", id="i"),
            Chunk("x"),
        )
        assert response == Response(
            "x", finish_reason="stop", raw_finish_reason="END", model="a", usage=Usage(input_tokens=2), id="i"
        )

    def test_choices(self):
        """The pieces of each choice are joined separately."""
        response = joined(
            Chunk("a", alternatives=((1, Chunk("x")),)), Chunk("b", alternatives=((2, Chunk("z")), (1, Chunk("y"))))
        )
        assert response.text == "ab"
        assert [other.text for other in response.alternatives] == ["xy", "z"]

    @pytest.mark.parametrize(
        ("chunk", "output"),
        [
            (Chunk("a"), True),
            (Chunk(reasoning="a"), True),
            (Chunk(tool_calls=(ToolCallDelta(index=0),)), True),
            (Chunk(parts=(Image(data=b"png", media_type="image/png"),)), True),
            (Chunk(parts=(Reasoning(text="a", signature="s"),)), True),
            (Chunk(alternatives=((1, Chunk("a")),)), True),
            (Chunk(finish_reason="stop", usage=Usage(), model="m", id="i"), False),
            (Chunk(parts=(Reasoning(signature="s"), Text("", raw={"cited": True}))), False),
            (Chunk(alternatives=((1, Chunk(finish_reason="stop")),)), False),
        ],
    )
    def test_what_output_is(self, chunk, output):
        """Text, reasoning, media and parts of tool calls are output, of any choice; metadata is not."""
        assert chunk.has_output == output
        answer = Aggregator()
        answer.add(chunk)
        assert answer.has_output == answer.response().has_output == output

    def test_str(self):
        """The str of a chunk or a response is its text."""
        assert str(Chunk("a")) == str(Response("a")) == "a"


TURN = (Message.assistant("let me look", tool_calls=[CALL]), Message.tool("42", CALL))
messages = st.lists(
    st.builds(Message.user, st.text(min_size=1))
    | st.builds(lambda text, calls: Message.assistant(text, tool_calls=calls), st.text(min_size=1), tool_calls),
    max_size=3,
)
parts = st.lists(
    st.builds(Text, st.text(min_size=1))
    | st.builds(
        lambda text, signature: Reasoning(text=text, signature=signature), st.text(min_size=1), st.text(min_size=1)
    )
    | st.builds(lambda number: Opaque("search", {"id": number}), st.integers())
    | tool_calls.filter(bool).map(lambda calls: calls[0]),
    min_size=1,
    max_size=5,
)
ordered_responses = st.builds(lambda given, added: Response.from_parts(given, added=added), parts, messages)


class TestMarks:
    def test_a_mark_is_no_output(self):
        """A mark alone says nothing of an answer, but it is more than text."""
        for mark in (Chunk(added=()), Chunk(added=TURN)):
            assert not mark.has_output
            assert not mark.text_only
        assert Chunk("a", added=TURN).has_output
        assert Chunk("a").text_only

    def test_a_message_begins(self):
        """After a mark with messages, the response is that of the new message, after all messages of the marks."""
        first = Chunk("let me look", usage=Usage(output_tokens=3), finish_reason="tool_call", model="m-1")
        response = joined(first, Chunk(added=TURN), Chunk("it is "), Chunk(added=(Message.user("well?"),)), Chunk("42"))
        assert response == Response("42", added=(*TURN, Message.user("well?")))

    def test_a_message_goes_on(self):
        """An empty mark changes nothing but the end: what follows is of the same message."""
        first = Chunk(
            "one ", usage=Usage(output_tokens=3), finish_reason="length", raw_finish_reason="MAX", model="m-1"
        )
        response = joined(first, Chunk(added=()), Chunk("two"))
        assert response == Response("one two", usage=Usage(output_tokens=3), model="m-1")
        assert joined(first, Chunk(added=()), Chunk(finish_reason="stop")).finish_reason == "stop"

    def test_text_beside_a_mark(self):
        """It is the beginning of the new message."""
        assert joined(Chunk("old"), Chunk("new", added=TURN)) == Response("new", added=TURN)

    def test_reasoning_and_calls_stay_in_their_message(self):
        """A fragment after a mark continues nothing before it."""
        response = joined(
            Chunk(reasoning="hm", tool_calls=(ToolCallDelta(index=0, id="a", name="f", arguments="{"),)),
            Chunk(added=TURN),
            Chunk(parts=(Reasoning(text="so", signature="s"),)),
            Chunk(tool_calls=(ToolCallDelta(index=0, id="b", name="g", arguments="{}"),)),
        )
        assert response.reasoning_parts == (Reasoning(text="so", signature="s"),)
        assert [(each.id, each.raw_arguments) for each in response.tool_calls] == [("b", "{}")]

    @settings(deadline=None)
    @given(responses, messages)
    def test_a_response_with_messages_as_one_chunk(self, response, added):
        """The chunk has the messages as its mark, and none if there are none."""
        response = response.evolve(added=added)
        assert as_chunk(response).added == (tuple(added) or None)
        assert joined(as_chunk(response)) == joined(*as_chunks(response)) == response

    @settings(deadline=None)
    @given(ordered_responses)
    def test_a_response_in_its_order(self, response):
        """Parts in an order of their own become several chunks, of which the first has the mark."""
        chunks = as_chunks(response)
        assert [chunk.added for chunk in chunks[1:]] == [None] * (len(chunks) - 1)
        again = joined(*chunks)
        assert again == response
        assert again.parts == response.parts

    @settings(deadline=None)
    @given(responses, messages)
    def test_json(self, response, added):
        """The messages survive JSON, and a response without any does not mention them."""
        response = response.evolve(added=added)
        found = json.loads(json.dumps(response.to_dict()))
        assert ("added" in found) == bool(added)
        assert Response.from_dict(found) == response

    def test_who_answered_and_what_it_cost_survive_json(self):
        """`provider` and `total_usage` are kept too, and are no part of the comparison."""
        response = Response("42", provider="anthropic", total_usage=Usage(input_tokens=3, cached_tokens=1), added=TURN)
        found = response.to_dict()
        assert found["provider"] == "anthropic"
        assert found["total_usage"] == {"input_tokens": 3, "cached_tokens": 1}
        again = Response.from_dict(json.loads(json.dumps(found)))
        assert (again.provider, again.total_usage) == ("anthropic", response.total_usage)
        assert response == Response("42", added=TURN)
        assert response != Response("42")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"added": "no"}, "added: expected a list"),
            ({"added": [{"role": "robot", "content": "hi"}]}, "role: expected one of"),
            ({"provider": 3}, "provider: expected"),
            ({"total_usage": [1]}, "total_usage: expected"),
            ({"total_usage": {"input_tokens": "3"}}, "total_usage.input_tokens: expected"),
        ],
    )
    def test_wrong_json(self, given, message):
        """The error names the field."""
        with pytest.raises(ValueError, match=message):
            Response.from_dict({"text": "42", **given})

    def test_any_sequence_of_messages(self):
        """`added` is a tuple, whatever it was given as."""
        assert Response("42", added=[*TURN]).added == Response("42").evolve(added=iter(TURN)).added == TURN


class TestSums:
    def test_usages(self):
        """A count is summed over the usages that have it; nothing is made up."""
        assert Usage.sum([]) is None
        assert Usage.sum([None, None]) is None
        one = Usage(input_tokens=1, output_tokens=2, reasoning_tokens=1)
        assert Usage.sum([None, one]) is one
        assert Usage.sum([one, None, Usage(input_tokens=10, cached_tokens=0)]) == Usage(
            input_tokens=11, output_tokens=2, reasoning_tokens=1, cached_tokens=0
        )


def test_a_requests_repr_has_no_secrets():
    """The repr hides the values of headers and of secrets in `extra`, and shows every other value."""
    request = Request(
        model="m",
        messages="hi",
        headers={"Authorization": "Bearer sk-one", "X-Team": "sk-two"},
        extra={"api_key": "sk-three", "nested": [{"auth_token": "sk-four"}], "max_tokens": 5, "user": "me"},
    )
    shown = repr(request)
    assert "sk-" not in shown
    assert "'Authorization': '***'" in shown
    assert "'max_tokens': 5, 'user': 'me'" in shown
    assert request.headers["X-Team"] == "sk-two"
