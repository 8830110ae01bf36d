"""The arrival times of a stream's chunks, kept in constant memory for the plot of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from fluxibly.aggregate import Aggregator
from fluxibly.flow.relay import Watch
from fluxibly.types import CallRecord

LIMIT = 200
"""The most chunks that are kept. A longer stream keeps every second chunk, every fourth, and so on."""


class Arrivals(Watch):
    """The arrival times of chunks, evenly thinned, and what the chunks say if `answer` is given.

    A point has the arrival time, `requested_at`, and the number of characters so far. Make it when the span begins.
    """

    room = LIMIT
    first = 1
    """The number of the first chunk of those not taken yet, from 1, whose times are noted."""

    def __init__(self, call: CallRecord, answer: Aggregator | None) -> None:
        super().__init__(call)
        self.answer = answer
        self.points: list[tuple[float, float, int]] = []
        # Not `call.started_at`: the layers outside, and loading the SDK for the first call, take time before the span.
        self.began = call.clock()

    def restarted(self) -> None:
        super().restarted()
        self.points.clear()
        self.stride = self.left = self.first = 1
        self.room = LIMIT
        if self.answer is not None:
            self.answer = Aggregator()

    def take(self, lengths: Sequence[int]) -> None:
        totals = [*accumulate(lengths, initial=self.characters)]
        self.points.extend(zip(self.arrived, self.asked, totals[self.first :: self.stride], strict=False))
        if len(self.points) == LIMIT:
            del self.points[1::2]  # this drops the newest point too, so the next point is half of the new stride away
            self.left = self.stride
            self.stride *= 2
        self.first = self.left
        self.room = LIMIT - len(self.points)
        if self.answer is not None:
            for chunk in self.chunks:
                self.answer.add(chunk)

    def encoded(self) -> str:
        """Return the value of `semconv.STREAM_ARRIVALS`."""
        import msgspec

        start = last = self.began
        values: list[tuple[int, int, int]] = []
        for at, asked, characters in self.points:
            # The wait began when the consumer asked for the chunk, or when the previous chunk came if that was later.
            since = asked if asked > last else last  # noqa: FURB136  # max() costs three times as much
            values.append((int((at - start) * 1e6), int((at - since) * 1e6), characters))
            last = at
        return msgspec.json.encode(values).decode()
