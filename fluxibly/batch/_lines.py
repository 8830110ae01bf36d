"""The lines of a batch's output."""

from __future__ import annotations

from typing import Any

import msgspec

from fluxibly._dicts import part_to_dict
from fluxibly.calls import Usage
from fluxibly.errors import error_type
from fluxibly.types import CallRecord, Response


class Line(msgspec.Struct):
    """A line of the output: what came of a row. All lines have all fields."""

    row: int
    """The place of the row in the input, from 0."""
    custom_id: str | None
    key: str
    """A hash of what was asked, equal for equal requests."""
    text: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    """The tokens of all attempts."""
    cost: float | None = None
    """US dollars for all attempts; None: not known."""
    model: str | None = None
    attempts: int = 0
    elapsed: float = 0.0
    """Seconds from the first attempt to the end, waits for limits included."""
    error: dict[str, Any] | None = None
    """Why there is no answer: `type` (the class of the error), `message`, and what the service said."""


_encode = msgspec.json.Encoder().encode


def encoded(line: Line) -> bytes:
    """Return a line as it is written, with its end."""
    return _encode(line) + b"\n"


def line_of(
    row: int,
    custom_id: str | None,
    key: str,
    elapsed: float,
    *,
    response: Response | None = None,
    error: Exception | None = None,
    call: CallRecord | None = None,
) -> Line:
    """Return the line of a row that was answered, or that failed."""
    line = Line(row, custom_id, key, elapsed=round(elapsed, 3))
    if call is not None:
        line.attempts = call.attempts
        line.usage = _counts(Usage.sum([each.usage for each in call.spent]))
        line.cost = None if call.cost is None else float(call.cost)
        line.model = call.model
    if response is not None:
        line.text = response.text
        line.finish_reason = response.finish_reason
        if response.tool_calls:
            line.tool_calls = [part_to_dict(tool_call) for tool_call in response.tool_calls]
    if error is not None:
        line.error = {"type": error_type(error), "message": str(error)}
    return line


def _counts(usage: Usage | None) -> dict[str, int] | None:
    if usage is None:
        return None
    counts = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
    return {name: count for name, count in counts.items() if count is not None}
