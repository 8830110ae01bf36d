"""A reader of OTLP JSON files (one ExportTraceServiceRequest per line): their spans as trees."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs

from fluxibly._checks import is_list, is_mapping
from fluxibly.telemetry import semconv

ERROR = 2
"""OTLP's `STATUS_CODE_ERROR`."""
TOO_LATE = 2**64
"""The first time, in nanoseconds since 1970, that OTLP cannot represent."""
LIMIT = 500_000_000
"""The size of the largest file that is read, in bytes: its spans take several times as much memory."""
LARGEST = 10**18
"""Numbers beyond it are no counts, no times and no money, so the views do without them."""
SCOPE = "fluxibly"
"""The instrumentation scope of this library's spans."""
NUMBERS = (
    semconv.ATTEMPT_INDEX,
    semconv.ATTEMPT_INPUT,
    semconv.ATTEMPT_OUTPUT,
    semconv.ATTEMPTS,
    semconv.BATCH_ASKED,
    semconv.BATCH_ANSWERED,
    semconv.BATCH_FAILED,
    semconv.USAGE_INPUT,
    semconv.USAGE_OUTPUT,
    semconv.TOTAL_INPUT,
    semconv.TOTAL_OUTPUT,
    semconv.COST,
    semconv.RESPONSE_TIME_TO_FIRST_CHUNK,
    semconv.STREAM_CHUNKS,
    semconv.STREAM_CHARACTERS,
    semconv.STREAM_GAP_P50,
    semconv.STREAM_GAP_P95,
    semconv.STREAM_LONGEST_STALL,
)
"""Attributes that the views calculate with. A value that is not a number, in another program's file, is left out."""
CONTENT = (semconv.SYSTEM_INSTRUCTIONS, semconv.INPUT_MESSAGES, semconv.OUTPUT_MESSAGES, semconv.TOOL_DEFINITIONS)
"""Attributes that hold an array of objects, as JSON."""
_UNSAFE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")
"""Control characters, which could control the terminal; all except tabs and line feeds."""
_ESCAPES = re.compile(r"\\(?:[bfr]|u(?:d[89a-f]|00[01]|007f|00[89]))", re.IGNORECASE)
"""JSON's escapes for control characters, and for half a surrogate pair, which a page cannot hold."""


@attrs.define(eq=False)
class TracedSpan:
    """A span of the file, with its children in the order in which they began. Times are nanoseconds since 1970."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: dict[str, Any]
    failed: bool
    message: str
    scope: str = ""
    """The instrumentation that made the span."""
    decisions: list[str] = attrs.field(factory=list[str])
    """The decisions of middleware about the call, such as "Fallback asks …", in order."""
    links: list[tuple[str, str]] = attrs.field(factory=list[tuple[str, str]])
    """The trace and the id of each span that this one is linked to."""
    linked_to: TracedSpan | None = None
    """The batch, if this is a call of one and begins a trace of its own."""
    linked: list[TracedSpan] = attrs.field(factory=list["TracedSpan"])
    """The calls of a batch that begin traces of their own, in the order in which they began."""
    children: list[TracedSpan] = attrs.field(factory=list["TracedSpan"])

    @property
    def seconds(self) -> float:
        return max(self.end - self.start, 0) / 1e9

    @property
    def foreign(self) -> bool:
        """Whether another instrumentation made the span, which may put whole documents into names and messages."""
        return self.scope != SCOPE

    @property
    def outcome(self) -> str:
        """`fluxibly.outcome`, or the status of a span that another program wrote."""
        return str(self.attributes.get(semconv.OUTCOME) or ("failed" if self.failed else "completed"))

    def walk(self, depth: int = 0) -> Iterator[tuple[int, TracedSpan]]:
        """Yield the span and all its descendants, each with its depth."""
        waiting = [(depth, self)]
        while waiting:  # without recursion, because spans may be nested deeper than Python's limit
            depth, span = waiting.pop()
            yield depth, span
            waiting += [(depth + 1, child) for child in reversed(span.children)]

    @property
    def error(self) -> str:
        """The error of a failed span, or "" if it did not fail or a child has the same error."""
        if not self.failed or any(child.failed and child.message == self.message for child in self.children):
            return ""
        kind = str(self.attributes.get(semconv.ERROR_TYPE, ""))
        return (kind if self.message in ("", kind) else f"{kind}: {self.message}".removeprefix(": ")) or "failed"

    def value(self, key: str) -> Any:
        """Return an attribute's JSON, decoded, or None if it is absent or not JSON. For `CONTENT`, return only objects."""
        found = self.attributes.get(key)
        if isinstance(found, str):
            found = _decoded(found)
        return _objects(found) if key in CONTENT else found

    @cached_property
    def arrivals(self) -> list[tuple[float, float, int]]:
        """`semconv.STREAM_ARRIVALS`: seconds since the span began, seconds waited, and characters; in order of time."""
        found = self.value(semconv.STREAM_ARRIVALS)
        points: list[tuple[float, float, int]] = []
        for each in found if is_list(found) else ():
            point: list[Any] = each if is_list(each) else []
            if len(point) != 3 or not all(is_number(value) and value >= 0 for value in point):
                return []  # another program's file
            points.append((point[0] / 1e6, point[1] / 1e6, int(point[2])))
        return points if points == sorted(points, key=lambda point: point[0]) else []

    @property
    def first_chunk(self) -> float | None:
        """The seconds from the beginning of the call to the first chunk, or None if it is not known.

        It includes waits before the request was sent. The attribute, which does not, is the next best.
        """
        if self.arrivals:
            return self.arrivals[0][0]
        return self.attributes.get(semconv.RESPONSE_TIME_TO_FIRST_CHUNK)


def _decoded(text: str) -> Any:
    try:
        value = json.loads(text)
        return _safe_within(value) if _ESCAPES.search(text) else value
    except (ValueError, RecursionError):
        return None


def _safe_within(value: Any) -> Any:
    """Return a JSON value with every text in it `safe`."""
    if isinstance(value, str):
        return safe(value)
    if is_list(value):
        return [_safe_within(item) for item in value]
    if is_mapping(value):
        return {safe(key): _safe_within(item) for key, item in value.items()}
    return value


def _objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects in an array, each with only the objects in its own `parts`."""
    found = [dict(each) for each in value if is_mapping(each)] if is_list(value) else []
    for each in found:
        if "parts" in each:
            each["parts"] = _objects(each["parts"])
    return found


def duration(seconds: float) -> str:
    """Format a time in the unit that reads best."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


_HEAD = b'{"resourceSpans"'


@attrs.frozen
class TraceFile:
    """The spans of a file that have no parent in it, in the order in which they began."""

    name: str
    roots: list[TracedSpan]
    cut: int
    """The number of lines that are cut short, by a crash or a full disk, and left out."""


def read(path: str | Path) -> TraceFile:
    """Read a file of spans.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not OTLP JSON (a line that is cut short is left out), or the file has no spans, or more
            than `LIMIT` bytes.
    """
    with Path(path).open("rb") as file:
        content = file.read(LIMIT + 1)
    if len(content) > LIMIT:
        raise ValueError(
            f"{path}: expected at most {LIMIT // 10**6} MB of spans, got more; each line stands for itself, so look at "
            f"the last ones: tail -n 1000 {path} > part.jsonl"
        )
    lines = content.removeprefix(BOM_UTF8).split(b"\n")  # a text may hold other ends of lines
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    spans: dict[tuple[str, str], TracedSpan] = {}
    cut = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            for span in _spans(json.loads(line.decode())):
                spans[span.trace_id, span.span_id] = span
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            broken = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
            if broken and (line.startswith(_HEAD) or (number == last and spans)):
                cut += 1
                continue
            text = not isinstance(error, UnicodeDecodeError)
            why = f" ({type(error).__name__}: {error})" if text else ", nor text at all"
            where = f"{path}, line {number}" if text else f"{path}"
            raise ValueError(f"{where}: this is not OTLP JSON{why}") from error
    if not spans and cut:
        raise ValueError(f"{path} has no spans that are whole: the file is cut short; write it anew")
    if not spans:
        raise ValueError(f"{path} has no spans in it; write one with `fluxibly chat --trace FILE`")
    return TraceFile(safe(Path(path).name), _trees(spans), cut)


def _trees(spans: Mapping[tuple[str, str], TracedSpan]) -> list[TracedSpan]:
    roots: list[TracedSpan] = []
    ordered = sorted(spans.values(), key=lambda span: span.start)
    for span in ordered:
        parent = spans.get((span.trace_id, span.parent_id))
        (roots if parent is None else parent.children).append(span)
    reached = {id(span) for root in roots for _, span in root.walk()}
    for span in ordered:
        if id(span) not in reached:  # in a damaged file, a span can be its own ancestor
            spans[span.trace_id, span.parent_id].children.remove(span)
            roots.append(span)
            reached.update(id(below) for _, below in span.walk())
    _link(roots)
    return roots


def _link(roots: Iterable[TracedSpan]) -> None:
    """Join the calls that have a link to a batch to its span. The roots are in the order in which they began."""
    batches: dict[tuple[str, str], TracedSpan] = {}  # those before the root at hand, so there is no circle
    for root in roots:
        batch = next((batches[link] for link in root.links if link in batches), None)
        if batch is not None and not root.foreign:
            root.linked_to = batch
            batch.linked.append(root)
        for _, span in root.walk():
            if span.name == semconv.BATCH_SPAN and not span.foreign:
                batches[span.trace_id, span.span_id] = span


def _spans(request: Mapping[str, Any]) -> Iterator[TracedSpan]:
    for resource in request["resourceSpans"]:
        for scope in resource.get("scopeSpans", ()):
            made_by: Mapping[str, Any] = scope.get("scope") or {}
            for span in scope.get("spans", ()):
                status: Mapping[str, Any] = span.get("status") or {}
                start, end = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
                if not (0 <= start < TOO_LATE and 0 <= end < TOO_LATE):
                    raise ValueError("a time out of range")
                yield TracedSpan(
                    name=safe(span.get("name") or ""),
                    trace_id=safe(span["traceId"]),
                    span_id=safe(span["spanId"]),
                    parent_id=safe(span.get("parentSpanId") or ""),
                    start=start,
                    end=end,
                    attributes=_usable(_attributes(span.get("attributes", ()))),
                    failed=status.get("code") in (ERROR, "STATUS_CODE_ERROR"),
                    message=safe(status.get("message") or ""),
                    scope=safe(made_by.get("name") or ""),
                    decisions=[*_decisions(span.get("events") or ())],
                    links=[(safe(link["traceId"]), safe(link["spanId"])) for link in span.get("links") or ()],
                )


def _decisions(events: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for event in events:
        if event.get("name") == semconv.DECISION_EVENT:
            said = _attributes(event.get("attributes", ()))
            yield f"{said.get(semconv.DECISION_BY, '')} {said.get(semconv.DECISION, '')}".strip()


def safe(value: object) -> str:
    """Return text that any page and any terminal can show."""
    return str(value).encode(errors="replace").decode().replace("\r\n", "\n").translate(_UNSAFE)


def _usable(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if key not in NUMBERS or is_number(value)}


def is_number(value: object) -> bool:
    """Whether a value is a number that can be calculated with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _attributes(pairs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {safe(pair["key"]): _value(pair.get("value", {})) for pair in pairs}


def _value(value: Mapping[str, Any]) -> Any:
    for kind, found in value.items():
        if kind == "intValue":
            return int(found)
        if kind == "doubleValue":
            return float(found)
        if kind == "arrayValue":
            return [_value(item) for item in found.get("values", ())]
        if kind == "kvlistValue":
            return _attributes(found.get("values", ()))
        return safe(found) if isinstance(found, str) else found
    return None
