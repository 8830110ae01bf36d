"""A trace file as a self-contained HTML page: its calls in a table, then a card for each trace."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path

from fluxibly.cli.trace.card import card
from fluxibly.cli.trace.conversation import HOW_TO_CAPTURE, History
from fluxibly.cli.trace.facts import UNKNOWN, Entry, entries, is_call, money
from fluxibly.cli.trace.file import TracedSpan, TraceFile, duration, read
from fluxibly.cli.trace.table import Row, table
from fluxibly.telemetry import semconv

UNFOLDED = 20
"""The number of cards that are unfolded at first."""


def render(path: str | Path) -> str:
    """Return the page.

    Raises:
        OSError, ValueError: see `read`.
    """
    file = read(path)
    found = entries(file.roots)
    history = History()
    said = {
        id(span): messages
        for root in file.roots
        for _, span in root.walk()
        if (messages := history.of(span)) is not None
    }
    calls = [entry.span for entry in found if is_call(entry.span)]
    silent = sum(id(call) not in said for call in calls)
    questions = {key: conversation.question for key, conversation in said.items()}
    rows = {id(entry.span): Row(entry, questions.get(id(entry.span), "")) for entry in found}
    cards = "".join(
        card(root, rows, said, unfolded=place < UNFOLDED, capture=bool(silent)) for place, root in enumerate(file.roots)
    )
    name = escape(file.name)
    return (
        f"{_head(name)}<main><h1>{name}</h1>"
        f'<div class="soft">{_when(file)}</div>{_totals(found)}{table([*rows.values()])}{_capture(silent, len(calls))}{cards}'
        f"</main><script>{_resource('page.js')}</script></html>\n"
    )


def _resource(name: str) -> str:
    return files("fluxibly.cli.trace").joinpath(name).read_text(encoding="utf-8")


def _head(name: str) -> str:
    """Return the page's head. Whatever a file holds, the browser runs the page's own script alone, and loads nothing."""
    script = b64encode(sha256(_resource("page.js").encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; img-src data:"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} · fluxibly trace</title><style>{_resource('page.css')}</style>"
    )


def _when(file: TraceFile) -> str:
    start = min(root.start for root in file.roots)
    when = datetime.fromtimestamp(start / 1e9, UTC).strftime("%Y-%m-%d, from %H:%M:%S UTC")
    if not file.cut:
        return when
    lines = "1 line is" if file.cut == 1 else f"{file.cut} lines are"
    return f"{when}; {lines} cut short in the file, and left out"


def _totals(found: Sequence[Entry]) -> str:
    calls = [entry.span for entry in found if is_call(entry.span)]
    outer = [entry.span for entry in found if entry.outer and is_call(entry.span)]
    roots = {id(entry.root): entry.root for entry in found}.values()
    retries = sum(max(call.attributes.get(semconv.ATTEMPTS, 1) - 1, 0) for call in calls)
    costs = [call.attributes[semconv.COST] for call in outer if semconv.COST in call.attributes]
    known = f"cost of {len(costs)} of {len(outer)} calls" if 0 < len(costs) < len(outer) else "cost"
    facts = [
        (str(len(calls)), "call" if len(calls) == 1 else "calls"),
        *_outcomes(calls),
        (str(retries), "retry" if retries == 1 else "retries"),
        (_tokens(roots, (semconv.USAGE_INPUT, semconv.ATTEMPT_INPUT)), "tokens in"),
        (_tokens(roots, (semconv.USAGE_OUTPUT, semconv.ATTEMPT_OUTPUT)), "tokens out"),
        (money(sum(costs)) if costs else UNKNOWN, known),
        (duration(sum(call.seconds for call in outer)), "in calls"),
    ]
    return (
        '<ul class="totals">'
        + "".join(f"<li><b>{value}</b><span>{what}</span></li>" for value, what in facts)
        + "</ul>"
    )


def _tokens(roots: Iterable[TracedSpan], keys: Iterable[str]) -> str:
    """Return the sum of these attributes of all spans: each token is on one span, that of a call or of an attempt."""
    counts = [
        span.attributes[key] for root in roots for _, span in root.walk() for key in keys if key in span.attributes
    ]
    return f"{sum(counts):,}" if counts else UNKNOWN


def _outcomes(calls: Iterable[TracedSpan]) -> list[tuple[str, str]]:
    """Count the calls that failed, and the calls that were stalled, cancelled or abandoned, if there are any."""
    ended = Counter(call.outcome for call in calls)
    return [
        (str(ended[outcome]), outcome)
        for outcome in ("failed", "stalled", "cancelled", "abandoned")
        if outcome == "failed" or ended[outcome]
    ]


def _capture(silent: int, calls: int) -> str:
    """Return how to capture messages, if some calls have none."""
    if not calls:
        return '<p class="soft">No span of this file is the call of a model.</p>'
    if not silent:
        return ""
    whose = "The messages" if silent == calls else f"The messages of {silent} of {calls} calls"
    ways = " · ".join(f"{where} <code>{escape(what)}</code>" for where, what in HOW_TO_CAPTURE)
    return f'<p class="soft" id="capture">{whose} were not captured. To capture them: {ways}</p>'
