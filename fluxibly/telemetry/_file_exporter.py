"""An exporter of spans to a file as OTLP JSON, one ExportTraceServiceRequest per line.

Collectors and `fluxibly trace` read this format.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from fluxibly._logs import report_once

_IDS = ("traceId", "spanId", "parentSpanId")


class OTLPFileSpanExporter(SpanExporter):
    """An exporter that appends spans to a file.

    Each export opens the file anew and writes one line at once. So threads, processes and forks can share the file, and
    it may be moved or deleted. If a write fails, that is reported once on standard error.

    Args:
        path: the file. It is created if it does not exist, but its folder must exist.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path).absolute()  # the process may go to another folder
        with self._path.open("ab"):
            pass  # it can be written
        self._cut = _is_cut(self._path)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        line = json.dumps(as_otlp_json(spans), separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        if self._cut:
            line = b"\n" + line
        try:
            with self._path.open("ab", buffering=0) as file:
                written = file.write(line)
        except OSError as error:
            return self._failed(error.strerror or str(error))
        self._cut = written != len(line)
        return self._failed("the disk is full") if self._cut else SpanExportResult.SUCCESS

    def _failed(self, reason: str) -> SpanExportResult:
        report_once(f"file {self._path}", f"spans could not be written to {self._path}: {reason}; calls continue")
        return SpanExportResult.FAILURE


def _is_cut(path: Path) -> bool:
    """Whether the last line of a file has no end, because a process was killed when it wrote it."""
    if not path.is_file():  # to open a pipe would block
        return False
    try:
        with path.open("rb") as file:
            return file.seek(0, 2) > 0 and file.seek(-1, 2) >= 0 and file.read(1) != b"\n"
    except OSError:  # it may be written, but not read
        return False


def as_otlp_json(spans: Sequence[ReadableSpan]) -> dict[str, Any]:
    """Return the export request as OTLP JSON, which is protobuf's JSON with ids in hex and enumerations as numbers."""
    request: dict[str, Any] = MessageToDict(encode_spans(spans), use_integers_for_enums=True)
    for resource in request.get("resourceSpans", ()):
        for scope in resource.get("scopeSpans", ()):
            for span in scope.get("spans", ()):
                for holder in (span, *span.get("links", ())):
                    for key in _IDS:
                        if key in holder:
                            holder[key] = base64.b64decode(holder[key]).hex()
    return request
