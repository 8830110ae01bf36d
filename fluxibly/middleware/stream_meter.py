"""Middleware that measures streams: how many chunks came, how fast, and how evenly."""

from __future__ import annotations

import math
from typing import Any, cast

import attrs

from fluxibly.aggregate import as_chunk
from fluxibly.flow import CallNext, Flow
from fluxibly.flow.culprits import check_delivered
from fluxibly.flow.effects import More
from fluxibly.types import CallRecord, Chunk, Request, Response, Restart, StreamStats, Usage


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
            check_delivered(call, response, meter.characters - meter.before_message)
            if not meter.chunks and (response.has_output or response.finish_reason):
                meter.count(as_chunk(response))  # a response that was not streamed reaches the consumer as one chunk
            call.stats = meter.stats(response.usage)
            return response
        except GeneratorExit:
            raise
        except BaseException:
            meter.waited_in_vain()
            raise
        finally:
            if call.stats is None and meter.chunks:
                call.stats = meter.stats(call.usage)


FIRST_BIN = 1e-6
BUFFERED = 256
"""The number of waits to collect before they go into their bins. Sorting them in batches costs half."""
_PER_BIN = 1 / math.log(1.05)


class _Meter:
    """The running measurements of one stream."""

    def __init__(self, call: CallRecord) -> None:
        self.call = call
        self.restarted()

    def restarted(self) -> None:
        self.bins: dict[int, int] = {}
        self.waits: list[float] = []
        """The waits that are not in their bins yet, including the wait for the first chunk."""
        self.room = 1
        """The number of waits that may collect before they are sorted into bins. The first is sorted at once."""
        self.sorted = self.characters = 0
        self.before_message = 0
        """The number of characters before the message under way (`Chunk.added`)."""
        self.first_wait = self.longest = self.waited = self.last_wait = 0.0
        self.first_at: float | None = None
        self.last = self.call.started_at

    @property
    def chunks(self) -> int:
        """The number of chunks so far."""
        return self.sorted + len(self.waits)

    def over(self, flow: Flow[Response]) -> Flow[Response]:
        """Run `flow` and measure its chunks. `Relay` could do this, but at three times the cost per chunk."""
        call, clock, send = self.call, self.call.clock, flow.send
        outcome: Any = None
        error: BaseException | None = None
        while True:
            try:
                effect = send(outcome) if error is None else flow.throw(error)
            except StopIteration as stop:
                return cast("Response", stop.value)
            finally:
                error = None  # breaks the cycle: the error refers to this frame
            try:
                while type(effect) is Chunk:
                    # The wait began when the consumer asked for the chunk, or when the previous chunk came if later.
                    now = clock()
                    asked, last = call.requested_at, self.last
                    self.waits.append(now - (asked if asked > last else last))  # noqa: FURB136  # max() costs a call
                    self.last = now
                    self.characters += len(effect.text)
                    if len(self.waits) == self.room:
                        self.sort_in(now)
                    yield effect
                    effect = send(None)
                if type(effect) is More:
                    self.count(effect.chunk)
                outcome = yield effect
            except StopIteration as stop:
                return cast("Response", stop.value)
            except GeneratorExit:
                flow.close()
                raise
            except BaseException as thrown:  # noqa: BLE001  # goes into the flow, which raises it again if its own
                error = thrown
            else:
                if type(effect) is Restart and outcome:
                    self.restarted()

    def count(self, chunk: Chunk) -> None:
        """Count a chunk, as `over` does inline for chunks of the provider."""
        now = self.call.clock()
        self.waits.append(now - max(self.call.requested_at, self.last))
        self.last = now
        if chunk.added:
            self.before_message = self.characters
        self.characters += len(chunk.text)
        self.sort_in(now)

    def sort_in(self, now: float) -> None:
        """Put the collected waits into their bins. The wait for the first chunk is not a gap, so it gets no bin."""
        waits, bins, log = self.waits, self.bins, math.log
        self.sorted += len(waits)
        if waits and self.first_at is None:
            self.first_at, self.first_wait = now, waits.pop(0)
            self.room = BUFFERED
        for wait in waits:
            place = int(log(wait * 1e6) * _PER_BIN) if wait > FIRST_BIN else 0
            bins[place] = bins.get(place, 0) + 1
        if waits:
            self.waited += sum(waits)
            self.longest = max(self.longest, *waits)
            waits.clear()

    def waited_in_vain(self) -> None:
        """Record the wait that an error ended. It is not a gap, but it may be the longest stall."""
        self.last_wait = self.call.clock() - max(self.call.requested_at, self.last)

    def stats(self, usage: Usage | None) -> StreamStats:
        self.sort_in(self.last)
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
            longest_stall=max(self.longest, self.first_wait, self.last_wait),
            streaming_time=self.waited,
            tokens=None if usage is None else usage.output_tokens,
        )

    def percentile(self, share: float) -> float | None:
        """Return the percentile of the gaps at `share` (0 to 1, nearest rank), as the middle of its bin."""
        gaps = self.chunks - 1
        if gaps < 1:
            return None
        rank = math.ceil(share * gaps)
        for place in sorted(self.bins):
            rank -= self.bins[place]
            if rank <= 0:
                return min(FIRST_BIN * math.exp((place + 0.5) / _PER_BIN), self.longest)
        return self.longest
