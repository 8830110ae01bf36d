"""The recording of one exchange, for `Record` and for a `Replay` that asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxibly._checks import kind_of
from fluxibly._logs import report_once
from fluxibly.errors import ConfigError, NotRecorded, outcome_of, root_cause
from fluxibly.flow import CallNext, Flow
from fluxibly.flow.culprits import check_delivered
from fluxibly.flow.effects import Effect, Release, Send
from fluxibly.flow.relay import Watch
from fluxibly.middleware._exchange_fields import answer_fields, error_fields, request_fields
from fluxibly.middleware._outputs import asked_at
from fluxibly.middleware._recording import VERSION, Exchange, Exchanges, RecordingFile, encoded, joined
from fluxibly.middleware._request_key import request_key
from fluxibly.types import CallRecord, Chunk, ProviderInfo, Request, Response


class _Arrivals(Watch):
    """A watch that keeps the chunks of a stream, and when they came."""

    def __init__(self, call: CallRecord) -> None:
        super().__init__(call)
        self.all: list[Chunk] = []
        self.times: list[float] = []
        self._has_failed = False
        """Whether the last attempt has failed."""

    def take(self, lengths: Sequence[int]) -> None:
        self.all += self.chunks
        self.times += self.arrived

    def restarted(self) -> None:
        super().restarted()
        self.all.clear()
        self.times.clear()

    def see(self, effect: Effect) -> Effect:
        if type(effect) is Release:
            self._has_failed = True
        elif type(effect) is Send and self._has_failed and not effect.request.call.nested:
            self._forget_failure()
        return super().see(effect)

    def _forget_failure(self) -> None:
        """Forget what an attempt said that has failed before output: it does not belong to the answer of the next."""
        self._has_failed = False
        self.flush()
        begin = len(self.all)
        while begin and not self.all[begin - 1].added:
            begin -= 1
            if self.all[begin].has_output:
                return
        del self.all[begin:]
        del self.times[begin:]

    def items(self, start: float) -> list[Any]:
        """Return the chunks, each with its seconds since `start`."""
        return [
            [round(time - start, 3), chunk.text if chunk.text_only else chunk.to_dict()]
            for time, chunk in zip(self.times, self.all, strict=True)
        ]

    @property
    def has_output(self) -> bool:
        """Whether output has come, or a mark."""
        return any(chunk.added is not None or chunk.has_output for chunk in self.all)


class Recorder:
    """The recording of one exchange, which goes through `over`.

    Args:
        info: the provider that the request goes to.
        file: where the exchange is written.
        key: the key of the request; without it, the recorder finds it.
        exchanges: where whole answers are kept for later requests, if failures are not recorded.
    """

    def __init__(
        self,
        request: Request,
        info: ProviderInfo,
        file: RecordingFile,
        *,
        key: str | None = None,
        exchanges: Exchanges | None = None,
    ) -> None:
        self._request = request
        self._info = info
        self._file = file
        self._key = key
        self._exchanges = exchanges
        self._arrivals: _Arrivals | None = None
        self._start = 0.0
        self._response: Response | None = None
        self._error: BaseException | None = None

    def over(self, call_next: CallNext) -> Flow[Response]:
        """Run the rest of the stack, and record what comes of it."""
        call = self._request.call
        arrivals = self._arrivals = _Arrivals(call) if call.streaming else None
        begun = call.clock()
        try:
            flow = call_next(self._request)
            response = yield from flow if arrivals is None else arrivals.over(flow)
            if arrivals is not None:
                arrivals.flush()
            check_delivered(call, response, None if arrivals is None else arrivals.message_length)
            answered = response.provider or call.provider.telemetry_name
            self._response = response.evolve(provider=answered)
        except Exception as error:
            if self._exchanges is None and not isinstance(root_cause(error), (NotRecorded, ConfigError)):
                self._error = error
                yield from self._written(begun)
            raise
        except BaseException as error:
            # A call without output, such as the loser of a race, is not recorded: nobody misses it.
            if arrivals is not None:
                arrivals.flush()
                # A program that asks for what is missing would else add the same part at each run.
                if arrivals.has_output and (self._exchanges is None or self._exchanges.begin(self._key or "")):
                    self._error = error
                    self._start = asked_at(call, begun)
                    call.on_end(self.write)
            raise
        yield from self._written(begun)
        return response

    def _written(self, begun: float) -> Flow[None]:
        """Write the exchange, in a thread where the call is async. No deadline cuts that off."""
        call = self._request.call
        if self._arrivals is not None:
            self._arrivals.flush()
        self._start = asked_at(call, begun)
        yield from call.on_end(self.write).run()

    def write(self) -> None:
        """Append the exchange to the file. What goes wrong is reported, and changes nothing."""
        try:
            fields = self._fields()
            line = encoded(fields)
        except Exception as error:  # noqa: BLE001  # a recording never breaks a call
            why = str(error) if type(error) is TypeError else type(error).__name__  # other errors may quote content
            report_once(f"recording {self._file.path} {why}", f"a call is not recorded in {self._file.name!r}: {why}")
            return
        finally:
            self._error = None  # its frames refer to the recorder
        self._file.append(line)
        if self._exchanges is not None and "ended" not in fields:
            self._exchanges.add(Exchange("a new line", self._file.name, fields))

    def _fields(self) -> dict[str, Any]:
        """Return the exchange as JSON values, in the order in which a person reads them."""
        request, error, response = self._request, self._error, self._response
        asked = request_fields(request, self._info)
        key = request_key(request, self._info) if self._key is None else self._key
        fields: dict[str, Any] = {"version": VERSION, "key": key, "request": asked}
        arrivals = self._arrivals
        # A stream without chunks may also have come whole, with the response.
        if arrivals is not None and (arrivals.all or (response is not None and not response.has_output)):
            fields["chunks"] = arrivals.items(self._start)
        if error is not None:
            if isinstance(error, Exception):
                fields["error"] = error_fields(error, request)
            else:
                fields["ended"] = outcome_of(error)
        elif response is not None:
            answer = answer_fields(response, self._info)
            if "chunks" not in fields or answer != self._aggregated(arrivals):
                fields["answer"] = answer
            if response.parsed is not None and "parsed" not in answer:
                report_once(
                    f"parsed recording {self._file.path}",
                    f"the recording {self._file.name!r} has no `parsed`, because {kind_of(response.parsed)} is not JSON; "
                    "have Record and Replay inside of Validation, which then parses the recorded text",
                )
        return fields

    def _aggregated(self, arrivals: _Arrivals | None) -> dict[str, Any]:
        """Return what a replay makes of the chunks alone."""
        return answer_fields(joined(() if arrivals is None else arrivals.all), self._info)
