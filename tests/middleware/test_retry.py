"""`Retry`: the errors that are retried, the waits, and the errors that are never retried, in all modes."""

from __future__ import annotations

import logging
import math
import re

import anyio
import pytest
from hypothesis import given, strategies as st
from support.calling import REQUEST, call

from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    ConnectionFailed,
    Overloaded,
    ProviderError,
    QuotaExceeded,
    RateLimitError,
    RequestTimeout,
    ServerError,
    StreamInterrupted,
    root_cause,
)
from fluxibly.flow import hold_back, sleep
from fluxibly.middleware import Retry
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, Cut, Delay, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import BACKENDS
from fluxibly.types import Chunk, Restart


def down():
    return ServerError("down")


def holding(request, call_next):
    return (yield from hold_back(call_next(request)))


class TestAttempts:
    def test_a_retryable_error_is_tried_again(self, mode):
        """The caller gets the answer of the attempt that succeeded."""
        made = call(mode, Retry(), down(), RateLimitError("slow"), "fine")
        assert made.response.text == "fine"
        assert (made.record.attempts, len(made.provider.requests), len(made.clock.sleeps)) == (3, 3, 2)

    @pytest.mark.parametrize("retries", [0, 1, 3])
    def test_retries_count_after_the_first_attempt(self, mode, retries):
        """After the last retry, its error is raised unchanged."""
        errors = [ServerError(f"down {n}") for n in range(retries + 1)]
        made = call(mode, Retry(max_retries=retries), *errors)
        assert made.ran.error is errors[-1]
        assert made.record.attempts == retries + 1

    @pytest.mark.parametrize(
        "error", [AuthenticationError, BadRequest, QuotaExceeded, ValueError, ProviderError], ids=lambda e: e.__name__
    )
    def test_other_errors_are_raised_at_once(self, mode, error):
        """Neither permanent provider errors nor errors of other kinds are retried."""
        made = call(mode, Retry(), error("no"))
        assert type(made.ran.error) is error
        assert made.record.attempts == 1

    @pytest.mark.parametrize(
        "error",
        [
            ConnectionFailed("no route"),
            RequestTimeout("late"),
            Overloaded("busy"),
            ProviderError("mine", retryable=True),
        ],
        ids=lambda e: type(e).__name__,
    )
    def test_errors_that_are_marked_retryable(self, mode, error):
        """A custom provider can mark its own errors as retryable."""
        assert call(mode, Retry(), error, "fine").response.text == "fine"

    def test_a_retryable_class_can_be_marked_final(self, mode):
        """`retryable=False` overrides the class."""
        assert call(mode, Retry(), ServerError("never", retryable=False)).record.attempts == 1

    def test_each_attempt_sends_the_same_request(self, mode):
        """Retry adds nothing to the request."""
        made = call(mode, Retry(), down(), "fine")
        first, second = made.provider.requests
        assert first.messages == second.messages == REQUEST.messages
        assert first.call is second.call

    def test_an_interrupt_is_never_tried_again(self, mode):
        """KeyboardInterrupt reaches the caller at once."""
        made = call(mode, Retry(), KeyboardInterrupt())
        assert isinstance(made.ran.error, KeyboardInterrupt)
        assert made.record.attempts == 1


class TestWaits:
    def test_backoff_is_exponential_with_a_cap(self, mode):
        """The upper bound of the wait doubles until it reaches `max_delay`."""
        retry = Retry(max_retries=6, base_delay=0.5, max_delay=5, uniform=lambda low, high: high)
        assert call(mode, retry, *[down() for _ in range(6)], "fine").clock.sleeps == [0.5, 1, 2, 4, 5, 5]

    def test_jitter_is_full(self, mode):
        """Each wait is drawn between zero and the upper bound."""
        asked = []

        def uniform(low, high):
            asked.append((low, high))
            return low

        made = call(mode, Retry(base_delay=1, uniform=uniform), down(), down(), "fine")
        assert made.clock.sleeps == [0, 0]
        assert asked == [(0, 1), (0, 2)]

    @given(st.integers(0, 5000), st.floats(0, 1e6), st.floats(0, 1e6))
    def test_waits_stay_within_bounds(self, attempt, base, cap):
        """Even after very many attempts, no wait overflows or is negative."""
        wait = Retry(max_retries=10_000, base_delay=base, max_delay=cap).wait(attempt, down(), 0.0)
        assert wait is not None
        assert 0 <= wait <= min(cap, base * 2.0 ** min(attempt, 60))

    def test_real_jitter_differs(self):
        """Two waits are almost never the same."""
        assert len({Retry().wait(0, down(), 0.0) for _ in range(20)}) > 1

    def test_retry_after_is_the_wait(self, mode):
        """The wait that the service asks for replaces the backoff."""
        made = call(mode, Retry(), RateLimitError("slow", retry_after=17.5), Overloaded("busy", retry_after=0), "fine")
        assert made.clock.sleeps == [17.5, 0]

    @pytest.mark.parametrize(("seconds", "attempts"), [(59.9, 2), (60, 2), (60.1, 1), (1e300, 1), (math.inf, 1)])
    def test_retry_after_has_a_limit(self, mode, seconds, attempts):
        """If the service asks for more than `max_retry_after`, the error is raised at once, with the requested wait."""
        error = RateLimitError("slow", retry_after=seconds)
        made = call(mode, Retry(max_retry_after=60), error, "fine")
        assert made.record.attempts == attempts
        assert made.ran.error is (None if attempts == 2 else error)

    @pytest.mark.parametrize("seconds", [-5, -0.001, -math.inf, math.nan])
    def test_what_is_no_time_leaves_the_backoff(self, mode, seconds):
        """A provider's `retry_after` that is negative or not a number does not mean now, or never."""
        retry = Retry(base_delay=4, uniform=lambda low, high: high)
        assert call(mode, retry, RateLimitError("slow", retry_after=seconds), "fine").clock.sleeps == [4]

    def test_total_time(self, mode):
        """No attempt begins later than `total_time` after the start of the first attempt."""
        retry = Retry(max_retries=9, base_delay=4, max_delay=4, total_time=20, uniform=lambda low, high: high)
        made = call(mode, retry, *[[Delay(3), down()] for _ in range(9)])
        assert isinstance(made.ran.error, ServerError)
        assert made.clock.sleeps == [3, 4, 3, 4, 3]
        assert made.clock.now() == 17

    def test_total_time_begins_with_the_first_attempt(self, mode):
        """What layers further out did before is not counted."""

        def slow(request, call_next):
            yield from sleep(100)
            return (yield from call_next(request))

        made = call(mode, [slow, Retry(total_time=50)], down(), "fine")
        assert made.response.text == "fine"

    def test_no_total_time(self, mode):
        """0 seconds are no time for a retry, not even for one without a wait."""
        made = call(mode, Retry(base_delay=0, total_time=0), down(), "fine")
        assert isinstance(made.ran.error, ServerError)
        assert made.clock.sleeps == []

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_cancellation_ends_the_wait(self, backend):
        """A cancelled task neither finishes the wait nor sends another request."""
        provider = AsyncScriptedProvider(RateLimitError("slow", retry_after=50), "fine")

        async def main():
            with anyio.move_on_after(0.02) as scope:
                await AsyncPipeline(provider, [Retry()]).complete(REQUEST)
            assert scope.cancelled_caught

        anyio.run(main, backend=backend)
        assert len(provider.requests) == 1


class TestLog:
    def test_each_failed_attempt_is_a_warning(self, mode, caplog):
        """The warning has the attempt, the wait and the error. Retry does not log the last failure."""
        made = call(mode, Retry(max_retries=1, base_delay=0.25, uniform=max), down(), RateLimitError("slow"))
        assert isinstance(made.ran.error, RateLimitError)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage() == (
            'LLM attempt failed, will retry | attempt=1, wait=0.25s, error_type=ServerError, error_message="down"'
        )
        assert (record.attempt, record.wait, record.error_type, record.error_message) == (
            1,
            0.25,
            "ServerError",
            "down",
        )

    def test_a_stream_that_starts_over_says_so(self, stream_mode, caplog):
        """The warning says what changes for the consumer: its output so far is void."""
        retry = Retry(on_interrupt="restart", base_delay=0)
        call(stream_mode, retry, ["Hel", down()], ["Bye"], restarts=True)
        (record,) = caplog.records
        assert record.getMessage().endswith('error_message="down", change="starts the stream over"')
        assert record.change == "starts the stream over"

    def test_the_prompt_is_masked(self, mode, caplog):
        """The part of the prompt that the service quotes is left out of the warning."""
        call(mode, Retry(), ServerError("cannot answer: What is the capital of France?"), "fine")
        assert "capital" not in caplog.records[0].getMessage()


class TestStreams:
    def test_nothing_is_sent_again_after_output(self, stream_mode):
        """The error is StreamInterrupted, with the partial response and the cause."""
        cause = down()
        made = call(stream_mode, Retry(), ["Hel", "lo", cause], "again")
        assert isinstance(made.ran.error, StreamInterrupted)
        assert made.ran.error.__cause__ is cause
        assert made.ran.error.partial.text == "Hello"
        assert (made.record.attempts, made.clock.sleeps) == (1, [])

    @pytest.mark.parametrize("chunk", [Chunk(), Chunk(model="m-2"), Chunk(finish_reason="stop")], ids=repr)
    def test_chunks_without_output_can_be_retried(self, stream_mode, chunk):
        """Output is text, reasoning or a part of a tool call, and nothing else."""
        made = call(stream_mode, Retry(), [chunk, down()], ["fine"])
        assert made.response.text == "fine"
        assert made.record.attempts == 2

    def test_reasoning_is_output(self, stream_mode):
        """Reasoning that has gone out cannot be taken back either."""
        made = call(stream_mode, Retry(), [Chunk(reasoning="hm"), down()], ["again"])
        assert isinstance(made.ran.error, StreamInterrupted)
        assert made.record.attempts == 1

    def test_outside_of_a_hold_back_a_failure_is_retried(self, stream_mode):
        """Nothing has gone past Retry if an inner layer holds the stream back."""
        made = call(stream_mode, [Retry(), holding], ["Hel", down()], ["Hel", Cut()], ["Bye"])
        assert made.response.text == made.ran.text == "Bye"
        assert made.record.attempts == 3

    def test_a_whole_call_has_no_output_to_lose(self):
        """In a call that is not streamed, a failure halfway through is retried."""
        provider = ScriptedProvider(["Hel", down()], "fine")
        assert Pipeline(provider, [Retry()], clock=VirtualClock()).complete(REQUEST).text == "fine"


class TestRestart:
    RETRY = Retry(on_interrupt="restart", base_delay=1, uniform=max)

    def test_a_consumer_that_accepts_restarts_gets_a_restart(self, stream_mode):
        """The chunks before the Restart are void, and the response is the new answer."""
        made = call(stream_mode, self.RETRY, ["Hel", "lo", down()], ["Bye"], restarts=True)
        assert made.ran.events == [Chunk("Hel"), Chunk("lo"), Restart("ServerError"), Chunk("Bye")]
        assert made.response.text == made.ran.text == "Bye"
        assert (made.record.chunks, made.record.characters) == (1, 3)
        assert made.clock.sleeps == [1]

    def test_other_consumers_get_the_interruption(self, stream_mode):
        """Without `restarts=True`, nothing is sent again."""
        made = call(stream_mode, self.RETRY, ["Hel", down()], ["Bye"])
        assert isinstance(made.ran.error, StreamInterrupted)
        assert made.record.attempts == 1

    def test_an_outer_hold_back_accepts_the_restart(self, stream_mode):
        """The hold-back discards the chunks that it held, and the consumer sees only the new answer."""
        made = call(stream_mode, [holding, self.RETRY], ["Hel", down()], ["Bye"])
        assert made.ran.events == [Chunk("Bye")]
        assert made.response.text == "Bye"

    def test_restarts_are_bounded_as_retries_are(self, stream_mode):
        """After the last retry, the interruption is raised, with the chunks since the last Restart."""
        retry = Retry(on_interrupt="restart", max_retries=2)
        made = call(stream_mode, retry, ["a", down()], ["b", down()], ["c", down()], ["d"], restarts=True)
        assert isinstance(made.ran.error, StreamInterrupted)
        assert made.ran.error.partial.text == made.ran.text == "c"
        assert made.record.attempts == 3

    def test_a_permanent_error_is_not_restarted(self, stream_mode):
        """The cause decides whether an interrupted stream is restarted."""
        made = call(stream_mode, self.RETRY, ["a", BadRequest("no")], ["b"], restarts=True)
        assert isinstance(root_cause(made.ran.error), BadRequest)
        assert made.record.attempts == 1

    def test_without_on_interrupt_a_consumer_gets_no_restart(self, stream_mode):
        """Both `Retry` and the consumer must opt in to restarts."""
        made = call(stream_mode, Retry(), ["a", down()], ["b"], restarts=True)
        assert isinstance(made.ran.error, StreamInterrupted)

    def test_forward_stream_never_restarts(self):
        """A consumer of plain texts could not see the Restart."""
        provider = ScriptedProvider(["a", down()], ["b"])
        texts = Pipeline(provider, [self.RETRY], clock=VirtualClock()).stream(REQUEST).texts()
        assert next(texts) == "a"
        with pytest.raises(StreamInterrupted):
            next(texts)
        assert len(provider.requests) == 1

    def test_an_error_of_an_inner_layer_after_output_is_not_retried(self, stream_mode):
        """An inner layer's error after output is raised unchanged, even if it is retryable."""

        def refuses(request, call_next):
            yield from call_next(request)
            raise ServerError("after all")

        made = call(stream_mode, [self.RETRY, refuses], ["a"], ["b"], restarts=True)
        assert made.record.attempts == 1
        assert str(root_cause(made.ran.error)) == "after all"


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"max_retries": -1}, "max_retries: expected a whole number from 0 up, got -1"),
            ({"max_retries": 1.5}, "max_retries: expected a whole number"),
            ({"max_retries": True}, "max_retries: expected a whole number"),
            ({"base_delay": -1}, "base_delay: expected a number from 0 up, got -1"),
            ({"max_delay": "soon"}, "max_delay: expected a number from 0 up, got 'soon'"),
            ({"max_retry_after": math.nan}, "max_retry_after: expected a number"),
            ({"total_time": -1}, "total_time: expected a number"),
            ({"on_interrupt": "again"}, "on_interrupt"),
        ],
        ids=str,
    )
    def test_bad_settings_are_refused(self, settings, problem):
        """The constructor raises an error with the setting's name and range."""
        with pytest.raises(ValueError, match=re.escape(problem)):
            Retry(**settings)

    def test_a_limit_may_be_infinite(self):
        """Infinity means that there is no limit."""
        retry = Retry(max_retry_after=float("inf"), total_time=float("inf"), max_delay=float("inf"))
        assert retry.wait(0, RateLimitError(retry_after=1e6), 1e9) == 1e6

    def test_the_repr_is_its_configuration(self):
        """The repr shows all settings, so that `repr(pipeline)` is readable."""
        assert repr(Retry(max_retries=5)) == (
            "Retry(max_retries=5, base_delay=0.5, max_delay=8.0, max_retry_after=60.0, total_time=None, "
            "on_interrupt='raise', limits={}, decide=None, budget=None)"
        )
