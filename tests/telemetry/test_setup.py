"""SDK setup in one line: to a file, to the console, and over OTLP/HTTP to a real receiver."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluxibly import telemetry
from fluxibly.cli.trace import file as trace_file

CALLS = """
import warnings; warnings.simplefilter("error")
from fluxibly.errors import Overloaded
from fluxibly.middleware import Metrics, Retry, StreamMeter, Tracing
from fluxibly.pipeline import Pipeline
from fluxibly.telemetry import setup
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request, Response, Usage
telemetry = setup({setup})
answer = Response("forty two", finish_reason="stop", usage=Usage(input_tokens=7, output_tokens=2))
provider = ScriptedProvider(Overloaded("full"), answer, answer)
stack = [Tracing({tracing}), Metrics(), StreamMeter(), Retry(max_retries=1, base_delay=0)]
pipeline = Pipeline(provider, stack)
request = Request(model="m-1", messages="What is the meaning of life?")
pipeline.complete(request)
list(pipeline.stream(request))
"""


def script(setup: str, tracing: str = "", then: str = "") -> subprocess.CompletedProcess[str]:
    """Make two calls in a new process, because a process can set up an SDK only once."""
    code = CALLS.format(setup=setup, tracing=tracing) + then
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)


def test_spans_in_a_file_are_otlp_json(tmp_path):
    """Each line is one export, with ids in hex and numbers in OTLP's JSON format. The reader builds trees from them."""
    path = tmp_path / "trace.jsonl"
    ran = script(f"file={str(path)!r}", "capture='span'")
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 5
    span = lines[0]["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    assert re.fullmatch("[0-9a-f]{32}", span["traceId"])
    assert re.fullmatch("[0-9a-f]{16}", span["parentSpanId"])
    assert span["kind"] == 1
    assert {"key": "fluxibly.attempt.index", "value": {"intValue": "0"}} in span["attributes"]
    resource = lines[0]["resourceSpans"][0]["resource"]["attributes"]
    assert {"key": "service.name", "value": {"stringValue": "fluxibly"}} in resource
    first, second = trace_file.read(path)
    assert [child.outcome for child in first.children] == ["failed", "completed"]
    assert first.attributes["gen_ai.usage.input_tokens"] == 7
    assert second.arrivals


def test_spans_on_the_console_leave_standard_output_alone():
    """The spans go to standard error."""
    ran = script("console=True")
    assert ran.returncode == 0
    assert ran.stdout == ""
    assert '"name": "chat m-1"' in ran.stderr


def test_the_environment_names_the_service(tmp_path, monkeypatch):
    """OTEL_SERVICE_NAME overrides the parameter, as users expect of an SDK."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    path = tmp_path / "trace.jsonl"
    script(f"file={str(path)!r}")
    assert '{"key":"service.name","value":{"stringValue":"mine"}}' in path.read_text()


def test_a_second_setup_is_refused():
    """The global provider can be set only once. The error says how to add an exporter to it."""
    ran = script("console=True", then="setup(console=True)")
    assert "RuntimeError: a tracer provider is already set up" in ran.stderr
    assert "add_span_processor" in ran.stderr


def test_a_destination_is_needed():
    """Without a destination, the error lists the possible destinations."""
    with pytest.raises(ValueError, match=r"otlp='http.*file=.*console=True"):
        telemetry.setup()


def test_an_unknown_signal_is_refused():
    """The error names the valid signals."""
    with pytest.raises(ValueError, match="expected 'traces', 'metrics' or 'events', got 'spans'"):
        telemetry.setup(console=True, signals=("spans",))


@pytest.mark.parametrize("missing", ["opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http.trace_exporter"])
def test_without_the_extra_the_error_names_it(missing):
    """The error lists the packages of the extra, because `fluxibly` on the index belongs to another project."""
    code = f"""
import sys
sys.modules[{missing!r}] = sys.modules[{missing + ".resources"!r}] = None
from fluxibly.telemetry import setup
setup(otlp="http://127.0.0.1:1")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert "ImportError" in ran.stderr
    assert "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http" in ran.stderr


def test_a_file_that_cannot_be_written_is_reported_at_once(tmp_path):
    """The error comes from `setup` rather than from the first call."""
    ran = script(f"file={str(tmp_path / 'none' / 'trace.jsonl')!r}")
    assert "FileNotFoundError" in ran.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def receiver(tmp_path):
    """A real OTLP/HTTP receiver, which prints each message as one line of JSON."""
    pytest.importorskip("oteltap")
    port = free_port()
    out = tmp_path / "received.ndjson"
    with out.open("w") as file:
        process = subprocess.Popen([sys.executable, "-u", "-m", "oteltap", "--port", str(port)], stdout=file)
        try:
            for _ in range(200):
                if f"port {port}" in out.read_text():
                    break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}", out
        finally:
            process.terminate()
            process.wait()


def received(out: Path, wanted: str) -> str:
    """Wait until the receiver has printed `wanted`, and return its whole output."""
    for _ in range(200):
        if wanted in out.read_text():
            break
        time.sleep(0.05)
    return out.read_text()


def test_a_real_receiver_gets_spans_metrics_and_events(receiver):
    """The receiver gets the tree of spans, the usage once per call, the histograms, and the content only in events."""
    address, out = receiver
    ran = script(
        f"otlp={address!r}, signals=('traces', 'metrics', 'events')", "capture='event'", "telemetry.shutdown()"
    )
    assert (ran.returncode, ran.stdout) == (0, "")
    assert "rror" not in ran.stderr.replace("error_type", "").replace("error_message", "")
    text = received(out, "gen_ai.client.inference.operation.details")
    assert text.count('"name":"chat m-1"') == 2
    assert text.count('"name":"fluxibly.attempt"') == 3
    for name in ("operation.duration", "token.usage", "operation.time_to_first_chunk"):
        assert f'"gen_ai.client.{name}"' in text
    spans = [line for line in text.splitlines() if '"name":"chat m-1"' in line]
    assert not [line for line in spans if "meaning of life" in line]
    assert "meaning of life" in text


def test_a_dead_collector_slows_no_call_and_changes_no_result():
    """Calls continue, and the SDK logs that it could not export."""
    then = """
import time
start = time.perf_counter()
provider._answers.append(answer)
assert pipeline.complete(request).text == "forty two"
assert time.perf_counter() - start < 5
import os
os._exit(0)
"""
    ran = script(f"otlp='http://127.0.0.1:{free_port()}'", then=then)
    assert (ran.returncode, ran.stdout) == (0, "")
