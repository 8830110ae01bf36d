"""When the chunks of a stream came, in constant memory: for the plot of a trace."""

from __future__ import annotations

from fluxibly.types import CallRecord

LIMIT = 200
"""Chunks that are kept; of a longer stream, each second, each fourth, … is."""


class Arrivals:
    """The times at which chunks came, evenly thinned. `Tracing` adds the points: the time, `requested_at`, the characters."""

    __slots__ = ("points", "started_at", "stride")

    def __init__(self, call: CallRecord) -> None:
        self.started_at = call.started_at
        self.points: list[tuple[float, float, int]] = []
        self.stride = 1

    def begin(self) -> None:
        """Forget what came: the stream begins anew."""
        self.points.clear()
        self.stride = 1

    def thin(self) -> int:
        """Make room among `LIMIT` points. Returns how many chunks further on the next one to note is."""
        del self.points[1::2]  # with it goes the one just added: the next is as far from it as it was from its last
        self.stride *= 2
        return self.stride // 2

    def encoded(self) -> str:
        """The value of `semconv.STREAM_ARRIVALS`."""
        import msgspec

        start = last = self.started_at
        values: list[tuple[int, int, int]] = []
        for at, asked, characters in self.points:
            # The wait began when the consumer asked, or when the chunk before it came, if that was later.
            since = asked if asked > last else last  # noqa: FURB136  # max() costs three times as much
            values.append((int((at - start) * 1e6), int((at - since) * 1e6), characters))
            last = at
        return msgspec.json.encode(values).decode()
