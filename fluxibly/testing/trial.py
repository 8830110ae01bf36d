"""One run of a check: its outcome, and what was seen of it from outside."""

from __future__ import annotations

import logging
from typing import Self

import attrs

from fluxibly._logs import logger
from fluxibly.errors import root_cause
from fluxibly.flow.combinators import Relay
from fluxibly.flow.effects import CallNext, Effect, Flow, More, Send
from fluxibly.testing.modes import Mode, Ran
from fluxibly.testing.scripted import AsyncScriptedProvider, ScriptedProvider
from fluxibly.types import Chunk, Request, Response


@attrs.frozen
class Trial:
    mode: Mode
    ran: Ran
    provider: ScriptedProvider | AsyncScriptedProvider
    probe: Probe
    records: list[str]

    @property
    def outcome(self) -> object:
        """What modes have to agree on."""
        if self.ran.error is None:
            return self.ran.response
        cause = root_cause(self.ran.error)
        return type(cause), str(cause)

    @property
    def told(self) -> str:
        """The outcome, for a message."""
        return repr(self.ran.response if self.ran.error is None else root_cause(self.ran.error))


class Probe(Relay):
    """A middleware outside of the one that is checked, which sees what goes past it."""

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
    """The errors that the drivers log of a middleware, while entered."""

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
