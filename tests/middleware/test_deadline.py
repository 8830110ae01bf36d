"""`Deadline`: it ends whatever is inside of it, over real connections too, and its errors say which deadline it was."""

from __future__ import annotations

import logging
import math
import re
import time

import anyio
import pytest
from support.calling import REQUEST, call
from support.misbehaving import HEAD, Peer, Received, serve
from support.tiny import event, for_ever, over_http, silent, silent_after

from fluxibly.errors import (
    ConfigError,
    DeadlineExceeded,
    RateLimitError,
    ServerError,
    StreamInterrupted,
    outcome_of,
    root_cause,
)
from fluxibly.flow import perform, sleep
from fluxibly.limits import Leash
from fluxibly.middleware import Deadline, Logging, Retry, StreamTimeout
from fluxibly.pipeline import SYSTEM_CLOCK
from fluxibly.registry import make_middleware
from fluxibly.testing import Delay, check_middleware
from fluxibly.testing.modes import run

SHORT = 0.15
"""A deadline that passes, in seconds."""
AT_ONCE = 5.0
"""Seconds within which a call has ended that would last for ever without its deadline."""


class TestEnd:
    def test_an_attempt_that_takes_too_long(self, mode):
        """It ends at the deadline, and the error says whose that was."""
        made = call(mode, Deadline(3), [Delay(5), "late"])
        error = made.ran.error
        assert type(error) is DeadlineExceeded
        assert str(error) == (
            "the deadline of the call has passed (m-1 at ScriptedProvider, 3 s after its start, set by Deadline(3)); "
            "allow more time, or ask for less"
        )
        assert (made.clock.now(), error.retryable, outcome_of(error)) == (3, False, "failed")

    def test_in_time(self, mode):
        """A call within its time knows nothing of it."""
        made = call(mode, Deadline(3), [Delay(2), "fine"])
        assert made.response.text == "fine"
        assert made.record.leash is None

    def test_retries_and_their_waits_together(self, mode):
        """The deadline is for all attempts; its error's cause is that of the last one."""
        retry = Retry(max_retries=9, base_delay=1, uniform=max)
        made = call(mode, [Deadline(5), retry], *[[Delay(1), ServerError(f"{n}")] for n in range(9)])
        assert type(made.ran.error) is DeadlineExceeded
        assert str(made.ran.error.__cause__) == "1"
        assert made.record.attempts == 2

    def test_a_wait_that_would_end_later_is_not_begun(self, mode):
        """The error comes at once."""
        made = call(mode, [Deadline(5), Retry()], RateLimitError("slow", retry_after=30), "never")
        assert str(made.ran.error).startswith("the deadline of the call would pass during a wait (m-1 at Scripted")
        assert "set by Deadline(5)" in str(made.ran.error)
        assert (made.clock.sleeps, made.record.attempts) == ([], 1)

    def test_inside_of_a_retry(self, mode):
        """It begins anew with each attempt, but its error is not retried."""
        retry = Retry(base_delay=0)
        made = call(mode, [retry, Deadline(3)], [Delay(2), ServerError("no")], [Delay(2), "fine"])
        assert (made.response.text, made.clock.now()) == ("fine", 4)
        made = call(mode, [retry, Deadline(3)], [Delay(5), "late"], "never")
        assert (type(made.ran.error), made.record.attempts) == (DeadlineExceeded, 1)

    def test_after_output(self, stream_mode):
        """It is the cause of the interruption."""
        made = call(stream_mode, Deadline(3), ["half ", Delay(5), "late"])
        assert isinstance(made.ran.error, StreamInterrupted)
        assert type(made.ran.error.__cause__) is DeadlineExceeded
        assert made.ran.error.partial.text == "half "

    @pytest.mark.parametrize("seconds", [(3, 9), (9, 3), (3, 3.5, 20), (20, 3)])
    def test_the_earliest_of_several(self, mode, seconds):
        """It holds, wherever it stands, and the error names it."""
        made = call(mode, [Deadline(each) for each in seconds], [Delay(50), "late"])
        assert made.clock.now() == 3
        assert "set by Deadline(3))" in str(made.ran.error)

    def test_a_deadline_within_that_is_over(self, mode):
        """The one further out holds again."""

        def twice(request, call_next):
            with pytest.raises(DeadlineExceeded, match=r"set by Deadline\(1\)"):
                yield from Deadline(1)(request, call_next)
            return (yield from call_next(request))

        made = call(mode, [Deadline(4), twice], [Delay(2), "a"], [Delay(9), "b"])
        assert "set by Deadline(4))" in str(made.ran.error)
        assert made.clock.now() == 4

    def test_who_set_a_limit_may_be_unknown(self, mode):
        """The error of a middleware that does not say who it is names nobody, and not the one further out."""

        def anonymous(request, call_next):
            request.call.leash = Leash(request.call.leash, deadline=request.call.clock() + 2)
            return (yield from call_next(request))

        made = call(mode, [Deadline(9), anonymous], [Delay(50), "late"])
        assert "2 s after its start); allow" in str(made.ran.error)

    def test_a_slow_middleware(self, mode):
        """Its waits end, and nothing is sent any more."""

        def slow(request, call_next):
            yield from sleep(60)
            return (yield from call_next(request))

        made = call(mode, [Deadline(3), slow], "never")
        assert (type(made.ran.error), made.clock.now(), made.record.attempts) == (DeadlineExceeded, 3, 0)

    def test_what_a_middleware_performs(self, mode):
        """Async I/O is cut short. Sync I/O is not, but nothing is sent after it."""
        clocks = []

        def performing(request, call_next):
            clock = clocks[-1]
            yield from perform(lambda: clock.sleep(60), lambda: clock.asleep(60))
            return (yield from call_next(request))

        def noting(request, call_next):
            clocks.append(request.call.clock.__self__)
            return (yield from call_next(request))

        made = call(mode, [noting, Deadline(3), performing], "never")
        assert type(made.ran.error) is DeadlineExceeded
        assert made.clock.now() == (3 if mode.backend else 60)
        assert made.record.attempts == 0

    def test_the_log(self, mode, caplog):
        """The line of the failed call says which deadline it was."""
        with caplog.at_level(logging.INFO):
            call(mode, [Logging(), Deadline(3)], [Delay(5), "late"])
        (line,) = [record for record in caplog.records if "DeadlineExceeded" in record.getMessage()]
        assert "set by Deadline(3))" in line.getMessage()

    def test_the_laws(self):
        """It restores the limits of the call whatever happens."""
        check_middleware(Deadline(1000))


def head_byte_by_byte(peer: Peer, request: Received) -> None:
    peer.trickle(HEAD + b"x-a: 1\r\n" * 1_000)


class TestOverHTTP:
    @pytest.mark.parametrize(
        "script",
        [
            silent,
            head_byte_by_byte,
            for_ever(": ping\n\n"),
            for_ever(": ping\n\n", event("one")),
            silent_after(event("a")),
        ],
        ids=["hangs", "trickles its head", "keeps alive", "keeps alive after output", "hangs after output"],
    )
    def test_a_server_that_misbehaves(self, mode, script):
        """The call ends in time, and is not sent again."""
        with serve(script) as server:
            ran, seconds = over_http(mode, server.url, [Deadline(SHORT), Retry()])
            assert len(server.requests) == 1
        error = root_cause(ran.error)
        assert type(error) is DeadlineExceeded
        assert f"before the deadline (set by Deadline({SHORT})); give the call more time" in str(error)
        assert SHORT <= seconds < AT_ONCE

    def test_a_server_that_always_fails(self, mode):
        """The waits of Retry end at the deadline."""

        def script(peer: Peer, request: Received) -> None:
            peer.answer("no", status="503 No")

        with serve(script) as server:
            ran, seconds = over_http(mode, server.url, [Deadline(4 * SHORT), Retry(max_retries=10**6, max_delay=0.01)])
            assert len(server.requests) > 1
        assert type(ran.error) is DeadlineExceeded
        assert isinstance(ran.error.__cause__, ServerError)
        assert seconds < AT_ONCE

    def test_a_provider_that_ignores_limits(self, mode):
        """Its caller goes on in time."""
        clock, done = SYSTEM_CLOCK, []

        class Slow:
            def complete(self, request):
                time.sleep(3 * SHORT)
                done.append(1)
                return "late"

            def stream(self, request):
                yield self.complete(request)

        class AsyncSlow:
            async def complete(self, request):
                await anyio.sleep(60)
                return "late"

            async def stream(self, request):
                yield await self.complete(request)

        ran = run(mode, AsyncSlow() if mode.backend else Slow(), [Deadline(SHORT)], REQUEST, clock=clock)
        assert type(ran.error) is DeadlineExceeded
        assert f"set by Deadline({SHORT}))" in str(ran.error)
        assert done == []
        while not mode.backend and not done:  # the thread runs on until the provider returns
            time.sleep(0.01)


class TestSettings:
    @pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, "3", True, None, 10**400], ids=lambda n: str(n)[:9])
    def test_bad_seconds(self, seconds):
        """The error has the class, the name and what is expected."""
        with pytest.raises(ValueError, match=r"^Deadline: seconds: expected a number of seconds above 0, got "):
            Deadline(seconds)

    def test_in_a_configuration(self):
        """It has a name, and a wrong setting its path."""
        assert make_middleware([{"deadline": {"seconds": 30}}]) == (Deadline(30),)
        with pytest.raises(
            ConfigError, match=r"middleware\[0\]\.deadline\.seconds: expected a number of seconds above 0"
        ):
            make_middleware([{"deadline": {"seconds": 0}}])
        with pytest.raises(ConfigError, match=r"middleware\[0\]\.deadline\.seconds: is required"):
            make_middleware(["deadline"])

    def test_missing_seconds(self):
        """A deadline has no default."""
        with pytest.raises(TypeError, match="seconds"):
            Deadline()

    def test_the_repr(self):
        """It reads as it is written."""
        assert repr(Deadline(30)) == repr(Deadline(seconds=30)) == "Deadline(30)"
        assert (Deadline(30), hash(Deadline(30))) == (Deadline(30), hash(Deadline(30.0)))

    def test_where_it_cannot_be_interrupted_by_limits_of_the_wait(self, stream_mode):
        """With a StreamTimeout the error names the limit that passed first."""
        for limits, name in (((3, 5), "Deadline(3)"), ((5, 3), "StreamTimeout(first_chunk=3)")):
            stack = [Deadline(limits[0]), StreamTimeout(first_chunk=limits[1])]
            made = call(stream_mode, stack, [Delay(50), "late"])
            assert re.search(rf"(set by|first_chunk of) {re.escape(name)}\)", str(made.ran.error))
            assert made.clock.now() == 3
