"""The counts of a run."""

from __future__ import annotations

from typing import Protocol

from fluxibly.batch._journal import Journal
from fluxibly.batch._lines import Line

LONGEST = 300
"""The most characters of an error that are kept to be shown."""


class Counted(Protocol):
    """The counts: a `Report`."""

    answered: int
    failed: int
    unaskable: int
    asked: int
    in_flight: int
    input_tokens: int
    output_tokens: int
    cost: float | None
    errors: dict[str, int]
    first_errors: dict[str, str]
    stopped: str | None
    is_stuck: bool


def count_line(report: Counted, line: Line) -> None:
    """Count a row that has ended: its tokens, its cost and its error."""
    if line.error is not None:
        kind = line.error["type"]
        report.errors[kind] = report.errors.get(kind, 0) + 1
        if kind not in report.first_errors:
            report.first_errors[kind] = _on_one_line(line.error["message"])
    if line.usage is not None:
        report.input_tokens += line.usage.get("input_tokens", 0)
        report.output_tokens += line.usage.get("output_tokens", 0)
    # A copy of another answer, or a refusal, costs nothing whether or not the price is known, so it does not make the sum known.
    if line.cost is not None and (line.cost or line.usage is not None):
        report.cost = (report.cost or 0.0) + line.cost


def count_rows(report: Counted, journal: Journal) -> None:
    """Count the rows that have a line, of all runs."""
    report.answered, report.failed = journal.answered, len(journal.failed)
    report.unaskable = len(journal.unaskable)


def _on_one_line(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
