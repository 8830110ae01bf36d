"""`ExtractReasoning`: reasoning in the text is shown apart, whatever the cuts, and whole and streamed alike."""

from __future__ import annotations

import pickle
import threading

import pytest
from hypothesis import given, settings, strategies as st
from support.calling import REQUEST, call, scripted
from support.powers import going_on, tools

from fluxibly.errors import ConfigError, ServerError, StreamInterrupted
from fluxibly.middleware import ExtractReasoning, Fallback, Retry, Validation
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.registry import make_middleware
from fluxibly.testing import Cut, ScriptedProvider, check_middleware
from fluxibly.testing.modes import MODES, run_async
from fluxibly.types import (
    Chunk,
    Image,
    Message,
    Opaque,
    Reasoning,
    Request,
    Response,
    Restart,
    Text,
    ToolCallDelta,
    Usage,
)

EXTRACT = ExtractReasoning()
WHOLE = MODES[0]
STREAM = MODES[len(MODES) // 2]
PNG = Image(data=b"png", media_type="image/png")
CALL = ToolCallDelta(index=0, id="c1", name="clock", arguments="{}")


def split(*pieces, tag="think", mode=STREAM):
    """Return the text and the reasoning of an answer."""
    response = call(mode, ExtractReasoning(tag=tag), list(pieces)).response
    return response.text, response.reasoning


def shown(made):
    """Return the reasoning and the text of each chunk that a consumer got."""
    return [(event.reasoning, event.text) for event in made.ran.events]


class TestInAllModes:
    @pytest.mark.parametrize(
        ("whole", "text", "thought"),
        [
            ("<think>Hm.</think>Paris.", "Paris.", "Hm."),
            ("\n <think>\nHm.\n</think>\n\nParis.", "Paris.", "Hm.\n"),
            ("<think></think>Paris.", "Paris.", ""),
            ("<think>Hm, cut", "", "Hm, cut"),
            ("<think>cut</thi", "", "cut</thi"),
            ("<think>a<b></think>c", "c", "a<b>"),
            ("<think>a</think>b<think>c</think>d", "b<think>c</think>d", "a"),
            ("a <think>b</think>", "a <think>b</think>", ""),
            ("Hm.</think>Paris.", "Hm.</think>Paris.", ""),
            ("<thinker>Paris", "<thinker>Paris", ""),
            ("<THINK>a</THINK>", "<THINK>a</THINK>", ""),
            ("<thi", "<thi", ""),
            ("  ", "  ", ""),
            ("", "", ""),
            (" " * 101 + "<think>a", " " * 101 + "<think>a", ""),
        ],
    )
    def test_what_begins_an_answer_is_reasoning(self, mode, whole, text, thought):
        """A tag at the beginning, and nothing that only looks like it; whole, and by the character."""
        for script in ([whole], list(whole)):
            response = call(mode, EXTRACT, script).response
            assert (response.text, response.reasoning) == (text, thought)
            assert response == call(WHOLE, EXTRACT, [whole]).response

    def test_another_tag(self, mode):
        text = "<my-tag.1>a</think></my-tag.1>b"
        assert split(*text, tag="my-tag.1", mode=mode) == ("b", "a</think>")
        assert split(*text, mode=mode) == (text, "")

    def test_the_other_fields_stay(self, mode):
        """Model, id, usage and finish reason; `parsed` and `raw` belong to the text before."""
        usage = Usage(input_tokens=1, output_tokens=2)
        script = [Chunk("<think>a</th", model="m-2", id="i"), Chunk("ink>b", usage=usage, finish_reason="stop")]
        response = call(mode, EXTRACT, script).response
        assert (response.text, response.reasoning, response.model, response.id) == ("b", "a", "m-2", "i")
        assert (response.usage, response.finish_reason) == (usage, "stop")

    def test_tool_calls_after_it(self, mode):
        """They stay behind the reasoning, and what was held back is let go before them."""
        response = call(mode, EXTRACT, ["<think>a</think>", Chunk(tool_calls=(CALL,))]).response
        assert [type(part).__name__ for part in response.parts] == ["Reasoning", "ToolCall"]
        response = call(mode, EXTRACT, ["<thi", Chunk(tool_calls=(CALL,)), "nk>"]).response
        assert [getattr(part, "text", part) for part in response.parts] == ["<thi", response.tool_calls[0], "nk>"]

    def test_tool_calls_in_the_middle_of_it(self, mode):
        """Reasoning that is open goes on after them."""
        response = call(mode, EXTRACT, ["<think>a", Chunk("b", tool_calls=(CALL,)), "c</think>d"]).response
        assert (response.text, response.reasoning) == ("d", "abc")

    @pytest.mark.parametrize("part", [PNG, Opaque("anthropic", {"type": "x"}), Text("", raw={"cited": True})], ids=str)
    def test_other_parts_keep_their_place(self, mode, part):
        script = [Chunk("<think>a</think>b"), Chunk("c", parts=(part,))]
        response = call(mode, EXTRACT, script).response
        assert (response.text, response.reasoning) == ("bc", "a")
        kinds = [type(each).__name__ for each in response.parts]
        assert kinds == ["Reasoning", "Text", *([] if isinstance(part, Text) else [type(part).__name__]), "Text"]

    def test_reasoning_that_the_service_keeps_apart(self, mode):
        """It stays, with its signature, and what is extracted follows it."""
        script = [Chunk(reasoning="own "), Chunk(parts=(Reasoning(signature="s"),)), "<think>a</think>b"]
        response = call(mode, EXTRACT, script).response
        assert (response.text, response.reasoning) == ("b", "own a")
        assert response.reasoning_parts == (Reasoning(text="own ", signature="s"), Reasoning(text="a"))
        script = [Chunk("<think>a</think>b", reasoning="own ")]
        assert split(*script, mode=mode) == ("b", "own a")

    def test_several_choices(self, mode):
        """Each begins anew."""
        script = [
            Chunk("<think>a", alternatives=((1, Chunk("<thi")), (2, Chunk("x<think>y")))),
            Chunk("</think>b", alternatives=((1, Chunk("nk>c</think>d")),)),
            Chunk(alternatives=((3, Chunk("<th")),)),
        ]
        response = call(mode, EXTRACT, script).response
        assert [(each.text, each.reasoning) for each in (response, *response.alternatives)] == [
            ("b", "a"),
            ("d", "c"),
            ("x<think>y", ""),
            ("<th", ""),
        ]

    def test_layers_outside_see_the_text_without_it(self, mode):
        """`Validation` parses the JSON that follows the reasoning."""
        response = call(
            mode, [Validation(schema={"type": "object"}), EXTRACT], ['<think>{</think>{"a"', ": 1}"]
        ).response
        assert (response.text, response.parsed) == ('{"a": 1}', {"a": 1})


class TestStreams:
    def test_no_more_is_held_back_than_a_beginning_of_the_tag(self, stream_mode):
        """Everything else goes out with the chunk that it came in."""
        made = call(stream_mode, EXTRACT, ["\n<thi", "nk>Hm", " so</", "b></thi", "nk> ", "Pa", "<th", "ris"])
        assert shown(made) == [("Hm", ""), (" so", ""), ("</b>", ""), ("", "Pa"), ("", "<th"), ("", "ris")]

    def test_an_answer_without_the_tag_is_passed_on(self, stream_mode):
        """Chunk by chunk, as the very objects that came."""
        chunks = [Chunk("Pa"), Chunk("r<think>is"), Chunk("", finish_reason="stop"), Chunk("!")]
        made = call(stream_mode, EXTRACT, chunks)
        assert all(one is other for one, other in zip(made.ran.events, chunks, strict=True))

    def test_what_is_held_goes_out_at_the_end(self, stream_mode):
        assert shown(call(stream_mode, EXTRACT, ["<thi"])) == [("", "<thi")]
        assert shown(call(stream_mode, EXTRACT, ["<think>a</thi"])) == [("a", ""), ("</thi", "")]

    @pytest.mark.parametrize("stop_after", [0, 1, 2])
    def test_a_consumer_that_leaves(self, stream_mode, stop_after):
        """The provider's stream is closed, and nothing is counted as an answer."""
        made = call(stream_mode, EXTRACT, ["<think>", "a", "b", "</think>", "c"], stop_after=stop_after)
        assert (made.ran.response, made.ran.error) == (None, None)
        assert len(made.ran.events) == stop_after

    def test_a_stream_that_is_cut(self, stream_mode):
        """The partial response is what went out."""
        error = call(stream_mode, EXTRACT, ["<think>a</think>b", "c", Cut()]).ran.error
        assert isinstance(error, StreamInterrupted)
        assert (error.partial.text, error.partial.reasoning) == ("bc", "a")

    def test_nothing_has_gone_out_yet(self, stream_mode):
        """A `Retry` outside may then try again."""
        made = call(stream_mode, [Retry(), EXTRACT], ["<thi", ServerError("down")], "<think>a</think>b")
        assert (made.response.text, made.response.reasoning, made.record.attempts) == ("b", "a", 2)

    def test_a_restart_begins_anew(self, stream_mode):
        other = scripted(stream_mode, ["<think>", "c</think>d"])
        stack = [EXTRACT, Fallback([other], on_interrupt="restart")]
        made = call(stream_mode, stack, ["<think>a", ServerError("down")], restarts=True)
        assert (made.response.text, made.response.reasoning) == ("d", "c")
        assert sum(isinstance(event, Restart) for event in made.ran.events) == 1


class TestMessages:
    def test_each_begins_anew(self, mode):
        """With tools inside, what was added to the conversation is as it was streamed."""
        clock = tools({"clock": lambda: "noon"})
        turn = ["<think>look", "</think>I look.", Chunk(tool_calls=(CALL,), finish_reason="tool_call")]
        made = call(mode, [EXTRACT, clock], turn, ["<thi", "nk>now</think>", "Noon."])
        response = made.response
        assert (response.text, response.reasoning) == ("Noon.", "now")
        first, result = response.added
        assert (first.text, [part.text for part in first.reasoning]) == ("I look.", ["look"])
        assert (first.tool_calls[0].name, result.text) == ("clock", "noon")
        assert "<think>" in made.provider.requests[1].messages[-2].text  # the model gets what it wrote

    def test_a_message_that_goes_on(self, mode):
        """An empty mark ends nothing."""
        cut = ["<think>a", Chunk("b</thi", finish_reason="length")]
        response = call(mode, [EXTRACT, going_on()], cut, ["nk>c"]).response
        assert (response.text, response.reasoning) == ("c", "ab")


class TestSettings:
    @pytest.mark.parametrize("tag", ["", "<think>", "a b", "1a", "é", None, 5, "a\n"])
    def test_a_wrong_tag(self, tag):
        with pytest.raises(ConfigError, match="ExtractReasoning: tag: expected the name of a tag without brackets"):
            ExtractReasoning(tag=tag)
        with pytest.raises(ConfigError, match=r"middleware\[0\].extract_reasoning.tag: expected the name of a tag"):
            make_middleware([{"extract_reasoning": {"tag": tag}}])

    def test_in_yaml(self):
        assert make_middleware(["extract_reasoning", {"extract_reasoning": {"tag": "reason"}}]) == (
            ExtractReasoning(),
            ExtractReasoning(tag="reason"),
        )
        assert repr(ExtractReasoning(tag="reason")) == "ExtractReasoning(tag='reason')"
        assert pickle.loads(pickle.dumps(EXTRACT)) == EXTRACT  # noqa: S301  # our own

    def test_keeps_the_laws(self):
        check_middleware(EXTRACT)
        check_middleware(ExtractReasoning(tag="Hello"))


tokens = st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think>", "a", "b ", " ", "\n"]), max_size=9)
beside = st.sampled_from(
    [
        {"reasoning": "own"},
        {"parts": (Reasoning(raw={"redacted": 1}),)},
        {"parts": (Reasoning(text="block", signature="s"),)},
        {"parts": (PNG,)},
        {"parts": (Text("", raw={"cited": True}),)},
        {"tool_calls": (CALL,)},
        {"alternatives": ((1, Chunk("<think>x</think>y")),)},
        {"alternatives": ((1, Chunk("<th")),)},
        {"usage": Usage(input_tokens=1)},
        {"finish_reason": "stop"},
    ]
)


def recut(data, text):
    """Cut a text anywhere."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=150)
@given(tokens, st.data(), st.sampled_from(MODES))
def test_cuts_make_no_difference(found, data, mode):
    """A text cut anywhere gives what the whole text gives."""
    text = "".join(found)
    whole = call(WHOLE, EXTRACT, [text]).response
    made = call(mode, EXTRACT, recut(data, text))
    assert made.response == whole
    if mode.streaming:
        assert made.ran.text == whole.text
        assert "".join(event.reasoning for event in made.ran.events) == whole.reasoning


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from(["", "<think>", "<thi", "nk>", "</think>", "a", "\n"]), st.none() | beside),
        max_size=6,
    )
)
def test_whole_and_streamed_are_alike(pieces):
    """With other parts anywhere between the pieces of the text."""
    script = [Chunk(text, **(fields or {})) for text, fields in pieces]
    whole, streamed = (call(mode, EXTRACT, script) for mode in (WHOLE, STREAM))
    assert streamed.response == whole.response
    assert streamed.response.details == whole.response.details
    assert streamed.ran.text == whole.response.text


def test_many_calls_share_one():
    """100 threads and 1,000 tasks, each in the middle of a tag."""
    wrong = []

    def work(number):
        stream = Pipeline(ScriptedProvider(["<thi", "nk>", f"{number}</th", "ink>ok"]), [EXTRACT]).stream(REQUEST)
        text = "".join(chunk.text for chunk in stream)
        if (text, stream.response.reasoning) != ("ok", str(number)):
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def main():
        import anyio

        from fluxibly.testing import AsyncScriptedProvider

        async def awork(number):
            script = ["<thi", "nk>", f"{number}</th", "ink>ok"]
            stream = AsyncPipeline(AsyncScriptedProvider(script), [EXTRACT]).stream(REQUEST)
            async for _ in stream:
                await anyio.lowlevel.checkpoint()
            if (stream.response.text, stream.response.reasoning) != ("ok", str(number)):
                wrong.append(number)

        async with anyio.create_task_group() as group:
            for number in range(1000):
                group.start_soon(awork, number)

    run_async(main)
    assert wrong == []


def test_messages_and_requests_stay():
    """What the model is sent is not changed."""
    request = Request(
        model="m", messages=[Message.user("Hi"), Message.assistant("<think>a</think>b"), Message.user("?")]
    )
    made = call(STREAM, EXTRACT, "ok", request=request)
    assert made.provider.requests[0].messages == request.messages
    assert isinstance(made.response, Response)
