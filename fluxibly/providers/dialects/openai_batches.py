"""The batch API of OpenAI, which Groq and Together have too: a file of rows is uploaded, and becomes a batch."""

from __future__ import annotations

from typing import Any, Final, Literal

import attrs
import msgspec

from fluxibly.providers.dialects.batches import (
    APICall,
    Fate,
    Lost,
    Problem,
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
from fluxibly.providers.dialects.json_values import as_array, as_count, as_object, as_text, read_json

_ENDED: Final = ("completed", "failed", "expired", "cancelled")
_LABEL: Final = "fluxibly"
"""The key of our own name for a batch in its metadata."""
_FATES: Final[dict[str, Fate]] = {"batch_expired": "expired", "batch_cancelled": "cancelled"}
"""What has become of a request that has an error in place of an answer, by its code."""

_encode = msgspec.json.Encoder().encode


class _Answer(msgspec.Struct):
    status_code: Any = None
    request_id: Any = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Line(msgspec.Struct):
    custom_id: Any = None
    response: _Answer | None = None
    error: Any = None


_read_line: Final = msgspec.json.Decoder(_Line).decode


@attrs.frozen(kw_only=True)
class OpenAIBatches:
    """OpenAI's batch API, as a service has it.

    Args:
        endpoint: the path of the requests within a batch.
        files: the path to which files are uploaded.
        purpose: what the service calls the purpose of such a file.
        upload_fields: more fields of that form.
        metadata: whether a batch takes metadata.
    """

    endpoint: str = "/v1/chat/completions"
    files: str = "/files"
    purpose: str = "batch"
    upload_fields: tuple[tuple[str, str], ...] = ()
    metadata: bool = True
    max_rows: int = 50_000
    max_bytes: int = 190_000_000
    """The limit is 200 MB, which some mean as 10**6 and some as 2**20 bytes."""
    in_files: Literal[True] = True
    discount: float = 0.5
    separator: bytes = b"\n"

    def row(self, custom_id: str, body: bytes, /) -> bytes:
        """Return a line of the file."""
        return joined_row(custom_id, "body", body, method="POST", url=self.endpoint)

    def upload(self, label: str, /) -> Upload:
        """Return the form that uploads the rows as a file."""
        # A line of rows begins with "{", so that none can be mistaken for the boundary.
        boundary = f"fluxibly-{label}"
        fields = [("purpose", self.purpose), *((name, value.format(label=label)) for name, value in self.upload_fields)]
        head = "".join(
            f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields
        )
        head += (
            f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{label}.jsonl"\r\n'
            "content-type: application/jsonl\r\n\r\n"
        )
        return Upload(
            path=self.files,
            head=head.encode(),
            tail=f"\n\r\n--{boundary}--\r\n".encode(),
            content_type=f"multipart/form-data; boundary={boundary}",
        )

    def uploaded(self, body: bytes, /) -> Uploaded:
        """Read the answer to the upload."""
        fields = object_of(body)
        return Uploaded(id_of(fields, body), as_count(fields.get("created_at")))

    def submit(self, label: str, file: str, /) -> APICall:
        """Return the request that makes a batch of an uploaded file."""
        fields: dict[str, Any] = {"input_file_id": file, "endpoint": self.endpoint, "completion_window": "24h"}
        if self.metadata:
            fields["metadata"] = {_LABEL: label}
        return APICall(path="/batches", method="POST", body=_encode(fields))

    def status(self, batch_id: str, /) -> APICall:
        """Return the request for the state of a batch."""
        return APICall(path=f"/batches/{in_path(batch_id)}")

    def cancel(self, batch_id: str, /) -> APICall:
        """Return the request that ends a batch."""
        return APICall(path=f"/batches/{in_path(batch_id)}/cancel", method="POST", body=b"{}")

    def read(self, body: bytes, /) -> RemoteBatch:
        """Read a batch."""
        fields = object_of(body)
        return self._batch(
            as_object(fields.get("job")) or fields, body
        )  # Together's answer to a submission has a "job"

    def page(self, cursor: str, /, *, limit: int = 100) -> APICall:
        """Return the request for a page of the batches."""
        return APICall(path=f"/batches?limit={limit}" + (f"&after={in_path(cursor)}" if cursor else ""))

    def read_page(self, body: bytes, /) -> tuple[tuple[RemoteBatch, ...], str]:
        """Read a page of the batches."""
        raw: object = read_json(body)
        if isinstance(raw, list):  # Together's
            return tuple(self._batch(as_object(item), body) for item in as_array(raw)), ""
        fields = object_of(body)
        if "data" not in fields:
            raise unexpected(fields, body, "a list of batches")
        batches = tuple(self._batch(item, body) for item in objects_in(fields, "data"))
        return batches, pages_end(fields, batches)

    def is_lost(self, batch: RemoteBatch, lost: Lost, /) -> bool:
        """Whether a batch is of the file of the lost one, of which there is no other, or has its name."""
        return batch.label == lost.label or (lost.file is not None and batch.file == lost.file)

    def result(self, line: bytes, /) -> Result | None:
        """Read a line of the output file or of the error file."""
        try:
            found = _read_line(line)
        except (msgspec.DecodeError, RecursionError):  # such as invalid UTF-8
            found = _read_leniently(line)
        custom_id, answer = as_text(found.custom_id), found.response
        if not custom_id:
            return None
        if answer is None:
            error = as_object(found.error)
            unanswered = _FATES.get(as_text(error.get("code")), "failed")
            return Result(custom_id, unanswered, body=_encode({"error": found.error}))
        status = as_count(answer.status_code)
        fate: Fate = "answered" if status is None or 200 <= status < 300 else "failed"
        return Result(custom_id, fate, status, bytes(answer.body), as_text(answer.request_id) or None)

    def _batch(self, fields: dict[str, Any], body: bytes) -> RemoteBatch:
        status = as_text(fields.get("status")).lower()
        counts = as_object(fields.get("request_counts"))
        done = (as_count(counts.get("completed")) or 0) + (as_count(counts.get("failed")) or 0)
        errors = as_object(fields.get("errors"))
        problems = tuple(
            Problem(as_text(each.get("code")), as_text(each.get("message")), as_count(each.get("line")))
            for each in objects_in(errors, "data")
        )
        if status == "failed" and not problems:
            problems = (Problem("failed", as_text(fields.get("error")) or "the service does not say why", None),)
        outputs = (as_text(fields.get("output_file_id")), as_text(fields.get("error_file_id")))
        ends = (as_count(fields.get(f"{name}_at")) for name in _ENDED)
        return RemoteBatch(
            id=id_of(fields, body),
            status=status,
            ended=status in _ENDED,
            cancelled=status in ("cancelling", "cancelled"),
            created_at=as_count(fields.get("created_at")),
            ended_at=next((end for end in ends if end is not None), None),
            total=as_count(counts.get("total")) or None,
            processed=done,
            file=as_text(fields.get("input_file_id")) or None,
            label=as_text(as_object(fields.get("metadata")).get(_LABEL)) or None,
            results=tuple(f"/files/{in_path(name)}/content" for name in dict.fromkeys(outputs) if name),
            problems=problems if status == "failed" else (),
        )


def _read_leniently(line: bytes) -> _Line:
    fields = as_object(read_json(line))
    answer = as_object(fields.get("response"))
    response = None
    if answer:
        body = msgspec.Raw(_encode(answer.get("body")))
        response = _Answer(answer.get("status_code"), answer.get("request_id"), body)
    return _Line(fields.get("custom_id"), response, fields.get("error"))
