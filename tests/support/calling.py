"""Helpers for the tests of the built-in middleware: a call in a mode, with its script, clock and record."""

from __future__ import annotations

from typing import Any

import attrs

from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import Mode, Ran, run
from fluxibly.types import CallRecord, Request, Response

REQUEST = Request(model="m-1", messages="What is the capital of France?")


@attrs.frozen
class Call:
    """A finished call: its result, provider, clock and record."""

    ran: Ran
    provider: ScriptedProvider | AsyncScriptedProvider
    clock: VirtualClock
    record: CallRecord

    @property
    def response(self) -> Response:
        """The response. If the call failed, this raises its error."""
        if self.ran.error is not None:
            raise self.ran.error
        assert self.ran.response is not None
        return self.ran.response


def scripted(mode: Mode, *answers: Any, clock: VirtualClock | None = None) -> Any:
    """Return a scripted provider for a mode."""
    return (AsyncScriptedProvider if mode.backend else ScriptedProvider)(*answers, clock=clock)


def call(mode: Mode, middleware: Any, *answers: Any, request: Request = REQUEST, **options: Any) -> Call:
    """Make a call in a mode, through one or several middleware, to a scripted provider."""
    clock = VirtualClock()
    provider = scripted(mode, *answers, clock=clock)
    records: list[CallRecord] = []

    def note(request, call_next):
        records.append(request.call)
        return (yield from call_next(request))

    stack = [note, *(middleware if isinstance(middleware, list) else [middleware])]
    ran = run(mode, provider, stack, request, clock=clock, **options)
    assert provider.opened == provider.closed
    return Call(ran, provider, clock, records[0])
