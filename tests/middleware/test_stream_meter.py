"""The exact measurements of `StreamMeter`, with a clock that moves only when a test advances it."""

from __future__ import annotations

import math
import tracemalloc

import pytest
from hypothesis import given, settings, strategies as st
from support.calling import REQUEST, call

from fluxibly.errors import ServerError
from fluxibly.flow import hold_back, sleep
from fluxibly.middleware import Retry, StreamMeter
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, Delay, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import BACKENDS, MODES, run_async
from fluxibly.types import Chunk, Response, StreamStats, Usage

STREAMS = [mode for mode in MODES if mode.streaming]


@pytest.fixture(params=STREAMS, ids=str)
def mode(request):
    return request.param


def near(value):
    """Return an approximation of `value`, because percentiles are accurate to within 2.5 %."""
    return pytest.approx(value, rel=0.025)


class TestStatistics:
    def test_a_stream(self, mode):
        """A stream's statistics have its chunks, characters, waits and rates."""
        script = [
            Delay(0.5),
            "Hello",
            Delay(0.1),
            ", ",
            Delay(0.4),
            "wor",
            Delay(0.1),
            "ld",
            Chunk(usage=Usage(output_tokens=3)),
        ]
        stats = call(mode, StreamMeter(), script).response.stats
        assert stats.chunks == 5
        assert stats.characters == 12
        assert stats.average_chunk_size == 12 / 5
        assert stats.time_to_first_chunk == 0.5
        assert stats.gap_max == pytest.approx(0.4)
        assert stats.longest_stall == 0.5
        assert stats.streaming_time == pytest.approx(0.6)
        assert stats.characters_per_second == pytest.approx(20)
        assert stats.tokens == 3
        assert stats.tokens_per_second == pytest.approx(5)
        assert stats.gap_p50 == near(0.1)
        assert stats.gap_p95 == stats.gap_p99 == near(0.4)

    def test_one_chunk_has_no_gaps(self, mode):
        """A stream of one chunk has neither gaps nor rates."""
        stats = call(mode, StreamMeter(), [Delay(2), "all"]).response.stats
        assert stats == StreamStats(chunks=1, characters=3, time_to_first_chunk=2, longest_stall=2)
        assert stats.characters_per_second is None
        assert stats.tokens_per_second is None

    def test_no_chunks(self, mode):
        """An empty stream has no times at all."""
        assert call(mode, StreamMeter(), []).response.stats == StreamStats(longest_stall=0.0)

    def test_chunks_at_once(self, mode):
        """Gaps between simultaneous chunks are zero rather than a microsecond."""
        stats = call(mode, StreamMeter(), ["a", "b", "c"]).response.stats
        assert (stats.gap_p50, stats.gap_p99, stats.gap_max, stats.streaming_time) == (0, 0, 0, 0)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.floats(1e-5, 100), min_size=1, max_size=60))
    def test_percentiles_are_near(self, gaps):
        """For any gaps, each percentile is within 2.5 % of the exact percentile (nearest rank)."""
        script = ["x"]
        for gap in gaps:
            script += [Delay(gap), "x"]
        clock = VirtualClock()
        stream = Pipeline(ScriptedProvider(script, clock=clock), [StreamMeter()], clock=clock).stream(REQUEST)
        assert sum(1 for _ in stream) == len(gaps) + 1
        stats = stream.response.stats
        exact = sorted(gaps)
        for share, found in ((0.5, stats.gap_p50), (0.95, stats.gap_p95), (0.99, stats.gap_p99)):
            assert found == pytest.approx(exact[math.ceil(share * len(gaps)) - 1], rel=0.0251)
        assert stats.gap_max == pytest.approx(exact[-1])

    def test_the_wait_of_a_retry_counts_towards_the_first_chunk(self, mode):
        """The consumer waits for the whole time. The longest stall is that of the attempt that answered."""
        retry = Retry(base_delay=4, uniform=max)
        stats = call(mode, [StreamMeter(), retry], [Delay(1), ServerError("down")], [Delay(2), "ok"]).response.stats
        assert (stats.time_to_first_chunk, stats.chunks, stats.longest_stall) == (7, 1, 2)

    def test_time_before_the_request_does_not_count(self, mode):
        """The time to the first chunk begins when the request is sent."""

        def slow(request, call_next):
            yield from sleep(10)
            return (yield from call_next(request))

        assert call(mode, [StreamMeter(), slow], [Delay(1), "ok"]).response.stats.time_to_first_chunk == 1

    def test_a_restart_begins_anew(self, mode):
        """The statistics are those of the answer that counts."""
        retry = Retry(on_interrupt="restart", base_delay=0)
        made = call(
            mode,
            [StreamMeter(), retry],
            ["void", Delay(50), "void", ServerError("down")],
            ["ok", Delay(1), "ok"],
            restarts=True,
        )
        stats = made.response.stats
        assert (stats.chunks, stats.characters, stats.gap_max, stats.streaming_time) == (2, 4, 1, 1)

    def test_an_outer_hold_back(self, mode):
        """The meter measures when chunks pass it, even if they are delivered later."""

        def hold(request, call_next):
            return (yield from hold_back(call_next(request)))

        stats = call(mode, [hold, StreamMeter()], [Delay(1), "a", Delay(2), "b"]).response.stats
        assert (stats.chunks, stats.time_to_first_chunk, stats.gap_max) == (2, 1, 2)


class TestConsumer:
    def test_its_time_is_left_out(self):
        """A slow consumer causes no gaps, even before its first read."""
        clock = VirtualClock()
        provider = ScriptedProvider(["a", Delay(1), "b", "c"], clock=clock)
        stream = Pipeline(provider, [StreamMeter()], clock=clock).stream(REQUEST)
        clock.advance(100)
        for _ in stream:
            clock.advance(100)
        stats = stream.response.stats
        assert (stats.time_to_first_chunk, stats.gap_max, stats.streaming_time, stats.longest_stall) == (0, 1, 1, 1)
        assert stream.response.elapsed == 401

    def test_its_time_before_it_leaves_is_no_stall(self):
        """The time between the last chunk and the `close` of the consumer is the consumer's own."""
        clock, records = VirtualClock(), []

        def note(request, call_next):
            records.append(request.call)
            return (yield from call_next(request))

        provider = ScriptedProvider(["a", Delay(1), "b", "c"], clock=clock)
        with Pipeline(provider, [note, StreamMeter()], clock=clock).stream(REQUEST) as stream:
            next(stream)
            next(stream)
            clock.advance(100)
        assert (records[0].stats.chunks, records[0].stats.longest_stall) == (2, 1)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_its_time_is_left_out_in_async_streams(self, backend):
        """A slow consumer causes no gaps in async streams either."""

        async def main():
            clock = VirtualClock()
            provider = AsyncScriptedProvider(["a", Delay(1), "b", "c"], clock=clock)
            async with AsyncPipeline(provider, [StreamMeter()], clock=clock).stream(REQUEST) as stream:
                async for _ in stream:
                    clock.advance(100)
            return stream.response.stats

        stats = run_async(main, backend)
        assert (stats.gap_max, stats.streaming_time, stats.longest_stall) == (1, 1, 1)


class TestRecord:
    def test_a_failed_stream_has_statistics(self, mode):
        """The statistics are on the call's record, because there is no response."""
        made = call(mode, StreamMeter(), ["one", Delay(3), "two", ServerError("down")])
        stats = made.record.stats
        assert (stats.chunks, stats.characters, stats.gap_max) == (2, 6, 3)

    def test_the_wait_that_an_error_ended_is_a_stall(self, mode):
        """The wait is not a gap, because it did not end with a chunk."""
        made = call(mode, StreamMeter(), ["one", Delay(1), "two", Delay(3), ServerError("down")])
        stats = made.record.stats
        assert (stats.gap_max, stats.streaming_time, stats.longest_stall) == (1, 1, 3)

    def test_an_abandoned_stream_has_statistics(self, mode):
        """The statistics cover the chunks that were read."""
        made = call(mode, StreamMeter(), ["one", Delay(3), "two", "three"], stop_after=2)
        assert (made.record.stats.chunks, made.record.stats.characters) == (2, 6)

    def test_a_stream_that_failed_at_once_has_no_statistics(self, mode):
        """Without a chunk, there is nothing to measure."""
        assert call(mode, StreamMeter(), ServerError("down")).record.stats is None

    def test_tokens_of_a_failed_stream(self, mode):
        """The tokens are those that the service had reported before the failure."""
        made = call(mode, StreamMeter(), [Chunk("one", usage=Usage(output_tokens=1)), ServerError("down")])
        assert made.record.stats.tokens == 1

    def test_tokens_that_a_middleware_has_counted(self, mode):
        """The tokens are those of the response that the meter gets, which may cover several attempts."""

        def adding(request, call_next):
            response = yield from call_next(request)
            return response.evolve(usage=Usage(output_tokens=response.usage.output_tokens + 7))

        made = call(mode, [StreamMeter(), adding], [Chunk("one", usage=Usage(output_tokens=2))])
        assert made.response.stats.tokens == made.record.stats.tokens == 9

    def test_statistics_of_a_failed_attempt_are_not_kept(self, mode):
        """With the meter inside of Retry, only the last attempt counts."""
        made = call(
            mode, [Retry(base_delay=0), StreamMeter()], [Chunk(), ServerError("down")], ServerError("b"), ["ok"]
        )
        assert made.response.stats.characters == 2
        stack = [Retry(base_delay=0, max_retries=1), StreamMeter()]
        made = call(mode, stack, [Chunk(), ServerError("down")], [Chunk(), Chunk(), ServerError("b")])
        assert made.record.stats.chunks == 2
        made = call(mode, stack, [Chunk(), ServerError("down")], ServerError("b"))
        assert made.record.stats is None

    def test_a_refused_restart_keeps_the_statistics(self, mode):
        """The consumer keeps what it has received, so the chunks count."""
        made = call(mode, [StreamMeter(), Retry(on_interrupt="restart")], ["one", "two", ServerError("down")])
        assert [type(event) for event in made.ran.events] == [Chunk, Chunk]
        assert made.record.stats.chunks == 2

    def test_an_answer_of_nothing_but_its_end_is_one_chunk(self, mode):
        """A whole answer that says only why it ended reaches the consumer as one chunk, and is counted as one."""

        def cached(request, call_next):
            yield from ()
            return Response(finish_reason="stop")

        made = call(mode, [StreamMeter(), cached])
        assert len(made.ran.events) == made.response.stats.chunks == made.record.chunks == 1

    @pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.streaming], ids=str)
    def test_whole_responses_have_no_statistics(self, mode):
        """Without a stream, there is nothing to measure."""
        made = call(mode, StreamMeter(), "whole")
        assert made.response.stats is None
        assert made.record.stats is None

    def test_an_answer_that_was_not_streamed_is_one_chunk(self, mode):
        """A cache hit counts as one chunk, which arrives when the cache answers."""

        def cached(request, call_next):
            yield from ()
            return Response("from a cache")

        def late(request, call_next):
            yield from sleep(1000)
            return (yield from call_next(request))

        stats = call(mode, [late, StreamMeter(), cached]).response.stats
        assert (stats.chunks, stats.characters) == (1, 12)
        assert stats.time_to_first_chunk == stats.longest_stall == 1000

    def test_events_are_untouched(self, mode):
        """The consumer gets the same chunk objects that the provider yielded."""
        chunks = [Chunk("a"), Chunk(reasoning="hm"), Chunk("b", finish_reason="stop")]
        events = call(mode, StreamMeter(), chunks).ran.events
        assert [id(event) for event in events] == [id(chunk) for chunk in chunks]


def test_memory_is_constant():
    """Fifty thousand chunks take no more memory than a thousand."""

    class Endless:
        def stream(self, request):
            for n in range(50_000):
                clock.advance(n % 7 / 100)
                yield "x"

        def complete(self, request):
            raise AssertionError

    def peak(count):
        stream = Pipeline(Endless(), [StreamMeter()], clock=clock).stream(REQUEST)
        tracemalloc.start()
        for seen, _ in enumerate(stream, 1):
            if seen == count:
                break
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        stream.close()
        return used

    clock = VirtualClock()
    peak(10)
    # The texts, which are joined at the end, are kept by reference: 16 bytes a chunk in two lists.
    assert peak(50_000) - peak(1_000) < 1_500_000
