"""A trace file as a waterfall in the terminal. Needs rich."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fluxibly.cli.trace.file import TracedSpan, call_facts, duration, label, read, stream_facts

COLOURS = {"completed": "green", "failed": "red", "stalled": "magenta", "cancelled": "yellow", "abandoned": "cyan"}
OUTCOMES = max(map(len, COLOURS))
TIMES = 8
"""The width of the longest usual time, `863.3 ms`."""


def render(path: str | Path) -> RenderableType:
    """Return all traces of the file: a line with a bar for each span, with its error and its facts underneath.

    Raises:
        OSError, ValueError: see `read`.
    """
    roots = read(path)
    names = max(cell_len(label(span)) + len(_branch(depth)) for root in roots for depth, span in root.walk())
    return Group(*[_trace(root, names) for root in roots])


def _trace(root: TracedSpan, names: int) -> RenderableType:
    end = max(span.end for _, span in root.walk())
    parts: list[RenderableType] = [Rule(Text(f"trace {root.trace_id}", style="dim"), align="left", style="dim")]
    for depth, span in root.walk():
        colour = COLOURS.get(span.outcome, "white")
        bar = Bar(span.start - root.start, span.end - root.start, max(end - root.start, 1), colour)
        parts.append(Row(span, depth, names, bar))
        margin = (0, 0, 0, len(_branch(depth)) + 2)
        if why := span.error:
            parts.append(Padding(Text(why, style=colour), margin))
        parts += [Padding(Text(decision, style="yellow"), margin) for decision in span.decisions]
        if facts := [*call_facts(span), *stream_facts(span)]:
            parts.append(Padding(Facts(facts), margin))
    return Group(*parts)


def _branch(depth: int) -> str:
    return "  " * (depth - 1) + "└ " if depth else ""


class Row:
    """The line of a span. Its columns have the same widths in all traces, however wide the terminal is."""

    def __init__(self, span: TracedSpan, depth: int, names: int, bar: Bar) -> None:
        self.span, self.depth, self.names, self.bar = span, depth, names, bar

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column("span", no_wrap=True, overflow="ellipsis", width=min(self.names, max(width * 2 // 5, 12)))
        table.add_column("outcome", no_wrap=True, width=OUTCOMES if width >= 60 else 0)
        table.add_column("bar", ratio=1, min_width=8)
        table.add_column("time", justify="right", no_wrap=True, width=TIMES)
        name = Text(_branch(self.depth), style="dim").append(
            label(self.span), style="not dim" if self.depth else "bold not dim"
        )
        outcome = Text(self.span.outcome, style=self.bar.colour)
        table.add_row(name, outcome, self.bar, duration(self.span.seconds))
        yield table


class Facts:
    """Short texts with dots between them. Lines break between texts where possible."""

    def __init__(self, facts: Sequence[str]) -> None:
        self.facts = facts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines: list[str] = []
        for fact in self.facts:
            longer = f"{lines[-1]} · {fact}" if lines else fact
            if lines and cell_len(longer) <= options.max_width:
                lines[-1] = longer
            else:
                lines.append(fact)
        yield Text("\n".join(lines), style="dim")


class Bar:
    """A stretch of time within a trace, drawn as wide as the column."""

    def __init__(self, start: int, end: int, whole: int, colour: str) -> None:
        self.start, self.end, self.whole, self.colour = start, end, whole, colour

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        first = min(int(width * self.start / self.whole), width - 1)
        last = max(round(width * self.end / self.whole), first + 1)
        yield (
            Text("·" * first, style="dim", end="")
            .append("━" * (last - first), style=self.colour)
            .append("·" * (width - last), style="dim")
        )

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(8, options.max_width)
