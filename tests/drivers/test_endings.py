"""`CallRecord.on_end`: cleanups with I/O, which run once, however the call ends."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import re
import subprocess
import sys
import threading
from functools import partial

import anyio
import pytest
from anyio.lowlevel import checkpoint
from support.calling import REQUEST, scripted
from support.leftovers import interrupt_until
from support.powers import limited

from fluxibly import _abandoned
from fluxibly._drivers import endings
from fluxibly._logs import forget_reports
from fluxibly.errors import ServerError, StreamInterrupted, root_cause
from fluxibly.flow import ask, sleep
from fluxibly.middleware import Deadline
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import MODES, run
from fluxibly.types import CallRecord

STREAMS = [mode for mode in MODES if mode.streaming]
SOON = 0.1
"""Seconds that cleanups get, where they get little time."""
LONG = 30.0
"""Seconds that no test lasts."""
VAR = contextvars.ContextVar("VAR", default="nobody's")


@pytest.fixture
def soon(monkeypatch):
    """Give cleanups little time."""
    monkeypatch.setattr(endings, "TIME", SOON)


@pytest.fixture
def reports(capsys):
    """A function that returns the lines that were reported on stderr since the last look."""

    def look():
        return capsys.readouterr().err.splitlines()

    forget_reports()
    yield look
    forget_reports()


class Cleaning:
    """A middleware with a cleanup. `log` says when its flow has ended, and when the cleanup ran, sync or async."""

    def __init__(self, log, name="", *, call=True, acall=True):
        self.log = log
        self.name = name
        self.acall = self.aclean if acall else None
        self.cleaned = threading.Event()

    def clean(self):
        self.log.append(f"{self.name}cleaned")
        self.cleaned.set()

    async def aclean(self):
        await checkpoint()
        self.log.append(f"{self.name}acleaned")
        self.cleaned.set()

    def __call__(self, request, call_next):
        request.call.on_end(self.clean, self.acall)
        try:
            return (yield from call_next(request))
        finally:
            self.log.append(f"{self.name}ended")


def in_order(mode, *, threaded=False):
    """Return the log of two layers with cleanups, as it has to be."""
    cleaned = "cleaned" if mode.backend is None or threaded else "acleaned"
    return ["inner ended", "outer ended", f"inner {cleaned}", f"outer {cleaned}"]


class TestEveryEnd:
    """Cleanups run once, after the flow has ended, the last registered first."""

    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            (["a", "b"], None),
            (ServerError("before output"), ServerError),
            (["a", ServerError("after output")], (ServerError, StreamInterrupted)),
            ([ValueError("of the provider")], ValueError),
        ],
        ids=["returned", "failed", "interrupted", "another error"],
    )
    def test_a_call_that_ends_by_itself(self, mode, answer, error):
        """The caller gets the response or the error once the cleanups have run."""
        log = []
        ran = run(mode, scripted(mode, answer), [Cleaning(log, "outer "), Cleaning(log, "inner ")], REQUEST)
        assert ran.error is None if error is None else isinstance(ran.error, error)
        assert log == in_order(mode)

    @pytest.mark.parametrize("events", [0, 1])
    def test_a_consumer_that_leaves(self, stream_mode, events):
        """A stream that is closed, read or unread, has run its cleanups when the consumer goes on."""
        log = []
        stack = [Cleaning(log, "outer "), Cleaning(log, "inner ")]
        ran = run(stream_mode, scripted(stream_mode, "a b"), stack, REQUEST, stop_after=events)
        assert ran.error is None
        assert log == in_order(stream_mode)

    def test_an_exception_of_the_consumer(self, stream_mode):
        """So it has if the consumer raises an exception."""

        def fail(_):
            raise OSError("the consumer's")

        log = []
        stack = [Cleaning(log, "outer "), Cleaning(log, "inner ")]
        ran = run(stream_mode, scripted(stream_mode, "a b"), stack, REQUEST, watch=fail)
        assert type(ran.error) is OSError
        assert log == in_order(stream_mode)

    def test_a_layer_that_fails(self, mode):
        """A layer's own error, at its beginning or at its end, is an end like any other."""

        def at_the_beginning(request, call_next):
            request.call.on_end(partial(log.append, "cleaned"))
            raise OSError("mine")
            yield

        def at_the_end(request, call_next):
            request.call.on_end(partial(log.append, "cleaned"))
            yield from call_next(request)
            raise OSError("mine")

        for layer in (at_the_beginning, at_the_end):
            log = []
            ran = run(mode, scripted(mode, "a"), [layer], REQUEST)
            assert isinstance(root_cause(ran.error), OSError)
            assert log == ["cleaned"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_the_end_of_the_program(self, mode, error, monkeypatch):
        """On Ctrl-C the caller does not wait: the cleanup runs in a thread of its own."""
        monkeypatch.setattr(endings, "TIME", 2 * LONG)
        go_on, done = threading.Event(), threading.Event()

        def clean():
            assert go_on.wait(LONG)
            done.set()

        async def aclean():
            raise AssertionError("expected the sync function, got the async one")

        def cleaning(request, call_next):
            request.call.on_end(clean, aclean)
            return (yield from call_next(request))

        ran = run(mode, scripted(mode, [error()]), [cleaning], REQUEST)
        assert type(ran.error) is error
        assert not done.is_set()
        go_on.set()
        assert done.wait(LONG)

    def test_ctrl_c_in_the_consumer(self, stream_mode, monkeypatch):
        """A consumer that is interrupted between two chunks does not wait either."""
        monkeypatch.setattr(endings, "TIME", 2 * LONG)
        go_on, done = threading.Event(), threading.Event()

        def clean():
            assert go_on.wait(LONG)
            done.set()

        def cleaning(request, call_next):
            request.call.on_end(clean)
            return (yield from call_next(request))

        def interrupt(_):
            raise KeyboardInterrupt

        ran = run(stream_mode, scripted(stream_mode, "a b"), [cleaning], REQUEST, watch=interrupt)
        assert type(ran.error) is KeyboardInterrupt
        assert not done.is_set()
        go_on.set()
        assert done.wait(LONG)

    def test_ctrl_c_during_a_cleanup(self):
        """Ctrl-C ends the wait for a cleanup, which goes on in its thread."""
        over, go_on, done = threading.Event(), threading.Event(), threading.Event()

        def clean():
            interrupt_until(over)
            assert go_on.wait(LONG)
            done.set()

        def cleaning(request, call_next):
            request.call.on_end(clean)
            return (yield from call_next(request))

        with pytest.raises(KeyboardInterrupt):
            Pipeline(ScriptedProvider("a"), [cleaning]).complete(REQUEST)
        over.set()
        assert not done.is_set()
        go_on.set()
        assert done.wait(LONG)

    def test_a_cleanup_that_registers_another(self, mode):
        """A cleanup that is registered by a cleanup runs too."""
        log = []

        def cleaning(request, call_next):
            request.call.on_end(lambda: (log.append("first"), request.call.on_end(lambda: log.append("second"))))
            return (yield from call_next(request))

        run(mode, scripted(mode, "a"), [cleaning], REQUEST)
        assert log == ["first", "second"]


WHEN = ["whole", "before output", "after output"]


class Waits:
    """An async provider that calls `waits` and then waits forever, after the texts of its stream."""

    def __init__(self, *texts, waits=lambda: None):
        self._texts = texts
        self._waits = waits

    async def complete(self, request):
        self._waits()
        await anyio.sleep(LONG)

    async def stream(self, request):
        for text in self._texts:
            yield text
        await self.complete(request)


async def make(when, middleware, waits=lambda: None):
    """Make a call that never ends by itself. `waits` is called when it waits for its provider."""
    pipeline = AsyncPipeline(Waits(*(["a"] if when == "after output" else []), waits=waits), middleware)
    if when == "whole":
        await pipeline.complete(REQUEST)
        return
    async with pipeline.stream(REQUEST) as stream:
        async for _ in stream:
            pass


async def timed_out(call):
    """Make a call within `asyncio.timeout`. It gets a function that lets the time pass."""
    async with asyncio.timeout(None) as timeout:
        await call(partial(timeout.reschedule, 0.0))


class SlowCleaning(Cleaning):
    """A `Cleaning` whose async cleanup calls `begun`, and then takes a while."""

    def __init__(self, log, begun=lambda: None):
        super().__init__(log)
        self.begun = begun

    async def aclean(self):
        self.log.append("begun")
        self.begun()
        for _ in range(20):
            await checkpoint()
        await anyio.sleep(0.01)
        await super().aclean()


@pytest.mark.parametrize("when", WHEN)
class TestCancellation:
    """A cancelled call runs its cleanups to their ends before the cancellation goes on."""

    def test_by_a_scope(self, when, backend):
        """A cancel scope of anyio's or trio's."""
        log = []

        async def main():
            with anyio.CancelScope() as scope:
                await make(when, [SlowCleaning(log)], scope.cancel)
            assert scope.cancelled_caught
            assert log == ["ended", "begun", "acleaned"]

        anyio.run(main, backend=backend)

    def test_by_asyncio_timeout(self, when):
        """`asyncio.timeout` gets its cancellation back, and leaves none pending."""
        log = []

        async def main():
            with pytest.raises(TimeoutError):
                await timed_out(partial(make, when, [SlowCleaning(log)]))
            assert asyncio.current_task().cancelling() == 0
            assert log == ["ended", "begun", "acleaned"]

        asyncio.run(main())

    def test_by_task_cancel(self, when):
        """A task ends with the cancellation that it was given, and further cancellations do not reach the cleanup."""
        log = []

        async def main():
            def cancel():
                if not task.done():
                    task.cancel("enough")
                    asyncio.get_running_loop().call_soon(cancel)

            task = asyncio.create_task(
                make(when, [SlowCleaning(log)], lambda: asyncio.get_running_loop().call_soon(cancel))
            )
            with pytest.raises(asyncio.CancelledError, match="enough"):
                await task
            assert log == ["ended", "begun", "acleaned"]

        asyncio.run(main())


class TestCancelledCleanup:
    """A cancellation that comes while a cleanup runs waits for its end, and then goes on."""

    def test_by_asyncio_timeout(self):
        """The call is over, but its timeout passes during the cleanup."""
        log = []

        async def call(time_passes):
            await AsyncPipeline(AsyncScriptedProvider("a"), [SlowCleaning(log, time_passes)]).complete(REQUEST)

        async def main():
            with pytest.raises(TimeoutError):
                await timed_out(call)
            assert asyncio.current_task().cancelling() == 0

        asyncio.run(main())
        assert log == ["ended", "begun", "acleaned"]

    def test_by_a_scope(self, backend):
        """As above, with a cancel scope."""
        log = []

        async def main():
            with anyio.CancelScope() as scope:
                await AsyncPipeline(AsyncScriptedProvider("a"), [SlowCleaning(log, scope.cancel)]).complete(REQUEST)
                await checkpoint()
            assert scope.cancelled_caught

        anyio.run(main, backend=backend)
        assert log == ["ended", "begun", "acleaned"]

    @pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio warns about dropped generators
    def test_the_task_of_a_cleanup_that_the_loop_cancels(self, backend):
        """At the end of the event loop each cleanup runs all the same, if it has not begun by its sync function."""
        log, begun = [], threading.Event()
        inner, outer = SlowCleaning(log, begun.set), Cleaning(log, "outer ")
        stack = [outer, inner]

        async def main():
            stream = AsyncPipeline(Waits("a"), stack).stream(REQUEST)
            await anext(stream)
            del stream
            while not begun.is_set():
                await checkpoint()

        anyio.run(main, backend=backend)
        assert outer.cleaned.wait(LONG)
        if backend == "trio":
            assert log == ["ended", "outer ended", "begun", "acleaned", "outer acleaned"]
        else:
            assert log == ["ended", "outer ended", "begun", "outer cleaned"]


class TestHandle:
    def test_run(self, mode):
        """`run` does the cleanup within the flow, and it does not run again."""
        log = []

        async def agive():
            await checkpoint()
            log.append("agiven")

        ran = run(
            mode,
            scripted(mode, "a"),
            [Cleaning(log), limited(partial(log.append, "taken"), partial(log.append, "given"), agive)],
            REQUEST,
        )
        assert ran.error is None
        if mode.backend is None:
            assert log == ["taken", "given", "ended", "cleaned"]
        else:
            assert log == ["taken", "agiven", "ended", "acleaned"]

    def test_its_error(self, mode):
        """The error of a cleanup that `run` does is raised in the flow, and the cleanup does not run again."""
        calls = []

        def fail():
            calls.append("sync")
            raise OSError("cannot clean")

        async def afail():
            await checkpoint()
            fail()

        def cleaning(request, call_next):
            ending = request.call.on_end(fail, afail)
            response = yield from call_next(request)
            with pytest.raises(OSError, match="cannot clean"):
                yield from ending.run()
            yield from ending.run()
            return response

        ran = run(mode, scripted(mode, "a"), [cleaning], REQUEST)
        assert ran.error is None
        assert calls == ["sync"]

    def test_withdraw(self, mode):
        """A cleanup that was withdrawn does not run; a second withdrawal does nothing."""
        log = []

        def cleaning(request, call_next):
            ending = request.call.on_end(partial(log.append, "cleaned"))
            response = yield from call_next(request)
            ending.withdraw()
            ending.withdraw()
            yield from ending.run()
            return response

        run(mode, scripted(mode, "a"), [Cleaning(log), cleaning], REQUEST)
        assert log == ["ended", "cleaned" if mode.backend is None else "acleaned"]

    def test_a_deadline_does_not_cut_it_off(self, backend):
        """A slot is given back, although the deadline of the call passes meanwhile, or has passed."""
        log = []

        async def agive():
            await clock.asleep(5)
            log.append("agiven")

        def late(request, call_next):
            response = yield from call_next(request)
            clock.advance(9)
            return response

        async def main(inner):
            stack = [Deadline(3), limited(lambda: None, partial(log.append, "given"), agive), *inner]
            await AsyncPipeline(AsyncScriptedProvider("a"), stack, clock=clock).complete(REQUEST)

        for inner in ([], [late]):
            clock = VirtualClock()
            anyio.run(main, inner, backend=backend)
        assert log == ["agiven", "agiven"]

    def test_a_cancellation_does_not_cut_it_off(self, backend):
        """The cancellation goes on after the cleanup, which does not run again."""
        log = []
        scope = None

        async def agive():
            log.append("begun")
            scope.cancel()
            await checkpoint()
            log.append("agiven")

        async def main():
            nonlocal scope
            stack = [limited(lambda: None, partial(log.append, "given"), agive)]
            with anyio.CancelScope() as scope:
                await AsyncPipeline(AsyncScriptedProvider("a"), stack).complete(REQUEST)
                await checkpoint()
            assert scope.cancelled_caught

        anyio.run(main, backend=backend)
        assert log == ["begun", "agiven"]

    def test_a_cancellation_by_asyncio_does_not_cut_it_off(self):
        """So it is with a cancellation of asyncio's own."""
        log = []

        async def call(time_passes):
            async def agive():
                log.append("begun")
                time_passes()
                await asyncio.sleep(0.01)
                log.append("agiven")

            stack = [limited(lambda: None, partial(log.append, "given"), agive)]
            await AsyncPipeline(AsyncScriptedProvider("a"), stack).complete(REQUEST)

        async def main():
            with pytest.raises(TimeoutError):
                await timed_out(call)
            assert asyncio.current_task().cancelling() == 0

        asyncio.run(main())
        assert log == ["begun", "agiven"]


class TestFailures:
    def test_an_error_changes_nothing(self, mode, reports):
        """An error of a cleanup is reported once, and neither the answer nor other cleanups suffer from it."""

        def fail():
            log.append("failed")
            raise OSError("cannot clean")

        async def afail():
            fail()

        def failing(request, call_next):
            request.call.on_end(fail, afail)
            return (yield from call_next(request))

        for _ in range(2):
            log = []
            ran = run(mode, scripted(mode, "fine"), [Cleaning(log), failing], REQUEST)
            assert ran.error is None
            assert log == ["ended", "failed", "cleaned" if mode.backend is None else "acleaned"]
        (report,) = reports()
        assert re.fullmatch(
            r"fluxibly: the cleanup .*fail of a middleware \(on_end\) raised OSError; the call is .*", report
        )

    def test_the_error_of_the_call_stays(self, mode):
        """A call that failed fails with its own error."""

        def failing(request, call_next):
            request.call.on_end(partial(int, "x"))
            return (yield from call_next(request))

        ran = run(mode, scripted(mode, [ServerError("mine")]), [failing], REQUEST)
        assert type(ran.error) is ServerError

    def test_sys_exit(self, reports):
        """A cleanup in a thread of a sync call does not keep the others from running, whatever it raises."""
        log = []

        def leaving(request, call_next):
            request.call.on_end(sys.exit)
            return (yield from call_next(request))

        assert Pipeline(ScriptedProvider("fine"), [Cleaning(log), leaving]).complete(REQUEST).text == "fine"
        assert log == ["ended", "cleaned"]
        assert "raised SystemExit" in reports()[0]

    def test_a_cancellation_of_its_own(self):
        """A cleanup that awaits a cancelled task does not cancel the call, and the others run."""
        outer = Cleaning([])

        async def awaits_a_cancelled_task():
            task = asyncio.ensure_future(asyncio.sleep(LONG))
            task.cancel()
            await task

        def cleaning(request, call_next):
            request.call.on_end(lambda: None, awaits_a_cancelled_task)
            return (yield from call_next(request))

        async def main():
            assert (await AsyncPipeline(AsyncScriptedProvider("a"), [outer, cleaning]).complete(REQUEST)).text == "a"

        asyncio.run(main())
        assert outer.cleaned.wait(LONG)

    @pytest.mark.parametrize("wrong", ["sync", "async"])
    def test_functions_of_the_wrong_kind(self, backend, reports, wrong):
        """A function that gives back a coroutine where it should not, or none where it should, is reported."""

        async def acall():
            raise AssertionError("expected no call")

        def cleaning(request, call_next):
            if wrong == "sync":
                request.call.on_end(lambda: acall())  # noqa: PLW0108  # a lambda hides that the function is async
            else:
                request.call.on_end(lambda: None, lambda: None)
            return (yield from call_next(request))

        async def main():
            await AsyncPipeline(AsyncScriptedProvider("a"), [cleaning]).complete(REQUEST)

        anyio.run(main, backend=backend)
        (report,) = reports()
        assert re.fullmatch(
            r"fluxibly: the cleanup .* of a middleware \(on_end\) raised TypeError; the call is .*", report
        )


class TestSlow:
    """Cleanups that take too long do not hold the caller up."""

    def test_a_cleanup_that_hangs(self, mode, soon, reports):
        """The caller goes on, it is reported, and the other cleanups run afterwards."""
        log, go_on = [], threading.Event()
        outer = Cleaning(log, "outer ")

        def cleaning(request, call_next):
            request.call.on_end(partial(go_on.wait, LONG))
            return (yield from call_next(request))

        ran = run(mode, scripted(mode, "fine"), [outer, cleaning], REQUEST)
        assert ran.error is None
        assert not go_on.is_set()
        assert reports() == [
            "fluxibly: the cleanups of a call (on_end) took longer than 0.1 s; the call went on",
        ]
        go_on.set()
        assert outer.cleaned.wait(LONG)

    def test_an_async_cleanup_that_hangs(self, backend, soon, reports):
        """An async cleanup is cancelled when its time is up; the others run by their sync functions."""
        log = []
        outer = Cleaning(log, "outer ")

        async def hang():
            try:
                await anyio.sleep(LONG)
            finally:
                log.append("cut off")

        def cleaning(request, call_next):
            request.call.on_end(lambda: None, hang)
            return (yield from call_next(request))

        async def main():
            await AsyncPipeline(AsyncScriptedProvider("a"), [outer, cleaning]).complete(REQUEST)

        anyio.run(main, backend=backend)
        assert outer.cleaned.wait(LONG)
        assert log == ["outer ended", "cut off", "outer cleaned"]
        assert len(reports()) == 1

    def test_a_cleanup_that_does_not_let_itself_be_cancelled(self, backend, soon, reports):
        """The caller goes on even if an async cleanup ignores that its time is up."""

        async def main():
            async def stubborn():
                with anyio.CancelScope(shield=True):
                    await done.wait()

            def cleaning(request, call_next):
                request.call.on_end(lambda: None, stubborn)
                return (yield from call_next(request))

            done = anyio.Event()
            await AsyncPipeline(AsyncScriptedProvider("a"), [cleaning]).complete(REQUEST)
            done.set()

        anyio.run(main, backend=backend)
        assert len(reports()) == 1


def here():
    """Return the event loop that runs this code, or trio's token."""
    import trio

    return trio.lowlevel.current_trio_token() if trio.lowlevel.in_trio_run() else asyncio.get_running_loop()


class TestWhere:
    def test_a_thread_of_a_sync_call(self):
        """A sync call runs its cleanups in a thread, with a copy of the context in which the flow ran."""
        seen = []

        def clean():
            seen.append((threading.current_thread() is threading.main_thread(), VAR.get()))
            VAR.set("the cleanup's")

        def cleaning(request, call_next):
            request.call.on_end(clean)
            return (yield from call_next(request))

        token = VAR.set("the caller's")
        try:
            pipeline = Pipeline(ScriptedProvider("a", "a"), [cleaning])
            pipeline.complete(REQUEST)
            list(pipeline.stream(REQUEST))
            assert VAR.get() == "the caller's"
        finally:
            VAR.reset(token)
        assert seen == [(False, "the caller's")] * 2

    @pytest.mark.parametrize("streaming", [False, True])
    def test_the_event_loop_of_an_async_call(self, backend, streaming):
        """An async call awaits its cleanups in its event loop, with a copy of the context in which the flow ran."""
        seen = []

        async def aclean():
            seen.append((here(), VAR.get()))
            VAR.set("the cleanup's")

        def cleaning(request, call_next):
            request.call.on_end(lambda: seen.append("sync"), aclean)
            return (yield from call_next(request))

        async def main():
            VAR.set("the caller's")
            pipeline = AsyncPipeline(AsyncScriptedProvider("a"), [cleaning])
            if streaming:
                assert [chunk.text async for chunk in pipeline.stream(REQUEST)] == ["a"]
            else:
                await pipeline.complete(REQUEST)
            assert seen == [(here(), "the caller's")]
            assert VAR.get() == "the caller's"

        anyio.run(main, backend=backend)

    def test_a_sync_cleanup_of_an_async_call(self, backend):
        """Without an async function the sync one runs in a worker thread."""
        seen = []

        def cleaning(request, call_next):
            request.call.on_end(lambda: seen.append((threading.get_ident(), VAR.get())))
            return (yield from call_next(request))

        async def main():
            VAR.set("the caller's")
            await AsyncPipeline(AsyncScriptedProvider("a"), [cleaning]).complete(REQUEST)
            assert seen[0][0] != threading.get_ident()
            assert seen[0][1] == "the caller's"

        anyio.run(main, backend=backend)

    def test_before_the_last_chunk_that_was_not_streamed(self):
        """An answer that comes whole at the end of a stream is delivered after the cleanups, for the flow has ended."""
        log = []

        def instead(request, call_next):
            response = yield from call_next(request)
            return response.evolve(text="instead")

        run(STREAMS[0], ScriptedProvider([]), [Cleaning(log), instead], REQUEST, watch=lambda c: log.append(c.text))
        assert log == ["ended", "cleaned", "instead"]


@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio warns about dropped generators
class TestDropping:
    """Streams that their consumer drops without closing them, and coroutines that nobody awaits to their end."""

    def test_a_sync_stream(self):
        """A dropped stream runs its cleanups then and there."""
        log = []
        stream = Pipeline(ScriptedProvider("a b"), [Cleaning(log)]).stream(REQUEST)
        next(stream)
        del stream
        assert log == ["ended", "cleaned"]

    def test_texts(self):
        """So does the generator of its texts."""
        log = []
        for _ in Pipeline(ScriptedProvider("a b"), [Cleaning(log)]).stream(REQUEST).texts():
            break
        assert log == ["ended", "cleaned"]

    def test_an_async_stream(self, backend):
        """An async stream that is dropped in its event loop runs its cleanups there, while the loop goes on."""
        log = []
        cleaning = Cleaning(log)

        async def main():
            stream = AsyncPipeline(Waits("a"), [cleaning]).stream(REQUEST)
            await anext(stream)
            del stream
            assert log == ["ended"]
            with anyio.fail_after(LONG):
                while not cleaning.cleaned.is_set():
                    await checkpoint()
            assert log == ["ended", "acleaned"]

        anyio.run(main, backend=backend)

    def test_an_unread_async_stream(self, backend):
        """So does one that was never read."""
        log = []
        cleaning = Cleaning(log)

        async def main():
            stream = AsyncPipeline(Waits("a"), [cleaning]).stream(REQUEST)
            del stream
            with anyio.fail_after(LONG):
                while not cleaning.cleaned.is_set():
                    await checkpoint()
            assert log == ["ended", "acleaned"]

        anyio.run(main, backend=backend)

    def test_by_another_thread(self, backend):
        """A stream that another thread drops runs its cleanups in its own event loop, with its own context."""
        seen = []
        done = threading.Event()

        async def aclean():
            await checkpoint()
            seen.append((here(), VAR.get()))
            done.set()

        def cleaning(request, call_next):
            request.call.on_end(lambda: seen.append("sync"), aclean)
            return (yield from call_next(request))

        async def main():
            VAR.set("the caller's")
            held = [AsyncPipeline(Waits("a"), [cleaning]).stream(REQUEST)]
            await anext(held[0])
            thread = threading.Thread(target=held.clear)
            thread.start()
            with anyio.fail_after(LONG):
                while not done.is_set():
                    await checkpoint()
            thread.join()
            assert seen == [(here(), "the caller's")]

        anyio.run(main, backend=backend)

    def test_after_the_end_of_its_loop(self, backend):
        """Once the event loop has ended, the sync function runs in a thread."""
        log, held = [], []

        async def main():
            held.append(AsyncPipeline(Waits("a"), [Cleaning(log)]).stream(REQUEST))
            await anext(held[0])

        anyio.run(main, backend=backend)
        assert log == []
        held.clear()
        assert log == ["ended", "cleaned"]

    def test_in_another_loop(self, backend):
        """A stream that is dropped in another event loop than its own, which has ended, does not hold that loop up."""
        held, go_on, done = [], threading.Event(), threading.Event()

        def clean():
            assert go_on.wait(LONG)
            done.set()

        def cleaning(request, call_next):
            request.call.on_end(clean)
            return (yield from call_next(request))

        async def first():
            held.append(AsyncPipeline(Waits("a"), [cleaning]).stream(REQUEST))
            await anext(held[0])

        async def second():
            held.clear()
            assert not done.is_set()

        anyio.run(first, backend=backend)
        anyio.run(second, backend=backend)
        go_on.set()
        assert done.wait(LONG)

    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
    def test_a_coroutine_that_is_closed(self, backend, streaming):
        """A call whose coroutine is closed where it waits runs its cleanups in the event loop."""
        log = []
        cleaning = Cleaning(log)

        async def main():
            pipeline = AsyncPipeline(Steps(), [cleaning])
            call = pipeline.stream(REQUEST).__anext__() if streaming else pipeline.complete(REQUEST)
            call.send(None)
            call.close()
            assert log == ["ended"]
            with anyio.fail_after(LONG):
                while not cleaning.cleaned.is_set():
                    await checkpoint()
            assert log == ["ended", "acleaned"]

        anyio.run(main, backend=backend)

    def test_a_coroutine_without_a_loop(self):
        """A call that is stepped by hand, and closed, runs its cleanups in a thread."""
        log = []
        call = AsyncPipeline(Steps(), [Cleaning(log)]).complete(REQUEST)
        call.send(None)
        call.close()
        assert log == ["ended", "cleaned"]


class Yield:
    def __await__(self):
        yield


class Steps:
    """An async provider whose wait suits any event loop, and none."""

    async def complete(self, request):
        await Yield()

    def stream(self, request):
        return self

    def __aiter__(self):
        return self

    async def __anext__(self):
        await Yield()


@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # as above
@pytest.mark.usefixtures("quick_collector")
class TestCollector:
    """No cleanup runs inside of the garbage collector."""

    @pytest.mark.parametrize("kind", ["stream", "texts"])
    def test_a_sync_stream(self, kind):
        """A stream that the collector finds runs its cleanups at the next call."""
        log = []
        pipeline = Pipeline(ScriptedProvider("a b", "c"), [Cleaning(log)])
        stream = pipeline.stream(REQUEST)
        held = stream if kind == "stream" else stream.texts()
        next(held)
        cycle = [held]
        cycle.append(cycle)
        del stream, held, cycle
        gc.collect()
        assert log == []
        pipeline.complete(REQUEST)
        assert log == ["ended", "cleaned"] * 2

    def test_an_async_stream(self, backend):
        """An async stream that the collector finds runs its cleanups after the next call has begun, in its loop."""
        log = []
        cleaning = Cleaning(log, "lost ")

        async def main():
            cycle = [AsyncPipeline(Waits("a"), [cleaning]).stream(REQUEST)]
            await anext(cycle[0])
            cycle.append(cycle)
            del cycle
            gc.collect()
            await checkpoint()
            assert log == []
            await AsyncPipeline(AsyncScriptedProvider("a")).complete(REQUEST)
            with anyio.fail_after(LONG):
                while not cleaning.cleaned.is_set():
                    await checkpoint()
            assert log == ["lost ended", "lost acleaned"]

        anyio.run(main, backend=backend)

    def test_a_coroutine(self):
        """A call that was never awaited to its end, and that the collector finds, runs its cleanups at the next call."""
        log = []
        call = AsyncPipeline(Steps(), [Cleaning(log)]).complete(REQUEST)
        call.send(None)
        cycle = [call]
        cycle.append(cycle)
        del call, cycle
        gc.collect()
        assert log == ["ended"]
        assert len(_abandoned.pending) == 1
        Pipeline(ScriptedProvider("a")).complete(REQUEST)
        assert log == ["ended", "cleaned"]


@pytest.mark.parametrize("how", ["sync", "asyncio", "trio"])
def test_streams_that_are_open_when_the_process_ends(how):
    """A stream that is never closed runs its cleanups before the process ends."""
    code = f"""
import anyio
from fluxibly import AsyncPipeline, Pipeline, Request
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider

def clean():
    print("cleaned", flush=True)

def cleaning(request, call_next):
    request.call.on_end(clean)
    return (yield from call_next(request))

async def main():
    global stream
    stream = AsyncPipeline(AsyncScriptedProvider("a b"), [cleaning]).stream(Request(model="m", messages="hi"))
    await anext(stream)

if {how!r} == "sync":
    stream = Pipeline(ScriptedProvider("a b"), [cleaning]).stream(Request(model="m", messages="hi"))
    next(stream)
else:
    anyio.run(main, backend={how!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleaned\n", "")


class TestAsk:
    """A cleanup that is registered within a question runs when the question ends."""

    def asking(self, log, through):
        def layer(request, call_next):
            try:
                yield from ask(request, through=through)
            except ServerError:
                log.append("failed")
            log.append("asked")
            return (yield from call_next(request))

        return layer

    @pytest.mark.parametrize("first", ["fine", [ServerError("no")]], ids=["answered", "failed"])
    def test_when_it_ends(self, mode, first):
        """Its cleanups run before the middleware that asked goes on."""
        log = []
        stack = [Cleaning(log, "call "), self.asking(log, [Cleaning(log, "question ")])]
        ran = run(mode, scripted(mode, first, "a"), stack, REQUEST)
        assert ran.error is None
        cleaned = "cleaned" if mode.backend is None else "acleaned"
        failed = ["failed"] if first != "fine" else []
        assert log == ["question ended", f"question {cleaned}", *failed, "asked", "call ended", f"call {cleaned}"]

    def test_when_it_is_cut_off(self, mode):
        """A question that is given up runs its cleanups with the call's, before those of the call."""

        def slow(request, call_next):
            yield from sleep(1)
            raise cut

        class Cut(BaseException):
            pass

        cut = Cut()
        log = []
        stack = [Cleaning(log, "call "), self.asking(log, [Cleaning(log, "question "), slow])]
        ran = run(mode, scripted(mode, "a", "b"), stack, REQUEST)
        assert ran.error is cut
        cleaned = "cleaned" if mode.backend is None else "acleaned"
        assert log == ["question ended", "call ended", f"question {cleaned}", f"call {cleaned}"]

    def test_when_it_is_cancelled(self, backend):
        """So does a question that is cancelled while it waits."""
        log = []
        stack = [Cleaning(log, "call "), self.asking(log, [Cleaning(log, "question ")])]

        async def main():
            with anyio.CancelScope() as scope:
                await make("whole", stack, scope.cancel)
            assert scope.cancelled_caught
            assert log == ["question ended", "call ended", "question acleaned", "call acleaned"]

        anyio.run(main, backend=backend)

    def test_run_within_it(self, mode):
        """A cleanup of a question may be done within its flow."""
        log = []

        async def agive():
            log.append("given")

        stack = [self.asking(log, [limited(lambda: None, partial(log.append, "given"), agive)])]
        run(mode, scripted(mode, "a", "b"), stack, REQUEST)
        assert log == ["given", "asked"]


class TestSlots:
    """A middleware with slots elsewhere takes and gives them back by I/O, in whichever mode, however the call ends."""

    @pytest.mark.parametrize(
        ("answer", "stop_after"),
        [("fine", None), ([ServerError("no")], None), (["a", ServerError("no")], None), ("a b", 1), ("a b", 0)],
        ids=["returned", "failed", "interrupted", "left", "unread"],
    )
    def test_each_slot_is_given_back_once(self, mode, answer, stop_after):
        """As many slots are given as were taken."""
        log = []

        def give():
            if log:
                log.append("given")

        async def agive():
            await checkpoint()
            give()

        stack = [limited(partial(log.append, "taken"), give, agive)]
        run(mode, scripted(mode, answer), stack, REQUEST, stop_after=stop_after if mode.streaming else None)
        assert log == (["taken", "given"] if stop_after != 0 or not mode.streaming else [])


class TestArguments:
    async def acall(self):
        raise AssertionError("expected no call")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((None,), "on_end: expected a sync function first, got None; write on_end(call, acall)"),
            ((None, print), "on_end: expected a sync function first, got None; write on_end(call, acall)"),
            ((5,), "on_end: expected a sync function first, got an int; write on_end(call, acall)"),
            ((print, 5), "on_end: expected an async function second, got an int; write on_end(call, acall)"),
        ],
        ids=repr,
    )
    def test_no_functions(self, arguments, message):
        """A value that is not a function is refused, and nothing is registered."""
        record = CallRecord()
        with pytest.raises(TypeError) as caught:
            record.on_end(*arguments)
        assert str(caught.value) == message
        assert not record.endings

    def test_an_async_function_first(self):
        """An async function in the first place is refused, also if it is hidden in a partial."""
        for function in (self.acall, partial(self.acall)):
            with pytest.raises(TypeError, match=r"expected a sync function first, got .*; write on_end\(call, acall\)"):
                CallRecord().on_end(function)
