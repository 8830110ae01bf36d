"""The laws, checked with random stacks, scripts and faults in all modes."""

from __future__ import annotations

import gc
import logging
import time
from contextlib import aclosing, suppress
from contextvars import copy_context
from unittest.mock import patch

import anyio
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support import strategies as s
from support.fast_clock import FastClock, FastWorker
from support.leftovers import threads

from fluxibly._logs import logger
from fluxibly.errors import StreamInterrupted, root_cause
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import MODES, Mode, Ran, run
from fluxibly.types import Request, Restart

pytestmark = pytest.mark.usefixtures("quick_collector")
REQUEST = Request(model="m", messages="hi")
WHOLE = [mode for mode in MODES if not mode.streaming]
STREAMS = [mode for mode in MODES if mode.streaming]
SHARING = {*s.LIMITS, *[kind for kind in (*s.BUILT_IN, *s.RETRIES) if kind.__name__ in ("cache", "retry_budget")]}
"""The layers whose calls share something on purpose."""
many = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Lines(logging.Handler):
    """A handler that collects the log lines of fluxibly while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self):
        logger.addHandler(self)
        logger.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *_: object) -> None:
        logger.removeHandler(self)
        logger.setLevel(logging.NOTSET)


class Sends:
    """A provider that records each request, in order with the events that the consumer gets."""

    def _next_steps(self, request):
        self.order.append("ask" if request.call.nested else "send")
        return super()._next_steps(request)

    def _take(self, step):
        if isinstance(step, BaseException):
            self.raised.append(step)
        return super()._take(step)


class Sync(Sends, ScriptedProvider):
    pass


class Async(Sends, AsyncScriptedProvider):
    pass


class Case:
    """A run: its outcome, the actions and log lines of the middleware, and the requests to the provider."""

    def __init__(self, mode: Mode, kinds, answers, *, threaded: bool = False, clock=None, **options) -> None:
        self.mode = mode
        self.log: list[str] = []
        self.clock = clock or VirtualClock()
        kind = Async if mode.backend and not threaded else Sync
        self.provider = kind(*(answer.make() for answer in answers), clock=self.clock)
        self.provider.order, self.provider.raised = [], []
        self.stack = [self.note, *s.build(kinds, self.log)]
        with Lines() as lines:
            self.ran: Ran = run(
                mode,
                self.provider,
                self.stack,
                REQUEST,
                clock=self.clock,
                watch=self.provider.order.append,
                **options,
            )
        self.lines = lines.lines

    def note(self, request, call_next):
        self.call = request.call
        return (yield from call_next(request))

    def outcome(self, *, unwrap: bool = True):
        """Return the response, or the error as its type and text."""
        if self.ran.error is None:
            return self.ran.response
        error = root_cause(self.ran.error) if unwrap else self.ran.error
        return type(error), str(error)

    def check_ends(self) -> None:
        """Check law 2: everything that began has ended, once."""
        assert self.provider.opened == self.provider.closed
        starts = sorted(line.split()[0] for line in self.log if " start" in line)
        ends = sorted(line.split()[0] for line in self.log if line.endswith(" end"))
        assert starts == ends
        assert self.ran.leaks == []
        assert not [line for line in self.log if line.endswith("another leash")]
        s.check_limits(self.stack, exact=isinstance(self.clock, VirtualClock))


@many
@given(s.stacks, s.clean_answers)
def test_modes_agree(kinds, answers):
    """Law 1: without failures after output, all modes have the same outcome and the same events in the middleware."""
    cases = [Case(mode, kinds, answers) for mode in MODES]
    first = cases[0]
    for case in cases[1:]:
        assert case.outcome() == first.outcome(), case.mode
        assert case.log == first.log, case.mode
        assert case.clock.sleeps == first.clock.sleeps, case.mode
    for case in cases:
        case.check_ends()


def agree(kinds, answers, *, restarts: bool) -> None:
    """Check that streams agree with streams and whole calls with whole calls, and that each keeps the other laws."""
    for modes in (WHOLE, STREAMS):
        cases = [Case(mode, kinds, answers, restarts=restarts) for mode in modes]
        for case in cases[1:]:
            assert case.outcome(unwrap=False) == cases[0].outcome(unwrap=False), case.mode
            assert case.log == cases[0].log, case.mode
            assert case.clock.sleeps == cases[0].clock.sleeps
            assert case.ran.events == cases[0].ran.events
            assert case.lines == cases[0].lines
        for case in cases:
            case.check_ends()
            check_stream(case)


@many
@given(s.any_stacks, s.any_answers, st.booleans())
def test_modes_agree_about_failures(kinds, answers, restarts):
    """Law 1: whatever fails, streams agree with streams and whole calls with whole calls."""
    agree(kinds, answers, restarts=restarts)


@many
@given(s.stacks.filter(lambda kinds: not set(kinds) & set(s.HANDLING)), s.any_answers)
def test_streams_wrap_the_error_of_the_whole_call(kinds, answers):
    """Law 1: if no middleware handles errors, a stream's root cause is the whole call's error."""
    cases = [Case(mode, kinds, answers) for mode in MODES]
    for case in cases[1:]:
        assert case.outcome() == cases[0].outcome(), case.mode
        assert case.log == cases[0].log, case.mode


REFUSED = ("again after output of the first answer", "returned another text", "returned an answer after")
# An interruption does not say which turns went before, so a middleware outside of the tools cannot return them.
MISSING_TURNS = "messages in `added`"


def check_stream(case: Case) -> None:
    """Check laws 3 and 4 for a stream that was read to its end."""
    ran = case.ran
    if not case.mode.streaming:
        return
    if ran.response is not None:
        assert ran.text == ran.response.text
    asked = output = gone_out = False
    for event in case.provider.order:
        if event == "send":
            assert not output, case.provider.order
            asked = True
        elif event != "ask":
            goes_on = isinstance(event, Restart) or event.added is not None  # a mark admits the next request
            # Output before the first request is no answer, which the request would repeat.
            output = (output and not goes_on) or (asked and not isinstance(event, Restart) and event.has_output)
            gone_out = not isinstance(event, Restart) and (gone_out or event.has_output)
    if ran.error is not None:
        # Output that an outer layer dropped had also passed the layer that asked again, or returned another answer.
        refused = any(words in str(ran.error) for words in (*REFUSED, MISSING_TURNS))
        assert isinstance(ran.error, StreamInterrupted) == (gone_out or refused), ran.error
    if isinstance(ran.error, StreamInterrupted):
        assert ran.error.partial.text == ran.text
        assert ran.error.__cause__ is not None or refused


@many
@given(s.any_stacks, s.any_answers, st.booleans(), st.sampled_from(STREAMS))
def test_nobody_is_accused_wrongly(kinds, answers, restarts, mode):
    """Law 3: none of these middleware returns another answer than was delivered, and nothing says that one does."""
    case = Case(mode, kinds, answers, restarts=restarts)
    assert not [words for words in REFUSED[1:] if words in str(case.ran.error)]
    assert not [line for line in case.lines if "than was delivered" in line]


def answering_anyway(name, log):
    """Answer whatever goes wrong, as users write it."""

    def answer(request, call_next):
        try:
            return (yield from call_next(request))
        except Exception:  # noqa: BLE001  # the mistake under test
            return s.Response("sorry c")

    return answer


def changing_the_end(name, log):
    """Change the text of the response alone."""

    def change(request, call_next):
        response = yield from call_next(request)
        return response.evolve(text=f"{response.text}☃b")

    return change


@many
@given(
    outer=st.lists(st.sampled_from((*s.WRAPPING, *s.BUILT_IN)), max_size=3),
    culprit=st.sampled_from([answering_anyway, changing_the_end]),
    inner=st.lists(st.sampled_from(s.KINDS), max_size=3),
    answers=s.any_answers,
    restarts=st.booleans(),
    mode=st.sampled_from(STREAMS),
)
def test_no_other_answer_than_was_delivered(*, outer, culprit, inner, answers, restarts, mode):
    """Law 3: whatever stands around a middleware that breaks the law, its answer is delivered, or it is an error."""
    case = Case(mode, [*outer, culprit, *inner], answers, restarts=restarts)
    case.check_ends()
    check_stream(case)


@many
@given(s.any_stacks, s.any_answers, st.integers(0, 4), st.sampled_from(STREAMS))
def test_early_stops(kinds, answers, stop_after, mode):
    """Law 2: a consumer that leaves at any point ends every flow, and frees the provider."""
    case = Case(mode, kinds, answers, stop_after=stop_after)
    case.check_ends()


@many
@given(s.stacks, s.any_answers, st.integers(0, 4), st.sampled_from(["error", "break", "drop", "cycle"]))
def test_streams_given_up(kinds, answers, reads, how):
    """Law 2: a consumer that raises, breaks off or drops its stream ends every flow, even through the collector."""
    log: list[str] = []
    provider = ScriptedProvider(*(answer.make() for answer in answers))
    stack = s.build(kinds, log)
    pipeline = Pipeline(provider, stack, clock=VirtualClock())
    before = dict(copy_context())
    with suppress(Exception):
        if how == "error":
            with pipeline.stream(REQUEST) as stream:
                for n, _ in enumerate(stream):
                    if n == reads:
                        raise LookupError("the consumer's own")
        elif how == "break":
            for n, _ in enumerate(pipeline.stream(REQUEST).texts()):
                if n == reads:
                    break
        else:
            stream = pipeline.stream(REQUEST)
            held = [stream]
            if how == "cycle":
                held.append(held)
            for _ in range(reads):
                next(stream)
    held = stream = None
    gc.collect()
    Pipeline(ScriptedProvider("next"), []).complete(REQUEST)
    assert dict(copy_context()) == before
    assert provider.opened == provider.closed
    starts = sorted(line.split()[0] for line in log if " start" in line)
    assert starts == sorted(line.split()[0] for line in log if line.endswith(" end"))
    s.check_limits(stack)


@many
@given(s.any_stacks, s.any_answers, st.booleans(), st.sampled_from(MODES))
def test_requests_stay_as_they_are(kinds, answers, restarts, mode):
    """Law 7: the caller's request is never changed, and the provider gets what the innermost middleware passed."""
    passed = []

    def innermost(name, log):
        def note(request, call_next):
            passed.append(request)
            return (yield from call_next(request))

        return note

    request = Request(model="m", messages="hi", metadata={"of": "mine"}, extra={"user": "me"}, headers={"x-a": "b"})
    before = fields_of(request)
    provider = (Async if mode.backend else Sync)(*(answer.make() for answer in answers), clock=VirtualClock())
    provider.order, provider.raised = [], []
    stack = s.build([*kinds, innermost], [])
    run(mode, provider, stack, request, clock=VirtualClock(), restarts=restarts)
    assert fields_of(request) == before
    assert request.call.attempts == 0
    assert len(provider.requests) <= len(passed)
    for got in provider.requests:
        assert got.call is not request.call
        assert any(got == each for each in passed)
        assert got.headers == {"x-a": "b"}


def fields_of(request):
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(request).items()}


PROMPT = "what only I may read, and nobody else at all"
ANSWER = f"you said: {PROMPT}"
quoting = st.sampled_from(s.ERRORS).map(lambda kind: lambda: kind(f"cannot answer {PROMPT!r} so late"))
confidential = st.lists(
    st.one_of(
        st.builds(s.Script, fails=quoting),
        st.builds(s.Script, st.just((ANSWER,)), quoting),
        st.builds(s.Script, st.just((ANSWER[:20], ANSWER[20:])), cut=st.booleans()),
    ),
    min_size=1,
    max_size=3,
).map(lambda answers: [*answers, *[s.Script((ANSWER,))] * 12])


class Records(Lines):
    def emit(self, record) -> None:
        if record.levelno > logging.DEBUG:
            self.lines.extend([record.getMessage(), *map(str, vars(record).values())])


@many
@given(s.stacks, confidential, st.sampled_from(MODES))
def test_content_stays_inside(kinds, answers, mode):
    """Law 9: no part of a prompt appears above DEBUG in a message or record, whatever quotes the prompt."""
    provider = (AsyncScriptedProvider if mode.backend else ScriptedProvider)(*(answer.make() for answer in answers))
    request = Request(model="m", messages=PROMPT)
    with Records() as records:
        run(mode, provider, [s.Logging(), *s.build(kinds, [])], request, clock=VirtualClock())
    assert records.lines
    for line in records.lines:
        for start in range(len(PROMPT) - 11):
            assert PROMPT[start : start + 12] not in line


@many
@given(
    s.stacks.filter(lambda kinds: not set(kinds) & {*s.HANDLING, *s.ENDING}),
    st.one_of(s.late_failures, s.cuts, s.early_failures),
    st.sampled_from(MODES),
)
def test_an_answer_is_whole_or_an_error(kinds, answer, mode):
    """Law 11: an answer that was cut off or failed is an error, if no middleware asks again."""
    case = Case(mode, kinds, [answer])
    assert case.ran.response is None
    assert case.ran.error is not None
    check_stream(case)


@many
@given(s.stacks, s.any_answers, st.booleans(), st.sampled_from([m for m in MODES if m.backend]))
def test_sync_providers_in_async_pipelines(kinds, answers, restarts, mode):
    """Law 1: a sync provider has the same outcome in worker threads as in a sync pipeline."""
    case = Case(mode, kinds, answers, restarts=restarts, threaded=True)
    plain = Case(Mode(mode.streaming), kinds, answers, restarts=restarts)
    assert case.outcome(unwrap=False) == plain.outcome(unwrap=False)
    assert case.log == plain.log
    assert case.ran.events == plain.ran.events
    case.check_ends()


@many
@given(s.stacks, s.interrupted_answers, st.sampled_from(MODES))
def test_interrupts_pass(kinds, answers, mode):
    """Law 6: a BaseException that is not an Exception reaches the caller unchanged from anywhere, and all flows end."""
    case = Case(mode, kinds, answers)
    case.check_ends()
    raised = [step for step in case.provider.raised if not isinstance(step, Exception)]
    assert len(raised) <= 1
    if raised:
        assert case.ran.error is raised[0]
        assert not hasattr(raised[0], "__notes__")


@many
@given(s.stacks, s.any_answers, st.integers(0, 5), st.sampled_from([m for m in MODES if m.backend]))
def test_cancellations_pass(kinds, answers, after, mode):
    """Laws 2 and 6: a cancellation at any await of the provider ends every flow, and reaches its cancel scope."""
    log: list[str] = []

    class Cancels(AsyncScriptedProvider):
        steps = 0

        async def stream(self, request):
            async with aclosing(super().stream(request)) as stream:
                async for item in stream:
                    await self.count()
                    yield item

        async def complete(self, request):
            await self.count()
            return await super().complete(request)

        async def count(self):
            self.steps += 1
            if self.steps > after:
                scopes[0].cancel()
            await anyio.lowlevel.checkpoint()

    provider = Cancels(*(answer.make() for answer in answers))
    stack = s.build(kinds, log)
    scopes, notes = [], []

    async def main():
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            pipeline = AsyncPipeline(provider, stack, clock=VirtualClock())
            try:
                if mode.streaming:
                    async with pipeline.stream(REQUEST) as stream:
                        async for _ in stream:
                            pass
                else:
                    await pipeline.complete(REQUEST)
            except Exception as error:  # noqa: BLE001  # only a cancellation is looked at
                return error
            except BaseException as error:
                notes.extend(getattr(error, "__notes__", []))
                raise
            assert provider.steps <= after
        assert scope.cancelled_caught == scope.cancel_called
        return None

    anyio.run(main, backend=mode.backend)
    assert notes == []
    assert provider.opened == provider.closed
    starts = sorted(line.split()[0] for line in log if " start" in line)
    assert starts == sorted(line.split()[0] for line in log if line.endswith(" end"))
    s.check_limits(stack)


@many
@given(s.stacks.filter(lambda kinds: not set(kinds) & SHARING), s.clean_answers, s.clean_answers, st.data())
def test_calls_keep_apart(kinds, one, two, data):
    """Laws 5 and 8: streams of the same stack, read in any turns, have the same outcomes as alone."""
    alone = [Case(Mode(streaming=True), kinds, answers) for answers in (one, two)]
    log: list[str] = []
    stack = s.build(kinds, log)
    before = dict(copy_context())
    streams = [
        Pipeline(ScriptedProvider(*(a.make() for a in answers)), stack, clock=VirtualClock()).stream(REQUEST)
        for answers in (one, two)
    ]
    got = [Ran(), Ran()]
    left = [0, 1]
    while left:
        n = data.draw(st.sampled_from(left))
        try:
            got[n].events.append(next(streams[n]))
        except StopIteration:
            got[n].response = streams[n].response
            left.remove(n)
        except Exception as error:  # noqa: BLE001  # the test compares whatever is raised
            got[n].error = error
            left.remove(n)
        assert dict(copy_context()) == before
    for n in (0, 1):
        assert got[n].events == alone[n].ran.events
        assert got[n].response == alone[n].ran.response
        assert type(root_cause(got[n].error or LookupError())) is type(root_cause(alone[n].ran.error or LookupError()))


@many
@given(s.stacks, s.any_answers, st.sampled_from(MODES))
def test_a_raising_log_handler_changes_nothing(kinds, answers, mode):
    """Law 10: a log handler that raises does not change the outcome."""

    class Raises(logging.Handler):
        def emit(self, record):
            raise OSError("disk full")

    plain = Case(mode, kinds, answers)
    handler = Raises()
    logger.addHandler(handler)
    try:
        case = Case(mode, kinds, answers)
    finally:
        logger.removeHandler(handler)
    assert case.outcome(unwrap=False) == plain.outcome(unwrap=False)
    assert case.log == plain.log


@many
@given(s.power_stacks, s.power_answers, st.booleans())
def test_powers_in_all_modes(kinds, answers, restarts):
    """Laws 1 to 5, for stacks with deadlines, turns, questions, targets, cleanups and flows in functions."""
    agree(kinds, answers, restarts=restarts)


@many
@given(s.power_stacks, s.power_answers, st.integers(0, 6), st.sampled_from(STREAMS))
def test_powers_and_early_stops(kinds, answers, stop_after, mode):
    """Law 2: a consumer that leaves at any point ends every flow, runs every cleanup, and frees the provider."""
    Case(mode, kinds, answers, stop_after=stop_after).check_ends()


@many
@given(s.power_stacks, s.interrupted_answers, st.sampled_from(MODES))
def test_interrupts_pass_powers(kinds, answers, mode):
    """Law 6: a BaseException that is not an Exception reaches the caller unchanged, and all flows end."""
    case = Case(mode, kinds, answers)
    raised = [step for step in case.provider.raised if not isinstance(step, Exception)]
    if raised and set(kinds) & set(s.RACES):  # what a loser raises after another branch has won ends nothing
        assert case.ran.error is None or isinstance(case.ran.error, Exception) or case.ran.error in raised
    elif raised:
        assert case.ran.error is raised[0]
    assert not any(hasattr(step, "__notes__") for step in raised)
    assert case.provider.opened == case.provider.closed
    assert case.ran.leaks == []
    s.check_limits(case.stack)


@many
@given(s.power_stacks, s.power_answers, st.sampled_from(MODES))
def test_every_attempt_is_spent_once(kinds, answers, mode):
    """Each request that a provider got is in `spent` once, and a call counts its own attempts."""
    case = Case(mode, kinds, answers)
    others = [spent for spent in case.call.spent if spent.provider.name == "Other"]
    assert len(case.call.spent) == len(case.provider.requests) + len(others)
    if not others:
        assert case.call.attempts == case.provider.order.count("send")


@many
@given(
    st.lists(
        st.sampled_from((*s.SAME_WHOLE, *s.SAME_WHOLE, *s.WATCHING, s.shouting, s.dropping, *s.LIMITS)), max_size=6
    ).flatmap(
        # Layers outside of turns see each turn of a stream.
        lambda kinds: st.sampled_from([kinds, *[[turns, *kinds] for turns in (s.turning, s.running, s.running_async)]])
    ),
    st.lists(st.one_of(s.successes, s.calls_of_tools), max_size=4),
)
def test_powers_whole_and_streamed(kinds, answers):
    """Law 1: turns, questions, targets and cleanups have the same outcome and the same events in all modes."""
    cases = [Case(mode, kinds, [*answers, *[s.Script(("last",))] * 40]) for mode in MODES]
    for case in cases:
        assert case.outcome() == cases[0].outcome(), case.mode
        assert case.log == cases[0].log, case.mode
        case.check_ends()
        check_stream(case)


def check_threads(case: Case) -> None:
    """Check that no thread and no stream is left, as soon as what the threads do has returned."""
    end = time.monotonic() + 5
    while True:
        left = threads()
        if not left and case.provider.opened == case.provider.closed:
            return
        assert time.monotonic() < end, left
        time.sleep(0.001)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(
    s.power_stacks.filter(lambda kinds: set(kinds) & {*s.RACES, s.looking_up}),
    s.power_answers,
    st.none() | st.integers(0, 6),
    st.sampled_from(MODES),
    st.booleans(),
)
def test_powers_with_threads_and_tasks(kinds, answers, stop_after, mode, threaded):
    """Laws 2 to 6: branches that really run at once leave no flow, stream or thread, and their texts add up."""
    with patch("fluxibly._drivers.limited.Worker", FastWorker):
        case = Case(mode, kinds, answers, clock=FastClock(), stop_after=stop_after, threaded=threaded)
    check_threads(case)
    case.check_ends()
    # The thread of a loser may reach its provider after the winner's output has gone out, so the order says nothing.
    if mode.streaming and case.ran.response is not None:
        assert case.ran.text == case.ran.response.text
