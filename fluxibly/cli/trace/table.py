"""The table of calls on top of the page, which the page's script sorts and filters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

import attrs

from fluxibly.cli.trace.facts import OUTCOMES, UNKNOWN, Entry, error_of, label, money, one_line, shortened, tokens
from fluxibly.cli.trace.file import duration
from fluxibly.telemetry import semconv

COLUMNS = (
    ("time", "Time (UTC)"),
    ("name", "Name"),
    ("outcome", "Outcome"),
    ("tokens", "Tokens in → out"),
    ("cost", "Cost"),
    ("duration", "Duration"),
)
SNIPPET = 90
"""The most characters of a call's question or error in the table."""


@attrs.frozen
class Row:
    """A call in the table. `about` is what was asked, if it is known."""

    entry: Entry
    about: str

    @property
    def line(self) -> str:
        """The call's error, or what was asked: the beginning, on one line."""
        text = one_line((error_of(self.entry.span) or self.about)[: SNIPPET * 4])
        return f"{text[:SNIPPET]}…" if len(text) > SNIPPET else text


def table(rows: Sequence[Row]) -> str:
    """Return the controls and the table."""
    days = {_time(row.entry.span.start, "%Y-%m-%d") for row in rows}
    form = "%H:%M:%S.%f" if len(days) == 1 else "%Y-%m-%d %H:%M:%S.%f"
    heads = "".join(
        f'<th scope="col" data-key="{key}" aria-sort="{"ascending" if key == "time" else "none"}">'
        f'<button type="button">{text}</button></th>'
        for key, text in COLUMNS
    )
    body = "".join(_row(row, form) for row in rows)
    return (
        f'<form class="controls" id="controls" role="search" hidden>'
        '<label>Search <input type="search" name="search" placeholder="names, messages, errors" autocomplete="off">'
        f'</label><label>Outcome <select name="outcome">{_options(rows)}</select></label>'
        '<output aria-live="polite"></output></form>'
        '<div class="calls" role="region" aria-label="Calls" tabindex="0"><table id="calls">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _options(rows: Sequence[Row]) -> str:
    counts = Counter(row.entry.span.outcome for row in rows)
    known = sorted(counts, key=lambda outcome: (OUTCOMES.index(outcome) if outcome in OUTCOMES else 9, outcome))
    return f'<option value="">all ({len(rows)})</option>' + "".join(
        f'<option value="{escape(outcome)}">{escape(shortened(outcome, SNIPPET))} ({counts[outcome]})</option>'
        for outcome in known
    )


def _row(row: Row, form: str) -> str:
    entry, span = row.entry, row.entry.span
    tokens_in, tokens_out = tokens(span)
    known = [count for count in (tokens_in, tokens_out) if count is not None]
    cost = span.attributes.get(semconv.COST)
    note = f'<div class="about">{escape(row.line)}</div>' if row.line else ""
    provider = span.attributes.get(semconv.PROVIDER)
    at = f' <span class="soft">{escape(shortened(str(provider), SNIPPET))}</span>' if provider else ""
    inner = "" if entry.outer else '<span class="soft" title="within another call">↳ </span>'
    counted = f"{_number(tokens_in)} → {_number(tokens_out)}" if known else UNKNOWN
    return (
        f'<tr data-outcome="{escape(span.outcome)}">{_cell(entry.number, _time(span.start, form)[:-3])}'
        f'<th scope="row">{inner}<a href="#call-{entry.number}">{escape(label(span))}</a>{at}{note}</th>'
        f'<td><span class="outcome {tone(span.outcome)}">{escape(shortened(span.outcome, SNIPPET))}</span></td>'
        f"{_cell(sum(known) if known else None, counted)}"
        f"{_cell(cost, UNKNOWN if cost is None else money(cost))}"
        f"{_cell(span.seconds, duration(span.seconds))}</tr>"
    )


def _cell(value: float | None, text: str) -> str:
    """Return a cell; the script sorts by `value`, and puts what has none last."""
    sortable = "" if value is None else f' data-value="{value}"'
    return f'<td class="number"{sortable}>{text}</td>'


def _number(count: float | None) -> str:
    return UNKNOWN if count is None else f"{count:,}"


def tone(outcome: str) -> str:
    """Return the class that colours an outcome."""
    return outcome if outcome in OUTCOMES else "other"


def _time(nanoseconds: int, form: str) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).strftime(form)
