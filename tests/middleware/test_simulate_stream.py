"""`SimulateStream`: a provider without a stream answers streamed calls, a word at a time, and loses nothing."""

from __future__ import annotations

import pickle
import threading

import pytest
from hypothesis import given, settings, strategies as st
from support.calling import REQUEST, call, scripted

from fluxibly import Target
from fluxibly.errors import ServerError, StreamInterrupted
from fluxibly.middleware import Fallback, Guard, Retry, SimulateStream, StreamMeter
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.registry import make_middleware
from fluxibly.testing import VirtualClock, check_middleware
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Chunk, Image, Message, Opaque, Reasoning, Response, Text, ToolCall, ToolCallDelta, Usage

SIMULATE = SimulateStream()
STREAMS = [mode for mode in MODES if mode.streaming]
PNG = Image(data=b"png", media_type="image/png")
CALL = ToolCall("c1", "clock", raw_arguments='{"zone": "a b"}')


class Whole:
    """A provider that only answers whole."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = 0

    def complete(self, request):
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class AsyncWhole(Whole):
    async def complete(self, request):
        return super().complete(request)


def whole(mode, *answers):
    return (AsyncWhole if mode.backend else Whole)(*answers)


def answered(mode, answer, *outer, by="word", **options):
    """Make a call to a provider that only answers whole."""
    return run(mode, whole(mode, answer), [*outer, SimulateStream(by=by)], REQUEST, clock=VirtualClock(), **options)


def texts(ran):
    return [event.text for event in ran.events]


class TestProvidersWithoutAStream:
    def test_a_word_at_a_time(self, mode):
        """Each with the white space after it, the first also with that before it."""
        ran = answered(mode, "  The capital\n of France  is Paris. ")
        assert ran.response.text == "  The capital\n of France  is Paris. "
        if mode.streaming:
            assert texts(ran) == ["  The ", "capital\n ", "of ", "France  ", "is ", "Paris. "]

    def test_text_without_spaces(self, stream_mode):
        """Of Chinese and Japanese, a character at a time; words of other scripts in it stay whole."""
        assert texts(answered(stream_mode, "巴黎 is 首都。カナ")) == ["巴", "黎 ", "is ", "首", "都", "。", "カ", "ナ"]

    def test_marks_stay_with_their_character(self, stream_mode):
        """Variation selectors and voicing marks are no characters of their own."""
        text = "葛\U000e0100城 か\u3099く 日\ufe0f本"
        assert texts(answered(stream_mode, text)) == ["葛\U000e0100", "城 ", "か\u3099", "く ", "日\ufe0f", "本"]

    @pytest.mark.parametrize("text", ["", " ", "\n\n", "one", " one ", "\u2028", "\x1c"])
    def test_less_than_two_words(self, stream_mode, text):
        ran = answered(stream_mode, text)
        assert (ran.text, ran.response.text, len(ran.events)) == (text, text, 1)

    def test_at_once(self, stream_mode):
        ran = answered(stream_mode, "The capital is Paris.", by="whole")
        assert texts(ran) == ["The capital is Paris."]

    def test_everything_else_keeps_its_place(self, mode):
        """The response is the very answer of the provider, and a stream has its parts in their order."""
        parts = [
            Reasoning(text="hm hm", signature="s"),
            Text("one two "),
            PNG,
            Text("three four", raw={"cited": [1, 2]}),
            Opaque("anthropic", {"type": "search"}),
            CALL,
            Text("five six"),
        ]
        usage = Usage(input_tokens=1, output_tokens=2)
        answer = Response.from_parts(
            parts,
            usage=usage,
            model="m-2",
            finish_reason="tool_call",
            details={"a": [1]},
            raw={"b": 1},
            alternatives=[Response("other words", finish_reason="stop")],
        )
        ran = answered(mode, answer)
        assert ran.response == answer
        assert ran.response.parts == answer.parts
        assert ran.response.details == {"a": [1]}
        if mode.streaming:
            said = [(event.text, event.reasoning, event.parts, len(event.tool_calls)) for event in ran.events]
            assert said == [
                ("one ", "hm hm", (parts[0],), 0),
                ("two ", "", (), 0),
                ("three ", "", (PNG,), 0),
                ("four", "", (), 0),
                ("", "", (Text("", raw={"cited": [1, 2]}), parts[4]), 1),
                ("five ", "", (), 0),
                ("six", "", (), 0),
            ]

    def test_the_fields_of_the_answer(self, stream_mode):
        """Who answers is said by the first chunk, and how it ended by the last."""
        usage = Usage(input_tokens=1)
        ran = answered(
            stream_mode,
            Response(
                "one two three", reasoning="a b", tool_calls=[CALL], model="m-2", usage=usage, finish_reason="stop"
            ),
        )
        first, middle, last = ran.events
        assert (first.reasoning, first.model, first.usage, first.tool_calls) == ("a b", "m-2", None, ())
        assert middle == Chunk("two ")
        assert (last.text, last.usage, last.finish_reason, last.model) == ("three", usage, "stop", None)
        assert last.tool_calls == (ToolCallDelta(index=0, id="c1", name="clock", arguments='{"zone": "a b"}'),)

    def test_without_it_there_is_no_stream(self, stream_mode):
        ran = run(stream_mode, whole(stream_mode, "ok"), [], REQUEST, clock=VirtualClock())
        assert isinstance(ran.error, NotImplementedError)

    def test_errors_come_before_output(self, mode):
        """So a `Retry` tries again."""
        provider = whole(mode, ServerError("down"), "a b")
        ran = run(mode, provider, [Retry(), SIMULATE], REQUEST, clock=VirtualClock())
        assert (ran.response.text, provider.asked) == ("a b", 2)

    @pytest.mark.parametrize("stop_after", [0, 1, 2])
    def test_a_consumer_that_leaves(self, stream_mode, stop_after):
        ran = answered(stream_mode, "one two three", StreamMeter(), stop_after=stop_after)
        assert (ran.error, ran.response, len(ran.events)) == (None, None, stop_after)


class TestProvidersWithAStream:
    def test_chunks_of_several_words_are_split(self, stream_mode):
        """Others pass as they are, also if they end within a word."""
        chunks = [Chunk("The ca"), Chunk("pi"), Chunk("tal is", finish_reason="stop")]
        made = call(stream_mode, SIMULATE, chunks)
        assert texts(made.ran) == ["The ", "ca", "pi", "tal ", "is"]
        assert made.ran.events[2] is chunks[1]
        assert made.response.text == "The capital is"

    def test_one_of_several_targets(self, stream_mode):
        """Only where the answer comes from a provider without a stream, one is made."""
        other = whole(stream_mode, "from the other")
        made = call(stream_mode, [Fallback(Target(other)), SIMULATE], ServerError("down"))
        assert texts(made.ran) == ["from ", "the ", "other"]

    def test_a_stream_that_is_cut(self, stream_mode):
        """The error's partial answer is what went out."""
        error = call(stream_mode, SIMULATE, ["one two", ServerError("down")]).ran.error
        assert isinstance(error, StreamInterrupted)
        assert error.partial.text == "one two"


def test_layers_outside_see_the_words(stream_mode):
    """A guard checks at its borders, and a meter counts the words."""
    seen = []
    ran = answered(stream_mode, "One. Two three.", Guard(output=lambda r: seen.append(r.text), release="sentence"))
    assert (seen, ran.text) == (["One.", "One. Two three."], "One. Two three.")
    assert answered(stream_mode, "One two three.", StreamMeter()).response.stats.chunks == 3


class TestSettings:
    def test_a_wrong_one(self):
        with pytest.raises(ValueError, match="SimulateStream: by: expected one of 'word', 'whole', got 'letter'"):
            SimulateStream(by="letter")

    def test_in_yaml(self):
        assert make_middleware(["simulate_stream", {"simulate_stream": {"by": "whole"}}]) == (
            SimulateStream(),
            SimulateStream(by="whole"),
        )
        assert repr(SimulateStream(by="whole")) == "SimulateStream(by='whole')"
        assert pickle.loads(pickle.dumps(SIMULATE)) == SIMULATE  # noqa: S301  # our own

    def test_keeps_the_laws(self):
        check_middleware(SimulateStream())
        check_middleware(SimulateStream(by="whole"))


parts = st.one_of(
    st.text(alphabet="ab \n\t漢。\u00a0\u2028", min_size=1, max_size=8).map(Text),
    st.builds(lambda text: Text(text, raw={"k": 1}), st.text(alphabet="a b", min_size=1, max_size=5)),
    st.sampled_from(
        [PNG, CALL, Opaque("x", {"type": "y"}), Reasoning(text="a b"), Reasoning(text="c d", signature="s")]
    ),
)


@settings(max_examples=200)
@given(st.lists(parts, max_size=6), st.sampled_from(STREAMS))
def test_the_stream_adds_up_to_the_answer(found, mode):
    """Whatever the parts, and their order: text, parts and all."""
    answer = Response.from_parts(found, finish_reason="stop")
    ran = answered(mode, answer)
    assert ran.response == answer
    assert ran.text == answer.text
    assert Message.assistant(ran.response) == Message.assistant(answer)


@settings(max_examples=100)
@given(st.lists(st.text(alphabet="ab \n漢", max_size=6), max_size=6), st.sampled_from(MODES))
def test_cuts_make_no_difference(pieces, mode):
    """A text that comes in any chunks gives what the whole text gives."""
    made = call(mode, SIMULATE, pieces)
    assert made.response.text == "".join(pieces)
    if mode.streaming:
        assert made.ran.text == "".join(pieces)
        assert all(len(event.text.split()) < 2 for event in made.ran.events)


def test_many_threads_share_one():
    pipeline = Pipeline(scripted(STREAMS[0], *[["one two three"]] * 100), [SIMULATE])
    wrong = []

    def work():
        found = [chunk.text for chunk in pipeline.stream(REQUEST)]
        if found != ["one ", "two ", "three"]:
            wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert AsyncPipeline(AsyncWhole("ok"), [SIMULATE]).simulates_stream
