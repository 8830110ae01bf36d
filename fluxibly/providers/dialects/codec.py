"""What a dialect is: a pure codec between requests and bytes. The shells in `http.py` do all the I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, Protocol, TypeAlias

import attrs
import msgspec

from fluxibly.errors import ProviderError
from fluxibly.types import Chunk, Request, Response

Framing: TypeAlias = Literal["sse", "ndjson"]


@attrs.frozen
class Encoded:
    """A request on the wire. `path` is joined to the base URL; `body` is JSON."""

    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class Event(msgspec.Struct, frozen=True, gc=False):
    """One event of a framed stream: its data as bytes, and for SSE its `event:` name ("" if there was none).

    One is made for every few characters of a stream: a msgspec struct costs a seventh of a frozen attrs class.
    """

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


@attrs.frozen(kw_only=True)
class Service:
    """Where a dialect is spoken: what the shells need to know of a service besides its codec."""

    framework: str
    telemetry_name: str
    """`gen_ai.provider.name` of the OpenTelemetry semantic conventions."""
    base_url: str | None
    """None: the user has to give `api_base`."""
    env_var: str | None = None
    """The environment variable with the API key."""
    key_required: bool = True
    auth_header: str = "authorization"
    auth_prefix: str = "Bearer "
    headers: tuple[tuple[str, str], ...] = ()
    """Sent with every request."""


class Codec(Protocol):
    """A dialect. Instances are immutable and shared by all calls; `framing` is that of its streams."""

    @property
    def framing(self) -> Framing: ...
    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        """The request on the wire. Raises BadRequest (not retryable) for a parameter that the dialect cannot take."""
        ...

    def decode(self, body: bytes, /) -> Response:
        """The response of a whole body. Raises ProviderError for an error in a 200, StreamProtocolError for rubbish."""
        ...

    def decoder(self) -> StreamDecoder: ...
    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        """The error of a non-2xx answer. `headers` have lower-case names."""
        ...
