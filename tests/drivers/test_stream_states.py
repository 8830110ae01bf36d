"""The states of a stream, and the table of the states that may follow each."""

from __future__ import annotations

import threading

import anyio
import pytest
from support.streams import REQUEST, Watch, texts

from fluxibly import AsyncPipeline, Pipeline
from fluxibly._states import TRANSITIONS
from fluxibly.errors import ServerError
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider


class Seen:
    """A middleware that records the state of its stream at each step."""

    def __init__(self) -> None:
        self.driver = None
        self.states = []

    def note(self):
        if self.driver is not None:
            self.states.append(self.driver.state)

    def __call__(self, request, call_next):
        flow = call_next(request)
        try:
            outcome = None
            while True:
                self.note()
                outcome = yield flow.send(outcome)
        except StopIteration as stop:
            self.note()
            return stop.value
        finally:
            self.note()
            flow.close()


def test_the_table_ends_in_ended():
    """Every state may end the stream, no state follows `ended`, and a stream never becomes new again."""
    assert TRANSITIONS["ended"] == frozenset()
    assert all("ended" in after for state, after in TRANSITIONS.items() if state != "ended")
    assert not any("new" in after for after in TRANSITIONS.values())
    assert TRANSITIONS["closing"] == {"ended"}
    assert {state for state, after in TRANSITIONS.items() if "closing" in after} == {"new", "idle", "reading"}


def test_a_stream_that_is_read_to_its_end():
    """A stream is new, reading within a read, idle between two reads, and ended."""
    seen = Seen()
    stream = Pipeline(ScriptedProvider("a b"), [seen]).stream(REQUEST)
    driver = seen.driver = stream._driver
    assert driver.state == "new"
    next(stream)
    assert driver.state == "idle"
    assert texts(stream) == [" b"]
    assert driver.state == "ended"
    assert set(seen.states) == {"reading"}


@pytest.mark.parametrize("reads", [0, 1])
def test_a_stream_that_is_closed(reads):
    """A closed stream ends at once, read or unread; a second close changes nothing."""
    watch = Watch()
    stream = Pipeline(ScriptedProvider("a b"), [watch]).stream(REQUEST)
    for _ in range(reads):
        next(stream)
    stream.close()
    assert stream._driver.state == "ended"
    stream.close()
    assert watch.ends == ["GeneratorExit"]
    assert texts(stream) == []


def test_a_stream_that_fails():
    """A stream that fails has ended when the error reaches the consumer."""
    stream = Pipeline(ScriptedProvider(ServerError("x"))).stream(REQUEST)
    with pytest.raises(ServerError):
        next(stream)
    assert stream._driver.state == "ended"
    assert not stream._driver.begin_closing()


def test_a_close_during_a_read_leaves_it_closing():
    """The reader's thread ends the stream when its read returns."""
    reading, go_on = threading.Event(), threading.Event()

    class Slow(ScriptedProvider):
        def stream(self, request):
            reading.set()
            assert go_on.wait(10)
            yield "a"

    stream = Pipeline(Slow()).stream(REQUEST)
    driver = stream._driver
    got = []
    thread = threading.Thread(target=lambda: got.extend(texts(stream)))
    thread.start()
    assert reading.wait(10)
    assert driver.state == "reading"
    stream.close()
    assert driver.state == "closing"
    stream.close()
    assert driver.state == "closing"
    go_on.set()
    thread.join(10)
    assert driver.state == "ended"
    assert got == []


def test_a_close_that_comes_with_the_first_read_is_not_lost():
    """Another thread has begun to close when the first read enters the stream: nothing is sent or delivered."""
    watch, provider = Watch(), ScriptedProvider("a b")
    stream = Pipeline(provider, [watch]).stream(REQUEST)
    assert stream._driver.begin_closing()
    assert texts(stream) == []
    assert stream._driver.state == "ended"
    assert watch.ends == ["GeneratorExit"]
    assert provider.requests == []


def test_many_threads_close_and_read():
    """In any order of reads and closes, the flow ends once, and the only error is that of a second reader."""
    for _ in range(200):
        watch = Watch()
        stream = Pipeline(ScriptedProvider("a b c d e f"), [watch]).stream(REQUEST)
        start, odd = threading.Barrier(4), []

        def read(stream=stream, start=start, odd=odd):
            start.wait(10)
            try:
                texts(stream)
            except RuntimeError as error:
                if "another thread is reading" not in str(error):
                    odd.append(error)

        def close(stream=stream, start=start, odd=odd):
            start.wait(10)
            try:
                stream.close()
            except BaseException as error:  # noqa: BLE001  # closing raises nothing at all
                odd.append(error)

        threads = [threading.Thread(target=target) for target in (read, close, read, close)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert odd == []
        assert stream._driver.state == "ended"
        assert len(watch.ends) == 1


def test_an_async_stream(backend):
    """An async stream passes through the same states."""

    async def main():
        seen = Seen()
        stream = AsyncPipeline(AsyncScriptedProvider("a b"), [seen]).stream(REQUEST)
        driver = seen.driver = stream._driver
        assert driver.state == "new"
        assert (await anext(stream)).text == "a"
        assert driver.state == "idle"
        await stream.aclose()
        assert driver.state == "ended"
        assert "reading" in seen.states
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    anyio.run(main, backend=backend)
