"""A trace file as one HTML page that needs nothing else: no network, no scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from fluxibly import semconv, trace_file
from fluxibly.trace_file import CONTENT, TracedSpan, call_facts, duration, label, stream_facts
from fluxibly.trace_messages import as_text, conversation, readable
from fluxibly.trace_plot import axis, lines, plot


def render(path: str | Path) -> str:
    """The page: each trace's waterfall, its messages where they were captured, and the arrivals of its streams.

    Raises:
        OSError, ValueError: see `trace_file.read`.
    """
    roots = trace_file.read(path)
    style = files("fluxibly").joinpath("trace_page.css").read_text(encoding="utf-8")
    name = escape(Path(path).name)
    body = "".join(_trace(root) for root in roots)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} · fluxibly trace</title><style>{style}</style>"
        f'<main><h1>{name}</h1><div class="soft">{_when(roots)}</div>{_totals(roots)}{body}</main></html>\n'
    )


def _when(roots: Iterable[TracedSpan]) -> str:
    return datetime.fromtimestamp(min(root.start for root in roots) / 1e9, UTC).strftime("%Y-%m-%d, from %H:%M:%S UTC")


def _calls(roots: Iterable[TracedSpan]) -> list[TracedSpan]:
    return [span for root in roots for _, span in root.walk() if semconv.OPERATION in span.attributes]


def _totals(roots: Iterable[TracedSpan]) -> str:
    calls = _calls(roots)
    tokens_in = sum(call.attributes.get(semconv.USAGE_INPUT, 0) for call in calls)
    tokens_out = sum(call.attributes.get(semconv.USAGE_OUTPUT, 0) for call in calls)
    retries = sum(max(call.attributes.get(semconv.ATTEMPTS, 1) - 1, 0) for call in calls)
    told = [
        (str(len(calls)), "call" if len(calls) == 1 else "calls"),
        *_outcomes(calls),
        (str(retries), "retry" if retries == 1 else "retries"),
        (f"{tokens_in:,}", "tokens in"),
        (f"{tokens_out:,}", "tokens out"),
        (duration(sum(call.seconds for call in calls)), "in calls"),
    ]
    return (
        '<ul class="totals">' + "".join(f"<li><b>{value}</b><span>{what}</span></li>" for value, what in told) + "</ul>"
    )


def _outcomes(calls: Iterable[TracedSpan]) -> list[tuple[str, str]]:
    """How many calls failed, and how many ended in other ways than well, if any did."""
    ended = Counter(call.outcome for call in calls)
    return [
        (str(ended[outcome]), outcome)
        for outcome in ("failed", "stalled", "cancelled", "abandoned")
        if outcome == "failed" or ended[outcome]
    ]


def _trace(root: TracedSpan) -> str:
    started = datetime.fromtimestamp(root.start / 1e9, UTC).strftime("%H:%M:%S.%f")[:-3]
    time = f'<time title="trace {escape(root.trace_id)}">{started}</time>'
    header = f'<header class="call"><h2>{escape(root.name)}</h2>{_badges(root)}{time}</header>'
    details = "".join(_details(span, root) for _, span in root.walk())
    return f"<article>{header}{_waterfall(root)}{details}{_attributes(root)}</article>"


def _details(span: TracedSpan, root: TracedSpan) -> str:
    """The plot, the messages and the tools of a span; its name too, if it is not the trace's first."""
    parts: list[str] = []
    if points := span.arrivals:
        thinned = len(points) < span.attributes.get(semconv.STREAM_CHUNKS, 0)
        drawn = plot(points, span.seconds, stalled=span.outcome == "stalled", thinned=thinned)
        parts.append(f"<h4>Chunks</h4><figure>{drawn}{_caption(span, len(points))}</figure>")
    if messages := conversation(span):
        parts.append(f'<h4>Messages</h4><div class="chat">{messages}</div>')
    parts.append(_tools(span))
    body = "".join(parts)
    if not body or span is root:
        return body
    return f'<section><header class="call"><h3>{escape(span.name)}</h3>{_badges(span)}</header>{body}</section>'


def _badges(span: TracedSpan) -> str:
    told = [span.attributes.get(semconv.PROVIDER), *call_facts(span), duration(span.seconds)]
    outcome = escape(span.outcome)
    return f'<span class="badge outcome {outcome}">{outcome}</span>' + "".join(
        f'<span class="badge">{escape(str(each))}</span>' for each in told if each
    )


def _waterfall(root: TracedSpan) -> str:
    whole = max(max(span.end for _, span in root.walk()) - root.start, 1)
    rows: list[str] = []
    for depth, span in root.walk():
        left = 100 * (span.start - root.start) / whole
        width = 100 * (span.end - span.start) / whole
        child = " child" if depth else ""
        rows.append(
            f'<div class="name" style="--depth:{min(depth, 8)}" title="{escape(span.name)}">{escape(label(span))}</div>'
            f'<div class="lane"><div class="bar {escape(span.outcome)}{child}" '
            f'style="left:{min(left, 99.6):.2f}%;width:{width:.2f}%" title="{escape(span.outcome)}"></div></div>'
            f'<div class="time">{duration(span.seconds)}</div>'
        )
        if why := span.error:
            rows.append(f'<div class="why">{escape(why)}</div>')
    seconds = whole / 1e9
    return (
        f'<div class="waterfall"><div class="lines">{lines(seconds)}</div>{"".join(rows)}'
        f'<div class="axis">{axis(seconds)}</div></div>'
    )


def _caption(span: TracedSpan, shown: int) -> str:
    given = span.attributes
    facts = stream_facts(span)
    for key, what in ((semconv.STREAM_GAP_P50, "median gap"), (semconv.STREAM_GAP_P95, "95 % of gaps within")):
        if key in given:
            facts.append(f"{what} {duration(given[key])}")
    if shown < given.get(semconv.STREAM_CHUNKS, shown):
        facts.append(f"{shown} of the chunks are drawn")
    return f"<figcaption>{' · '.join(facts)}</figcaption>"


def _tools(span: TracedSpan) -> str:
    tools: list[dict[str, Any]] = span.value(semconv.TOOL_DEFINITIONS) or []
    if not tools:
        return ""
    listed = "".join(f"<pre>{escape(readable(tool))}</pre>" for tool in tools)
    names = ", ".join(str(tool.get("name", "?")) for tool in tools)
    return f"<details><summary>Tools offered: {escape(names)}</summary>{listed}</details>"


def _attributes(root: TracedSpan) -> str:
    tables: list[str] = []
    for _, span in root.walk():
        rows = "".join(
            f"<tr><th>{escape(key)}</th><td>{escape(_short(value))}</td></tr>"
            for key, value in span.attributes.items()
            if key not in (*CONTENT, semconv.STREAM_ARRIVALS)
        )
        if rows:
            tables.append(f"<table><caption>{escape(label(span))}</caption>{rows}</table>")
    return f"<details><summary>Attributes</summary>{''.join(tables)}</details>" if tables else ""


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else as_text(value)
