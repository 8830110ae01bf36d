"""`StreamTimeout`: no keep-alive restarts its limits, over real connections too, and its errors say whose limit it was."""

from __future__ import annotations

import logging
import math
import re

import pytest
from support.calling import call
from support.misbehaving import serve
from support.tiny import event, for_ever, over_http, silent, silent_after

from fluxibly.errors import ConfigError, RequestTimeout, StreamInterrupted, StreamStalled, outcome_of, root_cause
from fluxibly.flow import sleep
from fluxibly.middleware import Logging, Retry, StreamTimeout
from fluxibly.registry import make_middleware
from fluxibly.testing import Delay, check_middleware
from fluxibly.testing.modes import MODES
from fluxibly.types import Chunk

SHORT = 0.15
"""A limit that passes, in seconds."""
AT_ONCE = 5.0
"""Seconds within which a call has ended that would last for ever without its limit."""


class TestFirstChunk:
    @pytest.mark.parametrize("before", [[], [Chunk()], [Delay(1), Chunk(model="m-2"), Delay(1), Chunk()]], ids=str)
    def test_no_output(self, stream_mode, before):
        """Chunks without output do not restart it; the error names the middleware, and is retryable."""
        made = call(stream_mode, StreamTimeout(first_chunk=3), [*before, Delay(9), "late"])
        error = made.ran.error
        assert (type(error), error.phase, error.retryable) == (RequestTimeout, "first_chunk", True)
        assert "took longer than 3 s (the limit first_chunk of StreamTimeout(first_chunk=3))" in str(error)
        assert made.clock.now() == 3

    def test_it_is_over_with_the_first_output(self, stream_mode):
        """Later chunks may take longer."""
        assert call(stream_mode, StreamTimeout(first_chunk=3), ["a", Delay(9), "b"]).response.text == "ab"

    def test_each_attempt_begins_anew(self, stream_mode):
        """A retry follows, wherever Retry stands."""
        for stack in (
            [StreamTimeout(first_chunk=3), Retry(base_delay=0)],
            [Retry(base_delay=0), StreamTimeout(first_chunk=3)],
        ):
            made = call(stream_mode, stack, [Delay(9), "late"], [Delay(2), "fine"])
            assert (made.response.text, made.clock.now()) == ("fine", 5)


class TestIdle:
    def test_no_further_chunk(self, stream_mode):
        """The error is the cause of the interruption; the outcome is stalled."""
        made = call(stream_mode, StreamTimeout(idle=2), ["a", Delay(1), " b", Delay(5), " late"])
        error = made.ran.error
        assert isinstance(error, StreamInterrupted)
        assert error.partial.text == "a b"
        assert type(error.__cause__) is StreamStalled
        assert "took longer than 2 s (the limit idle of StreamTimeout(idle=2))" in str(error)
        assert (made.clock.now(), outcome_of(error)) == (3, "stalled")

    def test_the_first_chunk_may_take_longer(self, stream_mode):
        """Only waits after output count."""
        assert call(stream_mode, StreamTimeout(idle=2), [Delay(9), "fine"]).response.text == "fine"

    def test_what_a_middleware_waits_does_not_count(self, stream_mode):
        """A layer further out that takes its time over each chunk does not make the provider late."""

        def slow(request, call_next):
            flow = call_next(request)
            reply = None
            try:
                while True:
                    effect = flow.send(reply)
                    if isinstance(effect, Chunk):
                        yield from sleep(9)
                    reply = yield effect
            except StopIteration as done:
                return done.value

        made = call(stream_mode, [slow, StreamTimeout(first_chunk=2, idle=2)], ["a", Delay(1), " b"])
        assert made.response.text == "a b"


class TestBoth:
    def test_whole_answers_are_not_bounded(self):
        """There is no chunk to wait for."""
        for mode in (mode for mode in MODES if not mode.streaming):
            made = call(mode, StreamTimeout(first_chunk=1, idle=1), [Delay(5), "a", Delay(5), "b"])
            assert made.response.text == "ab"

    def test_the_shortest_of_several_limits(self, stream_mode):
        """Each limit is that of the strictest layer, and the error names that layer."""
        one, other = StreamTimeout(first_chunk=9, idle=2), StreamTimeout(first_chunk=3, idle=9)
        for stack in ([one, other], [other, one]):
            made = call(stream_mode, stack, [Delay(50), "late"])
            assert f"the limit first_chunk of {other})" in str(made.ran.error)
            made = call(stream_mode, stack, ["a", Delay(50), "late"])
            assert f"the limit idle of {one})" in str(made.ran.error)
            assert made.clock.now() == 2

    def test_the_log(self, stream_mode, caplog):
        """The lines of the retry and of the failed call say whose limit it was."""
        with caplog.at_level(logging.INFO):
            stack = [Logging(), Retry(max_retries=1, base_delay=0), StreamTimeout(first_chunk=3)]
            call(stream_mode, stack, [Delay(5), "late"], [Delay(5), "late"])
        lines = [record.getMessage() for record in caplog.records if "RequestTimeout" in record.getMessage()]
        assert len(lines) == 2
        assert all("the limit first_chunk of StreamTimeout(first_chunk=3)" in line for line in lines)

    def test_the_laws(self):
        """It restores the limits of the call whatever happens."""
        check_middleware(StreamTimeout(first_chunk=1000, idle=1000))


class TestOverHTTP:
    @pytest.mark.parametrize(
        "script",
        [silent, silent_after(event("")), for_ever(": ping\n\n"), for_ever(event("")), for_ever("x", "data: ")],
        ids=["hangs", "hangs after an empty chunk", "keeps alive", "empty chunks", "drips"],
    )
    def test_no_output(self, stream_mode, script):
        """However the server keeps the connection alive, each attempt ends in time."""
        limit = StreamTimeout(first_chunk=SHORT)
        with serve(script) as server:
            ran, seconds = over_http(stream_mode, server.url, [Retry(max_retries=1, base_delay=0), limit])
            assert len(server.requests) == 2
        assert (type(ran.error), ran.error.phase) == (RequestTimeout, "first_chunk")
        assert f"sent no output within {SHORT} s (the limit first_chunk of StreamTimeout(first_chunk={SHORT}))" in str(
            ran.error
        )
        assert 2 * SHORT <= seconds < AT_ONCE

    @pytest.mark.parametrize(
        "script",
        [silent_after(event("one")), for_ever(": ping\n\n", event("one")), for_ever("x", event("one"), "data: ")],
        ids=["hangs", "keeps alive", "drips"],
    )
    def test_no_further_chunk(self, stream_mode, script):
        """Nor does it keep a stream alive that has begun."""
        with serve(script) as server:
            ran, seconds = over_http(stream_mode, server.url, [Retry(), StreamTimeout(idle=SHORT)])
            assert len(server.requests) == 1
        error = root_cause(ran.error)
        assert type(error) is StreamStalled
        assert f"sent no chunk within {SHORT} s (the limit idle of StreamTimeout(idle={SHORT}))" in str(error)
        assert ran.text == "one"
        assert seconds < AT_ONCE


class TestSettings:
    @pytest.mark.parametrize("name", ["first_chunk", "idle"])
    @pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, "3", True, [1]], ids=str)
    def test_bad_seconds(self, name, seconds):
        """The error has the class, the name and what is expected."""
        with pytest.raises(ValueError, match=f"^StreamTimeout: {name}: expected a number of seconds above 0, got "):
            StreamTimeout(**{name: seconds})

    @pytest.mark.parametrize("settings", [{}, {"idle": None}])
    def test_without_a_limit(self, settings):
        """A layer that does nothing is a mistake."""
        with pytest.raises(ValueError, match=re.escape("expected first_chunk or idle, in seconds, got neither")):
            StreamTimeout(**settings)

    def test_in_a_configuration(self):
        """It has a name, and a wrong setting its path."""
        assert make_middleware([{"stream_timeout": {"idle": 5}}]) == (StreamTimeout(idle=5),)
        with pytest.raises(ConfigError, match=r"middleware\[0\]\.stream_timeout\.idle: expected a number of seconds"):
            make_middleware([{"stream_timeout": {"idle": 0}}])
        with pytest.raises(ConfigError, match=r"middleware\[0\]\.stream_timeout: expected first_chunk or idle"):
            make_middleware(["stream_timeout"])

    def test_by_keyword_only(self):
        """A bare number would not say which limit it is."""
        with pytest.raises(TypeError):
            StreamTimeout(5)

    def test_the_repr(self):
        """It has the limits that are set."""
        assert repr(StreamTimeout(idle=5)) == "StreamTimeout(idle=5)"
        assert repr(StreamTimeout(first_chunk=3.5, idle=5)) == "StreamTimeout(first_chunk=3.5, idle=5)"
        assert StreamTimeout(idle=5) == StreamTimeout(idle=5.0) != StreamTimeout(first_chunk=5)
