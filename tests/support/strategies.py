"""Hypothesis strategies: scripts for providers, requests, and stacks of a user's own middleware."""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import attrs
from hypothesis import strategies as st

from fluxibly.errors import (
    AuthenticationError,
    ConnectionFailed,
    ProviderError,
    RateLimitError,
    ServerError,
    StreamInterrupted,
    root_cause,
)
from fluxibly.flow import ask, emit, gather, hold_back, map_chunks, perform, provider_of, sleep
from fluxibly.middleware import (
    Balance,
    Cache,
    CircuitBreaker,
    Concurrency,
    Continue,
    Deadline,
    ExtractReasoning,
    Fallback,
    Guard,
    Hedge,
    Logging,
    Metrics,
    RateLimit,
    Redact,
    Retry,
    RetryBudget,
    SimulateStream,
    StreamMeter,
    StreamTimeout,
    Timing,
    Tools,
    Tracing,
    Validation,
)
from fluxibly.middleware._keys import name_of
from fluxibly.stores import MemoryStore
from fluxibly.target import Target
from fluxibly.testing import Cut, Delay
from fluxibly.types import (
    Chunk,
    Image,
    Message,
    Opaque,
    Reasoning,
    Request,
    Response,
    Restart,
    Text,
    ToolCallDelta,
    Usage,
)
from support import powers
from support.leftovers import eventually, left_in
from support.stores import SlowStore

# Each run makes its scripts from the drawn values, because an exception that was raised keeps its traceback.

ERRORS = (ServerError, RateLimitError, ConnectionFailed, AuthenticationError, ValueError)
texts = st.text(alphabet="aab\n☃", min_size=1, max_size=4)
errors = st.sampled_from(
    (*[lambda kind=kind: kind("scripted") for kind in ERRORS], lambda: RateLimitError("scripted", retry_after=3))
)
usages = st.builds(Usage, input_tokens=st.integers(0, 9), output_tokens=st.integers(0, 9))
chunks = st.one_of(
    texts,
    texts,
    st.builds(Chunk, texts, usage=usages),
    st.builds(Chunk, st.just(""), reasoning=texts),
    st.builds(
        lambda index, arguments: Chunk(
            tool_calls=(ToolCallDelta(index=index, id=f"id{index}", name="look", arguments=arguments),)
        ),
        st.integers(0, 1),
        st.sampled_from(["", "{", "}"]),
    ),
    st.builds(
        lambda text, *found: Chunk(text, parts=found),
        st.just("") | texts,
        st.sampled_from(
            [
                Reasoning(text="hm", signature="s"),
                Text("", raw={"cited": True}),
                Image(data=b"png", media_type="image/png"),
                Opaque("anthropic", {"type": "server_tool_use"}),
            ]
        ),
    ),
    st.builds(lambda text: Chunk(alternatives=((1, Chunk(text)),)), texts),
    st.sampled_from(["<t>", "</t>a", "<", "t>a b"]),
    st.just(Chunk()),
    st.builds(Chunk, finish_reason=st.sampled_from(["stop", "length"]), model=st.just("m-2")),
)
steps = st.one_of(chunks, st.builds(Delay, st.floats(0, 9)))
good_scripts = st.lists(steps, max_size=6)


@attrs.frozen
class Script:
    """An answer that can be made any number of times."""

    steps: tuple[Any, ...] = ()
    fails: Callable[[], BaseException] | None = None
    cut: bool = False

    def make(self) -> list[Any]:
        ends = [self.fails()] if self.fails else [Cut()] if self.cut else []
        return [*self.steps, *ends]

    @property
    def fails_after_output(self) -> bool:
        put_out = any(isinstance(s, str) or (isinstance(s, Chunk) and s.has_output) for s in self.steps)
        return put_out and (self.cut or self.fails is not None)


early_failures = st.builds(Script, fails=errors)
successes = st.builds(Script, good_scripts.map(tuple))
late_failures = st.builds(Script, st.lists(steps, min_size=1, max_size=4).map(tuple), errors)
cuts = st.builds(Script, st.lists(steps, min_size=1, max_size=4).map(tuple), cut=st.just(True))
clean_answers = st.lists(early_failures, max_size=2).flatmap(
    lambda failures: successes.map(lambda last: [*failures, *[last] * 12])
)
any_answers = st.lists(
    st.one_of(early_failures, late_failures, late_failures, cuts, successes), min_size=1, max_size=4
).map(lambda answers: [*answers, *[Script(("last",))] * 12])

interrupts = st.builds(
    Script, st.lists(steps, max_size=4).map(tuple), st.sampled_from([KeyboardInterrupt, asyncio.CancelledError])
)
interrupted_answers = st.tuples(st.lists(early_failures, max_size=1), interrupts).map(
    lambda parts: [*parts[0], *[parts[1]] * 12]
)

# A user's own middleware. A function of (name, log) makes each kind, so that every run has its own middleware.

seen = contextvars.ContextVar("seen", default="nothing")
Log = list[str]


def observer(name: str, log: Log) -> Any:
    def observe(request, call_next):
        call, leash = request.call, request.call.leash
        log.append(f"{name} start {request.model}")
        try:
            response = yield from call_next(request)
            log.append(f"{name} done {response.text!r} {response.reasoning!r} {len(response.tool_calls)}")
            return response
        except Exception as error:
            log.append(f"{name} failed {type(root_cause(error)).__name__}")
            raise
        finally:
            if call.leash is not leash:
                log.append(f"{name} found another leash")
            log.append(f"{name} end")

    return observe


def shouting(name: str, log: Log) -> Any:
    """Change each character, wherever chunks are cut."""

    def shout(request, call_next):
        return (yield from map_chunks(call_next(request), lambda c: attrs.evolve(c, text=c.text.upper() + "")))

    return shout


def dropping(name: str, log: Log) -> Any:
    """Leave out characters, and drop the chunks that are empty without them."""

    def fn(chunk):
        text = chunk.text.replace("a", "")
        if text == chunk.text:
            return chunk
        left = attrs.evolve(chunk, text=text)
        return None if left == Chunk("") else left

    def drop(request, call_next):
        return (yield from map_chunks(call_next(request), fn))

    return drop


def doubling(name: str, log: Log) -> Any:
    """Split each chunk into several, with each letter doubled."""

    def double(request, call_next):
        return (
            yield from map_chunks(
                call_next(request),
                lambda c: [*(Chunk(letter * 2) for letter in c.text), attrs.evolve(c, text="")],
            )
        )

    return double


def buffering(name: str, log: Log) -> Any:
    """Keep the last character until more text arrives, and release it at the end."""

    def buffer(request, call_next):
        kept = ""

        def fn(chunk):
            nonlocal kept
            text = kept + chunk.text
            kept = text[-1:]
            return attrs.evolve(chunk, text=text[:-1])

        def at_restart():
            nonlocal kept
            kept = ""

        return (
            yield from map_chunks(call_next(request), fn, lambda: Chunk(kept) if kept else None, at_restart=at_restart)
        )

    return buffer


def gathering(name: str, log: Log) -> Any:
    """Keep all the text for the end."""

    def gather(request, call_next):
        texts: list[str] = []

        def fn(chunk):
            texts.append(chunk.text)
            return attrs.evolve(chunk, text="")

        return (yield from map_chunks(call_next(request), fn, lambda: Chunk("".join(texts)), at_restart=texts.clear))

    return gather


def holding(name: str, log: Log) -> Any:
    def hold(request, call_next):
        return (yield from hold_back(call_next(request)))

    return hold


def holding_until(name: str, log: Log) -> Any:
    def hold(request, call_next):
        return (yield from hold_back(call_next(request), lambda text: "b" in text))

    return hold


def checking(name: str, log: Log) -> Any:
    def check(response):
        log.append(f"{name} checks")
        if "☃" in response.text:
            raise ValueError("a snowman")

    def checked(request, call_next):
        return (yield from hold_back(call_next(request), check=check))

    return checked


def guarding(name: str, log: Log) -> Any:
    def output(response):
        log.append(f"{name} checks")
        return "a snowman" if "☃" in response.text else None

    return Guard(output=output)


def extracting(name: str, log: Log) -> Any:
    return ExtractReasoning(tag="t")


def simulating(name: str, log: Log) -> Any:
    return SimulateStream()


def guarding_sentences(name: str, log: Log) -> Any:
    return Guard(output=lambda _: None, release="sentence")


def guarding_lengths(name: str, log: Log) -> Any:
    """Do I/O at each border."""

    async def alook():
        return None

    def output(response):
        return (yield from perform(lambda: None, alook))

    return Guard(output=output, release=2)


def retrying(name: str, log: Log) -> Any:
    def retry(request, call_next):
        for n in range(2):
            try:
                return (yield from call_next(request))
            except (ServerError, ConnectionFailed, RateLimitError) as error:
                log.append(f"{name} retries after {type(error).__name__}")
                yield from sleep(2**n)
        return (yield from call_next(request))

    return retry


def falling_back(name: str, log: Log) -> Any:
    def fall_back(request, call_next):
        try:
            return (yield from call_next(request))
        except (ServerError, AuthenticationError):
            log.append(f"{name} falls back")
            return (yield from call_next(request.evolve(model="other")))

    return fall_back


def asking_again(name: str, log: Log) -> Any:
    """Discard the first answer and ask again, which is refused once the first answer has gone out."""

    def again(request, call_next):
        yield from call_next(request)
        log.append(f"{name} asks again")
        return (yield from call_next(request))

    return again


def restarting(name: str, log: Log) -> Any:
    def restart(request, call_next):
        try:
            return (yield from call_next(request))
        except StreamInterrupted as error:
            if not (yield Restart(type(error.__cause__).__name__)):
                raise
        return (yield from call_next(request))

    return restart


def salvaging(name: str, log: Log) -> Any:
    """Return what had been delivered of an answer that was interrupted, and say that it is cut."""

    def salvage(request, call_next):
        try:
            return (yield from call_next(request))
        except StreamInterrupted as error:
            return error.partial.evolve(finish_reason="length")

    return salvage


def apologising(name: str, log: Log) -> Any:
    """Answer in place of a provider that failed before output."""

    def apologise(request, call_next):
        try:
            return (yield from call_next(request))
        except ProviderError:
            return Response("sorry a", finish_reason="stop")

    return apologise


def answering_anew(name: str, log: Log) -> Any:
    """Answer in place of an answer that was interrupted, if the consumer discards that one."""

    def answer(request, call_next):
        try:
            return (yield from call_next(request))
        except StreamInterrupted as error:
            if not (yield Restart(type(error.__cause__).__name__)):
                raise
        return Response("sorry b", finish_reason="stop")

    return answer


def filling(name: str, log: Log) -> Any:
    """Answer in place of an empty answer."""

    def fill(request, call_next):
        response = yield from call_next(request)
        return response if response.has_output else response.evolve(text="nothing ab")

    return fill


def heading(name: str, log: Log) -> Any:
    """Let out a text before the first chunk, whatever is in it."""

    def head(request, call_next):
        begun = False

        def fn(chunk):
            nonlocal begun
            pieces, begun = [chunk] if begun else [Chunk("a: "), chunk], True
            return pieces

        def at_restart():
            nonlocal begun
            begun = False

        return (yield from map_chunks(call_next(request), fn, at_restart=at_restart))

    return head


def short_circuit(name: str, log: Log) -> Any:
    def short(request, call_next):
        log.append(f"{name} answers")
        yield from ()
        return Response("cached ab", finish_reason="stop")

    return short


def raising_before(name: str, log: Log) -> Any:
    def refuse(request, call_next):
        if request:
            raise PermissionError("refused")
        return (yield from call_next(request))

    return refuse


def raising_after(name: str, log: Log) -> Any:
    def reject(request, call_next):
        response = yield from call_next(request)
        if response:
            raise ArithmeticError("rejected")
        return response

    return reject


def sleeping(name: str, log: Log) -> Any:
    def snooze(request, call_next):
        yield from sleep(0.5)
        try:
            return (yield from call_next(request))
        finally:
            log.append(f"{name} woke")

    return snooze


def performing(name: str, log: Log) -> Any:
    async def aread():
        log.append(f"{name} reads")
        return 1

    def read():
        log.append(f"{name} reads")
        return 1

    def work(request, call_next):
        assert (yield from perform(read, aread)) == 1
        response = yield from call_next(request)
        assert (yield from perform(read)) == 1
        return response

    return work


def setting_context(name: str, log: Log) -> Any:
    def set_context(request, call_next):
        before = seen.get()
        token = seen.set(name)
        try:
            response = yield from call_next(request)
        finally:
            log.append(f"{name} in {seen.get() == name}")
            seen.reset(token)
            assert seen.get() == before
        return response

    return set_context


def evolving(name: str, log: Log) -> Any:
    def evolve(request, call_next):
        return (yield from call_next(request.evolve(temperature=0.5)))

    return evolve


def annotating(name: str, log: Log) -> Any:
    """Change a field of the response that is not output."""

    def annotate(request, call_next):
        response = yield from call_next(request)
        return response.evolve(id=f"{response.id}-{name}")

    return annotate


# Middleware that use the other powers: limits, turns, questions, targets, cleanups.


def bounding(name: str, log: Log) -> Any:
    return Deadline(6)


def pacing(name: str, log: Log) -> Any:
    return StreamTimeout(first_chunk=4, idle=3)


def turning(name: str, log: Log) -> Any:
    """Run the tools that the model calls, at most twice."""

    def loop(request, call_next):
        asked, added = request, ()
        while True:
            response = yield from call_next(asked)
            if not response.tool_calls or len(asked.messages) > 4:
                return response.evolve(added=(*added, *response.added))
            log.append(f"{name} runs {len(response.tool_calls)}")
            turn = (response.message, *[Message.tool("noon", call) for call in response.tool_calls])
            yield from emit(Chunk(added=turn))
            added += (*response.added, *turn)
            asked = asked.evolve(messages=(*asked.messages, *turn))

    return loop


def running(name: str, log: Log) -> Any:
    """Run a function for each call of the model, side by side."""

    def look():
        log.append(f"{name} looks")
        return "noon"

    return Tools(look, max_turns=3)


def running_async(name: str, log: Log) -> Any:
    """Run an async function for each call that is approved, one after the other."""

    async def look():
        await anyio.lowlevel.checkpoint()
        raise ValueError("it is dark")

    def approve(called, request):
        yield from sleep(0.25)
        return called.id != "id1"

    return Tools(look, max_turns=2, parallel=False, approve=approve)


def continuing(name: str, log: Log) -> Any:
    return powers.going_on(2)


def completing(name: str, log: Log) -> Any:
    return Continue()


def judging(name: str, log: Log) -> Any:
    """Ask about an answer at its end, whatever comes of the question."""

    def judge(request, call_next):
        def at_end():
            try:
                answer = yield from ask(request.evolve(messages="fine?"), through=[Retry(max_retries=1, uniform=max)])
            except Exception as error:  # noqa: BLE001  # the test asks whoever answers
                log.append(f"{name} heard {type(error).__name__}")
            else:
                log.append(f"{name} heard {answer.text!r}")

        return (yield from map_chunks(call_next(request), lambda chunk: chunk, at_end))

    return judge


def asking_first(name: str, log: Log) -> Any:
    def ask_first(request, call_next):
        answer = yield from ask(request.evolve(messages="first?"))
        log.append(f"{name} heard {answer.text!r}")
        return (yield from call_next(request))

    return ask_first


def smoothing(name: str, log: Log) -> Any:
    return powers.smooth(0.25)


def stopping(name: str, log: Log) -> Any:
    return powers.stopping_at("b")


def limiting(name: str, log: Log) -> Any:
    taken = [0]

    def take():
        taken[0] += 1
        log.append(f"{name} start")

    def give():
        if taken[0]:
            taken[0] -= 1
            log.append(f"{name} end")

    async def agive():
        await anyio.lowlevel.checkpoint()
        give()

    return powers.limited(take, give, agive)


def prefacing(name: str, log: Log) -> Any:
    """Let out a chunk before the provider is asked."""

    def preface(request, call_next):
        yield from emit(Chunk(model="m-0"))
        return (yield from call_next(request))

    return preface


class Other:
    """A provider of its own for a target."""

    def complete(self, request):
        return Response("other ab", usage=Usage(input_tokens=1, output_tokens=2), finish_reason="stop")

    def stream(self, request):
        yield from ("other ", Chunk("ab", usage=Usage(input_tokens=1, output_tokens=2), finish_reason="stop"))


def diverting(name: str, log: Log) -> Any:
    return Fallback(to=[Target(Other(), model="m-3", drop=["temperature"])])


def balancing(name: str, log: Log) -> Any:
    return Balance([Target(Other(), model="m-3"), "m-4", "m-5"], policy="round_robin", cool_down=5)


def falling_back_anew(name: str, log: Log) -> Any:
    return Fallback("m-6", on_interrupt="restart", when=lambda error: not isinstance(error, RateLimitError))


def hedging(name: str, log: Log) -> Any:
    return Hedge(2, max_share=1.0)


def racing(name: str, log: Log) -> Any:
    """Send three requests at once."""
    return powers.hedge(0, copies=2)


def hedging_to_another(name: str, log: Log) -> Any:
    return Hedge(3, to=[Target(Other(), model="m-3"), "m-7"], at_most=2, max_share=1.0)


def looking_up(name: str, log: Log) -> Any:
    """Do several things at once before the call, and again at its end, whatever comes of them."""

    def read():
        log.append(f"{name} reads")
        return 1

    async def aread():
        await anyio.lowlevel.checkpoint()
        return read()

    def waits(seconds):
        yield from sleep(seconds)
        yield from perform(read, aread)
        yield from sleep(seconds)
        return seconds

    def both(request):
        try:
            question = ask(request.evolve(messages="what?"), through=[Retry(max_retries=1, uniform=max)])
            one, two, answer = yield from gather(request, waits(0.5), perform(read, aread), question)
            log.append(f"{name} heard {one} {two} {answer.text!r}")
        except Exception as error:  # noqa: BLE001  # the test asks whoever answers
            log.append(f"{name} heard {type(error).__name__}")

    def look_up(request, call_next):
        yield from both(request)
        return (yield from map_chunks(call_next(request), lambda chunk: chunk, lambda: both(request)))

    return look_up


RACES = (hedging, racing, hedging_to_another)
RESENDING = (*RACES, *RACES, diverting, balancing, falling_back_anew, bounding, pacing)
SAME_WHOLE = (judging, asking_first, limiting, diverting, prefacing, completing)
"""The powers that do the same for whole answers and streams."""
POWERS = (
    bounding,
    pacing,
    turning,
    running,
    running_async,
    continuing,
    completing,
    judging,
    asking_first,
    smoothing,
    stopping,
    limiting,
    prefacing,
    diverting,
    balancing,
    falling_back_anew,
    hedging,
    hedging,
    racing,
    hedging_to_another,
    looking_up,
)


def _built_in(make: Callable[[], Any], name: str) -> Any:
    def kind(_: str, log: Log) -> Any:
        return make()

    kind.__name__ = name
    return kind


BUILT_IN = tuple(
    _built_in(make, name)
    for name, make in {
        "cache": Cache,
        "logging": Logging,
        "tracing": Tracing,
        "metrics": Metrics,
        "timing": Timing,
        "layers": lambda: Timing(layers=True),
        "meter": StreamMeter,
        "redact": lambda: Redact(patterns={"a": "a+b?"}),
        "validation": Validation,
        "not_empty": lambda: Validation(empty="raise"),
        "checked": lambda: Validation(empty="retry", hold=True, check=lambda r: "no b" if "b" not in r.text else None),
    }.items()
)
RETRIES = tuple(
    _built_in(make, name)
    for name, make in {
        "retry": lambda: Retry(max_retries=2, uniform=max),
        "retry_restart": lambda: Retry(max_retries=2, uniform=max, on_interrupt="restart"),
        "retry_limits": lambda: Retry(max_retries=1, uniform=max, limits={RateLimitError: 2, ConnectionFailed: 0}),
        "retry_decide": lambda: Retry(
            max_retries=2, uniform=max, decide=lambda error, n: {ValueError: True, ServerError: 0.5}.get(type(error))
        ),
        "retry_budget": lambda: Retry(max_retries=3, uniform=max, budget=RetryBudget(ratio=0, floor=1)),
        "retry_refused": lambda: Retry(max_retries=1, decide=lambda error, n: 1.0),
    }.items()
)


# Middleware that limit what passes. Each stack has a store of its own, which some of its layers share.


class Passed:
    """A layer right inside of a `RateLimit`, which notes when requests pass it."""

    def __init__(self, limit: RateLimit) -> None:
        self.limit = limit
        self.times: dict[str, list[float]] = {}

    def __call__(self, request, call_next):
        info = yield from provider_of(request)
        self.times.setdefault(name_of(info, request, self.limit.by), []).append(request.call.clock())
        return (yield from call_next(request))


TOKENS = 25
"""More than any of the scripted answers uses."""


def _limiting(make: Callable[[Any], Any], name: str) -> Any:
    def kind(_: str, log: Log, store: Any) -> Any:
        return make(store)

    kind.__name__ = name
    return kind


def _tokens(store: Any) -> RateLimit:
    return RateLimit(tokens=100, per=10, burst=60, max_wait=4, estimate=lambda _: TOKENS, give_back=False, store=store)


LIMITS = tuple(
    _limiting(make, name)
    for name, make in {
        "place": lambda store: Concurrency(1, max_wait=3),
        "shared_place": lambda store: Concurrency(1, max_wait=2, store=store),
        "shared_places": lambda store: Concurrency(2, max_wait=0, store=store),
        "no_queue": lambda store: Concurrency(1, queue=0, by="provider", store=store),
        "far_place": lambda store: Concurrency(1, max_wait=1, store=SlowStore()),
        "rate": lambda store: RateLimit(requests=1, per=3, max_wait=5),
        "shared_rate": lambda store: RateLimit(requests=2, per=4, burst=2, max_wait=1, store=store),
        "far_rate": lambda store: RateLimit(requests=2, per=2, burst=1, max_wait=2, store=SlowStore()),
        "tokens": lambda store: _tokens(None),
        "far_tokens": lambda store: _tokens(SlowStore()),
        "learned_tokens": lambda store: RateLimit(requests=9, tokens=60, per=6, max_wait=9, by="provider"),
        "circuit": lambda store: CircuitBreaker(failures=1, open_for=1),
        "shared_circuit": lambda store: CircuitBreaker(failures=2, open_for=0.5, store=store),
        "far_circuit": lambda store: CircuitBreaker(failures=1, open_for=0.5, probes=2, store=SlowStore()),
    }.items()
)


def check_limits(layers: Sequence[Any], *, exact: bool = True) -> None:
    """Check that nothing has passed beyond a limit, and that nobody is left: in a place, in a queue, or as a probe.

    Times are only compared where they are `exact`. Real time goes on between what a layer reads and what is noted.
    """
    passed: dict[Any, list[float]] = {}
    for layer in layers:
        if isinstance(layer, Passed) and exact:
            for key, times in layer.times.items():
                together = passed.setdefault((layer.limit.store, layer.limit.requests, key), [])
                together += times
                check_rate(together, layer.limit, TOKENS if layer.limit.estimate else 0)
        elif isinstance(layer, (RateLimit, Concurrency, CircuitBreaker)):
            assert eventually(lambda store=layer.store: not left_in(store)), (layer, left_in(layer.store))
            assert not layer._shared._owed


def check_rate(times: Sequence[float], layer: RateLimit, tokens: float = 0) -> None:
    """Check that in no window of time more has passed than the limits allow. Each time has taken at least `tokens`."""
    for limit in layer._limits:
        level, before = 0.0, -math.inf
        for time in sorted(times):
            level = max(0.0, level - limit.rate * (time - before)) + (1 if limit.name == "requests" else tokens)
            before = time
            assert level <= limit.burst + 1e-6, (layer, times)


WATCHING = (observer, sleeping, performing, setting_context, evolving, annotating, filling)
WRAPPING = (
    *(shouting, dropping, doubling, heading, buffering, gathering, holding, holding_until, checking),
    *(guarding, guarding_sentences, guarding_lengths, extracting, simulating),
)
HANDLING = (retrying, falling_back, restarting, salvaging, apologising, answering_anew, *RETRIES)
ENDING = (short_circuit, raising_before, raising_after)
KINDS = (*WATCHING, *WATCHING, *BUILT_IN, *WRAPPING, *WRAPPING, *HANDLING, *HANDLING, *LIMITS, *ENDING)

some_watching = (observer, sleeping, setting_context, filling)
some_wrapping = st.lists(st.sampled_from(WRAPPING), max_size=2)


def around(handling: tuple[Any, ...]) -> st.SearchStrategy[list[Any]]:
    """Return stacks of one `handling` middleware, with wrappers around and within it."""
    return st.builds(
        lambda outer, one, inner: [*outer, one, *inner], some_wrapping, st.sampled_from(handling), some_wrapping
    )


# Retries of all kinds around limits, in any order and nesting.
limited_stacks = st.lists(
    st.one_of(st.sampled_from(LIMITS), st.sampled_from((*HANDLING, *some_watching))), min_size=2, max_size=6
)
stacks = st.one_of(st.lists(st.sampled_from(KINDS), max_size=6), around(HANDLING), limited_stacks)
any_stacks = st.one_of(stacks, around((*HANDLING, asking_again)))
"""Also stacks with a middleware that is refused in a stream and allowed in a whole call."""


power_stacks = st.one_of(
    st.lists(st.sampled_from((*POWERS, *POWERS, *WATCHING, *BUILT_IN, *WRAPPING, *HANDLING)), max_size=7),
    st.lists(
        st.one_of(st.sampled_from(LIMITS), st.sampled_from((*POWERS, *RESENDING, *RETRIES))), min_size=2, max_size=7
    ),
).filter(lambda kinds: set(kinds) & set(POWERS))
calls_of_tools = st.builds(
    lambda texts, arguments: Script(
        (*texts, Chunk(tool_calls=(ToolCallDelta(index=0, id="c1", name="look", arguments=arguments),)))
    ),
    st.lists(texts, max_size=2),
    st.sampled_from(["{}", '{"at": 1}']),
)
power_answers = st.lists(
    st.one_of(early_failures, late_failures, cuts, successes, calls_of_tools, calls_of_tools), min_size=1, max_size=5
).map(lambda answers: [*answers, *[Script(("last",))] * 120])


def build(kinds: list[Any], log: Log) -> list[Any]:
    """Return a new stack of these kinds, with an observer outermost and another innermost."""
    store = MemoryStore()
    layers: list[Any] = []
    for n, kind in enumerate([observer, *kinds, observer]):
        layers.append(kind(f"{n}:{kind.__name__}", log, *([store] if kind in LIMITS else [])))
        if isinstance(layers[-1], RateLimit):
            layers.append(Passed(layers[-1]))
    return layers


requests = st.builds(Request, model=st.just("m"), messages=texts, temperature=st.none() | st.floats(0, 2))
