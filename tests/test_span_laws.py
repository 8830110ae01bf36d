"""The laws of spans, over random stacks, scripts, faults and consumers, in all modes."""

from __future__ import annotations

import gc

import pytest
import strategies as s
from hypothesis import HealthCheck, given, settings, strategies as st
from opentelemetry import trace
from tracing_tools import Recorder, failed

from fluxibly.pipeline import Pipeline
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Request

many = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
REQUEST = Request(model="m", messages="hi")
OUTCOMES = {"completed", "failed", "abandoned", "cancelled", "stalled"}


def check_tree(recorder, asked):
    """As many spans ended as started, each once; one call, and below it its attempts.

    An attempt that its consumer gave up unread, or that was refused after output, never reached the provider.
    """
    started, ended = recorder.counting.started, recorder.counting.ended
    assert len(ended) == len({*ended}) == len(started)
    assert {*ended} == {*started}
    call, attempts = recorder.call, recorder.attempts
    assert [attempt.attributes["fluxibly.attempt.index"] for attempt in attempts] == [
        *range(call.attributes["fluxibly.attempts"])
    ]
    assert asked <= len(attempts)
    assert {attempt.parent.span_id for attempt in attempts} <= {call.context.span_id}
    for span in (call, *attempts):
        outcome = span.attributes["fluxibly.outcome"]
        assert outcome in OUTCOMES
        assert failed(span) == (outcome in ("failed", "cancelled", "stalled")) == ("error.type" in span.attributes)
    assert all(call.start_time <= attempt.start_time <= attempt.end_time <= call.end_time for attempt in attempts)


@pytest.mark.parametrize("mode", MODES, ids=str)
@many
@given(
    s.stacks,
    s.stacks,
    st.one_of(s.any_answers, s.clean_answers, s.interrupted_answers),
    st.none() | st.integers(0, 4),
    st.booleans(),
    st.sampled_from(["none", "both"]),
)
def test_whatever_happens_spans_end_once(mode, outer, inner, answers, stop_after, restarts, capture):
    """Spans end exactly once, parents are right, and the consumer's context is as before."""
    recorder = Recorder()
    clock = VirtualClock()
    kind = ScriptedProvider if mode.backend is None else AsyncScriptedProvider
    provider = kind(*[answer.make() for answer in answers], clock=clock)
    passed = []

    def count(request, call_next):
        passed.append(request)
        return (yield from call_next(request))

    stack = [*s.build(outer[:2], []), count, recorder.tracing(capture=capture), *s.build(inner, [])]
    ran = run(mode, provider, stack, REQUEST, clock=clock, stop_after=stop_after, restarts=restarts)
    assert ran.leaks == []
    assert trace.get_current_span() is trace.INVALID_SPAN
    started, ended = recorder.counting.started, recorder.counting.ended
    assert sorted(started) == sorted(ended)
    if len(passed) == 1:
        check_tree(recorder, len(provider.requests))


@many
@given(s.stacks, s.any_answers, st.integers(0, 4), st.booleans())
def test_a_dropped_stream_ends_its_spans(kinds, answers, reads, ring):
    """Also one that only the garbage collector finds, at the next call."""
    recorder = Recorder()
    provider = ScriptedProvider(*[answer.make() for answer in answers])
    pipeline = Pipeline(provider, [recorder.tracing(), *s.build(kinds, [])], clock=VirtualClock())
    stream = pipeline.stream(REQUEST)
    held = [stream]
    if ring:
        held.append(held)
    try:
        for _ in range(reads):
            next(stream)
    except Exception:
        pass
    del stream, held
    gc.collect()
    Pipeline(ScriptedProvider("b"), [], clock=VirtualClock()).complete(REQUEST)
    check_tree(recorder, len(provider.requests))
