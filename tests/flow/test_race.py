"""`race`: several requests of one call, of which the first that answers wins."""

from __future__ import annotations

import contextvars

import pytest
from anyio.lowlevel import checkpoint
from support.leftovers import eventually
from support.powers import hedge, tools

from fluxibly.errors import DeadlineExceeded, ServerError, StreamInterrupted
from fluxibly.flow import ask, emit, hold_back, map_chunks, race, sleep
from fluxibly.middleware import Deadline, Fallback, Logging, Retry, StreamMeter, Timing
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.target import Target
from fluxibly.testing import AsyncScriptedProvider, Cut, Delay, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import MODES, run, run_async
from fluxibly.types import Chunk, Message, Request, Response, Restart, ToolCall, Usage

REQUEST = Request(model="m", messages="hi")
pytestmark = pytest.mark.parametrize("mode", MODES, ids=str)


class Call:
    """A call in a mode, in virtual time, and what became of it."""

    def __init__(self, mode, stack, *answers, **options):
        self.clock = VirtualClock()
        kind = AsyncScriptedProvider if mode.backend else ScriptedProvider
        self.provider = kind(*answers, clock=self.clock)
        self.ran = run(mode, self.provider, [self.note, *stack], REQUEST, clock=self.clock, **options)
        assert self.provider.opened == self.provider.closed
        assert self.ran.leaks == []

    def note(self, request, call_next):
        self.record = request.call
        return (yield from call_next(request))

    @property
    def text(self):
        if self.ran.error is not None:
            raise self.ran.error
        return self.ran.response.text

    @property
    def models(self):
        return [request.model for request in self.provider.requests]


def after(seconds, *steps):
    return [Delay(seconds), *steps]


def to(*models, delay=2.0):
    """Race the request against itself with other models."""

    def racing(request, call_next):
        return (yield from race(call_next, [request, *[request.evolve(model=model) for model in models]], delay))

    return racing


def patient(*models):
    """Race so that a failure does not send the next request."""

    def racing(request, call_next):
        requests = [request, *[request.evolve(model=model) for model in models]]
        return (yield from race(call_next, requests, 2, after_failure=False))

    return racing


class TestWhoWins:
    def test_the_first_in_time(self, mode):
        """An answer within the delay needs no second request."""
        call = Call(mode, [to("b")], after(1.5, "one"))
        assert call.text == "one"
        assert call.models == ["m"]
        assert call.clock.now() == 1.5
        assert call.record.attempts == 1

    def test_the_second_when_the_first_is_slow(self, mode):
        """The second request goes out after the delay, and its answer is that of the call."""
        call = Call(
            mode,
            [to("b")],
            after(9, "slow"),
            after(1, Chunk("fast", model="b-1", usage=Usage(input_tokens=1, output_tokens=2))),
        )
        assert call.text == "fast"
        assert call.models == ["m", "b"]
        assert call.clock.now() == 3
        record = call.record
        assert (record.attempts, record.model, record.usage, record.sent_model) == (
            2,
            "b-1",
            Usage(input_tokens=1, output_tokens=2),
            "b",
        )
        assert call.ran.response.total_usage == Usage(input_tokens=1, output_tokens=2)
        assert [(spent.model, spent.usage) for spent in record.spent] in (
            [("m", None), ("b", Usage(input_tokens=1, output_tokens=2))],
            [("b", Usage(input_tokens=1, output_tokens=2)), ("m", None)],
        )

    def test_the_first_though_the_second_was_sent(self, mode):
        """The second request does not win by being sent."""
        call = Call(mode, [to("b")], after(3, "one"), after(5, "two"))
        assert call.text == "one"
        assert call.models == ["m", "b"]
        assert call.clock.now() == 3

    def test_a_failure_starts_the_next_at_once(self, mode):
        """After a failure nobody waits for the delay."""
        call = Call(mode, [to("b", "c")], after(1, ServerError("down")), after(1, ServerError("down too")), "three")
        assert call.text == "three"
        assert call.models == ["m", "b", "c"]
        assert call.clock.now() == 2

    def test_a_failure_of_the_second(self, mode):
        """A branch that fails leaves the others alone."""
        call = Call(mode, [to("b")], after(5, "one"), after(1, ServerError("down")))
        assert call.text == "one"
        assert call.clock.now() == 5

    def test_a_failure_that_sends_nothing(self, mode):
        """With `after_failure=False`, the next waits for its time."""
        first = ServerError("down")
        assert Call(mode, [patient("b")], after(1, first), "never").ran.error is first
        call = Call(mode, [patient("b", "c")], after(9, "slow"), after(0.5, ServerError("down")), after(1, "three"))
        assert (call.text, call.clock.now()) == ("three", 5)

    def test_failures_of_all_that_were_sent(self, mode):
        """With `after_failure=False`, they end the race, though a request is left."""
        first = ServerError("first")
        call = Call(mode, [patient("b", "c")], after(3, first), after(0.5, ServerError("second")), "never")
        assert call.ran.error is first
        assert (call.models, call.clock.now()) == (["m", "b"], 3)

    def test_all_fail(self, mode):
        """The error of the first is raised, and the facts of the call are those of the first."""
        first = ServerError("first")
        call = Call(mode, [to("b", "c")], after(7, first), after(1, ServerError("b")), after(1, ServerError("c")))
        assert call.ran.error is first
        assert call.clock.now() == 7
        assert call.record.attempts == 3
        assert call.record.sent_model == "m"

    def test_no_delay(self, mode):
        """Without a delay all requests are sent at once."""
        call = Call(mode, [to("b", "c", delay=0)], after(3, "a"), after(2, "b"), after(1, "c"))
        assert call.text == "c"
        assert call.clock.now() == 1

    def test_one_request(self, mode):
        """A race of one is no race."""
        call = Call(mode, [to()], ["one"])
        assert call.text == "one"
        assert call.record.lanes is None

    def test_an_empty_answer_wins(self, mode):
        """An answer without output is an answer."""
        call = Call(mode, [to("b")], [Chunk(finish_reason="stop")], "two")
        assert call.text == ""
        assert call.models == ["m"]

    def test_a_branch_that_sends_nothing(self, mode):
        """A layer within may answer by itself."""

        def cached(request, call_next):
            if request.model == "m":
                yield from sleep(5)
                return (yield from call_next(request))
            return Response("cached", finish_reason="stop")

        call = Call(mode, [to("b"), cached])
        assert call.text == "cached"
        assert call.record.attempts == 0
        assert call.clock.now() == 2


class TestStreams:
    """What is particular to a stream; in a whole call the same middleware gives the same text."""

    def test_first_output_wins(self, mode):
        """Chunks without output are held with their branch, and only those of the winner are delivered."""
        slow = [Chunk(model="a-1"), Delay(9), "slow"]
        fast = [Chunk(model="b-1"), Delay(1), "fast", " one"]
        call = Call(mode, [to("b")], slow, fast)
        assert call.text == "fast one"
        if mode.streaming:
            assert [event.model for event in call.ran.events] == ["b-1", None, None]

    def test_the_rest_of_the_winner(self, mode):
        """The winner's stream goes on in its own time."""
        call = Call(mode, [to("b")], after(9, "slow"), after(1, "fast", Delay(5), " one"))
        assert call.text == "fast one"
        assert call.clock.now() == 8

    def test_an_error_after_output(self, mode):
        """The winner's failure is that of the call: in a stream nothing can be sent again."""
        call = Call(mode, [Retry(max_retries=3), to("b")], after(9, "slow"), after(1, "fast", Cut()), *["again"] * 8)
        if mode.streaming:
            assert isinstance(call.ran.error, StreamInterrupted)
            assert call.ran.error.partial.text == call.ran.text == "fast"
        else:
            assert call.ran.response.text in {"slow", "again"}

    def test_turns_of_the_winner(self, mode):
        """A winner may ask again after a mark; the later turns are not raced."""
        first = Response("Let me look. ", tool_calls=[ToolCall("c1", "clock", {})])
        stack = [to("b"), tools({"clock": lambda: "noon"})]
        call = Call(mode, stack, after(9, "slow"), first, "It is noon.")
        assert call.text == "It is noon."
        assert [message.role for message in call.ran.response.added] == ["assistant", "tool"]
        assert call.record.attempts == 3

    def test_a_race_in_each_turn(self, mode):
        """Outside of the race, each turn is raced."""
        first = Response("Let me look. ", tool_calls=[ToolCall("c1", "clock", {})])
        stack = [tools({"clock": lambda: "noon"}), to("b")]
        call = Call(mode, stack, after(9, "slow"), first, after(9, "slow"), after(1, "It is noon."))
        assert call.text == "It is noon."
        assert call.record.attempts == 4
        assert call.clock.now() == 5

    def test_a_restart_within_a_branch(self, mode):
        """Before output, a branch may begin again, whether the consumer takes a Restart or not."""

        def begins_again(request, call_next):
            yield from emit(Chunk(model="before"))
            yield Restart("for the test")
            return (yield from call_next(request))

        call = Call(mode, [to("b"), begins_again], after(9, "slow"), "fast")
        assert call.text == "fast"
        if mode.streaming:
            assert "before" not in [event.model for event in call.ran.events]

    @pytest.mark.parametrize("outer", [True, False])
    def test_streams_of_earlier_attempts_are_closed(self, mode, outer):
        """A stream that has ended is closed when the next attempt's takes its place, in the call and in a branch."""
        opened, closed = [], []

        class Empty:
            def stream(self, request):
                opened.append(Counted(Chunk(finish_reason="stop"), closed))
                return opened[-1]

        class AsyncEmpty(Empty):
            async def complete(self, request):
                return Response("", finish_reason="stop")

        def thrice(request, call_next):
            for _ in range(2):
                yield from call_next(request)
            return (yield from call_next(request))

        stack = [*([to("b")] if outer else []), thrice, to("c", delay=0)]
        run(mode, (AsyncEmpty if mode.backend else Empty)(), stack, REQUEST, clock=VirtualClock())
        assert len(closed) == len({*map(id, closed)}) == len(opened)
        assert len(opened) >= 3 or not mode.streaming

    def test_a_consumer_that_leaves(self, mode):
        """The winner's stream is closed."""
        if mode.streaming:
            call = Call(mode, [to("b")], after(9, "slow"), "fast one two", stop_after=1)
            assert call.ran.text == "fast"


class TestLayers:
    def test_retry_within(self, mode):
        """Each branch has its own retries, and waits in its own time."""
        stack = [to("b"), Retry(max_retries=2, base_delay=4, uniform=max)]
        call = Call(mode, stack, ServerError("x"), after(1, ServerError("y")), "fast")
        assert call.text == "fast"
        assert call.models[:2] == ["m", "b"]
        assert call.clock.now() == 4

    def test_retry_outside(self, mode):
        """A race that failed is made again."""
        stack = [Retry(max_retries=1, base_delay=4, uniform=max), to("b")]
        call = Call(mode, stack, ServerError("x"), ServerError("y"), "good")
        assert call.text == "good"
        assert call.record.attempts == 3

    def test_a_race_in_a_race(self, mode):
        """Branches may race themselves."""
        stack = [to("b", delay=4), hedge(1)]
        call = Call(mode, stack, after(9, "m1"), after(9, "m2"), after(9, "b1"), after(1, "b2"))
        assert call.text == "b2"
        assert call.models == ["m", "m", "b", "b"]
        assert call.clock.now() == 6
        assert call.record.attempts == 4

    def test_turns_in_a_race_in_a_race(self, mode):
        """What a later turn of the winner says is said of the call, however many races are around it."""
        first = Response("Let me look. ", tool_calls=[ToolCall("c1", "clock", {})], model="m-1")
        later = [Chunk("Noon.", model="m-2", usage=Usage(input_tokens=7, output_tokens=1))]
        call = Call(mode, [hedge(4), hedge(4), hedge(4), tools({"clock": lambda: "noon"})], first, later)
        assert call.text == "Noon."
        record = call.record
        assert (record.attempts, record.model, record.usage) == (2, "m-2", Usage(input_tokens=7, output_tokens=1))

    def test_another_target(self, mode):
        """A branch may ask another provider, and the answer says whose it is."""

        class Other:
            def complete(self, request):
                return Response(f"other {request.model}", usage=Usage(input_tokens=3, output_tokens=4))

            def stream(self, request):
                yield Chunk(f"other {request.model}", usage=Usage(input_tokens=3, output_tokens=4))

        call = Call(mode, [hedge(2, to=[Target(Other(), model="o")])], after(9, "slow"))
        assert call.text == "other o"
        assert call.ran.response.provider == "Other"
        assert call.record.provider.name == "Other"

    def test_fallback_within(self, mode):
        """A fallback within a branch belongs to that branch."""

        class Other:
            def complete(self, request):
                return Response("other")

            def stream(self, request):
                yield "other"

        stack = [hedge(2), Fallback(to=[Target(Other())])]
        call = Call(mode, stack, after(9, "slow"), after(1, ServerError("down")))
        assert call.text == "other"
        assert call.clock.now() == 3

    def test_a_deadline_outside(self, mode):
        """A deadline ends all branches."""
        call = Call(mode, [Deadline(4), to("b")], after(9, "slow"), after(9, "slow"))
        assert isinstance(call.ran.error, DeadlineExceeded)
        assert call.clock.now() == 4
        assert call.record.leash is None

    def test_a_deadline_within(self, mode):
        """Each branch has its own deadline, and it is gone with the branch."""
        call = Call(mode, [to("b"), Deadline(3)], after(9, "slow"), after(2, "fast", Delay(0.5), " one"))
        assert call.text == "fast one"
        assert call.record.leash is None

    def test_a_deadline_that_a_sleep_meets(self, mode):
        """A branch that sleeps is woken at its deadline."""

        def sleepy(request, call_next):
            yield from sleep(50)
            return (yield from call_next(request))

        call = Call(mode, [to("b", delay=1), Deadline(3), sleepy])
        assert isinstance(call.ran.error, DeadlineExceeded)
        assert call.clock.now() == 4

    def test_combinators(self, mode):
        """Combinators inside and outside of a race see the winner's chunks."""

        def shout(request, call_next):
            return (yield from map_chunks(call_next(request), lambda chunk: Chunk(chunk.text.upper())))

        def hold(request, call_next):
            return (yield from hold_back(call_next(request)))

        for stack in ([shout, to("b")], [to("b"), shout], [hold, to("b"), shout], [shout, to("b"), hold]):
            call = Call(mode, stack, after(9, "slow"), after(1, "fast", Delay(1), " one"))
            assert call.text == "FAST ONE"

    def test_a_hold_back_within(self, mode):
        """What a branch holds back is no output yet."""

        def hold(request, call_next):
            return (yield from hold_back(call_next(request)))

        call = Call(mode, [to("b"), hold], ["early", Delay(9), " end"], after(1, "fast"))
        assert call.text == "fast"
        assert call.clock.now() == 3

    def test_an_error_of_an_outer_function(self, mode):
        """A function that fails on the winner's chunk ends the winner's attempt, not the loser's."""

        def broken(chunk):
            raise LookupError(chunk.text)

        def mapped(request, call_next):
            return (yield from map_chunks(call_next(request), broken))

        call = Call(mode, [mapped, to("b")], after(9, "slow"), after(1, "fast", " one"))
        assert isinstance(call.ran.error, LookupError)
        assert call.record.sending is None

    def test_a_question_within(self, mode):
        """A branch that asks first waits for the answer in its lane."""

        def informed(request, call_next):
            answer = yield from ask(request.evolve(messages=f"what of {request.model}?"))
            return (yield from call_next(request.evolve(messages=(*request.messages, Message.user(answer.text)))))

        call = Call(mode, [to("b"), informed], after(9, "late"), after(1, "early"), "fast")
        assert call.text == "fast"
        assert call.record.attempts == 1
        assert len(call.record.spent) == 3
        assert call.clock.now() == 3

    def test_a_race_for_a_question_in_a_stream(self, mode):
        """A question may be raced while the stream of the call is open, which goes on."""

        def judged(request, call_next):
            asked = []

            def each(chunk):
                question = ask(request.evolve(messages=f"{chunk.text}?"), through=[to("c")])
                asked.append((yield from question).text)
                yield chunk

            response = yield from map_chunks(call_next(request), each)
            assert asked[0] == "yes"
            return response

        answers = [after(9, "slow"), after(1, "fast", " one"), after(9, "no"), after(1, "yes"), *["yes"] * 3]
        call = Call(mode, [judged, to("b")], *answers)
        assert call.text == "fast one"
        call = Call(mode, [to("b"), judged], after(9, "slow"), after(1, "fast", " one"), *answers[2:])
        assert call.text == "fast one"

    def test_the_default_layers(self, mode):
        """Measurements outside of a race are those of the winner."""
        stack = [Logging(), Timing(), StreamMeter(), to("b"), StreamMeter(), Timing()]
        call = Call(mode, stack, after(9, "slow"), after(1, "fast", Delay(1), " one"))
        assert call.text == "fast one"
        assert call.record.timings["call"] == 4
        if mode.streaming:
            assert call.ran.response.stats.chunks == 2
            assert call.ran.response.stats.time_to_first_chunk == 3


class Counted:
    """A stream of one item that counts how often it is closed. No garbage collector closes it."""

    def __init__(self, item, closed):
        self.items, self.closed = [item], closed

    def __iter__(self):
        return self

    __aiter__ = __iter__

    def __next__(self):
        if not self.items:
            raise StopIteration
        return self.items.pop()

    async def __anext__(self):
        if not self.items:
            raise StopAsyncIteration
        return self.items.pop()

    def close(self):
        self.closed.append(self)

    async def aclose(self):
        self.closed.append(self)


class TestMistakes:
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_what_is_no_effect(self, mode, when):
        """The error names the middleware in the branch, before and after it has won."""

        def sloppy(request, call_next):
            if when == "before":
                yield "text"
            response = yield from call_next(request)
            yield "text"
            return response

        call = Call(mode, [to("b"), sloppy], "one", "two")
        error = call.ran.error
        if isinstance(error, StreamInterrupted):
            error = error.__cause__
        assert isinstance(error, TypeError)
        assert "sloppy yielded a str" in str(error)


class TestEnds:
    def test_the_loser_is_over_before_the_answer_goes_on(self, mode):
        """A loser's `finally` runs before the answer reaches the layers further out."""
        log = []

        def outer(request, call_next):
            response = yield from call_next(request)
            log.append("answer")
            return response

        def inner(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                log.append(f"end {request.model}")

        assert Call(mode, [outer, to("b"), inner], after(9, "slow"), after(1, "fast")).text == "fast"
        assert log == (["end m", "end b", "answer"] if mode.streaming else ["end b", "end m", "answer"])

    def test_errors_as_the_loser_ends(self, mode, caplog):
        """A layer of a loser that fails in its `finally`, or yields there, changes nothing, and is logged."""

        def fails(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                if request.model == "m":
                    raise LookupError("secret")

        def yields(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                if request.model == "m":
                    yield from sleep(1)

        for layer, said in ((fails, "LookupError"), (yields, "yielded again")):
            caplog.clear()
            assert Call(mode, [to("b"), layer], after(9, "slow"), after(1, "fast")).text == "fast"
            assert said in caplog.text
            assert "secret" not in caplog.text

    def test_contexts(self, mode):
        """Each branch has context variables of its own, and those outside are visible in all."""
        var = contextvars.ContextVar("var", default="none")
        seen = []

        def outer(request, call_next):
            token = var.set("outer")
            try:
                response = yield from call_next(request)
                seen.append(("outer", var.get()))
                return response
            finally:
                var.reset(token)

        def inner(request, call_next):
            seen.append((request.model, var.get()))
            token = var.set(request.model)
            try:
                yield from sleep(1)
                response = yield from call_next(request)
                seen.append((request.model, var.get()))
                return response
            finally:
                var.reset(token)

        assert Call(mode, [outer, to("b"), inner], after(9, "slow"), after(1, "fast")).text == "fast"
        assert seen == [("m", "outer"), ("b", "outer"), ("b", "b"), ("outer", "outer")]
        assert var.get() == "none"

    def test_the_provider_sees_its_branch(self, mode):
        """A provider sees the context variables of the layers of its branch."""
        var = contextvars.ContextVar("branch", default="none")
        seen = {}

        def inner(request, call_next):
            token = var.set(request.model)
            try:
                return (yield from call_next(request))
            finally:
                var.reset(token)

        class Noting:
            def _next_steps(self, request):
                seen[request.model] = var.get()
                return super()._next_steps(request)

        class Sync(Noting, ScriptedProvider):
            pass

        class Async(Noting, AsyncScriptedProvider):
            pass

        clock = VirtualClock()
        provider = (Async if mode.backend else Sync)(after(9, "slow"), after(1, "fast"), clock=clock)
        assert run(mode, provider, [to("b"), inner], REQUEST, clock=clock).response.text == "fast"
        assert seen == {"m": "m", "b": "b"}

    def test_cleanups(self, mode):
        """A loser's cleanup runs when the loser is given up, the winner's at the end of the call, each once."""
        log = []

        def cleaning(request, call_next):
            request.call.on_end(lambda: log.append(f"cleanup {request.model}"))
            return (yield from call_next(request))

        def outer(request, call_next):
            request.call.on_end(lambda: log.append("cleanup of the call"))
            response = yield from call_next(request)
            log.append("answer")
            return response

        assert Call(mode, [outer, to("b"), cleaning], after(9, "slow"), after(1, "fast")).text == "fast"
        assert log == ["cleanup m", "answer", "cleanup b", "cleanup of the call"]

    def test_a_cleanup_that_a_loser_has_just_begun(self, mode):
        """It runs to its end, though the loser is given up before its first step."""
        log = []

        async def agive():
            await checkpoint()
            log.append("given")

        def limited(request, call_next):
            if request.model == "b":
                return (yield from call_next(request))
            slot = request.call.on_end(lambda: log.append("given"), agive)
            response = yield from call_next(request)
            yield from slot.run()
            return response

        class Both:
            """A provider whose two answers come at the same time."""

            def complete(self, request):
                return Response("one")

        class AsyncBoth:
            async def complete(self, request):
                await checkpoint()
                return Response("one")

            async def stream(self, request):
                await checkpoint()
                yield "one"

        if mode.backend:

            async def main():
                pipeline = AsyncPipeline(AsyncBoth(), [to("b", delay=0), limited])
                return await pipeline.complete(REQUEST)

            run_async(main, mode.backend)
        else:
            Pipeline(Both(), [to("b", delay=0), limited]).complete(REQUEST)
        assert eventually(lambda: log == ["given"])

    def test_the_request_stays_as_it_is(self, mode):
        """Law 7: the caller's request is never changed."""
        Call(mode, [to("b")], after(9, "slow"), after(1, "fast"))
        assert REQUEST.call.attempts == 0
        assert REQUEST.call.spent == []
