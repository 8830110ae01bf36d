"""A reader of OTLP JSON files (one ExportTraceServiceRequest per line): their spans as trees, and facts about them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from fluxibly._checks import is_list, is_mapping
from fluxibly.telemetry import semconv

ERROR = 2
"""OTLP's `STATUS_CODE_ERROR`."""
TOO_LATE = 2**64
"""The first time, in nanoseconds since 1970, that OTLP cannot represent."""
NUMBERS = (
    semconv.ATTEMPT_INDEX,
    semconv.ATTEMPT_INPUT,
    semconv.ATTEMPT_OUTPUT,
    semconv.ATTEMPTS,
    semconv.USAGE_INPUT,
    semconv.USAGE_OUTPUT,
    semconv.TOTAL_INPUT,
    semconv.TOTAL_OUTPUT,
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


@attrs.define
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
    decisions: list[str] = attrs.field(factory=list[str])
    """The decisions of middleware about the call, such as "Fallback asks …", in order."""
    children: list[TracedSpan] = attrs.field(factory=list["TracedSpan"])

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9

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

    @property
    def arrivals(self) -> list[tuple[float, float, int]]:
        """`semconv.STREAM_ARRIVALS`: seconds since the call began, seconds waited, and characters."""
        points: list[tuple[int, int, int]] = self.value(semconv.STREAM_ARRIVALS) or []
        try:
            return [(at / 1e6, wait / 1e6, int(characters)) for at, wait, characters in points]
        except (TypeError, ValueError, OverflowError):  # another program's file
            return []


def _decoded(text: str) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text:  # perhaps half a surrogate pair, which a page cannot hold
            value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return value


def _objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects in an array, each with only the objects in its own `parts`."""
    found = [dict(each) for each in value if is_mapping(each)] if is_list(value) else []
    for each in found:
        if "parts" in each:
            each["parts"] = _objects(each["parts"])
    return found


def label(span: TracedSpan) -> str:
    """Return the displayed name of a span; an attempt is named by its number and its requested model."""
    index = span.attributes.get(semconv.ATTEMPT_INDEX)
    if index is None:
        return span.name
    return f"attempt {int(index) + 1} {span.attributes.get(semconv.ATTEMPT_MODEL, '')}".rstrip()


def duration(seconds: float) -> str:
    """Format a time in the unit that reads best."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


_HEAD = '{"resourceSpans"'


def read(path: str | Path) -> list[TracedSpan]:
    """Read the spans that have no parent in the file, in the order in which they began.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not OTLP JSON (a line that is cut short, by a crash, is left out), or the file has no spans.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this is not OTLP JSON, nor text at all") from None
    spans: dict[tuple[str, str], TracedSpan] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            for span in _spans(json.loads(line)):
                spans[span.trace_id, span.span_id] = span
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError) and (line.startswith(_HEAD) or (number == len(lines) and spans)):
                continue
            raise ValueError(
                f"{path}, line {number}: this is not OTLP JSON ({type(error).__name__}: {error})"
            ) from error
    if not spans:
        raise ValueError(f"{path} has no spans in it; write one with `fluxibly chat --trace FILE`")
    return _trees(spans)


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
    return roots


def _spans(request: Mapping[str, Any]) -> Iterator[TracedSpan]:
    for resource in request["resourceSpans"]:
        for scope in resource.get("scopeSpans", ()):
            for span in scope.get("spans", ()):
                status: Mapping[str, Any] = span.get("status") or {}
                start, end = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
                if not (0 <= start < TOO_LATE and 0 <= end < TOO_LATE):
                    raise ValueError("a time out of range")
                yield TracedSpan(
                    name=_text(span.get("name") or ""),
                    trace_id=_text(span["traceId"]),
                    span_id=_text(span["spanId"]),
                    parent_id=_text(span.get("parentSpanId") or ""),
                    start=start,
                    end=end,
                    attributes=_usable(_attributes(span.get("attributes", ()))),
                    failed=status.get("code") in (ERROR, "STATUS_CODE_ERROR"),
                    message=_text(status.get("message") or ""),
                    decisions=[*_decisions(span.get("events") or ())],
                )


def _decisions(events: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for event in events:
        if event.get("name") == semconv.DECISION_EVENT:
            said = _attributes(event.get("attributes", ()))
            yield f"{said.get(semconv.DECISION_BY, '')} {said.get(semconv.DECISION, '')}".strip()


def _text(value: object) -> str:
    """Return text that any page and any terminal can show."""
    return str(value).encode(errors="replace").decode().translate(_UNSAFE)


def _usable(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if key not in NUMBERS or _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _attributes(pairs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {_text(pair["key"]): _value(pair.get("value", {})) for pair in pairs}


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
        return _text(found) if isinstance(found, str) else found
    return None


def call_facts(span: TracedSpan) -> list[str]:
    """Return the facts about a call or an attempt that every view shows: provider, cache hit, tokens, and so on."""
    given = span.attributes
    facts: list[str] = []
    if semconv.ATTEMPT_PROVIDER in given:
        facts.append(f"at {given[semconv.ATTEMPT_PROVIDER]}")
    if given.get(semconv.CACHE_HIT):
        facts.append("cache hit")
    if semconv.REQUESTED_MODEL in given:
        facts.append(f"asked for {given[semconv.REQUESTED_MODEL]}")
    if given.get(semconv.ATTEMPTS, 1) > 1:
        facts.append(f"{given[semconv.ATTEMPTS]} attempts")
    for keys, which in (
        ((semconv.USAGE_INPUT, semconv.USAGE_OUTPUT), ""),
        ((semconv.ATTEMPT_INPUT, semconv.ATTEMPT_OUTPUT), ""),
        ((semconv.TOTAL_INPUT, semconv.TOTAL_OUTPUT), " in all"),
    ):
        tokens_in, tokens_out = map(given.get, keys)
        if tokens_in is not None or tokens_out is not None:
            facts.append(f"{_count(tokens_in)} → {_count(tokens_out)} tokens{which}")
    return facts


def stream_facts(span: TracedSpan) -> list[str]:
    """Return the facts about a stream that every view shows: size, wait for the first chunk, longest wait after that."""
    given = span.attributes
    if semconv.STREAM_CHUNKS not in given:
        return []
    chunks, characters = given[semconv.STREAM_CHUNKS], given.get(semconv.STREAM_CHARACTERS)
    facts = [f"{_count(chunks)} chunk{'' if chunks == 1 else 's'}, {_count(characters)} characters"]
    first = given.get(semconv.RESPONSE_TIME_TO_FIRST_CHUNK)
    if first is not None:
        facts.append(f"time to first chunk {duration(first)}")
    longest = given.get(semconv.STREAM_LONGEST_STALL, 0)
    if longest > (first or 0) * 1.05:  # otherwise, it is the same wait
        facts.append(f"longest wait {duration(longest)}")
    return facts


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"
