"""The limits of calls: `Timeouts`, which a configuration or a call sets, and `Leash`, which middleware set."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import attrs

from fluxibly._checks import is_mapping, kind_of, number, problem, suggests_names
from fluxibly._roots import ConfigError
from fluxibly._values import Value


class _LeftOut:
    """The `total` of `Timeouts` that was not given."""

    __slots__ = ()

    def __reduce__(self) -> str:
        return "_LEFT_OUT"  # copies are the same object, and so are equal


_LEFT_OUT = _LeftOut()
_WHOLE_ANSWER = 600.0
"""Seconds for an answer that is not streamed, unless a limit is set: reasoning models think for minutes."""

_USUAL = 1e9
_PHASES = ("deadline", "first_chunk", "idle")
"""The limits of a leash."""

KEEP_ALIVES = 10
"""How many times `idle` a wait for one chunk may take, if only keep-alives arrive."""


@suggests_names
@attrs.frozen(repr=False, eq=False)
class Timeouts(Value):
    """Time limits in seconds. A limit that is left out keeps its default; None means no limit.

    Args:
        connect: for connecting, TLS included.
        first_byte: from the last byte of the request to the head of the answer.
        idle: in a stream, from chunk to chunk, and from the head to the first chunk. A keep-alive restarts it; bytes that
            complete no event do not. A wait for one chunk ends at ten times `idle` in any case. In a whole answer,
            between two reads of the body.
        total: for a whole attempt, from connecting to the last byte. If it is left out, an answer that is not streamed
            may take 600 seconds, and a stream has no total.

    Raises:
        ConfigError: a limit is not a number above 0.
    """

    connect: float | None = 10.0
    first_byte: float | None = 600.0
    idle: float | None = 120.0
    _total: float | _LeftOut | None = attrs.field(default=_LEFT_OUT, alias="total")

    def __attrs_post_init__(self) -> None:
        limits = {"connect": self.connect, "first_byte": self.first_byte, "idle": self.idle, "total": self.total}
        problems = [
            found
            for name, limit in limits.items()
            if limit is not None and (found := seconds_problem(f"timeout.{name}", limit))
        ]
        if problems:
            raise ConfigError.of(problems)

    @property
    def total(self) -> float | None:
        """The limit on an attempt that is not streamed."""
        return _WHOLE_ANSWER if isinstance(self._total, _LeftOut) else self._total

    @property
    def stream_total(self) -> float | None:
        """The limit on a whole stream: `total`, if it was given."""
        return None if isinstance(self._total, _LeftOut) else self._total

    def __repr__(self) -> str:
        total = "" if isinstance(self._total, _LeftOut) else f", total={self._total!r}"
        return f"Timeouts(connect={self.connect!r}, first_byte={self.first_byte!r}, idle={self.idle!r}{total})"


def seconds_problem(name: str, value: object) -> str | None:
    """Return the problem of a time limit, or None."""
    return number(name, value, above=0, unit="seconds")


def _time_problem(name: str, value: object) -> str | None:
    found = number(name, value)
    return None if found is None else problem(name, "a time of call.clock, such as call.clock() + 5", value)


def timeouts_of_call(timeout: float | Timeouts, *, streaming: bool) -> Timeouts:
    """Return the limits that `timeout=` of a call sets.

    Raises:
        ConfigError: it is neither a number above 0 nor a `Timeouts`.
    """
    if isinstance(timeout, Timeouts):
        return timeout
    wrong = seconds_problem("timeout", timeout)
    if wrong is not None:
        advice = "; write Timeouts(first_byte=…, idle=…)" if is_mapping(timeout) else ""
        raise ConfigError(f"{wrong}{advice}")
    return Timeouts(timeout, timeout, timeout) if streaming else Timeouts(timeout, timeout, timeout, timeout)


class Leash:
    """The limits that middleware set on what is inside of them, stricter than or equal to those of an `outer` leash.

    A middleware puts a leash into `request.call.leash` and restores the outer one when its flow ends::

        def deadline(request: Request, call_next: CallNext) -> Flow[Response]:
            call = request.call
            outer = call.leash
            call.leash = Leash(outer, deadline=call.clock() + 5, by="my middleware")
            try:
                return (yield from call_next(request))
            finally:
                call.leash = outer

    No limit is restarted by a keep-alive. Providers that have the attribute `obeys = True` keep the limits themselves;
    the drivers keep them for all other providers.

    A leash also ends what waits under it: `stop`, from any thread, ends a synchronous provider that waits in another. The
    leashes inside of a leash are stopped with it, except those that `apart` made, such as those of the branches of a
    call. A provider whose wait another thread can end lets the leash end it::

        leash = request.call.leash
        if leash is not None:
            leash.hold(connection.cut)  # calls it at once if the leash has been stopped
        try:
            return connection.read()
        finally:
            if leash is not None:
                leash.release(connection.cut)

    Args:
        outer: the leash that applies so far, or None.
        deadline: the time of the call's clock, in seconds, at which attempts and waits end, the consumer's time included.
            The error is `DeadlineExceeded`.
        first_chunk: seconds of waiting from the sending of a streamed request to its first chunk with output.
        idle: seconds of waiting for each later chunk of a stream. Neither includes the time of the consumer.
        by: who sets these limits, for the messages of errors: a str, or a middleware, whose `repr` is shown.

    Raises:
        ConfigError: a limit is not a number, or `first_chunk` or `idle` is not above 0.
    """

    __slots__ = ("_by", "_ends", "_root", "_stopped", "deadline", "first_chunk", "idle")
    deadline: float | None
    first_chunk: float | None
    idle: float | None
    _by: tuple[object, object, object]
    """Who set each of these limits, in this order; None if it is not known."""
    _root: Leash | None
    """The leash that is stopped for this leash. None is the leash itself, which so refers to itself in no circle."""
    _ends: list[Callable[[], object]]
    _stopped: bool

    def __init__(
        self,
        outer: Leash | None = None,
        *,
        deadline: float | None = None,
        first_chunk: float | None = None,
        idle: float | None = None,
        by: object = None,
    ) -> None:
        if outer is not None and not isinstance(outer, Leash):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
            raise TypeError(
                f"Leash: expected a Leash or None, got {kind_of(outer)}; write Leash(call.leash, deadline=…)"
            )
        usual = deadline is None or (type(deadline) is float and deadline > -math.inf)
        if not (usual and _is_usual(first_chunk) and _is_usual(idle)):
            _check_limits(deadline, first_chunk, idle)
        if outer is None:
            self.deadline, self.first_chunk, self.idle = deadline, first_chunk, idle
            self._by = (by, by, by)
            self._begin()
        else:
            self.deadline = least(deadline, outer.deadline)
            self.first_chunk = least(first_chunk, outer.first_chunk)
            self.idle = least(idle, outer.idle)
            of_deadline, of_first_chunk, of_idle = outer._by
            self._by = (
                by if _is_stricter(deadline, outer.deadline) else of_deadline,
                by if _is_stricter(first_chunk, outer.first_chunk) else of_first_chunk,
                by if _is_stricter(idle, outer.idle) else of_idle,
            )
            self._root = outer if outer._root is None else outer._root

    def _begin(self) -> None:
        """Make this a leash that is stopped for itself."""
        self._root = None
        self._ends = []
        self._stopped = False

    @classmethod
    def apart(cls, outer: Leash | None) -> Leash:
        """Return a leash with the limits of `outer` that is stopped for itself, without `outer`, as a branch of a call is."""
        leash = cls(outer)
        leash._begin()
        return leash

    def set_by(self, phase: str) -> str | None:
        """Return who set the limit that applies to a phase ("deadline", "first_chunk" or "idle"), in words for a message; None if it is not known."""
        by = self._by[_PHASES.index(phase)] if phase in _PHASES else None
        return by if by is None or isinstance(by, str) else repr(by)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped if self._root is None else self._root._stopped

    def hold(self, end: Callable[[], object]) -> None:
        """Let `stop` call `end`, which ends a wait. If `stop` was called before, call `end` now.

        `end` returns at once and raises nothing. It may be called more than once, from any thread, and also by a `stop`
        that is under way while the wait is released. So it must know whether its wait is over.
        """
        if not callable(end):  # pyright: ignore[reportUnnecessaryComparison]  # callers may be untyped
            raise TypeError(f"Leash.hold: expected a function, got {kind_of(end)}")
        root = self if self._root is None else self._root
        # The end is noted before the flag is read, and `stop` does the reverse, so at least one of the two sees the other.
        root._ends.append(end)
        if root._stopped:
            end()

    def release(self, end: Callable[[], object]) -> None:
        """Forget an `end` that was given to `hold`, because its wait is over. If it was not given, do nothing."""
        root = self if self._root is None else self._root
        with suppress(ValueError):
            root._ends.remove(end)

    def stop(self) -> None:
        """End everything that waits under this leash and the leashes that are stopped with it, now and from now on.

        Raises:
            Exception: what an `end` raised, after all others have been called.
        """
        root = self if self._root is None else self._root
        root._stopped = True
        errors: list[Exception] = []
        for end in root._ends.copy():
            try:
                end()
            except Exception as error:  # noqa: BLE001  # it is raised below
                errors.append(error)
        if errors:
            raise errors[0]

    def __repr__(self) -> str:
        return f"Leash(deadline={self.deadline!r}, first_chunk={self.first_chunk!r}, idle={self.idle!r})"


def least(one: float | None, other: float | None) -> float | None:
    """Return the smaller of two limits. None is no limit."""
    if one is None or other is None:
        return one if other is None else other
    return min(one, other)


def _is_usual(limit: float | None) -> bool:
    """Whether a limit is certainly right. The checks cost more than all else of a leash."""
    return limit is None or (type(limit) in (float, int) and 0 < limit < _USUAL)


def _check_limits(deadline: float | None, first_chunk: float | None, idle: float | None) -> None:
    problems = [
        None if deadline in (None, math.inf) else _time_problem("deadline", deadline),
        None if first_chunk is None else seconds_problem("first_chunk", first_chunk),
        None if idle is None else seconds_problem("idle", idle),
    ]
    if any(problems):
        raise ConfigError.of([found for found in problems if found])


def _is_stricter(limit: float | None, than: float | None) -> bool:
    return limit is not None and (than is None or limit < than)


def before_the_deadline(leash: Leash | None) -> str:
    """Return "before the deadline" for a message, with who set it."""
    who = None if leash is None else leash.set_by("deadline")
    return "before the deadline" if who is None else f"before the deadline (set by {who})"


def who_limits(leash: Leash | None, phase: str) -> str:
    """Return for a message whose limit applies to the waits of a stream."""
    return (None if leash is None else leash.set_by(phase)) or "a middleware"


def time_left(leash: Leash | None, clock: Callable[[], float]) -> float | None:
    """Return the seconds until a deadline on the clock of a call, below 0 after it; None if there is no deadline."""
    if leash is None or leash.deadline is None:
        return None
    left = leash.deadline - clock()
    return None if left == math.inf else left


class ChunkWaits:
    """The waits of one stream for its chunks, as the `first_chunk` and `idle` of a leash limit them.

    The first limit is for all waits until a chunk has output, together. The second is for each wait after that chunk.
    `now` is a time of one clock, in seconds.
    """

    __slots__ = ("_end", "_idle", "_left", "limit", "phase")

    def __init__(self, leash: Leash) -> None:
        self.phase: Literal["first_chunk", "idle"] = "first_chunk"
        """The limit that applies."""
        self.limit = self._left = leash.first_chunk
        """The limit that applies, in seconds; None: no limit."""
        self._idle = leash.idle
        self._end: float | None = None

    def end(self, now: float) -> float | None:
        """Return when the wait for a chunk has to end. It begins now, unless it is under way."""
        if self._end is None and self._left is not None:
            self._end = now + self._left
        return self._end

    def came(self, now: float, *, output: bool) -> None:
        """End the wait, because a chunk came. The consumer has its turn until the next wait."""
        if self.phase == "first_chunk":
            if output:
                self.phase = "idle"
                self.limit = self._left = self._idle
            elif self._end is not None:
                self._left = self._end - now
        self._end = None
