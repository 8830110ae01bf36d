"""`Tools`: the functions that the model calls run once each, and their results go back, in all modes."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import threading
from collections import Counter
from functools import partial, wraps

import anyio
import anyio.lowlevel
import attrs
import pytest
from hypothesis import given, settings, strategies as st
from support.calling import REQUEST, call, scripted

from fluxibly import LLM, LLMConfig, Target, register_function, tool
from fluxibly.errors import (
    ConfigError,
    DeadlineExceeded,
    GuardRefused,
    MaxTurnsExceeded,
    ServerError,
    StreamInterrupted,
    root_cause,
)
from fluxibly.flow import ask, emit, perform
from fluxibly.middleware import Cache, Deadline, Fallback, Guard, Logging, Redact, Retry, Tools, Validation
from fluxibly.pipeline import SYSTEM_CLOCK, AsyncPipeline, Pipeline
from fluxibly.registry import make_middleware
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, VirtualClock, check_middleware
from fluxibly.testing.modes import BACKENDS, MODES, run, run_async
from fluxibly.types import Chunk, Image, Message, Request, Response, Tool, ToolCall, ToolCallDelta, Usage


def calling(*calls, text="", finish_reason="tool_call"):
    """Return the script of an answer that calls tools: each a name, or a name and its arguments."""
    pairs = [each if isinstance(each, tuple) else (each, {}) for each in calls]
    deltas = [
        ToolCallDelta(index=n, id=f"c{n}", name=name, arguments=given if isinstance(given, str) else json.dumps(given))
        for n, (name, given) in enumerate(pairs)
    ]
    return [text, *[Chunk(tool_calls=(delta,)) for delta in deltas], Chunk(finish_reason=finish_reason)]


class Counted:
    """Functions that note each of their calls."""

    def __init__(self):
        self.calls = []

    def clock(self) -> str:
        """Return the time."""
        self.calls.append("clock")
        return "noon"

    def double(self, number: int) -> int:
        self.calls.append(number)
        return number * 2

    def fails(self, number: int = 0) -> int:
        self.calls.append("fails")
        raise ValueError("secret 4711")

    async def later(self, number: int) -> int:
        await anyio.lowlevel.checkpoint()
        self.calls.append(number)
        return number + 1


@pytest.fixture
def counted():
    return Counted()


def results(made):
    """Return the texts of all results, and whether each is an error."""
    return [(message.text, message.is_error) for message in made.response.added if message.role == "tool"]


def decisions(made):
    return [decision.what for decision in made.record.decisions if decision.middleware == "Tools"]


def shown(made):
    """Name the events of a stream: texts, and the length of each mark."""
    events = [event.text if event.added is None else len(event.added) for event in made.ran.events]
    return [event for event in events if event != ""]


class TestTurns:
    def test_a_function_runs_and_the_model_answers(self, mode, counted):
        """The response is the last answer; what was said before is in `added`. A stream shows all turns."""
        made = call(mode, Tools([counted.clock]), calling("clock", text="Let me look. "), ["It is ", "noon."])
        assert made.response.text == "It is noon."
        assert [(message.role, message.text) for message in made.response.added] == [
            ("assistant", "Let me look. "),
            ("tool", "noon"),
        ]
        assert made.response.added[0].tool_calls[0].name == "clock"
        assert made.response.added[1].tool_call_id == "c0"
        assert counted.calls == ["clock"]
        assert not mode.streaming or shown(made) == ["Let me look. ", 2, "It is ", "noon."]
        first, second = made.provider.requests
        assert [each.name for each in first.tools] == [each.name for each in second.tools] == ["clock"]
        assert second.messages == (*REQUEST.messages, *made.response.added)

    def test_without_a_call(self, mode, counted):
        """An answer without calls is the response, and nothing else happens."""
        made = call(mode, Tools(counted.clock), "Hello.")
        assert (made.response.text, made.response.added, counted.calls) == ("Hello.", (), [])

    def test_all_modes_agree(self, counted):
        """Law 1, for several turns with several calls each, of sync and async functions."""
        tools = Tools([counted.clock, counted.double, counted.later, counted.fails])
        script = [
            calling("clock", ("double", {"number": 2})),
            calling(("later", {"number": 1}), "fails", text="Hm. "),
            calling(("double", {"number": "x"}), "nothing"),
            ["Done."],
        ]
        made = [call(mode, tools, *script) for mode in MODES]
        assert [each.response for each in made] == [made[0].response] * len(MODES)
        assert results(made[0]) == [
            ("noon", False),
            ("4", False),
            ("2", False),
            ("fails raised ValueError: secret 4711", True),
            ("the arguments of double are wrong: number: expected an integer, got a string", True),
            ("there is no tool 'nothing'; expected one of clock, double, later, fails", True),
        ]
        assert Counter(counted.calls) == Counter({"clock": 6, 2: 6, 1: 6, "fails": 6})

    def test_the_conversation_goes_on(self, mode, counted):
        """`[*messages, *response.added, response.message]` is what the model is sent in the next call."""
        made = call(mode, Tools(counted.clock), calling("clock"), "Noon.")
        messages = [*REQUEST.messages, *made.response.added, made.response.message, Message.user("Thanks!")]
        again = call(mode, Tools(counted.clock), "Welcome.", request=REQUEST.evolve(messages=messages))
        assert again.response.added == ()

    def test_what_layers_within_have_added(self, mode, counted):
        """The messages of an inner layer are kept, in their place, and are sent again."""

        def inner(request, call_next):
            first = yield from call_next(request)
            if len(request.messages) > 1:
                return first
            note = (first.message, Message.user("Go on."))
            yield from emit(Chunk(added=note))
            second = yield from call_next(request.evolve(messages=(*request.messages, *note)))
            return second.evolve(added=note)

        made = call(mode, [Tools(counted.clock), inner], "Hm.", calling("clock"), "Noon.")
        assert [message.text for message in made.response.added] == ["Hm.", "Go on.", "", "noon"]
        assert made.provider.requests[-1].messages == (*REQUEST.messages, *made.response.added)
        assert not mode.streaming or shown(made) == ["Hm.", 2, 2, "Noon."]

    def test_the_record_is_that_of_all_turns(self, mode, counted):
        """The usage is the last answer's, and `total_usage` that of all turns."""
        usage = Usage(input_tokens=1, output_tokens=2)
        script = [[*calling("clock"), Chunk(usage=usage)], ["Noon.", Chunk(usage=usage)]]
        made = call(mode, Tools(counted.clock), *script)
        assert (made.record.attempts, made.response.usage) == (2, usage)
        assert made.response.total_usage == Usage(input_tokens=2, output_tokens=4)

    def test_calls_with_the_same_id_or_none(self, mode, counted):
        """Each call has a result of its own, in the order of the calls."""
        calls = [ToolCall("", "double", {"number": 1}), ToolCall("same", "double", {"number": 2})]
        made = call(mode, Tools(counted.double), Response("", tool_calls=[*calls, calls[1]]), "Done.")
        assert results(made) == [("2", False), ("4", False), ("4", False)]
        assert sorted(counted.calls) == [1, 2, 2]

    def test_many_calls_in_one_answer(self, mode, counted):
        script = calling(*[("double", {"number": n}) for n in range(50)])
        made = call(mode, Tools(counted.double), script, "Done.")
        assert results(made) == [(str(2 * n), False) for n in range(50)]
        assert sorted(counted.calls) == [*range(50)]

    def test_large_arguments(self, mode):
        text = "x" * 1_000_000
        made = call(mode, Tools(tool(lambda text: str(len(text)), name="size")), calling(("size", {"text": text})), "")
        assert results(made) == [("1000000", False)]

    def test_media_as_a_result(self, mode):
        image = Image(data=b"png", media_type="image/png")
        made = call(mode, Tools(tool(lambda: ["It looks so:", image], name="draw")), calling("draw"), "Done.")
        assert made.response.added[1].content[1] == image


class TestToolsOfTheCaller:
    LOOK = Tool("look", "Looks things up")

    def test_a_call_of_one_ends_the_loop(self, mode, counted):
        """The answer is the caller's as it is, and none of its calls runs."""
        request = REQUEST.evolve(tools=[self.LOOK])
        made = call(mode, Tools(counted.clock), calling("clock"), calling("clock", "look"), request=request)
        assert [each.name for each in made.response.tool_calls] == ["clock", "look"]
        assert (counted.calls, len(made.response.added)) == (["clock"], 2)
        assert [each.name for each in made.provider.requests[0].tools] == ["look", "clock"]
        assert decisions(made) == ["runs no call of the answer, because it calls a tool of the caller's"]

    def test_one_of_the_same_name(self, mode, counted):
        """It is an error, unless it is the same tool."""
        made = call(mode, Tools(counted.clock), request=REQUEST.evolve(tools=[Tool("clock")]))
        assert type(made.ran.error) is ConfigError
        assert str(made.ran.error).startswith("Tools: expected other names in the tools of the request than those of")
        assert made.provider.requests == []
        mine = tool(counted.clock)
        made = call(mode, Tools(mine), calling("clock"), "Noon.", request=REQUEST.evolve(tools=[mine]))
        assert (made.response.text, [each.name for each in made.provider.requests[0].tools]) == ("Noon.", ["clock"])

    @pytest.mark.parametrize(("choice", "later"), [("required", None), ("clock", None), ("auto", None), (None, None)])
    def test_the_choice_holds_for_the_first_turn(self, mode, counted, choice, later):
        """Otherwise the model could never answer."""
        made = call(mode, Tools(counted.clock), calling("clock"), "Noon.", request=REQUEST.evolve(tool_choice=choice))
        assert [each.tool_choice for each in made.provider.requests] == [choice, later]

    def test_none_means_none(self, mode, counted):
        """A model that calls a tool all the same gets no result."""
        made = call(mode, Tools(counted.clock), calling("clock"), request=REQUEST.evolve(tool_choice="none"))
        assert ([each.name for each in made.response.tool_calls], counted.calls) == (["clock"], [])

    @pytest.mark.parametrize("reason", ["length", "content_filter", "error"])
    def test_an_answer_that_was_cut_off(self, mode, counted, reason):
        """Its calls may be incomplete, and do not run."""
        made = call(mode, Tools(counted.clock), calling("clock", finish_reason=reason))
        assert (made.response.finish_reason, counted.calls) == (reason, [])
        assert decisions(made) == [f"runs no call of the answer, because the finish reason is '{reason}'"]


class TestMistakesOfTheModel:
    @pytest.mark.parametrize(
        ("called", "told"),
        [
            (("double", "{"), "the arguments of double are wrong: the arguments are not JSON: "),
            (
                ("double", "[]"),
                "the arguments of double are wrong: the arguments: expected a JSON object, got a list; ",
            ),
            (("double", {}), "the arguments of double are wrong: number is required, and missing"),
            (
                ("double", {"number": 1, "n": 2}),
                "the arguments of double are wrong: n is unknown; expected number (req",
            ),
            (
                ("double", {"number": 1.5}),
                "the arguments of double are wrong: number: expected an integer, got a number",
            ),
            (("duoble", {"number": 1}), "there is no tool 'duoble'; expected one of double"),
        ],
    )
    @pytest.mark.parametrize("on_error", ["tell", "raise"])
    def test_they_are_told(self, mode, counted, called, told, on_error):
        """The model may try again; the function has not run."""
        tools = Tools(counted.double, on_error=on_error)
        made = call(mode, tools, calling(called), calling(("double", {"number": 2})), "4")
        assert results(made)[0][0].startswith(told)
        assert results(made)[0][1] is True
        assert results(made)[1] == ("4", False)
        assert counted.calls == [2]
        assert len(decisions(made)) == 1
        assert "duoble" not in repr(made.record.decisions)


class TestFailures:
    def test_the_model_is_told(self, mode, counted, caplog):
        """Class and message go to the model, and to nobody else."""
        caplog.set_level(logging.DEBUG)
        made = call(mode, [Logging(), Tools(counted.fails)], calling("fails"), "Sorry.")
        assert results(made) == [("fails raised ValueError: secret 4711", True)]
        assert decisions(made) == ["tells the model that fails raised ValueError"]
        assert "4711" not in caplog.text

    def test_it_is_raised(self, mode, counted):
        """`on_error="raise"` raises the error itself, and asks no more. Other calls of the turn are given up."""
        made = call(mode, Tools(counted.fails, on_error="raise"), calling("fails"))
        error = made.ran.error
        if mode.streaming:  # a part of the tool call has gone out
            assert type(error) is StreamInterrupted
            error = error.__cause__
        assert (type(error), str(error)) == (ValueError, "secret 4711")
        assert len(made.provider.requests) == 1

    def test_arguments_are_masked_in_the_log_of_what_is_raised(self, mode, caplog):
        def find(name: str) -> str:
            raise LookupError(f"nobody is called {name}")

        caplog.set_level(logging.DEBUG)
        stack = [Logging(), Tools(find, on_error="raise")]
        call(mode, stack, calling(("find", {"name": "Rumpelstiltskin the Third"})))
        assert "LookupError" in caplog.text
        assert "Rumpelstiltskin" not in caplog.text

    def test_an_error_without_a_text(self, mode):
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError

        def one():
            raise Mute

        def two():
            raise KeyError

        made = call(mode, Tools([one, two]), calling("one", "two"), "")
        assert results(made) == [("one raised Mute", True), ("two raised KeyError", True)]

    def test_a_result_that_is_not_json(self, mode):
        """It is an error of the function, which names it."""

        def odd():
            return object()

        made = call(mode, Tools(odd), calling("odd"), "")
        ((text, failed),) = results(made)
        assert failed
        assert text.startswith("odd raised TypeError: the tool odd returned an object, which is not JSON: ")

    def test_stop_iteration(self, mode):
        """It does not end a flow."""
        made = call(mode, Tools(tool(lambda: next(iter(())), name="ended")), calling("ended"), "ok")
        assert made.response.text == "ok"
        assert results(made)[0][1] is True

    @pytest.mark.parametrize("parallel", [True, False])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_base_exceptions_pass(self, mode, error, parallel):
        """They are not the model's business."""

        def interrupted():
            raise error

        def fine():
            return "fine"

        made = call(mode, Tools([interrupted, fine], parallel=parallel), calling("interrupted", "fine"))
        assert type(made.ran.error) is error
        assert len(made.provider.requests) == 1

    def test_the_deadline_of_the_call(self, mode):
        """Once it has passed, nothing is told to the model, and nothing is sent."""
        clock = VirtualClock()

        def slow():
            clock.advance(10)
            return "late"

        async def aslow():
            await clock.asleep(10)

        for function in (slow, aslow):
            provider = scripted(mode, calling(function.__name__), "never", clock=clock)
            ran = run(mode, provider, [Deadline(5), Tools(function)], REQUEST, clock=clock)
            assert type(root_cause(ran.error)) is DeadlineExceeded
            assert len(provider.requests) == 1

    def test_the_deadline_ends_an_async_function(self, mode):
        """By the clock, in sync pipelines too; the function is cancelled, and its error is the caller's."""
        ended = []

        async def endless():
            try:
                await anyio.sleep_forever()
            finally:
                ended.append(True)

        provider = scripted(mode, calling("endless"), "never")
        ran = run(mode, provider, [Deadline(0.2), Tools(endless)], REQUEST, clock=SYSTEM_CLOCK)
        assert type(root_cause(ran.error)) is DeadlineExceeded
        assert ended == [True]
        assert len(provider.requests) == 1

    def test_the_deadline_of_something_else(self, mode):
        """A function that has a deadline of its own fails like any other."""

        def slow():
            raise DeadlineExceeded("too late")

        made = call(mode, [Deadline(5), Tools(slow)], calling("slow"), "Sorry.")
        assert results(made) == [("slow raised DeadlineExceeded: too late", True)]


class TestTooManyTurns:
    def test_the_error(self, mode, counted):
        """The calls of the last answer do not run; the error has that answer, with all before it."""
        made = call(mode, Tools(counted.clock, max_turns=2), calling("clock"), calling("clock", text="Again. "))
        error = root_cause(made.ran.error)
        assert type(error) is MaxTurnsExceeded
        assert str(error).startswith("Tools: m-1 at scripted still calls tools after 2 requests; increase max_turns")
        assert (error.partial.text, len(error.partial.added), counted.calls) == ("Again. ", 2, ["clock"])
        assert len(made.provider.requests) == 2
        assert type(made.ran.error) is (StreamInterrupted if mode.streaming else MaxTurnsExceeded)

    def test_it_can_be_pickled(self):
        error = pickle.loads(  # noqa: S301  # pickled here
            pickle.dumps(MaxTurnsExceeded("too many", partial=Response("x")))
        )
        assert (str(error), error.partial) == ("too many", Response("x"))

    def test_one_turn(self, mode, counted):
        made = call(mode, Tools(counted.clock, max_turns=1), "Hi.")
        assert made.response.text == "Hi."


class TestApproval:
    def test_what_is_refused(self, mode, counted):
        """The model is told, and the others run."""
        tools = Tools([counted.clock, counted.double], approve=lambda call: call.name == "clock")
        made = call(mode, tools, calling("clock", ("double", {"number": 1})), "Done.")
        assert results(made) == [("noon", False), ("the call was refused, and has not run", True)]
        assert counted.calls == ["clock"]
        assert decisions(made) == ["refuses a call of double"]

    def test_all_calls_are_decided_on_first(self, mode, counted):
        """In their order, before any function runs; mistakes need no decision."""
        seen = []

        def approve(called):
            seen.append((called.id, [*counted.calls]))
            return True

        script = calling(("double", {"number": 1}), "nothing", ("double", {}), ("double", {"number": 2}))
        made = call(mode, Tools(counted.double, approve=approve), script, "Done.")
        assert seen == [("c0", []), ("c3", [])]
        assert [failed for _, failed in results(made)] == [False, True, True, False]

    def test_a_flow(self, mode, counted):
        """It may ask a model, with the request of this turn."""
        judge = Target(scripted(mode, "yes", "no"), model="judge")
        questions = []

        def approve(called, request):
            questions.append(len(request.messages))
            yield from perform(lambda: None)
            answer = yield from ask(request.evolve(messages=f"May {called.name} run?", tools=()), target=judge)
            return answer.text == "yes"

        made = call(mode, Tools(counted.clock, approve=approve), calling("clock"), calling("clock"), "Done.")
        assert [failed for _, failed in results(made)] == [False, True]
        assert questions == [1, 3]

    @pytest.mark.parametrize("verdict", [None, 1, "yes"])
    def test_what_is_no_bool(self, mode, counted, verdict):
        """An approval is never given by mistake."""
        made = call(mode, Tools(counted.clock, approve=lambda _: verdict), calling("clock"))
        error = root_cause(made.ran.error)
        assert type(error) is TypeError
        assert str(error).startswith("Tools(approve=…): expected True to run the function, or False to refuse, got")
        assert counted.calls == []

    def test_its_error(self, mode, counted):
        made = call(mode, Tools(counted.clock, approve=lambda _: 1 / 0), calling("clock"))
        assert type(root_cause(made.ran.error)) is ZeroDivisionError
        assert counted.calls == []

    @pytest.mark.parametrize("is_flow", [False, True])
    def test_its_error_may_quote_the_arguments(self, mode, caplog, is_flow):
        """The caller gets it, and the log has no content."""

        def approve(called):
            raise ValueError(f"unsure of {called.arguments['key']}")

        def approve_later(called):
            yield from perform(lambda: None)
            approve(called)

        store = tool(lambda key: key, name="store")
        tools = Tools(store, approve=approve_later if is_flow else approve)
        with caplog.at_level(logging.INFO, logger="fluxibly"):
            made = call(mode, [Logging(), tools], calling(("store", {"key": "the secret number 4711"})))
        assert str(root_cause(made.ran.error)) == "unsure of the secret number 4711"
        assert "ValueError" in caplog.text
        assert "4711" not in caplog.text

    def test_what_cannot_approve(self, counted):
        async def approve(called):
            return True

        with pytest.raises(
            ValueError, match="Tools: approve: expected a plain function or a generator function, got an a"
        ):
            Tools(counted.clock, approve=approve)
        with pytest.raises(
            ConfigError, match="Tools: approve: expected a function that takes a call, or a call and the r"
        ):
            Tools(counted.clock, approve=lambda a, b, c: True)


class TestFunctionsOfAllKinds:
    def test_async_functions(self, mode):
        """An async pipeline awaits them in its task's loop; a sync one runs a loop for each."""
        loops = []

        async def wait(number: int) -> int:
            await anyio.lowlevel.checkpoint()
            loops.append(threading.get_ident())
            return number

        made = call(mode, Tools(wait), calling(("wait", {"number": 1}), ("wait", {"number": 2})), "Done.")
        assert results(made) == [("1", False), ("2", False)]
        assert mode.backend is None or set(loops) == {threading.get_ident()}

    def test_sync_functions_leave_the_event_loop_alone(self, mode):
        """They run in worker threads there, and in the caller's thread in a sync pipeline if there is only one."""
        threads = []

        def where() -> str:
            threads.append(threading.get_ident())
            return "here"

        call(mode, Tools(where), calling("where"), "Done.")
        assert (threads == [threading.get_ident()]) is (mode.backend is None)

    def test_what_returns_a_coroutine(self, mode):
        """A sync function, such as a decorator's wrapper, may return a coroutine: it is awaited."""

        async def wait(number: int) -> int:
            await anyio.lowlevel.checkpoint()
            return number + 1

        @wraps(wait)
        def noted(**arguments):
            return wait(**arguments)

        tools = Tools([noted, tool(partial(lambda: wait(5)), name="five"), tool(partial(wait, 7), name="seven")])
        made = call(mode, tools, calling(("wait", {"number": 1}), "five", "seven"), "Done.")
        assert results(made) == [("2", False), ("6", False), ("8", False)]

    def test_in_a_notebook(self):
        """A sync pipeline runs async functions also where an event loop runs in the same thread."""

        async def wait() -> str:
            await anyio.lowlevel.checkpoint()
            return "waited"

        async def cell():
            return Pipeline(ScriptedProvider(calling("wait"), "Done."), [Tools(wait)]).complete(REQUEST)

        for backend in BACKENDS:
            assert anyio.run(cell, backend=backend).added[1].text == "waited"

    def test_an_exception_of_a_loop_s_thread(self):
        async def fail() -> str:
            await anyio.lowlevel.checkpoint()
            raise KeyboardInterrupt

        async def cell():
            with pytest.raises(KeyboardInterrupt):
                Pipeline(ScriptedProvider(calling("fail"), "Done."), [Tools(fail)]).complete(REQUEST)

        anyio.run(cell)

    def test_the_loop_of_the_thread_stays(self):
        """A loop that the program has set for its thread is still set afterwards."""

        async def wait() -> str:
            return "waited"

        own = asyncio.new_event_loop()
        asyncio.set_event_loop(own)
        try:
            Pipeline(ScriptedProvider(calling("wait"), "Done."), [Tools(wait)]).complete(REQUEST)
            assert asyncio.get_event_loop() is own
        finally:
            asyncio.set_event_loop(None)
            own.close()


def pipelines(mode, tools, *script):
    """Return a pipeline on the system's clock, in which things really go on at the same time."""
    return (AsyncPipeline if mode.backend else Pipeline)(scripted(mode, *script), [tools])


def finished(mode, pipeline):
    if mode.backend is None:
        if not mode.streaming:
            return pipeline.complete(REQUEST)
        with pipeline.stream(REQUEST) as stream:
            for _ in stream:
                pass
        return stream.response

    async def arun():
        if not mode.streaming:
            return await pipeline.complete(REQUEST)
        async with pipeline.stream(REQUEST) as stream:
            [_ async for _ in stream]
        return stream.response

    return run_async(arun, mode.backend)


class TestSideBySide:
    def test_parallel(self, mode):
        """The calls of one answer run at the same time, and their results keep their order."""
        barrier = threading.Barrier(3, timeout=30)

        def meet(number: int) -> int:
            barrier.wait()
            return number

        script = calling(*[("meet", {"number": n}) for n in range(3)])
        response = finished(mode, pipelines(mode, Tools(meet), script, "Done."))
        assert [message.text for message in response.added[1:]] == ["0", "1", "2"]

    @pytest.mark.parametrize("mode", [mode for mode in MODES if mode.backend], ids=str)
    def test_parallel_async(self, mode):
        """In an async pipeline they share the event loop."""
        events = {}

        async def meet(number: int) -> int:
            mine = events.setdefault(number, anyio.Event())
            mine.set()
            await events.setdefault(1 - number, anyio.Event()).wait()
            return number

        script = calling(("meet", {"number": 0}), ("meet", {"number": 1}))
        response = finished(mode, pipelines(mode, Tools(meet), script, "Done."))
        assert [message.text for message in response.added[1:]] == ["0", "1"]

    def test_in_their_order(self, mode):
        """`parallel=False` runs one after the other."""
        running, most, order = [], [], []

        def work(number: int) -> int:
            running.append(number)
            most.append(len(running))
            order.append(number)
            running.remove(number)
            return number

        script = calling(*[("work", {"number": n}) for n in range(5)])
        finished(mode, pipelines(mode, Tools(work, parallel=False), script, "Done."))
        assert (max(most), order) == (1, [0, 1, 2, 3, 4])

    def test_one_instance_for_100_threads(self, counted):
        """Each call gets its own results."""
        tools = Tools(counted.double)
        found = {}

        def caller(number):
            provider = ScriptedProvider(
                calling(("double", {"number": number}), ("double", {"number": -number})), "Done."
            )
            found[number] = Pipeline(provider, [tools]).complete(REQUEST).added[1:]

        threads = [threading.Thread(target=caller, args=(n,)) for n in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all([m.text for m in found[n]] == [str(2 * n), str(-2 * n)] for n in range(100))
        assert len(counted.calls) == 200

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_one_instance_for_1000_tasks(self, counted, backend):
        tools = Tools(counted.later)
        found = {}

        async def caller(number):
            script = calling(("later", {"number": number}), ("later", {"number": -number}))
            pipeline = AsyncPipeline(AsyncScriptedProvider(script, "Done."), [tools])
            found[number] = (await pipeline.complete(REQUEST)).added[1:]

        async def main():
            async with anyio.create_task_group() as group:
                for number in range(1000):
                    group.start_soon(caller, number)

        run_async(main, backend)
        assert all([m.text for m in found[n]] == [str(n + 1), str(1 - n)] for n in range(1000))


class TestCallsThatAreGivenUp:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("calls", [1, 3])
    def test_a_cancelled_call_cancels_its_functions(self, backend, streaming, calls):
        """Nothing runs on, and nothing is sent afterwards."""
        ended = []
        provider = AsyncScriptedProvider(calling(*["hang"] * calls), "never")

        async def main():
            began = anyio.Event()

            async def hang() -> str:
                began.set()
                try:
                    await anyio.sleep_forever()
                finally:
                    ended.append("hang")
                raise AssertionError

            pipeline = AsyncPipeline(provider, [Tools(hang)])

            async def caller():
                if not streaming:
                    await pipeline.complete(REQUEST)
                async with pipeline.stream(REQUEST) as stream:
                    [_ async for _ in stream]

            async with anyio.create_task_group() as group:
                group.start_soon(caller)
                await began.wait()
                group.cancel_scope.cancel()

        run_async(main, backend)
        assert ended == ["hang"] * len(ended)
        assert 1 <= len(ended) <= calls
        assert (len(provider.requests), provider.opened) == (1, provider.closed)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_others_of_a_turn_that_has_failed(self, backend):
        """`on_error="raise"` cancels them."""
        ended = []

        async def main():
            began = anyio.Event()

            async def hang():
                began.set()
                try:
                    await anyio.sleep_forever()
                finally:
                    ended.append("hang")

            async def fail():
                await began.wait()
                raise ValueError("no")

            pipeline = AsyncPipeline(
                AsyncScriptedProvider(calling("hang", "fail")), [Tools([hang, fail], on_error="raise")]
            )
            with pytest.raises(ValueError, match="no"):
                await pipeline.complete(REQUEST)

        run_async(main, backend)
        assert ended == ["hang"]

    def test_a_stream_that_is_left_before_the_functions_run(self, stream_mode, counted):
        """None runs."""
        made = call(stream_mode, Tools(counted.clock), calling("clock", text="Let me look."), stop_after=1)
        assert (counted.calls, made.ran.error, len(made.provider.requests)) == ([], None, 1)

    def test_a_stream_that_is_left_at_the_mark(self, stream_mode, counted):
        """The function has run, and nothing more is sent."""
        made = call(stream_mode, Tools(counted.clock), calling("clock"), "never", stop_after=4)
        assert made.ran.events[-1].added is not None
        assert (counted.calls, len(made.provider.requests)) == (["clock"], 1)


class TestInACertainStack:
    def test_guard_inside(self, mode, counted):
        """No function runs on arguments that were not checked."""
        guard = Guard(output=lambda response: "no" if "13" in repr(response.tool_calls) else None)
        script = calling(("double", {"number": 13}))
        made = call(mode, [Tools(counted.double), guard], script)
        assert type(root_cause(made.ran.error)) is GuardRefused
        assert counted.calls == []
        refusing = attrs.evolve(guard, refusal="No.")
        made = call(mode, [Tools(counted.double), refusing], script)
        assert (made.response.text, counted.calls) == ("No.", [])

    def test_guard_inside_checks_the_results(self, mode, counted):
        guard = Guard(input=lambda request: "no" if any("noon" in m.text for m in request.messages) else None)
        made = call(mode, [Tools(counted.clock), guard], calling("clock"))
        assert type(root_cause(made.ran.error)) is GuardRefused
        assert (counted.calls, len(made.provider.requests)) == (["clock"], 1)

    @pytest.mark.parametrize("restore", [False, True])
    def test_redact_inside(self, mode, restore):
        """Results are redacted before they leave; with `restore`, functions get the originals."""
        seen = []

        def write(to: str) -> str:
            seen.append(to)
            return f"written to {to} for boss@example.com"

        request = REQUEST.evolve(messages="Write to me@example.com")
        placeholder = "[email-1]" if restore else "[email]"
        redact = Redact(patterns=["email"], restore=restore)
        script = calling(("write", {"to": placeholder}))
        made = call(mode, [Tools(write), redact], script, "Done.", request=request)
        assert made.response.text == "Done."
        assert "example.com" not in repr(made.provider.requests)
        assert len(made.provider.requests[1].messages) == 3

    def test_retry_inside(self, mode, counted):
        """A second turn that fails is sent again, and no function runs again."""
        stack = [Tools(counted.clock), Retry(base_delay=0)]
        made = call(mode, stack, calling("clock"), ServerError("down"), ServerError("down"), "Noon.")
        assert (made.response.text, counted.calls, len(made.provider.requests)) == ("Noon.", ["clock"], 4)

    def test_cache_inside(self, mode, counted):
        """Each turn is a question of its own; functions run for each call."""
        stack = [Tools(counted.clock), Cache()]
        made = call(mode, [*stack], calling("clock"), "Noon.")
        again = call(mode, [*stack], request=REQUEST)
        assert again.provider.requests == []
        assert again.response == made.response
        assert counted.calls == ["clock", "clock"]

    def test_fallback_inside(self, mode, counted):
        """Each turn may be answered by another model."""
        stack = [Tools(counted.clock), Fallback("m-2")]
        made = call(mode, stack, calling("clock"), ServerError("down"), "Noon.")
        assert (made.response.text, counted.calls) == ("Noon.", ["clock"])
        assert [each.model for each in made.provider.requests] == ["m-1", "m-1", "m-2"]

    def test_validation_inside(self, mode, counted):
        """Only the answer is checked, not the turns before it."""
        stack = [Tools(counted.clock), Validation(empty="retry", hold=True)]
        made = call(mode, stack, calling("clock"), "", "Noon.")
        assert (made.response.text, counted.calls) == ("Noon.", ["clock"])


class TestSettings:
    def test_it_keeps_the_laws(self, counted):
        check_middleware(Tools([counted.clock, counted.later], approve=lambda _: True))

    def test_repr(self, counted):
        shown = repr(Tools([counted.clock, counted.double], max_turns=3, on_error="raise"))
        assert shown == "Tools(functions=(clock, double), max_turns=3, parallel=True, on_error='raise', approve=None)"

    def test_yaml(self, tmp_path):
        """A configuration names registered functions; one alone stands for a list."""
        register_function("lookup", lambda word: f"{word}!")
        register_function("clock", tool(lambda: "noon", name="clock", description="Return the time."))
        with pytest.raises(
            ConfigError, match=r"Tools: functions\[0\]: tool: expected a name of at most 128 ASCII letters"
        ):
            Tools(["lookup"])
        (layer,) = make_middleware([{"tools": {"functions": ["clock"], "max_turns": 3}}])
        assert repr(layer) == "Tools(functions=(clock), max_turns=3, parallel=True, on_error='tell', approve=None)"
        (layer,) = make_middleware([{"tools": {"functions": "clock"}}])
        assert layer.functions[0].description == "Return the time."
        config = LLMConfig(framework="echo", model="any", middleware=[{"tools": {"functions": "clock"}}])
        with LLM(config) as llm:
            assert llm.pipeline.middleware[0] == layer

    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({}, "middleware[0].tools.functions: is required"),
            ({"functions": []}, "middleware[0].tools.functions: expected at least one function, got none"),
            ({"functions": 3}, "middleware[0].tools.functions: expected a list of functions, got an int"),
            (
                {"functions": ["clok"]},
                "middleware[0].tools.functions[0]: function 'clok' not registered; did you mean 'clock'?",
            ),
            ({"functions": ["clock", "clock"]}, "tools.functions: expected a name for each, got 'clock' twice"),
            ({"functions": [None]}, "middleware[0].tools.functions[0]: expected a function, got None"),
            ({"functions": [Tool("look")]}, "tools.functions[0]: expected a function, got a Tool, which has none"),
            (
                {"functions": ["clock"], "max_turns": 0},
                "middleware[0].tools.max_turns: expected a whole number from 1 up",
            ),
            (
                {"functions": ["clock"], "on_error": "log"},
                "middleware[0].tools.on_error: expected one of 'tell', 'raise'",
            ),
            ({"functions": ["clock"], "parallel": 3}, "middleware[0].tools.parallel: expected True or False, got 3"),
            ({"functions": ["clock"], "approve": "nobody"}, "tools.approve: function 'nobody' not registered"),
        ],
    )
    def test_wrong_settings(self, settings, problem):
        register_function("clock", tool(lambda: "noon", name="clock"))
        with pytest.raises(ConfigError) as caught:
            make_middleware([{"tools": settings}])
        assert problem in str(caught.value)


CALLS = st.one_of(
    st.tuples(st.just("double"), st.fixed_dictionaries({"number": st.integers(-9, 9)})),
    st.tuples(st.just("later"), st.fixed_dictionaries({"number": st.integers(-9, 9)})),
    st.tuples(st.sampled_from(["fails", "clock", "nothing"]), st.just({})),
    st.tuples(st.just("double"), st.sampled_from(["{", "[]", {}, {"number": "x"}, {"other": 1}])),
)


@settings(max_examples=25)
@given(
    turns=st.lists(st.lists(CALLS, min_size=1, max_size=4), max_size=3),
    parallel=st.booleans(),
    text=st.text(max_size=3),
)
def test_every_call_has_one_result(turns, parallel, text):
    """Whatever the model calls: all modes agree, each call has exactly one result, in order, and runs once if it can."""
    outcomes = []
    for mode in MODES:
        counted = Counted()
        tools = Tools([counted.clock, counted.double, counted.fails, counted.later], parallel=parallel)
        made = call(mode, tools, *[calling(*calls, text=text) for calls in turns], "Done.")
        added = [*made.response.added]
        expected = []
        for calls in turns:
            said, *told = [added.pop(0) for _ in range(len(calls) + 1)]
            assert (said.role, said.text, len(said.tool_calls)) == ("assistant", text, len(calls))
            assert [message.tool_call_id for message in told] == [each.id for each in said.tool_calls]
            for (name, arguments), message in zip(calls, told, strict=True):
                runs = name in ("clock", "fails") or (isinstance(arguments, dict) and arguments.keys() == {"number"})
                runs = runs and name != "nothing" and arguments != {"number": "x"}
                assert message.is_error is (not runs or name == "fails")
                if runs:
                    expected.append(arguments.get("number", name))
        assert added == []
        assert Counter(counted.calls) == Counter(expected)
        assert len(made.provider.requests) == len(turns) + 1
        if mode.streaming:
            assert made.ran.text == "Done."
        outcomes.append(made.response)
    assert outcomes == [outcomes[0]] * len(MODES)


def test_requests_are_not_changed():
    """The caller's request stays as it was."""
    request = Request(model="m", messages="x", tools=[Tool("look")], tool_choice="required")
    before = (request.tools, request.tool_choice, request.messages)
    Pipeline(ScriptedProvider(calling("clock"), "Done."), [Tools(Counted().clock)]).complete(request)
    assert (request.tools, request.tool_choice, request.messages) == before
