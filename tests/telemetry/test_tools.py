"""The spans of tools: one for each run of a function, with what it made, and nothing that nobody asked for."""

from __future__ import annotations

import json

import anyio
import anyio.lowlevel
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind
from support.calling import scripted
from support.tracing_tools import ANSWER, REQUEST, Recorder, everything, failed, modes, remote

from fluxibly.errors import Overloaded
from fluxibly.flow import ask
from fluxibly.middleware import Retry, Tools
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.telemetry import semconv
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider
from fluxibly.testing.modes import BACKENDS, run, run_async
from fluxibly.types import Image, Response, ToolCall

pytestmark = pytest.mark.usefixtures("no_complaints")


def calling(*calls):
    """Return an answer that calls tools: pairs of a name and arguments."""
    return Response(
        "", tool_calls=[ToolCall(f"c{n}", *each) for n, each in enumerate(calls)], finish_reason="tool_call"
    )


def look(word: str) -> str:
    """Look a word up."""
    return f"{word} is a noun of old"


async def alook(word: str) -> str:
    """Look a word up."""
    await anyio.lowlevel.checkpoint()
    return f"{word} is a noun of old"


def fails(word: str) -> str:
    raise LookupError(f"no such word: {word}, never heard")


LOOK = ("look", {"word": "serendipity"})


def tools_of(recorder):
    return [span for span in recorder.spans if span.name.startswith("execute_tool ")]


class TestTheSpan:
    @modes
    @pytest.mark.parametrize("function", [look, alook], ids=["sync", "async"])
    def test_its_attributes(self, mode, recorder, function):
        """It is a child of the call's span. Without capture it has no content."""
        ran = run(
            mode,
            remote(mode, calling((function.__name__, LOOK[1])), ANSWER),
            [recorder.tracing(), Tools(function)],
            REQUEST,
        )
        (span,) = tools_of(recorder)
        assert (span.name, span.kind) == (f"execute_tool {function.__name__}", SpanKind.INTERNAL)
        assert span.parent.span_id == recorder.call.context.span_id
        assert dict(span.attributes) == {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": function.__name__,
            "gen_ai.tool.call.id": "c0",
            "gen_ai.tool.type": "function",
            "gen_ai.tool.description": "Look a word up.",
            "fluxibly.outcome": "completed",
        }
        assert not failed(span)
        assert "serendipity" not in everything(recorder.spans)
        assert (ran.leaks, recorder.counting.open) == ([], [])
        assert recorder.call.attributes["fluxibly.attempts"] == 2

    def test_the_names_are_those_of_the_conventions(self):
        from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as names

        for name, value in vars(semconv).items():
            if name.startswith("TOOL_") and name != "TOOL_DEFINITIONS":
                assert getattr(names, f"GEN_AI_{name}") == value
        assert names.GenAiOperationNameValues.EXECUTE_TOOL.value == semconv.EXECUTE_TOOL

    def test_a_call_without_an_id(self, recorder):
        """Nor with a description: what is not known is left out."""

        class Once:
            def complete(self, request):
                return ANSWER if len(request.messages) > 1 else Response("", tool_calls=[ToolCall("", "bare")])

        def bare():
            pass

        Pipeline(Once(), [recorder.tracing(), Tools(bare)]).complete(REQUEST)
        (span,) = tools_of(recorder)
        assert {name for name in span.attributes if name.startswith("gen_ai.tool.")} == {
            "gen_ai.tool.name",
            "gen_ai.tool.type",
        }

    @modes
    def test_content_where_it_is_captured(self, mode, recorder):
        """Arguments and results are JSON, or text; both pass `redact`."""

        def hide(text):
            return text.replace("serendipity", "***")

        stack = [recorder.tracing(capture="span", redact=hide), Tools(look)]
        run(mode, remote(mode, calling(LOOK), ANSWER), stack, REQUEST)
        (span,) = tools_of(recorder)
        assert json.loads(span.attributes["gen_ai.tool.call.arguments"]) == {"word": "***"}
        assert span.attributes["gen_ai.tool.call.result"] == "*** is a noun of old"

    @pytest.mark.parametrize(("capture", "there"), [("none", False), ("event", False), ("span", True), ("both", True)])
    def test_where_content_goes(self, recorder, capture, there):
        Pipeline(ScriptedProvider(calling(LOOK), ANSWER), [recorder.tracing(capture=capture), Tools(look)]).complete(
            REQUEST
        )
        (span,) = tools_of(recorder)
        assert ("gen_ai.tool.call.arguments" in span.attributes) is there
        assert ("gen_ai.tool.call.result" in span.attributes) is there

    def test_a_redaction_that_fails(self, recorder, capsys):
        """No content is recorded, and the call goes on."""

        def broken(_):
            raise ValueError("serendipity")

        stack = [recorder.tracing(capture="span", redact=broken), Tools(look)]
        assert Pipeline(ScriptedProvider(calling(LOOK), ANSWER), stack).complete(REQUEST).text == ANSWER.text
        (span,) = tools_of(recorder)
        assert not {
            name
            for name in span.attributes
            if name.startswith(("gen_ai.tool.call.ar", "gen_ai.tool.call.r", "gen_ai.tool.d"))
        }
        assert "serendipity" not in capsys.readouterr().err

    def test_media_in_a_result(self, recorder):
        def draw():
            return ["So:", Image(url="https://a.test/x.png")]

        stack = [recorder.tracing(capture="span"), Tools(draw)]
        Pipeline(ScriptedProvider(calling(("draw",)), ANSWER), stack).complete(REQUEST)
        (span,) = tools_of(recorder)
        assert [part["type"] for part in json.loads(span.attributes["gen_ai.tool.call.result"])] == ["text", "uri"]

    def test_arguments_that_are_wrong(self, recorder):
        """No function has run, so there is no span; the call's says what was decided."""
        Pipeline(ScriptedProvider(calling(("look", {})), ANSWER), [recorder.tracing(), Tools(look)]).complete(REQUEST)
        assert tools_of(recorder) == []
        (event,) = [e for e in recorder.call.events if e.name == "fluxibly.decision"]
        assert event.attributes["fluxibly.decision.what"] == "tells the model that the arguments of look are wrong"


class TestFailures:
    @modes
    def test_what_is_told_to_the_model(self, mode, recorder):
        """The tool's span has failed, and not the call's. The message may be content, so it is left out."""
        stack = [recorder.tracing(), Tools(fails)]
        run(mode, remote(mode, calling(("fails", LOOK[1])), ANSWER), stack, REQUEST)
        (span,) = tools_of(recorder)
        assert failed(span)
        assert span.attributes["error.type"] == span.status.description == "LookupError"
        assert (span.attributes["fluxibly.outcome"], failed(recorder.call)) == ("failed", False)
        assert "never heard" not in everything(recorder.spans)

    @modes
    def test_what_is_told_is_captured(self, mode, recorder):
        stack = [recorder.tracing(capture="span"), Tools(fails)]
        run(mode, remote(mode, calling(("fails", LOOK[1])), ANSWER), stack, REQUEST)
        (span,) = tools_of(recorder)
        assert (
            span.attributes["gen_ai.tool.call.result"]
            == "fails raised LookupError: no such word: serendipity, never heard"
        )

    @modes
    def test_what_is_raised(self, mode, recorder):
        """Both have failed, and neither quotes the arguments."""
        stack = [recorder.tracing(), Tools(fails, on_error="raise")]
        run(mode, remote(mode, calling(("fails", {"word": "a rather long word"})), ANSWER), stack, REQUEST)
        (span,) = tools_of(recorder)
        assert failed(span)
        assert failed(recorder.call)
        assert recorder.call.attributes["error.type"] == "LookupError"
        assert "rather long" not in everything(recorder.spans)
        assert recorder.counting.open == []

    @modes
    def test_an_interrupt(self, mode, recorder):
        def interrupted():
            raise KeyboardInterrupt

        ran = run(
            mode, remote(mode, calling(("interrupted",)), ANSWER), [recorder.tracing(), Tools(interrupted)], REQUEST
        )
        (span,) = tools_of(recorder)
        assert type(ran.error) is KeyboardInterrupt
        assert span.attributes["fluxibly.outcome"] == "cancelled"
        assert (ran.leaks, recorder.counting.open) == ([], [])

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("calls", [1, 3])
    def test_a_cancelled_call(self, recorder, backend, calls):
        """The spans of its functions end with it."""

        async def main():
            began = anyio.Event()

            async def hang():
                began.set()
                await anyio.sleep_forever()

            pipeline = AsyncPipeline(
                AsyncScriptedProvider(calling(*[("hang",)] * calls)), [recorder.tracing(), Tools(hang)]
            )
            async with anyio.create_task_group() as group:
                group.start_soon(pipeline.complete, REQUEST)
                await began.wait()
                group.cancel_scope.cancel()

        run_async(main, backend)
        assert len(tools_of(recorder)) == calls
        assert {span.attributes["fluxibly.outcome"] for span in tools_of(recorder)} == {"cancelled"}
        assert recorder.counting.open == []


class TestWhatIsCurrent:
    @modes
    @pytest.mark.parametrize("calls", [1, 3])
    @pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
    def test_a_function_s_own_spans_are_within(self, mode, recorder, calls, asynchronous):
        """In whatever thread or task it runs, on the system's clock and in virtual time."""
        tracer = recorder.tracer_provider.get_tracer("mine")

        def work(number: int) -> int:
            with tracer.start_as_current_span(f"own {number}"):
                return number

        async def awork(number: int) -> int:
            await anyio.lowlevel.checkpoint()
            with tracer.start_as_current_span(f"own {number}"):
                await anyio.lowlevel.checkpoint()
                return number

        function = awork if asynchronous else work
        script = [calling(*[(function.__name__, {"number": n}) for n in range(calls)]), ANSWER]
        stack = [recorder.tracing(), Tools(function)]
        assert run(mode, remote(mode, *script), stack, REQUEST).leaks == []
        on_the_system_s_clock(mode, scripted(mode, *script), stack)
        spans = {span.context.span_id: span for span in tools_of(recorder)}
        own = [span for span in recorder.spans if span.name.startswith("own ")]
        assert len(own) == len(spans) == 2 * calls
        assert {span.parent.span_id for span in own} == {*spans}
        calls_of = {span.parent.span_id for span in spans.values()}
        assert calls_of == {span.context.span_id for span in recorder.calls}

    @modes
    def test_two_tracers(self, mode):
        """Each makes a span of its own."""
        one, two = Recorder(), Recorder()
        run(mode, remote(mode, calling(LOOK), ANSWER), [one.tracing(), two.tracing(), Tools(look)], REQUEST)
        assert len(tools_of(one)) == len(tools_of(two)) == 1
        assert one.counting.open == two.counting.open == []

    @modes
    def test_attempts_are_not_around_it(self, mode, recorder):
        """The spans of attempts and of tools are siblings."""
        stack = [recorder.tracing(), Tools(look), Retry(base_delay=0)]
        run(mode, remote(mode, calling(LOOK), Overloaded("full"), ANSWER), stack, REQUEST)
        (span,) = tools_of(recorder)
        assert span.parent.span_id == recorder.call.context.span_id
        assert len(recorder.attempts) == 3

    @modes
    def test_the_tools_of_an_ask(self, mode, recorder):
        """They belong to the span of the ask."""

        def asking(request, call_next):
            yield from ask(request.evolve(messages="And?"), through=[Tools(look)])
            return (yield from call_next(request))

        run(mode, remote(mode, calling(LOOK), ANSWER, ANSWER), [recorder.tracing(), asking], REQUEST)
        (span,), (asked,) = tools_of(recorder), recorder.asks
        assert span.parent.span_id == asked.context.span_id

    @modes
    def test_a_tracing_within_is_not_told(self, mode, recorder):
        """Only layers further out follow the functions."""
        run(mode, remote(mode, calling(LOOK), ANSWER), [Tools(look), recorder.tracing()], REQUEST)
        assert tools_of(recorder) == []
        assert len(recorder.calls) == 2


def on_the_system_s_clock(mode, provider, stack):
    if mode.backend is None:
        pipeline = Pipeline(provider, stack)
        if not mode.streaming:
            pipeline.complete(REQUEST)
            return
        with pipeline.stream(REQUEST) as stream:
            for _ in stream:
                pass
        return

    async def main():
        pipeline = AsyncPipeline(provider, stack)
        if not mode.streaming:
            await pipeline.complete(REQUEST)
            return
        async with pipeline.stream(REQUEST) as stream:
            async for _ in stream:
                pass

    run_async(main, mode.backend)


class TestWhatIsNotRecorded:
    @modes
    def test_an_unsampled_call(self, mode):
        """No span is made, and the call's span, which is not recorded either, is current in the function."""
        recorder = Recorder(sampler=ALWAYS_OFF)
        seen = []

        def work():
            seen.append(trace.get_current_span().get_span_context())

        run(mode, remote(mode, calling(("work",)), ANSWER), [recorder.tracing(), Tools(work)], REQUEST)
        assert (recorder.spans, recorder.counting.started) == ([], [])
        assert [context.is_valid for context in seen] == [True]

    def test_a_broken_tracer(self, recorder, capsys, monkeypatch):
        """The call goes on without the span."""
        tracing = recorder.tracing()
        make = recorder.tracer_provider.get_tracer("x").__class__.start_span

        def start_span(self, name, *args, **options):
            if name.startswith("execute_tool"):
                raise RuntimeError("broken")
            return make(self, name, *args, **options)

        monkeypatch.setattr("opentelemetry.sdk.trace.Tracer.start_span", start_span)
        response = Pipeline(ScriptedProvider(calling(LOOK), ANSWER), [tracing, Tools(look)]).complete(REQUEST)
        assert response.added[1].text == "serendipity is a noun of old"
        assert "tracing failed with RuntimeError" in capsys.readouterr().err
