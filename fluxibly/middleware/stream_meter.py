"""Measures streams: how many chunks, how fast, and how evenly they came."""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs

from fluxibly.combinators import map_chunks
from fluxibly.effects import CallNext, Flow
from fluxibly.types import CallRecord, Chunk, Request, Response, StreamStats


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
        meter = _Meter(call)
        try:
            response = yield from map_chunks(call_next(request), meter.see, at_restart=meter.begin)
            if meter.chunks:
                call.stats = meter.stats(response)
            return response
        finally:
            if call.stats is None and meter.chunks:
                call.stats = meter.stats(None)


FIRST_BIN = 1e-6
_PER_BIN = 1 / math.log(1.05)


class _Meter:
    """The running measurements of one stream."""

    __slots__ = ("bins", "call", "characters", "chunks", "clock", "first_wait", "last", "longest", "waited")

    def __init__(self, call: CallRecord) -> None:
        self.call = call
        self.clock: Callable[[], float] = call.clock
        self.begin()

    def begin(self) -> None:
        self.bins: dict[int, int] = {}
        self.chunks = self.characters = 0
        self.first_wait = self.last = self.longest = self.waited = 0.0

    def see(self, chunk: Chunk) -> Chunk:
        """Count a chunk. The wait for it began when the consumer asked, or when the chunk before it came, if later."""
        now = self.clock()
        asked = self.call.asked_at
        wait = now - (max(self.last, asked))
        self.last = now
        self.chunks += 1
        self.characters += len(chunk.text)
        if self.chunks == 1:
            self.first_wait = wait
            return chunk
        self.waited += wait
        self.longest = max(self.longest, wait)
        place = int(math.log(wait * 1e6) * _PER_BIN) if wait > FIRST_BIN else 0
        self.bins[place] = self.bins.get(place, 0) + 1
        return chunk

    def stats(self, response: Response | None) -> StreamStats:
        call = self.call
        first = call.sent_at if call.sent_at is not None else call.started_at
        gaps = self.chunks - 1
        return StreamStats(
            chunks=self.chunks,
            characters=self.characters,
            time_to_first_chunk=None if call.first_chunk_at is None else call.first_chunk_at - first,
            gap_p50=self.percentile(0.50),
            gap_p95=self.percentile(0.95),
            gap_p99=self.percentile(0.99),
            gap_max=self.longest if gaps else None,
            longest_stall=max(self.longest, self.first_wait),
            streaming_time=self.waited,
            tokens=response.usage.output_tokens if response is not None and response.usage is not None else None,
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
