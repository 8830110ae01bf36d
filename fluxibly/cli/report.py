"""The output that follows an answer: its figures, its tree of spans, and the response as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast

import attrs
from opentelemetry.trace import StatusCode
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from fluxibly._dicts import part_to_dict
from fluxibly.cli.trace.file import duration
from fluxibly.parts import Audio
from fluxibly.telemetry import semconv

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from fluxibly.config import LLMConfig
    from fluxibly.parts import Media, Part
    from fluxibly.types import Response


UNKNOWN = "-"


def _seconds(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else duration(seconds)


def media_lines(response: Response) -> list[str]:
    """Return a line for each image, audio or file of an answer; see `described`."""
    return [described(part) for part in response.media]


def described(part: Media) -> str:
    """Return the line for an image, audio or file: its kind, its size or its URL, and what is said."""
    size = f"{len(part.data)} bytes" if part.data is not None else _address(part.url or "")
    said = part.transcript if isinstance(part, Audio) else None
    return f"[{part.media_type or type(part).__name__.lower()}, {size}]" + (f" {said}" if said else "")


def _address(url: str) -> str:
    """Return a URL as it can be shown: a data URL holds the whole content."""
    return f"a data URL of {len(url)} characters" if url.startswith("data:") else url


def figures(response: Response) -> Table:
    """Return the short table under an answer."""
    stats, usage = response.stats, response.usage
    tokens = usage.output_tokens if usage is not None else None
    cells: list[tuple[str, str]] = []
    if stats is not None:
        cells += [("chunks", str(stats.chunks)), ("characters", str(stats.characters))]
        cells += [("first chunk", _seconds(stats.time_to_first_chunk))]
    else:
        cells += [("characters", str(len(response.text)))]
    cells += [("tokens", UNKNOWN if tokens is None else str(tokens))]
    if stats is not None and stats.tokens_per_second is not None:
        cells += [("rate", f"{stats.tokens_per_second:.1f} tokens/s")]
    elif stats is not None and stats.characters_per_second is not None:
        cells += [("rate", f"{stats.characters_per_second:.0f} characters/s")]
    cells += [("total", _seconds(response.elapsed))]
    if response.finish_reason not in (None, "stop"):
        cells += [("ended by", str(response.finish_reason))]
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
    for name, _ in cells:
        table.add_column(name, justify="left", no_wrap=True)
    table.add_row(*(value for _, value in cells))
    return table


def span_trees(spans: Sequence[ReadableSpan]) -> list[Tree]:
    """Return the spans as trees, with the duration and the outcome of each span."""
    known = {span.context.span_id for span in spans if span.context is not None}
    children: dict[int | None, list[ReadableSpan]] = {}
    for span in sorted(spans, key=lambda span: span.start_time or 0):
        parent = span.parent.span_id if span.parent is not None and span.parent.span_id in known else None
        children.setdefault(parent, []).append(span)

    def grow(span: ReadableSpan, above: Tree | None) -> Tree:
        line = _line(span)
        tree = Tree(line, guide_style="dim") if above is None else above.add(line)
        for decision in _decisions(span):
            tree.add(Text(decision, "yellow"))
        for child in children.get(span.context.span_id if span.context is not None else 0, []):
            grow(child, tree)
        return tree

    return [grow(span, None) for span in children.get(None, [])]


def _decisions(span: ReadableSpan) -> Iterator[str]:
    """Yield what middleware decided about a call."""
    for event in span.events:
        if event.name == semconv.DECISION_EVENT:
            said = event.attributes or {}
            yield f"{said.get(semconv.DECISION_BY)} {said.get(semconv.DECISION)}"


def _line(span: ReadableSpan) -> Text:
    attributes = span.attributes or {}
    line = Text(_name(span.name, attributes))
    if span.start_time is not None and span.end_time is not None:
        line.append(f"  {duration((span.end_time - span.start_time) / 1e9)}", "cyan")
    outcome = attributes.get(semconv.ERROR_TYPE) or attributes.get(semconv.OUTCOME)
    if outcome is not None:
        line.append(f"  {outcome}", "red" if span.status.status_code is StatusCode.ERROR else "dim")
    return line


def _name(name: str, attributes: Mapping[str, object]) -> str:
    """Return the displayed name of a span; an attempt is named by its number."""
    index = attributes.get(semconv.ATTEMPT_INDEX)
    return f"attempt {index + 1}" if isinstance(index, int) else name


def summary(response: Response, config: LLMConfig) -> str:
    """Return the line under an answer: who answered, its tokens, its time, and what is out of the ordinary."""
    model = response.model or config.model
    said = [PurePath(model).name if config.framework == "local" else model]
    usage = response.total_usage or response.usage
    if usage is not None and usage.output_tokens is not None:
        given = "" if usage.input_tokens is None else f"{usage.input_tokens} + "
        said.append(f"{given}{usage.output_tokens} tokens")
    if response.elapsed is not None:
        said.append(duration(response.elapsed))
    if response.cost is not None:
        said.append(f"${response.cost:f}")
    if response.cache_hit:
        said.append("from the cache")
    if response.finish_reason == "length":
        said.append("cut off at the limit of its tokens")
    elif response.finish_reason not in (None, "stop"):
        said.append(f"ended by {response.finish_reason}")
    return " · ".join(said)


def as_json(response: Response) -> str:
    """Return a response as one line of JSON, for scripts. Every key is always present; unknown values are null."""
    return json.dumps(_fields(response), ensure_ascii=False, default=str)


def _fields(response: Response) -> dict[str, Any]:
    return {
        "text": response.text,
        "reasoning": response.reasoning,
        "tool_calls": [
            {"id": call.id, "name": call.name, "arguments": dict(call.arguments)} for call in response.tool_calls
        ],
        "media": [part_to_dict(cast("Part", part)) for part in response.media],
        "opaque": [part_to_dict(part) for part in response.opaque],
        "parsed": response.parsed,
        "details": dict(response.details),
        "finish_reason": response.finish_reason,
        "raw_finish_reason": response.raw_finish_reason,
        "model": response.model,
        "provider": response.provider,
        "id": response.id,
        "request_id": response.request_id,
        "usage": None if response.usage is None else attrs.asdict(response.usage),
        "total_usage": None if response.total_usage is None else attrs.asdict(response.total_usage),
        "cost": response.cost,
        "cache_hit": response.cache_hit,
        "added": [message.to_dict() for message in response.added],
        "alternatives": [_fields(other) for other in response.alternatives],
        "rate_limits": dict(response.rate_limits),
        "elapsed": response.elapsed,
        "stats": None if response.stats is None else attrs.asdict(response.stats),
        "raw": response.raw,
    }
