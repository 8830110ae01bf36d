"""The arrival times of a stream's chunks, kept in constant memory for the plot of a trace."""

from __future__ import annotations

from fluxibly.types import CallRecord

LIMIT = 200
"""The most chunks that are kept. A longer stream keeps every second chunk, every fourth, and so on."""


class Arrivals:
    """The arrival times of chunks, evenly thinned.

    `Tracing` appends the points: the arrival time, `requested_at`, and the number of characters so far.
    """

    __slots__ = ("points", "started_at", "stride")

    def __init__(self, call: CallRecord) -> None:
        self.started_at = call.started_at
        self.points: list[tuple[float, float, int]] = []
        self.stride = 1

    def begin(self) -> None:
        """Forget all points, because the stream starts over."""
        self.points.clear()
        self.stride = 1

    def thin(self) -> int:
        """Drop every second of the `LIMIT` points. Return the number of chunks until the next point."""
        del self.points[1::2]  # this drops the newest point too, so the next point is half of the new stride away
        self.stride *= 2
        return self.stride // 2

    def encoded(self) -> str:
        """Return the value of `semconv.STREAM_ARRIVALS`."""
        import msgspec

        start = last = self.started_at
        values: list[tuple[int, int, int]] = []
        for at, asked, characters in self.points:
            # The wait began when the consumer asked for the chunk, or when the previous chunk came if that was later.
            since = asked if asked > last else last  # noqa: FURB136  # max() costs three times as much
            values.append((int((at - start) * 1e6), int((at - since) * 1e6), characters))
            last = at
        return msgspec.json.encode(values).decode()
