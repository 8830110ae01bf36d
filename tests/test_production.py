"""The configuration of `docs/production.md`, against the local model and a local server that fails."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest
import yaml
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.misbehaving import serve
from support.readme import ROOT, blocks

from fluxibly import LLM
from fluxibly.errors import StreamInterrupted, StreamStalled
from fluxibly.middleware import Tracing

HEAD = {"object": "chat.completion", "id": "1", "created": 1, "model": "small"}
MESSAGE = {"role": "assistant", "content": "Because of the air."}
ANSWER = {**HEAD, "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}]}
QUESTION = "Why is the sky blue?"


def down(peer, _):
    peer.answer('{"error": {"message": "out of order"}}', status="503 Service Unavailable")


def up(peer, _):
    peer.answer(ANSWER)


class Script:
    """How the server answers, which may change."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, peer, request):
        self.answer(peer, request)


@pytest.fixture
def file(tmp_path):
    """Return a function that writes the page's configuration for a server, with short waits and answers."""

    def write(server, **layers):
        (code,) = blocks("yaml", ROOT / "docs" / "production.md")
        settings = yaml.safe_load(code)
        settings["llm"].update(api_base=server.url, max_tokens=8)
        stack = settings["llm"]["middleware"][0]["default_stack"]
        stack["retry"]["max_delay"] = 0.01
        stack.update(layers)
        path = tmp_path / "stack.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return path

    return write


class Traced:
    """The model of a configuration, and what a trace shows of each call."""

    def __init__(self, path):
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        plain = LLM.from_yaml(path)
        layers = [
            Tracing(tracer_provider=provider) if isinstance(layer, Tracing) else layer
            for layer in plain.pipeline.middleware
        ]
        self.llm = LLM(plain.config, layers)

    @property
    def calls(self):
        """For each call, the models of its attempts and the decisions."""
        spans = self.exporter.get_finished_spans()
        found = []
        for call in spans:
            if call.parent is None:
                attempts = [each for each in spans if each.parent and each.parent.span_id == call.context.span_id]
                attempts.sort(key=lambda each: each.attributes["fluxibly.attempt.index"])
                decided = [
                    f"{event.attributes['fluxibly.decision.middleware']} {event.attributes['fluxibly.decision.what']}"
                    for event in call.events
                    if event.name == "fluxibly.decision"
                ]
                found.append(([each.attributes["fluxibly.attempt.model"] for each in attempts], decided))
        return found


@pytest.mark.model
def test_an_outage(file, gguf):
    """The local model answers while the server is down; the circuit opens, and closes when the server is back."""
    script = Script(down)
    with serve(script) as server:
        traced = Traced(file(server, circuit_breaker={"failures": 5, "within": 30, "open_for": 0.5}))
        with traced.llm as llm:
            for _ in range(3):
                response = llm.complete(QUESTION)
                assert (response.provider, response.model) == ("local", "smollm2")
                assert response.text
            assert len(server.requests) == 5, "three attempts, two more, and then the circuit is open"
            script.answer = up
            threading.Event().wait(0.6)
            assert llm.complete(QUESTION).text == "Because of the air."
            assert len(server.requests) == 6
    first, second, third, back = traced.calls
    assert first[0] == ["small"] * 3 + ["smollm2"]
    assert first[1] == ["Fallback asks smollm2 at local after Overloaded"]
    assert second[0] == ["small"] * 2 + ["smollm2"]
    opens, refuses, goes_on = second[1]
    assert opens.startswith("CircuitBreaker opens the circuit of small at ")
    assert opens.endswith(" for 0.5 s: 5 failures within 30 s")
    assert refuses.startswith("CircuitBreaker refuses the call: the circuit of small at ")
    assert goes_on == "Fallback asks smollm2 at local after CircuitOpen"
    assert (third[0], len(third[1])) == ([], 2), "one attempt at the local model has no span of its own"
    tries, closes = back[1]
    assert tries.startswith("CircuitBreaker tries small at ")
    assert closes.startswith("CircuitBreaker closes the circuit of small at ")


@pytest.mark.model
def test_a_stream_that_falls_silent(file, gguf):
    """A stream without output goes elsewhere; one with output has failed, and says so."""

    def silent(peer, request):
        peer.begin_stream()
        peer.chunk(": still here\n\n")
        peer.wait_for_end()

    def half(peer, request):
        peer.begin_stream()
        delta = {"choices": [{"index": 0, "delta": {"content": "Because"}}]}
        peer.chunk(f"data: {json.dumps({**HEAD, **delta})}\n\n")
        peer.wait_for_end()

    script = Script(down)
    with serve(script) as server:
        traced = Traced(file(server, stream_timeout={"first_chunk": 4, "idle": 0.5}, retry={"max_retries": 0}))
        with traced.llm as llm:
            llm.complete(QUESTION)  # loads the local model
            script.answer = silent
            with llm.stream(QUESTION) as stream:
                assert "".join(chunk.text for chunk in stream) == stream.response.text != ""
            assert stream.response.provider == "local"
            script.answer = half
            with pytest.raises(StreamInterrupted) as caught, llm.stream(QUESTION) as stream:
                for _ in stream:
                    pass
    assert caught.value.partial.text == "Because"
    assert isinstance(caught.value.__cause__, StreamStalled)
    assert "StreamTimeout(" in str(caught.value.__cause__)
    assert traced.calls[1] == (["small", "smollm2"], ["Fallback asks smollm2 at local after RequestTimeout"])
    assert traced.calls[2] == ([], [])


@pytest.mark.model
def test_the_commands_of_the_page(file, gguf):
    """`chat` answers from the local model, and `trace` shows whose failure led to it."""
    with serve(down) as server:
        path = file(server)
        trace = path.parent / "trace.jsonl"
        asked = fluxibly("chat", QUESTION, "--config", path, "--trace", trace)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()
    assert 'decision="asks smollm2 at local after Overloaded"' in asked.stderr
    shown = " ".join(fluxibly("trace", trace).stdout.split())
    assert "Fallback asks smollm2 at local after Overloaded" in shown
    assert shown.count("Overloaded: small: vLLM answered 503: out of order") == 3


def fluxibly(*arguments):
    command = [sys.executable, "-c", "from fluxibly.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
