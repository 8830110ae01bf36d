"""Measures streams: how many chunks, how fast, and how evenly they came."""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs

from fluxibly.aggregate import as_chunk
from fluxibly.combinators import Relay
from fluxibly.effects import CallNext, Effect, Flow, More
from fluxibly.types import CallRecord, Chunk, Request, Response, StreamStats, Usage


@attrs.frozen(kw_only=True)
class StreamMeter:
    """Fills `response.stats` of a stream, and `request.call.stats` also of one that failed or was given up.

    Memory is constant, whatever the stream's length: the gaps are counted in bins that grow by 5 %, from a
    microsecond up, so a percentile is right to within 2.5 %. Waits leave out the time that the consumer took.
    """

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        if not call.streaming:
            return (yield from call_next(request))
        call.timed = True
        call.stats = None
        meter = _Meter(call)
        try:
            response = yield from meter.over(call_next(request))
            if not meter.chunks and (response.has_output or response.finish_reason):
                meter.count(as_chunk(response))  # not streamed: it reaches the consumer as one chunk
            call.stats = meter.stats(response.usage)
            return response
        finally:
            if call.stats is None and meter.chunks:
                call.stats = meter.stats(call.usage)


FIRST_BIN = 1e-6
_PER_BIN = 1 / math.log(1.05)


class _Meter(Relay):
    """The running measurements of one stream."""

    def __init__(self, call: CallRecord) -> None:
        self.call = call
        self.clock: Callable[[], float] = call.clock
        self.restarted()

    def restarted(self) -> None:
        self.bins: dict[int, int] = {}
        self.chunks = self.characters = 0
        self.first_wait = self.longest = self.waited = 0.0
        self.first_at: float | None = None
        self.last = self.call.started_at

    def see(self, effect: Effect) -> Effect:
        if type(effect) is Chunk:
            self.count(effect)
        elif type(effect) is More:
            self.count(effect.chunk)
        return effect

    def count(self, chunk: Chunk) -> None:
        """Count a chunk. The wait for it began when the consumer asked, or when the chunk before it came, if later."""
        now = self.clock()
        asked = self.call.asked_at
        wait = now - (asked if asked > self.last else self.last)  # noqa: FURB136  # max() costs three times as much
        self.last = now
        self.chunks += 1
        self.characters += len(chunk.text)
        if self.chunks == 1:
            self.first_at, self.first_wait = now, wait
            return
        self.waited += wait
        if wait > self.longest:  # noqa: PLR1730  # as above
            self.longest = wait
        place = int(math.log(wait * 1e6) * _PER_BIN) if wait > FIRST_BIN else 0
        self.bins[place] = self.bins.get(place, 0) + 1

    def stats(self, usage: Usage | None) -> StreamStats:
        call = self.call
        first = call.sent_at if call.sent_at is not None else call.started_at
        gaps = self.chunks - 1
        return StreamStats(
            chunks=self.chunks,
            characters=self.characters,
            time_to_first_chunk=None if self.first_at is None else self.first_at - first,
            gap_p50=self.percentile(0.50),
            gap_p95=self.percentile(0.95),
            gap_p99=self.percentile(0.99),
            gap_max=self.longest if gaps > 0 else None,
            longest_stall=max(self.longest, self.first_wait),
            streaming_time=self.waited,
            tokens=None if usage is None else usage.output_tokens,
        )

    def percentile(self, share: float) -> float | None:
        """The gap that this share of the gaps is not longer than: the middle of its bin."""
        gaps = self.chunks - 1
        if gaps < 1:
            return None
        rank = math.ceil(share * gaps)
        for place in sorted(self.bins):
            rank -= self.bins[place]
            if rank <= 0:
                return min(FIRST_BIN * math.exp((place + 0.5) / _PER_BIN), self.longest)
        return self.longest
