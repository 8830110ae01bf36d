"""Batches of requests that a service answers within a day, at a lower price: what the dialects of such APIs have in common.

A `BatchAPI` is pure, as a codec is: it makes requests and reads bodies. The requests within a batch, and the answers to them, are
the codec's. `http/batches.py` does the I/O, and `fluxibly.batch` decides when.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias
from urllib.parse import quote

import attrs
import msgspec

from fluxibly.errors import ProviderError, RequestTimeout, StreamProtocolError
from fluxibly.providers.dialects.errors import error_of_payload, excerpt
from fluxibly.providers.dialects.json_values import as_array, as_object, as_text, read_json

# A server can fill memory only up to these limits.
MAX_PAGES: Final = 100
"""Maximum number of pages of a list of batches."""
MAX_RESULT: Final = 64 * 1024 * 1024
"""Maximum size of a line of results, in bytes, which is that of a whole body too."""
MAX_ID: Final = 500
"""Maximum length of an id, in characters."""

BYTES_PER_TOKEN: Final = 3.5
"""The bytes of a token of input, as an estimate for limits on the tokens of a batch."""


@attrs.frozen(kw_only=True)
class APICall:
    """A request of a batch API. `path` is below the service's address; `body` is JSON."""

    path: str
    method: Literal["GET", "POST"] = "GET"
    body: bytes = b""


@attrs.frozen(kw_only=True)
class Upload:
    """A POST that carries the rows of a batch: `head`, the rows with the API's separator between them, and `tail`."""

    path: str
    head: bytes
    tail: bytes
    content_type: str


class Uploaded(NamedTuple):
    """A file of rows at the service."""

    id: str
    created_at: float | None
    """Seconds since the epoch, by the clock of the service."""


class Problem(NamedTuple):
    """Why a service did not begin a batch."""

    code: str
    message: str
    line: int | None
    """The line of the upload, from 1. None: it is about the whole."""


@attrs.frozen(kw_only=True)
class RemoteBatch:
    """A batch as its service describes it. Times are seconds since the epoch, by the clock of the service."""

    id: str
    status: str
    """In the word of the service, in lower case."""
    ended: bool
    """Whether nothing about it changes any more."""
    cancelled: bool = False
    """Whether somebody has ended it before its time."""
    created_at: float | None = None
    ended_at: float | None = None
    total: int | None = None
    """The number of its requests; None until the service has counted them."""
    processed: int = 0
    """The number of them that have ended."""
    file: str | None = None
    """The uploaded file with its rows."""
    label: str | None = None
    """Our own name for it."""
    results: tuple[str, ...] = ()
    """The paths of its results. A service makes no file that would be empty."""
    problems: tuple[Problem, ...] = ()
    """Why the service did not begin it; empty if it did."""


class Lost(NamedTuple):
    """A submission whose answer was lost, so that it is not known whether there is a batch."""

    label: str
    total: int
    file: str | None
    since: float | None
    """A moment before it, by the clock of the service; None if it is not known."""
    newest: str | None
    """The batch that was the newest before it, if there was any, and if this is known."""


Fate: TypeAlias = Literal["answered", "failed", "expired", "cancelled"]


class Result(NamedTuple):
    """What has become of a request in a batch."""

    custom_id: str
    fate: Fate
    status: int | None = None
    """The HTTP status of the answer, as it would be outside of a batch."""
    body: bytes = b""
    """The body of that answer, or of the error."""
    request_id: str | None = None


class BatchAPI(Protocol):
    """The dialect of a service's batch API."""

    @property
    def max_rows(self) -> int: ...
    @property
    def max_bytes(self) -> int:
        """The largest upload, in bytes."""
        ...

    @property
    def in_files(self) -> bool:
        """Whether rows are uploaded as a file first. If not, the upload itself makes the batch."""
        ...

    @property
    def discount(self) -> float:
        """The part of the price that is not paid."""
        ...

    @property
    def separator(self) -> bytes:
        """What stands between rows."""
        ...

    def row(self, custom_id: str, body: bytes, /) -> bytes:
        """Return a request of a batch with a body of the codec. `custom_id` has 1 to 64 letters, digits, `_` and `-`."""
        ...

    def upload(self, label: str, /) -> Upload:
        """Return the request that carries the rows."""
        ...

    def uploaded(self, body: bytes, /) -> Uploaded:
        """Read the answer to the upload of a file."""
        ...

    def submit(self, label: str, file: str, /) -> APICall:
        """Return the request that makes a batch of an uploaded file."""
        ...

    def status(self, batch_id: str, /) -> APICall: ...
    def cancel(self, batch_id: str, /) -> APICall: ...
    def read(self, body: bytes, /) -> RemoteBatch:
        """Read the answer to a submission, a question for the status, or a cancellation."""
        ...

    def page(self, cursor: str, /, *, limit: int = 100) -> APICall:
        """Return the request for a page of the batches, the newest first; "" is the first page."""
        ...

    def read_page(self, body: bytes, /) -> tuple[tuple[RemoteBatch, ...], str]:
        """Read a page: the batches, and the cursor of the next; "" at the end."""
        ...

    def is_lost(self, batch: RemoteBatch, lost: Lost, /) -> bool | None:
        """Whether a batch is the one whose answer was lost. None: only its results show it."""
        ...

    def result(self, line: bytes, /) -> Result | None:
        """Read a line of results; None for a line without an id.

        Raises:
            StreamProtocolError: it is no JSON object.
        """
        ...


class Pack:
    """The size of an upload in the making, held to the limits of an API and of its user."""

    def __init__(self, api: BatchAPI, *, max_rows: int | None = None, max_tokens: float | None = None) -> None:
        self._api = api
        self._max_rows = api.max_rows if max_rows is None else min(api.max_rows, max_rows)
        self._max_tokens = max_tokens
        self.rows = 0
        self.size = _FRAME
        """Bytes."""
        self.tokens = 0.0
        """The tokens of input, estimated."""

    @property
    def full(self) -> bool:
        """Whether no row at all fits any more."""
        return self.rows >= self._max_rows

    def fits(self, row: bytes) -> bool:
        """Whether one more row fits. Into an empty pack every row fits that the service may take, however many tokens it has."""
        if self.full or self.size + len(row) + len(self._api.separator) > self._api.max_bytes:
            return False
        tokens = self.tokens + len(row) / BYTES_PER_TOKEN
        return not self.rows or self._max_tokens is None or tokens <= self._max_tokens

    def add(self, row: bytes) -> None:
        """Count a row."""
        self.rows += 1
        self.size += len(row) + len(self._api.separator)
        self.tokens += len(row) / BYTES_PER_TOKEN


_FRAME: Final = 2_000
"""Bytes that are kept free for what stands around the rows."""


def unanswered(result: Result) -> ProviderError:
    """Return the error of a request that the service never came to."""
    if result.fate == "expired":
        return RequestTimeout("the batch expired before the service came to this request", code="batch_expired")
    return ProviderError("the batch was cancelled before the service came to this request", retryable=True)


def object_of(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body.

    Raises:
        ProviderError: the body reports an error.
        StreamProtocolError: it is no JSON object.
    """
    raw: object = read_json(body)
    fields = as_object(raw)
    if not fields:
        raise StreamProtocolError("expected a JSON object from the batch API, got other JSON", body=excerpt(body))
    return fields


def id_of(fields: dict[str, Any], body: bytes) -> str:
    """Return the id of a batch or a file.

    Raises:
        ProviderError: there is none; the body may report an error instead.
    """
    found = as_text(fields.get("id"))
    if not found:
        raise unexpected(fields, body, "an object with an id")
    if len(found) > MAX_ID:
        raise StreamProtocolError(f"expected an id of at most {MAX_ID} characters, got {len(found):,}")
    return found


def unexpected(fields: dict[str, Any], body: bytes, expected: str) -> ProviderError:
    """Return the error that a body reports in place of what was expected, or one that says so."""
    return error_of_payload(fields, body=body) or StreamProtocolError(
        f"expected {expected} from the batch API, got other JSON", body=excerpt(body)
    )


def in_path(value: str) -> str:
    """Return an id as a part of a path or of a query. It is the server's, and could be anything."""
    return quote(value, safe="")


def objects_in(fields: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the objects in a list."""
    return [as_object(item) for item in as_array(fields.get(name))]


def pages_end(fields: dict[str, Any], batches: Iterable[RemoteBatch]) -> str:
    """Return the cursor of the next page; "" if this is the last."""
    if fields.get("has_more") is not True:
        return ""
    return as_text(fields.get("last_id")) or next((batch.id for batch in reversed(list(batches))), "")


_encode = msgspec.json.Encoder().encode


def joined_row(custom_id: str, name: str, body: bytes, **fields: str) -> bytes:
    """Return a JSON object with a `custom_id`, `fields`, and a `body` that is JSON already, under a name."""
    return _encode({"custom_id": custom_id, **fields, name: msgspec.Raw(body)})
