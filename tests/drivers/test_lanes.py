"""The lanes of a call: providers and layers that misbehave in a branch, contexts, cleanups, and every kind of end."""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import threading
import time
import weakref
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace

import anyio
import anyio.lowlevel
import pytest
from support.leftovers import eventually, interrupt_until, nothing_left, threads
from support.powers import hedge, informed
from support.streams import REQUEST, Watch

from fluxibly.errors import ServerError, StreamInterrupted
from fluxibly.flow import ask, gather, perform, sleep
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import ScriptedProvider
from fluxibly.testing.modes import MODES

DELAY = 0.03
"""Seconds between two branches."""
LONG = 30.0
"""Seconds that no test lasts."""
AT_ONCE = 5.0
"""Seconds within which something happens at once, on a busy machine."""
VAR = ContextVar("VAR", default="nobody's")


SYNC = [mode for mode in MODES if mode.backend is None]
STREAMS = [mode for mode in MODES if mode.streaming]


def call(mode, provider, stack):
    """Make a call in a mode, with real time. Return its text."""
    if mode.backend is None:
        with Pipeline(provider, stack) as pipeline:
            if not mode.streaming:
                return pipeline.complete(REQUEST).text
            return "".join(chunk.text for chunk in pipeline.stream(REQUEST))

    async def main():
        async with AsyncPipeline(provider, stack) as pipeline:
            if not mode.streaming:
                return (await pipeline.complete(REQUEST)).text
            return "".join([chunk.text async for chunk in pipeline.stream(REQUEST)])

    return anyio.run(main, backend=mode.backend)


class Behaving:
    """A provider of any mode. Each of its `acts` is what it does at one request, in order of the requests.

    An act is a text to answer with, an exception to raise, a function to call, or WAIT. In a stream it comes after an
    item without output. The request with the number `breaks` raises an error when it ends.
    """

    def __init__(self, *acts, breaks=0):
        self.acts = iter(acts)
        self.breaks = breaks
        self.opened = self.closed = 0

    def begin(self):
        self.opened += 1
        return self.opened, next(self.acts)

    def end(self, number):
        self.closed += 1
        if number == self.breaks:
            raise OSError("at the end")


WAIT = object()


class Sync(Behaving):
    """A provider whose waits another thread can end, by the leash of the call or the stream's `abort`."""

    def complete(self, request):
        number, act = self.begin()
        ended = threading.Event()
        leash = request.call.leash
        if leash is not None:
            leash.hold(ended.set)
        try:
            return self.do(act, ended)
        finally:
            if leash is not None:
                leash.release(ended.set)
            self.end(number)

    def do(self, act, ended):
        if act is WAIT:
            assert ended.wait(LONG)
            raise ConnectionAbortedError
        if isinstance(act, BaseException):
            raise act
        return act() if callable(act) else act

    def stream(self, request):
        return Items(self, *self.begin())


class Items:
    """A stream of `Sync`."""

    def __init__(self, provider, number, act):
        self.provider = provider
        self.number = number
        self.ended = threading.Event()
        self.acts = iter(["", act])

    def __iter__(self):
        return self

    def __next__(self):
        for act in self.acts:
            return self.provider.do(act, self.ended)
        raise StopIteration

    def abort(self):
        self.ended.set()

    def close(self):
        self.provider.end(self.number)


class Async(Behaving):
    """The same for event loops."""

    async def complete(self, request):
        number, act = self.begin()
        try:
            return await self.do(act)
        finally:
            self.end(number)

    async def do(self, act):
        if act is WAIT:
            await anyio.sleep(LONG)
        if isinstance(act, BaseException):
            raise act
        if not callable(act):
            return act
        outcome = act()
        return outcome if isinstance(outcome, str) else await outcome

    async def stream(self, request):
        number, act = self.begin()
        try:
            yield ""
            yield await self.do(act)
        finally:
            self.end(number)


def behaving(mode, *acts, breaks=0):
    return (Sync if mode.backend is None else Async)(*acts, breaks=breaks)


def closed(provider):
    """Whether all that was opened at a provider is closed soon."""
    return eventually(lambda: provider.opened == provider.closed)


class Layer(Watch):
    """A middleware that records how each of its flows ends, and then does something of its own."""

    def __init__(self, *acts):
        super().__init__()
        self.acts = iter(acts)

    def __call__(self, request, call_next):
        act = next(self.acts, None)
        try:
            return (yield from super().__call__(request, call_next))
        finally:
            if isinstance(act, BaseException):
                raise act
            if act is not None:
                yield from act()


def in_mode(backend, streaming):
    """Return a mode."""
    return next(mode for mode in MODES if (mode.backend, mode.streaming) == (backend, streaming))


STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])


class TestProviders:
    @STREAMING
    def test_a_sync_provider_in_an_async_pipeline(self, backend, streaming):
        """It runs on unseen in its thread, and the call does not wait for it."""
        gate, done = threading.Event(), threading.Event()

        def slow():
            gate.wait(LONG)
            return ""

        def watched(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                done.set()

        def open_gate():
            done.wait(LONG)
            gate.set()

        provider = Sync(slow, "answer")
        threading.Thread(target=open_gate).start()
        with nothing_left():
            assert call(in_mode(backend, streaming), provider, [watched, hedge(DELAY)]) == "answer"
            assert closed(provider)

    def test_a_leash_ends_a_sync_provider_in_an_async_pipeline(self, backend):
        """A provider that holds its end in the leash is ended in its thread too."""
        provider = Sync(WAIT, "answer")
        assert call(in_mode(backend, False), provider, [hedge(DELAY)]) == "answer"
        assert closed(provider)

    @STREAMING
    def test_a_provider_that_is_slow_to_be_cancelled(self, backend, streaming):
        """The call waits for the tasks of its losers, so it leaves none behind."""
        ended = []

        async def stubborn():
            try:
                await anyio.sleep(LONG)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.2)
                ended.append(1)

        provider = Async(stubborn, "answer")
        assert call(in_mode(backend, streaming), provider, [hedge(DELAY)]) == "answer"
        assert (ended, provider.closed) == ([1], 2)

    @pytest.mark.parametrize("cancels", [1, 2, 3])
    def test_cancelled_again_while_it_is_slow_to_be_cancelled(self, cancels):
        """Further cancellations of the call do not keep it from waiting for its tasks."""

        async def stubborn():
            try:
                await asyncio.sleep(LONG)
            finally:
                await asyncio.sleep(0.2)

        async def main():
            provider = Async(stubborn, stubborn)
            task = asyncio.ensure_future(AsyncPipeline(provider, [hedge(DELAY)]).complete(REQUEST))
            await asyncio.sleep(4 * DELAY)
            for _ in range(cancels):
                task.cancel()
                await asyncio.sleep(0.02)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert provider.opened == provider.closed > 0

        asyncio.run(main())

    def test_an_error_at_the_end_of_a_loser(self, mode):
        """An error that the provider raises when it is closed, or ended, is nobody's."""
        provider = behaving(mode, WAIT, "answer", breaks=1)
        assert call(mode, provider, [hedge(DELAY)]) == "answer"
        assert closed(provider)

    @pytest.mark.parametrize(
        ("mode", "kind"),
        [
            *itertools.product(MODES, [SystemExit, asyncio.CancelledError]),
            *itertools.product(SYNC, [KeyboardInterrupt]),  # an event loop takes it for Ctrl-C
        ],
        ids=str,
    )
    def test_a_base_exception(self, mode, kind):
        """It passes unchanged, though another branch goes on; all layers end, and all is closed."""
        error = kind("mine")
        provider, layer = behaving(mode, WAIT, error), Layer()
        with nothing_left(), pytest.raises(kind) as caught:
            call(mode, provider, [hedge(DELAY), layer])
        assert caught.value is error or mode.backend == "asyncio"
        assert not getattr(caught.value, "__notes__", [])
        assert layer.ends == [kind.__name__] * 2
        assert closed(provider)

    # A StopIteration ends the stream of a sync provider.
    @pytest.mark.parametrize("mode", [mode for mode in MODES if mode.backend or not mode.streaming], ids=str)
    def test_stop_iteration(self, mode):
        """It would end a generator, so it is an error like any other."""
        error = StopIteration("mine")
        provider = behaving(mode, error, "answer")
        assert call(mode, provider, [hedge(LONG)]) == "answer"
        provider = behaving(mode, StopIteration("mine"), ServerError("later"))
        with pytest.raises(RuntimeError, match="StopIteration"):
            call(mode, provider, [hedge(LONG)])

    @pytest.mark.parametrize("mode", SYNC, ids=str)
    @pytest.mark.parametrize("fails", [1, 2])
    def test_a_thread_that_does_not_start(self, mode, monkeypatch, fails):
        """The branch fails, and another goes on; if none can, the error says why."""
        start, number = threading.Thread.start, itertools.count(1)

        def limited_start(thread):
            if thread.name == "fluxibly-lane" and next(number) <= fails:
                raise RuntimeError("can't start new thread")
            start(thread)

        provider, layer = Sync("answer"), Layer()
        with nothing_left(), monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", limited_start)
            if fails == 1:
                assert call(mode, provider, [hedge(LONG), layer]) == "answer"
                assert layer.ends == ["RuntimeError", "returned"]
            else:
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    call(mode, provider, [hedge(LONG), layer])
                assert layer.ends == ["RuntimeError"] * 2
        assert closed(provider)


class TestLayers:
    def test_an_error_in_the_finally_of_a_loser(self, mode, caplog):
        """It is logged, and the call goes on."""
        provider, layer = behaving(mode, WAIT, "answer"), Layer(ValueError("mine"))
        assert call(mode, provider, [hedge(DELAY), layer]) == "answer"
        assert "a middleware raised ValueError while a branch of a race was given up" in caplog.text
        assert sorted(layer.ends) == ["GeneratorExit", "returned"]
        assert closed(provider)

    def test_a_loser_that_yields_in_its_finally(self, mode, caplog):
        """So is a layer that goes on though it was given up."""
        provider, layer = behaving(mode, WAIT, "answer"), Layer(partial(sleep, 0.0))
        assert call(mode, provider, [hedge(DELAY), layer]) == "answer"
        assert "Layer.__call__ yielded again after GeneratorExit" in caplog.text
        assert sorted(layer.ends) == ["GeneratorExit", "returned"]
        assert closed(provider)

    @pytest.mark.parametrize("races", [0, 1, 2])
    @pytest.mark.parametrize("kind", [Pipeline, AsyncPipeline])
    def test_a_winner_that_yields_in_its_finally(self, kind, races, caplog):
        """A consumer that leaves the winner's stream gets no error, as without a race, and the layer is named."""
        provider, layer = ScriptedProvider("one two", "one two"), Layer(partial(sleep, 0.0))
        pipeline = kind(provider, [*[hedge(LONG)] * races, layer])

        async def leave():
            async with pipeline.stream(REQUEST) as stream:
                assert (await anext(aiter(stream))).text == "one"

        if kind is AsyncPipeline:
            anyio.run(leave)
        else:
            with pipeline.stream(REQUEST) as stream:
                assert next(iter(stream)).text == "one"
        assert "Layer.__call__ yielded again after GeneratorExit" in caplog.text
        assert layer.ends == ["GeneratorExit"]
        assert closed(provider)

    @pytest.mark.parametrize("races", [1, 2])
    @pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
    def test_a_layer_that_yields_no_effect(self, mode, races, before):
        """The error names the layer within the race, before its output and after it."""

        def rubbish(request, call_next):
            if before:
                yield "rubbish"
            response = yield from call_next(request)
            yield "rubbish"
            return response

        provider = behaving(mode, *["answer"] * 4)
        with pytest.raises((TypeError, StreamInterrupted)) as caught:
            call(mode, provider, [*[hedge(LONG)] * races, rubbish])
        error = caught.value.__cause__ if isinstance(caught.value, StreamInterrupted) else caught.value
        assert "<locals>.rubbish yielded a str" in str(error)

    def test_errors_in_a_race_that_is_given_up(self, mode):
        """A race that loses ends all of its branches, and keeps their cleanups, though a layer of one raises an error."""
        provider, layer, given = behaving(mode, WAIT, WAIT, WAIT, "answer"), Layer(*[ValueError("mine")] * 3), []

        numbers = itertools.count(1)

        def cleaning(request, call_next):
            number = next(numbers)
            request.call.on_end(lambda: given.append(number))
            return (yield from call_next(request))

        assert call(mode, provider, [hedge(6 * DELAY), hedge(4 * DELAY), cleaning, layer]) == "answer"
        assert sorted(layer.ends) == ["GeneratorExit"] * 3 + ["returned"]
        assert sorted(given) == [1, 2, 3, 4]
        assert closed(provider)

    def test_errors_when_the_call_is_cancelled(self, backend):
        """A layer that fails, or goes on, when the call is cancelled replaces nothing."""
        provider, layer, watch = Async(WAIT, WAIT), Layer(ValueError("mine"), partial(sleep, 0.0)), Watch()

        async def main():
            with anyio.move_on_after(4 * DELAY) as scope:
                await AsyncPipeline(provider, [watch, hedge(DELAY), layer]).complete(REQUEST)
            assert scope.cancelled_caught

        anyio.run(main, backend=backend)
        assert set(watch.ends) <= {"CancelledError", "Cancelled"}
        assert len(layer.ends) == 2
        assert provider.closed == 2


class TestCtrlC:
    def interrupted(self, *flows):
        """Run flows side by side in a sync call, and interrupt it while they wait. Return the layer's log."""
        layer, over = Layer(), threading.Event()

        def all_at_once(request, call_next):
            threading.Thread(target=interrupt_until, args=(over,)).start()
            yield from gather(request, *[flow() for flow in flows])
            raise AssertionError

        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt) as caught:
            Pipeline(Sync(), [layer, all_at_once]).complete(REQUEST)
        over.set()
        assert time.monotonic() - began < LONG / 2
        assert not getattr(caught.value, "__notes__", [])
        assert layer.ends == ["KeyboardInterrupt"]

    def test_while_functions_run(self):
        """The functions run on unseen."""
        gate = threading.Event()
        try:
            self.interrupted(*[partial(perform, partial(gate.wait, LONG))] * 3)
        finally:
            gate.set()
        assert eventually(lambda: not threads())

    def test_while_all_sleep(self):
        """A lane that sleeps has no thread."""
        self.interrupted(*[partial(sleep, LONG)] * 3)
        assert threads() == []

    def test_while_a_layer_sleeps(self):
        """The layers of each branch end."""
        layer, over = Layer(), threading.Event()

        def slow(request, call_next):
            yield from sleep(LONG)

        threading.Thread(target=interrupt_until, args=(over,)).start()
        with nothing_left(), pytest.raises(KeyboardInterrupt):
            Pipeline(Sync(), [hedge(0.0), layer, slow]).complete(REQUEST)
        over.set()
        assert layer.ends == ["KeyboardInterrupt"] * 2


class TestGather:
    def test_a_cancellation(self, backend):
        """The I/O of the middleware is cancelled, and its tasks are gone."""
        log = []

        async def slow():
            try:
                await anyio.sleep(LONG)
            finally:
                log.append("ended")

        async def main():
            provider = Async(WAIT)
            with anyio.move_on_after(4 * DELAY) as scope:
                await AsyncPipeline(provider, [informed(str, slow)]).complete(REQUEST)
            assert (scope.cancelled_caught, log, provider.closed) == (True, ["ended"], 1)

        anyio.run(main, backend=backend)

    def test_asyncio_timeout(self):
        """The task is as it was before."""

        async def main():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(4 * DELAY):
                    await AsyncPipeline(Async(WAIT), [informed(str, partial(asyncio.sleep, LONG))]).complete(REQUEST)
            assert asyncio.current_task().cancelling() == 0
            await asyncio.sleep(0)
            assert len(asyncio.all_tasks()) == 1

        asyncio.run(main())

    def test_the_first_error(self, mode):
        """It ends the others at once."""
        layer = Layer()

        def fail():
            raise LookupError("mine")

        async def afail():
            raise LookupError("mine")

        def both(request, call_next):
            yield from gather(request, sleep(LONG), perform(fail, afail))

        began = time.monotonic()
        with nothing_left(), pytest.raises(LookupError, match="mine"):
            call(mode, behaving(mode), [layer, both])
        assert time.monotonic() - began < LONG / 2
        assert layer.ends == ["LookupError"]


class Hand:
    """A coroutine that is stepped by hand, and closed."""

    def __init__(self, streaming, provider, *stack):
        pipeline = AsyncPipeline(provider, stack)
        self.coroutine = pipeline.stream(REQUEST).__anext__() if streaming else pipeline.complete(REQUEST)

    async def begin(self):
        self.coroutine.send(None)
        await anyio.sleep(2 * DELAY)


class TestClosedCoroutines:
    @pytest.mark.parametrize("delay", [0.0, LONG])
    @STREAMING
    def test_while_it_waits(self, streaming, delay):
        """A call whose coroutine is closed where it waits ends its layers there, and its tasks in the event loop."""

        async def main():
            provider, layer = Async(WAIT, WAIT), Layer()
            hand = Hand(streaming, provider, hedge(delay), layer)
            await hand.begin()
            hand.coroutine.close()
            assert set(layer.ends) == {"GeneratorExit"}
            await asyncio.sleep(DELAY)
            assert provider.opened == provider.closed > 0
            assert len(asyncio.all_tasks()) == 1

        asyncio.run(main())

    def test_layers_that_fail(self):
        """An error of a layer is raised by `close`, and all branches have ended."""

        async def main():
            provider, layer = Async(WAIT, WAIT), Layer(ValueError("first"), ValueError("second"))
            hand = Hand(False, provider, hedge(0.0), layer)
            hand.coroutine.send(None)  # the first branch waits, and the time of the second has come
            await asyncio.sleep(DELAY)
            with pytest.raises(ValueError, match=r"first|second"):
                hand.coroutine.close()
            assert set(layer.ends) == {"GeneratorExit"}
            await asyncio.sleep(DELAY)
            assert provider.opened == provider.closed
            assert len(asyncio.all_tasks()) == 1

        asyncio.run(main())

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # about tasks that were destroyed
    def test_after_the_end_of_the_loop(self):
        """A task that the end of its event loop left behind ends its layers when it is collected."""
        layer, raised = Layer(), []
        loop = asyncio.new_event_loop()
        hook, sys.unraisablehook = sys.unraisablehook, lambda told: raised.append(type(told.exc_value))
        try:

            async def main():
                call = AsyncPipeline(Async(WAIT, WAIT), [hedge(LONG), layer]).complete(REQUEST)
                held.append(asyncio.ensure_future(call))
                await asyncio.sleep(DELAY)

            held = []
            loop.set_exception_handler(lambda *_: None)
            loop.run_until_complete(main())
            loop.close()
            left = weakref.ref(held.pop())
            gc.collect()
            assert left() is None
        finally:
            sys.unraisablehook = hook
        assert layer.ends == ["GeneratorExit"]
        assert RuntimeError not in raised


class TestFrames:
    def test_a_loser_is_freed(self, backend):
        """Nothing refers to what a loser held, without the garbage collector."""

        class Held:
            pass

        async def main():
            kept = []

            async def wait():
                held = Held()
                kept.append(weakref.ref(held))
                await anyio.sleep(LONG)

            gc.disable()
            try:
                assert (await AsyncPipeline(Async(wait, "answer"), [hedge(DELAY)]).complete(REQUEST)).text == "answer"
                await anyio.sleep(DELAY)
                assert kept[0]() is None
            finally:
                gc.enable()

        anyio.run(main, backend=backend)

    @pytest.mark.parametrize(
        "layer",
        [hedge(LONG), lambda request, _: gather(request, ask(request), ask(request)), lambda request, _: ask(request)],
        ids=["race", "gather", "ask"],
    )
    def test_a_call_that_fails_is_freed(self, layer):
        """So is what belongs to the branches of a call that fails, and to its questions."""
        kept = []

        class Held(ValueError):
            def __init__(self):
                kept.append(weakref.ref(self))

        def complete(request):
            raise Held

        gc.disable()
        try:
            with suppress(Held):
                Pipeline(SimpleNamespace(complete=complete), [layer]).complete(REQUEST)
            assert kept
            assert eventually(lambda: all(error() is None for error in kept))
        finally:
            gc.enable()


class TestContexts:
    def test_who_sees_what(self, mode):
        """A branch sees the variables of the layers around it and its own; nobody else sees what is set in it."""
        seen = {}

        def note(who):
            seen.setdefault(who, []).append(VAR.get())

        def outside(request, call_next):
            token = VAR.set("outside")
            try:
                response = yield from call_next(request)
            finally:
                note("outside, afterwards")
                VAR.reset(token)
            return response

        numbers = itertools.count(1)

        def inside(request, call_next):
            name = f"branch {next(numbers)}"
            note("branch, before")
            token = VAR.set(name)
            try:
                return (yield from call_next(request))
            finally:
                assert VAR.get() == name
                VAR.reset(token)

        def answer():
            note("provider")
            VAR.set("of the provider")
            return "answer"

        def fail():
            note("provider")
            VAR.set("of the provider")
            raise ServerError("mine")

        def consume():
            assert VAR.get() == "nobody's"

        provider = behaving(mode, fail, answer)
        if mode.backend is None:
            if mode.streaming:
                for _ in Pipeline(provider, [outside, hedge(LONG), inside]).stream(REQUEST):
                    consume()
            else:
                Pipeline(provider, [outside, hedge(LONG), inside]).complete(REQUEST)
            consume()
        else:

            async def main():
                pipeline = AsyncPipeline(provider, [outside, hedge(LONG), inside])
                if mode.streaming:
                    async for _ in pipeline.stream(REQUEST):
                        consume()
                else:
                    await pipeline.complete(REQUEST)
                consume()

            anyio.run(main, backend=mode.backend)
        assert seen == {
            "branch, before": ["outside"] * 2,
            "provider": ["branch 1", "branch 2"],
            "outside, afterwards": ["outside"],
        }

    @pytest.mark.parametrize("mode", STREAMS, ids=str)
    def test_a_stream_keeps_its_context(self, mode):
        """The provider's stream of the winner runs in one context, though it changes threads or tasks; so does a loser's."""
        seen = []

        class SyncStream:
            def stream(self, request):
                VAR.set("of the stream")
                try:
                    for text in ("", "a", "b", "c"):
                        yield text
                        seen.append(VAR.get())
                finally:
                    seen.append(f"closed: {VAR.get()}")

        class AsyncStream:
            async def stream(self, request):
                VAR.set("of the stream")
                try:
                    for text in ("", "a", "b", "c"):
                        yield text
                        seen.append(VAR.get())
                        await anyio.lowlevel.checkpoint()
                finally:
                    seen.append(f"closed: {VAR.get()}")

        provider = SyncStream() if mode.backend is None else AsyncStream()
        assert call(mode, provider, [hedge(LONG)]) == "abc"
        assert seen == ["of the stream"] * 4 + ["closed: of the stream"]


class TestCleanups:
    def test_when_they_run(self, mode):
        """Those of a loser run when it is dropped, those of the winner at the end of the call, each once."""
        log, numbers = [], itertools.count(1)

        def cleaning(request, call_next):
            number = next(numbers)

            def clean():
                log.append(f"cleaned {number}")

            request.call.on_end(clean)
            return (yield from call_next(request))

        def answer():
            log.append("answered")
            return "answer"

        def outer(request, call_next):
            request.call.on_end(lambda: log.append("cleaned outer"))
            response = yield from call_next(request)
            log.append("race won")
            return response

        assert call(mode, behaving(mode, WAIT, answer), [outer, hedge(DELAY), cleaning]) == "answer"
        assert log == ["answered", "cleaned 1", "race won", "cleaned 2", "cleaned outer"]

    def test_after_a_failure(self, mode):
        """If all fail, all have run when the error is raised, each once."""
        log, numbers = [], itertools.count(1)

        def cleaning(request, call_next):
            number = next(numbers)
            request.call.on_end(lambda: log.append(number))
            return (yield from call_next(request))

        provider = behaving(mode, ServerError("first"), ServerError("second"))
        with pytest.raises(ServerError, match="first"):
            call(mode, provider, [hedge(LONG), cleaning])
        assert sorted(log) == [1, 2]

    def test_after_a_cancellation(self, backend):
        """So they have when the call is cancelled."""
        log, numbers = [], itertools.count(1)

        def cleaning(request, call_next):
            number = next(numbers)

            async def clean():
                log.append(number)

            request.call.on_end(lambda: None, clean)
            return (yield from call_next(request))

        async def main():
            with anyio.move_on_after(4 * DELAY):
                await AsyncPipeline(Async(WAIT, WAIT), [hedge(DELAY), cleaning]).complete(REQUEST)
            assert sorted(log) == [1, 2]

        anyio.run(main, backend=backend)
