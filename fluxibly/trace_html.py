"""A trace file as one HTML page that needs nothing else: no network, no scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from fluxibly import semconv, trace_file
from fluxibly.trace_file import TracedSpan, call_facts, duration, label
from fluxibly.trace_plot import plot

_CONTENT = (semconv.SYSTEM_INSTRUCTIONS, semconv.INPUT_MESSAGES, semconv.OUTPUT_MESSAGES, semconv.TOOL_DEFINITIONS)


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
        (str(sum(call.failed for call in calls)), "failed"),
        (str(retries), "retry" if retries == 1 else "retries"),
        (f"{tokens_in:,}", "tokens in"),
        (f"{tokens_out:,}", "tokens out"),
        (duration(sum(call.seconds for call in calls)), "in calls"),
    ]
    return (
        '<ul class="totals">' + "".join(f"<li><b>{value}</b><span>{what}</span></li>" for value, what in told) + "</ul>"
    )


def _trace(root: TracedSpan) -> str:
    started = datetime.fromtimestamp(root.start / 1e9, UTC).strftime("%H:%M:%S.%f")[:-3]
    time = f'<time title="trace {escape(root.trace_id)}">{started}</time>'
    header = f'<header class="call"><h2>{escape(root.name)}</h2>{_badges(root)}{time}</header>'
    parts = ["<article>", header, _waterfall(root)]
    for _, span in root.walk():
        if points := span.arrivals:
            parts.append(f"<h3>Chunks</h3><figure>{plot(points, span.seconds)}{_caption(span, len(points))}</figure>")
        if messages := "".join(_messages(span)):
            parts.append(f'<h3>Messages</h3><div class="chat">{messages}</div>')
        parts.append(_tools(span))
    parts.append(_attributes(root))
    return "".join(parts) + "</article>"


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
            f'<div class="name" style="padding-left:{depth * 18}px" title="{escape(span.name)}">{escape(label(span))}</div>'
            f'<div class="lane"><div class="bar {escape(span.outcome)}{child}" '
            f'style="left:{min(left, 99.6):.2f}%;width:{width:.2f}%" title="{escape(span.outcome)}"></div></div>'
            f'<div class="time">{duration(span.seconds)}</div>'
        )
        if span.failed:
            kind = str(span.attributes.get(semconv.ERROR_TYPE, "error"))
            why = kind if span.message in ("", kind) else f"{kind}: {span.message}"
            rows.append(f'<div></div><div class="why">{escape(why)}</div>')
    marks = "".join(f"<span>{duration(whole * step / 4e9) if step else 0}</span>" for step in range(5))
    return f'<div class="waterfall">{"".join(rows)}<div></div><div class="axis">{marks}</div><div></div></div>'


def _caption(span: TracedSpan, shown: int) -> str:
    given = span.attributes
    chunks = given.get(semconv.STREAM_CHUNKS, shown)
    facts = [f"{chunks} chunks, {given.get(semconv.STREAM_CHARACTERS, '?')} characters"]
    for key, what in (
        (semconv.RESPONSE_TIME_TO_FIRST_CHUNK, "first after"),
        (semconv.STREAM_GAP_P50, "median gap"),
        (semconv.STREAM_GAP_P95, "95 % of gaps within"),
        (semconv.STREAM_LONGEST_STALL, "longest wait"),
    ):
        if key in given:
            facts.append(f"{what} {duration(given[key])}")
    if shown < chunks:
        facts.append(f"{shown} of the chunks are drawn")
    return f"<figcaption>{' · '.join(facts)}</figcaption>"


def _messages(span: TracedSpan) -> Iterator[str]:
    instructions: list[Any] = span.value(semconv.SYSTEM_INSTRUCTIONS) or []
    if instructions:
        yield _message({"role": "system", "parts": instructions})
    for key in (semconv.INPUT_MESSAGES, semconv.OUTPUT_MESSAGES):
        messages: list[dict[str, Any]] = span.value(key) or []
        for message in messages:
            yield _message(message)


def _message(message: Mapping[str, Any]) -> str:
    role = str(message.get("role", ""))
    reason = message.get("finish_reason")
    reason = "cut off" if reason == "error" else reason
    title = escape(role + (f" · {reason}" if reason and reason != "stop" else ""))
    parts = "".join(_part(part) for part in message.get("parts", ()))
    return f'<div class="message {escape(role)}"><div class="role">{title}</div>{parts}</div>'


def _part(part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    if kind in ("text", "reasoning"):
        return f'<p class="{kind}">{escape(str(part.get("content", "")))}</p>'
    if kind == "tool_call":
        return f"<pre>{escape(str(part.get('name')))}({escape(_json(part.get('arguments')))})</pre>"
    if kind == "tool_call_response":
        return f"<pre>{escape(_json(part.get('response')))}</pre>"
    if kind == "blob" and str(part.get("mime_type", "")).startswith("image/"):
        source = f"data:{part['mime_type']};base64,{part.get('content', '')}"
        return f'<img alt="image" src="{escape(source)}">'
    return f"<pre>{escape(_json(part))}</pre>"


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tools(span: TracedSpan) -> str:
    tools: list[dict[str, Any]] = span.value(semconv.TOOL_DEFINITIONS) or []
    if not tools:
        return ""
    listed = "".join(f"<pre>{escape(json.dumps(tool, ensure_ascii=False, indent=2))}</pre>" for tool in tools)
    names = ", ".join(str(tool.get("name", "?")) for tool in tools)
    return f"<details><summary>Tools offered: {escape(names)}</summary>{listed}</details>"


def _attributes(root: TracedSpan) -> str:
    rows: list[str] = []
    for _, span in root.walk():
        rows.append(f'<tr><td class="span" colspan="2">{escape(label(span))}</td></tr>')
        rows.extend(
            f"<tr><td>{escape(key)}</td><td>{escape(_json(value))}</td></tr>"
            for key, value in span.attributes.items()
            if key not in (*_CONTENT, semconv.STREAM_ARRIVALS)
        )
    return f"<details><summary>Attributes</summary><table>{''.join(rows)}</table></details>"
