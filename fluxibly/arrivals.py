"""When the chunks of a stream came, in constant memory: for the plot of a trace."""

from __future__ import annotations

from fluxibly.types import CallRecord

LIMIT = 200
"""Chunks that are kept; of a longer stream, each second, each fourth, … is."""


class Arrivals:
    """The times at which chunks came, evenly thinned."""

    __slots__ = ("call", "clock", "last", "points", "stride")

    def __init__(self, call: CallRecord) -> None:
        self.call = call
        self.clock = call.clock
        self.begin()

    def begin(self) -> None:
        """Forget what came: the stream begins, or begins anew."""
        self.points: list[tuple[float, float, int]] = []
        self.stride = 1
        self.last = 0.0

    def add(self, characters: int) -> int:
        """Note that a chunk has just come, with which there are so many characters.

        Returns how many chunks further on the next one to note is.
        """
        now = self.clock()
        asked, last = self.call.asked_at, self.last
        since = asked if asked > last else last  # noqa: FURB136  # max() costs three times as much
        self.points.append((now, now - since, characters))
        self.last = now
        if len(self.points) == LIMIT:
            del self.points[1::2]  # with it goes the one just added: the next is as far from it as it was from its last
            self.stride *= 2
            return self.stride // 2
        return self.stride

    def encoded(self) -> str:
        """The value of `semconv.STREAM_ARRIVALS`."""
        import msgspec

        start = self.call.started_at
        return msgspec.json.encode(
            [(int((at - start) * 1e6), int(wait * 1e6), characters) for at, wait, characters in self.points]
        ).decode()
