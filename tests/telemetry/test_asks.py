"""The spans of an `ask`: a call within a call, with its own tokens, attempts and outcome."""

from __future__ import annotations

import json
from contextlib import suppress

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind
from support.tracing_tools import (
    ANSWER,
    REQUEST,
    AsyncRemote,
    Recorder,
    cached,
    everything,
    failed,
    modes,
    remote,
    streams,
)

from fluxibly import AsyncPipeline, Target, map_chunks
from fluxibly.errors import BadRequest, Overloaded
from fluxibly.flow import ask
from fluxibly.middleware import Retry
from fluxibly.testing.modes import run
from fluxibly.types import ProviderInfo, Response, Usage

pytestmark = pytest.mark.usefixtures("no_complaints")

JUDGE = ProviderInfo(telemetry_name="anthropic", server_address="judge.test", server_port=443)
VERDICT = Response(
    "harmless", usage=Usage(input_tokens=40, output_tokens=3), model="j-2026", finish_reason="stop", id="v"
)


def judge_of(mode, *answers):
    """Return a target at another provider, whose model is `judge`, and the provider."""
    provider = remote(mode, *answers)
    provider.info = JUDGE
    return Target(provider, model="judge", temperature=0.5), provider


def asking_first(target=None, through=()):
    """Ask whether the prompt is harmless, and go on if nobody answers."""

    def guard(request, call_next):
        with suppress(BadRequest):
            yield from ask(request.evolve(messages="Is this harmless?"), target=target, through=through)
        return (yield from call_next(request))

    return guard


def asking_between(target=None, through=()):
    """Ask at each chunk that has text."""

    def guard(request, call_next):
        def judged(chunk):
            if chunk.text:
                yield from ask(request.evolve(messages="Is this harmless?"), target=target, through=through)
            yield chunk

        return (yield from map_chunks(call_next(request), judged))

    return guard


@modes
def test_an_ask_has_a_span_of_its_own(mode, recorder):
    """The span is like that of a call. The tokens are not the call's, which says the sum of all."""
    target, judge = judge_of(mode, VERDICT)
    provider = remote(mode, ANSWER)
    ran = run(mode, provider, [recorder.tracing(), asking_first(target)], REQUEST)
    (span,) = recorder.asks
    assert (span.name, span.kind, span.parent.span_id) == ("chat judge", SpanKind.CLIENT, recorder.call.context.span_id)
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": "judge",
        "gen_ai.request.temperature": 0.5,
        "server.address": "judge.test",
        "server.port": 443,
        "gen_ai.response.id": "v",
        "gen_ai.response.model": "j-2026",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 40,
        "gen_ai.usage.output_tokens": 3,
        "fluxibly.attempts": 1,
        "fluxibly.outcome": "completed",
    }
    given = recorder.call.attributes
    assert (given["gen_ai.usage.input_tokens"], given["fluxibly.usage.total_input"]) == (7, 47)
    assert (given["gen_ai.usage.output_tokens"], given["fluxibly.usage.total_output"]) == (2, 5)
    assert (given["fluxibly.attempts"], given["gen_ai.provider.name"]) == (1, "openai")
    assert len(recorder.spans) == 2
    for asked, parent in ((judge, span), (provider, recorder.call)):
        assert asked.requests[0].headers["traceparent"].split("-")[2] == f"{parent.context.span_id:016x}"
    assert ran.leaks == []


@modes
def test_the_retries_of_an_ask_are_its_own_attempts(mode, recorder):
    """They are children of the span of the ask, and carry their own `traceparent`."""
    target, judge = judge_of(mode, Overloaded("full"), VERDICT)
    stack = [recorder.tracing(), asking_first(target, [Retry(max_retries=1, base_delay=0)])]
    run(mode, remote(mode, ANSWER), stack, REQUEST)
    (span,) = recorder.asks
    attempts = recorder.attempts_of(span)
    assert [attempt.attributes["fluxibly.outcome"] for attempt in attempts] == ["failed", "completed"]
    assert [attempt.attributes["fluxibly.attempt.model"] for attempt in attempts] == ["judge", "judge"]
    assert (span.attributes["fluxibly.attempts"], recorder.call.attributes["fluxibly.attempts"]) == (2, 1)
    assert not failed(span)
    assert recorder.attempts == []
    for request, parent in zip(judge.requests, [span, attempts[1]], strict=True):
        assert request.headers["traceparent"].split("-")[2] == f"{parent.context.span_id:016x}"


@modes
def test_an_ask_that_fails(mode, recorder):
    """The error is that of the ask, and the call goes on. The message is masked."""
    target, _ = judge_of(mode, BadRequest("cannot read 'Is this harmless?'", code="unreadable"))
    run(mode, remote(mode, ANSWER), [recorder.tracing(), asking_first(target)], REQUEST)
    (span,) = recorder.asks
    assert (span.attributes["fluxibly.outcome"], span.attributes["error.type"]) == ("failed", "unreadable")
    assert span.status.description == "cannot read '[…]'"
    assert len(span.events) == 1
    assert "harmless" not in everything(recorder.spans)
    assert not failed(recorder.call)
    assert recorder.call.attributes["fluxibly.outcome"] == "completed"


@modes
def test_content_of_an_ask_is_captured(mode, recorder):
    """Questions and verdicts are recorded like prompts and answers, each on its own span and in its own event."""
    target, _ = judge_of(mode, VERDICT)
    run(mode, remote(mode, ANSWER), [recorder.tracing(capture="both"), asking_first(target)], REQUEST)
    (span,) = recorder.asks
    said = [json.loads(span.attributes[f"gen_ai.{which}.messages"])[0]["parts"] for which in ("input", "output")]
    assert [parts[0]["content"] for parts in said] == ["Is this harmless?", "harmless"]
    assert [event.span_id for event in recorder.events] == [span.context.span_id, recorder.call.context.span_id]
    assert recorder.events[0].attributes["gen_ai.request.model"] == "judge"
    assert "harmless" not in everything([recorder.call])


@streams
@pytest.mark.parametrize("attempts", ["auto", "always"])
def test_an_ask_during_an_attempt(mode, attempts, recorder):
    """The span is a child of the span that is current: that of the attempt if it is live, else that of the call."""
    target, _ = judge_of(mode, *[VERDICT] * 4)
    stack = [recorder.tracing(attempts=attempts), asking_between(target), Retry(max_retries=1, base_delay=0)]
    ran = run(mode, remote(mode, Overloaded("full"), ["a", "b"]), stack, REQUEST)
    parents = {span.parent.span_id for span in recorder.asks}
    assert len(recorder.asks) == 2
    assert parents == {recorder.attempts[1].context.span_id}
    recorder.exporter.clear()
    ran = run(mode, remote(mode, ["a", "b"]), stack, REQUEST)
    parents = {span.parent.span_id for span in recorder.asks}
    assert parents == {(recorder.attempts or [recorder.call])[0].context.span_id}
    assert ran.text == "ab"
    assert ran.leaks == []


@modes
def test_the_span_of_an_ask_is_current_while_its_provider_works(mode, recorder):
    """The layers around it see the span of the call, before and after."""
    seen = []

    class Looking:
        info = JUDGE

        def complete(self, request):
            seen.append(trace.get_current_span().name)
            if len(seen) < 2:
                raise Overloaded("full")
            return VERDICT

    def look(request, call_next):
        seen.append(trace.get_current_span().name)
        response = yield from call_next(request)
        seen.append(trace.get_current_span().name)
        return response

    guard = asking_first(Target(Looking(), model="judge"), [Retry(max_retries=1, base_delay=0)])
    run(mode, remote(mode, ANSWER), [recorder.tracing(), guard, look], REQUEST)
    assert seen == ["chat judge", "fluxibly.attempt", "chat m-1", "chat m-1"]


@modes
def test_an_ask_within_an_ask(mode, recorder):
    """Each has its own span and its own tokens."""
    inner, _ = judge_of(mode, VERDICT)
    outer, _ = judge_of(mode, VERDICT)
    run(mode, remote(mode, ANSWER), [recorder.tracing(), asking_first(outer, [asking_first(inner)])], REQUEST)
    assert [span.attributes["gen_ai.usage.input_tokens"] for span in recorder.asks] == [40, 40]
    assert recorder.call.attributes["fluxibly.usage.total_input"] == 87


@modes
def test_an_ask_and_an_answer_from_a_cache(mode, recorder):
    """The call itself has used no tokens, and says those of the ask."""
    target, _ = judge_of(mode, VERDICT)
    run(mode, remote(mode), [recorder.tracing(), asking_first(target), cached], REQUEST)
    given = recorder.call.attributes
    assert given["fluxibly.attempts"] == 0
    assert {key: given[key] for key in given if "usage" in key} == {
        "fluxibly.usage.total_input": 40,
        "fluxibly.usage.total_output": 3,
    }


@modes
def test_an_ask_that_was_not_sent_has_no_span(mode, recorder):
    """A layer of its own stack answers, and nothing is sent."""

    def known(request, call_next):
        yield from ()
        return Response("harmless")

    run(mode, remote(mode, ANSWER), [recorder.tracing(), asking_first(None, [known])], REQUEST)
    assert recorder.spans == [recorder.call]
    assert "fluxibly.usage.total_input" not in recorder.call.attributes


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_ask_that_is_cancelled(backend, streaming, recorder):
    """It ends with the call, whose error it has."""

    class Slow(AsyncRemote):
        info = JUDGE

        async def complete(self, request):
            await anyio.sleep_forever()

    async def main():
        guard = asking_between(Target(Slow(), model="judge"))
        pipeline = AsyncPipeline(AsyncRemote(["a"]), [recorder.tracing(), guard])

        async def call():
            if not streaming:
                await pipeline.complete(REQUEST)
            async for _ in pipeline.stream(REQUEST):
                pass

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()

    anyio.run(main, backend=backend)
    assert recorder.counting.open == []
    assert [span.name for span in recorder.spans] == ["chat judge", "chat m-1"]
    for span in recorder.spans:
        assert (span.attributes["fluxibly.outcome"], span.attributes["error.type"]) == ("cancelled", "CancelledError")
    assert trace.get_current_span() is trace.INVALID_SPAN


@modes
def test_an_ask_of_a_call_that_is_not_sampled(mode):
    """Its request carries the decision, in the trace of the call."""
    recorder = Recorder(sampler=ALWAYS_OFF)
    target, judge = judge_of(mode, VERDICT)
    provider = remote(mode, ANSWER)
    ran = run(mode, provider, [recorder.tracing(), asking_first(target)], REQUEST)
    assert recorder.spans == []
    (asked,), (sent,) = judge.requests, provider.requests
    assert asked.headers["traceparent"] == sent.headers["traceparent"]
    flags = int(sent.headers["traceparent"].rpartition("-")[2], 16)
    assert not flags & trace.TraceFlags.SAMPLED
    assert ran.leaks == []
