"""Going on with another target when one has failed: after which errors, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from fluxibly._logs import log_decision, one_line
from fluxibly._masking import error_message
from fluxibly.calls import CallRecord
from fluxibly.errors import (
    BadRequest,
    ContentFiltered,
    ContextLengthExceeded,
    DeadlineExceeded,
    FluxiblyError,
    ProviderError,
    StreamInterrupted,
    error_type,
)
from fluxibly.flow import Flow, provider_of
from fluxibly.flow.compose import check_deadline
from fluxibly.limits import time_left
from fluxibly.middleware._keys import whom
from fluxibly.target import Target
from fluxibly.types import Request

LISTED: Any = attrs.validators.min_len(1)
"""The validator of the targets. A configuration's error lists what is wrong with each setting that has a validator."""


def goes_on_after(error: BaseException) -> bool:
    """Whether another target may answer a request that has failed with this error."""
    if isinstance(error, ContextLengthExceeded):  # a longer context may fit elsewhere
        return True
    return isinstance(error, ProviderError) and not isinstance(error, (BadRequest, ContentFiltered, DeadlineExceeded))


def has_time(call: CallRecord) -> bool:
    """Whether the deadline of a call has not passed, as the layer that asks has it. One further in may have."""
    left = time_left(call.leash, call.clock)
    return left is None or left > 0


class Trail:
    """The failures of one call of a middleware, for the log, the trace and the error that the caller gets.

    Args:
        middleware: the name of its class.
        request: the request that it got.
    """

    def __init__(self, middleware: str, request: Request) -> None:
        self._middleware = middleware
        self._request = request
        self._notes: list[str] = []  # and not the errors, because their frames refer to the trail

    def failed(self, asked: Request, error: Exception) -> None:
        """Note a request that has failed."""
        self._note(f"{whom(asked)} failed with", asked, error)

    def skipped(self, asked: Request, error: Exception) -> None:
        """Note a request that was not sent, because its provider cannot be made, and log that."""
        self._note(f"{whom(asked)} could not be asked:", asked, error)
        self.decided(f"skips {whom(asked)}, which cannot be asked: {error_type(error)}", error)

    def _note(self, what: str, asked: Request, error: Exception) -> None:
        message = one_line(error_message(error, (asked,)))
        kind = error_type(error)
        self._notes.append(f"{self._middleware}: {what} {f'{kind}: {message}' if message else kind}")

    def decided(self, what: str, error: Exception | None = None) -> None:
        """Log a decision; see `log_decision`."""
        log_decision(self._request, self._middleware, what, error)

    def goes_on(self, asked: Request, error: Exception) -> None:
        """Log which request follows after an error."""
        again = ", and starts the stream over" if isinstance(error, StreamInterrupted) else ""
        self.decided(f"asks {whom(asked)} after {error_type(error)}{again}", error)

    def tell(self, error: BaseException) -> None:
        """Add all that has failed to the error that is raised. A failure alone needs no note.

        A provider may raise one and the same error again and again, so a note that it has already is not added.
        """
        if len(self._notes) > 1:
            there = {*getattr(error, "__notes__", ())}
            for note in self._notes:
                if note not in there:
                    error.add_note(note)

    def check_deadline(self, asked: Request) -> None:
        """Raise `DeadlineExceeded`, with all that has failed, if the deadline of the call has passed."""
        try:
            check_deadline(self._request.call, asked.model)
        except DeadlineExceeded as late:
            self.tell(late)
            raise

    def next(self, targets: Iterable[Target]) -> Flow[Request | None]:
        """Return the request for the first of some targets that can be asked, or None if there is none."""
        for target in targets:
            asked = self._request.evolve(target=target)
            try:
                yield from provider_of(asked)
            except FluxiblyError as error:
                self.skipped(asked, error)
            else:
                return asked
        return None
