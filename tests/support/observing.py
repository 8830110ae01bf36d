"""A middleware that observes the attempts of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxibly.flow import CallNext, Flow
from fluxibly.types import CallRecord, Request, Response, Tool, ToolCall, observed


class Observing:
    """A middleware that notes how attempts and asks begin and end: it is their observer, too.

    Args:
        headers: the headers that it gives to each attempt.
    """

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        self.headers = headers or {}
        self.record: CallRecord | None = None
        self.begun: list[Request] = []
        self.ends: list[tuple[Any, ...]] = []
        """The text of the response or the type of the error of each attempt, and whether it was sent."""
        self.asks: list[Observing] = []

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        self.record = request.call
        return (yield from call_next(observed(request, self)))

    def begin(self, request: Request) -> Observing:
        self.begun.append(request)
        return self

    def ask(self) -> Observing:
        self.asks.append(Observing(self.headers))
        return self.asks[-1]

    def run_tool(self, tool: Tool, call: ToolCall) -> None:
        """Follow no tools."""

    def end(self, response: Response | None, error: BaseException | None, **facts: bool) -> None:
        self.ends.append((type(error) if response is None else response.text, *facts.values()))
