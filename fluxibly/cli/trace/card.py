"""The card of a trace on the page: its waterfall, the chunks and the messages of its calls, and its attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from html import escape
from itertools import islice
from typing import Any

from fluxibly.cli.trace.conversation import SHOWN, Conversation, Part, Said, as_text, readable
from fluxibly.cli.trace.facts import LONG_NAME, call_facts, cut, error_of, is_call, label, shortened, stream_facts
from fluxibly.cli.trace.file import TracedSpan, duration
from fluxibly.cli.trace.plot import axis, lines, plot
from fluxibly.cli.trace.table import Row, tone
from fluxibly.cli.trace.waits import is_thinned, waits_of
from fluxibly.telemetry import semconv

ATTRIBUTES = 100
"""The most attributes of another instrumentation's span that are shown."""


def card(
    root: TracedSpan, rows: Mapping[int, Row], said: Mapping[int, Conversation], *, unfolded: bool, capture: bool
) -> str:
    """Return the card of a trace.

    Args:
        rows, said: the table's row and the messages of each span that has them, by the span's `id`.
        capture: whether to say of calls without messages that they were not captured.
    """
    started = datetime.fromtimestamp(root.start / 1e9, UTC).strftime("%H:%M:%S.%f")[:-3]
    time = f'<time title="trace {escape(root.trace_id)}">{started}</time>'
    row = rows.get(id(root))
    about = f'<span class="about">{escape(row.line)}</span>' if row is not None and row.line else ""
    header = f'<summary class="call"><h2>{escape(label(root))}</h2>{_badges(root)}{time}{about}</summary>'
    details = "".join(_details(span, root, rows, said.get(id(span)), capture) for _, span in root.walk())
    return (
        f'<article{_anchor(row)}><details class="card"{" open" if unfolded else ""}>{header}'
        f"{_waterfall(root)}{details}{_attributes(root)}</details></article>"
    )


def _anchor(row: Row | None) -> str:
    return "" if row is None else f' id="call-{row.entry.number}"'


def _details(
    span: TracedSpan, root: TracedSpan, rows: Mapping[int, Row], said: Conversation | None, capture: bool
) -> str:
    """Return the plot, the messages and the tools of a span, under its name unless it is the root."""
    parts: list[str] = []
    if points := span.arrivals:
        drawn = plot(points, span.seconds, stalled=span.outcome == "stalled", thinned=is_thinned(span))
        parts.append(f"<h3>Chunks</h3><figure>{drawn}{_caption(span, len(points))}</figure>")
    if said is not None:
        parts.append(f'<h3>Messages</h3><div class="chat">{_conversation(said)}</div>')
    elif capture and is_call(span):
        parts.append('<p class="soft">Messages were not captured; <a href="#capture">how to capture them</a>.</p>')
    parts.append(_tools(span))
    body = "".join(parts)
    if span is root or not (body or id(span) in rows):
        return body
    header = f'<header class="call"><h3>{escape(label(span))}</h3>{_badges(span)}</header>'
    return f"<section{_anchor(rows.get(id(span)))}>{header}{body}</section>"


def _badges(span: TracedSpan) -> str:
    facts = [span.attributes.get(semconv.PROVIDER), *call_facts(span), duration(span.seconds)]
    return (
        f'<span class="badge outcome {tone(span.outcome)}">{escape(shortened(span.outcome, LONG_NAME))}</span>'
        + "".join(f'<span class="badge">{escape(shortened(str(each), LONG_NAME))}</span>' for each in facts if each)
    )


def _waterfall(root: TracedSpan) -> str:
    whole = max(max(span.end for _, span in root.walk()) - root.start, 1)
    rows: list[str] = []
    kinds: set[str] = set()
    for depth, span in root.walk():
        left = 100 * (span.start - root.start) / whole
        width = 100 * (span.end - span.start) / whole
        waits = [wait for wait in waits_of(span) if wait.kind in ("first", "stall") and wait.start < span.seconds]
        kinds.update(wait.kind for wait in waits)
        title = ", ".join((shortened(span.outcome, LONG_NAME), *(wait.text for wait in waits)))
        marks = "".join(
            f'<i class="{wait.kind}" style="left:{100 * wait.start / span.seconds:.2f}%;'
            f'width:{100 * (min(wait.end, span.seconds) - wait.start) / span.seconds:.2f}%"></i>'
            for wait in waits
        )
        rows.append(
            f'<div class="name" style="--depth:{min(depth, 8)}">{escape(label(span))}</div>'
            f'<div class="lane"><div class="bar {tone(span.outcome)}{" child" if depth else ""}" role="img" '
            f'style="left:{min(max(left, 0), 99.6):.2f}%;width:{max(width, 0):.2f}%" title="{escape(title)}">{marks}'
            f'</div></div><div class="time">{duration(span.seconds)}</div>'
        )
        if why := error_of(span):
            rows.append(f'<div class="why">{escape(why)}</div>')
        rows += [f'<div class="decision">{escape(decision)}</div>' for decision in span.decisions]
    seconds = whole / 1e9
    meanings = {"first": "until the first chunk", "stall": "stall"}
    legend = "".join(f'<span><i class="{kind}"></i> {text}</span>' for kind, text in meanings.items() if kind in kinds)
    return (
        f'<div class="waterfall"><div class="lines">{lines(seconds)}</div>{"".join(rows)}'
        f'<div class="axis">{axis(seconds)}</div></div>' + (f'<div class="legend">{legend}</div>' if legend else "")
    )


def _caption(span: TracedSpan, shown: int) -> str:
    given = span.attributes
    facts = stream_facts(span)
    for key, what in ((semconv.STREAM_GAP_P50, "median gap"), (semconv.STREAM_GAP_P95, "95 % of gaps within")):
        if key in given:
            facts.append(f"{what} {duration(given[key])}")
    if is_thinned(span):
        facts.append(f"{shown} of the chunks are drawn")
    return f"<figcaption>{' · '.join(facts)}</figcaption>"


def _tools(span: TracedSpan) -> str:
    tools: list[dict[str, Any]] = span.value(semconv.TOOL_DEFINITIONS) or []
    if not tools:
        return ""
    listed = "".join(f"<pre>{escape(_value(tool, span))}</pre>" for tool in tools)
    names = shortened(", ".join(as_text(tool.get("name", "?")) for tool in tools))
    return f"<details><summary>Tools offered: {escape(names)}</summary>{listed}</details>"


def _attributes(root: TracedSpan) -> str:
    tables: list[str] = []
    for _, span in root.walk():
        named = {key: value for key, value in span.attributes.items() if key not in (*SHOWN, semconv.STREAM_ARRIVALS)}
        limit = ATTRIBUTES if span.foreign else len(named)
        rows = "".join(
            f"<tr><th>{escape(shortened(key))}</th><td>{escape(_value(value, span))}</td></tr>"
            for key, value in islice(named.items(), limit)
        )
        if more := len(named) - limit if len(named) > limit else 0:
            rows += f"<tr><th>…</th><td>{more:,} more attributes</td></tr>"
        if rows:
            tables.append(f'<table class="attributes"><caption>{escape(label(span))}</caption>{rows}</table>')
    return f"<details><summary>Attributes</summary>{''.join(tables)}</details>" if tables else ""


def _value(value: Any, span: TracedSpan) -> str:
    """Return an attribute or a tool as text; what another instrumentation wrote may be very long, and is cut."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = readable(value) if isinstance(value, dict) else as_text(value)
    return cut(text) if span.foreign else text


def _conversation(said: Conversation) -> str:
    return _earlier(said) + "".join(map(_message, said.messages))


def _earlier(said: Conversation) -> str:
    """Return the fold of the messages that earlier calls have said. The script copies them there when it is opened."""
    count = len(said.earlier)
    if not count:
        return ""
    spans = " ".join(f"{first}-{last}" for first, last in _runs(said.earlier))
    return (
        f'<details class="earlier" data-messages="{spans}"><summary>{count} earlier message{"s" if count > 1 else ""}'
        f'</summary><p class="soft">They are <a href="#m-{said.earlier[0]}">shown above</a>.</p></details>'
    )


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last number of each run of consecutive numbers."""
    first = last = None
    for number in numbers:
        if first is None or last is None:
            first = last = number
        elif number == last + 1:
            last = number
        else:
            yield first, last
            first = last = number
    if first is not None and last is not None:
        yield first, last


def _message(message: Said) -> str:
    shown = "".join(map(_part, message.parts)) or '<p class="none">no text</p>'
    role = message.role if message.role in ("user", "assistant", "system", "tool") else ""
    return f'<div class="message {role}" id="m-{message.number}"><div class="role">{escape(message.title)}</div>{shown}</div>'


def _part(part: Part) -> str:
    if part.kind in ("text", "reasoning"):
        return f'<p class="{part.kind}" dir="auto">{escape(part.text)}</p>'
    if part.kind == "call":
        return f"<pre><b>{escape(part.name)}</b>({escape(part.text)})</pre>"
    if part.kind == "image":
        return f'<img alt="image" src="{escape(part.text)}">'
    return f'<pre dir="auto">{escape(part.text)}</pre>'
