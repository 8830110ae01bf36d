"""The limits of one call to another library: those of its leash, and its own in place of the configuration's."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
from support.canned_server import Canned
from support.libraries import MODES, STREAM_MODES, Case, cases

from fluxibly.errors import DeadlineExceeded, RequestTimeout, StreamStalled
from fluxibly.limits import Leash, Timeouts
from fluxibly.providers._libraries.calls import (
    LibraryLimits,
    LibraryStream,
    LibraryTimeout,
    OpenStream,
    acall_within,
    call_within,
    library_stream,
)
from fluxibly.types import CallRecord, Chunk, Request

SHORT = 0.1
"""A limit that passes, in seconds."""
ENOUGH = 0.25
"""A limit that does not pass while a library answers at once."""
LONG = 0.3
"""Longer than both."""


class Library:
    """A library whose items take `gap` seconds each. "" is an item without chunks, "·" a chunk without output."""

    def __init__(self, items: list[str], gap: float) -> None:
        self.items = items
        self.gap = gap
        self.opened = 0
        self.got: list[str] = []

    def read(self, mode: str, limits: LibraryLimits, *, pause: float = 0) -> str:
        """Return the text of a stream, whose consumer takes `pause` seconds for each chunk."""
        if mode == "sync":
            for chunk in LibraryStream(self._open, limits, chunks_of, tuple, as_it_is):
                self.got.append(chunk.text)
                time.sleep(pause)
        else:
            asyncio.run(self._read(limits, pause))
        return "".join(self.got)

    async def _read(self, limits: LibraryLimits, pause: float) -> None:
        async for chunk in library_stream(self._aopen, limits, chunks_of, tuple, as_it_is):
            self.got.append(chunk.text)
            await asyncio.sleep(pause)

    def _open(self) -> OpenStream:
        self.opened += 1
        return OpenStream(self._items(), lambda: None, lambda: None)

    async def _aopen(self) -> AsyncIterator[str]:
        self.opened += 1
        return self._aitems()

    def _items(self) -> Iterator[str]:
        for item in self.items:
            time.sleep(self.gap)
            yield item

    async def _aitems(self) -> AsyncIterator[str]:
        for item in self.items:
            await asyncio.sleep(self.gap)
            yield item


def chunks_of(item: str) -> Iterator[Chunk]:
    if item:
        yield Chunk(item.strip("·"))


def as_it_is(error: Exception, _begun: bool) -> Exception:
    return error


def leashed(**limits: float) -> LibraryLimits:
    """Return limits of middleware. `deadline` is in seconds from now."""
    deadline = limits.pop("deadline", None)
    end = None if deadline is None else time.monotonic() + deadline
    return LibraryLimits(deadline=end, leash=Leash(None, **limits))


@pytest.mark.parametrize("mode", ["sync", "asyncio"])
class TestStreams:
    @pytest.mark.parametrize("gap", [0.01, 5])
    @pytest.mark.parametrize("items", [["one"] * 500, [""] * 500])
    def test_a_deadline(self, mode: str, items: list[str], gap: float) -> None:
        """It ends a stream, whatever comes."""
        with pytest.raises(LibraryTimeout) as caught:
            Library(items, gap).read(mode, leashed(deadline=SHORT))
        assert caught.value.phase == "deadline"

    @pytest.mark.parametrize("deadline", [0, -1])
    def test_a_deadline_that_has_passed(self, mode: str, deadline: float) -> None:
        """Nothing is sent."""
        library = Library(["one"], 0)
        with pytest.raises(LibraryTimeout) as caught:
            library.read(mode, leashed(deadline=deadline))
        assert (caught.value.phase, library.opened) == ("deadline", 0)

    def test_a_deadline_includes_the_time_of_the_consumer(self, mode: str) -> None:
        """A read after the deadline fails, although its item has arrived."""
        library = Library(["one", "two"], 0)
        with pytest.raises(LibraryTimeout) as caught:
            library.read(mode, leashed(deadline=ENOUGH), pause=LONG)
        assert (caught.value.phase, library.got) == ("deadline", ["one"])

    @pytest.mark.parametrize("items", [["·"] * 500, [""] * 500, ["·", *[""] * 500]])
    def test_no_output(self, mode: str, items: list[str]) -> None:
        """Neither items nor chunks without output end the limit on the first chunk."""
        with pytest.raises(LibraryTimeout) as caught:
            Library(items, 0.01).read(mode, leashed(first_chunk=SHORT))
        late = caught.value
        assert (late.phase, late.seconds, late.strict) == ("first_chunk", SHORT, True)

    def test_no_further_chunk(self, mode: str) -> None:
        """Items without output do not start the limit on later chunks again."""
        library = Library(["·", "one", *[""] * 500], 0.01)
        with pytest.raises(LibraryTimeout) as caught:
            library.read(mode, leashed(idle=SHORT))
        late = caught.value
        assert (late.phase, late.seconds, late.strict, library.got) == ("idle", SHORT, True, ["", "one"])

    @pytest.mark.parametrize("limit", ["first_chunk", "idle"])
    def test_the_time_of_the_consumer_does_not_count(self, mode: str, limit: str) -> None:
        """A consumer may take its time over each chunk."""
        library = Library(["·", "one ", "two"], 0.01)
        assert library.read(mode, leashed(**{limit: ENOUGH}), pause=LONG) == "one two"

    def test_the_first_chunk_ends_its_limit(self, mode: str) -> None:
        """The limit on the first chunk is not one on later chunks, nor the reverse."""
        assert Library(["one ", "two"], LONG).read(mode, leashed(first_chunk=1.5 * LONG)) == "one two"
        assert Library(["·", "one"], LONG).read(mode, leashed(idle=ENOUGH)) == "one"


class TestWholeCalls:
    def test_a_deadline(self) -> None:
        """It ends the wait for a whole call, which has none of the limits of a stream."""
        with pytest.raises(LibraryTimeout) as caught:
            call_within(lambda: time.sleep(LONG), leashed(deadline=SHORT))
        assert caught.value.phase == "deadline"
        assert call_within(lambda: time.sleep(SHORT), leashed(deadline=5, first_chunk=0.01, idle=0.01)) is None

        async def main() -> None:
            with pytest.raises(LibraryTimeout) as caught:
                await acall_within(lambda: asyncio.sleep(5), leashed(deadline=SHORT))
            assert caught.value.phase == "deadline"
            await acall_within(lambda: asyncio.sleep(SHORT), leashed(deadline=5, first_chunk=0.01, idle=0.01))

        asyncio.run(main())

    def test_a_deadline_that_has_passed(self) -> None:
        """The library is not called."""

        def fail() -> Any:
            raise AssertionError("expected no call, got a call")

        with pytest.raises(LibraryTimeout):
            call_within(fail, leashed(deadline=0))
        with pytest.raises(LibraryTimeout):
            asyncio.run(acall_within(fail, leashed(deadline=0)))


def record(timeouts: Timeouts | None = None, leash: Leash | None = None) -> CallRecord:
    call = CallRecord()
    call.clock = lambda: 100.0
    call.timeouts, call.leash = timeouts, leash
    return call


CONFIGURED = LibraryLimits(call=1, first=2, idle=3, stream=4)


@pytest.mark.parametrize(
    ("timeouts", "expected"),
    [
        (None, CONFIGURED),
        (Timeouts(5, 6, 7), LibraryLimits(call=600, first=11, idle=7)),
        (Timeouts(5, 6, 7, total=None), LibraryLimits(first=11, idle=7)),
        (Timeouts(5, 6, 7, total=8), LibraryLimits(call=8, first=11, idle=7, stream=8)),
    ],
)
def test_the_limits_of_a_call(timeouts: Timeouts | None, expected: LibraryLimits) -> None:
    """The call's own limits replace all of the configuration's."""
    assert CONFIGURED.of_call(record(timeouts)) == expected


def test_the_leash_of_a_call() -> None:
    """A leash adds its limits. Its deadline is on the clock of the call."""
    leash = Leash(deadline=130.0, idle=2)
    before = time.monotonic()
    limits = CONFIGURED.of_call(record(leash=leash))
    assert limits.leash is leash
    assert limits.deadline is not None
    assert 30 <= limits.deadline - before < 40
    assert CONFIGURED.of_call(record(leash=Leash(deadline=math.inf))).deadline is None


# With the real libraries


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases(""))


def drive(case: Case, mode: str, server: Canned, request: Request, timeout: float | Timeouts) -> str:
    """Return the text of an answer from a provider without a pipeline."""
    provider, async_provider = case.library.providers
    settings = case.config(server, timeout=timeout)
    backend, _, streamed = mode.partition(" ")
    if backend == "sync":
        one = provider(settings)
        assert one.obeys is True
        try:
            return "".join([c.text for c in one.stream(request)]) if streamed else str(one.complete(request).text)
        finally:
            one.close()

    async def main() -> str:
        one = async_provider(settings)
        assert one.obeys is True
        try:
            if not streamed:
                return str((await one.complete(request)).text)
            return "".join([chunk.text async for chunk in one.stream(request)])
        finally:
            await one.aclose()

    return anyio.run(main, backend=backend)


def asking(case: Case, timeouts: Timeouts | None = None, **limits: float) -> Request:
    """Return a request with limits. Its attempts begin `deadline` seconds before the deadline."""
    times = {**limits, "deadline": 100 + limits["deadline"]} if "deadline" in limits else limits
    leash = Leash(None, **times, by="the test")
    return Request(model=case.model, messages="a b c d", call=record(timeouts, leash))


@pytest.mark.parametrize("mode", MODES)
class TestCalls:
    def test_a_deadline(self, server: Canned, case: Case, mode: str) -> None:
        """A call ends at its deadline, before the answer or within it."""
        server.stall = "stream" not in mode
        server.stall_after = True
        began = time.monotonic()
        with pytest.raises(
            DeadlineExceeded, match=r"before the deadline \(set by the test\); give the call more time"
        ) as caught:
            drive(case, mode, server, asking(case, deadline=LONG), 60)
        error = caught.value
        assert (error.phase, error.retryable, error.provider) == ("deadline", False, case.library.framework)
        assert error.model == case.model
        assert time.monotonic() - began < 20

    def test_a_deadline_that_has_passed(self, server: Canned, case: Case, mode: str) -> None:
        """Nothing is sent."""
        with pytest.raises(DeadlineExceeded):
            drive(case, mode, server, asking(case, deadline=-1), 60)
        assert server.seen == []

    def test_a_longer_timeout(self, server: Canned, case: Case, mode: str) -> None:
        """A call may take longer than the configuration says, also for the library's own client."""
        # It refuses nothing, but takes a while.
        server.refuse = lambda _: time.sleep(2 * LONG)
        text = drive(case, mode, server, asking(case, Timeouts(20, 20, 20, 20)), LONG)
        assert text == "You said: a b c d"

    def test_a_shorter_timeout(self, server: Canned, case: Case, mode: str) -> None:
        """A call may have less time than the configuration says."""
        server.stall = True
        with pytest.raises(RequestTimeout) as caught:
            drive(case, mode, server, asking(case, Timeouts(SHORT, SHORT, SHORT, SHORT)), 60)
        assert not isinstance(caught.value, DeadlineExceeded)


@pytest.mark.parametrize("mode", STREAM_MODES)
class TestStreamedCalls:
    def test_no_output(self, server: Canned, case: Case, mode: str) -> None:
        """The error of a stream that brings no output in time is retryable."""
        server.stall = True
        with pytest.raises(RequestTimeout, match=r"no output .* \(the first_chunk limit of the test") as caught:
            drive(case, mode, server, asking(case, first_chunk=SHORT), 60)
        assert (caught.value.phase, caught.value.retryable) == ("first_chunk", True)

    def test_no_further_chunk(self, server: Canned, case: Case, mode: str) -> None:
        """Keep-alives do not start the limit again, and the connection is closed."""
        server.stall_after = True
        with pytest.raises(StreamStalled, match=r"no chunk .* \(the idle limit of the test") as caught:
            drive(case, mode, server, asking(case, idle=SHORT), 60)
        assert (caught.value.phase, caught.value.retryable) == ("idle", True)
        assert server.gone.wait(10)
