"""The tools for tests: scripts, the clock, flows stepped by hand, and the checks, which have to find each violation."""

from __future__ import annotations

import contextvars
import hashlib
import subprocess
import sys
import threading

import anyio
import attrs
import pytest
from support import powers
from support.powers import hedge

from fluxibly.errors import (
    DeadlineExceeded,
    Overloaded,
    ProviderError,
    RateLimitError,
    RequestTimeout,
    ServerError,
    StreamInterrupted,
    StreamProtocolError,
)
from fluxibly.flow import ask, emit, hold_back, map_chunks, perform, sleep, stop_when
from fluxibly.limits import Leash
from fluxibly.middleware import Deadline, Fallback, StreamTimeout
from fluxibly.middleware.logging import Logging
from fluxibly.middleware.retry import Retry
from fluxibly.middleware.stream_meter import StreamMeter
from fluxibly.middleware.timing import Timing
from fluxibly.middleware.validation import Validation
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.target import Target
from fluxibly.testing import (
    AsyncScriptedProvider,
    ByHand,
    Cut,
    Delay,
    ScriptedProvider,
    VirtualClock,
    check_codec,
    check_middleware,
    check_provider,
)
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Chunk, Message, Request, Response, Restart, ToolCallDelta, Usage

REQUEST = Request(model="m", messages="hi")


def scripted(mode, *answers, **options):
    return (AsyncScriptedProvider if mode.backend else ScriptedProvider)(*answers, **options)


def test_needs_no_test_framework():
    """`fluxibly.testing` imports neither pytest nor hypothesis nor trio."""
    code = "import sys, fluxibly.testing; print(*{'pytest', 'hypothesis', 'trio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


class TestScripts:
    def test_answers_come_in_turn(self, mode):
        """A text, a response, an error and a script are answers in turn, whole or streamed."""
        whole = Response("x y", finish_reason="stop", usage=Usage(input_tokens=1))
        provider = scripted(mode, "a b", whole, ServerError("down"), ["c", Chunk("d", model="m-1")])
        assert run(mode, provider, [], REQUEST).response == Response("a b")
        assert run(mode, provider, [], REQUEST).response == whole
        assert str(run(mode, provider, [], REQUEST).error) == "down"
        assert run(mode, provider, [], REQUEST).response == Response("cd", model="m-1")
        assert provider.left == 0
        assert len(provider.requests) == 4
        assert provider.opened == provider.closed == (4 if mode.streaming else 0)

    def test_running_out_of_answers_is_an_error(self, mode):
        """The message counts the calls and the answers."""
        provider = scripted(mode, "only one")
        run(mode, provider, [], REQUEST)
        error = run(mode, provider, [], REQUEST).error
        assert isinstance(error, AssertionError)
        assert "expected an answer for each call, got 2 calls and 1 answers" in str(error)

    def test_a_cut_is_an_error(self, mode):
        """A stream that is cut off is an error, never a whole answer."""
        ran = run(mode, scripted(mode, ["half", Cut(), "never"]), [], REQUEST)
        if mode.streaming:
            assert isinstance(ran.error, StreamInterrupted)
            assert ran.error.partial.text == "half"
            assert isinstance(ran.error.__cause__, StreamProtocolError)
        else:
            assert isinstance(ran.error, StreamProtocolError)

    def test_delays_take_the_clocks_time(self, mode):
        """Delays advance the provider's clock; without a clock, they take no time."""
        clock = VirtualClock()
        ran = run(mode, scripted(mode, ["a", Delay(2), "b", Delay(3)], clock=clock), [], REQUEST, clock=clock)
        assert ran.response.elapsed == 5
        assert clock.sleeps == [2, 3]
        assert run(mode, scripted(mode, [Delay(2), "a"]), [], REQUEST).response.elapsed == 0

    def test_open_streams_are_counted(self):
        """`opened` and `closed` differ while a stream is held."""
        provider = ScriptedProvider("a b")
        stream = Pipeline(provider).stream(REQUEST)
        next(stream)
        assert (provider.opened, provider.closed) == (1, 0)
        stream.close()
        assert (provider.opened, provider.closed) == (1, 1)

    def test_the_example_of_the_docstring(self):
        """The example in the docstring of `ScriptedProvider` is correct."""
        provider = ScriptedProvider(RateLimitError("slow down"), ["Hello, ", Delay(2), "world"])
        pipeline = Pipeline(provider, [Retry(max_retries=1)], clock=VirtualClock())
        assert pipeline.complete(REQUEST).text == "Hello, world"
        assert len(provider.requests) == 2


class TestClock:
    def test_it_moves_by_sleeps(self):
        """The clock moves by sleeps and by `advance`; only sleeps are recorded."""
        clock = VirtualClock()
        clock.sleep(2)
        clock.advance(3)
        anyio.run(clock.asleep, 4)
        assert clock.now() == 9
        assert clock.sleeps == [2, 4]

    @pytest.mark.parametrize(
        ("seconds", "kind"),
        [
            (-1, ValueError),
            (float("nan"), ValueError),
            (float("inf"), ValueError),
            (10**400, ValueError),
            ("1", TypeError),
            (None, TypeError),
        ],
    )
    def test_it_refuses_wrong_lengths(self, mode, seconds, kind):
        """A wrong length of a sleep is an error, and no time passes. A real clock would fail, or wait for ever."""
        clock = VirtualClock()
        with pytest.raises(kind, match="expected a number of seconds from 0 up, got"):
            clock.sleep(seconds)
        with pytest.raises(kind, match="expected a number of seconds from 0 up, got"):
            anyio.run(clock.asleep, seconds)

        def hasty(request, call_next):
            yield from sleep(seconds)
            return (yield from call_next(request))

        ran = run(mode, scripted(mode, "x"), [hasty], REQUEST, clock=clock)
        assert isinstance(ran.error, kind)
        assert (clock.now(), clock.sleeps) == (0, [])

    def test_a_limit_that_is_over(self):
        """A limit on one wait does not bound the next one where the provider's stream has a context of its own."""
        clock = VirtualClock()
        provider = ScriptedProvider(["a", Delay(4), "b", Delay(4), "c"], clock=clock)

        async def texts():
            async with AsyncPipeline(provider, clock=clock).stream(REQUEST, timeout=5) as stream:
                return [chunk.text async for chunk in stream]

        assert anyio.run(texts) == ["a", "b", "c"]
        assert clock.now() == 8

    @pytest.mark.parametrize("outer", [[], ["hold"], ["race"], ["race", "hold"]], ids=str)
    @pytest.mark.parametrize("inner", [[], ["hold"], ["race"], ["race", "hold"]], ids=str)
    @pytest.mark.parametrize(
        ("backend", "provider"),
        [(None, ScriptedProvider), ("asyncio", ScriptedProvider), ("trio", AsyncScriptedProvider)],
    )
    def test_the_time_of_a_stream_that_is_raced_for(self, backend, provider, inner, outer):
        """Each chunk of a stream takes its time, during a race and after it, also in the stream of a pipeline within."""
        clock = VirtualClock()

        def hold(request, call_next):
            return (yield from hold_back(call_next(request)))

        layers = {"hold": hold, "race": hedge(2)}
        kind = Pipeline if backend is None else AsyncPipeline
        late = provider([Delay(99), "late"], [Delay(99), "late"], clock=clock)
        steps = ["a", Delay(5), "b", Delay(3), "c"]
        within = kind(provider(steps, steps, clock=clock), [layers[name] for name in inner], clock=clock)
        target = Target((Within if backend is None else AsyncWithin)(within), model="within")
        pipeline = kind(late, [hedge(2, to=[target]), *[layers[name] for name in outer]], clock=clock)
        seen = []

        async def read():
            async with pipeline.stream(REQUEST) as stream:
                seen.extend([(chunk.text, clock.now()) async for chunk in stream])

        if backend is None:
            with pipeline.stream(REQUEST) as stream:
                seen.extend([(chunk.text, clock.now()) for chunk in stream])
        else:
            anyio.run(read, backend=backend)
        held = "hold" in inner or "hold" in outer
        assert seen == [(text, 10 if held else time) for text, time in [("a", 2), ("b", 7), ("c", 10)]]


class Within:
    """A provider that streams what a pipeline answers."""

    def __init__(self, pipeline):
        self.pipeline = pipeline

    def stream(self, request):
        with self.pipeline.stream(REQUEST) as stream:
            yield from stream


class AsyncWithin(Within):
    async def stream(self, request):
        async with self.pipeline.stream(REQUEST) as stream:
            async for chunk in stream:
                yield chunk


@pytest.mark.parametrize(
    "middleware",
    [
        Logging(),
        Timing(),
        Timing(layers=True),
        StreamMeter(),
        Retry(max_retries=2),
        Retry(on_interrupt="restart"),
        Validation(),
        Validation(empty="raise"),
        Validation(empty="retry", hold=True),
    ],
    ids=repr,
)
def test_built_in_middleware_keep_the_laws(middleware):
    """Each built-in middleware passes `check_middleware`."""
    check_middleware(middleware)


# Middleware that break a law; `TestCheckMiddleware` has the message for each.

var = contextvars.ContextVar("request_id", default="")


def returns_response(request, call_next):
    return Response("x")


async def is_async(request, call_next):
    return Response("x")


def returns_none(request, call_next):
    yield from call_next(request)


def yields_rubbish(request, call_next):
    yield "text"
    return (yield from call_next(request))


def shouts_too_late(request, call_next):
    response = yield from call_next(request)
    return response.evolve(text=response.text.upper())


def shouts_only_in_streams(request, call_next):
    if request.call.streaming:
        return (yield from map_chunks(call_next(request), lambda c: attrs.evolve(c, text=c.text.upper())))
    return (yield from call_next(request))


def differs_by_chunk(request, call_next):
    return (yield from map_chunks(call_next(request), lambda c: attrs.evolve(c, text=c.text.title() + ".")))


def swallows_everything(request, call_next):
    try:
        return (yield from call_next(request))
    except BaseException:  # noqa: BLE001  # the mistake under test
        return Response("never mind")


def swallows_in_finally(request, call_next):
    try:
        return (yield from call_next(request))
    finally:
        return Response("never mind")  # noqa: B012, SIM107  # the mistake under test


def replaces_interrupts(request, call_next):
    try:
        return (yield from call_next(request))
    except KeyboardInterrupt:
        raise RuntimeError("interrupted") from None


def sleeps_in_finally(request, call_next):
    try:
        return (yield from call_next(request))
    finally:
        yield from sleep(1)


def yields_when_closed(request, call_next):
    try:
        return (yield from call_next(request))
    except GeneratorExit:
        yield from sleep(1)
        raise


def retries_whatever(request, call_next):
    try:
        return (yield from call_next(request))
    except Exception:  # noqa: BLE001  # the mistake under test
        return (yield from call_next(request))


def salvages(request, call_next):
    try:
        return (yield from call_next(request))
    except StreamInterrupted as error:
        return error.partial


def leaks_context(request, call_next):
    var.set("mine")
    return (yield from call_next(request))


def changes_the_request(request, call_next):
    request.metadata["seen"] = True
    return (yield from call_next(request))


def refuses_chunks(request, call_next):
    def fn(chunk):
        raise PermissionError("no words")

    return (yield from map_chunks(call_next(request), fn))


class KeepsText:
    """A middleware that returns the text of the call, which it keeps on itself."""

    def begin(self):
        self.text = ""

    def __call__(self, request, call_next):
        self.begin()

        def fn(chunk):
            self.text += chunk.text
            return chunk

        response = yield from map_chunks(call_next(request), fn)
        return response.evolve(id=self.text)


class KeepsStart:
    def __call__(self, request, call_next):
        self.start = request.call.clock()
        return (yield from call_next(request))


class KeepsChunks:
    def __call__(self, request, call_next):
        self.chunks = []

        def fn(chunk):
            self.chunks.append(chunk)
            return chunk

        return (yield from map_chunks(call_next(request), fn))


class TakesTime:
    """A middleware whose state of a call shows in no result, because nobody reads `took`."""

    def __call__(self, request, call_next):
        self.start = request.call.clock()
        try:
            return (yield from call_next(request))
        finally:
            self.took = request.call.clock() - self.start


@attrs.define
class KeepsInASlot:
    last: object = None

    def __call__(self, request, call_next):
        self.last = request
        return (yield from call_next(self.last))


class Breaker:
    """A circuit breaker without a lock, which opens after a few failures and closes after a while."""

    def __init__(self):
        self.failures, self.open_until = 0, 0.0

    def __call__(self, request, call_next):
        if request.call.clock() < self.open_until:
            raise Overloaded("the circuit is open")
        try:
            response = yield from call_next(request)
        except ProviderError:
            self.failures += 1
            if self.failures >= 5:
                self.open_until = request.call.clock() + 30
            raise
        self.failures = 0
        return response


class Limiter:
    """A rate limiter."""

    def __init__(self):
        self.next, self.lock = 0.0, threading.Lock()

    def __call__(self, request, call_next):
        with self.lock:
            now = request.call.clock()
            at = max(now, self.next)
            self.next = at + 0.01
        yield from sleep(at - now)
        return (yield from call_next(request))


class RemembersLast:
    """A middleware that shows the last call to others. The lock says that it is shared on purpose."""

    def __init__(self, lock):
        self.lock = lock
        self.last = None

    def __call__(self, request, call_next):
        response = yield from call_next(request)
        with self.lock:
            self.last = response
        return response


class MakesItsClientLate:
    def __init__(self):
        self.client = None

    def __call__(self, request, call_next):
        if self.client is None:
            self.client = object()
        return (yield from call_next(request))


def prompt_of(request):
    return request.messages[-1].text


def quotes(request, call_next):
    response = yield from call_next(request)
    return response.evolve(id=f"{prompt_of(request)} {hashlib.sha256(prompt_of(request).encode()).hexdigest()}")


def quotes_in_chunks(request, call_next):
    return (yield from map_chunks(call_next(request), lambda c: c, lambda: Chunk(f" [{prompt_of(request)}]")))


def quotes_in_errors(request, call_next):
    yield from ()
    raise PermissionError(f"not allowed: {prompt_of(request)}")


def quotes_instead(request, call_next):
    yield from ()
    return Response(f"You said: {prompt_of(request)}")


class Counts:
    """A middleware with state that belongs to no single call, which the instance may keep."""

    def __init__(self):
        self.calls = 0

    def __call__(self, request, call_next):
        self.calls += 1
        return (yield from call_next(request))


LOOK = {"look": lambda at=0: "found"}


def asks_again(request, call_next):
    """Run the tools without a mark."""
    asked = request
    while True:
        response = yield from call_next(asked)
        if not response.tool_calls:
            return response
        results = [Message.tool("found", call) for call in response.tool_calls]
        asked = asked.evolve(messages=(*asked.messages, response.message, *results))


def turns(*, marks=lambda request: True, added=lambda messages: messages):
    """Return a loop over tools that makes marks only for some requests, or that returns other messages."""

    def loop(request, call_next):
        asked, messages = request, ()
        while True:
            response = yield from call_next(asked)
            if not response.tool_calls:
                return response.evolve(added=added(messages))
            turn = (response.message, *[Message.tool("found", call) for call in response.tool_calls])
            if marks(request):
                yield from emit(Chunk(added=turn))
                messages += turn
            asked = asked.evolve(messages=(*asked.messages, *turn))

    return loop


def says_more(request, call_next):
    response = yield from call_next(request)
    yield from emit(Chunk(" (checked)"))
    return response


def keeps_limits(request, call_next):
    call = request.call
    call.leash = Leash(call.leash, deadline=call.clock() + 5)
    return (yield from call_next(request))


def emits_text(request, call_next):
    yield from emit("hello")
    return (yield from call_next(request))


def asks_text(request, call_next):
    yield from ask("fine?")
    return (yield from call_next(request))


def maps_to_text(request, call_next):
    return (yield from map_chunks(call_next(request), lambda chunk: chunk.text))


def maps_to_a_request(request, call_next):
    def fn(chunk):
        yield from call_next(request)

    return (yield from map_chunks(call_next(request), fn))


def stops_at_text(request, call_next):
    return (yield from stop_when(call_next(request), lambda chunk: chunk.text))


def holds_until_a_coroutine(request, call_next):
    async def until(text):
        return True

    return (yield from hold_back(call_next(request), check=until))


def ends_with_a_coroutine(request, call_next):
    async def give():
        pass

    request.call.on_end(give)
    return (yield from call_next(request))


def caching():
    cache = {}

    def cached(request, call_next):
        key = request.messages
        if key not in cache:
            cache[key] = yield from call_next(request)
        return cache[key]

    return cached


class TestCheckMiddleware:
    @pytest.mark.parametrize(
        ("middleware", "message"),
        [
            (returns_response, "returned a Response, expected a generator; write it as"),
            (is_async, "returned a coroutine, expected a generator; write it as"),
            (returns_none, "returned None, expected a Response; end it with"),
            (yields_rubbish, "yielded a str; it may yield only from"),
            (shouts_too_late, r"law 3 .*the text of its chunks, 'Hello, world', got 'HELLO, WORLD'.*map_chunks"),
            (
                shouts_only_in_streams,
                r"law 1 .*expected the same result in all modes, got .* \(sync whole\) and .* \(sync stream\)",
            ),
            (differs_by_chunk, "law 1 .*wherever the chunks are cut"),
            (swallows_everything, "law 6 .*Catch Exception, not BaseException"),
            (swallows_in_finally, "law 3"),
            (replaces_interrupts, "law 6 .*raised RuntimeError after KeyboardInterrupt.*Catch Exception"),
            (sleeps_in_finally, "law 6 .*yielded again after KeyboardInterrupt.*neither return nor yield"),
            (yields_when_closed, "law 6 .*yielded again after GeneratorExit.*Do not yield in `finally`"),
            (retries_whatever, "law 4 .*expected no request after output.*Let StreamInterrupted pass"),
            (salvages, "law 11 .*a stream that failed after 'Hello', got a whole answer.*`partial`"),
            (leaks_context, "law 5 .*expected the context variable 'request_id' as it was.*var.reset"),
            (changes_the_request, r"law 7 .*expected the request unchanged.*request.evolve\(metadata="),
            (KeepsText(), "law 8 .*two concurrent calls.*request.call.notes"),
            (KeepsStart(), r"law 8 .*expected no state of a call on the instance, got self.start = …"),
            (KeepsChunks(), r"law 8 .*got self.chunks = …, which the next call overwrites.*guard with a lock"),
            (TakesTime(), r"law 8 .*got self.start = …"),
            (KeepsInASlot(), r"law 8 .*got self.last = …"),
            (
                asks_again,
                r"law 4 .*got another request to the provider after an answer \(in .*, sync stream\).*emit\(Chunk\(added=",
            ),
            (
                turns(added=lambda messages: messages[1:]),
                r"law 3 .*the 2 messages of its marks in `added`, got 1.*evolve",
            ),
            (
                turns(added=lambda messages: ()),
                r"law 3 .*the 2 messages of its marks in `added`, got 0.*evolve\(added=…\)",
            ),
            (
                turns(marks=lambda request: request.call.streaming),
                r"law 1 .*\(sync whole\) and .*\(sync stream\).*emit\(Chunk\(added=…\)\) .* for all modes alike",
            ),
            (turns(marks=lambda request: not request.call.streaming), r"law 4 .*after an answer .*emit\("),
            (says_more, r"law 3 .*, got 'Hello, world'.*emit\(…\) lets out, the response needs the text"),
            (keeps_limits, r"law 5 .*expected the limits of the call as they were .*call.leash = outer"),
            (emits_text, r"emits_text: emit: expected a Chunk, got a str"),
            (asks_text, r"asks_text: ask: expected a Request, got a str"),
            (maps_to_text, r"maps_to_text: map_chunks: expected the function to return a Chunk"),
            (maps_to_a_request, r"maps_to_a_request: map_chunks: expected no request .*yield from ask"),
            (stops_at_text, r"stops_at_text: stop_when: expected the function to return a bool or a Chunk"),
            (holds_until_a_coroutine, r"holds_until_a_coroutine: hold_back: expected a plain function"),
            (ends_with_a_coroutine, r"ends_with_a_coroutine: on_end: expected a sync function first"),
        ],
        ids=lambda value: getattr(value, "__name__", type(value).__name__) if callable(value) else "",
    )
    def test_finds(self, middleware, message):
        """The message names the middleware and the law, and says what to write instead."""
        with pytest.raises(AssertionError, match=message) as caught:
            check_middleware(middleware)
        assert getattr(middleware, "__name__", type(middleware).__name__) in str(caught.value)

    @pytest.mark.parametrize("middleware", [Counts(), caching(), refuses_chunks], ids=["counts", "caching", "refuses"])
    def test_accepts(self, middleware):
        """State that belongs to no single call may outlive a call. A middleware that raises may miss later events."""
        check_middleware(middleware)

    @pytest.mark.parametrize(
        "middleware",
        [
            Breaker(),
            Limiter(),
            RemembersLast(threading.Lock()),
            RemembersLast(threading.RLock()),
            MakesItsClientLate(),
        ],
        ids=lambda middleware: type(middleware).__name__,
    )
    def test_accepts_what_calls_share_on_purpose(self, middleware):
        """State is shared if its old value matters, or if a lock guards it. The instance stays what it was."""
        kind = type(middleware)
        check_middleware(middleware)
        assert type(middleware) is kind

    @pytest.mark.parametrize("middleware", [quotes, quotes_in_chunks, quotes_in_errors, quotes_instead])
    def test_accepts_quotes_of_the_prompt(self, middleware):
        """The prompt is the same in all modes, so a middleware may put it anywhere, or what it makes of it."""
        check_middleware(middleware)

    @pytest.mark.parametrize(
        "middleware",
        [
            powers.tools(LOOK),
            powers.going_on(),
            powers.judged(),
            powers.judged(Target(ScriptedProvider(*["yes"] * 1000), model="judge"), [Retry()]),
            powers.replayed(Response("a stored answer"), pace=0.1),
            powers.smooth(0.1),
            powers.stopping_at("o"),
            powers.stopping_at(","),
            powers.limited(lambda: None, lambda: None),
            Deadline(5),
            StreamTimeout(first_chunk=5, idle=5),
            Fallback(to=["m-2"]),
        ],
        ids=lambda middleware: getattr(middleware, "__qualname__", type(middleware).__name__).partition(".")[0],
    )
    def test_accepts_all_that_middleware_can_do(self, middleware):
        """Turns, answers that go on, questions, replays, waits, stops, cleanups, limits and targets keep the laws."""
        check_middleware(middleware)

    def test_the_cleanups_run(self):
        """Each call that has taken something gives it back, also those that are given up or interrupted."""
        taken = []
        check_middleware(powers.limited(lambda: taken.append(1), taken.pop))
        assert taken == []

    def test_turns_see_a_second_answer(self):
        """A loop over tools gets a plain answer to its second request, in every mode, and failures of the second turn."""
        asked = []

        def loop(request, call_next):
            def noted(request):
                asked.append(len(request.messages))
                return call_next(request)

            return (yield from powers.tools(LOOK)(request, noted))

        check_middleware(loop)
        assert asked.count(3) == 3 * len(MODES)
        assert max(asked) == 3

    def test_a_cache_is_asked_anew_in_each_mode(self):
        """A cache of whole requests answers from no earlier run, so that every mode is checked with an answer to keep."""
        asked = []

        def cached(request, call_next):
            asked.append((request.messages, str(request.extra)))
            return (yield from call_next(request))

        check_middleware(cached)
        assert len(set(asked)) == len(asked)

    def test_refuses_a_class(self):
        """A class is refused, as a pipeline refuses it."""
        with pytest.raises(TypeError, match="write Counts"):
            check_middleware(Counts)

    def test_works_inside_of_an_event_loop(self):
        """The check runs within an event loop, because a user's test may be a coroutine."""

        async def main():
            check_middleware(Counts())

        anyio.run(main)


class TestByHand:
    def test_a_retry(self):
        """The test supplies the error, the end of the sleep and the answer by hand."""
        call = ByHand(Retry(max_retries=1, base_delay=2, uniform=lambda low, high: high), REQUEST)
        assert call.sent is REQUEST
        call.fail(ServerError("down"))
        assert call.sent is None
        assert call.sleeps == 2
        with pytest.raises(AssertionError, match=r"expected a finished call, got a call that waits for Sleep"):
            call.response  # noqa: B018  # the look-up raises
        call.go_on()
        assert call.sleeps is None
        call.answer("hello")
        assert call.response == Response("hello")

    def test_a_race(self):
        """The test sees how long the call waits for its branches, and ends each as it likes."""
        call = ByHand(hedge(2, copies=2), REQUEST)
        assert call.waits == 2
        call.go_on()
        first, second = call.branches
        call.finish(first, ServerError("down"))
        assert call.branches[0] is second
        call.finish(call.branches[1], "third")
        assert call.response.text == "third"
        assert call.branches == []

    def test_branches_that_end_wrongly(self):
        """A mistake of the test is an AssertionError that says what was expected, and changes nothing."""
        call, other = ByHand(hedge(2), REQUEST), ByHand(hedge(2), REQUEST)
        (branch,) = call.branches
        for wrong in (other.branches[0], 0, "text"):
            with pytest.raises(AssertionError, match=r"finish\(\): expected a branch of this call that waits"):
                call.finish(wrong, "text")
        with pytest.raises(AssertionError, match=r"finish\(\): expected one outcome, .*, got 2"):
            call.finish(branch, "one", "two")
        with pytest.raises(AssertionError, match=r"answer\(\): .* waits for its branches; write finish\(branch, …\)"):
            call.answer("text")
        with pytest.raises(AssertionError, match=r"go_on\(\): expected no result"):
            call.go_on("text")
        assert call.waits == 2
        call.go_on()
        with pytest.raises(AssertionError, match=r"go_on\(\): expected a call that waits for time"):
            call.go_on()
        assert repr(branch).startswith("Branch(waits for Send(")
        call.finish(branch, "text")
        assert call.response.text == "text"
        with pytest.raises(AssertionError, match=r"finish\(\): expected a branch of this call that waits"):
            call.finish(branch, "text")

    def test_a_call_that_is_over(self):
        """Nothing can be done with a call that is over, and its response stays."""
        call = ByHand([], REQUEST)
        call.answer("text")
        for act in (call.go_on, lambda: call.fail(ServerError("down")), lambda: call.answer("again")):
            with pytest.raises(AssertionError, match="got a call that is over"):
                act()
        assert call.response.text == "text"
        closed = ByHand(hedge(2), REQUEST)
        closed.close()
        assert (closed.waits, closed.branches) == (None, [])
        with pytest.raises(AssertionError, match="got a call that has failed or was closed"):
            closed.response  # noqa: B018  # the look-up raises

    def test_an_error_that_passes(self):
        """An error that no middleware handles is raised by `fail`."""
        call = ByHand([], REQUEST)
        with pytest.raises(ServerError, match="down"):
            call.fail(ServerError("down"))

    def test_an_interrupt_passes_whatever_is_done_with_it(self):
        """An interrupt passes as in a pipeline, with a note that names the middleware that swallowed it."""

        def greedy(request, call_next):
            try:
                return (yield from call_next(request))
            except BaseException:  # noqa: BLE001  # the mistake under test
                return Response("never mind")

        call = ByHand(greedy, REQUEST)
        with pytest.raises(KeyboardInterrupt) as caught:
            call.fail(KeyboardInterrupt())
        assert "greedy returned normally after KeyboardInterrupt" in caught.value.__notes__[0]

    def test_io_of_a_middleware(self):
        """The test passes the result of I/O to `go_on`, and can call the function that the middleware performs."""

        def cached(request, call_next):
            hit = yield from perform(lambda: "read")
            return Response(hit) if hit else (yield from call_next(request))

        call = ByHand(cached, REQUEST)
        assert call.performs.call() == "read"
        with pytest.raises(AssertionError, match=r"answer\(\): expected a call that has sent a request"):
            call.answer("x")
        call.go_on("hit")
        assert call.response.text == "hit"
        miss = ByHand(cached, REQUEST)
        miss.go_on(None)
        miss.answer("asked")
        assert miss.response.text == "asked"

    def test_a_stream(self):
        """`events` has the chunks as the consumer would get them."""

        def double(request, call_next):
            return (yield from map_chunks(call_next(request), lambda c: [c, c] if c.text != "b" else None))

        call = ByHand(double, REQUEST)
        call.stream("a", "b", Chunk("c"))
        assert [event.text for event in call.events] == ["a", "a", "c", "c"]
        assert call.response.text == "aacc"

    def test_a_stream_through_two_layers(self):
        """A layer sees the chunks that a layer further in has made of one."""

        def double(request, call_next):
            return (yield from map_chunks(call_next(request), lambda c: [c, c]))

        def shout(request, call_next):
            return (yield from map_chunks(call_next(request), lambda c: attrs.evolve(c, text=c.text.upper())))

        call = ByHand([shout, double], REQUEST)
        call.stream("a", "b")
        assert [event.text for event in call.events] == ["A", "A", "B", "B"]
        assert call.response.text == "AABB"

    @pytest.mark.parametrize("restarts", [True, False])
    def test_a_restart(self, restarts):
        """The flow goes on if the consumer takes `Restart`, and fails if not."""
        call = ByHand([Retry(on_interrupt="restart", base_delay=0)], REQUEST, restarts=restarts)
        if not restarts:
            with pytest.raises(StreamInterrupted):
                call.stream("a", ServerError("down"))
            return
        call.stream("a", ServerError("down"))
        call.go_on()
        call.stream("b")
        assert call.events == [Chunk("a"), Restart("ServerError"), Chunk("b")]
        assert call.response.text == "b"

    def test_turns(self):
        """The marks are events, and each turn waits for its answer."""
        asks = Chunk(tool_calls=(ToolCallDelta(index=0, id="c", name="look", arguments="{}"),))
        call = ByHand(powers.tools(LOOK), REQUEST)
        call.stream("let me look", asks)
        assert call.performs.call() == "found"
        call.go_on("found")
        assert [message.role for message in call.sent.messages] == ["user", "assistant", "tool"]
        call.stream("here it is")
        assert [event.text for event in call.events] == ["let me look", "", "", "here it is"]
        assert [message.text for message in call.events[2].added] == ["let me look", "found"]
        assert call.response == Response("here it is", added=call.events[2].added)

    @pytest.mark.parametrize("streaming", [True, False])
    def test_questions(self, streaming):
        """It stops at the request of an `ask`, which is answered whole, also between two chunks."""

        def guard(request, call_next):
            def fn(chunk):
                answer = yield from ask(request.evolve(messages=f"fine? {chunk.text}"))
                yield attrs.evolve(chunk, text=f"{chunk.text}: {answer.text}. ")

            return (yield from map_chunks(call_next(request), fn))

        call = ByHand(guard, REQUEST)
        if streaming:
            call.stream("a", "b")
        else:
            call.answer("a")
        assert call.sent.messages[0].text == "fine? a"
        with pytest.raises(AssertionError, match=r"stream\(\): expected the request of a call, got that of an ask"):
            call.stream("yes")
        call.answer("yes")
        if streaming:
            call.answer("no")
            assert [event.text for event in call.events] == ["a: yes. ", "b: no. "]
            assert call.response.text == "a: yes. b: no. "
        else:
            assert call.events == []
            assert call.response.text == "a: yes. "

    def test_a_question_that_fails(self):
        """`fail` raises an error at an `ask`."""

        def tolerant(request, call_next):
            try:
                yield from ask(request.evolve(messages="fine?"))
            except ServerError:
                return Response("who knows")
            return (yield from call_next(request))

        call = ByHand(tolerant, REQUEST)
        call.fail(ServerError("down"))
        assert call.response.text == "who knows"

    def test_a_stop(self):
        """The rest of a stopped stream is not read."""
        call = ByHand(powers.stopping_at(","), REQUEST)
        call.stream("Hel", "lo, ", ServerError("never read"))
        assert [event.text for event in call.events] == ["Hel", "lo"]
        assert call.response == Response("Hello", finish_reason="stop")

    @pytest.mark.parametrize("streaming", [True, False])
    def test_chunks_of_a_middlewares_own(self, streaming):
        """Of a call that is streamed, a layer further out sees them, also before the first request."""

        def headed(request, call_next):
            yield from emit(Chunk("AI: "))
            yield from emit(Chunk(added=()))
            response = yield from call_next(request)
            return response.evolve(text=f"AI: {response.text}")

        def shout(request, call_next):
            return (yield from map_chunks(call_next(request), lambda c: attrs.evolve(c, text=c.text.upper())))

        call = ByHand([shout, headed], REQUEST, streaming=streaming)
        if streaming:
            call.stream("hello")
            assert [event.text for event in call.events if event.text] == ["AI: ", "HELLO"]
        else:
            call.answer("hello")
        assert call.response.text == "AI: HELLO"

    def test_cleanups(self):
        """A cleanup that a middleware runs itself is I/O like any other."""
        call = ByHand(powers.limited(lambda: "take", lambda: "give"), REQUEST)
        assert call.performs.call() == "take"
        call.go_on()
        call.answer("hello")
        assert call.performs.call() == "give"
        call.go_on()
        assert call.response.text == "hello"

    def test_closing(self):
        """`close` runs each `finally`."""
        ends = []

        def watch(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                ends.append(True)

        call = ByHand([watch], REQUEST)
        call.close()
        assert ends == [True]


class Parrot:
    """A provider that keeps the laws."""

    def complete(self, request):
        return self.reply(request)

    def stream(self, request):
        yield from self.reply(request)

    def reply(self, request):
        text = request.messages[-1].text
        if "fail" in text:
            raise ServerError("failed on request")
        return text


class AsyncParrot:
    async def complete(self, request):
        await anyio.lowlevel.checkpoint()
        return Parrot().reply(request)

    async def stream(self, request):
        for letter in Parrot().reply(request):
            await anyio.lowlevel.checkpoint()
            yield letter


class Whole:
    def complete(self, request):
        return "the same"


class Chance:
    """A provider that gives a new answer to every call."""

    def __init__(self):
        self.count = 0

    def complete(self, request):
        self.count += 1
        return f"answer {self.count}"

    def stream(self, request):
        yield self.complete(request)


class SaysMoreStreamed(Parrot):
    def stream(self, request):
        yield "More: "
        yield from self.reply(request)


class YieldsWhenClosed(Parrot):
    def stream(self, request):
        try:
            yield from self.reply(request)
        except GeneratorExit:
            yield "bye"


class AsyncForgetful(AsyncParrot):
    """A provider that keeps the text of a call on itself, across an await."""

    async def complete(self, request):
        self.texts = []
        for letter in Parrot().reply(request):
            await anyio.lowlevel.checkpoint()
            self.texts.append(letter)
        return "".join(self.texts)


class Shared(Parrot):
    """A provider whose streams share a position."""

    def stream(self, request):
        self.at = 0
        text = self.reply(request)
        while self.at < len(text):
            self.at += 1
            yield text[self.at - 1]


class Marks(Parrot):
    def complete(self, request):
        request.metadata["seen"] = True
        return self.reply(request)


class AnswersAnything(Parrot):
    def reply(self, request):
        return "fine"


class FailsInItsOwnWay(Parrot):
    def stream(self, request):
        yield "a"
        raise LookupError("another error")

    def complete(self, request):
        raise ServerError("failed on request")


class OnlyStreams:
    def stream(self, request):
        yield from Parrot().reply(request)


class AsyncOnlyStreams:
    async def stream(self, request):
        for letter in Parrot().reply(request):
            await anyio.lowlevel.checkpoint()
            yield letter


class Punctual(Parrot):
    """A provider that keeps the limits of calls by itself."""

    obeys = True
    error = DeadlineExceeded

    def reply(self, request):
        leash = request.call.leash
        if leash is not None and leash.deadline is not None and leash.deadline <= request.call.clock():
            raise self.error("too late")
        return super().reply(request)


class AsyncPunctual(AsyncParrot):
    obeys = True

    async def complete(self, request):
        return Punctual().reply(request)

    async def stream(self, request):
        yield Punctual().reply(request)


class TimesOut(Punctual):
    error = RequestTimeout


class TimesOutInItsOwnWay(Punctual):
    error = TimeoutError


class Careless(Parrot):
    """A provider that says that it keeps limits, and does not."""

    obeys = True


class CarelessInStreams(Punctual):
    def stream(self, request):
        yield from Parrot().reply(request)


class AsyncCareless(AsyncParrot):
    obeys = True


class CarelessStreams(OnlyStreams):
    obeys = True


FAILING = Request(model="m", messages="fail, please")


class TestCheckProvider:
    @pytest.mark.parametrize(
        "provider",
        [Parrot(), AsyncParrot(), OnlyStreams(), AsyncOnlyStreams(), Punctual(), AsyncPunctual(), TimesOut()],
        ids=lambda provider: type(provider).__name__,
    )
    def test_accepts_providers_that_keep_the_laws(self, provider):
        """Sync and async providers pass, including their failures."""
        check_provider(provider, REQUEST, failing=[FAILING])

    @pytest.mark.parametrize("provider", [Whole(), Chance()], ids=["without stream", "by chance"])
    def test_accepts_providers_without_stream_or_with_random_answers(self, provider):
        """A provider need not stream, nor give the same answer twice."""
        check_provider(provider)

    @pytest.mark.parametrize(
        ("provider", "message"),
        [
            (SaysMoreStreamed(), "law 1 .*expected the same response from complete.. and stream.., got .*More: "),
            (
                YieldsWhenClosed(),
                r"law 2 .*expected its stream to close after 1 chunks, got RuntimeError.*ignored GeneratorExit.*finally",
            ),
            (AsyncForgetful(), r"law 8 .*for 4 concurrent calls as for a call alone, got .*\(in tasks on asyncio\)"),
            (Shared(), r"law 8 .*for 4 concurrent calls as for a call alone, got .*\(in threads\)"),
            (Marks(), "law 7 .*expected the request unchanged"),
            (AnswersAnything(), "law 11 .*expected an error, got .*fine"),
            (FailsInItsOwnWay(), "expected an answer, got ServerError: failed on request"),
            (
                Careless(),
                r"law 11 .*time limits hold.*: expected RequestTimeout or .* a call, got Response.*\(in sync whole\).*`obeys = ",
            ),
            (CarelessInStreams(), r"law 11 .*after the deadline .*\(in sync stream\)"),
            (AsyncCareless(), r"law 11 .*after the deadline .*\(in async whole on asyncio\)"),
            (CarelessStreams(), r"law 11 .*after the deadline .*\(in sync whole\)"),
            (TimesOutInItsOwnWay(), r"law 11 .*expected RequestTimeout .*got TimeoutError\('too late'\)"),
        ],
        ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
    )
    def test_finds(self, provider, message):
        """The message names the provider, and says what to write instead."""
        with pytest.raises(AssertionError, match=message) as caught:
            check_provider(provider, failing=[FAILING])
        assert type(provider).__name__ in str(caught.value)

    def test_compares_errors(self):
        """A request has to fail with the same error, whole and streamed."""

        class Partly(Parrot):
            def stream(self, request):
                if "fail" in request.messages[0].text:
                    raise LookupError("another error")
                yield from self.reply(request)

        with pytest.raises(AssertionError, match=r"law 1 .*got 'ServerError: failed on request' and 'LookupError"):
            check_provider(Partly(), failing=[FAILING])


OPENAI_STREAM = b"""\
data: {"id":"c-1","model":"m-1","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}

data: {"id":"c-1","model":"m-1","choices":[{"index":0,"delta":{"content":"Gr\xc3\xbc\xc3\x9fe"},"finish_reason":null}]}

data: {"id":"c-1","model":"m-1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}

data: {"id":"c-1","model":"m-1","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}

data: [DONE]

"""


class TestCheckCodec:
    def test_accepts_a_good_one(self):
        """OpenAI's codec passes, with a stream as OpenAI sends it."""
        from fluxibly.providers.dialects.openai_chat import OpenAICodec

        check_codec(OpenAICodec(), [OPENAI_STREAM])

    def test_finds_cut_streams_that_pass(self):
        """The check finds a decoder that accepts any end of a stream as the end of the answer."""

        class Decoder:
            done = False

            def decode_event(self, event):
                return [Chunk(event.data.decode())]

            def end(self):
                return []

        class Trusting:
            framing = "sse"

            def decoder(self):
                return Decoder()

        with pytest.raises(AssertionError, match=r"law 11 .*expected an error when stream 0 ends at byte 0, got"):
            check_codec(Trusting(), [b"data: a\n\ndata: b\n\n"])

    def test_finds_a_dependence_on_reads(self):
        """The check finds a decoder whose chunks depend on more than the events."""

        class Decoder:
            done = False
            clock = iter(range(10**9))

            def decode_event(self, event):
                return [Chunk(f"{next(self.clock)}")]

            def end(self):
                return []

        class Odd:
            framing = "ndjson"

            def decoder(self):
                return Decoder()

        with pytest.raises(AssertionError, match=r"got .* read at once and .* read byte by byte"):
            check_codec(Odd(), [b"1\n2\n"])
