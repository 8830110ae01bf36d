"""`sleep(seconds, until=signal)`: a wait that a signal ends, wherever it is, and that leaves nothing behind."""

from __future__ import annotations

import threading
import time

import anyio
import pytest

from fluxibly import Signal, gather, race, sleep
from fluxibly.errors import DeadlineExceeded
from fluxibly.limits import Leash
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, ByHand, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import BACKENDS, run_async
from fluxibly.types import Request

REQUEST = Request(model="m", messages="Hi")
WAYS = ("sync", *BACKENDS)
SOON, NEVER = 0.03, 20.0


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


def make(way, middleware, streaming, *, clock=None):
    """Make a call in real time, or in that of a clock. Return the seconds that it took."""
    options = {} if clock is None else {"clock": clock}
    began = time.perf_counter()
    if way == "sync":
        pipeline = Pipeline(ScriptedProvider(*["fine"] * 3), [middleware], **options)
        if streaming:
            with pipeline.stream(REQUEST) as stream:
                assert "".join(chunk.text for chunk in stream) == "fine"
        else:
            assert pipeline.complete(REQUEST).text == "fine"
    else:

        async def main():
            pipeline = AsyncPipeline(AsyncScriptedProvider(*["fine"] * 3), [middleware], **options)
            if streaming:
                async with pipeline.stream(REQUEST) as stream:
                    assert "".join([chunk.text async for chunk in stream]) == "fine"
            else:
                assert (await pipeline.complete(REQUEST)).text == "fine"

        run_async(main, way)
    return time.perf_counter() - began


def set_soon(signal):
    threading.Timer(SOON, signal.set).start()


@pytest.mark.parametrize("streaming", [False, True])
class TestInACall:
    def waiting(self, signal, seconds, results):
        def layer(request, call_next):
            results.append((yield from sleep(seconds, until=signal)))
            return (yield from call_next(request))

        return layer

    def test_set_from_another_thread(self, way, streaming):
        """It ends the wait, which says so, and nobody is left waiting."""
        signal, results = Signal(), []
        set_soon(signal)
        assert make(way, self.waiting(signal, NEVER, results), streaming) < 5
        assert (results, len(signal._waiters)) == ([True], 0)

    def test_set_before(self, way, streaming):
        signal, results = Signal(), []
        signal.set()
        assert make(way, self.waiting(signal, NEVER, results), streaming) < 5
        assert (results, len(signal._waiters)) == ([True], 0)

    def test_never_set(self, way, streaming):
        signal, results = Signal(), []
        assert make(way, self.waiting(signal, SOON, results), streaming) >= SOON
        assert (results, len(signal._waiters)) == ([False], 0)

    def test_without_a_signal(self, way, streaming):
        results = []
        make(way, self.waiting(None, 0, results), streaming)
        assert results == [False]

    def test_in_virtual_time(self, way, streaming):
        """All of the time passes, unless the signal is set already."""
        for is_set, time_passed in ((False, NEVER), (True, 0)):
            signal, results, clock = Signal(), [], VirtualClock()
            if is_set:
                signal.set()
            make(way, self.waiting(signal, NEVER, results), streaming, clock=clock)
            assert (results, clock.now()) == ([is_set], time_passed)

    def test_a_deadline_that_passes_first(self, way, streaming):
        signal = Signal()

        def layer(request, call_next):
            request.call.leash = Leash(deadline=request.call.clock() + SOON)
            try:
                yield from sleep(NEVER, until=signal)
            finally:
                request.call.leash = None
            return (yield from call_next(request))

        with pytest.raises(DeadlineExceeded):
            make(way, layer, streaming)
        assert len(signal._waiters) == 0

    def test_a_signal_before_the_deadline(self, way, streaming):
        signal, results = Signal(), []
        set_soon(signal)

        def layer(request, call_next):
            request.call.leash = Leash(deadline=request.call.clock() + 15)
            results.append((yield from sleep(NEVER, until=signal)))
            request.call.leash = None
            return (yield from call_next(request))

        assert make(way, layer, streaming) < 5
        assert results == [True]


class TestInLanes:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_of_a_race(self, way, streaming):
        """A branch that waits for a signal goes on when it is set; the other is given up, and forgets its own."""
        signal, other = Signal(), Signal()
        set_soon(signal)

        def branch(request, call_next):
            mine = signal if request.metadata["which"] == 0 else other
            assert (yield from sleep(NEVER, until=mine))
            return (yield from call_next(request))

        def layer(request, call_next):
            requests = [request.evolve(metadata={"which": which}) for which in (1, 0)]
            return (yield from race(lambda request: branch(request, call_next), requests, delay=0))

        assert make(way, layer, streaming) < 5
        assert (len(signal._waiters), len(other._waiters)) == (0, 0)

    def test_of_gather(self, way):
        """Set by a thread, set before, and not set in time."""
        soon, before, never = Signal(), Signal(), Signal()
        set_soon(soon)
        before.set()
        results = []

        def layer(request, call_next):
            waits = (sleep(NEVER, until=soon), sleep(NEVER, until=before), sleep(SOON, until=never), sleep(SOON))
            results.extend((yield from gather(request, *waits)))
            return (yield from call_next(request))

        assert make(way, layer, streaming=False) < 5
        assert results == [True, True, False, False]
        assert [len(signal._waiters) for signal in (soon, before, never)] == [0, 0, 0]

    def test_set_by_another_branch(self, way):
        """Also in virtual time, where a branch sees the signal that another has set."""
        for clock in (None, VirtualClock()):
            signal, results = Signal(), []

            def setting(signal=signal):
                yield from sleep(SOON)
                signal.set()

            def layer(request, call_next, signal=signal, results=results, setting=setting):
                results.extend((yield from gather(request, sleep(NEVER, until=signal), setting())))
                return (yield from call_next(request))

            assert make(way, layer, streaming=False, clock=clock) < 5
            assert results == [True, None]
            if clock is not None:
                assert clock.now() == SOON

    @pytest.mark.parametrize("virtual", [False, True])
    def test_a_deadline_that_passes_first(self, way, virtual):
        signal = Signal()

        def layer(request, call_next):
            request.call.leash = Leash(deadline=request.call.clock() + SOON)
            try:
                yield from gather(request, sleep(NEVER, until=signal), sleep(NEVER))
            finally:
                request.call.leash = None
            return (yield from call_next(request))

        with pytest.raises(DeadlineExceeded):
            make(way, layer, streaming=False, clock=VirtualClock() if virtual else None)
        assert len(signal._waiters) == 0

    def test_a_failure_of_another_branch(self, way):
        """A lane that is dropped forgets its signal."""
        signal = Signal()

        def fails():
            yield from sleep(SOON)
            raise ValueError("mine")

        def layer(request, call_next):
            yield from gather(request, sleep(NEVER, until=signal), fails())
            return (yield from call_next(request))

        with pytest.raises(ValueError, match="mine"):
            make(way, layer, streaming=False)
        assert len(signal._waiters) == 0

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_cancellation(self, backend):
        """A task that is cancelled forgets its signal, in a call and in a lane."""
        for lanes in (False, True):
            signal = Signal()

            def layer(request, call_next, signal=signal, lanes=lanes):
                wait = sleep(NEVER, until=signal)
                yield from gather(request, wait, sleep(NEVER)) if lanes else wait
                return (yield from call_next(request))

            async def main(layer=layer):
                with anyio.move_on_after(SOON) as scope:
                    await AsyncPipeline(AsyncScriptedProvider("fine"), [layer]).complete(REQUEST)
                assert scope.cancelled_caught

            run_async(main, backend)
            assert len(signal._waiters) == 0


def test_by_hand():
    """A test sees the signal, and says whether it was set."""
    signal, results = Signal(), []

    def layer(request, call_next):
        results.append((yield from sleep(5, until=signal)))
        return (yield from call_next(request))

    for woken in (True, None):
        made = ByHand(layer, REQUEST)
        assert (made.sleeps, made.wants.until) == (5, signal)
        made.go_on(woken)
        made.answer("fine")
    assert results == [True, False]


def test_many_waits_for_one_signal():
    """100 threads in calls of their own."""
    signal, woken = Signal(), []

    def layer(request, call_next):
        woken.append((yield from sleep(NEVER, until=signal)))
        return (yield from call_next(request))

    pipeline = Pipeline(ScriptedProvider(*["fine"] * 100), [layer])
    threads = [threading.Thread(target=pipeline.complete, args=(REQUEST,), daemon=True) for _ in range(100)]
    for thread in threads:
        thread.start()
    while len(signal._waiters) < 100:
        time.sleep(0.001)
    signal.set()
    for thread in threads:
        thread.join(10)
    assert woken == [True] * 100
