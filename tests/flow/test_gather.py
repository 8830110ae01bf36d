"""`gather`: several things at once, with their results in order."""

from __future__ import annotations

import contextvars
import threading

import pytest
from anyio.lowlevel import checkpoint
from support.powers import informed

from fluxibly.errors import DeadlineExceeded, ServerError
from fluxibly.flow import ask, emit, gather, hold_back, map_chunks, perform, race, sleep
from fluxibly.flow.compose import send
from fluxibly.middleware import Deadline, Retry
from fluxibly.testing import AsyncScriptedProvider, Delay, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Chunk, Request, Response

REQUEST = Request(model="m", messages="hi")
pytestmark = pytest.mark.parametrize("mode", MODES, ids=str)


class Call:
    """A call of a middleware that first runs `flow(request)`, in virtual time."""

    def __init__(self, mode, flow, *answers, stack=()):
        self.clock = VirtualClock()
        self.result = self.error = None

        def first(request, call_next):
            self.record = request.call
            try:
                self.result = yield from flow(request)
            except Exception as error:
                self.error = error
                raise
            return (yield from call_next(request))

        kind = AsyncScriptedProvider if mode.backend else ScriptedProvider
        self.provider = kind(*answers, *["answer"] * 3, clock=self.clock)
        self.ran = run(mode, self.provider, [*stack, first], REQUEST, clock=self.clock)
        assert self.provider.opened == self.provider.closed
        assert self.ran.leaks == []


def returning(value, log=None):
    """Return the two functions of a `perform`."""

    def call():
        if log is not None:
            log.append(value)
        return value

    async def acall():
        await checkpoint()
        return call()

    return call, acall


def steps(*seconds, result="done"):
    for each in seconds:
        yield from sleep(each)
    return result


class TestResults:
    def test_in_order(self, mode):
        """The results come in the order of the flows, whatever ends first."""

        def flow(request):
            return (yield from gather(request, steps(3, result="a"), perform(*returning("b")), steps(1, 1, result="c")))

        call = Call(mode, flow)
        assert call.result == ["a", "b", "c"]
        assert call.clock.now() == 3
        assert call.ran.response.text == "answer"

    def test_questions_and_performs(self, mode):
        """A question and a look-up take no longer than the longer of the two."""

        def flow(request):
            question = request.evolve(messages="what?")
            fact, answer = yield from gather(request, perform(*returning("fact")), ask(question))
            return fact, answer.text

        call = Call(mode, flow, [Delay(3), "an answer"])
        assert call.result == ("fact", "an answer")
        assert call.clock.now() == 3
        assert call.record.attempts == 1  # the question is none of the call's
        assert len(call.record.spent) == 2

    @pytest.mark.parametrize("count", [0, 1, 2, 30])
    def test_any_number(self, mode, count):
        """None, one or many."""

        def flow(request):
            return (yield from gather(request, *[steps(1, result=n) for n in range(count)]))

        call = Call(mode, flow)
        assert call.result == list(range(count))
        assert call.clock.now() == (1 if count else 0)

    def test_within_each_other(self, mode):
        """A flow may gather itself, and race in a question."""

        def hedged(request, call_next):
            return (yield from race(call_next, [request, request.evolve(model="b")], delay=1))

        def inner(request):
            return (yield from gather(request, steps(2), ask(request.evolve(messages="?"), through=[hedged])))

        def flow(request):
            one, (two, answer) = yield from gather(request, steps(1), inner(request))
            return one, two, answer.text

        call = Call(mode, flow, [Delay(9), "slow"], [Delay(3), "fast"])
        assert call.result == ("done", "done", "fast")
        assert call.clock.now() == 4

    def test_in_a_function_of_a_combinator(self, mode):
        """Functions between two chunks may gather."""

        def until(text):
            yield from gather(REQUEST, steps(1), steps(2))
            return True

        def layer(request, call_next):
            def at_end():
                one, two = yield from gather(request, steps(1, result="x"), steps(2, result="y"))
                yield Chunk(f"{one}{two}")

            held = hold_back(call_next(request), until)
            return (yield from map_chunks(held, lambda chunk: chunk, at_end))

        clock = VirtualClock()
        kind = AsyncScriptedProvider if mode.backend else ScriptedProvider
        ran = run(mode, kind("a", clock=clock), [layer], REQUEST, clock=clock)
        assert ran.response.text == "axy"

    def test_the_short_form(self, mode):
        """The short form of a middleware that adds facts to the request."""
        clock = VirtualClock()
        kind = AsyncScriptedProvider if mode.backend else ScriptedProvider
        provider = kind("more", "answer", clock=clock)
        ran = run(mode, provider, [informed(*returning("fact"))], REQUEST, clock=clock)
        assert ran.response.text == "answer"
        assert provider.requests[-1].messages[-1].text == "fact more"


class TestFailures:
    def test_the_first_error(self, mode):
        """The first error gives the others up, and is raised as it is."""
        ends = []
        failure = LookupError("no")

        def slow():
            try:
                yield from sleep(9)
            finally:
                ends.append("slow")

        def fails():
            yield from sleep(1)
            raise failure

        call = Call(mode, lambda request: gather(request, slow(), fails()))
        assert call.error is failure
        assert ends == ["slow"]
        assert call.clock.now() == 1

    def test_an_error_of_the_first_step(self, mode):
        """Flows that have not begun do not begin."""
        log = []

        def fails():
            raise LookupError("no")
            yield

        call = Call(mode, lambda request: gather(request, fails(), perform(*returning("late", log))))
        assert isinstance(call.error, LookupError)
        assert log == []

    def test_of_a_question(self, mode):
        """A question may have its own retries, and its error is that of the gather."""

        def flow(request):
            question = ask(request.evolve(messages="?"), through=[Retry(max_retries=1, base_delay=2, uniform=max)])
            return (yield from gather(request, steps(50), question))

        call = Call(mode, flow, ServerError("one"), ServerError("two"))
        assert isinstance(call.error, ServerError)
        assert call.clock.now() == 2

    def test_a_deadline(self, mode):
        """The limits of the call hold for each flow."""
        call = Call(mode, lambda request: gather(request, steps(2), steps(1, 50)), stack=[Deadline(4)])
        assert isinstance(call.error, DeadlineExceeded)
        assert call.clock.now() == 4

    def test_a_handled_error(self, mode):
        """A flow that handles its error returns as usual."""

        def careful():
            try:
                yield from perform(lambda: 1 / 0)
            except ZeroDivisionError:
                return "handled"

        call = Call(mode, lambda request: gather(request, careful(), steps(1)))
        assert call.result == ["handled", "done"]


class TestIsolation:
    def test_contexts(self, mode):
        """Each flow has context variables of its own."""
        var = contextvars.ContextVar("var", default="none")

        def sets(value):
            token = var.set(value)
            yield from sleep(1)
            seen = yield from perform(var.get)
            assert var.get() == value
            var.reset(token)
            return seen

        call = Call(mode, lambda request: gather(request, sets("a"), sets("b")))
        assert call.result == ["a", "b"]
        assert var.get() == "none"

    def test_one_thread(self, mode):
        """The flows themselves are stepped in the thread of the call."""
        seen = set()

        def noting():
            for _ in range(3):
                seen.add(threading.get_ident())
                yield from perform(*returning(1))
            seen.add(threading.get_ident())

        def flow(request):
            seen.add(threading.get_ident())
            return (yield from gather(request, noting(), noting()))

        Call(mode, flow)
        assert len(seen) == 1


class TestWhatIsRefused:
    @pytest.mark.parametrize("others", [0, 1])
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda _: emit(Chunk("x")),
                "gather: expected flows that yield only from sleep(…), perform(…), ask(…) and gather(…), got a More",
            ),
            (
                lambda request: race(send, [request, request], 1),
                "gather: expected no request of the call itself; write yield from ask(request)",
            ),
        ],
        ids=["emit", "race"],
    )
    def test_what_streams(self, mode, make, message, others):
        """A flow that streams, or sends the request of the call, is refused, alone or among others."""
        call = Call(mode, lambda request: gather(request, make(request), *[steps(1)] * others))
        assert isinstance(call.error, TypeError)
        assert str(call.error) == message

    @pytest.mark.parametrize("value", [None, "text", 5, Response("x"), ["text"]], ids=repr)
    def test_other_values(self, mode, value):
        """What is no flow is refused, and the message says what to write."""
        call = Call(mode, lambda request: gather(request, value))
        assert isinstance(call.error, TypeError)
        assert "gather: expected flows such as perform(…) or ask(…), got" in str(call.error)
        assert "write gather(request, perform(call, acall), …)" in str(call.error)

    def test_a_coroutine(self, mode):
        """A coroutine is refused, and closed."""

        async def acall():
            raise AssertionError

        call = Call(mode, lambda request: gather(request, acall()))
        assert "got a coroutine" in str(call.error)

    def test_one_flow_twice(self, mode):
        """The results of one flow cannot be two, so it is refused. One that has begun would lose what it waits for."""
        flow = steps(1)
        call = Call(mode, lambda request: gather(request, flow, flow))
        assert isinstance(call.error, ValueError)
        assert str(call.error) == (
            "gather: expected a flow for each result, got one flow twice; call its function again"
        )

    @pytest.mark.parametrize("step", [next, list], ids=["under way", "over"])
    def test_a_flow_that_has_begun(self, mode, step):
        """A flow that has begun is refused, alone or among others: it would give a result that it does not have."""
        for others in ([], [steps(1)]):
            flow = steps(1)
            step(flow)
            call = Call(mode, lambda request, flow=flow, others=others: gather(request, flow, *others))
            assert isinstance(call.error, ValueError)
            assert str(call.error) == (
                "gather: expected flows that have not begun, got one that has; call its function again"
            )

    def test_no_request(self, mode):
        """The request of the call comes first."""
        call = Call(mode, lambda _: gather(steps(1), steps(2)))
        assert str(call.error) == "gather: expected a Request first, got a generator; write gather(request, …)"
