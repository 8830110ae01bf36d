"""A flow stepped by hand, without a provider, without I/O and without waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fluxibly._drivers.stepping import throw
from fluxibly.flow.compose import compose
from fluxibly.flow.effects import END, AskEnd, Effect, Middleware, More, Perform, Release, Send, Sleep, Source
from fluxibly.types import Chunk, Request, Response, Restart


class ByHand:
    """A call through some middleware, which stops at each effect that a driver would carry out::

        call = ByHand(Retry(max_retries=1, base_delay=2, uniform=max), request)
        assert call.sent == request
        call.fail(ServerError("down"))
        assert call.sleeps == 2
        call.go_on()
        call.answer("hello")
        assert call.response.text == "hello"

    Args:
        middleware: a middleware, or several with the outermost first.
        request: the request of the call.
        streaming: whether the call is streamed. From the first `stream` on it is in any case.
        restarts: whether the consumer takes `Restart` events; the call is then streamed.
    """

    def __init__(
        self,
        middleware: Middleware | Iterable[Middleware],
        request: Request,
        *,
        streaming: bool = False,
        restarts: bool = False,
    ) -> None:
        layers = [*middleware] if isinstance(middleware, Iterable) else [middleware]
        self.events: list[Chunk | Restart] = []
        """The events that the consumer of a stream would get."""
        self._restarts = restarts
        self._left: Iterator[object] = iter(())
        self._source = Source(END)
        self._wants: Effect | None = None
        self._response: Response | None = None
        request.call.streaming = streaming or restarts
        self._flow = compose(layers)(request)
        self._step(None)

    @property
    def sent(self) -> Request | None:
        """The request that waits for `answer`, `stream` or `fail`, or None."""
        return self._wants.request if isinstance(self._wants, Send) else None

    @property
    def sleeps(self) -> float | None:
        """The seconds of the sleep that waits for `go_on`, or None."""
        return self._wants.seconds if isinstance(self._wants, Sleep) else None

    @property
    def performs(self) -> Perform | None:
        """The I/O that waits for its result (`go_on`) or its error (`fail`), or None."""
        return self._wants if isinstance(self._wants, Perform) else None

    @property
    def response(self) -> Response:
        """The response of the call.

        Raises:
            AssertionError: the call is not over.
        """
        if self._response is None:
            raise AssertionError(f"expected a finished call, got a call that waits for {self._wants!r}")
        return self._response

    def answer(self, response: Response | str) -> None:
        """Answer the request that was sent with a whole response."""
        self._expect_sent("answer")
        self._note_sent()
        self._step(response)

    def stream(self, *items: Chunk | str | Exception) -> None:
        """Answer the request that was sent with a stream; an exception among the items ends the stream.

        Raises:
            AssertionError: no request was sent, or it is that of an `ask`, which is answered whole.
        """
        record = self._expect_sent("stream").call
        if record.nested:
            raise AssertionError("stream(): expected the request of a call, got that of an ask; answer() it")
        record.streaming = True
        self._note_sent()
        self._left = iter(items)
        if self._read():
            self._step(self._source)

    def fail(self, error: BaseException) -> None:
        """Raise an error where the call waits.

        Raises:
            BaseException: the error that the middleware let through. An `error` that is not an Exception always passes,
                as in a pipeline.
        """
        self._note_sent()
        self._throw(error)

    def go_on(self, result: object = None) -> None:
        """End a sleep, or pass the result of I/O to the middleware."""
        self._step(result)

    def close(self) -> None:
        """Close the call, as a consumer does that stops reading."""
        self._flow.close()

    def _expect_sent(self, verb: str) -> Request:
        if self.sent is None:
            raise AssertionError(
                f"{verb}(): expected a call that has sent a request, got a call that waits for {self._wants!r}"
            )
        return self.sent

    def _note_sent(self) -> None:
        if isinstance(self._wants, Send):
            self._wants.sent = True

    def _read(self) -> bool:
        """Read the next item. Return False for an error, which this raises in the flow."""
        item = next(self._left, END)
        if isinstance(item, Exception):
            self._throw(item)
            return False
        self._source.chunk = item
        return True

    def _throw(self, error: BaseException) -> None:
        try:
            self._settle(throw(self._flow, error))
        except StopIteration as stop:
            self._end(stop)

    def _step(self, outcome: object) -> None:
        try:
            self._settle(self._flow.send(outcome))
        except StopIteration as stop:
            self._end(stop)

    def _settle(self, effect: Effect) -> None:
        """Carry out effects until the call waits for the test: for an answer, the end of a sleep, or the result of I/O."""
        while not isinstance(effect, (Send, Sleep, Perform)):
            outcome: object = None
            if isinstance(effect, More):
                self.events.append(effect.chunk)
            elif isinstance(effect, Restart):
                outcome = self._restarts
                if outcome:
                    self.events.append(effect)
            elif not isinstance(effect, (Release, AskEnd)):
                if isinstance(effect, Chunk):
                    self.events.append(effect)
                if not self._read():
                    return
            effect = self._flow.send(outcome)
        self._wants = effect

    def _end(self, stop: StopIteration) -> None:
        self._wants = None
        self._response = stop.value
