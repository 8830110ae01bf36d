"""The laws, the scenarios of `check_middleware`, and the run of a middleware through a scenario."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Self

import attrs

from fluxibly._logs import logger
from fluxibly.errors import ServerError, root_cause
from fluxibly.flow.combinators import Relay
from fluxibly.flow.effects import CallNext, Effect, Flow, More, Send
from fluxibly.testing.modes import Mode, Ran
from fluxibly.testing.scripted import Answer, AsyncScriptedProvider, Cut, ScriptedProvider
from fluxibly.types import Chunk, Request, Response, ToolCallDelta, Usage

LAWS = {
    1: "all modes give the same result",
    2: "every opened stream is closed",
    3: "a response has the text of its chunks",
    4: "no request is sent again after output",
    5: "context variables stay as they were",
    6: "KeyboardInterrupt, cancellation and GeneratorExit pass unchanged",
    7: "a request is never changed",
    8: "calls do not affect each other",
    11: "a failed or incomplete answer never passes as a whole answer",
}
"""The laws that the checks can find broken, as their messages state them."""
PLENTY = 8
"""How often a middleware may send a request before the script runs out."""


@attrs.frozen
class Scenario:
    """A provider's script. `answers` makes it anew for each run, because a raised error keeps its traceback."""

    name: str
    answers: Callable[[], Sequence[Answer]]
    partial: str | None = None
    """The text that was delivered before the provider failed; None if it does not fail after output."""
    stop_after: int | None = None
    restarts: bool = False


def _good() -> list[Answer]:
    return ["Hello, world"] * PLENTY


def _rich() -> list[Answer]:
    end = Chunk(finish_reason="stop", usage=Usage(input_tokens=3, output_tokens=2), model="m-1", id="r-1")
    call = ToolCallDelta(index=0, id="c-1", name="look", arguments='{"at": 1}')
    return [["Hello", Chunk(", world", reasoning="hm"), Chunk(tool_calls=(call,)), end]] * PLENTY


def _fails_first() -> list[Answer]:
    return [ServerError("scripted failure"), *_good()]


def _fails_late() -> list[Answer]:
    return [["Hello", ServerError("scripted failure")], *_good()]


def _cut() -> list[Answer]:
    return [["Hello", Cut()], *_good()]


SCENARIOS = (
    Scenario("a plain answer", _good),
    Scenario("an answer with reasoning, a tool call and usage", _rich),
    Scenario("an empty answer", lambda: [[Chunk(finish_reason="stop")]] * PLENTY),
    Scenario("a failure before output", _fails_first),
    Scenario("a failure before output, again and again", lambda: [ServerError("scripted failure")] * (PLENTY * 8)),
    Scenario("a failure after output", _fails_late, partial="Hello"),
    Scenario("a failure after output, for a consumer that takes Restart", _fails_late, partial="Hello", restarts=True),
    Scenario("a stream that is cut off", _cut, partial="Hello"),
    Scenario("a consumer that closes without reading", _good, stop_after=0),
    Scenario("a consumer that leaves after one chunk", _good, stop_after=1),
)


@attrs.frozen
class Trial:
    mode: Mode
    ran: Ran
    provider: ScriptedProvider | AsyncScriptedProvider
    probe: Probe
    records: list[str]

    @property
    def outcome(self) -> object:
        """The result that has to be the same in all modes."""
        if self.ran.error is None:
            return self.ran.response
        cause = root_cause(self.ran.error)
        return type(cause), str(cause)

    @property
    def summary(self) -> str:
        """The outcome, for a message."""
        return repr(self.ran.response if self.ran.error is None else root_cause(self.ran.error))


class Probe(Relay):
    """A middleware outside of the checked middleware, which observes the effects that pass."""

    def __init__(self) -> None:
        self.output = False
        self.resent = False

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        return (yield from self.over(call_next(request)))

    def see(self, effect: Effect) -> Effect:
        if isinstance(effect, (Chunk, More)):
            chunk = effect if isinstance(effect, Chunk) else effect.chunk
            self.output = self.output or chunk.has_output
        elif isinstance(effect, Send) and self.output:
            self.resent = True
        return effect

    def restarted(self) -> None:
        self.output = False


class Records(logging.Handler):
    """The errors that the drivers log about a middleware, collected while entered."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "it must let it pass" in (message := record.getMessage()):
            self.messages.append(message)

    def __enter__(self) -> Self:
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger.removeHandler(self)
