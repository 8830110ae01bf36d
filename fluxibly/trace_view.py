"""A trace file as a waterfall in the terminal. Needs rich (`pip install 'fluxibly[cli]'`)."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fluxibly import semconv, trace_file
from fluxibly.trace_file import TracedSpan, call_facts, duration, label

COLOURS = {"completed": "green", "failed": "red", "stalled": "magenta", "cancelled": "yellow", "abandoned": "cyan"}


def render(path: str | Path) -> RenderableType:
    """All traces of the file, each a table with a bar a span.

    Raises:
        OSError, ValueError: see `trace_file.read`.
    """
    return Group(*[_trace(root) for root in trace_file.read(path)])


def _trace(root: TracedSpan) -> RenderableType:
    table = Table(box=None, padding=(0, 1), expand=True, show_header=False)
    table.add_column("span", no_wrap=True, overflow="ellipsis", ratio=3)
    table.add_column("outcome", no_wrap=True)
    table.add_column("bar", ratio=4, min_width=12)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("detail", ratio=4, overflow="fold")
    end = max(span.end for _, span in root.walk())
    for depth, span in root.walk():
        colour = COLOURS.get(span.outcome, "white")
        name = Text("  " * depth + ("└ " if depth else "")).append(label(span), style="bold" if not depth else "")
        bar = Bar(span.start - root.start, span.end - root.start, max(end - root.start, 1), colour)
        table.add_row(name, Text(span.outcome, style=colour), bar, duration(span.seconds), detail(span))
    return Group(Rule(Text(f"trace {root.trace_id}", style="dim"), align="left", style="dim"), table)


class Bar:
    """A stretch of time within a whole, drawn as wide as the column."""

    def __init__(self, start: int, end: int, whole: int, colour: str) -> None:
        self.start, self.end, self.whole, self.colour = start, end, whole, colour

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        first = min(int(width * self.start / self.whole), width - 1)
        last = max(int(width * self.end / self.whole), first + 1)
        yield (
            Text("·" * first, style="dim", end="")
            .append("━" * (last - first), style=self.colour)
            .append("·" * (width - last), style="dim")
        )

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(12, options.max_width)


def detail(span: TracedSpan) -> str:
    """The facts of a span that say most, in a line."""
    given = span.attributes
    facts: list[str] = []
    if span.failed:
        facts.append(": ".join(filter(None, (str(given.get(semconv.ERROR_TYPE, "")), span.message))))
    facts += call_facts(span)
    if semconv.STREAM_CHUNKS in given:
        facts.append(f"{given[semconv.STREAM_CHUNKS]} chunks, {given[semconv.STREAM_CHARACTERS]} characters")
    if semconv.RESPONSE_TIME_TO_FIRST_CHUNK in given:
        facts.append(f"first after {duration(given[semconv.RESPONSE_TIME_TO_FIRST_CHUNK])}")
    if semconv.STREAM_LONGEST_STALL in given:
        facts.append(f"longest wait {duration(given[semconv.STREAM_LONGEST_STALL])}")
    return ", ".join(facts)
