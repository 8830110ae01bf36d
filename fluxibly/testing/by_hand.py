"""A flow stepped by hand, without a provider, without I/O and without waits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from fluxibly._drivers.lanes import Lanes
from fluxibly._drivers.stepping import throw, throwable
from fluxibly.flow.compose import compose
from fluxibly.flow.effects import (
    END,
    PULL,
    Adopt,
    AskEnd,
    Drop,
    Effect,
    Lane,
    Middleware,
    More,
    Perform,
    Release,
    Send,
    Sleep,
    Source,
    Start,
    Wait,
)
from fluxibly.types import Chunk, Request, Response, Restart


class _Waiting:
    """A call or a branch that waits for the test."""

    def __init__(self) -> None:
        self.wants: Effect | None = None
        """The effect that waits for the test."""
        self.left: Iterator[object] = iter(())
        """The items of its stream that are not read yet."""

    @property
    def sent(self) -> Request | None:
        """The request that waits for an answer, or None."""
        return self.wants.request if isinstance(self.wants, Send) else None

    @property
    def sleeps(self) -> float | None:
        """The seconds of the sleep that waits for its end, or None."""
        return self.wants.seconds if isinstance(self.wants, Sleep) else None

    @property
    def performs(self) -> Perform | None:
        """The I/O that waits for its result or its error, or None."""
        return self.wants if isinstance(self.wants, Perform) else None

    @property
    def _waits_for_what(self) -> str:
        if self.wants is None:
            return "is over"
        return "waits for its branches" if isinstance(self.wants, Wait) else f"waits for {self.wants!r}"


class Branch(_Waiting):
    """One of several things that a call of `ByHand` waits for at once. `ByHand.finish` ends it."""

    def __init__(self, lane: Lane) -> None:
        super().__init__()
        self.lane = lane

    def __repr__(self) -> str:
        return f"Branch({self._waits_for_what})"


class ByHand(_Waiting):
    """A call through some middleware, which stops at each effect that a driver would carry out::

        call = ByHand(Retry(max_retries=1, base_delay=2, uniform=max), request)
        assert call.sent == request
        call.fail(ServerError("down"))
        assert call.sleeps == 2
        call.go_on()
        call.answer("hello")
        assert call.response.text == "hello"

    While a middleware does several things at once (`race`, `gather`), `branches` lists what waits::

        call = ByHand(hedge, request)
        call.go_on()  # the time until the second request passes
        first, second = call.branches
        call.finish(second, "hello")
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
        super().__init__()
        layers = [*middleware] if isinstance(middleware, Iterable) else [middleware]
        self.events: list[Chunk | Restart] = []
        """The events that the consumer of a stream would get."""
        self._restarts = restarts
        self._source = Source(END)
        self._lanes = Lanes(None)
        self._branches: dict[Lane, Branch] = {}
        self._response: Response | None = None
        request.call.streaming = streaming or restarts
        self._flow = compose(layers)(request)
        self._step(None)

    @property
    def branches(self) -> list[Branch]:
        """The branches that wait, in the order in which they began."""
        return [branch for branch in self._branches.values() if branch.wants is not None]

    @property
    def waits(self) -> float | None:
        """The seconds until the call goes on without its branches (`go_on`), or None."""
        return self.wants.seconds if isinstance(self.wants, Wait) else None

    @property
    def response(self) -> Response:
        """The response of the call.

        Raises:
            AssertionError: the call is not over.
        """
        if self._response is None:
            what = "has failed or was closed" if self.wants is None else self._waits_for_what
            raise AssertionError(f"expected a finished call, got a call that {what}")
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
        self.left = iter(items)
        if self._read():
            self._step(self._source)

    def fail(self, error: BaseException) -> None:
        """Raise an error where the call waits.

        Raises:
            AssertionError: the call is over.
            BaseException: the error that the middleware let through. An `error` that is not an Exception always passes,
                as in a pipeline.
        """
        self._expect_waiting("fail")
        self._note_sent()
        self._throw(error)

    def go_on(self, result: object = None) -> None:
        """End a sleep, pass the result of I/O to the middleware, or let the time pass that it gives to its branches.

        Raises:
            AssertionError: the call is over, waits for branches without a limit of time, or gets a result from time.
        """
        self._expect_waiting("go_on")
        if isinstance(self.wants, Wait):
            if self.wants.seconds is None:
                raise AssertionError(
                    "go_on(): expected a call that waits for time, got one that waits for its branches"
                )
            if result is not None:
                raise AssertionError("go_on(): expected no result, because time passes; write finish(branch, …)")
        self._step(result)

    def finish(self, branch: Branch, *outcome: object) -> None:
        """End what a branch waits for, and let the call go on.

        Args:
            branch: one of `branches`.
            outcome: the answer, the result of I/O, or nothing at the end of a sleep; an exception is raised in the branch.
                In a call that is streamed, the items of the stream, an exception among them ends it.

        Raises:
            AssertionError: it is no branch of this call that waits, or there are several outcomes where no stream is.
        """
        if branch not in self.branches:
            raise AssertionError("finish(): expected a branch of this call that waits, got one that does not")
        wants, lane = branch.wants, branch.lane
        streams = isinstance(wants, Send) and wants.request.call.streaming
        if len(outcome) > 1 and not streams:
            raise AssertionError(f"finish(): expected one outcome, because nothing streams, got {len(outcome)}")
        if isinstance(wants, Send):
            wants.sent = True
            if streams:
                branch.left = iter(outcome)
                outcome = (lane.source,)
                self._read_in(branch)
        if outcome and isinstance(outcome[0], BaseException):
            lane.error = throwable(outcome[0])
        elif outcome:
            lane.outcome = outcome[0]
        lane.done = True
        branch.wants = None
        if isinstance(self.wants, Wait):
            try:
                done = self._first_done(self.wants.lanes)
            except BaseException as error:  # noqa: BLE001  # as in a pipeline, it ends the call
                self._throw(error)
            else:
                if done is not None:
                    self._step(done)

    def close(self) -> None:
        """Close the call, as a consumer does that stops reading."""
        self.wants = None
        self._branches.clear()
        self._flow.close()

    def _expect_waiting(self, verb: str) -> None:
        if self.wants is None:
            raise AssertionError(f"{verb}(): expected a call that waits, got a call that is over")

    def _expect_sent(self, verb: str) -> Request:
        if self.sent is None:
            raise AssertionError(
                f"{verb}(): expected a call that has sent a request, got a call that {self._waits_for_what}"
                + ("; write finish(branch, …)" if isinstance(self.wants, Wait) else "")
            )
        return self.sent

    def _note_sent(self) -> None:
        if isinstance(self.wants, Send):
            self.wants.sent = True

    def _read(self) -> bool:
        """Read the next item. Return False for an error, which this raises in the flow."""
        item = next(self.left, END)
        if isinstance(item, Exception):
            self._throw(item)
            return False
        self._source.chunk = item
        return True

    def _throw(self, error: BaseException) -> None:
        self.wants = None
        try:
            self._settle(throw(self._flow, error))
        except StopIteration as stop:
            self._end(stop)

    def _step(self, outcome: object) -> None:
        self.wants = None
        try:
            self._settle(self._flow.send(outcome))
        except StopIteration as stop:
            self._end(stop)

    def _settle(self, effect: Effect) -> None:
        """Carry out effects until the call waits for the test: for an answer, the end of a sleep, or the result of I/O."""
        while not self._waits_for(effect):
            outcome: object = None
            if isinstance(effect, (Send, Start)):
                self._begin(effect)
            elif isinstance(effect, Wait):
                outcome = self._first_done(effect.lanes)
            elif isinstance(effect, Drop):
                for lane in effect.lanes:
                    self._branches.pop(lane, None)
                    self._lanes.close_flow(lane)
            elif isinstance(effect, Adopt):
                self._adopt(effect)
            elif isinstance(effect, More):
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
        self.wants = effect

    def _waits_for(self, effect: Effect) -> bool:
        """Whether the call has to wait for the test."""
        if isinstance(effect, Wait):
            return self._first_done(effect.lanes) is None
        return isinstance(effect, (Sleep, Perform)) or (isinstance(effect, Send) and effect.lane is None)

    def _begin(self, effect: Send | Start) -> None:
        """Begin what a branch waits for."""
        lane, begun, _ = self._lanes.prepare(effect)
        branch = self._branches.setdefault(lane, Branch(lane))
        if begun is PULL:
            self._read_in(branch)
        elif isinstance(begun, Release):
            lane.done = True
        elif not isinstance(begun, Wait):
            branch.wants = begun

    def _read_in(self, branch: Branch) -> None:
        """Read the next item of a branch's stream."""
        lane, item = branch.lane, next(branch.left, END)
        lane.done = True
        if isinstance(item, BaseException):
            lane.error = throwable(item)
        lane.source.chunk = item

    def _first_done(self, lanes: Sequence[Lane]) -> Lane | None:
        """Return the first lane that is done. Only the test ends a sleep."""
        return self._lanes.find(lanes, -math.inf)

    def _adopt(self, effect: Adopt) -> None:
        """Make the stream of a branch that of the call, or that of another branch."""
        branch = self._branches.pop(effect.lane, None)
        if branch is None or not effect.lane.call.streaming:  # a branch that ends before it waits has no stream
            return
        if effect.into is None:
            self.left, self._source = branch.left, effect.lane.source
        else:
            effect.into.source = effect.lane.source
            self._branches[effect.into].left = branch.left

    def _end(self, stop: StopIteration) -> None:
        self.wants = None
        self._response = stop.value
