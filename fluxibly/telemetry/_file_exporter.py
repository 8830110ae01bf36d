"""An exporter of spans to a file as OTLP JSON, one ExportTraceServiceRequest per line.

Collectors and `fluxibly trace` read this format.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

_IDS = ("traceId", "spanId", "parentSpanId")


class OTLPFileSpanExporter(SpanExporter):
    """An exporter that appends spans to a file.

    Args:
        path: the file. It is created if it does not exist, but its folder must exist.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115  # closed by shutdown
        self._lock = threading.Lock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        line = json.dumps(_as_otlp_json(spans), separators=(",", ":"), ensure_ascii=False)
        with self._lock:
            if self._file.closed:
                return SpanExportResult.FAILURE
            self._file.write(line + "\n")
            self._file.flush()
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        with self._lock:
            self._file.close()


def _as_otlp_json(spans: Sequence[ReadableSpan]) -> dict[str, Any]:
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
