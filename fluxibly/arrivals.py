"""When the chunks of a stream came, in constant memory: for the plot of a trace."""

from __future__ import annotations

from fluxibly.types import CallRecord, Chunk

LIMIT = 200
"""Chunks that are kept; of a longer stream, each second, each fourth, … is."""


class Arrivals:
    """The times at which chunks came, evenly thinned. A chunk costs 0.2 µs while all are kept, then less."""

    __slots__ = ("call", "characters", "clock", "countdown", "last", "points", "stride")

    def __init__(self, call: CallRecord) -> None:
        self.call = call
        self.clock = call.clock
        self.begin()

    def begin(self) -> None:
        """Forget what came: the stream begins, or begins anew."""
        self.points: list[tuple[float, float, int]] = []
        self.stride = self.countdown = 1
        self.characters = 0
        self.last = 0.0

    def add(self, chunk: Chunk) -> None:
        """Note a chunk that has just come."""
        self.characters += len(chunk.text)
        self.countdown -= 1
        if self.countdown:
            return
        now = self.clock()
        asked = self.call.asked_at
        self.points.append((now, now - (max(self.last, asked)), self.characters))
        self.last = now
        self.countdown = self.stride
        if len(self.points) == LIMIT:
            del self.points[1::2]
            self.stride *= 2
            self.countdown = self.stride

    def encoded(self) -> str:
        """The value of `semconv.STREAM_ARRIVALS`."""
        import msgspec

        start = self.call.started_at
        return msgspec.json.encode(
            [(int((at - start) * 1e6), int(wait * 1e6), characters) for at, wait, characters in self.points]
        ).decode()
