"""What a dialect is: a pure codec between requests and bytes. The shells in `http.py` do all the I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, TypeAlias

import attrs

from fluxibly.errors import ProviderError
from fluxibly.types import Chunk, Request, Response

Framing: TypeAlias = Literal["sse", "ndjson", "json-array"]


@attrs.frozen
class Encoded:
    """A request on the wire. `path` is joined to the base URL; `body` is JSON."""

    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


@attrs.frozen
class Event:
    """One event of a framed stream: its data as bytes, and for SSE its `event:` name ("" if there was none)."""

    data: bytes
    name: str = ""


class StreamDecoder(Protocol):
    """The state of one stream. Chunks carry only what is new; model and id, say, are set on the first alone."""

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        """The chunks of an event. Raises ProviderError for an event that is an error."""
        ...

    @property
    def done(self) -> bool:
        """Whether the dialect's end mark has come, so that nothing more need be read."""
        ...

    def end(self) -> Iterable[Chunk]:
        """The stream's bytes are over: last chunks, or StreamProtocolError if it was cut off."""
        ...


class Codec(Protocol):
    """A dialect. Instances are immutable and shared by all calls."""

    framing: Framing
    auth: Any  # how the API key is sent: a header's name and a prefix

    def encode(self, request: Request, /, *, stream: bool) -> Encoded: ...
    def decode(self, body: bytes, /) -> Response:
        """The response of a whole body. Raises ProviderError for an error in a 200, StreamProtocolError for rubbish."""
        ...

    def decoder(self) -> StreamDecoder: ...
    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        """The error of a non-2xx answer. `headers` have lower-case names."""
        ...
