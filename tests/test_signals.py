"""`Signal`: set once, from anywhere, and awaited by any number of threads and of tasks in any event loop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable

import anyio
import anyio.to_thread
import pytest

from fluxibly import Signal
from fluxibly.testing.modes import run_async

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def waiting(flag: Signal, number: int) -> None:
    """Wait until `number` others wait for the signal."""
    end = time.monotonic() + 10
    while len(flag._waiters) != number:
        assert time.monotonic() < end, f"expected {number} waiters, got {len(flag._waiters)}"
        time.sleep(0.005)


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def joined(*threads: threading.Thread) -> bool:
    """Whether all threads have ended in time."""
    for thread in threads:
        thread.join(10)
    return not any(thread.is_alive() for thread in threads)


class TestWaiting:
    def test_before_and_after(self):
        """It is set once, and says so."""
        flag = Signal()
        assert not flag.is_set
        assert repr(flag) == "Signal(is_set=False)"
        flag.set()
        flag.set()
        assert flag.is_set
        assert repr(flag) == "Signal(is_set=True)"

    @BACKENDS
    def test_that_has_been_set(self, backend):
        """Who comes later does not wait."""
        flag = Signal()
        flag.set()
        assert joined(in_thread(flag.wait))
        run_async(flag.await_, backend)

    @BACKENDS
    def test_many_at_once(self, backend):
        """20 threads and 200 tasks, of two event loops and a thread's own, wait for one signal, which a thread sets."""
        flag = Signal()
        woken: list[str] = []

        async def main():
            async def one():
                await flag.await_()
                woken.append("task")

            with anyio.fail_after(30):
                async with anyio.create_task_group() as tasks:
                    for _ in range(100):
                        tasks.start_soon(one)

        def thread():
            flag.wait()
            woken.append("thread")

        other = "trio" if backend == "asyncio" else "asyncio"
        threads = [in_thread(thread) for _ in range(20)]
        threads += [in_thread(lambda name=name: run_async(main, name)) for name in (backend, other)]
        waiting(flag, 220)
        assert woken == []
        flag.set()
        assert joined(*threads)
        assert sorted(woken) == ["task"] * 200 + ["thread"] * 20
        assert flag._waiters == {}

    @BACKENDS
    def test_200_tasks_take_no_thread(self, backend):
        """Tasks that wait leave the worker threads to others. (A thread of an earlier test may end meanwhile.)"""
        flag = Signal()

        async def main():
            with anyio.fail_after(10):
                async with anyio.create_task_group() as tasks:
                    for _ in range(200):
                        tasks.start_soon(flag.await_)
                    await anyio.wait_all_tasks_blocked()
                    assert threading.active_count() <= before
                    await anyio.to_thread.run_sync(flag.set)

        before = threading.active_count()
        run_async(main, backend)

    @BACKENDS
    def test_set_by_a_task(self, backend):
        """A task may set what the other tasks of its loop wait for."""
        flag = Signal()

        async def main():
            with anyio.fail_after(10):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(flag.await_)
                    await anyio.wait_all_tasks_blocked()
                    flag.set()

        run_async(main, backend)
        assert flag._waiters == {}

    def test_no_set_is_lost(self):
        """However `set` and `wait` of two threads meet, the wait ends."""
        for _ in range(500):
            flag, start = Signal(), threading.Barrier(3)

            def setting(flag=flag, start=start):
                start.wait()
                flag.set()

            def wait(flag=flag, start=start):
                start.wait()
                flag.wait()

            threads = in_thread(setting), in_thread(wait)
            start.wait()
            assert joined(*threads)


class TestThoseWhoLeave:
    @BACKENDS
    def test_a_cancelled_task(self, backend):
        """A cancelled task leaves nothing behind, and the others are woken."""
        flag = Signal()

        async def main():
            with anyio.fail_after(10):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(flag.await_)
                    with anyio.move_on_after(0.05) as scope:
                        await flag.await_()
                    assert scope.cancelled_caught
                    assert len(flag._waiters) == 1
                    flag.set()

        run_async(main, backend)
        assert flag._waiters == {}

    def test_a_cancellation_of_asyncio_goes_on(self):
        """The task is cancelled, also if the signal is set at the same time."""
        flag = Signal()

        async def main():
            task = asyncio.ensure_future(flag.await_())
            await asyncio.sleep(0)
            flag.set()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return task.cancelled()

        assert run_async(main)
        assert flag._waiters == {}

    @BACKENDS
    def test_a_loop_that_has_ended(self, backend):
        """A set after the end of a loop harms nothing, and wakes the others."""
        flag = Signal()
        coroutines = []

        async def main():
            # A coroutine that its loop leaves suspended, as one of a program that ends.
            coroutine = flag.await_()
            coroutines.append(coroutine)
            with contextlib.suppress(StopIteration):
                coroutine.send(None)

        run_async(main, backend)
        assert len(flag._waiters) == 1
        thread = in_thread(flag.wait)
        waiting(flag, 2)
        flag.set()
        assert joined(thread)
        for coroutine in coroutines:
            coroutine.close()

    def test_ctrl_c(self):
        """Ctrl-C interrupts a wait of the main thread, and leaves nothing behind."""
        flag = Signal()
        main = threading.main_thread().ident
        threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            flag.wait()
        assert flag._waiters == {}

    @BACKENDS
    def test_memory(self, backend):
        """A signal keeps nobody who has waited for it, however the wait ended."""
        flag = Signal()
        for _ in range(50):
            with contextlib.suppress(TimeoutError):
                run_async(lambda: _timed(flag), backend)
        assert flag._waiters == {}
        thread = in_thread(flag.wait)
        waiting(flag, 1)
        flag.set()
        assert joined(thread)
        assert flag._waiters == {}


async def _timed(flag: Signal) -> None:
    with anyio.fail_after(0):
        await flag.await_()


class TestSignalHandlers:
    """A handler runs between any two steps of the main thread: it must not wait for what its own thread holds."""

    @pytest.fixture
    def on_alarm(self):
        """Install a handler of SIGALRM."""
        before = signal.getsignal(signal.SIGALRM)
        yield lambda handler: signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    def test_while_the_thread_waits(self, on_alarm):
        """A handler sets what its thread waits for."""
        flag = Signal()
        on_alarm(lambda *_: flag.set())
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        flag.wait()
        assert flag.is_set

    def test_while_the_thread_sets_and_waits(self, on_alarm):
        """A handler sets at any step of `wait` and of `set`."""
        flags = [Signal()]

        def handler(*_):
            for flag in flags:
                flag.set()

        on_alarm(handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        end = time.monotonic() + 1.0
        rounds = 0
        while time.monotonic() < end:
            flag = flags[0] = Signal()
            waiter = in_thread(flag.wait) if rounds % 10 == 0 else None
            if rounds % 2:
                flag.set()
            flag.wait()
            if waiter is not None:
                assert joined(waiter)
            rounds += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert rounds > 10
