"""Streams that the consumer dropped without closing them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import tracemalloc

import anyio
import pytest
from support.streams import REQUEST, Watch, texts

from fluxibly import _abandoned
from fluxibly.errors import ServerError
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider


class TestDropping:
    def test_a_dropped_stream_ends(self):
        """When the last reference is gone, the flow is closed and the provider is released."""
        provider, watch = ScriptedProvider("a b"), Watch()
        stream = Pipeline(provider, [watch]).stream(REQUEST)
        next(stream)
        del stream
        assert watch.ends == ["GeneratorExit"]
        assert (provider.opened, provider.closed) == (1, 1)

    def test_breaking_out_of_texts_ends(self):
        """Breaking out of a loop over the generator drops the generator and ends the stream."""
        provider, watch = ScriptedProvider("a b"), Watch()
        for _ in Pipeline(provider, [watch]).stream(REQUEST).texts():
            break
        assert watch.ends == ["GeneratorExit"]
        assert provider.closed == 1

    @pytest.mark.parametrize("kind", ["stream", "texts"])
    def test_the_collector_only_queues(self, kind):
        """A stream that the collector finds, perhaps while a lock for its `finally` is held, ends at the next call."""
        lock = threading.Lock()
        ends = []

        def locking(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                assert lock.acquire(timeout=5), "a deadlock"
                lock.release()
                ends.append(True)

        provider = ScriptedProvider("a b", "c")
        pipeline = Pipeline(provider, [locking])
        stream = pipeline.stream(REQUEST)
        held = stream if kind == "stream" else stream.texts()
        next(held)
        cycle = [held]
        cycle.append(cycle)
        del stream, held, cycle
        with lock:
            gc.collect()
        assert ends == []
        pipeline.complete(REQUEST)
        assert ends == [True, True]
        assert provider.opened == provider.closed == 1

    def test_another_thread_may_drop_a_stream_meanwhile(self):
        """While the collector runs in a thread, a stream that another thread drops ends at once."""
        watch = Watch()
        collecting = []

        class Found:
            def __del__(self):
                collecting.append(_abandoned.collecting())
                thread = threading.Thread(target=drop)
                thread.start()
                thread.join()

        def drop():
            stream = Pipeline(ScriptedProvider("a b"), [watch]).stream(REQUEST)
            next(stream)
            del stream
            collecting.extend([_abandoned.collecting(), watch.ends == ["GeneratorExit"]])

        cycle = [Found()]
        cycle.append(cycle)
        del cycle
        gc.collect()
        assert collecting == [True, False, True]
        assert not _abandoned.collecting()

    def test_no_signal_handler_runs_in_what_the_collector_calls(self):
        """The collector calls no Python function of fluxibly, because a Ctrl-C within it would be lost."""
        ours = [each for each in gc.callbacks if getattr(each, "func", None) is setattr]
        assert len(ours) == 2
        functions = [each for each in gc.callbacks if hasattr(each, "__code__")]
        assert not [each for each in functions if each.__module__.startswith("fluxibly")]

    def test_a_failure_of_a_queued_stream_is_logged(self, caplog):
        """The failure of a queued stream is logged, and does not reach the next call."""

        def failing(request, call_next):
            try:
                return (yield from call_next(request))
            except GeneratorExit:
                raise LookupError("too late") from None

        pipeline = Pipeline(ScriptedProvider("a b", "c"), [failing])
        stream = pipeline.stream(REQUEST)
        next(stream)
        cycle = [stream]
        cycle.append(cycle)
        del stream, cycle
        gc.collect()
        assert pipeline.complete(REQUEST).text == "c"
        assert "a middleware raised LookupError while a dropped stream was ended" in caplog.text

    @pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
    def test_a_failure_of_a_queued_stream_keeps_no_other_from_its_end(self, error):
        """All streams of the queue end. A Ctrl-C meanwhile reaches the caller, and the rest ends at the next call."""
        ends = []

        def failing(request, call_next):
            try:
                return (yield from call_next(request))
            except GeneratorExit:
                ends.append(request.model)
                raise error from None

        pipeline = Pipeline(ScriptedProvider("a b", "a b", "c", "c", "c"), [failing])
        for name in ("one", "two"):
            stream = pipeline.stream(REQUEST.evolve(model=name))
            next(stream)
            cycle = [stream]
            cycle.append(cycle)
            del stream, cycle
        gc.collect()
        if error is KeyboardInterrupt:
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    pipeline.complete(REQUEST)
        assert pipeline.complete(REQUEST).text == "c"
        assert sorted(ends) == ["one", "two"]

    @pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio warns about dropped generators
    def test_an_async_stream_in_a_cycle_is_queued(self, backend):
        """On an event loop too, the flow and the provider's stream end at the next call."""
        watch, provider = Watch(), AsyncScriptedProvider("a b", "c")

        async def main():
            pipeline = AsyncPipeline(provider, [watch])
            stream = pipeline.stream(REQUEST)
            await anext(stream)
            cycle = [stream]
            cycle.append(cycle)
            del stream, cycle
            gc.collect()
            assert watch.ends == []
            await pipeline.complete(REQUEST)
            assert watch.ends == ["GeneratorExit", "returned"]
            for _ in range(5):
                await anyio.lowlevel.checkpoint()

        anyio.run(main, backend=backend)
        assert provider.closed == 1

    @pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio warns about dropped generators
    def test_a_dropped_async_stream_ends(self, backend):
        """The flow of a dropped async stream ends at once, and the event loop ends the provider's stream."""
        watch, provider = Watch(), AsyncScriptedProvider("a b")

        async def main():
            stream = AsyncPipeline(provider, [watch]).stream(REQUEST)
            await anext(stream)
            del stream
            assert watch.ends == ["GeneratorExit"]
            for _ in range(5):
                await anyio.lowlevel.checkpoint()

        anyio.run(main, backend=backend)
        assert provider.closed == 1

    def test_nothing_is_left_behind(self):
        """A stream that has ended in any way leaves no reference behind."""
        before = len(_abandoned._open)
        pipeline = Pipeline(ScriptedProvider("a b", ServerError("x"), "a b"))
        texts(pipeline.stream(REQUEST))
        pipeline.stream(REQUEST).close()
        with pytest.raises(ServerError):
            texts(pipeline.stream(REQUEST))
        next(pipeline.stream(REQUEST))
        pipeline.stream(REQUEST)
        assert len(_abandoned._open) == before

    def test_an_open_stream_is_small(self):
        """An open stream takes at most 10 KB, besides the memory of the provider's own iterator."""
        pipeline = Pipeline(ScriptedProvider(*["a b c"] * 201), [Watch(), Watch(), Watch()])
        keep = [pipeline.stream(REQUEST)]
        next(keep[0])
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(200):
                stream = pipeline.stream(REQUEST)
                next(stream)
                keep.append(stream)
            taken = (tracemalloc.get_traced_memory()[0] - before) / 200
        finally:
            tracemalloc.stop()
        assert taken < 10_000
        for stream in keep:
            stream.close()


def test_a_failure_at_exit_keeps_no_stream_from_its_end():
    """All open streams end when the process ends. What one of them raises is logged."""
    ran = subprocess.run([sys.executable, "-c", EXITING], capture_output=True, text=True, check=False, timeout=60)
    assert (ran.returncode, sorted(ran.stdout.split())) == (0, ["one", "two"])
    assert "Traceback" not in ran.stderr
    assert ran.stderr.count("a middleware raised LookupError while a dropped stream was ended") == 2


EXITING = """
from fluxibly.pipeline import Pipeline
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request

def failing(request, call_next):
    try:
        return (yield from call_next(request))
    except GeneratorExit:
        print(request.model, flush=True)
        raise LookupError from None

pipeline = Pipeline(ScriptedProvider("a b", "a b"), [failing])
streams = [pipeline.stream(Request(model=name, messages="hi")) for name in ("one", "two")]
for stream in streams:
    next(stream)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["dropped", "queued", "open"])
def test_a_forked_process_leaves_streams_to_its_parent(how):
    """What a child drops, or inherits in the queue of the collector, ends in the parent alone."""
    ran = subprocess.run([sys.executable, "-c", FORKING, how], capture_output=True, text=True, check=False, timeout=60)
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == ["child forked", "child ends child's", "parent ends parent's"]


FORKING = """
import gc, os, sys
from fluxibly.pipeline import Pipeline
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request

def watch(request, call_next):
    try:
        return (yield from call_next(request))
    finally:
        print("child" if forked else "parent", "ends", request.model, flush=True)

def main():
    global forked
    pipeline = Pipeline(ScriptedProvider("a b", "c"), [watch])
    stream = pipeline.stream(Request(model="parent's", messages="hi"))
    next(stream)
    if sys.argv[1] == "queued":
        ring = [stream]
        ring.append(ring)
        del stream, ring
        gc.collect()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    forked = True
    print("child forked", flush=True)
    if sys.argv[1] == "dropped":
        del stream
    pipeline.complete(Request(model="child's", messages="hi"))

forked = False
main()
"""
