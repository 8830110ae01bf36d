"""The cleanups that middleware registered with `CallRecord.on_end`, run when a record's flow has ended.

In an event loop they run in a task of their own, which no cancellation of the caller reaches. In the caller's task, asyncio's
own cancellations would pass through every shield.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from fluxibly import _abandoned
from fluxibly._loops import trio_here
from fluxibly.calls import CallRecord, Cleanup, Perform
from fluxibly.flow.compose import layer_name
from fluxibly.flow.verbs import await_, run
from fluxibly.provider import in_thread

if TYPE_CHECKING:
    import asyncio  # late at run time: it takes as long to import as all of fluxibly

TIME = 5.0
"""Seconds that the caller waits for all cleanups of a record together."""


def run_endings(call: CallRecord) -> None:
    """Run the cleanups of a record in a thread, and wait for them, unless the program is being ended."""
    unfinished = call.unfinished
    thread = _start_in_thread(call)
    if thread is None or unfinished or is_raised(KeyboardInterrupt, SystemExit):
        return
    thread.join(TIME)
    if thread.is_alive():
        _report_slow()


def is_raised(*kinds: type[BaseException]) -> bool:
    """Whether an exception is on its way through the caller, or was, before its cleanup raised another."""
    raised = sys.exception()
    while raised is not None and not isinstance(raised, kinds):
        raised = raised.__context__
    return raised is not None


def _start_in_thread(call: CallRecord) -> threading.Thread | None:
    """Start the cleanups of a record in a thread. Without a thread, run them and return None."""
    thread = threading.Thread(target=copy_context().run, args=(_run_all, call), name="fluxibly-cleanup", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter shuts down, and starts no more threads
        call.unfinished = None
        _run_all(call)
        return None
    return thread


def _run_all(call: CallRecord) -> None:
    while call.unfinished:
        call.unfinished.pop()()
    while call.endings:
        effect = call.endings.pop().effect
        try:
            run(effect)
        except BaseException as error:  # noqa: BLE001  # a cleanup changes nothing of the call, nor of other cleanups
            _report(error, effect)


async def arun_endings(call: CallRecord) -> None:
    """Run the cleanups of a record in the event loop, and wait for them, also if the caller is cancelled."""
    if is_raised(KeyboardInterrupt, SystemExit):
        _start_in_thread(call)
    elif is_raised(GeneratorExit):  # a coroutine that is being closed cannot wait
        _abandoned.abandon(_Left(call))
    elif call.unfinished:
        _start_task(partial(_arun_all, call), partial(_run_rest, call))
    else:
        await _finished(partial(_arun_all, call), then=partial(_run_rest, call))


class _Left:
    """The cleanups of a coroutine that was dropped. If the garbage collector found it, they run at the next call."""

    ended = False

    def __init__(self, call: CallRecord) -> None:
        self._call = call
        self._home = Home()

    def abandon(self) -> None:
        self._home.run_endings(self._call)


async def _arun_all(call: CallRecord) -> None:
    while call.unfinished:
        await in_thread(call.unfinished[-1])
        call.unfinished.pop()
    while call.endings:
        effect = call.endings.pop().effect
        try:
            await arun(effect)
        except Exception as error:  # noqa: BLE001  # a cleanup changes nothing of the call, nor of other cleanups
            _report(error, effect)


def _run_rest(call: CallRecord) -> None:
    """Run the cleanups that are left in a thread, because the event loop ends, or their time is up."""
    if call.endings:
        _start_in_thread(call)


async def arun_now(effect: Cleanup) -> None:
    """Run a cleanup in the event loop, and wait for it, also if the caller is cancelled. Raise its error."""
    errors: list[Exception] = []

    async def run_it() -> None:
        try:
            await arun(effect)
        except Exception as error:  # noqa: BLE001  # it is raised in the flow
            errors.append(error)

    await _finished(run_it)
    if errors:
        raise errors.pop()


async def arun(effect: Perform, call: CallRecord | None = None) -> object:
    """Await the async function of a `perform`, or run its sync function in a worker thread, and return its value.

    `call` is the record whose cleanups run only after that function has returned, also if nobody waits for it any more.
    """
    if effect.acall is not None:
        return await await_(effect.acall)
    work = _ThreadWork(effect)
    try:
        return await in_thread(work.run)
    except BaseException:
        if call is not None and work.give_up():
            call.unfinished = [*(call.unfinished or ()), work.returned.wait]
        raise


class _ThreadWork:
    """The sync function of a `perform`, for a worker thread."""

    def __init__(self, effect: Perform) -> None:
        self._effect = effect
        self._lock = threading.Lock()
        self._state: Literal["waiting", "running", "given up"] = "waiting"
        self.returned = threading.Event()

    def run(self) -> object:
        with self._lock:
            if self._state == "given up":  # the thread became free only afterwards
                return None
            self._state = "running"
        try:
            return run(self._effect)
        finally:
            self.returned.set()

    def give_up(self) -> bool:
        """Give the work up, unless it has begun. Return whether it goes on."""
        with self._lock:
            if self._state == "waiting":
                self._state = "given up"
            return self._state == "running" and not self.returned.is_set()


def _nothing() -> None:
    """Do nothing, where nothing follows."""


async def _finished(work: Callable[[], Awaitable[None]], then: Callable[[], object] = _nothing) -> None:
    """Run `work` in a task of its own, and wait for it at most `TIME`. A cancellation is raised again afterwards."""
    import anyio  # late, to keep `import fluxibly` fast

    done, cancelled = anyio.Event(), None

    def finish() -> None:
        then()
        done.set()

    _start_task(work, finish)
    with anyio.move_on_after(TIME, shield=True) as scope:
        while not done.is_set():
            try:
                await done.wait()
            except anyio.get_cancelled_exc_class() as error:
                if scope.cancel_called:
                    raise
                cancelled = error
    if not done.is_set():
        _report_slow()
    if cancelled is not None:
        try:
            raise cancelled
        finally:
            del cancelled  # it refers to this frame


_tasks: set[asyncio.Task[None]] = set()
"""The tasks that run cleanups. An event loop itself keeps only weak references."""


def _start_task(work: Callable[[], Awaitable[None]], finish: Callable[[], object]) -> None:
    """Start `work` in a task of the running event loop. Call `finish` when it has ended, or could not begin."""
    trio = trio_here()
    if trio is None:
        import asyncio

        task = asyncio.ensure_future(_cut_off(work))
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)
        task.add_done_callback(lambda _: finish())  # not within the task, which may be cancelled before its first step
        return

    async def work_on_trio() -> None:
        try:
            await _cut_off(work)
        finally:
            finish()

    try:
        trio.lowlevel.spawn_system_task(work_on_trio, context=copy_context())
    except RuntimeError:  # the event loop ends, and starts no more tasks
        finish()


async def _cut_off(work: Callable[[], Awaitable[None]]) -> None:
    """Await `work`, at most for `TIME`. On trio the end of the program waits for it; on asyncio it cancels it."""
    import anyio  # late, as above

    with anyio.move_on_after(TIME, shield=True) as scope:
        await work()
    if scope.cancelled_caught:
        _report_slow()


class Home:
    """The event loop of the code that makes it, if there is one. The cleanups of a dropped stream run there."""

    def __init__(self) -> None:
        self._trio: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        if trio := trio_here():
            self._trio = trio.lowlevel.current_trio_token()
        elif asyncio := sys.modules.get("asyncio"):
            with contextlib.suppress(RuntimeError):  # a coroutine that is stepped by hand has no event loop
                self._loop = asyncio.get_running_loop()

    @property
    def exists(self) -> bool:
        """Whether there is an event loop."""
        return self._trio is not None or self._loop is not None

    def run_endings(self, call: CallRecord) -> None:
        """Start the cleanups of a record in the event loop if it still runs, else in a thread. Hold up no event loop."""
        context = copy_context()

        def start() -> None:
            context.run(_start_task, partial(_arun_all, call), partial(_run_rest, call))

        with contextlib.suppress(RuntimeError):  # the event loop may end meanwhile
            if self._trio is not None:
                self._trio.run_sync_soon(start)
                return
            if self._loop is not None and self._loop.is_running():
                self._loop.call_soon_threadsafe(start)
                return
        if Home().exists:
            _start_in_thread(call)
        else:
            run_endings(call)


def _report(error: BaseException, effect: Perform) -> None:
    name = layer_name(effect.call)
    _report_once(
        f"cleanup {name}",
        f"the cleanup {name} of a middleware (on_end) raised {type(error).__name__}; the call is not affected",
    )


def _report_slow() -> None:
    _report_once("slow cleanup", f"the cleanups of a call (on_end) took longer than {TIME:g} s; the call went on")


def _report_once(key: str, message: str) -> None:
    from fluxibly._logs import report_once  # late, because logging takes longer to import than the drivers

    report_once(key, message)
