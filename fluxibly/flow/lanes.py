"""The verbs `race` and `gather`: several flows of one call, side by side.

The flows are stepped here one at a time, in the thread or task of the call, and only what they wait for goes on at the same
time, in lanes. So no middleware needs a lock, and an outer layer sees the effects of each branch as they come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack, suppress
from contextvars import Context, copy_context
from typing import Any, Generic, TypeVar, overload

from fluxibly._checks import kind_of
from fluxibly.calls import CallRecord
from fluxibly.flow.combinators import effects_of
from fluxibly.flow.effects import (
    PULL,
    Adopt,
    CallNext,
    Drop,
    Effect,
    Flow,
    Lane,
    More,
    Perform,
    Pull,
    Release,
    Send,
    Sleep,
    Start,
    T,
    Wait,
)
from fluxibly.flow.relay import is_flow
from fluxibly.flow.verbs import check_seconds, discard
from fluxibly.limits import Leash
from fluxibly.types import Chunk, Request, Response, Restart, replaced


class Branch(Generic[T]):
    """One of several flows, and what has become of it. `call` is the record whose limits apply to it."""

    def __init__(self, flow: Flow[T], call: CallRecord, *, owns: bool) -> None:
        self.flow = flow
        self.call = call
        # Each flow has a context of its own, because flows that take turns would reset each other's context variables.
        self.context: Context = copy_context()
        self.lane = Lane(flow, self.context, call, owns=owns)
        self.lanes = [self.lane]
        """Its own lane, and those that races within it have begun."""
        self.held: list[Chunk] = []
        """The chunks that came before any output."""
        self.output: Effect | None = None
        """The effect that brought the first output, where the flow stands still."""
        self.over = False
        self.result: Any = None
        self.error: Exception | None = None

    def advance(self, outcome: object = None, error: BaseException | None = None) -> Flow[None]:
        """Step the flow until it waits in its lane, brings output, or is over."""
        flow = self.flow  # a local variable, by which a driver finds the layer that makes a mistake
        try:
            while (effect := self._step(flow, outcome, error)) is not None:
                outcome, error = (True if isinstance(effect, Restart) else None), None
                outgoing, waits = self._outgoing(effect)
                if outgoing is None:
                    if self.output is not None:
                        return
                    continue
                try:
                    outcome = yield outgoing
                except Exception as raised:  # noqa: BLE001  # it goes into the flow
                    error = raised
                else:
                    if waits:
                        return
        finally:
            del error  # it refers to this frame

    def _step(self, flow: Flow[T], outcome: object, error: BaseException | None) -> Effect | None:
        """Step the flow once. Return its next effect, or None if it is over."""
        try:
            if error is None:
                return self.context.run(flow.send, outcome)
            return self.context.run(flow.throw, error)
        except StopIteration as stop:
            self.result = stop.value
        except Exception as failure:  # noqa: BLE001  # the flow has failed, and other branches go on
            self.error = failure
        finally:
            del error  # it refers to this frame
        self.over = True
        return None

    def _outgoing(self, effect: Effect) -> tuple[Effect | None, bool]:
        """Return what goes outward for an effect, if anything does, and whether the branch then waits in its lane."""
        if isinstance(effect, (Chunk, More)):
            chunk = effect if isinstance(effect, Chunk) else effect.chunk
            if chunk.has_output:
                self.output = effect
                return None, False
            self.held.append(chunk)
            return (Start(self.lane, PULL), True) if effect is chunk else (None, False)
        if isinstance(effect, Restart):
            self.held.clear()
            return None, False
        if isinstance(effect, Send):
            if effect.lane is None:
                return self._sent(effect), True
            self._note(effect.lane)
        elif isinstance(effect, (Pull, Sleep, Perform, Wait, Release)):
            if isinstance(effect, (Sleep, Perform)) and effect.within is None:
                effect.within = self.call
            return Start(self.lane, effect), True
        elif isinstance(effect, Start):
            self._note(effect.lane)
        elif isinstance(effect, Adopt) and effect.into is None:
            effect.into = self.lane
        return effect, False

    def _note(self, lane: Lane) -> None:
        """Note a lane of a race within, which ends with this branch."""
        if lane not in self.lanes:
            self.lanes.append(lane)

    def _sent(self, effect: Send) -> Send:
        """Have a request sent in the lane of this branch."""
        call = effect.request.call
        if call is not self.call:  # an `ask`, which ends with its branch
            call.leash = Leash.apart(call.leash)
        self.lane.leash = call.leash
        effect.lane = self.lane
        return effect

    def close(self, error: BaseException) -> None:
        """End the flow, if it is not over, because an error ends the whole call. That error goes on in any case."""
        flow: Any = self.flow
        self.error = None  # it refers to frames that refer to this object
        if isinstance(error, GeneratorExit):
            with suppress(RuntimeError):  # a flow that yields once more
                self.context.run(flow.close)
            return
        with suppress(BaseException):
            if getattr(flow, "gi_suspended", True):
                self.context.run(flow.throw, error)
        with suppress(BaseException):  # as above
            self.context.run(flow.close)


class _Branches(Generic[T]):
    """The branches of one `race` or `gather`, of the call of the record `call`."""

    def __init__(self, call: CallRecord) -> None:
        self.call = call
        self.all: list[Branch[T]] = []
        self.running: dict[Lane, Branch[T]] = {}
        """The branches that wait, by their lanes."""

    def begin(self, flow: Flow[T], call: CallRecord) -> Flow[Branch[T]]:
        """Begin a branch, and return it when it waits, or is over."""
        branch = Branch(flow, call, owns=call is not self.call)
        self.all.append(branch)
        yield from branch.advance()
        return self._stopped(branch)

    def next(self, seconds: float | None) -> Flow[Branch[T] | None]:
        """Let the first branch go on that can, and return it. Return None if the seconds pass first."""
        lane: Lane | None = yield Wait([*self.running], seconds)
        if lane is None:
            return None
        branch = self.running.pop(lane)
        outcome, error = lane.outcome, lane.error
        lane.outcome = lane.error = None
        try:
            yield from branch.advance(outcome, error)
        finally:
            del error  # it refers to this frame
        return self._stopped(branch)

    def _stopped(self, branch: Branch[T]) -> Branch[T]:
        if not branch.over and branch.output is None:
            self.running[branch.lane] = branch
        return branch

    def give_up(self, branches: Sequence[Branch[T]]) -> Flow[None]:
        """End some branches, with all that belongs to them."""
        self.running.clear()
        if branches:
            yield Drop([lane for branch in branches for lane in branch.lanes])

    def close(self, error: BaseException) -> None:
        """End the flows that are left, because an error ends the whole call. The driver then ends the lanes.

        An error of a layer in its `finally` is raised when all flows have ended.
        """
        with ExitStack() as closing:
            for branch in reversed(self.all):  # the stack is left from its end
                closing.callback(branch.close, error)


class _Resumed(Generator[Effect, Any, T]):
    """The rest of a branch's flow, for `yield from`. Each step runs in the context of the branch."""

    def __init__(self, branch: Branch[T]) -> None:
        self.flow = branch.flow
        self._run = branch.context.run
        self._effect = branch.output

    def send(self, outcome: Any, /) -> Effect:
        if self._effect is not None:
            effect, self._effect = self._effect, None
            return effect
        return self._run(self.flow.send, outcome)

    def throw(self, *error: Any) -> Effect:
        return self._run(self.flow.throw, *error)

    def close(self) -> None:
        self._run(self.flow.close)


def race(
    call_next: CallNext, requests: Sequence[Request], delay: float, *, after_failure: bool = True
) -> Flow[Response]:
    """Send several requests, and return the response of the first that answers::

        def hedge(request: Request, call_next: CallNext) -> Flow[Response]:
            return (yield from race(call_next, [request, request.evolve(target=other)], delay=2))

    The first request is sent at once, and each further one when the one before has had `delay` seconds, or as soon as one
    has failed. The winner is the first that answers whole, or of which the first output of a stream arrives. The others are
    given up there and then: their connections are released, and their attempts count as abandoned. Once a branch has won,
    its stream is that of the call. If all fail, the error of the first is raised.

    Each branch has a call record of its own, which becomes that of the call if the branch wins. So layers further in know
    nothing of the race, and layers further out see every attempt.

    A synchronous pipeline calls the provider in a thread for each request, and reads the rest of the winner's stream in the
    thread of the consumer. An asynchronous pipeline uses a task for each. A synchronous provider that cannot be ended from
    another thread runs on unseen until it returns, and its stream is then closed.

    Args:
        call_next: the rest of the stack.
        requests: the requests, made by `request.evolve(…)` of the request of the call; the first is sent first.
        delay: in seconds.
        after_failure: whether a failure sends the next request at once. Otherwise it waits for its time, and if all that
            were sent have failed, no further one is.

    Raises:
        TypeError: `requests` is not a sequence of requests, or `delay` is not a number.
        ValueError: there are no requests, they belong to different calls, or `delay` is negative, infinite or NaN.
    """
    requests = _checked_requests(requests)
    check_seconds(delay, "race: delay")
    if len(requests) == 1:
        return call_next(requests[0])
    return _race(call_next, requests, delay, after_failure=after_failure)


def _race(call_next: CallNext, requests: Sequence[Request], delay: float, *, after_failure: bool) -> Flow[Response]:
    call = requests[0].call
    leash = call.leash
    branches: _Branches[Response] = _Branches(call)
    try:
        try:
            winner = yield from _first(branches, call_next, requests, delay, after_failure=after_failure)
        except Exception:
            yield from branches.give_up(branches.all)
            raise
        yield from branches.give_up([branch for branch in branches.all if branch is not winner])
        _count_attempts(branches)
        call.join(winner.call)
        yield Adopt(winner.lane)
        if winner.error is not None:
            raise winner.error
        for chunk in winner.held:
            yield More(chunk)
        if winner.output is not None:
            branches.all.remove(winner)  # from here on, errors and a close reach its flow through `yield from`
            winner.result = yield from _Resumed(winner)
        response: Response = winner.result
        return response
    except BaseException as error:
        branches.close(error)
        raise
    finally:
        _count_attempts(branches)
        for branch in branches.all:
            if branch.call.__dict__ is not call.__dict__:
                branch.call.last_error = None  # its frames refer to the branch
        call.leash = leash


def _first(
    branches: _Branches[Response],
    call_next: CallNext,
    requests: Sequence[Request],
    delay: float,
    *,
    after_failure: bool,
) -> Flow[Branch[Response]]:
    """Run the branches until one has won. If all have failed, return the first."""
    call = requests[0].call
    waiting = deque(requests)
    due = left = 0.0
    branch: Branch[Response] | None = None
    is_next = True  # whether the next request goes out now
    while True:
        if waiting and is_next:
            record = call.branch(Leash.apart(call.leash))
            flow = call_next(replaced(waiting.popleft(), {"call": record}))
            branch = yield from branches.begin(flow, record)
            due, left = call.clock() + delay, delay
        else:
            branch = yield from branches.next(left if waiting else None)
            left = max(0.0, due - call.clock())
        if branch is None:
            is_next = True
        else:
            if branch.output is not None or (branch.over and branch.error is None):
                return branch
            is_next = branch.over and after_failure
            if branch.over and not branches.running and not (waiting and is_next):
                return branches.all[0]


def _count_attempts(branches: _Branches[Response]) -> None:
    """Add the attempts of the branches to those of the call, unless they are counted already."""
    call = branches.call
    for branch in branches.all:
        if branch.call.__dict__ is not call.__dict__:
            call.attempts += branch.call.attempts
            branch.call.attempts = 0


def _checked_requests(requests: Sequence[Request]) -> Sequence[Request]:
    if not isinstance(requests, Sequence) or isinstance(requests, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        discard(requests)
        raise TypeError(
            f"race: expected a list of requests, got {kind_of(requests)}; write race(call_next, [request, …])"
        )
    for request in requests:
        if not isinstance(request, Request):  # pyright: ignore[reportUnnecessaryIsInstance]  # as above
            raise TypeError(f"race: expected requests, got {kind_of(request)}; write request.evolve(…)")
    if not requests:
        raise ValueError("race: expected at least one request, got none")
    if any(request.call is not requests[0].call for request in requests):
        raise ValueError("race: expected requests of one call, got those of several; write request.evolve(…)")
    return requests


A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")


# A list at run time, as with `asyncio.gather`. Type checkers are told of a tuple, because each result has a type of its own.
@overload
def gather(  # pyright: ignore[reportOverlappingOverload]  # see above
    request: Request, one: Flow[A], two: Flow[B], /
) -> Flow[tuple[A, B]]: ...
@overload
def gather(request: Request, one: Flow[A], two: Flow[B], three: Flow[C], /) -> Flow[tuple[A, B, C]]: ...
@overload
def gather(
    request: Request, one: Flow[A], two: Flow[B], three: Flow[C], four: Flow[D], /
) -> Flow[tuple[A, B, C, D]]: ...
@overload
def gather(request: Request, /, *flows: Flow[T]) -> Flow[list[T]]: ...
def gather(request: Request, /, *flows: Flow[Any]) -> Flow[Any]:
    """Do several things at once, and return their results in order::

        facts, verdict = yield from gather(request, perform(look_up, alook_up), ask(question, target=judge))

    The flows are those of `perform`, `ask` and `sleep`, or generators of several steps that stream nothing. What they wait
    for goes on at the same time; they themselves are stepped in the thread or task of the call, one at a time. A synchronous
    pipeline uses a thread for each that waits, an asynchronous pipeline a task. A single flow runs as it is.

    The first error gives the others up, and is raised. An asynchronous `perform` is then cancelled; a synchronous one runs
    on unseen.

    Args:
        request: the request of the call, whose limits apply.
        flows: what to do.

    Raises:
        TypeError: `request` is not a Request, or one of the flows is no generator, streams something, or sends a request of
            the call itself.
        ValueError: one of the flows has begun, or is given twice.
    """
    if not isinstance(request, Request):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        raise TypeError(f"gather: expected a Request first, got {kind_of(request)}; write gather(request, …)")
    for flow in flows:
        if not is_flow(flow):
            discard(flow)
            raise TypeError(
                f"gather: expected flows such as perform(…) or ask(…), got {kind_of(flow)}; write gather(request, "
                "perform(call, acall), …)"
            )
        if _has_begun(flow):
            raise ValueError("gather: expected flows that have not begun, got one that has; call its function again")
    if len({*flows}) < len(flows):  # its steps would be shared out among the results
        raise ValueError("gather: expected a flow for each result, got one flow twice; call its function again")
    return _gather(request.call, [effects_of(flow, "gather: expected flows that yield only from") for flow in flows])


def _has_begun(flow: Any) -> bool:
    return flow.gi_frame is None or flow.gi_suspended or flow.gi_running


def _gather(call: CallRecord, flows: Sequence[Flow[T]]) -> Flow[list[T]]:
    if len(flows) == 1:
        return [(yield from flows[0])]
    branches: _Branches[T] = _Branches(call)
    failure: Exception | None = None
    try:
        waiting = deque(flows)
        while failure is None and (waiting or branches.running):
            flow = waiting.popleft() if waiting else None
            branch = yield from (branches.next(None) if flow is None else branches.begin(flow, call))
            failure = None if branch is None else branch.error
        yield from branches.give_up(branches.all)
        if failure is not None:
            raise failure
        return [branch.result for branch in branches.all]
    except BaseException as error:
        branches.close(error)
        raise
    finally:
        del failure  # it refers to this frame
