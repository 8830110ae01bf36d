"""Streams that go on: turns of tools, answers that are continued, and the marks between them, in all modes."""

from __future__ import annotations

import logging

import attrs
import pytest
from support.calling import call, scripted
from support.powers import going_on, replayed, tools

from fluxibly.errors import ProviderError, ServerError, StreamInterrupted
from fluxibly.flow import emit, hold_back, map_chunks, perform
from fluxibly.middleware import Fallback, Logging, Retry, StreamMeter, Timing, Tracing, Validation
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing.modes import MODES, run_async
from fluxibly.types import Chunk, Message, Reasoning, Request, Response, Restart, ToolCall, ToolCallDelta, Usage

REQUEST = Request(model="m", messages="What time is it?")


@pytest.fixture(params=[mode for mode in MODES if mode.streaming], ids=str)
def streaming(request):
    return request.param


@pytest.fixture(params=[mode for mode in MODES if not mode.streaming], ids=str)
def whole(request):
    return request.param


def asks(*names, index=0):
    """Return a chunk that calls tools."""
    calls = [ToolCallDelta(index=n, id=f"c{index + n}", name=name, arguments="{}") for n, name in enumerate(names)]
    return Chunk(tool_calls=tuple(calls), finish_reason="tool_call")


def turn(index=0):
    return ["Let me ", "look. ", asks("clock", index=index)]


LAST = ["It is ", "noon."]
CLOCK = tools({"clock": lambda: "noon", "date": lambda: "Monday"})


def events(ran):
    """Name the events of a stream: texts, "call" for parts of tool calls, and the length of each mark."""
    names = []
    for event in ran.events:
        if isinstance(event, Restart):
            names.append("restart")
        elif event.added is not None:
            names.append(f"mark {len(event.added)}")
        else:
            names.append("call" if event.tool_calls else event.text)
    return names


def shown(ran):
    """Return the text of all messages, as a consumer shows it."""
    return "".join(event.text for event in ran.events)


def mapping(fn, at_end=None, at_restart=None):
    def mapped(request, call_next):
        return (yield from map_chunks(call_next(request), fn, at_end, at_restart=at_restart))

    return mapped


def louder(chunk):
    return attrs.evolve(chunk, text=chunk.text.upper())


def holding(request, call_next):
    return (yield from hold_back(call_next(request)))


def naive(request, call_next):
    """Run the tools and ask again, without a mark."""
    asked = request
    while True:
        response = yield from call_next(asked)
        if not response.tool_calls:
            return response
        time = yield from perform(lambda: "noon")
        results = [Message.tool(time, each) for each in response.tool_calls]
        asked = asked.evolve(messages=(*asked.messages, Message.assistant(response), *results))


def in_two_parts(request, call_next):
    """Let the model go on once."""
    first = yield from call_next(request)
    yield from emit(Chunk(added=()))
    second = yield from call_next(request.evolve(messages=(*request.messages, first.message)))
    return second.evolve(text=first.text + second.text)


class TestTools:
    def test_two_turns(self, mode):
        """The response is the last answer, and has all messages between the request's and itself."""
        made = call(mode, CLOCK, turn(), LAST, request=REQUEST)
        assert made.response.text == "It is noon."
        assert [(message.role, message.text) for message in made.response.added] == [
            ("assistant", "Let me look. "),
            ("tool", "noon"),
        ]
        assert made.response.added[0].tool_calls[0].name == "clock"
        if mode.streaming:
            assert events(made.ran) == ["Let me ", "look. ", "call", "mark 2", "It is ", "noon."]

    def test_all_modes_agree(self):
        """Law 1, for several turns with several calls each."""
        script = [[asks("clock", "date")], turn(index=2), [asks("date", index=3)], LAST]
        responses = [call(mode, CLOCK, *script).response for mode in MODES]
        assert responses == [responses[0]] * len(MODES)
        assert [message.text for message in responses[0].added] == [
            *("", "noon", "Monday"),
            *("Let me look. ", "noon"),
            *("", "Monday"),
        ]

    def test_the_conversation_goes_on(self, mode):
        """`[*messages, *response.added, response.message]` is what the model is sent in the next call."""
        made = call(mode, CLOCK, turn(), turn(index=1), LAST, request=REQUEST)
        asked = made.provider.requests[-1].messages
        assert asked == (*REQUEST.messages, *made.response.added)
        again = REQUEST.evolve(messages=[*asked, made.response.message, Message.user("Thanks!")])
        assert call(mode, CLOCK, "Welcome.", request=again).response.added == ()

    def test_a_history_that_is_cut(self, mode):
        """The next request may have the messages of an earlier one, if a layer within leaves out what was between."""

        def brief(request, call_next):
            kept = request.messages[:1] + request.messages[1:][-2:]
            return (yield from call_next(request.evolve(messages=kept)))

        made = call(mode, [CLOCK, brief], turn(), turn(), turn(), LAST)
        assert made.response.text == "It is noon."
        assert len(made.response.added) == 6
        assert made.provider.requests[2].messages == made.provider.requests[1].messages

    def test_the_record_is_that_of_all_turns(self, mode):
        """Attempts are counted, the usage is the last answer's, and `total_usage` that of all turns."""
        first = [asks("clock"), Chunk(usage=Usage(input_tokens=1, output_tokens=2))]
        made = call(mode, CLOCK, first, ["noon", Chunk(usage=Usage(input_tokens=10, output_tokens=20), model="m-9")])
        assert made.record.attempts == 2
        assert made.record.model == "m-9"
        assert made.response.usage == Usage(input_tokens=10, output_tokens=20)
        assert made.response.total_usage == Usage(input_tokens=11, output_tokens=22)

    def test_forward_stream_yields_the_texts_of_all_turns(self, streaming):
        """A program that shows a stream shows all that the model said."""
        provider = scripted(streaming, turn(), LAST)
        if streaming.backend is None:
            texts = [*Pipeline(provider, [CLOCK]).stream(REQUEST).texts()]
        else:

            async def read():
                return [text async for text in AsyncPipeline(provider, [CLOCK]).stream(REQUEST).texts()]

            texts = run_async(read, streaming.backend)
        assert texts == ["Let me ", "look. ", "It is ", "noon."]

    def test_the_partial_response_is_the_message_under_way(self, streaming):
        """A failure in a later turn leaves the messages before it, and the text since."""
        made = call(streaming, CLOCK, turn(), ["It ", ServerError("down")])
        assert events(made.ran)[-2:] == ["mark 2", "It "]
        error = made.ran.error
        assert isinstance(error, StreamInterrupted)
        assert isinstance(error.__cause__, ServerError)
        assert error.partial.text == "It "
        assert [message.text for message in error.partial.added] == ["Let me look. ", "noon"]

    def test_a_failure_of_a_tool(self, mode):
        """An error of the middleware itself, between two turns, is an interruption in a stream."""

        def broken():
            raise LookupError("no clock")

        made = call(mode, tools({"clock": broken}), turn())
        error = made.ran.error
        if mode.streaming:
            assert isinstance(error, StreamInterrupted)
            assert error.partial.text == "Let me look. "
            error = error.__cause__
        assert isinstance(error, LookupError)

    def test_a_consumer_that_leaves_in_the_second_turn(self, streaming):
        """Every stream is closed (`call` checks that), and no error is raised."""
        made = call(streaming, CLOCK, turn(), LAST, stop_after=5)
        assert (events(made.ran)[-1], made.ran.error) == ("It is ", None)


class TestWithoutAMark:
    def test_it_works_whole(self, whole):
        """In a whole call, nothing has gone out that a second answer would follow."""
        assert call(whole, naive, turn(), LAST).response.text == "It is noon."

    def test_it_is_refused_in_a_stream(self, streaming):
        """The error says how to go on, and nothing is sent."""
        made = call(streaming, naive, turn(), LAST)
        error = made.ran.error
        assert isinstance(error, StreamInterrupted)
        assert "asked ScriptedProvider again after output of the first answer" in str(error)
        assert "emit(Chunk(added=…))" in str(error)
        assert error.partial.text == "Let me look. "
        assert len(made.provider.requests) == 1

    @pytest.mark.parametrize(
        "between", [mapping(lambda chunk: chunk), mapping(louder), holding], ids=["same", "upper", "hold"]
    )
    def test_it_is_refused_within_a_combinator(self, streaming, between):
        """A combinator refuses it too, whatever it has let out."""
        made = call(streaming, [between, naive], turn(), LAST)
        assert "emit(Chunk(added=…))" in str(made.ran.error)
        assert len(made.provider.requests) == 1

    def test_a_mark_admits_one_answer(self, streaming):
        """After the output of the next answer, a further request needs a mark of its own."""

        def once(request, call_next):
            first = yield from call_next(request)
            yield from emit(Chunk(added=(first.message,)))
            asked = request.evolve(messages=(*request.messages, first.message))
            yield from call_next(asked)
            return (yield from call_next(asked.evolve(messages=(*asked.messages, Message.user("more")))))

        made = call(streaming, once, "one", "two", "three")
        assert "again after output" in str(made.ran.error)
        assert made.ran.error.partial.text == "two"
        assert made.ran.error.partial.added == (Message.assistant("one"),)
        assert len(made.provider.requests) == 2

    def test_other_messages_than_those_of_the_marks(self, streaming, caplog):
        """A middleware whose response has other `added` than it has let out is named."""

        def forgetful(request, call_next):
            first = yield from call_next(request)
            yield from emit(Chunk(added=(first.message,)))
            return (yield from call_next(request.evolve(messages=(*request.messages, first.message))))

        made = call(streaming, forgetful, "one", "two")
        error = made.ran.error
        assert isinstance(error, StreamInterrupted)
        assert "forgetful returned a response with 0 messages in `added`, expected those of its marks (1)" in str(error)
        assert "response.evolve(added=…)" in str(error)
        made = call(streaming, [mapping(louder), forgetful], "one", "two")
        assert "forgetful" in str(made.ran.error)
        assert "expected those of its marks (1)" in str(made.ran.error)

    def test_messages_without_a_mark(self, streaming):
        """A response may not have messages that no mark had."""

        def inventing(request, call_next):
            response = yield from call_next(request)
            return response.evolve(added=(Message.assistant("before"),))

        for layers in ([inventing], [mapping(louder), inventing]):
            error = call(streaming, layers, "hello").ran.error
            assert isinstance(error, StreamInterrupted)
            assert "inventing returned a response with 1 messages in `added`" in str(error)


def asking_anew(request, call_next):
    """Ask another model, after any error of a provider, whatever has gone out."""
    try:
        return (yield from call_next(request))
    except ProviderError:
        return (yield from call_next(request.evolve(model="m-2")))


class TestRetries:
    """A later turn that fails before its output."""

    def test_a_retry_within(self, mode):
        """Only the failed turn is asked again."""
        made = call(mode, [CLOCK, Retry(base_delay=0)], turn(), ServerError("down"), LAST)
        assert made.response.text == "It is noon."
        assert len(made.response.added) == 2
        asked = [len(request.messages) for request in made.provider.requests]
        assert asked == [1, 3, 3]

    def test_a_retry_outside_of_a_stream(self, streaming):
        """Something has gone out, so it is an interruption, and is not retried."""
        made = call(streaming, [Retry(base_delay=0), CLOCK], turn(), ServerError("down"), LAST)
        assert isinstance(made.ran.error, StreamInterrupted)
        assert isinstance(made.ran.error.__cause__, ServerError)
        assert made.ran.error.partial == Response(added=made.ran.events[3].added)
        assert len(made.provider.requests) == 2

    @pytest.mark.parametrize("between", [[], [holding], [mapping(louder)]], ids=["", "hold", "upper"])
    def test_asking_anew_outside_of_a_stream(self, streaming, between):
        """A layer that asks anew, because it does not know of the turns, does not deliver the first answer twice."""
        made = call(streaming, [*between, asking_anew, CLOCK], turn(), ServerError("down"), turn(), LAST)
        assert isinstance(made.ran.error, StreamInterrupted)
        assert "again after output" in str(made.ran.error)
        assert shown(made.ran).lower() == "let me look. "
        assert len(made.provider.requests) == 2

    def test_a_fallback_outside_of_a_stream(self, streaming):
        """`Fallback` knows that a turn has gone out."""
        made = call(streaming, [Fallback("m-2"), CLOCK], turn(), ServerError("down"), turn(), LAST)
        assert isinstance(made.ran.error, StreamInterrupted)
        assert isinstance(made.ran.error.__cause__, ServerError)
        assert len(made.provider.requests) == 2

    def test_asking_anew_for_an_answer_that_is_held(self, streaming):
        """A hold-back does not mix what it holds with an answer that begins anew."""
        layers = [holding, asking_anew, in_two_parts]
        made = call(streaming, layers, long("one "), ServerError("down"), "one two")
        assert "again after output" in str(made.ran.error)
        assert made.ran.events == []

    def test_a_fallback_within(self, mode):
        """A fallback further in asks another model in the failed turn alone."""
        made = call(mode, [CLOCK, Fallback(to=["m-2"])], turn(), ServerError("down"), LAST)
        assert made.response.text == "It is noon."
        assert [request.model for request in made.provider.requests] == ["m-1", "m-1", "m-2"]

    @pytest.mark.parametrize("layers", [[CLOCK, Retry(on_interrupt="restart")], [Retry(on_interrupt="restart"), CLOCK]])
    def test_no_restart_after_a_mark(self, streaming, layers):
        """It is not known whether the message under way or all of them would be void, so the stream is interrupted."""
        made = call(streaming, layers, turn(), ["It ", ServerError("down")], LAST, restarts=True)
        assert isinstance(made.ran.error, StreamInterrupted)
        assert isinstance(made.ran.error.__cause__, ServerError)
        assert events(made.ran) == ["Let me ", "look. ", "call", "mark 2", "It "]

    @pytest.mark.parametrize("layers", [[CLOCK, Retry(on_interrupt="restart")], [Retry(on_interrupt="restart"), CLOCK]])
    def test_a_restart_of_the_first_turn(self, streaming, layers):
        """Before the first mark, all that has gone out is the answer that begins again."""
        made = call(streaming, layers, ["Let ", ServerError("down")], turn(), LAST, restarts=True)
        assert made.response.text == "It is noon."
        assert events(made.ran) == ["Let ", "restart", "Let me ", "look. ", "call", "mark 2", "It is ", "noon."]

    def test_an_answer_after_an_interrupted_turn(self, streaming):
        """A middleware further out, which knows no marks, may return half an answer. It has all messages."""

        def salvaging(request, call_next):
            try:
                return (yield from call_next(request))
            except StreamInterrupted as error:
                return error.partial.evolve(finish_reason="length")

        for layers in ([salvaging], [salvaging, holding], [salvaging, mapping(louder)], [mapping(louder), salvaging]):
            made = call(streaming, [*layers, CLOCK], turn(), ["It ", ServerError("down")])
            assert (made.response.text, made.response.finish_reason) == (made.ran.text, "length")
            assert made.response.added == made.ran.events[3].added

    def test_an_answer_instead_of_a_turn_that_failed(self, streaming):
        """A response that a middleware makes up after the first turn lacks that turn, and is refused."""

        def sorry(request, call_next):
            try:
                return (yield from call_next(request))
            except ProviderError:
                return Response("Sorry.")

        made = call(streaming, [sorry, CLOCK], turn(), ServerError("down"))
        assert isinstance(made.ran.error, StreamInterrupted)
        assert "in `added`" in str(made.ran.error)
        assert shown(made.ran) == "Let me look. "


OUTSIDE = {
    "StreamMeter": StreamMeter(),
    "Logging": Logging(),
    "Timing": Timing(layers=True),
    "Tracing": Tracing(),
    "Retry": Retry(),
    "Validation": Validation(),
    "Validation that holds": Validation(hold=True, empty="raise"),
    "map_chunks": mapping(lambda chunk: chunk),
    "map_chunks that copies": mapping(attrs.evolve),
    "hold_back": holding,
}


class TestOtherLayers:
    @pytest.mark.parametrize("name", OUTSIDE)
    @pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
    def test_they_change_nothing(self, mode, name, outside):
        """A layer on either side of the tools leaves the response and the texts as they are."""
        layer = OUTSIDE[name]
        made = call(mode, [layer, CLOCK] if outside else [CLOCK, layer], turn(), turn(index=1), LAST)
        expected = call(mode, CLOCK, turn(), turn(index=1), LAST)
        assert made.response == expected.response
        assert events(made.ran) == events(expected.ran)

    def test_the_meter_counts_all_turns(self, streaming):
        """The stats are those of the stream, the marks included."""
        stats = call(streaming, [StreamMeter(), CLOCK], turn(), LAST).response.stats
        assert (stats.chunks, stats.characters) == (6, len("Let me look. It is noon."))

    def test_the_log_counts_all_turns(self, streaming, caplog):
        """The line of the end has the characters and chunks that went out."""
        caplog.set_level(logging.INFO, "fluxibly")
        call(streaming, [Logging(), CLOCK], turn(), LAST)
        assert (caplog.records[-1].total_chunks, caplog.records[-1].total_length) == (6, 24)

    def test_a_hold_back_outside_checks_each_message(self, streaming):
        """A message is released at the mark that ends it, and the next is held until the end."""
        seen = []

        def held(request, call_next):
            return (yield from hold_back(call_next(request), check=lambda response: seen.append(response.text)))

        log = []

        def logged(request, call_next):
            return (yield from map_chunks(call_next(request), lambda chunk: log.append(f"in {chunk.text}") or chunk))

        made = call(streaming, [held, CLOCK, logged], turn(), LAST, watch=lambda event: log.append(f"out {event.text}"))
        assert seen == ["Let me look. ", "It is noon."]
        assert log.index("in It is ") > log.index("out look. ")
        assert log.index("in noon.") < log.index("out It is ")
        assert shown(made.ran) == "Let me look. It is noon."

    def test_a_failed_check_of_the_first_message(self, streaming):
        """Nothing of a message that does not pass goes out, and the tools do not run."""
        ran = []

        def no_looking(response):
            if "look" in response.text:
                raise LookupError("no looking")

        def held(request, call_next):
            return (yield from hold_back(call_next(request), check=no_looking))

        made = call(streaming, [held, tools({"clock": lambda: ran.append(1) or "noon"})], turn(), LAST)
        assert isinstance(made.ran.error, LookupError)
        assert made.ran.events == []
        assert len(made.provider.requests) == 1

    def test_an_interruption_while_the_second_message_is_held(self, streaming):
        """The partial response is what was released: the first message alone."""
        made = call(streaming, [holding, CLOCK], turn(), ["It ", ServerError("down")])
        assert events(made.ran)[-1] == "mark 2"
        assert isinstance(made.ran.error, StreamInterrupted)
        assert made.ran.error.partial == Response(added=made.ran.events[-1].added)

    def test_a_hold_back_releases_the_text_beside_a_mark_with_its_message(self, streaming):
        """A stored answer may begin with its mark and its text in one chunk. Its text is checked like any other."""
        stored = (Message.assistant("hm"), Message.user("go on"))

        def replay(request, call_next):
            yield from emit(Chunk("no", added=stored))
            yield from emit(Chunk("body"))
            return Response("nobody", added=stored)

        def refused(response):
            raise LookupError(response.text)

        def held(request, call_next):
            return (yield from hold_back(call_next(request), check=refused))

        made = call(streaming, [held, replay])
        assert isinstance(made.ran.error, LookupError)
        assert str(made.ran.error) == "nobody"
        assert events(made.ran) == ["mark 2"]

    def test_once_released_a_hold_back_holds_no_later_message(self, streaming):
        """`until` is about the stream, not about a message."""

        def held(request, call_next):
            return (yield from hold_back(call_next(request), until=lambda text: "look" in text))

        made = call(streaming, [held, CLOCK], turn(), ["It ", ServerError("down")])
        assert shown(made.ran) == "Let me look. It "
        assert made.ran.error.partial.text == "It "

    def test_a_whole_call_checks_the_answer_alone(self, whole):
        """The messages of earlier turns are in `added`, for a check that wants them."""
        seen = []

        def held(request, call_next):
            return (yield from hold_back(call_next(request), check=lambda response: seen.append(response.text)))

        call(whole, [held, CLOCK], turn(), LAST)
        assert seen == ["It is noon."]


class TestMapChunks:
    def test_the_order_at_a_mark(self, streaming):
        """Text that was held back goes out before the mark, the state begins anew, and then the function gets the mark."""
        log, kept = [], []

        def fn(chunk):
            if chunk.added is not None:
                log.append(f"mark {len(chunk.added)}")
                return chunk
            kept.append(chunk.text)
            return attrs.evolve(chunk, text="")

        def at_end():
            log.append(f"end {''.join(kept)}")
            return Chunk("".join(kept).upper())

        def at_restart():
            log.append("restart")
            kept.clear()

        made = call(streaming, [mapping(fn, at_end, at_restart), CLOCK], turn(), LAST)
        assert log == ["end Let me look. ", "restart", "mark 2", "end It is noon."]
        assert [name for name in events(made.ran) if name] == ["call", "LET ME LOOK. ", "mark 2", "IT IS NOON."]
        assert made.response.text == "IT IS NOON."

    def test_half_a_word_does_not_go_into_the_next_message(self, streaming):
        """A redaction that holds back the end of a text, because the secret may go on, lets it out before the mark."""

        def redacting(request, call_next):
            kept = []

            def fn(chunk):
                text = "".join(kept) + chunk.text
                kept.clear()
                if text.endswith("sec"):
                    kept.append("sec")
                    text = text[:-3]
                return attrs.evolve(chunk, text=text.replace("secret", "[gone]"))

            return (yield from map_chunks(call_next(request), fn, lambda: Chunk("".join(kept)), at_restart=kept.clear))

        made = call(streaming, [redacting, CLOCK], ["one sec", asks("clock")], ["ret, no sec", "ret"])
        assert made.response.text == "ret, no [gone]"
        assert shown(made.ran) == "one secret, no [gone]"
        made = call(streaming, [redacting, CLOCK], [asks("clock"), "one sec"], ["ret"])
        assert [event.text for event in made.ran.events if event.text] == ["one ", "sec", "ret"]

    @pytest.mark.parametrize("turns", [1, 2, 3])
    def test_changed_messages(self, mode, turns):
        """The function may change the messages of a mark, and `response.added` has them so. Others stay as they are."""

        def fn(chunk):
            if not chunk.added:
                return chunk
            changed = [attrs.evolve(message, content=message.text.replace("0", "zero")) for message in chunk.added]
            return attrs.evolve(chunk, added=tuple(changed))

        script = [["turn ", f"{index}", asks("clock", index=index)] for index in range(turns)]
        made = call(mode, [mapping(fn), CLOCK], *script, LAST)
        texts = [message.text for message in made.response.added if message.role == "assistant"]
        assert texts == ["turn zero", "turn 1", "turn 2"][:turns]
        assert made.response.text == "It is noon."
        if mode.streaming:
            assert tuple(m for event in made.ran.events for m in event.added or ()) == made.response.added

    def test_a_turn_that_came_whole(self, mode):
        """Of a message of which no chunk came in, nothing was held back, so its end passes unnoticed."""
        ends = []

        def stored(request, call_next):
            if len(request.messages) == 1:
                return Response("Let me look. ", tool_calls=[ToolCall("c1", "clock")])
            return (yield from call_next(request))

        made = call(mode, [mapping(lambda chunk: chunk, lambda: ends.append(1)), CLOCK, stored], LAST)
        assert made.response.text == "It is noon."
        assert [message.text for message in made.response.added] == ["Let me look. ", "noon"]
        assert ends == [1]

    def test_a_dropped_mark_passes(self, mode):
        """A function that knows nothing of marks cannot lose one."""
        made = call(mode, [mapping(lambda chunk: chunk if chunk.text else None), CLOCK], turn(), LAST)
        expected = call(mode, CLOCK, turn(), LAST)
        assert made.response.added == expected.response.added
        assert made.response.text == "It is noon."

    def test_chunks_beside_a_mark(self, streaming):
        """The function may put chunks around a mark; after those behind it, an empty mark admits the next request."""

        def fn(chunk):
            return [Chunk("(before)"), chunk, Chunk("(after)"), Chunk(added=())] if chunk.added else chunk

        made = call(streaming, [mapping(fn), CLOCK], turn(), LAST)
        assert events(made.ran)[2:7] == ["call", "(before)", "mark 2", "(after)", "mark 0"]
        assert made.response.text == "(after)It is noon."

    def test_a_mark_that_the_function_makes_up(self, mode):
        """Only the layer that asks again may let out a mark."""
        made = call(mode, mapping(lambda chunk: attrs.evolve(chunk, added=())), "hello")
        assert isinstance(made.ran.error, TypeError)
        assert "only in place of a mark" in str(made.ran.error)

    @pytest.mark.parametrize("inner", ["streamed", "whole"])
    def test_a_redaction_of_text_and_messages(self, mode, inner):
        """A function's changes hold in every mode, whether the last turn came as chunks or not."""

        def shorter(request, call_next):
            if len(request.messages) > 1 and inner == "whole":
                return Response("It is noon.")
            return (yield from call_next(request))

        def fn(chunk):
            if chunk.added:
                return attrs.evolve(chunk, added=[attrs.evolve(message, content="*") for message in chunk.added])
            return attrs.evolve(chunk, text=chunk.text.replace("o", "0"))

        made = call(mode, [mapping(fn), CLOCK, shorter], turn(), LAST)
        assert made.response.text == "It is n00n."
        assert [message.text for message in made.response.added] == ["*", "*"]
        if mode.streaming:
            assert shown(made.ran) == "Let me l00k. It is n00n."

    def test_reasoning_of_two_messages_stays_apart(self, mode):
        """A block of the second message is compared with the reasoning of that message alone."""
        first = [Chunk(reasoning="hm"), asks("clock")]
        second = [Chunk(parts=(Reasoning(text="so", signature="s"),)), "noon"]
        made = call(mode, [mapping(lambda chunk: chunk), CLOCK], first, second)
        assert made.response.reasoning_parts == (Reasoning(text="so", signature="s"),)
        assert made.response.added[0].reasoning == (Reasoning(text="hm"),)


class TestMarks:
    def test_a_mark_first(self, mode):
        """A mark may be the first effect of all; no chunk after it is lost."""
        memory = (Message.user("my name is Ann"), Message.assistant("hi Ann"))

        def remembering(request, call_next):
            yield from emit(Chunk(added=memory))
            response = yield from call_next(request.evolve(messages=(*request.messages, *memory)))
            return response.evolve(added=memory)

        for layers in (
            [remembering],
            [mapping(louder), remembering],
            [holding, remembering],
            [StreamMeter(), remembering],
        ):
            made = call(mode, layers, ["one ", "two"])
            assert made.response.text.lower() == "one two"
            assert made.response.added == memory
            if mode.streaming:
                assert [name.lower() for name in events(made.ran)] == ["mark 2", "one ", "two"]

    def test_chunks_first(self, streaming):
        """A flow whose first effects are chunks of its own loses none of them."""
        made = call(streaming, replayed(Response("one two three")))
        assert [event.text for event in made.ran.events] == ["one", "two", "three"]
        assert made.response.text == "onetwothree"

    @pytest.mark.parametrize("between", [[], [mapping(louder)], [holding], [StreamMeter()], [Logging()]])
    def test_a_heading_of_the_middlewares_own(self, mode, between):
        """After a chunk of its own, a middleware lets out an empty mark, and asks."""

        def headed(request, call_next):
            yield from emit(Chunk("AI: "))
            yield from emit(Chunk(added=()))
            response = yield from call_next(request)
            return response.evolve(text=f"AI: {response.text}")

        made = call(mode, [*between, headed, Retry(base_delay=0)], ServerError("down"), ["hel", "lo"])
        assert made.response.text.lower() == "ai: hello"
        if mode.streaming:
            assert [name.lower() for name in events(made.ran)] == ["ai: ", "mark 0", "hel", "lo"]

    @pytest.mark.parametrize("between", [[], [mapping(louder)], [holding], [mapping(louder), holding]])
    def test_a_heading_without_a_mark(self, mode, between):
        """Text before the first request is no answer that the request would repeat, nor is it for a retry."""

        def headed(request, call_next):
            yield from emit(Chunk("AI: "))
            response = yield from call_next(request)
            return response.evolve(text=f"AI: {response.text}")

        made = call(mode, [*between, headed, Retry(base_delay=0)], ServerError("down"), ["hel", "lo"])
        assert made.response.text.lower() == "ai: hello"
        if mode.streaming:
            assert made.ran.text == made.response.text

    def test_a_heading_that_the_response_lacks(self, streaming):
        """Text went out that the response does not have: the error names the middleware."""

        def headed(request, call_next):
            yield from emit(Chunk("AI: "))
            return (yield from call_next(request))

        error = call(streaming, headed, "hello").ran.error
        assert isinstance(error, StreamInterrupted)
        assert "headed returned another text" in str(error)
        assert error.partial.text == "AI: hello"

    def test_a_footer_that_the_response_lacks(self, streaming):
        """So it is with text after the answer."""

        def footed(request, call_next):
            response = yield from call_next(request)
            yield from emit(Chunk(" (by AI)"))
            return response

        assert "footed returned another text" in str(call(streaming, footed, "hello").ran.error)

    def test_a_message_alone(self, mode):
        """`added` has several messages, and the error says how to write one."""

        def marking(request, call_next):
            yield from emit(Chunk(added=Message.user("hi")))
            return (yield from call_next(request))

        assert "write added=(message,)" in str(call(mode, marking, "hello").ran.error)

    def test_a_heading_and_a_replay(self, streaming):
        """After a heading and output of the answer, nothing is sent again."""

        def headed(request, call_next):
            yield from emit(Chunk("AI: "))
            yield from call_next(request)
            return (yield from call_next(request))

        made = call(streaming, headed, "hello", "again")
        assert "emit(Chunk(added=…)) first" in str(made.ran.error)

    def test_details_beside_a_mark(self, streaming):
        """They belong to the message that begins, through a combinator as well."""

        def noting(request, call_next):
            first = yield from call_next(request)
            yield from emit(Chunk(added=(first.message,), details={"turn": 2}))
            response = yield from call_next(request.evolve(messages=(*request.messages, first.message)))
            return response.evolve(added=(first.message,), details={"turn": 2})

        for layers in ([noting], [mapping(louder), noting], [holding, noting]):
            made = call(streaming, layers, "one", "two")
            assert made.response.details == {"turn": 2}
            assert [event.details for event in made.ran.events if event.details] == [{"turn": 2}]

    def test_a_turn_without_the_provider(self, mode):
        """A layer within the tools may answer a turn by itself."""

        def cached(request, call_next):
            if len(request.messages) > 1:
                return Response("It is noon.", finish_reason="stop")
            return (yield from call_next(request))

        for layers in ([CLOCK, cached], [mapping(louder), CLOCK, cached], [holding, CLOCK, cached]):
            made = call(mode, layers, turn())
            assert made.response.text.lower() == "it is noon."
            assert len(made.response.added) == 2
            if mode.streaming:
                assert events(made.ran)[-1].lower() == "it is noon."
                assert events(made.ran)[-2] == "mark 2"

    def test_a_stored_answer_with_its_messages(self, mode):
        """A response with `added` that no provider gave reaches the consumer with its mark."""
        stored = Response("It is noon.", added=(Message.assistant("hm"), Message.user("and?")))

        def cached(request, call_next):
            yield from ()
            return stored

        for layers in ([cached], [mapping(lambda chunk: chunk), cached], [holding, cached], [StreamMeter(), cached]):
            made = call(mode, layers)
            assert made.response == stored
            if mode.streaming:
                assert [(event.text, event.added) for event in made.ran.events] == [(stored.text, stored.added)]

    @pytest.mark.parametrize(
        "item",
        [
            Chunk("x", added=(Message.user("hi"),)),
            Chunk(added=()),
            Response("x", added=(Message.user("hi"),)),
        ],
        ids=["messages", "empty", "response"],
    )
    def test_a_providers_mark_is_refused(self, streaming, item):
        """An answer of a provider is a single message."""
        made = call(streaming, [], ["a", item])
        assert isinstance(made.ran.error.__cause__, TypeError)
        assert "the provider ScriptedProvider yielded a Chunk with added=…" in str(made.ran.error.__cause__)

    @pytest.mark.parametrize("value", ["text", None, Message.user("hi"), [Chunk("a")]], ids=repr)
    def test_emit_takes_chunks_alone(self, mode, value):
        """`emit` names what it got."""

        def mw(request, call_next):
            yield from emit(value)

        error = call(mode, mw).ran.error
        assert isinstance(error, TypeError)
        assert str(error).startswith("emit: expected a Chunk, got ")

    def test_lists_of_messages(self, mode):
        """`added` may be any sequence of messages, and of nothing else."""

        def listing(request, call_next):
            first = yield from call_next(request)
            yield from emit(Chunk(added=[first.message]))
            response = yield from call_next(request.evolve(messages=[*request.messages, first.message]))
            return response.evolve(added=[first.message])

        for layers in ([listing], [mapping(louder), listing], [holding, listing]):
            assert call(mode, layers, "one", "two").response.added == (Message.assistant("one"),)

        def wrong(request, call_next):
            yield from emit(Chunk(added=["one"]))

        error = call(mode, wrong).ran.error
        assert isinstance(error, TypeError)
        assert str(error) == "emit: expected messages in Chunk.added, got a str; write Message.user(…), …"

    def test_nested_turns(self, mode):
        """A loop within a loop has the messages of both."""

        def again(request, call_next):
            first = yield from call_next(request)
            turn = (*first.added, first.message, Message.user("sure?"))
            yield from emit(Chunk(added=turn[len(first.added) :]))
            response = yield from call_next(request.evolve(messages=(*request.messages, *turn)))
            return response.evolve(added=(*turn, *response.added))

        for between in ([], [mapping(louder)], [holding]):
            made = call(mode, [*between, again, CLOCK], turn(), LAST, turn(index=1), ["Yes."])
            assert [message.text.lower() for message in made.response.added] == [
                *("let me look. ", "noon", "it is noon.", "sure?"),
                *("let me look. ", "noon"),
            ]
            assert made.response.text.lower() == "yes."


def long(text):
    """Return an answer that was cut at the limit of tokens."""
    return [text, Chunk(finish_reason="length", usage=Usage(output_tokens=1))]


class TestGoingOn:
    def test_after_the_limit_of_tokens(self, mode):
        """The same message goes on: its text is that of all parts, and `added` stays empty."""
        made = call(
            mode, going_on(), long("one "), long("two "), ["three", Chunk(finish_reason="stop")], request=REQUEST
        )
        assert made.response.text == "one two three"
        assert (made.response.added, made.response.finish_reason) == ((), "stop")
        assert made.provider.requests[-1].messages == (*REQUEST.messages, Message.assistant("one two "))
        if mode.streaming:
            assert events(made.ran) == ["one ", "", "mark 0", "two ", "", "mark 0", "three", ""]

    def test_after_a_cut(self, streaming):
        """An interrupted stream may go on where it ended."""
        made = call(streaming, going_on(), ["one ", ServerError("down")], ["two", Chunk(finish_reason="stop")])
        assert made.response.text == shown(made.ran) == "one two"

    @pytest.mark.parametrize(
        "between", [[], [mapping(louder)], [mapping(lambda chunk: chunk)], [StreamMeter(), Logging()]]
    )
    def test_the_partial_response_is_all_of_the_message(self, streaming, between):
        """Text before the mark is part of the message that goes on."""
        made = call(streaming, [*between, going_on(2)], ["one ", ServerError("down")], ["two ", ServerError("out")])
        assert isinstance(made.ran.error, StreamInterrupted)
        assert str(made.ran.error.__cause__) == "out"
        assert made.ran.error.partial.text == shown(made.ran)
        assert shown(made.ran).lower() == "one two "

    def test_a_further_request_needs_a_further_mark(self, streaming):
        """The mark admits what follows it, until there is output again."""

        def impatient(request, call_next):
            first = yield from call_next(request)
            yield from emit(Chunk(added=()))
            asked = request.evolve(messages=(*request.messages, first.message))
            yield from call_next(asked)
            return (yield from call_next(asked))

        for between in ([], [mapping(lambda chunk: chunk)], [holding]):
            made = call(streaming, [*between, impatient], "one ", "two ", "three")
            assert "again after output" in str(made.ran.error)
            assert len(made.provider.requests) == 2

    def test_a_retry_of_the_second_part(self, mode):
        """A failure before output of the next part is retried within."""
        made = call(
            mode,
            [going_on(), Retry(base_delay=0)],
            long("one "),
            ServerError("down"),
            ["two", Chunk(finish_reason="stop")],
        )
        assert made.response.text == "one two"
        assert len(made.provider.requests) == 3

    def test_within_a_combinator(self, mode):
        """A combinator sees one message, and neither ends nor resets it at the mark."""
        log = []
        layer = mapping(louder, lambda: log.append("end"), lambda: log.append("restart"))
        made = call(mode, [layer, going_on()], long("one "), ["two", Chunk(finish_reason="stop")])
        assert made.response.text == "ONE TWO"
        assert log == ["end"]
        made = call(mode, [holding, going_on()], long("one "), ["two", Chunk(finish_reason="stop")])
        assert made.response.text == "one two"
        if mode.streaming:
            assert events(made.ran) == ["one ", "", "mark 0", "two", ""]

    def test_text_that_a_function_keeps_for_the_end(self, mode):
        """A function may keep the text of all parts, and let it out once."""

        def gathered(request, call_next):
            kept = []
            return (
                yield from map_chunks(call_next(request), lambda c: kept.append(c.text), lambda: Chunk("".join(kept)))
            )

        made = call(mode, [gathered, going_on()], long("one "), long("two "), ["three", Chunk(finish_reason="stop")])
        assert made.response.text == "one two three"
        if mode.streaming:
            assert events(made.ran) == ["mark 0", "mark 0", "one two three"]

    def test_no_restart_of_a_part(self, streaming):
        """Whether a Restart makes the part or the whole message void is not known, neither to a consumer nor to a hold-back."""
        script = [long("one "), ["two ", ServerError("down")], "three"]
        layers = [in_two_parts, Retry(on_interrupt="restart", base_delay=0)]
        made = call(streaming, layers, *script, restarts=True)
        assert isinstance(made.ran.error.__cause__, ServerError)
        assert shown(made.ran) == "one two "
        made = call(streaming, [holding, *layers], *script, restarts=True)
        assert isinstance(made.ran.error, ServerError)
        assert made.ran.events == []


class TestWholeCalls:
    def test_what_is_emitted_goes_nowhere(self, whole):
        """Neither a combinator nor the consumer of a whole call sees a chunk; the response has it all."""
        seen = []

        def noisy(request, call_next):
            response = yield from call_next(request)
            yield from emit(Chunk("!"))
            return response.evolve(text=f"{response.text}!")

        made = call(whole, [mapping(lambda chunk: seen.append(chunk.text) or louder(chunk)), noisy], "hello")
        assert (made.response.text, seen) == ("HELLO!", ["hello!"])

    def test_at_end_runs_once(self, whole):
        """The end of a message that came whole is the end of the answer."""
        ends = []
        call(whole, [mapping(lambda chunk: chunk, lambda: ends.append(1)), CLOCK], turn(), LAST)
        assert ends == [1]

    def test_a_stored_stream_passes_as_one(self, whole):
        """A flow that only emits has emitted its answer, in every mode."""
        made = call(whole, [mapping(louder), replayed(Response("one two"))])
        assert made.response.text == "ONETWO"
