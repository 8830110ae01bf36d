"""A trace file as a self-contained HTML page: its calls, their waterfalls, and their messages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from fluxibly.cli.trace.file import CONTENT, TracedSpan, call_facts, duration, label, read, stream_facts
from fluxibly.cli.trace.plot import axis, lines, plot
from fluxibly.telemetry import semconv


def render(path: str | Path) -> str:
    """Return the page: each trace's waterfall, its messages if they were captured, and the arrivals of its streams.

    Raises:
        OSError, ValueError: see `read`.
    """
    roots = read(path)
    style = files("fluxibly.cli.trace").joinpath("page.css").read_text(encoding="utf-8")
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
    operations = {None, semconv.EXECUTE_TOOL}  # the run of a tool is no call of a model
    return [
        span for root in roots for _, span in root.walk() if span.attributes.get(semconv.OPERATION) not in operations
    ]


def _tokens(roots: Iterable[TracedSpan], keys: Iterable[str]) -> int:
    """Return the sum of these attributes of all spans: each token is on one span, that of a call or of an attempt."""
    return sum(span.attributes.get(key, 0) for root in roots for _, span in root.walk() for key in keys)


def _totals(roots: Sequence[TracedSpan]) -> str:
    calls = _calls(roots)
    tokens_in = _tokens(roots, (semconv.USAGE_INPUT, semconv.ATTEMPT_INPUT))
    tokens_out = _tokens(roots, (semconv.USAGE_OUTPUT, semconv.ATTEMPT_OUTPUT))
    retries = sum(max(call.attributes.get(semconv.ATTEMPTS, 1) - 1, 0) for call in calls)
    facts = [
        (str(len(calls)), "call" if len(calls) == 1 else "calls"),
        *_outcomes(calls),
        (str(retries), "retry" if retries == 1 else "retries"),
        (f"{tokens_in:,}", "tokens in"),
        (f"{tokens_out:,}", "tokens out"),
        (duration(sum(call.seconds for call in calls)), "in calls"),
    ]
    return (
        '<ul class="totals">'
        + "".join(f"<li><b>{value}</b><span>{what}</span></li>" for value, what in facts)
        + "</ul>"
    )


def _outcomes(calls: Iterable[TracedSpan]) -> list[tuple[str, str]]:
    """Count the calls that failed, and the calls that were stalled, cancelled or abandoned, if there are any."""
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
    """Return the plot, the messages and the tools of a span, under its name unless it is the root."""
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
    facts = [span.attributes.get(semconv.PROVIDER), *call_facts(span), duration(span.seconds)]
    outcome = escape(span.outcome)
    return f'<span class="badge outcome {outcome}">{outcome}</span>' + "".join(
        f'<span class="badge">{escape(str(each))}</span>' for each in facts if each
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
        rows += [f'<div class="decision">{escape(decision)}</div>' for decision in span.decisions]
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


_SHORT = 72
"""The longest JSON that stays on one line, in characters."""


def conversation(span: TracedSpan) -> str:
    """Return the messages of a call if they were captured, else an empty str."""
    return "".join(_messages(span))


def as_text(value: Any) -> str:
    """Return a str as it is, and any other value as JSON on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _messages(span: TracedSpan) -> Iterator[str]:
    instructions: list[Any] = span.value(semconv.SYSTEM_INSTRUCTIONS) or []
    if instructions:
        yield _message({"role": "system", "parts": instructions}, {}, "")
    asked: list[dict[str, Any]] = span.value(semconv.INPUT_MESSAGES) or []
    answers: list[dict[str, Any]] = span.value(semconv.OUTPUT_MESSAGES) or []
    tools = {
        str(part.get("id")): str(part.get("name"))
        for message in asked
        for part in message.get("parts", ())
        if part.get("type") == "tool_call"
    }
    for message in asked:
        yield _message(message, tools, "")
    for number, message in enumerate(answers, 1):
        yield _message(message, tools, f"choice {number} of {len(answers)}" if len(answers) > 1 else "")


def _message(message: Mapping[str, Any], tools: Mapping[str, str], choice: str) -> str:
    role = str(message.get("role", ""))
    parts: list[dict[str, Any]] = message.get("parts") or []
    answered = [tools.get(str(part.get("id")), "") for part in parts if part.get("type") == "tool_call_response"]
    title = escape(" · ".join(filter(None, (role, *answered, choice, _ending(message)))))
    shown = "".join(map(_part, parts)) or '<p class="none">no text</p>'
    return f'<div class="message {escape(role)}"><div class="role">{title}</div>{shown}</div>'


def _ending(message: Mapping[str, Any]) -> str:
    """Return why the message ended, or "" for an ordinary end."""
    reason = str(message.get("finish_reason") or "stop")
    return {"stop": "", "error": "cut off", "length": "cut at the length limit"}.get(reason, reason.replace("_", " "))


def _part(part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    if kind in ("text", "reasoning"):
        return f'<p class="{kind}" dir="auto">{escape(str(part.get("content", "")))}</p>'
    if kind == "tool_call":
        name = escape(str(part.get("name")))
        return f"<pre><b>{name}</b>({escape(readable(part.get('arguments')))})</pre>"
    if kind == "tool_call_response":
        return f'<pre dir="auto">{escape(readable(part.get("response")))}</pre>'
    if kind == "blob" and str(part.get("mime_type", "")).startswith("image/"):
        source = f"data:{part['mime_type']};base64,{part.get('content', '')}"
        return f'<img alt="image" src="{escape(source)}">'
    return f"<pre>{escape(readable(part))}</pre>"


def readable(value: Any) -> str:
    """Return JSON, or a str that holds JSON, on one line if short and else indented. Return other text as it is."""
    text = as_text(value)
    if len(text) <= _SHORT:
        return text
    try:
        return _indented(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # plain text, or JSON that is nested too deeply to indent
        return text


def _indented(value: Any, margin: str = "") -> str:
    """Return JSON with a line for each member; short values stay on one line.

    Raises:
        RecursionError: the value is nested too deeply.
    """
    text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(margin) + len(text) <= _SHORT:
        return text
    inner = margin + "  "
    if isinstance(value, dict):
        named = cast("Mapping[str, Any]", value)
        members = [f"{json.dumps(key, ensure_ascii=False)}: {_indented(item, inner)}" for key, item in named.items()]
        opening, closing = "{}"
    else:
        members = [_indented(item, inner) for item in cast("Sequence[Any]", value)]
        opening, closing = "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(members) + f"\n{margin}{closing}"
