"""Anthropic's batch API: the request that makes a batch has all of its rows."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal

import attrs
import msgspec

from fluxibly.providers.dialects.batches import (
    APICall,
    Lost,
    RemoteBatch,
    Result,
    Upload,
    Uploaded,
    id_of,
    in_path,
    joined_row,
    object_of,
    objects_in,
    pages_end,
    unexpected,
)
from fluxibly.providers.dialects.json_values import as_count, as_object, as_text, read_json

_PATH: Final = "/messages/batches"
_STATUSES: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
"""The HTTP statuses of errors, which results leave out."""

_encode = msgspec.json.Encoder().encode


class _Outcome(msgspec.Struct):
    type: Any = None
    message: msgspec.Raw = msgspec.Raw(b"null")
    error: msgspec.Raw = msgspec.Raw(b"null")


class _Line(msgspec.Struct):
    custom_id: Any = None
    result: _Outcome | None = None


_read_line: Final = msgspec.json.Decoder(_Line).decode


@attrs.frozen(kw_only=True)
class AnthropicBatches:
    """Anthropic's batch API. Its batches have no name, so a lost one is known by what is in it."""

    max_rows: int = 100_000
    max_bytes: int = 240_000_000
    """The limit is 256 MB."""
    in_files: Literal[False] = False
    discount: float = 0.5
    separator: bytes = b","

    def row(self, custom_id: str, body: bytes, /) -> bytes:
        """Return a request of the list."""
        return joined_row(custom_id, "params", body)

    def upload(self, label: str, /) -> Upload:
        """Return the request that makes a batch."""
        return Upload(path=_PATH, head=b'{"requests":[', tail=b"]}", content_type="application/json")

    def uploaded(self, body: bytes, /) -> Uploaded:
        """Raise NotImplementedError, since the upload makes the batch."""
        raise NotImplementedError

    def submit(self, label: str, file: str, /) -> APICall:
        """Raise NotImplementedError, since the upload makes the batch."""
        raise NotImplementedError

    def status(self, batch_id: str, /) -> APICall:
        """Return the request for the state of a batch."""
        return APICall(path=f"{_PATH}/{in_path(batch_id)}")

    def cancel(self, batch_id: str, /) -> APICall:
        """Return the request that ends a batch."""
        return APICall(path=f"{_PATH}/{in_path(batch_id)}/cancel", method="POST", body=b"{}")

    def read(self, body: bytes, /) -> RemoteBatch:
        """Read a batch."""
        return self._batch(object_of(body), body)

    def page(self, cursor: str, /, *, limit: int = 100) -> APICall:
        """Return the request for a page of the batches."""
        return APICall(path=f"{_PATH}?limit={limit}" + (f"&after_id={in_path(cursor)}" if cursor else ""))

    def read_page(self, body: bytes, /) -> tuple[tuple[RemoteBatch, ...], str]:
        """Read a page of the batches."""
        fields = object_of(body)
        if "data" not in fields:
            raise unexpected(fields, body, "a list of batches")
        batches = tuple(self._batch(item, body) for item in objects_in(fields, "data"))
        return batches, pages_end(fields, batches)

    def is_lost(self, batch: RemoteBatch, lost: Lost, /) -> bool | None:
        """Whether a batch may be the lost one: it is, if its results have its ids. Another count rules it out."""
        return None if batch.total == lost.total else False

    def result(self, line: bytes, /) -> Result | None:
        """Read a line of results."""
        try:
            found = _read_line(line)
        except (msgspec.DecodeError, RecursionError):  # such as invalid UTF-8
            fields = as_object(read_json(line))
            raw = as_object(fields.get("result"))
            parts = (msgspec.Raw(_encode(raw.get(name))) for name in ("message", "error"))
            found = _Line(fields.get("custom_id"), _Outcome(raw.get("type"), *parts))
        custom_id, outcome = as_text(found.custom_id), found.result
        if not custom_id or outcome is None:
            return None
        if outcome.type == "succeeded":
            return Result(custom_id, "answered", 200, bytes(outcome.message))
        if outcome.type in ("expired", "canceled"):
            return Result(custom_id, "expired" if outcome.type == "expired" else "cancelled")
        error = as_object(read_json(bytes(outcome.error)))
        inner = as_object(error.get("error")) or error
        body = bytes(outcome.error) if inner is not error else _encode({"type": "error", "error": error})
        return Result(custom_id, "failed", _STATUSES.get(as_text(inner.get("type"))), body)

    def _batch(self, fields: dict[str, Any], body: bytes) -> RemoteBatch:
        batch_id = id_of(fields, body)
        counts = as_object(fields.get("request_counts"))
        numbers = {name: as_count(count) or 0 for name, count in counts.items()}
        status = as_text(fields.get("processing_status"))
        ended = status == "ended"
        # The service deletes results after 29 days.
        readable = ended and bool(fields.get("results_url")) and not fields.get("archived_at")
        return RemoteBatch(
            id=batch_id,
            status=status,
            ended=ended,
            cancelled=bool(fields.get("cancel_initiated_at")),
            created_at=_moment(fields.get("created_at")),
            ended_at=_moment(fields.get("ended_at")),
            total=sum(numbers.values()) or None,
            processed=sum(numbers.values()) - numbers.get("processing", 0),
            results=(f"{_PATH}/{in_path(batch_id)}/results",) if readable else (),
        )


def _moment(value: object) -> float | None:
    """Return a time of RFC 3339 as seconds since the epoch; None if it is none."""
    try:
        return datetime.fromisoformat(as_text(value)).timestamp()
    except (ValueError, OverflowError):
        return None
