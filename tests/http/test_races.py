"""Races over HTTP: the first answer wins, and the server of every other sees its connection closed at once."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest
import trio
from support.leftovers import eventually, interrupt_until, nothing_left
from support.misbehaving import HEAD, Peer, Received, Script, serve
from support.powers import hedge
from support.streams import Watch
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


streams_only = pytest.mark.parametrize("mode", [mode for mode in MODES if mode.streaming], ids=str)


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

    @streams_only
    def test_the_winner_fails_after_output(self, mode: Mode) -> None:
        """A branch that has won is the call: its interruption is the call's."""

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


class TestCtrlC:
    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
    def test_while_all_wait(self, streaming: bool) -> None:
        """It gets out at once and unchanged, the layers have ended, and the connections are closed."""
        ends, ending, over = Ends(), Watch(), threading.Event()
        caller = Caller(Mode(streaming))

        def script(peer: Peer, request: Received) -> None:
            if len(peer.server.requests) == 2:
                threading.Thread(target=interrupt_until, args=(over,)).start()
            ends.silent(peer, request)

        with (
            nothing_left(),
            serve(script) as server,
            Pipeline(caller.provider(server.url), [ending, hedge(DELAY), ending]) as pipeline,
        ):
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt) as caught:
                pipeline.complete(ask()) if not streaming else list(pipeline.stream(ask()))
            over.set()
            assert time.monotonic() - began < 15  # the limits of the calls are longer
            assert ending.ends == ["KeyboardInterrupt"] * 3
            assert (caught.value.args, getattr(caught.value, "__notes__", [])) == ((), [])
            assert (caught.value.__cause__, caught.value.__context__) == (None, None)
            assert eventually(lambda: len(ends.times) == 2)

    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_in_an_event_loop(self, backend: Any, streaming: bool) -> None:
        """There it cancels the main task, or is raised in it. The tasks of the race are gone when it gets out."""
        ends, ending, over = Ends(), Watch(), threading.Event()
        caller = Caller(Mode(streaming, backend))

        def script(peer: Peer, request: Received) -> None:
            if len(peer.server.requests) == 2:
                threading.Thread(target=interrupt_until, args=(over,)).start()
            ends.silent(peer, request)

        async def main() -> None:
            async with AsyncPipeline(caller.provider(server.url), [hedge(DELAY), ending]) as pipeline:
                if streaming:
                    await anext(pipeline.stream(ask()))
                else:
                    await pipeline.complete(ask())

        with nothing_left(), serve(script) as server:
            with pytest.raises(KeyboardInterrupt):
                anyio.run(main, backend=backend)
            over.set()
            assert ending.ends == ["CancelledError" if backend == "asyncio" else "KeyboardInterrupt"] * 2
            assert eventually(lambda: len(ends.times) == 2)


def tasks() -> int:
    """Return the number of the event loop's tasks."""
    if trio.lowlevel.in_trio_run():
        return trio.lowlevel.current_statistics().tasks_living
    return len(asyncio.all_tasks())


class Racing:
    """Calls that race and never answer, on an event loop: `call` makes one, and `wait` returns when it waits."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.ends = Ends()
        self.ending = Watch()
        self.pipeline: Any = None
        self.server: Any = None

    async def call(self) -> None:
        """Make a call."""
        if self.mode.streaming:
            async with self.pipeline.stream(ask()) as stream:
                await anext(stream)
        else:
            await self.pipeline.complete(ask())

    async def waits(self) -> None:
        """Wait until both requests of a race have arrived."""
        assert await anyio.to_thread.run_sync(eventually, lambda: len(self.server.requests) >= 2)

    def run(self, check: Callable[[Racing], Awaitable[object]], sent: int | None = 2) -> None:
        """Run a check in an event loop. Then check that each layer has ended, and that nothing is left.

        `sent` is the number of requests of all calls; None is any number.
        """

        async def main() -> None:
            provider = Caller(self.mode).provider(self.server.url)
            async with AsyncPipeline(provider, [self.ending, hedge(DELAY), self.ending]) as self.pipeline:
                before = tasks()
                await check(self)
                await anyio.lowlevel.checkpoint()  # an event loop counts a task that has just ended
                assert tasks() == before

        with nothing_left(), serve(self.ends.silent) as self.server:
            anyio.run(main, backend=self.mode.backend or "asyncio")
            if sent is not None:
                assert len(self.server.requests) == sent
            assert eventually(lambda: self.server.closed._value == self.server.connections)


@pytest.fixture(params=[mode for mode in MODES if mode.backend], ids=str)
def racing(request: pytest.FixtureRequest) -> Racing:
    return Racing(request.param)


@pytest.fixture(params=[mode for mode in MODES if mode.backend == "asyncio"], ids=str)
def racing_on_asyncio(request: pytest.FixtureRequest) -> Racing:
    return Racing(request.param)


class TestCancellation:
    def test_asyncio_timeout(self, racing_on_asyncio: Racing) -> None:
        """The task is as it was before."""

        async def check(racing: Racing) -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(4 * DELAY):
                    await racing.call()
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            await asyncio.sleep(0)

        racing_on_asyncio.run(check)
        assert racing_on_asyncio.ending.ends == ["CancelledError"] * 3

    def test_asyncio_wait_for(self, racing_on_asyncio: Racing) -> None:
        """The same for the older form."""

        async def check(racing: Racing) -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(racing.call(), 4 * DELAY)

        racing_on_asyncio.run(check)
        assert racing_on_asyncio.ending.ends == ["CancelledError"] * 3

    @pytest.mark.parametrize("gap", [0, 1, 2, 3])
    def test_cancelled_twice(self, racing_on_asyncio: Racing, gap: int) -> None:
        """A second cancellation, at once or some steps later, does not keep the race from ending its tasks."""

        async def check(racing: Racing) -> None:
            task = asyncio.ensure_future(racing.call())
            await racing.waits()
            task.cancel()
            for _ in range(gap):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        racing_on_asyncio.run(check)
        assert racing_on_asyncio.ending.ends == ["CancelledError"] * 3

    def test_a_sibling_of_a_task_group(self, racing_on_asyncio: Racing) -> None:
        """The error of another task cancels the race, and is the only one."""

        async def check(racing: Racing) -> None:
            async def fails() -> None:
                await racing.waits()
                raise LookupError("mine")

            async def both() -> None:
                async with asyncio.TaskGroup() as group:
                    group.create_task(racing.call())
                    group.create_task(fails())

            with pytest.raises(ExceptionGroup) as caught:
                await both()
            assert [type(error) for error in caught.value.exceptions] == [LookupError]

        racing_on_asyncio.run(check)
        assert racing_on_asyncio.ending.ends == ["CancelledError"] * 3

    @pytest.mark.parametrize("scope", [anyio.move_on_after, anyio.fail_after])
    def test_scopes(self, racing: Racing, scope: Callable[[float], Any]) -> None:
        """A scope around the call catches its own cancellation."""

        async def check(racing: Racing) -> None:
            with pytest.raises(TimeoutError) if scope is anyio.fail_after else nullcontext(), scope(4 * DELAY) as own:
                await racing.call()
            assert own.cancelled_caught

        racing.run(check)
        assert [*set(racing.ending.ends)] in (["Cancelled"], ["CancelledError"])

    @pytest.mark.parametrize("scope", [trio.move_on_after, trio.fail_after])
    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
    def test_scopes_of_trio(self, scope: Callable[[float], Any], streaming: bool) -> None:
        """So does trio's own."""

        async def check(racing: Racing) -> None:
            raises: Any = pytest.raises(trio.TooSlowError) if scope is trio.fail_after else nullcontext()
            with raises, scope(4 * DELAY):
                await racing.call()

        racing = Racing(Mode(streaming, "trio"))
        racing.run(check)
        assert racing.ending.ends == ["Cancelled"] * 3

    def test_scopes_within_scopes(self, racing: Racing) -> None:
        """The outer scope ends the race though an inner one shields what comes later."""

        async def check(racing: Racing) -> None:
            with anyio.move_on_after(4 * DELAY) as outer:
                with anyio.move_on_after(NEVER) as inner:
                    await racing.call()
                raise AssertionError
            assert (outer.cancelled_caught, inner.cancelled_caught) == (True, False)

        racing.run(check)

    def test_a_sibling_in_a_nursery(self, racing: Racing) -> None:
        """The error of another task cancels the race."""

        async def check(racing: Racing) -> None:
            async def fails() -> None:
                await racing.waits()
                raise LookupError("mine")

            async def both() -> None:
                async with anyio.create_task_group() as group:
                    group.start_soon(racing.call)
                    group.start_soon(fails)

            with pytest.raises(ExceptionGroup) as caught:
                await both()
            assert [type(error) for error in caught.value.exceptions] == [LookupError]

        racing.run(check)

    def test_at_any_time(self, racing: Racing) -> None:
        """Whenever the call is cancelled, nothing is left."""
        moments = random.Random(4)  # noqa: S311  # no secret

        async def check(racing: Racing) -> None:
            for _ in range(30):
                with anyio.move_on_after(moments.choice([0, 0.001, 0.003, 0.02, DELAY, 2 * DELAY]) * moments.random()):
                    await racing.call()

        racing.run(check, sent=None)
        assert set(racing.ending.ends) <= {"Cancelled", "CancelledError", "GeneratorExit"}

    @pytest.mark.parametrize(
        "racing", [mode for mode in MODES if mode.backend and mode.streaming], ids=str, indirect=True
    )
    def test_while_a_later_chunk_is_read(self, racing: Racing) -> None:
        """A cancellation after the win ends the winner's stream like any stream."""

        def one_word(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk(event("one"))
            racing.ends.watch(peer)

        script = in_turn(racing.ends.silent, one_word)

        async def main() -> None:
            async with AsyncPipeline(Caller(racing.mode).provider(server.url), [hedge(DELAY)]) as pipeline:
                got: list[str] = []
                with anyio.move_on_after(10 * DELAY) as scope:
                    async with pipeline.stream(ask()) as stream:
                        async for chunk in stream:
                            got.append(chunk.text)  # noqa: PERF401  # the stream does not end by itself
                assert (scope.cancelled_caught, got) == (True, ["one"])

        with nothing_left(), serve(script) as server:
            anyio.run(main, backend=racing.mode.backend or "asyncio")
            assert eventually(lambda: len(racing.ends.times) == 2)


class TestClosing:
    def test_by_another_thread(self) -> None:
        """A close ends the wait of the reader, who then finds the stream at its end."""
        ends, ending = Ends(), Watch()

        def close() -> None:
            stream.close()

        def script(peer: Peer, request: Received) -> None:
            if len(peer.server.requests) == 2:
                threading.Timer(DELAY, close).start()
            ends.silent(peer, request)

        with nothing_left(), serve(script) as server:
            provider = Caller(Mode(True)).provider(server.url)
            with Pipeline(provider, [ending, hedge(DELAY), ending]) as pipeline:
                stream = pipeline.stream(ask())
                began = time.monotonic()
                assert list(stream) == []
                assert time.monotonic() - began < 15
                assert ending.ends == ["GeneratorExit"] * 3
                assert eventually(lambda: len(ends.times) == 2)

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_by_another_task(self, backend: Any) -> None:
        """The same on an event loop."""

        async def check(racing: Racing) -> None:
            stream = racing.pipeline.stream(ask())
            got: list[Any] = []

            async def read() -> None:
                got.append([chunk async for chunk in stream])

            async with anyio.create_task_group() as group:
                group.start_soon(read)
                await racing.waits()
                await stream.aclose()
            assert got == [[]]

        racing = Racing(Mode(True, backend))
        racing.run(check)
        assert racing.ending.ends == ["GeneratorExit"] * 3

    @streams_only
    def test_a_stream_that_is_dropped(self, mode: Mode) -> None:
        """A consumer that leaves after the first word has ended the winner's stream."""
        ends, ending = Ends(), Watch()

        def one_word(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk(event("one"))
            ends.watch(peer)

        stack = [hedge(DELAY), ending]
        with nothing_left(), serve(in_turn(ends.silent, one_word)) as server:
            provider = Caller(mode).provider(server.url)
            if mode.backend is None:
                with Pipeline(provider, stack) as pipeline:
                    stream = pipeline.stream(ask())
                    assert next(stream).text == "one"
                    del stream
                    assert ending.ends == ["GeneratorExit"] * 2
                    assert eventually(lambda: len(ends.times) == 2)
            else:

                async def main() -> None:
                    async with AsyncPipeline(provider, stack) as pipeline:
                        stream = pipeline.stream(ask())
                        assert (await anext(stream)).text == "one"
                        del stream
                        assert ending.ends == ["GeneratorExit"] * 2
                        assert await anyio.to_thread.run_sync(eventually, lambda: len(ends.times) == 2)

                anyio.run(main, backend=mode.backend)
                del provider  # its pool keeps the connections of dropped streams until the next call

    def test_the_end_of_the_event_loop(self, racing_on_asyncio: Racing) -> None:
        """The tasks that a program leaves behind are cancelled, and end."""

        async def main() -> None:
            async with AsyncPipeline(Caller(racing.mode).provider(server.url), [hedge(DELAY), racing.ending]) as made:
                racing.pipeline, racing.server = made, server
                left.append(asyncio.ensure_future(racing.call()))
                await racing.waits()

        racing, left = racing_on_asyncio, list[Any]()
        with nothing_left(), serve(racing.ends.silent) as server:
            asyncio.run(main())
            assert left[0].cancelled() or left[0].exception() is not None
            assert len(racing.ending.ends) == 2
            assert eventually(lambda: len(racing.ends.times) == 2)
