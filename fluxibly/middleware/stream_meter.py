"""Middleware that measures streams: how many chunks came, how fast, and how evenly."""

from __future__ import annotations

import math
from bisect import bisect, bisect_left
from collections.abc import Sequence
from typing import Final

import attrs

from fluxibly.aggregate import as_chunk
from fluxibly.flow import CallNext, Flow
from fluxibly.flow.culprits import check_delivered
from fluxibly.flow.relay import Watch
from fluxibly.types import CallRecord, Request, Response, StreamStats, Usage


@attrs.frozen(kw_only=True)
class StreamMeter:
    """Middleware that sets `response.stats` of a stream, and `request.call.stats` even if it failed or was abandoned.

    Memory is constant regardless of the stream's length. The gaps are counted in bins that grow by 5 % from a
    microsecond up, so a percentile is accurate to within 2.5 %. Waits exclude the time that the consumer took.
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
            meter.flush()
            check_delivered(call, response, meter.message_length)
            if not meter.count and (response.has_output or response.finish_reason):
                # A response that was not streamed reaches the consumer as one chunk.
                meter.note(as_chunk(response))
                meter.flush()
            call.stats = meter.stats(response.usage)
            return response
        except GeneratorExit:
            raise
        except BaseException:
            meter.waited_in_vain()
            raise
        finally:
            meter.flush()
            if call.stats is None and meter.count:
                call.stats = meter.stats(call.usage)


FIRST_BIN = 1e-6
EDGES: Final = [*(FIRST_BIN * math.exp(place * math.log(1.05)) for place in range(1, 600)), math.inf]
"""Where the bins end, in seconds. Sorted gaps are counted a bin at a time, which costs less than a logarithm for each."""


class _Meter(Watch):
    """The running measurements of one stream. They are up to date after `flush`."""

    count = 0
    """The number of chunks."""
    first_wait = longest = waited = last_wait = 0.0
    first_at: float | None = None

    def __init__(self, call: CallRecord) -> None:
        super().__init__(call)
        self.bins: dict[int, int] = {}
        self.last = call.started_at
        """When the last chunk arrived."""

    def restarted(self) -> None:
        super().restarted()
        self.bins.clear()
        self.count = 0
        self.first_wait = self.longest = self.waited = self.last_wait = 0.0
        self.first_at = None
        self.last = self.call.started_at

    def take(self, lengths: Sequence[int]) -> None:
        # A wait began when the consumer asked for the chunk, or when the previous chunk came if later.
        spans = zip(self.arrived, self.asked, [self.last, *self.arrived], strict=False)
        gaps = [at - (asked if asked > last else last) for at, asked, last in spans]  # noqa: FURB136  # max() costs a call
        self.last = self.arrived[-1]
        self.count += len(gaps)
        if self.first_at is None:  # the wait for the first chunk is not a gap
            self.first_at, self.first_wait = self.arrived[0], gaps.pop(0)
        self.waited += sum(gaps)
        gaps.sort()
        counted = 0
        while counted < len(gaps):
            place = bisect(EDGES, gaps[counted])
            end = bisect_left(gaps, EDGES[place], counted)
            self.bins[place] = self.bins.get(place, 0) + end - counted
            counted = end
        if gaps:
            self.longest = max(self.longest, gaps[-1])

    def waited_in_vain(self) -> None:
        """Record the wait that an error ended. It is not a gap, but it may be the longest stall."""
        self.flush()
        self.last_wait = self.call.clock() - max(self.call.requested_at, self.last)

    def stats(self, usage: Usage | None) -> StreamStats:
        call = self.call
        first = call.sent_at if call.sent_at is not None else call.started_at
        gaps = self.count - 1
        return StreamStats(
            chunks=self.count,
            characters=self.characters,
            time_to_first_chunk=None if self.first_at is None else self.first_at - first,
            gap_p50=self.percentile(0.50),
            gap_p95=self.percentile(0.95),
            gap_p99=self.percentile(0.99),
            gap_max=self.longest if gaps > 0 else None,
            longest_stall=max(self.longest, self.first_wait, self.last_wait),
            streaming_time=self.waited,
            tokens=None if usage is None else usage.output_tokens,
        )

    def percentile(self, share: float) -> float | None:
        """Return the percentile of the gaps at `share` (0 to 1, nearest rank), as the middle of its bin."""
        gaps = self.count - 1
        if gaps < 1:
            return None
        rank = math.ceil(share * gaps)
        for place in sorted(self.bins):
            rank -= self.bins[place]
            if rank <= 0:
                return min(FIRST_BIN * math.exp((place + 0.5) * math.log(1.05)), self.longest)
        return self.longest
