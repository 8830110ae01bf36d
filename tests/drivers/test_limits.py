"""The limits of calls: deadlines, limits on a stream's waits, and `timeout=`, whether the provider keeps them or not."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
import weakref
from contextlib import suppress
from functools import partial

import anyio
import pytest
from anyio.lowlevel import checkpoint
from support.calling import REQUEST, scripted
from support.leftovers import interrupt_until

from fluxibly.errors import (
    DeadlineExceeded,
    RateLimitError,
    RequestTimeout,
    ServerError,
    StreamInterrupted,
    StreamStalled,
    outcome_of,
    root_cause,
)
from fluxibly.flow import ask, map_chunks, perform, sleep
from fluxibly.limits import Leash, Timeouts
from fluxibly.middleware import Deadline, Fallback, Logging, Retry, StreamTimeout
from fluxibly.pipeline import SYSTEM_CLOCK, AsyncPipeline, Pipeline
from fluxibly.target import Target
from fluxibly.testing import AsyncScriptedProvider, Delay, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import BACKENDS, MODES, run_async
from fluxibly.types import Chunk

STREAMS = [mode for mode in MODES if mode.streaming]
SOON = 0.1
"""Seconds of a limit in real time."""
LONG = 30.0
"""Seconds that no test lasts."""


class StillClock(type(SYSTEM_CLOCK)):
    """A clock that stands still, so that however slow the test is, each wait may take as long as its limit says."""

    now = staticmethod(lambda: 0.0)


STILL = StillClock()


def workers():
    """Return the threads in which limited calls are made."""
    return [thread for thread in threading.enumerate() if thread.name == "fluxibly-worker"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    for thread in workers():
        thread.join(5)
    assert workers() == []


class Made:
    """A call that was made: the texts that it delivered, and the error that the caller got."""

    def __init__(self, mode, provider, middleware, *, clock, timeout=None, watch=None):
        self.texts = []
        self.error = None

        def take(chunk):
            self.texts.append(chunk.text)
            if watch is not None:
                watch(chunk)

        def make():
            pipeline = Pipeline(provider, middleware, clock=clock)
            if not mode.streaming:
                self.texts.append(pipeline.complete(REQUEST, timeout=timeout).text)
                return
            with pipeline.stream(REQUEST, timeout=timeout) as stream:
                for chunk in stream:
                    take(chunk)

        async def amake():
            pipeline = AsyncPipeline(provider, middleware, clock=clock)
            if not mode.streaming:
                self.texts.append((await pipeline.complete(REQUEST, timeout=timeout)).text)
                return
            async with pipeline.stream(REQUEST, timeout=timeout) as stream:
                async for chunk in stream:
                    take(chunk)

        try:
            if mode.backend is None:
                make()
            else:
                run_async(amake, mode.backend)
        except Exception as error:  # noqa: BLE001  # whatever the caller gets is the result
            self.error = error

    @property
    def text(self):
        """The text of a call that succeeded."""
        if self.error is not None:
            raise self.error
        return "".join(self.texts)


def slowly(mode, middleware, *answers, pause=0.0, clock=None, **options):
    """Make a call in virtual time, whose consumer takes `pause` seconds for each event; with its provider and clock."""
    clock = clock or VirtualClock()
    provider = scripted(mode, *answers, clock=clock)
    made = Made(mode, provider, middleware, clock=clock, watch=lambda _: clock.advance(pause), **options)
    assert provider.opened == provider.closed
    return made, provider, clock


class TestDeadline:
    def test_a_number_of_seconds_in_place_of_a_time(self, mode):
        """A deadline before the call began is a mistake, and the error says what to write."""

        def short(request, call_next):
            request.call.leash = Leash(deadline=5)
            return (yield from call_next(request))

        clock = VirtualClock()
        clock.advance(100)
        made, *_ = slowly(mode, [short], "a", clock=clock)
        assert "write call.clock() + seconds" in str(made.error)

    def test_before_output(self, mode):
        """The call ends at its deadline, with an error that no layer retries."""
        made, provider, clock = slowly(mode, [Retry(), Deadline(3)], [Delay(5), "late"], "again")
        assert type(made.error) is DeadlineExceeded
        assert (made.error.phase, made.error.retryable) == ("deadline", False)
        assert (made.error.model, made.error.provider) == ("m-1", "scripted")
        assert made.error.__cause__ is None
        assert (
            "the deadline of the call has passed (m-1 at ScriptedProvider, 3 s after its start, set by Deadline(3))"
            in str(made.error)
        )
        assert (clock.now(), len(provider.requests)) == (3, 1)
        assert outcome_of(made.error) == "failed"

    def test_after_output(self, stream_mode):
        """A stream that its deadline ends after output is interrupted by it."""
        made, _, clock = slowly(stream_mode, [Deadline(3)], ["half ", Delay(5), "late"])
        assert type(made.error) is StreamInterrupted
        assert type(made.error.__cause__) is DeadlineExceeded
        assert made.error.partial.text == "half "
        assert clock.now() == 3
        assert outcome_of(made.error) == "failed"

    def test_in_time(self, mode):
        """A call that ends before its deadline is not affected."""
        made, _, clock = slowly(mode, [Deadline(4)], ["a", Delay(2), "b", Delay(1), "c"])
        assert (made.text, clock.now()) == ("abc", 3)

    def test_the_time_of_the_consumer_counts(self, stream_mode):
        """A consumer that takes its time uses up the deadline."""
        made, _, _ = slowly(stream_mode, [Deadline(3)], ["a", "b", "c"], pause=2)
        assert made.texts == ["a", "b"]
        assert type(root_cause(made.error)) is DeadlineExceeded

    def test_the_earlier_counts(self, mode):
        """Of two deadlines the earlier ends the call, whichever middleware is further out."""
        for middleware in ([Deadline(3), Deadline(9)], [Deadline(9), Deadline(3)]):
            made, _, clock = slowly(mode, middleware, [Delay(20), "late"])
            assert type(made.error) is DeadlineExceeded
            assert clock.now() == 3

    def test_it_ends_with_its_layer(self, mode):
        """Further out, neither the leash of an inner layer applies nor its deadline."""
        seen = []

        def outside(request, call_next):
            response = yield from call_next(request)
            seen.append(request.call.leash)
            yield from sleep(5)
            return response

        made, _, clock = slowly(mode, [Deadline(9), outside, Deadline(3)], "fine")
        assert (made.text, clock.now()) == ("fine", 5)
        assert [leash.deadline for leash in seen] == [9]

    def test_nothing_is_sent_after_it(self, mode):
        """A layer that uses the time up, or asks again after an error, sends no request."""

        def slow(request, call_next):
            with suppress(RequestTimeout):
                return (yield from call_next(request))
            return (yield from call_next(request))

        made, provider, _ = slowly(mode, [Deadline(3), slow], [Delay(5), "late"], "again")
        assert type(made.error) is DeadlineExceeded
        assert len(provider.requests) == 1

        def wasteful(request, call_next):
            clock.advance(3)
            try:
                return (yield from call_next(request))
            finally:
                assert (request.call.attempts, request.call.sending) == (0, None)

        clock = VirtualClock()
        made, provider, _ = slowly(mode, [Deadline(3), wasteful], "never", clock=clock)
        assert type(made.error) is DeadlineExceeded
        assert provider.requests == []

    def test_a_fallback_asks_nobody_after_it(self, mode):
        """A target that is asked after the deadline gets no request."""
        other = scripted(mode, "never")
        made, _, _ = slowly(mode, [Deadline(3), Fallback(to=[Target(other)])], [Delay(5), "late"])
        assert type(made.error) is DeadlineExceeded
        assert other.requests == []

    def test_the_log_says_so(self, mode, caplog):
        """A call that its deadline ends has failed, and the log names the deadline."""
        caplog.set_level(logging.INFO, logger="fluxibly")
        slowly(mode, [Logging(), Deadline(3)], ["half ", Delay(5), "late"])
        last = caplog.records[-1]
        assert (last.levelname, last.outcome, last.error_type) == ("ERROR", "failed", "DeadlineExceeded")


class TestDeadlineOfRetries:
    def test_the_deadline_ends_the_last_attempt(self, mode):
        """An attempt that the deadline ends is the last. The error has the error of the attempt before as its cause."""
        first = ServerError("first")
        made, provider, clock = slowly(mode, [Deadline(3), waiting(1)], first, [Delay(5), "late"], "never")
        assert type(made.error) is DeadlineExceeded
        assert made.error.__cause__ is first
        assert (clock.now(), len(provider.requests)) == (3, 2)

    @pytest.mark.parametrize("wait", [2, 3], ids=["at the deadline", "after it"])
    def test_no_wait_ends_after_the_deadline(self, mode, wait):
        """If the wait for the next attempt would end at the deadline or after it, the call ends at once."""
        first = ServerError("first")
        made, provider, clock = slowly(mode, [Deadline(3), waiting(wait)], [Delay(1), first], "never")
        assert type(made.error) is DeadlineExceeded
        assert made.error.__cause__ is first
        assert "would pass during a wait" in str(made.error)
        assert (clock.now(), clock.sleeps, len(provider.requests)) == (1, [1], 1)

    def test_the_wait_that_a_service_asks_for(self, mode):
        """A wait that the service asked for may not end after the deadline either."""
        made, _, clock = slowly(mode, [Deadline(3), Retry()], RateLimitError("slow", retry_after=10), "never")
        assert type(made.error) is DeadlineExceeded
        assert type(made.error.__cause__) is RateLimitError
        assert clock.now() == 0

    def test_an_error_that_is_not_retried(self, mode):
        """A call that would end anyway ends with its own error, however late it is."""
        made, _, _ = slowly(mode, [Deadline(3), Retry(max_retries=0)], ServerError("mine"))
        assert type(made.error) is ServerError

    def test_a_restart(self, stream_mode):
        """No stream begins again if its deadline would pass during the wait. The consumer keeps what it has."""
        middleware = [Deadline(3), waiting(5, on_interrupt="restart")]
        clock = VirtualClock()
        provider = scripted(stream_mode, ["half", ServerError("cut")], "never", clock=clock)

        async def amain():
            texts = []
            with pytest.raises(StreamInterrupted) as caught:
                async with AsyncPipeline(provider, middleware, clock=clock).stream(REQUEST, restarts=True) as stream:
                    texts += [event.text async for event in stream]
            return caught.value

        if stream_mode.backend is None:
            with pytest.raises(StreamInterrupted) as caught:
                list(Pipeline(provider, middleware, clock=clock).stream(REQUEST, restarts=True))
            error = caught.value
        else:
            error = run_async(amain, stream_mode.backend)
        assert type(error.__cause__) is DeadlineExceeded
        assert error.partial.text == "half"
        assert len(provider.requests) == 1

    def test_one_deadline_for_each_attempt(self, mode):
        """A deadline inside of Retry is the attempt's own; it is not retried either."""
        made, provider, _ = slowly(mode, [waiting(0), Deadline(3)], [Delay(2), ServerError("a")], [Delay(2), "fine"])
        assert made.text == "fine"
        made, provider, clock = slowly(mode, [waiting(0), Deadline(3)], [Delay(5), "late"], "never")
        assert type(made.error) is DeadlineExceeded
        assert (clock.now(), len(provider.requests)) == (3, 1)


def waiting(seconds, **options):
    """Return a Retry that waits `seconds` before each retry."""
    return Retry(uniform=lambda low, high: seconds, **options)


class TestWaitsOfMiddleware:
    @pytest.mark.parametrize("seconds", [3, 10], ids=["to the deadline", "beyond it"])
    def test_a_sleep_ends_at_the_deadline(self, mode, seconds):
        """A sleep before or after the attempt ends exactly at the deadline. It is no error of an attempt."""

        def before(request, call_next):
            yield from sleep(seconds)
            return (yield from call_next(request))

        def after(request, call_next):
            response = yield from call_next(request)
            yield from sleep(seconds)
            return response

        for layer in (before, after):
            made, provider, clock = slowly(mode, [Deadline(3), layer], Chunkless())
            assert type(made.error) is DeadlineExceeded
            assert made.error.__cause__ is None
            assert "None" not in str(made.error)
            assert (clock.now(), clock.sleeps) == (3, [3])
            assert len(provider.requests) == (layer is after)

    def test_a_shorter_sleep(self, mode):
        """A sleep that ends before the deadline is as long as it was asked to be."""

        def nap(request, call_next):
            yield from sleep(2)
            return (yield from call_next(request))

        made, _, clock = slowly(mode, [Deadline(3), nap], "fine")
        assert (made.text, clock.now()) == ("fine", 2)

    def test_a_perform(self, mode):
        """Async I/O of a middleware ends at the deadline; sync I/O in a sync call is never interrupted."""
        clock = VirtualClock()
        ends = []

        async def asave():
            try:
                await clock.asleep(5)
            finally:
                ends.append(clock.now())

        def save():
            clock.sleep(5)
            ends.append(clock.now())

        def saving(request, call_next):
            response = yield from call_next(request)
            yield from perform(save, asave)
            return response

        made, _, _ = slowly(mode, [Deadline(3), saving], Chunkless(), clock=clock)
        if mode.backend is None:
            assert made.text == ""
            assert ends == [5]
        else:
            assert type(made.error) is DeadlineExceeded
            assert ends == [3]

    def test_a_sync_function_in_an_async_call(self, backend):
        """A sync function that runs in a worker thread is not waited for after the deadline."""
        release = threading.Event()

        def saving(request, call_next):
            yield from perform(partial(release.wait, LONG))
            return (yield from call_next(request))

        async def main():
            provider = AsyncScriptedProvider("never")
            with pytest.raises(DeadlineExceeded):
                await AsyncPipeline(provider, [Deadline(SOON), saving], clock=STILL).complete(REQUEST)
            assert not release.is_set()
            release.set()

        anyio.run(main, backend=backend)

    def test_nothing_is_performed_after_the_deadline(self, backend):
        """I/O that would begin after the deadline does not begin."""
        clock = VirtualClock()
        did = []

        async def save():
            did.append("saved")

        def saving(request, call_next):
            clock.advance(3)
            yield from perform(None, save)
            return (yield from call_next(request))

        async def main(clock):
            with pytest.raises(DeadlineExceeded):
                await AsyncPipeline(AsyncScriptedProvider("x"), [Deadline(3), saving], clock=clock).complete(REQUEST)

        anyio.run(main, clock, backend=backend)
        assert did == []

    def test_its_cause(self, mode):
        """The error of a wait that the deadline ends has the error of the last attempt as its cause."""
        failure = ServerError("first")

        def again(request, call_next):
            with suppress(ServerError):
                return (yield from call_next(request))
            yield from sleep(10)
            return (yield from call_next(request))

        made, _, _ = slowly(mode, [Deadline(3), again], failure, "never")
        assert type(made.error) is DeadlineExceeded
        assert made.error.__cause__ is failure


class Chunkless(list):
    """An answer without steps: a stream without chunks, and an empty whole answer."""


class TestAsk:
    def asked(self, mode, through, *answers, outer=()):
        """Make a call whose middleware asks first, and notes the error of the ask. Return all of it."""
        errors = []

        def asking(request, call_next):
            try:
                yield from ask(request, through=through(clock))
            except RequestTimeout as error:
                errors.append(error)
            return (yield from call_next(request))

        clock = VirtualClock()
        made, provider, _ = slowly(mode, [*outer, asking], *answers, clock=clock)
        return made, provider, clock, errors

    def test_its_own_deadline(self, mode):
        """The deadline of a question ends the question, and nothing else."""
        made, _, clock, errors = self.asked(mode, lambda _: [Deadline(1)], [Delay(5), "late"], [Delay(5), "fine"])
        assert made.text == "fine"
        assert [type(error) for error in errors] == [DeadlineExceeded]
        assert clock.now() == 6

    def test_its_sleeps_and_performs(self, mode):
        """The deadline of a question bounds the waits of its own layers."""

        def sleeping(request, call_next):
            yield from sleep(5)
            return (yield from call_next(request))

        made, _, clock, errors = self.asked(mode, lambda _: [Deadline(1), sleeping], "fine")
        assert (made.text, clock.now()) == ("fine", 1)
        assert [type(error) for error in errors] == [DeadlineExceeded]

        def performing(clock):
            def layer(request, call_next):
                response = yield from call_next(request)
                yield from perform(partial(clock.sleep, 5), partial(clock.asleep, 5))
                return response

            return layer

        made, _, clock, errors = self.asked(mode, lambda clock: [Deadline(1), performing(clock)], "asked", "fine")
        assert made.text == "fine"
        assert [type(error) for error in errors] == ([] if mode.backend is None else [DeadlineExceeded])
        assert clock.now() == (5 if mode.backend is None else 1)

    def test_the_deadline_of_the_call(self, mode):
        """A question has no more time than its call."""
        made, provider, clock, _ = self.asked(
            mode, lambda _: [Deadline(9)], [Delay(5), "late"], "never", outer=[Deadline(3)]
        )
        assert type(made.error) is DeadlineExceeded
        assert (clock.now(), len(provider.requests)) == (3, 1)

    def test_between_two_chunks(self, stream_mode):
        """A question in the middle of a stream leaves the stream's own waits alone."""

        def judging(request, call_next):
            def each(chunk):
                with suppress(DeadlineExceeded):
                    yield from ask(request, through=[Deadline(1)])
                yield chunk

            return (yield from map_chunks(call_next(request), each))

        answers = [["a", Delay(1), "b"], [Delay(5), "late"], [Delay(5), "late"]]
        made, _, clock = slowly(stream_mode, [StreamTimeout(idle=1), judging], *answers)
        assert (made.text, clock.now()) == ("ab", 3)


class TestStreamTimeout:
    def test_first_chunk(self, stream_mode):
        """All waits until a chunk with output together are bounded; a chunk without output does not end them."""
        answer = [Chunk(model="m-1"), Delay(2), Chunk(), Delay(2), "late"]
        made, _, clock = slowly(stream_mode, [StreamTimeout(first_chunk=3)], answer)
        assert type(made.error) is RequestTimeout
        assert (made.error.phase, made.error.retryable, clock.now()) == ("first_chunk", True, 3)
        assert "longer than 3 s (the limit first_chunk of StreamTimeout(first_chunk=3))" in str(made.error)

    def test_first_chunk_leaves_the_consumer_out(self, stream_mode):
        """The time that the consumer takes for chunks without output does not count, nor does what comes after output."""
        answer = [Chunk(model="m-1"), Delay(1), Chunk(), Delay(2), "a", Delay(9), "b"]
        made, _, _ = slowly(stream_mode, [StreamTimeout(first_chunk=3)], answer, pause=50)
        assert made.text == "ab"

    def test_idle(self, stream_mode):
        """Each wait after output is bounded."""
        answer = ["a", Delay(2), "b", Delay(2), Chunk(), Delay(3), "late"]
        made, _, clock = slowly(stream_mode, [StreamTimeout(idle=2)], answer)
        assert type(made.error) is StreamInterrupted
        assert made.error.partial.text == "ab"
        assert type(made.error.__cause__) is StreamStalled
        assert (made.error.__cause__.phase, clock.now()) == ("idle", 6)
        assert outcome_of(made.error) == "stalled"

    def test_idle_leaves_the_consumer_out(self, stream_mode):
        """Neither the consumer's time counts, nor the waits before output."""
        answer = [Delay(9), Chunk(model="m-1"), Delay(9), "a", Delay(2), "b"]
        made, _, _ = slowly(stream_mode, [StreamTimeout(idle=2)], answer, pause=50)
        assert made.text == "ab"

    def test_an_attempt_may_be_retried(self, stream_mode):
        """A stream that brought no output in time is retried, and the limit begins anew."""
        answers = [[Delay(5), "late"], [Delay(2), "fine"]]
        made, _, clock = slowly(stream_mode, [waiting(0), StreamTimeout(first_chunk=3)], *answers)
        assert (made.text, clock.now()) == ("fine", 5)

    def test_the_smaller_limits_count(self, stream_mode):
        """Of nested limits the smaller counts, and a deadline counts beside them."""
        nested = [StreamTimeout(first_chunk=9, idle=2), StreamTimeout(first_chunk=3, idle=9)]
        for middleware in (nested, nested[::-1]):
            made, _, clock = slowly(stream_mode, middleware, [Delay(20), "late"])
            assert (made.error.phase, clock.now()) == ("first_chunk", 3)
            made, _, clock = slowly(stream_mode, middleware, ["a", Delay(20), "late"])
            assert (root_cause(made.error).phase, clock.now()) == ("idle", 2)
            made, _, clock = slowly(stream_mode, [Deadline(1), *middleware], ["a", Delay(20), "late"])
            assert (root_cause(made.error).phase, clock.now()) == ("deadline", 1)

    def test_a_whole_answer(self):
        """The limits of a stream do not apply to a whole answer."""
        for mode in (mode for mode in MODES if not mode.streaming):
            made, _, _ = slowly(mode, [StreamTimeout(first_chunk=1, idle=1)], [Delay(5), "fine"])
            assert made.text == "fine"


WAITS = [Delay(4), "a", Delay(4), "b"]
"""An answer that comes in two pieces, in 8 seconds."""


class TestTimeout:
    @pytest.mark.parametrize(
        ("timeout", "phase", "at"),
        [
            (3, "first_byte", 3),
            (4, None, 8),
            (Timeouts(first_byte=3), "first_byte", 3),
            (Timeouts(idle=3), "idle", 7),
            (Timeouts(total=3), "total", 3),
            (Timeouts(total=6), "total", 6),
            (Timeouts(4, 4, 4, total=9), None, 8),
            (Timeouts(None, None, None, total=None), None, 8),
        ],
        ids=str,
    )
    def test_of_a_stream(self, stream_mode, timeout, phase, at):
        """A number bounds each wait of a stream, and `Timeouts` say which."""
        made, _, clock = slowly(stream_mode, [], WAITS, timeout=timeout)
        assert clock.now() == at
        if phase is None:
            assert made.text == "ab"
        else:
            error = root_cause(made.error)
            assert type(error) is (StreamStalled if phase == "idle" else RequestTimeout)
            assert error.phase == phase

    @pytest.mark.parametrize(
        ("timeout", "phase", "at"),
        [
            (7, "deadline", 7),
            (8, None, 8),
            (Timeouts(total=7), "total", 7),
            (Timeouts(first_byte=1, idle=1), None, 8),
            (Timeouts(total=None), None, 8),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.streaming], ids=str)
    def test_of_a_whole_answer(self, mode, timeout, phase, at):
        """A number bounds a whole call, and `Timeouts` each attempt."""
        made, _, clock = slowly(mode, [], WAITS, timeout=timeout)
        assert clock.now() == at
        if phase is None:
            assert made.text == "ab"
        else:
            assert type(made.error) is (DeadlineExceeded if phase == "deadline" else RequestTimeout)
            assert made.error.phase == phase

    def test_a_stream_has_no_total_of_its_own(self, stream_mode):
        """Unless `total` is given, a stream may take longer than a whole answer may."""
        made, _, clock = slowly(stream_mode, [], ["a", Delay(700), "b"], timeout=Timeouts(idle=None))
        assert (made.text, clock.now()) == ("ab", 700)
        for mode in (mode for mode in MODES if not mode.streaming):
            made, _, clock = slowly(mode, [], ["a", Delay(700), "b"], timeout=Timeouts(idle=None))
            assert (made.error.phase, clock.now()) == ("total", 600)

    def test_a_number_bounds_all_attempts(self, mode):
        """The number of a whole call is its deadline; in a stream it bounds each attempt by itself."""
        answers = [[Delay(2), ServerError("a")], [Delay(2), ServerError("b")], [Delay(2), "fine"]]
        made, provider, clock = slowly(mode, [waiting(0)], *answers, timeout=5)
        if mode.streaming:
            assert (made.text, clock.now()) == ("fine", 6)
        else:
            assert type(made.error) is DeadlineExceeded
            assert str(made.error.__cause__) == "b"
            assert (clock.now(), len(provider.requests)) == (5, 3)

    def test_each_attempt_has_the_limits_of_timeouts(self, mode):
        """`Timeouts` bound each attempt by itself, and a total that has passed is retried."""
        answers = [[Delay(4), "late"], [Delay(4), "late"], [Delay(2), "fine"]]
        made, _, clock = slowly(mode, [waiting(1)], *answers, timeout=Timeouts(total=3))
        assert (made.text, clock.now()) == ("fine", 10)

    def test_a_deadline_of_middleware_applies(self, mode):
        """A longer `timeout=` does not put off the deadline of a middleware."""
        made, _, clock = slowly(mode, [Deadline(3)], [Delay(5), "late"], timeout=9)
        assert type(made.error) is DeadlineExceeded
        assert clock.now() == 3
        assert "set by Deadline(3))" in str(made.error)

    def test_an_error_names_the_limit(self, mode):
        """Of a deadline further away, or of a longer limit on waits, the error says nothing."""
        stack = [Deadline(9), StreamTimeout(first_chunk=8)]
        made, _, clock = slowly(mode, stack, [Delay(50), "late"], timeout=3)
        named = "took longer than 3 s (first_byte)" if mode.streaming else "set by timeout=3)"
        assert named in str(made.error)
        assert clock.now() == 3

    def test_questions_have_them_too(self, mode):
        """`timeout=` applies to a question within the call."""

        def asking(request, call_next):
            yield from ask(request)
            return (yield from call_next(request))

        made, _, clock = slowly(mode, [asking], [Delay(5), "late"], timeout=Timeouts(total=3))
        assert (made.error.phase, clock.now()) == ("total", 3)

    @pytest.mark.parametrize("timeout", [0, "5", float("nan")], ids=repr)
    def test_wrong_timeouts(self, mode, timeout):
        """A wrong value is an error at the call, before anything is sent."""
        made, provider, _ = slowly(mode, [], timeout=timeout)
        assert str(made.error).startswith("timeout: expected a number of seconds above 0, got ")
        assert provider.requests == []


class Blocking:
    """A sync provider that blocks after the texts of a stream, or at once in a whole call, until it is released."""

    def __init__(self, *texts):
        self.blocks, self.release, self.returned, self.closed = (threading.Event() for _ in range(4))
        self._texts = texts

    def _block(self):
        self.blocks.set()
        self.release.wait(LONG)
        self.returned.set()

    def complete(self, request):
        self._block()
        return "late"

    def stream(self, request):
        try:
            yield from self._texts
            self._block()
            yield "late"
        finally:
            self.closed.set()


class Simulating:
    """A layer that streams whole answers."""

    simulates_stream = True

    def __call__(self, request, call_next):
        return (yield from call_next(request))


def test_answers_that_are_adapted(mode):
    """A whole answer that stands for a stream, and chunks that stand for a whole answer, are bounded too."""

    class Half:
        def __init__(self, provider):
            name = "complete" if mode.streaming else "stream"
            setattr(self, name, getattr(provider, name))

    provider = Blocking()
    try:
        made = Made(mode, Half(provider), [Deadline(SOON), Simulating()], clock=STILL)
        assert not provider.returned.is_set()
    finally:
        provider.release.set()
    assert type(made.error) is DeadlineExceeded


class Opening(Blocking):
    """A sync provider whose `stream` blocks, and then returns an iterator."""

    def stream(self, request):
        self._block()
        return super().stream(request)


@pytest.mark.parametrize("kind", ["whole", "stream", "stream after output", "stream that opens"])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("limit", ["deadline", "timeout", "total"])
def test_a_sync_provider_that_blocks(backend, kind, limit):
    """The caller goes on in time, while the provider still blocks; its stream is closed once it has returned."""
    mode = next(mode for mode in MODES if mode.backend == backend and mode.streaming == (kind != "whole"))
    provider = {"stream after output": Blocking("a"), "stream that opens": Opening()}.get(kind) or Blocking()
    timeout = {"deadline": None, "timeout": SOON, "total": Timeouts(total=SOON)}[limit]
    middleware = [Deadline(SOON)] if limit == "deadline" else []
    try:
        made = Made(mode, provider, middleware, clock=STILL, timeout=timeout)
        assert not provider.returned.is_set()
        assert not provider.closed.is_set()
    finally:
        provider.release.set()
    assert isinstance(root_cause(made.error), RequestTimeout)
    assert made.texts == (["a"] if kind == "stream after output" else [])
    assert provider.returned.wait(5)
    if mode.streaming:
        assert provider.closed.wait(5)


class Where:
    """A sync provider that notes the thread and the context of each step."""

    def __init__(self, *, obeys=False, error=None):
        self.threads, self.values = set(), []
        self.closed = 0
        self.obeys = obeys
        self._error = error

    def note(self):
        self.threads.add(threading.get_ident())
        self.values.append(VAR.get())
        VAR.set("of the provider")

    def complete(self, request):
        self.note()
        if self._error is not None:
            raise self._error
        return "ab"

    def stream(self, request):
        try:
            for text in "ab":
                self.note()
                yield text
            if self._error is not None:
                raise self._error
        finally:
            self.note()
            self.closed += 1


VAR = contextvars.ContextVar("VAR", default="nobody's")


class TestThreads:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("error", [None, ServerError("no")], ids=["answer", "error"])
    def test_another_thread_and_a_copy_of_the_context(self, streaming, error):
        """A provider that does not obey runs in one thread, in a copy of the context; the thread ends with the call."""
        mode = MODES[0] if not streaming else STREAMS[0]
        provider = Where(error=error)
        token = VAR.set("the caller's")
        try:
            made = Made(mode, provider, [Deadline(LONG)], clock=SYSTEM_CLOCK)
            assert VAR.get() == "the caller's"
        finally:
            VAR.reset(token)
        assert root_cause(made.error) is error if error else made.text == "ab"
        assert len(provider.threads) == 1
        assert threading.get_ident() not in provider.threads
        assert provider.values[0] == "the caller's"
        assert set(provider.values[1:]) <= {"of the provider"}
        assert provider.closed == streaming

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_provider_that_obeys(self, streaming):
        """A provider that keeps the limits by itself is called in the caller's own thread, and read there."""
        mode = MODES[0] if not streaming else STREAMS[0]
        provider = Where(obeys=True)
        made = Made(mode, provider, [Deadline(LONG)], clock=SYSTEM_CLOCK)
        assert made.text == "ab"
        assert provider.threads == {threading.get_ident()}

    def test_the_provider_of_a_target(self):
        """Which provider is asked decides how, whatever the pipeline's own does."""
        for own, other in ((Where(), Where(obeys=True)), (Where(obeys=True), Where())):
            target = Target(other)

            def turning(request, call_next, target=target):
                return (yield from call_next(request.evolve(target=target)))

            for mode in (MODES[0], STREAMS[0]):
                assert Made(mode, own, [Deadline(LONG), turning], clock=SYSTEM_CLOCK).text == "ab"
            assert own.threads == set()
            assert (threading.get_ident() in other.threads) is other.obeys

    def test_a_stream_that_is_not_read_to_its_end(self):
        """A consumer that leaves early waits until the provider's stream is closed, and the thread ends."""
        provider = Where()
        with Pipeline(provider, [Deadline(LONG)]).stream(REQUEST) as stream:
            next(stream)
        assert provider.closed == 1

    @pytest.mark.parametrize("limit", [float("inf"), 1e12])
    def test_limits_beyond_all_clocks(self, limit):
        """A limit that no clock will reach is as good as none."""

        def endless(request, call_next):
            request.call.leash = Leash(deadline=limit)
            return (yield from call_next(request))

        for mode in MODES:
            assert Made(mode, Where(), [endless], clock=SYSTEM_CLOCK).text == "ab"
            if limit < float("inf"):
                assert Made(mode, Where(), [], clock=SYSTEM_CLOCK, timeout=limit).text == "ab"

    def test_wrong_streams(self, stream_mode):
        """A mistake of a provider is the same error with limits as without."""

        class NoStream:
            def complete(self, request):
                return "ab"

            def stream(self, request):
                return 5

        class Empty:
            def complete(self, request):
                return "ab"

            def stream(self, request):
                yield 5

        for provider in (NoStream(), Empty()):
            plain = Made(stream_mode, provider, [], clock=SYSTEM_CLOCK).error
            limited = Made(stream_mode, provider, [Deadline(LONG)], clock=SYSTEM_CLOCK).error
            assert type(plain) is type(limited) is TypeError
            assert str(plain) == str(limited)

    def test_a_stopiteration_of_a_provider(self, mode):
        """A provider that raises StopIteration fails with the same error with limits as without."""

        class Stops:
            def complete(self, request):
                raise StopIteration

            def stream(self, request):
                yield next(iter(()))

        plain = Made(mode, Stops(), [], clock=SYSTEM_CLOCK).error
        limited = Made(mode, Stops(), [Deadline(LONG)], clock=SYSTEM_CLOCK).error
        assert type(plain) is type(limited) is RuntimeError
        assert str(plain) == str(limited)


class Cancelled:
    """An async provider that notes how its waits end. It swallows the first `swallows` cancellations.

    `waits` is called when it waits.
    """

    def __init__(self, *texts, swallows=0):
        self.texts = texts
        self.swallows = swallows
        self.ends = []
        self.waits = lambda: None

    async def wait(self):
        self.waits()
        for n in range(self.swallows + 1):
            try:
                await anyio.sleep(LONG)
            except anyio.get_cancelled_exc_class():
                self.ends.append("cancelled")
                if n == self.swallows:
                    raise

    async def complete(self, request):
        await self.wait()

    async def stream(self, request):
        try:
            for text in self.texts:
                yield text
            await self.wait()
        finally:
            self.ends.append("closed")


def cancelling():
    """Return how many cancellations of the current task are pending, on asyncio."""
    return asyncio.current_task().cancelling()


async def read(pipeline, *, streaming, texts=None):
    """Make an async call, and keep its texts."""
    if not streaming:
        return await pipeline.complete(REQUEST)
    async with pipeline.stream(REQUEST) as stream:
        async for chunk in stream:
            if texts is not None:
                texts.append(chunk.text)
    return stream.response


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
class TestAsyncProviders:
    @pytest.mark.parametrize("swallows", [0, 1, 3])
    def test_it_is_cancelled(self, backend, streaming, swallows):
        """An async provider is cancelled on time, again and again until it ends."""
        provider = Cancelled(swallows=swallows)

        async def main():
            with pytest.raises(DeadlineExceeded):
                await read(AsyncPipeline(provider, [Deadline(SOON)], clock=STILL), streaming=streaming)
            assert backend == "trio" or cancelling() == 0
            await checkpoint()

        anyio.run(main, backend=backend)
        assert provider.ends == ["cancelled"] * (swallows + 1) + ["closed"] * streaming

    def test_an_answer_instead_of_the_cancellation(self, backend, streaming):
        """An answer that a cancelled provider gives all the same comes too late."""

        class Late:
            async def complete(self, request):
                with suppress(anyio.get_cancelled_exc_class()):
                    await anyio.sleep(LONG)
                return "late"

            async def stream(self, request):
                yield await self.complete(request)

        async def main():
            with pytest.raises(DeadlineExceeded):
                await read(AsyncPipeline(Late(), [Deadline(SOON)], clock=STILL), streaming=streaming)
            assert backend == "trio" or cancelling() == 0
            await checkpoint()

        anyio.run(main, backend=backend)

    def test_one_that_obeys_is_not_cancelled(self, backend, streaming):
        """A provider that keeps the limits by itself may take the time that it needs to say so."""

        class Obeys:
            obeys = True

            async def complete(self, request):
                await anyio.sleep(2 * SOON)
                return "mine"

            async def stream(self, request):
                yield await self.complete(request)

        async def main():
            response = await read(AsyncPipeline(Obeys(), [Deadline(SOON)], clock=STILL), streaming=streaming)
            assert response.text == "mine"

        anyio.run(main, backend=backend)


def test_an_async_provider_that_never_waits(backend):
    """A chunk that is there at once comes too late all the same, if the consumer has used the time up."""

    class Ready:
        async def stream(self, request):
            for text in "abc":
                read.append(text)
                yield text

    clock = VirtualClock()
    texts, read = [], []

    class Real(type(SYSTEM_CLOCK)):
        now = staticmethod(clock.now)

    async def consume():
        async with AsyncPipeline(Ready(), [Deadline(3)], clock=Real()).stream(REQUEST) as stream:
            async for chunk in stream:
                texts.append(chunk.text)
                clock.advance(2)

    async def main():
        with pytest.raises(StreamInterrupted) as caught:
            await consume()
        assert type(caught.value.__cause__) is DeadlineExceeded

    anyio.run(main, backend=backend)
    assert texts == read == ["a", "b"]


def test_a_sync_provider_is_not_read_after_the_deadline():
    """If the consumer has used the time up, the provider is not read again."""
    clock, texts, read = VirtualClock(), [], []

    class Ready:
        def stream(self, request):
            for text in "abc":
                read.append(text)
                yield text

    class Real(type(SYSTEM_CLOCK)):
        now = staticmethod(clock.now)

    def consume():
        for chunk in Pipeline(Ready(), [Deadline(3)], clock=Real()).stream(REQUEST):
            texts.append(chunk.text)
            clock.advance(2)

    with pytest.raises(StreamInterrupted):
        consume()
    for thread in workers():
        thread.join(5)
    assert texts == read == ["a", "b"]


async def timed_out(call):
    """Make a call within `asyncio.timeout`. It gets a function that lets the time pass."""
    async with asyncio.timeout(None) as timeout:
        await call(partial(timeout.reschedule, 0.0))


WHEN = ["whole", "before output", "after output"]


@pytest.mark.parametrize("when", WHEN)
class TestCancellation:
    """A cancellation of the caller passes a limited call as it passes any other."""

    def provider(self, when):
        return Cancelled(*(["a"] if when == "after output" else []))

    async def call(self, provider, when, seconds=LONG):
        middleware = [StreamTimeout(first_chunk=LONG, idle=LONG), Deadline(seconds)]
        await read(AsyncPipeline(provider, middleware), streaming=when != "whole")

    def test_by_asyncio_timeout(self, when):
        """`asyncio.timeout` gets its cancellation back, and leaves none pending."""
        provider = self.provider(when)

        async def call(time_passes):
            provider.waits = time_passes
            await self.call(provider, when)

        async def main():
            with pytest.raises(TimeoutError) as caught:
                await timed_out(call)
            assert type(caught.value) is TimeoutError
            assert cancelling() == 0

        asyncio.run(main())
        assert provider.ends == ["cancelled"] + ["closed"] * (when != "whole")

    def test_by_task_cancel(self, when):
        """The task ends with the cancellation that it was given."""
        provider = self.provider(when)

        async def main():
            task = asyncio.create_task(self.call(provider, when))
            provider.waits = lambda: asyncio.get_running_loop().call_soon(task.cancel, "enough")
            with pytest.raises(asyncio.CancelledError, match="enough"):
                await task
            assert task.cancelled()

        asyncio.run(main())

    def test_by_a_scope(self, when, backend):
        """A cancel scope of anyio's or trio's catches its own cancellation."""
        provider = self.provider(when)

        async def main():
            with anyio.CancelScope() as scope:
                provider.waits = scope.cancel
                await self.call(provider, when)
            assert scope.cancelled_caught
            await checkpoint()
            assert backend == "trio" or cancelling() == 0

        anyio.run(main, backend=backend)
        assert provider.ends == ["cancelled"] + ["closed"] * (when != "whole")

    def test_at_the_time_of_the_deadline(self, when, backend):
        """When a cancellation and the deadline come together, the call ends with either, and nothing is left pending."""

        async def main():
            errors = []
            with anyio.move_on_after(SOON):
                try:
                    await self.call(self.provider(when), when, SOON)
                except Exception as error:  # noqa: BLE001  # whichever came first
                    errors.append(type(root_cause(error)))
            assert errors in ([], [DeadlineExceeded])
            await checkpoint()
            assert backend == "trio" or cancelling() == 0

        anyio.run(main, backend=backend)

    def test_by_asyncio_timeout_at_the_time_of_the_deadline(self, when):
        """As above, with asyncio's own timeout."""

        async def main():
            with pytest.raises((TimeoutError, StreamInterrupted)):
                async with asyncio.timeout(SOON):
                    await self.call(self.provider(when), when, SOON)
            await asyncio.sleep(0)
            assert cancelling() == 0

        asyncio.run(main())


class TestScopes:
    def test_streams_that_are_read_in_turns(self, backend):
        """No scope is open between two chunks, so a task may read limited streams in turns and end them in any order."""

        async def main():
            providers = [AsyncScriptedProvider("a b c d e") for _ in range(3)]
            streams = [AsyncPipeline(provider, [Deadline(LONG)]).stream(REQUEST) for provider in providers]
            for _ in range(2):
                for stream in streams:
                    await anext(stream)
            with anyio.CancelScope():
                await streams[1].aclose()
            await streams[0].aclose()
            assert [chunk.text async for chunk in streams[2]] == [" c", " d", " e"]
            assert [provider.closed for provider in providers] == [1, 1, 1]

        anyio.run(main, backend=backend)

    def test_a_stream_that_other_tasks_go_on_reading(self, backend):
        """Each chunk may be read by another task, within scopes of its own."""
        texts = []

        async def main():
            stream = AsyncPipeline(AsyncScriptedProvider("a b c"), [Deadline(LONG)]).stream(REQUEST)

            async def read_one():
                with anyio.move_on_after(LONG):
                    texts.append((await anext(stream)).text)

            for _ in range(3):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read_one)
            await stream.aclose()

        anyio.run(main, backend=backend)
        assert texts == ["a", " b", " c"]


class TestClosing:
    """A limited stream that is closed while another thread or task reads it, or works on a chunk of it."""

    def close_when(self, event, stream):
        """Close a stream in another thread, once an event has happened."""

        def close():
            assert event.wait(LONG)
            stream.close()

        threading.Thread(target=close).start()

    def test_by_another_thread(self):
        """The reader stops at once and quietly. The provider's stream is closed when its read has returned."""
        provider = Blocking("a")
        stream = Pipeline(provider, [Deadline(LONG)]).stream(REQUEST)
        next(stream)
        self.close_when(provider.blocks, stream)
        assert list(stream) == []
        assert not provider.returned.is_set()
        provider.release.set()
        assert provider.closed.wait(5)

    def test_by_another_thread_while_a_middleware_works(self):
        """A close between two reads of the provider is no error for the reader, and ends the next read."""
        works, closed = threading.Event(), threading.Event()

        def working(request, call_next):
            def each(chunk):
                if chunk.text == "b":
                    works.set()
                    assert closed.wait(5)
                    return None  # so that the provider is read again
                return chunk

            return (yield from map_chunks(call_next(request), each))

        def close():
            works.wait(5)
            stream.close()
            closed.set()

        provider = Blocking("a", "b")
        stream = Pipeline(provider, [Deadline(LONG), working]).stream(REQUEST)
        thread = threading.Thread(target=close)
        thread.start()
        assert [chunk.text for chunk in stream] == ["a"]
        assert not provider.returned.is_set()
        thread.join()
        provider.release.set()
        assert provider.closed.wait(5)

    def test_while_it_is_opened(self):
        """A close while the provider opens its stream ends the read; what was opened is closed."""
        provider = Opening()
        stream = Pipeline(provider, [Deadline(LONG)]).stream(REQUEST)
        self.close_when(provider.blocks, stream)
        assert list(stream) == []
        provider.release.set()
        assert provider.closed.wait(5)

    def test_by_another_task(self, backend):
        """The reading task stops quietly, and the provider is cancelled."""
        provider = Cancelled("a")

        async def main():
            stream = AsyncPipeline(provider, [Deadline(LONG)]).stream(REQUEST)
            await anext(stream)
            waits = anyio.Event()
            provider.waits = waits.set

            async def close():
                await waits.wait()
                await stream.aclose()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(close)
                assert [chunk async for chunk in stream] == []
            assert backend == "trio" or cancelling() == 0

        anyio.run(main, backend=backend)
        assert provider.ends == ["cancelled", "closed"]

    def test_a_stream_that_can_be_aborted(self):
        """A provider's stream with an `abort` of its own is aborted, in the thread that closes it."""
        blocks, aborted = threading.Event(), threading.Event()

        class Abortable:
            def __iter__(self):
                return self

            def __next__(self):
                blocks.set()
                assert aborted.wait(LONG)
                raise ConnectionAbortedError

            def abort(self):
                aborted.set()

        class Aborts:
            def stream(self, request):
                return Abortable()

        stream = Pipeline(Aborts(), [Deadline(LONG)]).stream(REQUEST)
        self.close_when(blocks, stream)
        assert list(stream) == []
        assert aborted.is_set()


@pytest.mark.parametrize("when", WHEN)
def test_ctrl_c(when):
    """Ctrl-C ends the wait for a provider that blocks, at once."""
    provider = Blocking(*(["a"] if when == "after output" else []))

    over = threading.Event()

    def interrupt():
        assert provider.blocks.wait(LONG)
        interrupt_until(over)

    pipeline = Pipeline(provider, [Deadline(LONG)])
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            pipeline.complete(REQUEST) if when == "whole" else list(pipeline.stream(REQUEST))
        over.set()
        assert not provider.returned.is_set()
    finally:
        provider.release.set()
    thread.join()
    assert when == "whole" or provider.closed.wait(5)


@pytest.mark.parametrize("texts", [[], ["some"]], ids=["before output", "after output"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_a_late_call_leaves_no_cycle(backend, streaming, texts):
    """The error of a limit, whose frames hold the request, is freed without the garbage collector."""
    provider, errors = Blocking(*texts), []

    def call():
        pipeline = Pipeline(provider, [Deadline(0.01)], clock=STILL)
        try:
            list(pipeline.stream(REQUEST)) if streaming else pipeline.complete(REQUEST)
        except (DeadlineExceeded, StreamInterrupted) as error:
            errors.extend([weakref.ref(error), weakref.ref(root_cause(error))])
        return [error() for error in errors]

    async def acall():
        try:
            await read(AsyncPipeline(Cancelled(*texts), [Deadline(0.01)], clock=STILL), streaming=streaming)
        except (DeadlineExceeded, StreamInterrupted) as error:
            errors.extend([weakref.ref(error), weakref.ref(root_cause(error))])
        return [error() for error in errors]

    gc.disable()
    try:
        left = call() if backend is None else anyio.run(acall, backend=backend)
    finally:
        gc.enable()
        provider.release.set()
    assert left == [None, None]


class TestVirtualTime:
    """`VirtualClock` keeps the limits of several calls apart."""

    def test_calls_at_the_same_time(self, backend):
        """The limit of a call does not end the sleeps of another."""
        clock = VirtualClock()
        ends = {}

        async def one(name, limit, delay):
            provider = AsyncScriptedProvider([Delay(delay), "x"], clock=clock)
            try:
                ends[name] = (await AsyncPipeline(provider, [Deadline(limit)], clock=clock).complete(REQUEST)).text
            except DeadlineExceeded:
                ends[name] = "late"

        async def main():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(one, "short", 3, 10)
                tasks.start_soon(one, "long", 100, 20)

        anyio.run(main, backend=backend)
        assert ends == {"short": "late", "long": "x"}

    def test_a_call_within_a_provider(self, mode):
        """A provider that makes a limited call of its own is bounded by both limits."""
        clock = VirtualClock()
        inner_errors = []

        class Outer:
            def complete(self, request):
                inner = Pipeline(ScriptedProvider([Delay(5), "x"], clock=clock), [Deadline(limit)], clock=clock)
                try:
                    return inner.complete(request)
                except DeadlineExceeded as error:
                    inner_errors.append(error)
                    return "instead"

            def stream(self, request):
                yield self.complete(request)

        limit = 2
        assert Made(mode, Outer(), [Deadline(4)], clock=clock).text == "instead"
        assert (len(inner_errors), clock.now()) == (1, 2)
        limit = 9
        made = Made(mode, Outer(), [Deadline(1)], clock=clock)
        assert type(made.error) is DeadlineExceeded
        assert (len(inner_errors), clock.now()) == (1, 3)

    def test_the_provider_is_sync_and_the_call_is_not(self, backend):
        """A limit ends the sleeps of a sync provider in a worker thread too."""
        clock = VirtualClock()
        provider = ScriptedProvider([Delay(5), "late"], clock=clock)

        async def main():
            with pytest.raises(DeadlineExceeded):
                await AsyncPipeline(provider, [Deadline(3)], clock=clock).complete(REQUEST)

        anyio.run(main, backend=backend)
        assert clock.now() == 3
