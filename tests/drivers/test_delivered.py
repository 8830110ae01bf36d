"""The check at the end of a stream: half an answer never passes as a whole one."""

from __future__ import annotations

import logging
from contextlib import suppress

import attrs
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fluxibly.errors import ContentFiltered, ServerError, StreamInterrupted
from fluxibly.flow import hold_back, map_chunks
from fluxibly.middleware import Logging, Metrics, Retry, StreamMeter, Timing, Tracing, Validation
from fluxibly.testing import AsyncScriptedProvider, Cut, ScriptedProvider
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Chunk, Request, Response, Restart, ToolCallDelta, Usage

REQUEST = Request(model="m", messages="hi")


@pytest.fixture(params=[mode for mode in MODES if mode.streaming], ids=str)
def streaming(request):
    return request.param


def scripted(mode, *answers):
    return (AsyncScriptedProvider if mode.backend else ScriptedProvider)(*answers)


def half():
    return ["Transfer 100 to ", ServerError("down")]


def sorry(request, call_next):
    """Answer whatever goes wrong, as users write it."""
    try:
        return (yield from call_next(request))
    except Exception:  # noqa: BLE001  # the mistake under test
        return Response("Sorry.")


def louder(chunk):
    return attrs.evolve(chunk, text=chunk.text.upper())


def shout(request, call_next):
    return (yield from map_chunks(call_next(request), louder))


def same(request, call_next):
    return (yield from map_chunks(call_next(request), attrs.evolve))


def holding(request, call_next):
    return (yield from hold_back(call_next(request)))


def salvaging(finish_reason):
    """Return a middleware that returns what had been delivered before an interruption."""

    def salvage(request, call_next):
        try:
            return (yield from call_next(request))
        except StreamInterrupted as error:
            return error.partial.evolve(finish_reason=finish_reason)

    return salvage


def late(request, call_next):
    response = yield from call_next(request)
    return response.evolve(text="other")


def guard(request, call_next):
    def fn(chunk):
        if "bad" in chunk.text:
            raise ContentFiltered("no")
        return chunk

    return (yield from map_chunks(call_next(request), fn))


def delivered(ran):
    return "".join(event.text for event in ran.events)


def names(layers):
    """Name layers for the id of a test. The repr of a function has its address, which differs between processes."""
    return "+".join([getattr(layer, "__name__", type(layer).__name__) for layer in layers]) or "none"


class TestSwallowed:
    @pytest.mark.parametrize(
        "layers",
        [
            [sorry],
            [sorry, Retry()],
            [Retry(), sorry],
            [Logging(), Timing(), StreamMeter(), sorry],
            [same, sorry],
            [sorry, same],
            [shout, sorry],
            [sorry, shout],
            [Validation(), sorry, shout],
        ],
        ids=names,
    )
    def test_an_interruption(self, streaming, layers):
        """An error after output that a middleware swallows is raised, with its cause, and the middleware is named."""
        ran = run(streaming, scripted(streaming, half()), layers, REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert isinstance(ran.error.__cause__, ServerError)
        assert str(ran.error).startswith("the middleware sorry returned an answer after the stream of m from ")
        assert "let StreamInterrupted pass" in str(ran.error)
        assert delivered(ran) == ("TRANSFER 100 TO " if shout in layers else "Transfer 100 to ")
        assert ran.error.partial.text == delivered(ran)
        assert ran.response is None

    @pytest.mark.parametrize(
        "output",
        [
            Chunk(reasoning="hm"),
            Chunk(tool_calls=(ToolCallDelta(id="c", name="pay"),)),
            Chunk(alternatives=((1, Chunk("so")),)),
        ],
        ids=["reasoning", "call", "alternative"],
    )
    @pytest.mark.parametrize(
        "answer", [Response("Sorry."), Response(), Response(finish_reason="stop")], ids=["text", "nothing", "its end"]
    )
    def test_output_without_text(self, streaming, output, answer):
        """Reasoning and tool calls are output too."""

        def sorry(request, call_next):
            try:
                return (yield from call_next(request))
            except StreamInterrupted:
                return answer

        ran = run(streaming, scripted(streaming, [output, Cut()]), [sorry], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert "sorry returned an answer" in str(ran.error)

    @pytest.mark.parametrize(
        "layers", [[holding, sorry], [Validation(hold=True), sorry]], ids=["hold_back", "Validation"]
    )
    def test_what_is_held_back_is_not_released(self, streaming, layers):
        """A hold-back releases no half of an answer."""
        ran = run(streaming, scripted(streaming, half()), layers, REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert isinstance(ran.error.__cause__, ServerError)
        assert "the middleware sorry returned an answer" in str(ran.error)
        assert (ran.events, ran.error.partial) == ([], Response())

    def test_half_an_answer_that_does_not_say_so_is_not_released(self, streaming):
        """What is held back cannot be told from a whole answer without a finish reason."""
        ran = run(streaming, scripted(streaming, half()), [holding, salvaging(None)], REQUEST)
        assert isinstance(ran.error.__cause__, ServerError)
        assert ran.events == []
        ran = run(streaming, scripted(streaming, half()), [holding, salvaging("length")], REQUEST)
        assert ran.response.text == delivered(ran) == "Transfer 100 to "

    def test_an_answer_of_the_same_length(self, streaming):
        """Half an answer does not become a whole one by a text that happens to be as long."""

        def other(request, call_next):
            try:
                return (yield from call_next(request))
            except StreamInterrupted as error:
                return Response("x" * len(error.partial.text), finish_reason="stop")

        ran = run(streaming, scripted(streaming, half()), [shout, other], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert "other returned an answer after" in str(ran.error)

    def test_the_answer_of_an_earlier_attempt(self, streaming):
        """An answer that was rejected is not delivered by an attempt that fails after output."""

        def keeping(request, call_next):
            kept = []

            def check(response):
                kept.append(response)
                raise LookupError

            with suppress(LookupError):
                yield from hold_back(call_next(request), check=check)
            try:
                return (yield from call_next(request))
            except StreamInterrupted:
                return kept[0]

        ran = run(streaming, scripted(streaming, ["first ", "answer"], half()), [keeping], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert delivered(ran) == "Transfer 100 to "

    def test_chunks_that_are_held_until_the_end(self, streaming):
        """A function of `map_chunks` that keeps its text for the end lets no half of it out."""

        def buffered(request, call_next):
            kept = []
            return (
                yield from map_chunks(call_next(request), lambda c: kept.append(c.text), lambda: Chunk("".join(kept)))
            )

        ran = run(streaming, scripted(streaming, half()), [buffered, sorry], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert ran.events == []

    @pytest.mark.parametrize(
        "layers", [[sorry, guard], [shout, sorry, guard], [StreamMeter(), sorry, guard]], ids=names
    )
    def test_an_error_of_a_middleware(self, streaming, layers):
        """A guard that stops a stream in its middle is not to be swallowed either."""
        ran = run(streaming, scripted(streaming, ["so far, ", "bad"]), layers, REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert ran.error.__cause__ is None
        assert "one of the middleware" in str(ran.error)
        assert "sorry" in str(ran.error)
        assert ran.error.partial.text.lower() == "so far, "

    @pytest.mark.parametrize("answer", [Response(), Response(finish_reason="stop")], ids=["nothing", "its end"])
    def test_an_error_of_a_middleware_after_reasoning(self, streaming, answer):
        """An answer without output does not stand in for reasoning that was delivered."""

        def silent(request, call_next):
            try:
                return (yield from call_next(request))
            except ContentFiltered:
                return answer

        ran = run(streaming, scripted(streaming, [Chunk(reasoning="hm"), "bad"]), [silent, guard], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)

    @pytest.mark.parametrize("layers", [[], [sorry], [Retry(on_interrupt="restart")]], ids=names)
    def test_the_call_lets_go_of_the_error(self, streaming, layers):
        """The error's frames refer to the call, so the call must not refer to the error once it is over."""
        calls = []

        def noting(request, call_next):
            calls.append(request.call)
            return (yield from call_next(request))

        run(streaming, scripted(streaming, half(), "good"), [*layers, noting], REQUEST, restarts=True)
        assert [call.interruption for call in calls] == [None] * len(calls)


class TestOutcomes:
    @pytest.mark.parametrize("order", ["alone", "default"])
    def test_spans_logs_and_metrics_say_so(self, streaming, caplog, order):
        """The layers outside of the culprit report a failed call."""
        caplog.set_level(logging.INFO, logger="fluxibly")
        exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
        spans = TracerProvider()
        spans.add_span_processor(SimpleSpanProcessor(exporter))
        tracing, metrics = Tracing(tracer_provider=spans), Metrics(meter_provider=MeterProvider([reader]))
        stacks = {
            "alone": [[tracing, sorry], [Logging(), sorry], [metrics, sorry]],
            "default": [[tracing, Logging(), metrics, Timing(), StreamMeter(), sorry, Validation(), Retry()]],
        }
        for layers in stacks[order]:
            run(streaming, scripted(streaming, half()), layers, REQUEST)
        span = next(span for span in exporter.get_finished_spans() if span.name.startswith("chat"))
        assert span.attributes["fluxibly.outcome"] == "failed"
        assert span.attributes["error.type"] == "ServerError"
        ends = [record for record in caplog.records if getattr(record, "outcome", None)]
        assert [(end.outcome, end.error_type, end.chunks_received) for end in ends] == [("failed", "ServerError", 1)]
        points = [
            point
            for resource in reader.get_metrics_data().resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == "gen_ai.client.operation.duration"
            for point in metric.data.data_points
        ]
        assert [point.attributes["error.type"] for point in points] == ["ServerError"]

    def test_a_span_says_so_after_output_without_text(self, streaming):
        """`Tracing` counts characters, but reasoning alone is output too."""
        exporter, spans = InMemorySpanExporter(), TracerProvider()
        spans.add_span_processor(SimpleSpanProcessor(exporter))
        answer = [Chunk(reasoning="hm"), ServerError("down")]
        run(streaming, scripted(streaming, answer), [Tracing(tracer_provider=spans), sorry], REQUEST)
        span = next(span for span in exporter.get_finished_spans() if span.name.startswith("chat"))
        assert span.attributes["fluxibly.outcome"] == "failed"

    def test_a_changed_text_under_the_default_stack(self, streaming, caplog):
        """`StreamMeter` compares lengths, so the layers outside of it know."""
        caplog.set_level(logging.INFO, logger="fluxibly")
        ran = run(streaming, scripted(streaming, "two words"), [Logging(), StreamMeter(), late], REQUEST)
        assert "the middleware late returned another text (5 characters) than was delivered" in str(ran.error)
        assert [record.outcome for record in caplog.records if hasattr(record, "outcome")] == ["failed"]

    def test_the_driver_logs_what_no_layer_has_seen(self, streaming, caplog):
        """If the culprit is outermost, only the driver can say that the call failed. It quotes nothing."""
        run(streaming, scripted(streaming, ["a secret ", ServerError("a secret")]), [sorry], REQUEST)
        assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
            "the middleware sorry returned another answer than was delivered"
        ]


class TestChanged:
    @pytest.mark.parametrize(
        "layers", [[late], [shout, late], [late, shout], [Tracing(), late], [late, same]], ids=names
    )
    def test_a_text_that_was_not_streamed(self, streaming, layers):
        """A text that is changed in the response alone is an error that says what to write."""
        ran = run(streaming, scripted(streaming, "two words"), layers, REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert ran.error.__cause__ is None
        assert "late" in str(ran.error)
        assert "map_chunks(call_next(request), fn)" in str(ran.error)

    def test_the_text_before_a_change(self, streaming):
        """A middleware that changes the chunks has to return what `map_chunks` returns."""

        def undo(request, call_next):
            kept = []

            def keeping():
                kept.append((yield from call_next(request)))
                return kept[0]

            yield from map_chunks(keeping(), louder)
            return kept[0]

        ran = run(streaming, scripted(streaming, "two words"), [undo], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert "undo returned another text (9 characters) than was delivered" in str(ran.error)

    def test_all_suspects_are_named(self, streaming):
        """If it is not known which middleware did it, the message has all of the user's."""
        ran = run(streaming, scripted(streaming, "two words"), [Retry(), late, same], REQUEST)
        assert "one of the middleware late, same returned another text" in str(ran.error)


class TestAllowed:
    def test_whole_answers(self, mode):
        """Where nothing was delivered, a middleware may answer what it likes."""
        answer = [ServerError("down")] if mode.streaming else half()
        ran = run(mode, scripted(mode, answer), [Logging(), Tracing(), Metrics(), StreamMeter(), sorry], REQUEST)
        assert ran.error is None
        assert ran.response.text == "Sorry."
        assert delivered(ran) == ("Sorry." if mode.streaming else "")

    @pytest.mark.parametrize("layers", [[sorry], [shout, sorry], [holding, sorry], [StreamMeter(), sorry]], ids=names)
    def test_before_output(self, streaming, layers):
        """A chunk without output is no answer yet. Outer layers see the answer that stands in for it."""
        ran = run(streaming, scripted(streaming, [Chunk(model="m-1"), ServerError("down")]), layers, REQUEST)
        assert ran.error is None
        assert ran.response.text == delivered(ran) == ("SORRY." if shout in layers else "Sorry.")

    def test_an_answer_for_an_empty_one(self, mode):
        """A middleware may answer in place of a stream without output."""

        def filled(request, call_next):
            response = yield from call_next(request)
            return response if response.has_output else response.evolve(text="(nothing)")

        end = Chunk(finish_reason="stop", usage=Usage(output_tokens=0))
        ran = run(mode, scripted(mode, [end]), [shout, filled], REQUEST)
        assert ran.response == Response("(NOTHING)", finish_reason="stop", usage=Usage(output_tokens=0))
        if mode.streaming:
            assert delivered(ran) == "(NOTHING)"

    @pytest.mark.parametrize("middle", [holding, Validation(hold=True)], ids=["hold_back", "Validation"])
    def test_outside_of_a_hold_back(self, streaming, middle):
        """What was held back has not gone out, so another answer may take its place."""
        layers = [Tracing(), Logging(), Metrics(), StreamMeter(), sorry, middle]
        ran = run(streaming, scripted(streaming, half()), layers, REQUEST)
        assert ran.error is None
        assert ran.response.text == delivered(ran) == "Sorry."

    def test_outside_of_a_hold_back_that_found_it(self, streaming):
        """So it is if the hold-back itself has found that an answer is not what it holds."""
        ran = run(streaming, scripted(streaming, half()), [Logging(), sorry, holding, sorry], REQUEST)
        assert ran.error is None
        assert ran.response.text == delivered(ran) == "Sorry."

    def test_outside_of_dropped_chunks(self, streaming):
        """So it is with chunks that a function dropped."""

        def nothing(request, call_next):
            return (yield from map_chunks(call_next(request), lambda chunk: None))

        ran = run(streaming, scripted(streaming, half()), [Logging(), sorry, nothing], REQUEST)
        assert ran.error is None
        assert ran.response.text == delivered(ran) == "Sorry."

    def test_after_a_restart(self, streaming):
        """A `Restart` makes what was delivered void, so the next failure before output may be answered."""
        layers = [Logging(), StreamMeter(), sorry, Retry(on_interrupt="restart", max_retries=1)]
        ran = run(streaming, scripted(streaming, half(), ServerError("still down")), layers, REQUEST, restarts=True)
        assert ran.error is None
        assert [type(event) for event in ran.events] == [Chunk, Restart, Chunk]
        assert ran.response.text == ran.text == "Sorry."

    @pytest.mark.parametrize("layers", [[], [holding], [shout], [holding, shout]], ids=names)
    def test_another_answer_after_a_restart(self, streaming, layers):
        """Once a `Restart` is accepted, a middleware may also answer without asking again."""

        def anew(request, call_next):
            try:
                return (yield from call_next(request))
            except StreamInterrupted:
                assert (yield Restart("no more"))
            return Response("Sorry.")

        layers = [Tracing(), Logging(), Metrics(), StreamMeter(), *layers, anew]
        ran = run(streaming, scripted(streaming, half()), layers, REQUEST, restarts=True)
        assert ran.error is None
        assert ran.response.text == ran.text == ("SORRY." if shout in layers else "Sorry.")

    @pytest.mark.parametrize(
        "layer", [Tracing(), Logging(), Metrics(), StreamMeter()], ids=lambda kind: type(kind).__name__
    )
    def test_between_changes(self, streaming, layer):
        """A layer between two that change the text sees neither the provider's text nor the consumer's."""

        def starred(request, call_next):
            return (yield from map_chunks(call_next(request), lambda c: attrs.evolve(c, text=c.text.replace("A", "*"))))

        ran = run(streaming, scripted(streaming, half()), [starred, layer, shout, salvaging("length")], REQUEST)
        assert ran.error is None
        assert ran.response.text == delivered(ran) == "TR*NSFER 100 TO "

    def test_half_an_answer_that_says_so(self, streaming):
        """A middleware that returns exactly what was delivered, and why it ended, has decided so."""
        layers = [Tracing(), Logging(), Metrics(), StreamMeter(), shout, salvaging("length")]
        ran = run(streaming, scripted(streaming, half()), layers, REQUEST)
        assert ran.error is None
        assert ran.response.text == delivered(ran) == "TRANSFER 100 TO "
        assert ran.response.finish_reason == "length"

    @pytest.mark.parametrize(
        "layers", [[], [Tracing(), Logging(), Metrics(), StreamMeter(), shout]], ids=["bare", "stack"]
    )
    def test_half_an_answer_that_does_not_say_so(self, streaming, layers, caplog):
        """Without a finish reason it would pass as a whole answer, in the logs too."""
        caplog.set_level(logging.INFO, logger="fluxibly")
        ran = run(streaming, scripted(streaming, half()), [*layers, salvaging(None)], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert "salvage returned an answer after" in str(ran.error)
        assert "LLM streaming completed" not in caplog.text
        assert isinstance(ran.error.__cause__, ServerError)

    def test_a_stream_that_a_middleware_ends(self, streaming):
        """A middleware may end an answer early, and return what was delivered."""

        class Enough(Exception):
            pass

        def short(request, call_next):
            texts = []

            def fn(chunk):
                if len(texts) == 2:
                    raise Enough
                texts.append(chunk.text)
                return chunk

            try:
                return (yield from map_chunks(call_next(request), fn))
            except Enough:
                return Response("".join(texts), finish_reason="length")

        ran = run(streaming, scripted(streaming, "a b c d"), [Logging(), StreamMeter(), shout, short], REQUEST)
        assert ran.error is None
        assert ran.response.text == delivered(ran) == "A B"
