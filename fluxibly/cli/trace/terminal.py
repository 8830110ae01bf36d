"""A trace file as a waterfall in the terminal. Needs rich."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import attrs
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from fluxibly.cli.trace.conversation import HOW_TO_CAPTURE, Conversation, History, Part, image_line
from fluxibly.cli.trace.facts import OUTCOMES, call_facts, entries, error_of, label, stream_facts
from fluxibly.cli.trace.file import TracedSpan, TraceFile, duration, read
from fluxibly.cli.trace.waits import waits_of

COLOURS = {"completed": "green", "failed": "red", "stalled": "magenta", "cancelled": "yellow", "abandoned": "cyan"}
OUTCOME = max(map(len, OUTCOMES))
TIME = 8
"""The width of the longest usual time, `863.3 ms`."""
ROLE = 10
"""The width of a message's role, `assistant `."""
DEEPEST = 8
"""The depth from which on spans are drawn at the same depth."""


class Glyphs(NamedTuple):
    """The characters that the waterfall is drawn with."""

    branch: str
    last: str
    line: str
    bar: str
    first: str
    stall: str
    idle: str
    rule: str


DRAWN = Glyphs("├ ", "└ ", "│ ", "━", "─", "╌", "·", "─")
PLAIN = Glyphs("|- ", "`- ", "|  ", "=", "-", "~", ".", "-")
"""For a terminal or a pipe whose encoding lacks the others."""


def render(path: str | Path, *, messages: bool = False) -> Waterfall:
    """Return all traces of the file: a line with a bar for each span, with its error and its facts underneath.

    Args:
        messages: whether to show the captured messages, too.

    Raises:
        OSError, ValueError: see `read`.
    """
    return Waterfall(read(path), messages)


@attrs.frozen
class Waterfall:
    """The traces of a file, for rich to print."""

    file: TraceFile
    messages: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = PLAIN if options.ascii_only else DRAWN
        widest = max(cell_len(label(span)) + cell_len(guide) for guide, _, span in self._spans(glyphs))
        drawing = _Drawing(console, options.max_width, widest, glyphs, History() if self.messages else None)
        for root in self._roots():
            yield drawing.rule(f"trace {root.trace_id}")
            whole = max(max(span.end for _, span in root.walk()) - root.start, 1)
            for guide, below, span in _tree(root, glyphs):
                yield drawing.row(span, guide, root.start, whole)
                yield from drawing.details(span, below)
        yield from self._legend(drawing)

    def _roots(self) -> Iterator[TracedSpan]:
        """Yield the first span of each trace, without the calls of batches, which are drawn below the span of the batch."""
        return (root for root in self.file.roots if root.linked_to is None)

    def _spans(self, glyphs: Glyphs) -> Iterator[tuple[str, str, TracedSpan]]:
        for root in self._roots():
            yield from _tree(root, glyphs)

    def _legend(self, drawing: _Drawing) -> Iterator[Text]:
        glyphs = drawing.glyphs
        meanings = {glyphs.first: "until the first chunk", glyphs.stall: "stall"}
        if known := [f"{glyph * 3} {meanings[glyph]}" for glyph in meanings if glyph in drawing.marked]:
            yield Text("   ".join(known), style="dim")
        if self.messages and any(entry.span.span_id not in drawing.spoken for entry in entries(self.file.roots)):
            yield Text("Messages that are not shown were not captured. To capture them:", style="dim")
            for where, what in HOW_TO_CAPTURE:
                yield from drawing.lines(f"{where}: {what}", "  ", "dim")


def _tree(root: TracedSpan, glyphs: Glyphs) -> Iterator[tuple[str, str, TracedSpan]]:
    """Yield each span with the guide on its own line and that on the lines below it."""
    waiting = [("", "", 0, root)]
    while waiting:
        guide, below, depth, span = waiting.pop()
        children = [*span.children, *span.linked]
        yield guide, below + (glyphs.line if children else " " * len(glyphs.line)), span
        inner = below if depth < DEEPEST else below[: -len(glyphs.line)]
        for child in reversed(children):
            last = child is children[-1]
            waiting.append(
                (
                    inner + (glyphs.last if last else glyphs.branch),
                    inner + (" " * len(glyphs.line) if last else glyphs.line),
                    depth + 1,
                    child,
                )
            )


class _Drawing:
    """Lines of a fixed width. The columns have the same widths in all traces, however wide the terminal is."""

    def __init__(self, console: Console, width: int, widest: int, glyphs: Glyphs, history: History | None) -> None:
        self.console, self.width, self.glyphs, self.history = console, width, glyphs, history
        self.names = min(widest, max(width * 2 // 5, 12))
        self.outcome = OUTCOME if width >= 60 else 0
        self.marked: set[str] = set()
        """The glyphs of waits that were drawn."""
        self.spoken: set[str] = set()
        """The ids of the spans whose messages were shown."""

    def rule(self, title: str) -> Text:
        text = Text(title, style="dim", no_wrap=True, overflow="ellipsis")
        text.append(f" {self.glyphs.rule * max(self.width - cell_len(title) - 1, 0)}")
        text.truncate(self.width)
        return text

    def row(self, span: TracedSpan, guide: str, start: int, whole: int) -> Text:
        """Return the line of a span in a trace that began at `start` and took `whole` nanoseconds."""
        colour = COLOURS.get(span.outcome, "white")
        name = Text(guide, style="dim").append(label(span), style="not dim" if guide else "bold not dim")
        name.truncate(self.names, overflow="ellipsis", pad=True)
        line = Text.assemble(name, " ")
        if self.outcome:
            outcome = Text(span.outcome, style=colour)
            outcome.truncate(self.outcome, overflow="ellipsis", pad=True)
            line.append(outcome).append(" ")
        time = duration(span.seconds).rjust(TIME)
        width = max(self.width - cell_len(line.plain) - cell_len(time) - 1, 4)
        line.append(self._bar(span, start, whole, width, colour)).append(f" {time}")
        line.truncate(self.width)
        return line

    def _bar(self, span: TracedSpan, start: int, whole: int, width: int, colour: str) -> Text:
        """Draw the time of a span, with the wait for its first chunk and its stalls."""
        first = min(int(width * (span.start - start) / whole), width - 1)
        last = min(max(round(width * (span.end - start) / whole), first + 1), width)
        cells = [self.glyphs.bar] * (last - first)
        scale = width * 1e9 / whole
        for wait in waits_of(span):
            if wait.kind in ("first", "stall"):
                begin = round(wait.start * scale)
                end = min(max(round(wait.end * scale), begin + (wait.kind == "stall")), len(cells))
                glyph = self.glyphs.first if wait.kind == "first" else self.glyphs.stall
                cells[begin:end] = [glyph] * (end - begin)
        if self.glyphs.first in cells and self.glyphs.bar not in cells and span.outcome != "stalled":
            cells[-1] = self.glyphs.bar  # the chunks came in the last moment
        self.marked.update(cells)
        bar = Text(self.glyphs.idle * first, style="dim")
        for glyph, run in groupby(cells):
            bar.append("".join(run), "red" if glyph == self.glyphs.stall else colour)
        return bar.append(self.glyphs.idle * (width - last), style="dim")

    def details(self, span: TracedSpan, guide: str) -> Iterator[Text]:
        """Yield what stands below the line of a span: its error, decisions about it, its facts and its messages."""
        if why := error_of(span):
            yield from self.lines(why, guide, COLOURS.get(span.outcome, "white"))
        for decision in span.decisions:
            yield from self.lines(decision, guide, "yellow")
        facts = self._joined([*call_facts(span), *stream_facts(span)], self.width - cell_len(guide))
        if facts:
            yield from self.lines(facts, guide, "dim")
        said = None if self.history is None else self.history.of(span)
        if said is not None:
            self.spoken.add(span.span_id)
            yield from self._conversation(said, guide)

    def _joined(self, facts: Sequence[str], width: int) -> str:
        """Return short texts with dots between them. Lines break between texts where possible."""
        lines: list[str] = []
        for fact in facts:
            longer = f"{lines[-1]} · {fact}" if lines else fact
            if lines and cell_len(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(fact)
        return "\n".join(lines)

    def _conversation(self, conversation: Conversation, guide: str) -> Iterator[Text]:
        if number := len(conversation.earlier):
            yield from self.lines(f"{number} earlier message{'s' if number > 1 else ''}, shown above", guide, "dim")
        for message in conversation.messages:
            first = True
            for part in message.parts or (Part("other", "(no text)"),):
                style = "dim italic" if part.kind == "reasoning" else ""
                for line in self.lines(_in_words(part), " " * ROLE, style, cell_len(guide)):
                    role = message.role[: ROLE - 1].ljust(ROLE) if first else " " * ROLE
                    yield Text.assemble((guide, "dim"), (role, "cyan"), line[ROLE:])
                    first = False
            note = message.title.removeprefix(message.role).removeprefix(" · ")
            if note:
                yield from self.lines(f"({note})", guide + " " * ROLE, "dim")

    def lines(self, text: str, guide: str, style: str, margin: int = 0) -> Iterator[Text]:
        """Yield a text as lines that begin with `guide`, `margin` narrower than the width."""
        room = max(self.width - cell_len(guide) - margin, 8)
        for line in Text(text, style=style).wrap(self.console, room, tab_size=4) or [Text()]:
            line.rstrip()
            yield Text.assemble((guide, "dim"), line)


def _in_words(part: Part) -> str:
    if part.kind == "call":
        return f"{part.name}({part.text})"
    return image_line(part) if part.kind == "image" else part.text
