"""Bytes of a stream into events: server-sent events, lines of JSON, a JSON array. Pure, and blind to where reads cut.

Each framing has `feed(data)`, which returns the events that `data` completes, and `close()`, which returns what the
end of the stream completes. What arrives before an error is returned first; the error is raised by the next call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from fluxibly.providers.codec import Event, Framing
from fluxibly.providers.framing_json_array import JSONArray
from fluxibly.providers.framing_lines import NDJSON
from fluxibly.providers.framing_sse import SSE

DEFAULT_LIMIT: Final = 16 * 1024 * 1024
"""Bytes that one line or event may have."""


class StreamFraming(Protocol):
    """The state of one stream's framing."""

    def feed(self, data: bytes, /) -> list[Event]:
        """The events that `data` completes.

        Raises:
            StreamProtocolError: a line or an event is over the limit, or the bytes are not of this framing.
        """
        ...

    def close(self) -> list[Event]:
        """The stream's bytes are over: the events that were only waiting for their end."""
        ...


def make_framing(framing: Framing, *, limit: int = DEFAULT_LIMIT) -> StreamFraming:
    """A framing for one stream. `limit` bounds a line and an event, in bytes."""
    return _FRAMINGS[framing](limit)


_FRAMINGS: Final[dict[Framing, Callable[[int], StreamFraming]]] = {
    "sse": SSE,
    "ndjson": NDJSON,
    "json-array": JSONArray,
}
