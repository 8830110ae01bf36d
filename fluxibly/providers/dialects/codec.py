"""The protocol of dialects: pure codecs between requests and bytes. The client in `http/` does all the I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

import attrs
import msgspec

from fluxibly.errors import ProviderError
from fluxibly.providers.dialects.model_lists import ModelList
from fluxibly.types import Chunk, Prefill, Request, Response

if TYPE_CHECKING:
    from fluxibly.providers.dialects.batches import BatchAPI

Framing: TypeAlias = Literal["sse", "ndjson", "aws"]


@attrs.frozen
class Encoded:
    """An encoded request. `path` is joined to the base URL; `body` is JSON."""

    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class Event(msgspec.Struct, frozen=True, gc=False):
    """An event of a framed stream: its data as bytes, and its name ("" if there was no name).

    The name is the `event:` field of server-sent events, and the `:event-type` of AWS's event streams.

    A stream creates an event for every few characters. A msgspec struct costs a seventh of a frozen attrs class.
    """

    data: bytes
    name: str = ""


class StreamDecoder(Protocol):
    """The decoder of a stream. Chunks carry only new data; for example, only the first chunk has a model and an id."""

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        """Return the chunks of an event. Raises ProviderError if the event is an error."""
        ...

    @property
    def done(self) -> bool:
        """Whether the dialect's end marker has arrived, so that reading can stop."""
        ...

    def end(self) -> Iterable[Chunk]:
        """Return the last chunks at the end of the bytes. Raises StreamProtocolError if the stream was cut off."""
        ...


@attrs.frozen(kw_only=True)
class Service:
    """The endpoint of a service: the settings that an HTTP provider needs besides the codec."""

    framework: str
    telemetry_name: str
    """`gen_ai.provider.name` of the OpenTelemetry semantic conventions."""
    base_url: str | None
    """None: the user must set `api_base`."""
    url_var: str | None = None
    """The environment variable that sets `api_base` too, for an error."""
    env_var: str | None = None
    """The environment variable with the API key."""
    key_required: bool = True
    key_by_call: bool = False
    """Whether a missing key is an error of the calls that have no `Authorization` header, and not of the provider."""
    auth_header: str = "authorization"
    other_auth_headers: tuple[str, ...] = ()
    """Other headers, in lower case, that take the place of the key if a configuration or a call has one of them."""
    auth_prefix: str = "Bearer "
    headers: tuple[tuple[str, str], ...] = ()
    """Sent with every request."""
    prefill: Prefill | None = None
    """How the service goes on with an assistant's message that ends a request."""
    lists: tuple[ModelList, ...] = ()
    """The lists of its models; none if the service has none."""
    batches: Callable[[], BatchAPI] | None = None
    """Makes its batch API, if it has one. Few programs need it, so it is not loaded before."""


class Codec(Protocol):
    """The codec of a dialect. All calls share an instance. `framing` applies to its streams."""

    @property
    def framing(self) -> Framing: ...
    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        """Encode a request. Raises BadRequest (not retryable) for a parameter that the dialect does not support."""
        ...

    def decode(self, body: bytes, /) -> Response:
        """Decode a whole body. Raises ProviderError for an error in a 200, StreamProtocolError for an invalid body."""
        ...

    def decoder(self) -> StreamDecoder: ...
    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        """Return the error of a non-2xx response. `headers` have lower-case names."""
        ...


@runtime_checkable
class Learner(Protocol):
    """A codec that learns from an error how a model wants its requests."""

    def learn(self, request: Request, sent: bytes, error: ProviderError, /) -> str | None:
        """Remember what `error` says about the request's parameters. `sent` is the body that was refused.

        Return what changes if the request is encoded again ("sends max_completion_tokens instead of max_tokens"); None
        if nothing changes. The provider then sends the request again, once.
        """
        ...
