"""Middleware that answers calls from a recording."""

from __future__ import annotations

from typing import ClassVar, Literal

import attrs

from fluxibly._checks import one_of, validator
from fluxibly._logs import log_decision
from fluxibly.aggregate import as_chunks
from fluxibly.errors import NotRecorded, interrupted
from fluxibly.flow import CallNext, Flow, perform, provider_of
from fluxibly.flow.effects import More, Release
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._exchange_fields import request_fields
from fluxibly.middleware._recorder import Recorder
from fluxibly.middleware._recording import Exchange, Exchanges, RecordingFile, check_file, to_file
from fluxibly.middleware._request_key import request_key
from fluxibly.types import ProviderInfo, Request, Response

_SHOWN = 5
"""The most differences to name."""


@attrs.frozen(eq=False)
class Replay(Rebuilt):
    """Middleware that answers calls from a file that `Record` has written, without a network.

    Requests that are equal, as `Cache` understands it, get what was recorded for them in recorded order, and the last again
    and again; each `Replay` begins at the first. Nothing waits. Errors are raised as the same class, in a stream after the
    same chunks, so that `Retry` and `Fallback` outside do as they did. (Of a class that is neither Python's nor of
    `fluxibly.errors`, the nearest such base is raised, and its message names the class; without one, `FluxiblyError`.) A
    whole call may get what was recorded of a stream, and the reverse.

    A replay is no attempt: `response.usage` is as it was recorded, but `total_usage` is zero, and no budget or metric counts
    tokens. The provider is made as always, so it may want an API key; any will do.

    Args:
        file: the path of the recording. It is read once, when the first call comes.
        missing: what happens to a request that is not recorded. "error" raises `NotRecorded`. "ask" sends it, and records
            its answer, for later requests of this instance too; failures are raised, and not recorded.

    Raises:
        NotRecorded: in a call, the request is not recorded, or not to the end: who had asked for the stream then had
            stopped reading. (With "ask", such a recording does not count.)
        ConfigError: in a call, a line of the file is no exchange, or is of a later version; with "ask", the folder does not
            exist.
        ValueError: a setting is wrong.
    """

    file: str = attrs.field(converter=to_file, validator=validator(check_file))
    missing: Literal["error", "ask"] = attrs.field(
        default="error", kw_only=True, validator=validator(one_of, ("error", "ask"))
    )
    _file: RecordingFile = attrs.field(init=False, repr=False)
    _exchanges: Exchanges = attrs.field(init=False, repr=False, factory=Exchanges)

    advice: ClassVar[str] = (
        'put Record({file!r}) in the place of Replay to record it, or write Replay(…, missing="ask")'
    )
    """How to record what is missing. It ends messages."""

    def __attrs_post_init__(self) -> None:
        file = RecordingFile(self.file, "Replay")
        if self.missing == "ask":
            file.check_folder()
        object.__setattr__(self, "_file", file)

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        if not self._exchanges.loaded:
            yield from perform(self._load)
        info = yield from provider_of(request)
        key = _key_of(request, info)
        exchange = None if key is None else self._exchanges.take(key)
        if exchange is not None:
            return (yield from self._replayed(request, exchange))
        if self.missing == "error":
            raise self._not_recorded(request, info)
        log_decision(request, "Replay", f"asks, because {self.file!r} has no recording of the request")
        recorder = Recorder(request, info, self._file, key=key, exchanges=self._exchanges)
        return (yield from recorder.over(call_next))

    def _load(self) -> None:
        self._exchanges.load(self._file, advice=self._advice(), whole=self.missing == "ask")

    def _advice(self) -> str:
        return self.advice.format(file=self.file)

    def _replayed(self, request: Request, exchange: Exchange) -> Flow[Response]:
        """Let out what was recorded, and return the answer or raise the error."""
        call = request.call
        log_decision(request, "Replay", f"answers from {exchange.where}")
        call.interruption = call.said = None  # they are those of the last attempt
        response = exchange.response()
        chunks = exchange.chunks
        if call.streaming:
            if chunks is None:
                chunks = as_chunks(response) if response.has_output or response.added else ()
            for chunk in chunks:
                yield More(chunk)
        if not exchange.is_whole:
            raise NotRecorded(
                f"Replay: {exchange.where} ends here, because the call was {exchange.ended} when it was recorded; "
                f"{self._advice()}"
            )
        if not exchange.failed:
            return response
        error, in_stream = exchange.error()
        if not call.streaming:
            raise error
        yield Release(request)  # as after every attempt of a stream that has failed
        if not (in_stream and any(chunk.has_output for chunk in chunks or ())):
            raise error
        call.interruption = interrupted(request, response, error)
        raise call.interruption from error

    def _not_recorded(self, request: Request, info: ProviderInfo) -> NotRecorded:
        """Return the error for a request that is not recorded. It quotes no content."""
        try:
            fields = request_fields(request, info)
        except TypeError as error:
            return NotRecorded(f"Replay: a call of {request.model} cannot have been recorded: {error}")
        what = f"{self.file!r} has no recording of this request to {request.model} at {info.key}"
        found = self._exchanges.nearest(fields)
        if found is None:
            return NotRecorded(f"Replay: {what}, nor of any other; {self._advice()}")
        nearest, names = found
        shown = [*names[:_SHOWN], *([f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else [])]
        differs = (
            f"differs in {' and '.join(filter(None, (', '.join(shown[:-1]), shown[-1])))}"
            if shown
            else "differs only in what is not shown there: the provider's configuration, or a secret"
        )
        return NotRecorded(f"Replay: {what}; the nearest ({nearest.place}) {differs}; {self._advice()}")


def _key_of(request: Request, info: ProviderInfo) -> str | None:
    """Return the key of a request, or None if it has none, and so cannot be recorded."""
    try:
        return request_key(request, info)
    except TypeError:
        return None
