"""The states of a provider's stream, and the table of the states that may follow each."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import get_args

import anyio
import pytest
from support.misbehaving import Peer, Received, serve
from support.tiny import DONE, SERVICE, TinyCodec, ask, config, event

from fluxibly._states import TRANSITIONS, State
from fluxibly.errors import ConnectionFailed, ProviderError, ServerError, StreamProtocolError
from fluxibly.providers.http import HTTPProvider
from fluxibly.providers.http._endpoint import Endpoint
from fluxibly.providers.http._exchange import Outgoing
from fluxibly.providers.http._limits import Limits
from fluxibly.providers.http._provider import AsyncHTTPStream, HTTPStream, _Stream

STATES: tuple[State, ...] = get_args(State)
CLOSED = "was closed while it was being read"


def nothing() -> None:
    pass


class Exchange:
    """An exchange without a connection. It counts its releases, and calls `during` within each read."""

    def __init__(self, reads: list[str | BaseException], status: int = 200) -> None:
        self.status = status
        self.headers = {"content-type": "text/event-stream"}
        self.reads = iter(reads)
        self.releases: list[bool] = []
        self.during: Callable[[], object] = nothing

    async def read(self) -> bytes:
        self.during()
        item = next(self.reads, "")
        if isinstance(item, BaseException):
            raise item
        return item.encode()

    async def release(self, *, ended: bool) -> None:
        self.releases.append(ended)


class Sender:
    """A sender of an exchange. It calls `during` while it sends."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.requests = 0
        self.during: Callable[[], object] = nothing

    async def send(self, outgoing: Outgoing, limits: Limits, /) -> Exchange:
        self.requests += 1
        self.during()
        return self.exchange

    async def close(self) -> None:
        pass


class Play:
    """A stream with an exchange of our own, read and closed alike for threads and for event loops."""

    def __init__(self, kind: type[HTTPStream | AsyncHTTPStream], reads: list[str | BaseException], status: int) -> None:
        self.exchange = Exchange(reads, status)
        self.sender = Sender(self.exchange)
        endpoint = Endpoint(TinyCodec(), SERVICE, config("http://models.example/v1"), name="Tiny")
        self.stream = kind(endpoint, self.sender, ask())

    def read(self) -> str | None:
        """Return the text of the next chunk, or None at the end."""
        stream = self.stream
        if isinstance(stream, HTTPStream):
            chunk = next(stream, None)
        else:

            async def read() -> object:
                return await anext(stream, None)

            chunk = anyio.run(read)
        return None if chunk is None else chunk.text

    def close(self) -> None:
        stream = self.stream
        if isinstance(stream, HTTPStream):
            stream.close()
        else:
            anyio.run(stream.aclose)

    def close_within(self) -> None:
        """Close the stream within a read, as another thread or task does."""
        coroutine = self.stream._close()
        with pytest.raises(StopIteration):
            coroutine.send(None)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """The states that the test's streams have entered."""
    states: list[State] = []
    become = _Stream._become

    def noted(stream: _Stream, state: State) -> None:
        become(stream, state)
        states.append(state)

    monkeypatch.setattr(_Stream, "_become", noted)
    return states


@pytest.fixture(params=[HTTPStream, AsyncHTTPStream])
def play(request: pytest.FixtureRequest) -> Callable[..., Play]:
    def make(*reads: str | BaseException, status: int = 200) -> Play:
        return Play(request.param, list(reads), status)

    return make


class TestTable:
    def test_it_names_every_state(self) -> None:
        """Each state has a row, and a row holds nothing but states."""
        assert set(TRANSITIONS) == set(STATES)
        assert set().union(*TRANSITIONS.values()) <= set(STATES)

    def test_a_stream_ends_for_good(self) -> None:
        """Every state leads to `ended`, and none leads back to `new`. An aborted stream can only end."""
        assert all("ended" in after for state, after in TRANSITIONS.items() if state != "ended")
        assert TRANSITIONS["ended"] == frozenset()
        assert TRANSITIONS["closing"] == {"ended"}
        assert not any("new" in after for after in TRANSITIONS.values())

    @pytest.mark.parametrize(("before", "after"), list(itertools.product(STATES, STATES)))
    def test_transitions(self, play: Callable[..., Play], before: State, after: State) -> None:
        """A transition of the table is made. Any other is refused and leaves the state as it was."""
        stream = play().stream
        stream._state = before
        if after in TRANSITIONS[before]:
            stream._become(after)
            assert stream._state == after
        else:
            with pytest.raises(RuntimeError, match=f"a stream that is '{before}' cannot become '{after}'"):
                stream._become(after)
            assert stream._state == before


class TestReading:
    def test_to_the_end(self, play: Callable[..., Play], passed: list[State]) -> None:
        """Each read is `reading`, then `idle`; the read that finds the end ends the stream."""
        made = play(event("one "), event("two") + DONE)
        assert made.stream._state == "new"
        assert [made.read(), made.read(), made.read()] == ["one ", "two", None]
        # The first read takes the head of the response alone.
        assert passed == ["reading", "idle", "reading", "idle", "reading", "idle", "reading", "ended"]
        assert made.exchange.releases == [True]

    def test_chunks_of_one_read(self, play: Callable[..., Play], passed: list[State]) -> None:
        """Chunks that are there already change no state."""
        made = play(event("a") + event("b") + event("c"))
        assert made.read() == "a"
        before = list(passed)
        assert [made.read(), made.read()] == ["b", "c"]
        assert passed == before

    def test_after_the_end(self, play: Callable[..., Play], passed: list[State]) -> None:
        """Reads, closes and aborts of an ended stream change nothing."""
        made = play(event("one") + DONE)
        assert [made.read(), made.read()] == ["one", None]
        before = list(passed)
        made.stream.abort()
        made.close()
        assert [made.read(), made.read()] == [None, None]
        assert (passed, made.exchange.releases) == (before, [True])

    @pytest.mark.parametrize(
        ("reads", "error"),
        [
            ([OSError(104, "reset")], ConnectionFailed),
            ([event("one"), 'data: {"error": "busy"}\n\n'], ServerError),
            ([event("one"), ""], StreamProtocolError),
            ([KeyboardInterrupt()], KeyboardInterrupt),
        ],
    )
    def test_a_failure(
        self,
        play: Callable[..., Play],
        passed: list[State],
        reads: list[str | BaseException],
        error: type[BaseException],
    ) -> None:
        """A failed read ends the stream and releases its connection; the reads after it find the end."""
        made = play(*reads)
        with pytest.raises(error):
            for _ in iter(made.read, None):
                pass
        assert passed[-2:] == ["reading", "ended"]
        assert made.exchange.releases == [False]
        assert made.read() is None

    def test_a_refused_request(self, play: Callable[..., Play], passed: list[State]) -> None:
        """The response of an error is read within the first read."""
        made = play("no", status=500)
        with pytest.raises(ServerError):
            made.read()
        assert passed == ["reading", "ended"]
        assert made.exchange.releases == [False]
        assert made.read() is None

    def test_two_readers(self, play: Callable[..., Play], passed: list[State]) -> None:
        """The second reader gets an error, and the first goes on."""
        made = play(event("one") + DONE)
        errors: list[str] = []

        def read_too() -> None:
            with pytest.raises(RuntimeError) as caught:
                made.stream._advance().send(None)
            errors.append(str(caught.value))

        made.exchange.during = read_too
        assert [made.read(), made.read()] == ["one", None]
        assert ["'reading' cannot become 'reading'" in error for error in errors] == [True]
        assert made.exchange.releases == [True]


class TestClosing:
    def test_unread(self, play: Callable[..., Play], passed: list[State]) -> None:
        """Nothing is sent; the reads after it find the end."""
        made = play(event("one"))
        made.close()
        made.close()
        assert passed == ["ended"]
        assert (made.read(), made.sender.requests) == (None, 0)

    @pytest.mark.parametrize("rest", ["", event("two"), event("two") + DONE])
    def test_between_reads(self, play: Callable[..., Play], passed: list[State], rest: str) -> None:
        """Undelivered chunks are dropped. The connection can be used again if the response had come whole."""
        made = play(event("one") + rest)
        assert made.read() == "one"
        made.close()
        made.close()
        assert passed[-2:] == ["idle", "ended"]
        assert made.read() is None
        assert made.exchange.releases == [DONE in rest]

    @pytest.mark.parametrize("closes", [1, 2])
    def test_during_a_read(self, play: Callable[..., Play], passed: list[State], closes: int) -> None:
        """The read releases the connection, once, and fails; the reads after it find the end."""
        made = play(event("one"), event("two"))

        def close() -> None:
            for _ in range(closes):
                made.close_within()
            assert made.exchange.releases == []

        assert made.read() == "one"
        made.exchange.during = close
        with pytest.raises(ConnectionFailed, match=CLOSED):
            made.read()
        assert passed[-3:] == ["reading", "closing", "ended"]
        assert made.exchange.releases == [False]
        assert made.read() is None


class TestAborting:
    def test_before_the_first_read(self, play: Callable[..., Play], passed: list[State]) -> None:
        """The first read fails without a request."""
        made = play(event("one"))
        made.stream.abort()
        made.stream.abort()
        assert passed == ["closing"]
        with pytest.raises(ConnectionFailed, match=CLOSED):
            made.read()
        assert passed == ["closing", "ended"]
        assert (made.read(), made.sender.requests) == (None, 0)

    def test_while_the_request_is_sent(self, play: Callable[..., Play], passed: list[State]) -> None:
        """The connection that comes too late is released."""
        made = play(event("one"))
        made.sender.during = made.stream.abort
        with pytest.raises(ConnectionFailed, match=CLOSED):
            made.read()
        assert passed == ["reading", "closing", "ended"]
        assert made.exchange.releases == [False]
        assert made.read() is None

    @pytest.mark.parametrize("outcome", [event("two"), event("two") + DONE, "", OSError(104, "reset")])
    def test_during_a_read(self, play: Callable[..., Play], passed: list[State], outcome: str | BaseException) -> None:
        """The read fails, whatever it has read, and so none of that is delivered later."""
        made = play(event("one"), outcome)
        assert made.read() == "one"
        made.exchange.during = made.stream.abort
        with pytest.raises(ConnectionFailed, match=CLOSED):
            made.read()
        assert passed[-3:] == ["reading", "closing", "ended"]
        assert len(made.exchange.releases) == 1
        assert made.read() is None

    def test_between_reads(self, play: Callable[..., Play], passed: list[State]) -> None:
        """The next read fails and releases the connection."""
        made = play(event("one"), event("two"))
        assert made.read() == "one"
        made.stream.abort()
        assert (passed[-1], made.exchange.releases) == ("closing", [])
        with pytest.raises(ConnectionFailed, match=CLOSED):
            made.read()
        assert passed[-2:] == ["closing", "ended"]
        assert made.exchange.releases == [False]
        assert made.read() is None

    def test_with_chunks_at_hand(self, play: Callable[..., Play]) -> None:
        """The chunks that have come are delivered first."""
        made = play(event("one") + event("two"))
        assert made.read() == "one"
        made.stream.abort()
        assert made.read() == "two"
        with pytest.raises(ConnectionFailed, match=CLOSED):
            made.read()

    def test_after_the_whole_response(self, play: Callable[..., Play], passed: list[State]) -> None:
        """A response that had come whole ends without an error."""
        made = play(event("one") + DONE)
        assert made.read() == "one"
        made.stream.abort()
        assert made.read() is None
        assert passed[-2:] == ["closing", "ended"]
        assert len(made.exchange.releases) == 1

    @pytest.mark.parametrize("reads", [0, 1])
    def test_then_a_close(self, play: Callable[..., Play], passed: list[State], reads: int) -> None:
        """The close ends the stream, so the reads after it find the end."""
        made = play(event("one"))
        for _ in range(reads):
            made.read()
        made.stream.abort()
        made.close()
        assert passed[-2:] == ["closing", "ended"]
        assert made.exchange.releases == [False] * reads
        assert made.read() is None


class TestThreads:
    def test_abort_close_and_read_at_once(self) -> None:
        """However the threads meet, the connection is released once, and a read fails or finds the end."""

        def meet(last: str) -> None:
            made = Play(HTTPStream, [event(str(m)) for m in range(5)], 200)
            start = threading.Barrier(4)
            odd: list[BaseException] = []

            def reader() -> None:
                try:
                    for _ in made.stream:
                        pass
                except ProviderError as error:
                    if CLOSED not in str(error):
                        odd.append(error)

            def run(action: Callable[[], object]) -> None:
                start.wait(10)
                try:
                    action()
                except BaseException as error:  # noqa: BLE001  # nothing else may be raised
                    odd.append(error)

            actions = [reader, made.stream.abort, made.stream.close, getattr(made.stream, last)]
            threads = [threading.Thread(target=run, args=(action,)) for action in actions]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
            made.stream.close()
            assert odd == []
            assert made.stream._state == "ended"
            assert len(made.exchange.releases) == made.sender.requests <= 1

        for _ in range(150):
            meet("close")
            meet("abort")

    @pytest.mark.parametrize("state", ["reading", "idle"])
    def test_an_abort_that_meets_a_change_of_state(self, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
        """The abort waits for the change, which therefore cannot undo it: the read at hand, or the next, fails."""
        become = _Stream._become
        aborts: list[threading.Thread] = []

        def slow(stream: _Stream, to: State) -> None:
            if to == state and not aborts:
                aborts.append(threading.Thread(target=stream.abort))
                aborts[0].start()
                aborts[0].join(0.05)
                assert aborts[0].is_alive()
            become(stream, to)

        monkeypatch.setattr(_Stream, "_become", slow)
        made = Play(HTTPStream, [event(str(n)) for n in range(5)], 200)
        made.sender.during = made.exchange.during = lambda: [thread.join(10) for thread in aborts]
        with pytest.raises(ConnectionFailed, match=CLOSED):
            for _ in made.stream:
                pass
        aborts[0].join(10)
        assert len(made.exchange.releases) == made.sender.requests

    def test_an_abort_always_reaches_the_read(self) -> None:
        """An abort that meets the start of a read ends it: the stream of this server would go on for ever."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk(event("one"))
            peer.wait_for_end()

        def read(stream: Iterator[object], start: threading.Barrier) -> None:
            start.wait(10)
            with pytest.raises(ConnectionFailed, match=CLOSED):
                for _ in stream:
                    pass
            ended.append(None)

        ended: list[None] = []
        with serve(script) as server, HTTPProvider(TinyCodec(), SERVICE, config(server.url, timeout=60)) as provider:
            for _ in range(50):
                stream = provider.stream(ask())
                start = threading.Barrier(2)
                thread = threading.Thread(target=read, args=(stream, start))
                thread.start()
                start.wait(10)
                stream.abort()
                thread.join(10)
                assert not thread.is_alive()
        assert len(ended) == 50
