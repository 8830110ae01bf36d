"""The event `fluxibly.decision` on the span of a call: what a middleware decided, and why."""

from __future__ import annotations

import time

from support.tracing_tools import REQUEST, Recorder, everything, remote

from fluxibly.errors import CircuitOpen, ProviderError, RateLimitError, ServerError
from fluxibly.middleware.circuit_breaker import CircuitBreaker
from fluxibly.middleware.concurrency import Concurrency
from fluxibly.middleware.rate_limit import RateLimit
from fluxibly.middleware.retry import Retry
from fluxibly.testing import VirtualClock
from fluxibly.testing.modes import run


def trace(mode, layers, *answers, clock=None, recorder=None):
    recorder = recorder or Recorder()
    clock = clock or VirtualClock()
    ran = run(mode, remote(mode, *answers, clock=clock), [recorder.tracing(), *layers], REQUEST, clock=clock)
    return ran, recorder


def decisions(span):
    return [
        (event.attributes["fluxibly.decision.middleware"], event.attributes["fluxibly.decision.what"])
        for event in span.events
        if event.name == "fluxibly.decision"
    ]


def test_a_wait_and_a_pause(mode):
    """In their order, with the time at which each was made."""
    began = time.time_ns()
    ran, recorder = trace(mode, [Retry(), RateLimit(requests=6)], RateLimitError("slow", retry_after=3), "fine")
    assert ran.response.text == "fine"
    (first, second) = [each for each in decisions(recorder.call) if each[0] == "RateLimit"]
    assert first == (
        "RateLimit",
        f"stops all calls that share a limit with {REQUEST.model} at openai (api.test:443) for 3 s, as the service asked",
    )
    # Of the ten seconds between two requests, Retry has waited three.
    assert second[1] == "let the call wait 7 s (requests=6, per=60)"
    times = [event.timestamp for event in recorder.call.events if event.name == "fluxibly.decision"]
    assert began <= times[0] <= times[1] <= time.time_ns()


def test_a_refusal(mode):
    """Of a circuit that an earlier call has opened, on the span of each call."""
    layer, clock = CircuitBreaker(failures=1), VirtualClock()
    _, opening = trace(mode, [layer], ServerError("secret words"), clock=clock)
    ran, refused = trace(mode, [layer], "unasked", clock=clock)
    assert isinstance(ran.error, CircuitOpen)
    assert decisions(opening.call) == [
        (
            "CircuitBreaker",
            f"opens the circuit of {REQUEST.model} at openai (api.test:443) for 30 s: 1 failures within 30 s",
        )
    ]
    assert decisions(refused.call) == [
        (
            "CircuitBreaker",
            f"refuses the call: the circuit of {REQUEST.model} at openai (api.test:443) is open for 30 s more",
        )
    ]
    assert not refused.attempts
    assert "secret" not in str(decisions(opening.call))


def test_a_queue(mode):
    layer = Concurrency(1, queue=0)
    layer.store.lease(f"concurrency openai@api.test:443/{REQUEST.model}", "another", 1, 0.0)
    ran, recorder = trace(mode, [layer], "unasked")
    assert isinstance(ran.error, ProviderError)
    assert decisions(recorder.call) == [("Concurrency", "refuses the call: 0 calls wait already (queue=0)")]


def test_no_decision_no_event(mode):
    """A call that passes says nothing, and nothing about its content is in what is decided."""
    _, recorder = trace(mode, [RateLimit(requests=600), Concurrency(1), CircuitBreaker()], "fine")
    assert decisions(recorder.call) == []
    assert "meaning of life" not in everything(recorder.spans)
