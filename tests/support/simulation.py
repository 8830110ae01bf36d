"""Many calls at once through one stack, in virtual time: a discrete-event simulation without threads and without waits.

Each call is a `ByHand`. The simulation carries out what it waits for: it lets time pass, answers requests after a scripted
latency, runs what is performed, and wakes a sleep when its signal is set.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from typing import Any

import attrs

from fluxibly.errors import RequestTimeout, StreamStalled
from fluxibly.flow.compose import deadline_exceeded
from fluxibly.flow.effects import Lane, Perform, Pull, Send, Sleep, Wait
from fluxibly.limits import Leash
from fluxibly.testing import ByHand
from fluxibly.types import CallRecord, Chunk, Request, Response, replaced

REQUEST = Request(model="m", messages="Hello")


@attrs.frozen
class Reply:
    """How the provider answers: after `latency` seconds, and a stream then with an item each `gap` seconds.

    `outcome` is the answer or the error of a whole call, `items` those of a stream, of which the last may be an error.
    """

    latency: float = 1.0
    outcome: Response | str | Exception = "fine"
    items: Sequence[Chunk | str | Exception] = ("fi", "ne")
    gap: float = 0.5


class _Paced(ByHand):
    """A call that also stops at each chunk, until the simulation has let the time of the next one pass."""

    def _waits_for(self, effect: Any) -> bool:
        return isinstance(effect, (Chunk, Pull)) or super()._waits_for(effect)

    def read_on(self, record: CallRecord) -> None:
        """Deliver the chunk, and read the next."""
        self._deliver(record)
        if self._read():
            self._step(None)

    def fail_to_read(self, record: CallRecord, error: Exception) -> None:
        """Deliver the chunk, and fail to read the next."""
        self._deliver(record)
        self._throw(error)

    def _deliver(self, record: CallRecord) -> None:
        chunk, self.wants = self.wants, None
        if isinstance(chunk, Chunk):
            self.events.append(chunk)
            record.delivered.append(chunk.text)

    def lanes(self) -> list[Lane]:
        """Return the lanes that are neither dropped nor adopted."""
        return [*self._branches]


class Call:
    """A call of a simulation, and what has become of it."""

    def __init__(
        self, simulation: Simulation, number: int, request: Request, reply: Any, *, streaming: bool, restarts: bool
    ) -> None:
        self.simulation = simulation
        self.number = number
        self.request = request
        self.record = request.call
        self.reply = reply
        self.streaming = streaming
        self.restarts = restarts
        self.began_at = simulation.now
        self.sent_at: list[float] = []
        """When each of its requests was sent."""
        self.ended_at: float | None = None
        self.error: BaseException | None = None
        self.response: Response | None = None
        self.flow: _Paced | None = None
        self.events: list[Any] = []
        """What its consumer got."""
        self._step = 0
        self._letting_go: list[Callable[[], object]] = []
        self._branches: dict[Any, Any] = {}
        """What each branch waits for that the simulation looks after."""
        self._lanes: list[Lane] = []
        """The lanes of the branches that were there after the last step."""

    def __repr__(self) -> str:
        return f"Call({self.number}, began_at={self.began_at}, sent_at={self.sent_at}, ended_at={self.ended_at})"

    @property
    def is_over(self) -> bool:
        return self.ended_at is not None

    @property
    def waits(self) -> bool:
        """Whether it waits in a middleware, and not for the provider."""
        return self.flow is not None and not self.is_over and isinstance(self.flow.wants, Sleep)

    @property
    def is_at_work(self) -> bool:
        """Whether the provider is at work for it."""
        return self.flow is not None and isinstance(self.flow.wants, (Send, Chunk, Pull))

    def begin(self, layers: Sequence[Any]) -> None:
        def made() -> None:
            self.flow = _Paced(layers, self.request, streaming=self.streaming, restarts=self.restarts)
            self.events = self.flow.events

        self._go(made)

    def cancel(self, error: BaseException | None = None) -> None:
        """Cancel the call where it waits, as the cancellation of its task does."""
        assert self.flow is not None
        self._go(partial(self.flow.fail, error or asyncio.CancelledError()))

    def close(self) -> None:
        """Close the call, as the consumer of a stream does that stops reading."""
        assert self.flow is not None
        self._go(self.flow.close)

    def _go(self, what: Callable[[], object]) -> None:
        """Let the call go on, and look after what it waits for then."""
        while True:
            self._step += 1
            for let_go in self._letting_go:
                let_go()
            self._letting_go.clear()
            try:
                what()
            except BaseException as error:  # noqa: BLE001  # it is the outcome of the call
                self.error = error
                self.flow = None
            flow = self.flow
            left, self._lanes = self._lanes, [] if flow is None or flow.wants is None else flow.lanes()
            going_on = [self.record.__dict__, *(lane.call.__dict__ for lane in self._lanes)]
            for lane in left:
                if lane.owns and not any(lane.call.__dict__ is record for record in going_on):
                    _clean_up(lane.call)
            if flow is None or flow.wants is None:
                self._end()
                return
            if not isinstance(flow.wants, Perform):
                break
            what = self._performed(flow, flow.wants)
        self._follow(flow)

    def _performed(self, flow: _Paced, effect: Perform) -> Callable[[], object]:
        assert effect.call is not None
        try:
            result = effect.call()
        except Exception as error:  # noqa: BLE001  # it goes into the flow
            return partial(flow.fail, error)
        return partial(flow.go_on, result)

    def _follow(self, flow: _Paced) -> None:
        """Let what the call waits for happen in its time."""
        wants, now = flow.wants, self.simulation.now
        leash = self.record.leash
        if leash is not None and leash.deadline is not None and not isinstance(wants, Wait):
            late = partial(deadline_exceeded, self.record, self.request.model)
            if isinstance(wants, (Chunk, Pull)):
                self._at(leash.deadline, lambda: flow.fail_to_read(self.record, late()))
            else:
                self._at(leash.deadline, lambda: flow.fail(late()))
        if isinstance(wants, Sleep):
            self._at(now + wants.seconds, lambda: flow.go_on(wants.until is not None and wants.until.is_set))
            if wants.until is not None:
                step, until = self._step, wants.until

                def wake() -> None:  # within the step of another call, or of this one
                    self.simulation.at(self.simulation.now, lambda: self._still(step, lambda: flow.go_on(result=True)))

                until.attach(wake)
                self._letting_go.append(lambda: until.detach(wake))
        elif isinstance(wants, Send):
            reply = self._sent(wants)
            if self.record.streaming and not wants.request.call.nested:
                left = iter(reply.items)
                if (too_late := _too_late(reply, leash)) is None:
                    self._at(now + reply.latency, lambda: flow.stream(*left))
                else:
                    self._at(now + too_late, lambda: flow.fail(RequestTimeout("nothing came in time")))
                self.pace = reply.gap
            elif isinstance(reply.outcome, Exception):
                self._at(now + reply.latency, partial(flow.fail, reply.outcome))
            else:
                self._at(now + reply.latency, partial(flow.answer, reply.outcome))
        elif isinstance(wants, (Chunk, Pull)):
            if leash is not None and leash.idle is not None and leash.idle < self.pace:
                self._at(
                    now + leash.idle, lambda: flow.fail_to_read(self.record, StreamStalled("nothing came in time"))
                )
            else:
                self._at(now + self.pace, lambda: flow.read_on(self.record))
        elif isinstance(wants, Wait):
            self._follow_branches(flow)
            if wants.seconds is not None:
                self._at(now + wants.seconds, flow.go_on)
        else:
            raise NotImplementedError(f"the simulation does not know {wants!r}")

    def _follow_branches(self, flow: _Paced) -> None:
        for branch in flow.branches:
            wants = branch.wants
            if self._branches.get(branch) is wants:
                continue
            self._branches[branch] = wants

            def finish(branch: Any, wants: Any, *outcome: Any) -> None:
                if not self.is_over and branch in flow.branches and branch.wants is wants:
                    self._go(lambda: flow.finish(branch, *outcome))

            end: Callable[..., None] = partial(finish, branch, wants)
            now = self.simulation.now
            record = branch.lane.call
            if isinstance(wants, (Sleep, Send)) and record.leash is not None and record.leash.deadline is not None:
                late = partial(deadline_exceeded, record, self.request.model)
                self.simulation.at(record.leash.deadline, lambda end=end, late=late: end(late()))  # type: ignore[misc]
            if isinstance(wants, Sleep):
                self.simulation.at(now + wants.seconds, end)
                if wants.until is not None:
                    wants.until.attach(lambda end=end: self.simulation.at(self.simulation.now, end))
            elif isinstance(wants, Perform):
                assert wants.call is not None
                try:
                    result = wants.call()
                except Exception as error:  # noqa: BLE001  # it goes into the branch
                    result = error
                self.simulation.at(now, partial(end, result))
            elif isinstance(wants, Send):
                reply = self._sent(wants)
                self.pace = reply.gap
                if wants.request.call.streaming and (too_late := _too_late(reply, record.leash)) is not None:
                    self.simulation.at(now + too_late, partial(end, RequestTimeout("nothing came in time")))
                else:
                    outcome = reply.items if wants.request.call.streaming else (reply.outcome,)
                    self.simulation.at(now + reply.latency, partial(end, *outcome))
            else:
                raise NotImplementedError(f"the simulation does not know {wants!r} in a branch")

    def _sent(self, send: Send) -> Reply:
        now = self.simulation.now
        send.sent = True
        self.sent_at.append(now)
        self.simulation.sent.append((now, self))
        for look in self.simulation.when_sent:
            look(self)
        reply: Reply = self.reply(self) if callable(self.reply) else self.reply
        return reply

    def _at(self, time: float, what: Callable[[], object]) -> None:
        step = self._step
        self.simulation.at(time, lambda: self._still(step, what))

    def _still(self, step: int, what: Callable[[], object]) -> None:
        if step == self._step and not self.is_over:
            self._go(what)

    def _end(self) -> None:
        self.ended_at = self.simulation.now
        del self.simulation.active[self]
        if self.flow is not None and self.error is None:
            self.response = getattr(self.flow, "_response", None)
        self.flow = None
        _clean_up(self.record)
        for look in self.simulation.when_ended:
            look(self)


def _too_late(reply: Reply, leash: Leash | None) -> float | None:
    """Return the seconds after which a stream's first chunk is too late, or None if it comes in time."""
    if leash is None or leash.first_chunk is None or leash.first_chunk >= reply.latency:
        return None
    return leash.first_chunk


def _clean_up(record: CallRecord) -> None:
    """Run the cleanups of a record, as a driver does when its flow has ended."""
    while record.endings:
        effect = record.endings.pop().effect
        assert effect.call is not None
        effect.call()


class Simulation:
    """A clock, a provider with scripted replies, and the calls that are made.

    Args:
        middleware: the stack of all calls, outermost first.
        reply: how the provider answers, or a function that returns it for a call.
    """

    def __init__(self, middleware: Any, reply: Reply | Callable[[Call], Reply] | None = None) -> None:
        self.layers = [*middleware] if isinstance(middleware, Iterable) else [middleware]
        self.reply = reply or Reply()
        self.now = 0.0
        self.calls: list[Call] = []
        self.active: dict[Call, None] = {}
        """The calls that are not over, in the order in which they began."""
        self.sent: list[tuple[float, Call]] = []
        """The requests that were sent, with their times."""
        self.when_sent: list[Callable[[Call], object]] = []
        self.when_ended: list[Callable[[Call], object]] = []
        self.checks: list[Callable[[], object]] = []
        """What is called whenever nothing more happens at a time."""
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = count()

    def clock(self) -> float:
        return self.now

    def at(self, time: float, what: Callable[[], object]) -> None:
        """Let something happen at a time."""
        heapq.heappush(self._events, (max(time, self.now), next(self._order), what))

    def call(
        self,
        request: Request = REQUEST,
        *,
        reply: Reply | Callable[[Call], Reply] | None = None,
        streaming: bool = False,
        restarts: bool = False,
        deadline: float | None = None,
    ) -> Call:
        """Begin a call now."""
        record = CallRecord()
        record.clock, record.started_at = self.clock, self.now
        if deadline is not None:
            record.leash = Leash(deadline=self.now + deadline)
        own = replaced(request, {"call": record})
        call = Call(self, len(self.calls), own, reply or self.reply, streaming=streaming, restarts=restarts)
        self.calls.append(call)
        self.active[call] = None
        call.begin(self.layers)
        return call

    def run(self, until: float = math.inf, *, most: int = 1_000_000) -> None:
        """Let time pass, to a time or to the end of everything that happens."""
        for _ in range(most):
            if not self._events or self._events[0][0] > until:
                break
            self.now, _, what = heapq.heappop(self._events)
            what()
            if self.is_quiet:
                for check in self.checks:
                    check()
        else:
            raise AssertionError(f"{most} things happened, and no end is in sight")
        if until != math.inf:
            self.now = until

    @property
    def is_quiet(self) -> bool:
        """Whether nothing more happens at this time."""
        return not self._events or self._events[0][0] > self.now

    @property
    def at_work(self) -> list[Call]:
        """The calls that the provider is at work for."""
        return [call for call in self.active if call.is_at_work]

    @property
    def waiting(self) -> list[Call]:
        """The calls that wait in a middleware, in the order in which they began."""
        return [call for call in self.active if call.waits]
