"""The rows of a run, asked many at once. Their lines are written as they come."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from time import monotonic, perf_counter
from typing import Any, Literal

import attrs

from fluxibly._masking import request_of_texts
from fluxibly.batch._counting import Counted
from fluxibly.batch._input import Row
from fluxibly.batch._journal import Entry, Journal
from fluxibly.batch._line_writer import DISK_FULL, LineWriter, is_disk_full
from fluxibly.batch._lines import Line, line_of
from fluxibly.batch._patience import Patience, answers_nobody, may_help, named
from fluxibly.batch._repeats import MOST_FOLLOWERS, Repeats, copied
from fluxibly.batch._requests import Requests
from fluxibly.batch._stack import watching
from fluxibly.errors import (
    AuthenticationError,
    BudgetExceeded,
    ConnectionFailed,
    NotFound,
    PermissionDenied,
    QuotaExceeded,
    root_cause,
)
from fluxibly.pipeline import AsyncPipeline
from fluxibly.types import CallRecord, Request

SYNC_EVERY = 1.0
"""The seconds after which what is written is also safe from a power cut. A process that is killed loses nothing."""
_REST_EVERY = 256
"""The rows after which other tasks have a turn in any case."""
STOPPED = "on request"
BUDGET = "the budget is used up"
_OF_THE_SERVICE = (AuthenticationError, PermissionDenied, NotFound, QuotaExceeded, ConnectionFailed)
"""The errors that are about the key, the model or the address rather than a row, if they are those of all rows."""


class _Asker:
    """One of the tasks that ask rows, one after another, and the call that it is at. It is watched by the layers of the stack."""

    __slots__ = ("_asking", "answers", "call", "is_asking", "is_recalled", "scope", "sending", "sent_at")

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self.is_asking = False
        """Whether it is at a row, which it would put back if it were recalled."""
        self.scope: Any = None
        self.renew()
        self.begin()

    def renew(self) -> None:
        """Go on after having been recalled."""
        import anyio  # late, to keep `import fluxibly` fast

        self.scope = anyio.CancelScope()
        self.is_recalled = False

    def recall(self) -> None:
        """Put the row back, and wait with all others until an outage is over."""
        self.is_recalled = True
        self.scope.cancel()

    def begin(self) -> None:
        """Begin a call."""
        self.call: CallRecord | None = None
        """The record of the call, once a request is about to be sent."""
        self.sending = self.answers = 0
        self.sent_at = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is lost if this row is dropped: no request of it is under way, or was answered."""
        return not (self.sending or self.answers)

    @property
    def attempts(self) -> int:
        return 0 if self.call is None else self.call.attempts

    def begins(self, call: CallRecord) -> bool:
        """Do as `Watching.begins`."""
        asking = self._asking
        if self.is_idle and not self._may_go_on():
            return False
        if not call.nested:
            self.call = call
        self.sending += 1
        asking.report.in_flight += 1
        self.sent_at = monotonic()
        return True

    def ends(self, error: BaseException | None) -> None:
        """Do as `Watching.ends`."""
        asking = self._asking
        self.sending -= 1
        asking.report.in_flight -= 1
        self.answers += error is None
        cause = None if error is None else root_cause(error)
        asking.patience.ended(self, cause)
        if cause is not None and self.is_idle and asking.may_help(cause, self.attempts):
            self._may_go_on()  # else its retries would wait for their turn

    def _may_go_on(self) -> bool:
        """Return whether another attempt may be made. If not, this task is cancelled."""
        asking = self._asking
        if asking.is_over:
            self.scope.cancel()
            return False
        if asking.patience.bars(self):
            self.recall()
            return False
        return True


@attrs.define(eq=False)
class Asking:
    """Asks rows until there are none left, or it has to stop.

    Args:
        rows: those to ask, and perhaps some after `limit`.
        limit: the number from which on rows are not to be asked.
        requests: makes requests of them.
        pipeline: answers requests. Its stack is that of a batch (`stack_for`).
        journal: takes the lines.
        report: counts meanwhile.
        concurrency: the most rows at once.
        whole: whether lines have whole answers.
        repeats: the answers to be used again; None: equal rows are asked again.
        stops_at_budget: whether a used-up budget stops the run, and not only the row.
        stop_after_errors: the number of rows that stop the run if they are the first, and all fail alike and for good.
        is_told_to_stop: whether to stop.
        each_second: is called about once a second.
        was_answered: whether an earlier run with the same settings was answered.
    """

    rows: Iterable[Row] | AsyncIterable[Row]
    limit: float
    requests: Requests
    pipeline: AsyncPipeline
    journal: Journal
    report: Counted
    concurrency: int
    whole: bool = False
    repeats: Repeats | None = None
    stops_at_budget: bool = False
    stop_after_errors: int = 20
    is_told_to_stop: Callable[[], bool] = lambda: False
    each_second: Callable[[], object] = lambda: None
    was_answered: bool = False

    is_over: bool = attrs.field(default=False, init=False)
    """Whether nothing more is begun."""
    _lines: LineWriter = attrs.field(init=False)
    """Takes the lines of rows that have ended."""
    _is_of_service: bool = attrs.field(default=False, init=False)
    """Whether the error of the last row that has failed is about the service."""
    _left: deque[Row] = attrs.field(factory=deque[Row], init=False)
    """Rows that were put back: they have waited for an equal one in vain, or were recalled at an outage."""
    patience: Patience = attrs.field(init=False)
    _aside: tuple[Row, Line, Exception] | None = attrs.field(default=None, init=False)
    """The row that nobody answered during an outage. It has failed if another is answered, and else has no line."""
    _askers: set[_Asker] = attrs.field(factory=set[_Asker], init=False)
    _asked: int = attrs.field(default=0, init=False)
    """The rows that are being asked, or wait for that."""
    _ends: int = attrs.field(default=0, init=False)
    """The rows that have ended."""
    _broke: deque[Any] = attrs.field(factory=deque[Any], init=False)
    """The rows that wait for others to end, because the budget has no more for them."""
    _error: BaseException | None = attrs.field(default=None, init=False)
    _now: Iterator[Row] | None = attrs.field(default=None, init=False)
    _later: AsyncIterator[Row] | None = attrs.field(default=None, init=False)
    """The rows of a stream."""
    _turn: Any = attrs.field(default=None, init=False)
    """Held by the task that reads a stream."""
    _tasks: Any = attrs.field(default=None, init=False)
    _scope: Any = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.patience = Patience(self._recall)

    # From outside

    def stop(self, why: str = STOPPED) -> None:
        """Begin nothing more. What is in flight ends; what only waits is dropped."""
        if self.is_over:
            return
        self.is_over = True
        self.report.stopped = why
        for asker in self._askers:
            if asker.is_idle:
                asker.scope.cancel()

    def cancel(self) -> None:
        """Cancel what is in flight, too."""
        self.stop()
        if self._scope is not None:
            self._scope.cancel()

    async def run(self) -> None:
        """Ask the rows, until all are done or something stops it.

        Raises:
            BaseException: what a row raised that is no `Exception`, and what the input raised. What came before is written.
        """
        import anyio  # late, to keep `import fluxibly` fast

        self._lines = LineWriter(
            self.journal,
            self.report,
            stop_after_errors=0 if self.was_answered else self.stop_after_errors,
            wrote=None if self.repeats is None else self._wrote,
        )
        self._turn = anyio.Lock()
        rows: Any
        if isinstance(self.rows, AsyncIterable):
            rows = self._later = aiter(self.rows)
        else:
            rows = self._now = iter(self.rows)
        try:
            async with anyio.create_task_group() as beside:
                beside.start_soon(self._sync)
                async with anyio.create_task_group() as self._tasks:
                    self._scope = self._tasks.cancel_scope
                    self._start()
                beside.cancel_scope.cancel()
        finally:
            self._end()
            if isinstance(rows, Generator):
                rows.close()
            elif isinstance(rows, AsyncGenerator):
                with anyio.CancelScope(shield=True):
                    await rows.aclose()
        if self._error is not None:
            raise self._error

    async def _sync(self) -> None:
        """Have the disk keep what is written, in a thread, so that a slow disk holds up no request."""
        import anyio  # late, as above

        while True:
            await anyio.sleep(SYNC_EVERY)
            self.each_second()
            try:
                self._write()  # what had no room may have it now
                if not self.journal.is_synced:
                    await anyio.to_thread.run_sync(self.journal.sync)
            except OSError as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End all because of an error, which `run` raises."""
        self._error = self._error or error
        self._scope.cancel()

    def _end(self) -> None:
        """Write what is left."""
        try:
            self._end_aside()
            self._finish_alike()
            self._write()
        except OSError as error:
            self._error = self._error or error

    def _end_aside(self) -> None:
        """Decide about a row after which no other was asked."""
        if self._aside is None or self.report.stopped is not None or self._error is not None:
            return
        if self.patience.heard_at > -math.inf:
            self._finish_aside()
        else:
            self.report.stopped = answers_nobody(root_cause(self._aside[2]))

    # The tasks

    def _recall(self, asks: object) -> None:
        """Begin an outage: have all rows but one leave the queues of the stack, where it would wait behind them."""
        for asker in self._askers:
            if asker is not asks and asker.is_asking and asker.is_idle:
                asker.recall()

    def _start(self) -> None:
        asker = _Asker(self)
        self._askers.add(asker)
        self._tasks.start_soon(self._ask_rows, asker)

    async def _ask_rows(self, asker: _Asker) -> None:
        import anyio  # late, as above

        watching.set(asker)
        try:
            while True:
                with asker.scope:
                    await self._ask_each(asker)
                if self.is_over or not asker.is_recalled:
                    break
                asker.renew()
        except Exception as error:  # noqa: BLE001  # of the input, for example
            self._error = self._error or error
            self.stop()
        except BaseException as error:
            if isinstance(error, anyio.get_cancelled_exc_class()):
                raise
            self._fail(error)
        finally:
            self._askers.discard(asker)
            self.patience.pass_on(asker)

    async def _ask_each(self, asker: _Asker) -> None:
        """Ask one row after another, until there are none, or the task is recalled."""
        import anyio.lowlevel  # late, as above

        while not asker.is_recalled and (row := await self._next(asker)) is not None:
            self._asked += 1
            if len(self._askers) < self.concurrency:
                self._start()
            asker.is_asking = True
            try:
                await self._ask(asker, row)
            except BaseException:
                if asker.is_recalled:
                    self._left.append(row)
                raise
            finally:
                asker.is_asking = False
                asker.begin()
                self._asked -= 1
                if self._broke:
                    self._wake_broke()
            self._ends += 1
            if not asker.is_recalled and not self._ends % _REST_EVERY:
                await anyio.lowlevel.checkpoint()  # a model in this process may never wait for anything

    async def _next(self, asker: _Asker) -> Row | None:
        """Return the next row to ask."""
        if self.patience.is_out and not self.is_over:
            await self.patience.turn(asker)
        if self.is_told_to_stop():  # from a thread; the loop, which wakes what waits, may hear of it later
            self.stop()
        if self.is_over:
            return None
        if self._left:
            return self._left.popleft()
        if self._now is not None:
            row = next(self._now, None)
        else:
            async with self._turn:
                row = None if self.is_over or self._later is None else await anext(self._later, None)
        if row is None or row.number >= self.limit:
            self._now, self._later = iter(()), None
            return None
        return row

    # A row

    async def _ask(self, asker: _Asker, row: Row) -> None:
        began = perf_counter()
        request, key, error = None, "", None
        try:
            request, key = self.requests.of(row)
        except Exception as raised:  # noqa: BLE001  # one row harms no other
            error = raised
        if request is None:
            texts = request_of_texts([row.prompt, row.settings])
            self._finish(row, self._line(row, key, began, error=error, request=texts, where=row.where), error)
            return
        repeats = self.repeats
        if repeats is None:
            await self._ask_for(asker, row, request, key, began)
            return
        while repeats.followers >= MOST_FOLLOWERS and repeats.is_asked(key):
            await self._some_end(asker)
        if (known := repeats.answer(key)) is not None:
            self._finish(row, copied(known, row), None)
        elif repeats.begin(key, row):
            try:
                line = await self._ask_for(asker, row, request, key, began)
            except BaseException:
                self._left.extend(repeats.end(key, None))
                raise
            waiting = repeats.end(key, line)
            for each in waiting:
                if line is None:
                    self._left.append(each)
                else:
                    self._finish(each, copied(line, each), None)

    async def _ask_for(self, asker: _Asker, row: Row, request: Request, key: str, began: float) -> Line | None:
        """Ask until there is an answer, or an error that stays. Return the line of an answer."""
        attempts = refusals = 0
        while True:
            asker.begin()
            try:
                response = await self.pipeline.complete(request)
            except Exception as error:  # noqa: BLE001  # one row harms no other
                call = asker.call
                attempts += asker.attempts
                end = await self._end_of(asker, error, refusals)
                if end == "again":
                    refusals += 1
                    continue
                if self._is_without_line(error):
                    return None
                line = self._line(row, key, began, error=error, call=call, request=request)
                line.attempts = attempts
                if end == "aside":
                    self._aside = row, line, error
                else:
                    self._finish(row, line, error)
                return None
            call = asker.call
            line = line_of(
                row.number,
                row.custom_id,
                key,
                perf_counter() - began,
                response=response,
                call=call,
                request=request,
                whole=self.whole,
            )
            if call is None:  # a cache has answered
                line.usage, line.cost = None, 0.0
            line.attempts += attempts
            self._finish(row, line, None)
            return line

    async def _end_of(self, asker: _Asker, error: Exception, refusals: int) -> Literal["again", "failed", "aside"]:
        """Return what becomes of a row that was not answered: see `Patience.again`. Wait before it is asked again."""
        cause = root_cause(error)
        if isinstance(cause, BudgetExceeded) and self.stops_at_budget:
            if self._asked > len(self._broke) + 1:  # what others have reserved, and do not use, comes back
                await self._some_end(asker)
                return "again"
            if cause.never_fits:
                self.report.is_stuck = True
                self.stop(f"a single row may cost more than the whole budget: {cause}")
            self.stop(BUDGET)
            return "failed"
        if not self.may_help(cause, asker.attempts):
            if not isinstance(cause, ConnectionFailed):
                self.patience.heard()
            return "failed"
        if self.is_over:
            return "failed"
        asker.answers = 0  # what failed has brought nothing that would be lost
        end = await self.patience.again(asker, cause, asker.sent_at, refusals)
        if self.patience.stopped is not None:
            self.stop(self.patience.stopped)
        return end

    def may_help(self, error: BaseException, attempts: int) -> bool:
        """Return whether asking again may help against an error: see `_patience.may_help`."""
        return may_help(error, attempts, was_answered=self.was_answered or self.patience.heard_at > -math.inf)

    def _is_without_line(self, error: Exception) -> bool:
        """Return whether a row that was not answered is to be asked again in another run."""
        cause = root_cause(error)
        if isinstance(cause, BudgetExceeded) and self.stops_at_budget:
            return True
        return self.is_over and self.may_help(cause, 0)

    async def _some_end(self, asker: _Asker) -> None:
        """Wait until another row has ended."""
        import anyio  # late, as above

        self.patience.pass_on(asker)
        event = anyio.Event()
        self._broke.append(event)
        await event.wait()

    def _wake_broke(self) -> None:
        """Have two rows try again that wait for others to end: one would be too few if all take less than was thought."""
        for _ in range(min(2, len(self._broke))):
            self._broke.popleft().set()

    def _line(self, row: Row, key: str, began: float, **outcome: Any) -> Line:
        elapsed = perf_counter() - began
        return line_of(row.number, row.custom_id, key, elapsed, whole=self.whole, **outcome)

    def _finish(self, row: Row, line: Line, error: BaseException | None) -> None:
        """Take the line of a row that has ended."""
        if self._aside is not None and not self.patience.is_out:
            self._finish_aside()
        cause = None if error is None else root_cause(error)
        lines = self._lines
        before = lines.failed_alike
        self._is_of_service = isinstance(cause, _OF_THE_SERVICE)
        lines.add(line, None if cause is None or self.may_help(cause, 0) else named(cause))
        if (reason := lines.failed_alike) is not None:
            self.stop(reason)
            if before is not None and self.report.stopped == before:
                self.report.stopped = reason  # with this row, which was in flight
        self._write()  # at once: as soon as the task goes on to another row, this one is no longer in flight

    def _finish_aside(self) -> None:
        """Take the line of a row that was put aside, now that it is known to have failed by itself."""
        if self._aside is not None:
            aside, self._aside = self._aside, None
            self._finish(*aside)

    def _finish_alike(self) -> None:
        """Write the lines that were held back, unless all rows have failed by the service."""
        lines = self._lines
        if not (lines.held and self._is_of_service):
            lines.release()
        elif self.report.stopped is None and self._error is None:
            self.report.stopped = f"all {lines.held} rows failed alike: {lines.held_error}"

    # The journal

    def _write(self) -> None:
        """Write the lines that are not written yet. If the disk is full, they are tried again later."""
        try:
            self._lines.write()
        except OSError as error:
            if not is_disk_full(error):
                raise
            self.stop(DISK_FULL)
            self.report.stopped = DISK_FULL

    def _wrote(self, entry: Entry, offset: int) -> None:
        if self.repeats is not None and not entry.failed and entry.key:
            self.repeats.wrote(entry.key, offset)
