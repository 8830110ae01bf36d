"""`ask`: a call within a call, in all modes, whole whatever the mode."""

from __future__ import annotations

import attrs
import pytest
from support.calling import call
from support.observing import Observing
from support.powers import judged, limited, replayed, smooth, tools

from fluxibly.calls import CallRecord
from fluxibly.errors import ProviderError, ServerError, StreamInterrupted
from fluxibly.flow import ask, compose, emit, hold_back, map_chunks, sleep
from fluxibly.flow.effects import AskEnd, Send
from fluxibly.flow.relay import Relay
from fluxibly.middleware import Logging, Metrics, Retry, StreamMeter, Timing, Tracing, Validation
from fluxibly.target import Target
from fluxibly.testing import ScriptedProvider
from fluxibly.testing.modes import MODES
from fluxibly.types import Chunk, Message, Request, Response, ToolCallDelta, Usage

REQUEST = Request(model="m", messages="hi")


@pytest.fixture(params=[mode for mode in MODES if mode.streaming], ids=str)
def streaming(request):
    return request.param


def used(text, tokens):
    return [text, Chunk(usage=Usage(output_tokens=tokens), model="m-9")]


def asking(when, through=(), keep=None, **options):
    """Return a middleware that asks before, within or after the answer, and puts what it heard into the id."""

    def mw(request, call_next):
        heard = []

        def question():
            answer = yield from ask(request.evolve(messages=f"{when}?"), through=through, **options)
            heard.append(answer.text)
            if keep is not None:
                keep.append(answer)

        def fn(chunk):
            if not heard:
                yield from question()
            yield chunk

        if when == "before":
            yield from question()
        response = yield from (map_chunks(call_next(request), fn) if when == "within" else call_next(request))
        if when == "after":
            yield from question()
        return response.evolve(id=heard[0])

    return mw


WHEN = ["before", "within", "after"]


def script(when, answer, *questions):
    return [*questions, answer] if when == "before" else [answer, *questions]


def texts(ran):
    return [event.text for event in ran.events]


class TestWhen:
    @pytest.mark.parametrize("when", WHEN)
    def test_it_changes_nothing_of_the_call(self, mode, when):
        """The answer of the call is what it would be without the question."""
        made = call(mode, asking(when), *script(when, used("one two", 5), used("fine", 7)))
        assert made.response == Response("one two", usage=Usage(output_tokens=5), model="m-9", id="fine")
        assert made.record.attempts == 1
        assert (made.record.usage, made.record.model) == (Usage(output_tokens=5), "m-9")
        assert (made.record.finish_reason, made.record.sending) == (None, None)
        if mode.streaming:
            assert made.ran.text == "one two"

    @pytest.mark.parametrize("when", WHEN)
    def test_its_tokens_are_spent(self, mode, when):
        """`spent` has an entry for each, and `total_usage` is their sum."""
        made = call(mode, asking(when), *script(when, used("one", 5), used("fine", 7)))
        assert sorted(spent.usage.output_tokens for spent in made.record.spent) == [5, 7]
        assert made.response.total_usage == Usage(output_tokens=12)

    @pytest.mark.parametrize("when", WHEN)
    def test_its_own_stack(self, mode, when):
        """`through` holds for the question alone."""
        made = call(mode, asking(when, [Retry(base_delay=0)]), *script(when, "one", ServerError("down"), "fine"))
        assert (made.response.text, made.response.id) == ("one", "fine")
        assert made.record.attempts == 1
        assert len(made.record.spent) == 3
        made = call(mode, asking(when), *script(when, "one", ServerError("down"), "fine"))
        assert root(made.ran.error).args == ("down",)

    def test_in_the_middle_of_a_stream(self, streaming):
        """The question is asked between two chunks, and the stream goes on where it was."""
        log = []

        def guard(request, call_next):
            def fn(chunk):
                answer = yield from ask(request.evolve(messages=f"fine? {chunk.text}"))
                log.append(f"heard {answer.text}")
                yield chunk

            return (yield from map_chunks(call_next(request), fn))

        made = call(streaming, guard, ["a", "b"], "yes", "so", watch=lambda event: log.append(event.text))
        assert log == ["heard yes", "a", "heard so", "b"]
        assert (made.provider.opened, made.response.text) == (1, "ab")

    @pytest.mark.parametrize("outer", ["map_chunks", "hold_back", "upper"])
    def test_past_a_combinator_after_output(self, streaming, outer):
        """A combinator, which refuses a second request after output, lets a question pass."""

        def layer(request, call_next):
            if outer == "hold_back":
                return (yield from hold_back(call_next(request)))
            change = str.upper if outer == "upper" else str
            return (yield from map_chunks(call_next(request), lambda c: attrs.evolve(c, text=change(c.text))))

        made = call(streaming, [layer, asking("after")], "one", "fine")
        assert (made.response.text.lower(), made.response.id) == ("one", "fine")

    def test_after_a_failure(self, mode):
        """A middleware may ask about an error before it answers in its place."""

        def explained(request, call_next):
            try:
                return (yield from call_next(request))
            except ProviderError as error:
                return (yield from ask(request.evolve(messages=f"what is {error}?")))

        made = call(mode, explained, ServerError("down"), "It is down.")
        assert made.response.text == "It is down."
        if mode.streaming:
            assert texts(made.ran) == ["It is down."]

    def test_instead_of_the_provider(self, mode):
        """The answer to a question may be the answer of the call: it reaches the consumer as a whole answer does."""

        def asked(request, call_next):
            return (yield from ask(request))

        made = call(mode, asked, "one two")
        assert made.response == Response("one two")
        assert made.record.attempts == 0
        if mode.streaming:
            assert texts(made.ran) == ["one two"]

    def test_a_judge_at_the_end(self, mode):
        """The pieces are let out when the judge has answered."""
        for verdict, text in (("yes", "one two"), ("no", "[refused]")):
            made = call(mode, judged(), ["one ", "two"], verdict)
            assert made.response.text == text
            assert made.provider.requests[1].messages[0].text == "Is this fine? one two"
            if mode.streaming:
                assert made.ran.text == text


def root(error):
    return error.__cause__ if isinstance(error, StreamInterrupted) else error


class TestItsAnswer:
    def test_who_answered(self, mode):
        """The response of a question says who answered, and what that cost with all its attempts."""
        kept = []
        call(mode, asking("before", [Retry(base_delay=0)], kept), ServerError("down"), used("fine", 7), "one")
        assert (kept[0].provider, kept[0].model) == ("scripted", "m-9")
        assert kept[0].usage == Usage(output_tokens=7)
        assert kept[0].total_usage == Usage(output_tokens=7)

    def test_another_model(self, mode):
        """A target answers in place of the call's own provider, which stays that of the call."""
        kept = []
        judge = Target(ScriptedProvider(used("fine", 7)), model="judge")
        made = call(mode, asking("before", (), kept, target=judge), used("one", 5))
        assert made.response.text == "one"
        assert made.record.target is None
        assert [(spent.model, spent.usage.output_tokens) for spent in made.record.spent] == [("judge", 7), ("m-1", 5)]
        assert [request.model for request in made.provider.requests] == ["m-1"]

    def test_a_stack_without_the_provider(self, mode):
        """A layer of `through` may answer; nothing is sent and nothing is spent."""
        kept = []

        def cached(request, call_next):
            yield from ()
            return Response("stored")

        made = call(mode, asking("before", [cached], kept), "one")
        assert kept[0].text == "stored"
        assert kept[0].total_usage is None
        assert len(made.record.spent) == 1

    def test_a_stack_that_returns_something_else(self, mode):
        """The error names the question's stack."""

        def forgetful(request, call_next):
            yield from call_next(request)

        error = call(mode, asking("before", [forgetful]), "fine", "one").ran.error
        assert isinstance(error, TypeError)
        assert "an ask's stack returned None, expected a Response" in str(error)

    def test_a_str(self, mode):
        """A layer may return a str, as a provider may."""
        kept = []

        def brief(request, call_next):
            yield from call_next(request)
            return "brief"

        call(mode, asking("before", [brief], kept), "long", "one")
        assert kept[0].text == "brief"


class TestItsChunks:
    """A question is whole, so none of what its stack lets out reaches the consumer of the call."""

    @pytest.mark.parametrize("when", WHEN)
    def test_emitted(self, mode, when):
        """A chunk that a layer of `through` emits stays inside."""
        made = call(mode, asking(when, [replayed(Response("stored answer"))]), "one")
        assert (made.response.text, made.response.id) == ("one", "storedanswer")
        assert [text for text in texts(made.ran) if text] == (["one"] if mode.streaming else [])

    @pytest.mark.parametrize("when", WHEN)
    @pytest.mark.parametrize("outer", [[], ["upper"], ["hold"]], ids=["", "upper", "hold"])
    def test_tools(self, mode, when, outer):
        """Turns of a question are its own: no mark passes, and `added` is that of the question."""
        asks = Chunk(tool_calls=(ToolCallDelta(index=0, id="c", name="clock", arguments="{}"),))

        def upper(request, call_next):
            return (yield from map_chunks(call_next(request), lambda c: attrs.evolve(c, text=c.text.upper())))

        def hold(request, call_next):
            return (yield from hold_back(call_next(request)))

        kept = []
        through = [*[{"upper": upper, "hold": hold}[name] for name in outer], tools({"clock": lambda: "noon"})]
        made = call(mode, asking(when, through, kept), *script(when, "one", ["look", asks], "it is noon"))
        assert kept[0].text.lower() == "it is noon"
        assert [message.text for message in kept[0].added] == ["look", "noon"]
        assert (made.response.text, made.response.added) == ("one", ())
        assert all(event.added is None for event in made.ran.events)

    def test_a_stream_meter_does_not_count_them(self, streaming):
        """The measurements are of the call's own stream."""
        made = call(streaming, [StreamMeter(), asking("before", [StreamMeter()])], "a long answer", "one")
        assert (made.response.stats.chunks, made.response.stats.characters) == (1, 3)


class TestItsRecord:
    def test_what_is_shared(self, mode):
        """Notes and timings are the call's; the rest is the question's own."""
        records = []

        def noting(request, call_next):
            records.append(request.call)
            request.call.notes["seen"] = True
            request.call.cache_hit = True
            return (yield from call_next(request))

        made = call(mode, asking("after", [noting]), "one", "fine")
        (inner,) = records
        assert inner is not made.record
        assert inner.nested
        assert not inner.streaming
        assert inner.notes is made.record.notes
        assert inner.timings is made.record.timings
        assert inner.spent is made.record.spent
        assert (inner.attempts, made.record.attempts) == (1, 1)
        assert (made.record.cache_hit, made.record.nested) == (False, False)
        assert made.record.notes == {"seen": True}

    def test_timing_does_not_count_it(self, mode):
        """The attempts of a call are its own."""
        made = call(mode, [Timing(), asking("after", [Retry(base_delay=0)])], "one", ServerError("down"), "fine")
        assert {*made.record.timings} == {"call", "attempt.0"}

    def test_a_question_within_a_question(self, mode):
        """Each has a record of its own, and all share what was spent."""
        kept, records = [], []

        def doubting(request, call_next):
            records.append(request.call)
            answer = yield from call_next(request)
            second = yield from ask(request.evolve(messages="sure?"), through=[third])
            return answer.evolve(text=f"{answer.text} {second.text}")

        def third(request, call_next):
            records.append(request.call)
            return (yield from call_next(request))

        made = call(mode, asking("before", [doubting], kept), used("fine", 7), used("sure", 8), used("one", 5))
        assert (made.response.text, made.response.id) == ("one", "fine sure")
        assert kept[0].total_usage == Usage(output_tokens=15)
        assert made.response.total_usage == Usage(output_tokens=20)
        assert made.record.attempts == 1
        assert len({id(record) for record in (*records, made.record)}) == 3

    def test_its_cleanups(self, mode):
        """They run when the question has ended, before the call goes on."""
        log = []

        def slow(request, call_next):
            request.call.on_end(lambda: log.append("given back"))
            return (yield from call_next(request))

        def mw(request, call_next):
            yield from ask(request, through=[slow])
            log.append("asked")
            return (yield from call_next(request))

        call(mode, mw, "fine", "one")
        assert log == ["given back", "asked"]
        log.clear()
        call(
            mode, asking("before", [limited(lambda: log.append("take"), lambda: log.append("give"))]), ServerError("x")
        )
        assert log == ["take", "give"]

    def test_a_request_of_no_call(self, mode):
        """A request that was made anew works, but belongs to no call: its tokens are not those of the call."""

        def detached(request, call_next):
            answer = yield from ask(Request(model="m-3", messages="anew?"))
            response = yield from call_next(request)
            return response.evolve(id=answer.text)

        made = call(mode, detached, used("fine", 7), used("one", 5))
        assert (made.response.text, made.response.id) == ("one", "fine")
        assert [request.model for request in made.provider.requests] == ["m-3", "m-1"]
        assert made.response.total_usage == Usage(output_tokens=5)


class Passing(Relay):
    """A middleware that names what passes it."""

    def __init__(self):
        self.log = []

    def __call__(self, request, call_next):
        return (yield from self.over(call_next(request)))

    def see(self, effect):
        if isinstance(effect, (Send, AskEnd)):
            self.log.append((type(effect).__name__, effect.request.messages[0].text))
        return effect


class TestLayers:
    def test_what_passes_the_layers_further_out(self, mode):
        """A question passes them as an attempt, and so does its end if there is anything to clean up."""
        outer = Passing()

        def cleaning(request, call_next):
            request.call.on_end(list)
            return (yield from call_next(request))

        call(mode, [outer, asking("before")], "fine", "one", request=REQUEST)
        call(mode, [outer, asking("before", [cleaning])], ServerError("down"), request=REQUEST)
        assert outer.log == [("Send", "before?"), ("Send", "hi"), ("Send", "before?"), ("AskEnd", "before?")]

    def test_its_observers_are_those_further_out(self, mode):
        """A layer further in does not observe it. Its end is noted whether it succeeds or not."""
        outer, inner = Observing(), Observing()
        call(mode, [outer, asking("before"), inner], "fine", "one", request=REQUEST)
        (asked,) = outer.asks
        assert asked.ends == [("fine", True), ("fine",)]
        assert outer.ends == inner.ends == [("one", True)]
        assert inner.asks == []
        outer = Observing()
        call(mode, [outer, asking("before")], ServerError("down"), request=REQUEST)
        assert outer.asks[0].ends == [(ServerError, True), (ServerError,)]
        assert outer.ends == []

    def test_between_two_chunks_a_layer_further_in_does_not_observe_it(self, mode):
        """Its flow is under way, but the question is asked outside of it."""
        outer, inner = Observing(), Observing()
        call(mode, [outer, asking("within"), inner], *script("within", ["one ", "two"], "fine"), request=REQUEST)
        assert len(outer.asks) > 0
        assert inner.asks == []
        assert all(asked.ends == [("fine", True), ("fine",)] for asked in outer.asks)

    @pytest.mark.parametrize("when", WHEN)
    @pytest.mark.parametrize(
        "outer",
        [
            Logging(),
            Tracing(),
            Metrics(),
            StreamMeter(),
            Validation(hold=True),
            Retry(),
            Timing(layers=True),
            smooth(0),
        ],
        ids=lambda layer: repr(layer)[:16],
    )
    def test_built_in_layers_outside(self, mode, when, outer):
        """No layer takes a question for an attempt of the call."""
        made = call(mode, [outer, asking(when)], *script(when, ["one ", "two"], "fine"))
        assert (made.response.text, made.response.id) == ("one two", "fine")
        assert made.record.attempts == 1

    def test_a_retry_outside_asks_again(self, mode):
        """Before output, an error of a question is an error of the call, which may be retried."""
        made = call(mode, [Retry(base_delay=0), asking("before")], ServerError("down"), "fine", "one")
        assert (made.response.text, made.response.id) == ("one", "fine")

    def test_a_retry_outside_after_output(self, streaming):
        """After output, nothing is retried."""
        made = call(streaming, [Retry(base_delay=0), asking("after")], "one", ServerError("down"), "two")
        assert isinstance(made.ran.error, StreamInterrupted)
        assert made.ran.error.partial.text == "one"
        assert isinstance(made.ran.error.__cause__, ServerError)


class TestErrors:
    def test_the_middleware_may_catch_them(self, mode):
        """An error of a question is raised at the `yield from`."""

        def tolerant(request, call_next):
            response = yield from call_next(request)
            try:
                yield from ask(request.evolve(messages="fine?"))
            except ServerError as error:
                return response.evolve(id=str(error))
            return response

        made = call(mode, tolerant, "one", ServerError("down"))
        assert (made.response.text, made.response.id) == ("one", "down")

    @pytest.mark.parametrize("when", WHEN)
    def test_the_log_does_not_quote_the_question(self, mode, when, caplog):
        """An error of a service may quote the question, which has the user's content in it (law 9)."""
        address = "Ann Smith lives in Elm Street 9"

        def wordy(request, call_next):
            return (yield from call_next(request.evolve(messages=f"fine? {address}")))

        error = ServerError(f"cannot judge: fine? {address}")
        made = call(mode, [Logging(), asking(when, [wordy])], *script(when, "one", error))
        assert address in str(root(made.ran.error))
        assert "error_type=ServerError" in caplog.text
        assert address not in caplog.text

    def test_an_interrupt(self, mode):
        """Ctrl-C passes."""
        interrupt = KeyboardInterrupt()
        made = call(mode, asking("before"), interrupt)
        assert made.ran.error is interrupt

    @pytest.mark.parametrize("value", ["fine?", None, Message.user("fine?")], ids=repr)
    def test_what_is_no_request(self, mode, value):
        """The error says what to write."""

        def mw(request, call_next):
            yield from ask(value)

        error = call(mode, mw).ran.error
        assert isinstance(error, TypeError)
        assert str(error).startswith("ask: expected a Request, got ")
        assert str(error).endswith("write ask(request.evolve(messages=…))")

    def test_a_single_layer(self, mode):
        """`through` is a list."""
        error = call(mode, asking("before", Retry())).ran.error
        assert isinstance(error, TypeError)
        assert str(error) == "ask: expected a list of middleware in through, got a Retry; write through=[…]"

    def test_what_is_no_target(self, mode):
        """The error says what a target is."""
        error = call(mode, asking("before", target="other")).ran.error
        assert isinstance(error, TypeError)
        assert "target: expected a Target, got a str" in str(error)


def test_a_composed_stack_needs_no_pipeline():
    """A question can be stepped by hand like any flow."""

    def mw(request, call_next):
        answer = yield from ask(request.evolve(messages="fine?"))
        return answer.evolve(text=answer.text.upper())

    flow = compose([mw])(REQUEST)
    effect = next(flow)
    assert isinstance(effect, Send)
    assert effect.request.call is not REQUEST.call
    effect.sent = True
    with pytest.raises(StopIteration) as stopped:
        flow.send("fine")
    assert stopped.value.value.text == "FINE"


def test_waits_of_a_question(mode):
    """A layer of `through` may wait and emit; the call waits with it."""

    def slow(request, call_next):
        yield from sleep(2)
        yield from emit(Chunk("nowhere"))
        return (yield from call_next(request))

    made = call(mode, asking("before", [slow]), "fine", "one")
    assert made.clock.sleeps == [2]
    assert made.ran.text == ("one" if mode.streaming else "")


def test_a_fork_shares_and_owns():
    """A record within a call has the call's limits and clock, and nothing of its attempts."""
    outer = CallRecord()
    outer.attempts, outer.model, outer.delivered = 3, "m-9", ["a"]
    inner = outer.fork()
    assert (inner.attempts, inner.model, inner.delivered, inner.endings or []) == (0, None, [], [])
    assert inner.clock is outer.clock
    assert inner.layers is outer.layers
