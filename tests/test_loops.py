"""Which event loop runs the code, and how other threads reach it."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import types

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
import trio.lowlevel

from fluxibly._loops import from_anywhere, run_to_end, trio_here
from fluxibly._threads import NotInTime
from fluxibly.testing.modes import run_async

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


class TestTrioHere:
    @pytest.mark.parametrize(("backend", "module"), [("asyncio", None), ("trio", trio)])
    def test_in_a_task(self, backend, module):
        """Only a task of trio is one."""

        async def look():
            return trio_here()

        assert run_async(look, backend) is module

    @pytest.mark.parametrize("begun", [types.ModuleType("trio"), types.SimpleNamespace(lowlevel=types.ModuleType("x"))])
    def test_while_trio_is_imported(self, begun, monkeypatch):
        """Another thread may have begun with it."""
        monkeypatch.setitem(sys.modules, "trio", begun)
        assert trio_here() is None

    def test_without_a_loop(self):
        """A plain thread is no task of trio, also while trio runs in another thread."""
        assert trio_here() is None
        assert run_async(lambda: anyio.to_thread.run_sync(trio_here), "trio") is None

    def test_trio_as_a_guest(self):
        """While trio is the guest of an asyncio loop, the loop's own tasks are asyncio's, and trio's tasks are trio's."""

        async def host():
            loop = asyncio.get_running_loop()
            done: asyncio.Future[object] = loop.create_future()
            began = asyncio.Event()

            async def guest():
                began.set()
                await trio.lowlevel.checkpoint()
                return trio_here()

            trio.lowlevel.start_guest_run(
                guest,
                run_sync_soon_threadsafe=loop.call_soon_threadsafe,
                done_callback=lambda outcome: done.set_result(outcome.unwrap()),
            )
            await began.wait()
            return trio_here(), await done

        assert run_async(host) == (None, trio)


class TestFromAnywhere:
    @BACKENDS
    def test_from_another_thread(self, backend):
        """The loop calls the function, in its own thread."""
        threads: list[object] = []

        async def main():
            called = anyio.Event()

            def callback():
                threads.append(threading.current_thread())
                called.set()

            call = from_anywhere(callback)
            threading.Thread(target=call).start()
            with anyio.fail_after(5):
                await called.wait()
            return threading.current_thread()

        assert threads == [run_async(main, backend)]

    @BACKENDS
    def test_after_the_loop(self, backend):
        """Nothing happens once the loop has ended."""
        called: list[object] = []

        async def main():
            return from_anywhere(lambda: called.append(1))

        run_async(main, backend)()
        assert called == []


class TestRunToEnd:
    @pytest.mark.parametrize("backend", ["asyncio", "trio", None])
    def test_wherever_it_is_called(self, backend):
        """In a thread without a loop, and in a task of either kind, with the caller's context variables."""
        told = contextvars.ContextVar("told", default="nothing")

        async def function():
            await anyio.lowlevel.checkpoint()
            return told.get()

        async def task():
            told.set("task")
            return run_to_end(function)

        if backend is None:
            token = told.set("thread")
            assert run_to_end(function) == "thread"
            told.reset(token)
        else:
            assert run_async(task, backend) == "task"

    @pytest.mark.parametrize("within", [False, True])
    def test_an_error(self, within):
        async def function():
            raise KeyError("none")

        async def task():
            with pytest.raises(KeyError, match="none"):
                run_to_end(function)

        if within:
            run_async(task)
        else:
            with pytest.raises(KeyError, match="none"):
                run_to_end(function)

    def test_an_interrupt_of_the_wait_cancels(self, monkeypatch):
        """Ctrl-C while a loop in another thread is awaited ends the function there, too."""
        began, ended = threading.Event(), threading.Event()

        async def function():
            try:
                began.set()
                await anyio.sleep_forever()
            finally:
                ended.set()

        def interrupted(self):
            assert began.wait(30)
            raise KeyboardInterrupt

        async def task():
            monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_to_end(function)
            monkeypatch.undo()

        run_async(task)
        assert ended.wait(30)

    @pytest.mark.parametrize("within", [False, True])
    def test_a_limit(self, within):
        """A function that takes longer is cancelled. Its own TimeoutError is its own."""
        ended = threading.Event()

        async def function():
            try:
                await anyio.sleep_forever()
            finally:
                ended.set()

        async def impatient():
            raise TimeoutError("its own")

        async def task():
            with pytest.raises(NotInTime):
                run_to_end(function, 0.01)
            with pytest.raises(TimeoutError, match="its own"):
                run_to_end(impatient, 60)

        if within:
            run_async(task)
        else:
            with pytest.raises(NotInTime):
                run_to_end(function, 0.01)
            with pytest.raises(TimeoutError, match="its own"):
                run_to_end(impatient, 60)
        assert ended.wait(30)
