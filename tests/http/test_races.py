"""Races over HTTP: the first answer wins, and the server of every other sees its connection closed at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import anyio
import attrs
import pytest
from support.leftovers import eventually, nothing_left
from support.misbehaving import HEAD, Peer, Received, Script, serve
from support.powers import hedge
from support.tiny import DONE, SERVICE, TinyCodec, ask, config, event
from support.tracing_tools import Recorder

from fluxibly import AsyncPipeline, Pipeline
from fluxibly.errors import RateLimitError, ServerError
from fluxibly.middleware import Retry
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider
from fluxibly.target import Target
from fluxibly.testing.modes import MODES, Mode

DELAY = 0.05
"""Seconds between two requests of a race."""
AT_ONCE = 1.0
"""Seconds within which something happens at once, on a busy machine."""
NEVER = 30.0
"""A delay that no test lasts."""
RETRIES = {"base_delay": 0.0}


@pytest.fixture(params=MODES, ids=str)
def mode(request: pytest.FixtureRequest) -> Mode:
    return request.param  # type: ignore[no-any-return]


@attrs.define
class Ends:
    """When servers saw connections end, in seconds of the monotonic clock."""

    times: list[float] = attrs.Factory(list)

    def watch(self, peer: Peer) -> None:
        """Wait until the client closes the connection."""
        peer.wait_for_end()
        if not peer.server.over.is_set():
            self.times.append(time.monotonic())

    def silent(self, peer: Peer, request: Received) -> None:
        self.watch(peer)

    def head_only(self, peer: Peer, request: Received) -> None:
        peer.begin_stream() if request.json["stream"] else peer.send(HEAD + b"content-length: 100\r\n\r\n")
        self.watch(peer)

    def keep_alives(self, peer: Peer, request: Received) -> None:
        """Send what keeps the connection alive: comments, empty chunks of the stream, or white space."""
        peer.begin_stream()
        pieces = (": ping\n\n", event("")) if request.json["stream"] else (" ",)
        over = threading.Event()

        def send() -> None:
            while not over.wait(0.01):
                for piece in pieces:
                    try:
                        peer.chunk(piece)
                    except OSError:
                        return

        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        self.watch(peer)
        over.set()
        sending.join()


def saying(*words: str, beside: int = 0) -> Script:
    """Return a script that answers once the server has received so many requests, and has had time to look at them."""

    def script(peer: Peer, request: Received) -> None:
        if beside:
            eventually(lambda: len(peer.server.requests) >= beside)
            time.sleep(DELAY)
        if not request.json["stream"]:
            peer.answer({"text": "".join(words)})
            return
        peer.begin_stream()
        for word in words:
            peer.chunk(event(word))
        peer.chunk(DONE)
        peer.chunk("")

    return script


def failing(status: str) -> Script:
    """Return a script that refuses a request."""
    return lambda peer, _: peer.answer("no", status=status)


def in_turn(*scripts: Script) -> Script:
    """Return a script that serves each request, in order of their arrival, by another script."""
    left, lock = [*scripts], threading.Lock()

    def script(peer: Peer, request: Received) -> None:
        with lock:
            serve_it = left.pop(0)
        serve_it(peer, request)

    return script


@attrs.define
class Answer:
    """The end of a call, and when its first output came, in seconds of the monotonic clock."""

    text: str = ""
    error: Exception | None = None
    at: float = 0.0

    def take(self, text: str) -> None:
        if not self.text:
            self.at = time.monotonic()
        self.text += text


class Caller:
    """A caller in one mode, of providers over HTTP."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.others: list[Any] = []

    def provider(self, url: str) -> Any:
        shell: Any = HTTPProvider if self.mode.backend is None else AsyncHTTPProvider
        return shell(TinyCodec(), SERVICE, config(url, timeout=20))

    def at(self, url: str) -> Target:
        """Return a target at another server."""
        self.others.append(self.provider(url))
        return Target(self.others[-1])

    def call(self, url: str, *stack: Any, prompt: str = "hi") -> Answer:
        """Make one call."""
        return self.calls(url, stack, [prompt])[0]

    def calls(self, url: str, stack: Sequence[Any], prompts: Sequence[str]) -> list[Answer]:
        """Make several calls at once. Then close the providers."""
        answers = [Answer() for _ in prompts]
        if self.mode.backend is None:
            with Pipeline(self.provider(url), stack) as pipeline, ExitStack() as closing:
                for other in self.others:
                    closing.callback(other.close)
                jobs = [
                    threading.Thread(target=self._call, args=(pipeline, prompt, answer))
                    for prompt, answer in zip(prompts, answers, strict=True)
                ]
                for job in jobs:
                    job.start()
                for job in jobs:
                    job.join()
            return answers

        async def main() -> None:
            async with AsyncPipeline(self.provider(url), stack) as pipeline:
                async with anyio.create_task_group() as tasks:
                    for prompt, answer in zip(prompts, answers, strict=True):
                        tasks.start_soon(self._acall, pipeline, prompt, answer)
                for other in self.others:
                    await other.aclose()

        anyio.run(main, backend=self.mode.backend)
        return answers

    def _call(self, pipeline: Pipeline, prompt: str, answer: Answer) -> None:
        try:
            if self.mode.streaming:
                for chunk in pipeline.stream(ask(prompt)):
                    answer.take(chunk.text)
            else:
                answer.take(pipeline.complete(ask(prompt)).text)
        except Exception as error:  # noqa: BLE001  # the tests look at it
            answer.error = error

    async def _acall(self, pipeline: AsyncPipeline, prompt: str, answer: Answer) -> None:
        try:
            if self.mode.streaming:
                async for chunk in pipeline.stream(ask(prompt)):
                    answer.take(chunk.text)
            else:
                answer.take((await pipeline.complete(ask(prompt))).text)
        except Exception as error:  # noqa: BLE001  # the tests look at it
            answer.error = error


@pytest.fixture
def caller(mode: Mode) -> Caller:
    return Caller(mode)


def all_gone(ends: Ends, count: int, answer: Answer) -> bool:
    """Whether the server saw `count` connections end at once when the answer came."""
    return eventually(lambda: len(ends.times) == count) and max(ends.times) - answer.at < AT_ONCE


LOSERS = pytest.mark.parametrize("loser", [Ends.silent, Ends.head_only, Ends.keep_alives])


class TestTheLoser:
    @LOSERS
    def test_the_second_wins(self, caller: Caller, loser: Callable[..., None]) -> None:
        """The connection of the first is closed as soon as the second has answered."""
        ends = Ends()
        first: Script = lambda peer, request: loser(ends, peer, request)  # noqa: E731
        with nothing_left(), serve(in_turn(first, saying("one ", "two"))) as server:
            answer = caller.call(server.url, hedge(DELAY))
            assert (answer.text, answer.error) == ("one two", None)
            assert all_gone(ends, 1, answer)
            assert len(server.requests) == 2

    @LOSERS
    def test_the_first_wins(self, caller: Caller, loser: Callable[..., None]) -> None:
        """The same the other way round."""
        ends = Ends()
        second: Script = lambda peer, request: loser(ends, peer, request)  # noqa: E731
        with nothing_left(), serve(in_turn(saying("one ", "two", beside=2), second)) as server:
            answer = caller.call(server.url, hedge(DELAY))
            assert (answer.text, answer.error) == ("one two", None)
            assert all_gone(ends, 1, answer)
            assert len(server.requests) == 2

    def test_an_answer_before_the_delay(self, caller: Caller) -> None:
        """No second request is sent."""
        with nothing_left(), serve(saying("one")) as server:
            assert caller.call(server.url, hedge(NEVER)).text == "one"
            assert len(server.requests) == 1


class TestFailures:
    def test_the_first_fails(self, caller: Caller) -> None:
        """The next request is sent at once."""
        with nothing_left(), serve(in_turn(failing("500 Oops"), saying("one"))) as server:
            began = time.monotonic()
            answer = caller.call(server.url, hedge(NEVER))
            assert (answer.text, answer.error) == ("one", None)
            assert answer.at - began < NEVER / 2

    def test_all_fail(self, caller: Caller) -> None:
        """The error of the first is raised, though it came last."""

        def slowly(peer: Peer, request: Received) -> None:
            time.sleep(4 * DELAY)
            failing("429 Slow down")(peer, request)

        with nothing_left(), serve(in_turn(slowly, failing("500 Oops"))) as server:
            error = caller.call(server.url, hedge(DELAY)).error
            assert type(error) is RateLimitError
            assert len(server.requests) == 2

    def test_a_stream_that_breaks_before_output(self, caller: Caller) -> None:
        """A connection that is reset is a failure like any other."""
        with nothing_left(), serve(in_turn(lambda peer, _: peer.reset(), saying("one"))) as server:
            assert caller.call(server.url, hedge(NEVER)).text == "one"

    def test_the_winner_fails_after_output(self, mode: Mode) -> None:
        """A branch that has won is the call: its interruption is the call's."""
        if not mode.streaming:
            pytest.skip("a whole answer has no output before its end")

        def breaks(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk(event("one "))
            time.sleep(DELAY)
            peer.reset()

        ends = Ends()
        with nothing_left(), serve(in_turn(ends.silent, breaks)) as server:
            answer = Caller(mode).call(server.url, hedge(DELAY))
            assert answer.text == "one "
            assert type(answer.error).__name__ == "StreamInterrupted"
            assert len(ends.times) == 1


class TestStacks:
    def test_another_server(self, caller: Caller) -> None:
        """A hedge may go to another target, whose connections are apart."""
        ends = Ends()
        with nothing_left(), serve(ends.silent) as slow, serve(saying("one ", "two")) as fast:
            answer = caller.call(slow.url, hedge(DELAY, to=[caller.at(fast.url)]))
            assert (answer.text, answer.error) == ("one two", None)
            assert all_gone(ends, 1, answer)
            assert (len(slow.requests), len(fast.requests)) == (1, 1)

    def test_another_server_loses(self, caller: Caller) -> None:
        """The target's connection is closed."""
        ends = Ends()

        def slow(peer: Peer, request: Received) -> None:
            eventually(lambda: bool(other.requests))
            time.sleep(DELAY)
            saying("one")(peer, request)

        with nothing_left(), serve(slow) as own, serve(ends.silent) as other:
            answer = caller.call(own.url, hedge(DELAY, to=[caller.at(other.url)]))
            assert (answer.text, answer.error) == ("one", None)
            assert all_gone(ends, 1, answer)

    def test_a_race_within_a_race(self, caller: Caller) -> None:
        """All branches of all branches but the winner's are closed."""
        ends = Ends()
        answers = in_turn(ends.silent, ends.keep_alives, ends.head_only, saying("one ", "two"))
        with nothing_left(), serve(answers) as server:
            answer = caller.call(server.url, hedge(3 * DELAY), hedge(2 * DELAY))
            assert (answer.text, answer.error) == ("one two", None)
            assert all_gone(ends, 3, answer)

    def test_retries_within(self, caller: Caller) -> None:
        """Each branch retries for itself."""
        ends = Ends()
        answers = in_turn(failing("500 Oops"), ends.silent, failing("500 Oops"), saying("one"))
        with nothing_left(), serve(answers) as server:
            answer = caller.call(server.url, hedge(2 * DELAY), Retry(**RETRIES))
            assert (answer.text, answer.error) == ("one", None)
            assert all_gone(ends, 1, answer)
            assert len(server.requests) == 4

    def test_a_loser_that_waits_to_retry(self, caller: Caller) -> None:
        """A branch that waits is given up where it is."""
        refused: Script = lambda peer, _: peer.answer("no", status="429 Slow down", retry_after="20")  # noqa: E731
        with nothing_left(), serve(in_turn(refused, saying("one"))) as server:
            began = time.monotonic()
            answer = caller.call(server.url, hedge(2 * DELAY), Retry(**RETRIES))
            assert (answer.text, answer.error) == ("one", None)
            assert answer.at - began < 10
            assert len(server.requests) == 2

    def test_retries_around(self, caller: Caller) -> None:
        """A race of which all branches failed is run again."""
        ends = Ends()
        answers = in_turn(failing("500 Oops"), failing("503 Oops"), ends.silent, saying("one"))
        with nothing_left(), serve(answers) as server:
            answer = caller.call(server.url, Retry(**RETRIES), hedge(DELAY))
            assert (answer.text, answer.error) == ("one", None)
            assert all_gone(ends, 1, answer)
            assert len(server.requests) == 4

    def test_retries_that_are_used_up(self, caller: Caller) -> None:
        """Retry raises the last race's error, which is that of its first branch."""
        with nothing_left(), serve(in_turn(*[failing("500 Oops"), failing("429 Slow down")] * 2)) as server:
            error = caller.call(server.url, Retry(max_retries=1, **RETRIES), hedge(NEVER)).error
            assert type(error) is ServerError
            assert len(server.requests) == 4


class TestMany:
    CALLS = 100

    def test_at_once(self, caller: Caller) -> None:
        """A hundred hedged calls at once: each gets its answer, each loser is cut, and each span ends."""
        ends, seen, lock = Ends(), set[str](), threading.Lock()

        def script(peer: Peer, request: Received) -> None:
            prompt = request.json["prompt"]
            with lock:
                first = prompt not in seen
                seen.add(prompt)
            if first:
                (ends.silent if int(prompt) % 2 else ends.head_only)(peer, request)
            else:
                saying(prompt, "!")(peer, request)

        recorder = Recorder()
        prompts = [str(number) for number in range(self.CALLS)]
        with nothing_left(), serve(script) as server:
            answers = caller.calls(server.url, [recorder.tracing(), hedge(DELAY)], prompts)
            assert [answer.error for answer in answers if answer.error is not None] == []
            assert [answer.text for answer in answers] == [f"{prompt}!" for prompt in prompts]
            assert eventually(lambda: len(ends.times) == self.CALLS)
            assert len(server.requests) == 2 * self.CALLS
        assert recorder.counting.open == []
        assert len(recorder.counting.started) == len(recorder.counting.ended)
        assert len(recorder.calls) == self.CALLS

    def test_the_pool_afterwards(self, mode: Mode) -> None:
        """The winner's connection serves the next call, and the loser's does not."""
        ends = Ends()
        script = in_turn(ends.silent, saying("one"), saying("two"), saying("three"))
        texts: list[str] = []
        caller = Caller(mode)
        with nothing_left(), serve(script) as server:
            if mode.backend is None:
                with Pipeline(caller.provider(server.url), [hedge(DELAY)]) as pipeline:
                    for _ in range(3):
                        answer = Answer()
                        caller._call(pipeline, "hi", answer)
                        texts.append(answer.text)
            else:

                async def main() -> None:
                    async with AsyncPipeline(caller.provider(server.url), [hedge(DELAY)]) as pipeline:
                        for _ in range(3):
                            answer = Answer()
                            await caller._acall(pipeline, "hi", answer)
                            texts.append(answer.text)

                anyio.run(main, backend=mode.backend)
            assert texts == ["one", "two", "three"]
            assert len(server.requests) == 4
            assert server.connections == 2
