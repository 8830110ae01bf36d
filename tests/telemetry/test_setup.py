"""SDK setup in one line: to a file, to the console, and over OTLP/HTTP to a real receiver."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)


def script(setup: str, tracing: str = "", then: str = "") -> subprocess.CompletedProcess[str]:
    """Make two calls in a new process, because a process can set up an SDK only once."""
    return python(CALLS.format(setup=setup, tracing=tracing) + then)


def reports(ran: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what fluxibly reports on standard error, without the lines of its log."""
    return [line.removeprefix("fluxibly: ") for line in ran.stderr.splitlines() if not line.startswith("LLM ")]


def spans_of(path: Path) -> list[dict[str, Any]]:
    """Return the spans of a file in the order in which they ended."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [span for line in lines for span in line["resourceSpans"][0]["scopeSpans"][0]["spans"]]


def test_spans_in_a_file_are_otlp_json(tmp_path):
    """Each line is one export, with ids in hex and numbers in OTLP's JSON format. The reader builds trees from them."""
    path = tmp_path / "trace.jsonl"
    ran = script(f"file={str(path)!r}", "capture='span'")
    assert ran.returncode == 0, ran.stderr
    assert len(spans_of(path)) == 4
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    span = spans_of(path)[0]
    assert re.fullmatch("[0-9a-f]{32}", span["traceId"])
    assert re.fullmatch("[0-9a-f]{16}", span["parentSpanId"])
    assert span["kind"] == 1
    assert {"key": "fluxibly.attempt.index", "value": {"intValue": "0"}} in span["attributes"]
    resource = lines[0]["resourceSpans"][0]["resource"]["attributes"]
    assert {"key": "service.name", "value": {"stringValue": "fluxibly"}} in resource
    first, second = trace_file.read(path).roots
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


def test_an_sdk_of_the_program_s_own_is_left_alone():
    """The global provider can be set only once. The error says how to add an exporter to it."""
    ran = python("""
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from fluxibly.telemetry import setup
trace.set_tracer_provider(TracerProvider())
setup(console=True)
""")
    assert "RuntimeError: a tracer provider is already set up" in ran.stderr
    assert "add_span_processor" in ran.stderr


def test_a_second_setup_with_the_same_arguments_is_the_first(tmp_path):
    """Each part of a program may set up telemetry: the spans are exported once."""
    path = tmp_path / "trace.jsonl"
    again = f"""
import os
os.chdir({str(tmp_path)!r})
assert setup(file="trace.jsonl", headers={{}}) is telemetry
provider._answers.append(answer)
pipeline.complete(request)
"""
    ran = script(f"file={str(path)!r}, headers={{}}", then=again)
    assert ran.returncode == 0, ran.stderr
    assert len(spans_of(path)) == 5
    assert len({span["spanId"] for span in spans_of(path)}) == 5


@pytest.mark.parametrize(
    ("again", "says"),
    [
        (
            "console=True",
            "RuntimeError: setup() was called before, with another file, another console; a process has one SDK",
        ),
        ("file=PATH, capture='span'", "another capture;"),
        ("file=PATH, service_name='x'", "another service_name;"),
    ],
)
def test_a_setup_with_other_arguments_is_refused(tmp_path, again, says):
    """The error names the arguments that differ, but not their values: a header may hold a key."""
    path = repr(str(tmp_path / "trace.jsonl"))
    ran = script(f"file={path}", then=f"PATH = {path}\nsetup({again})")
    assert says in ran.stderr.splitlines()[-1]


def test_a_setup_after_the_shutdown_is_refused():
    """The global provider cannot be replaced, so the second call would record nothing."""
    ran = script("console=True", then="telemetry.shutdown()\nassert not telemetry.running\nsetup(console=True)")
    assert "RuntimeError: the SDK of setup() has been shut down" in ran.stderr


@pytest.mark.parametrize(
    ("setup", "tracing", "captured"),
    [
        ("", "", False),
        (", capture='span'", "", True),
        (", capture='span'", "capture='none'", False),
        (", capture='none'", "capture='span'", True),
    ],
)
def test_setup_says_what_to_capture(tmp_path, setup, tracing, captured):
    """`capture` is for each `Tracing` that does not say it itself."""
    path = tmp_path / "trace.jsonl"
    ran = script(f"file={str(path)!r}{setup}", tracing)
    assert ran.returncode == 0, ran.stderr
    assert ("meaning of life" in path.read_text()) is captured


def test_setup_says_what_earlier_layers_capture(tmp_path, monkeypatch):
    """A `Tracing` that was made and used before `setup` captures from then on. `setup` precedes the variable."""
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "NO_CONTENT")
    path = tmp_path / "trace.jsonl"
    ran = python(f"""
import opentelemetry.trace
from fluxibly.middleware import Tracing
from fluxibly.pipeline import Pipeline
from fluxibly.telemetry import setup
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request
pipeline = Pipeline(ScriptedProvider("one", "two"), [Tracing()])
pipeline.complete(Request(model="m", messages="first question"))
setup(file={str(path)!r}, capture="span")
pipeline.complete(Request(model="m", messages="second question"))
""")
    assert ran.returncode == 0, ran.stderr
    assert "second question" in path.read_text()
    assert "first question" not in path.read_text()


def test_setup_does_not_say_what_another_sdk_captures(tmp_path):
    """`capture` is not for a `Tracing` with a tracer provider of its own, whose spans go elsewhere."""
    ran = python(f"""
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from fluxibly.middleware import Tracing
from fluxibly.pipeline import Pipeline
from fluxibly.telemetry import setup
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request
setup(file={str(tmp_path / "trace.jsonl")!r}, capture="span")
own, exporter = TracerProvider(), InMemorySpanExporter()
own.add_span_processor(SimpleSpanProcessor(exporter))
for settings in ({{}}, {{"capture": "span"}}):
    pipeline = Pipeline(ScriptedProvider("one"), [Tracing(tracer_provider=own, **settings)])
    pipeline.complete(Request(model="m", messages="a question"))
    print(any("a question" in span.to_json() for span in exporter.get_finished_spans()))
""")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("capture", ["spans", "", True])
def test_an_unknown_capture_is_refused(capture):
    """The error names the valid modes."""
    with pytest.raises(ValueError, match=r"setup\(capture=…\): expected one of 'none', 'span', 'event', 'both', got"):
        telemetry.setup(console=True, capture=capture)


@pytest.mark.parametrize("settings", [{"console": True}, {"otlp": "http://127.0.0.1:1"}])
def test_events_need_a_destination(settings):
    """Content in events that go nowhere would be lost without a word."""
    with pytest.raises(ValueError, match=r"setup\(capture='event'\) needs otlp=… and 'events' among the signals"):
        telemetry.setup(capture="event", **settings)


def test_no_export_runs_in_the_thread_of_a_call(tmp_path):
    """A disk or terminal that blocks must not stop the event loop. Here the file is a pipe that nobody reads."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ran = python(f"""
import asyncio, os, threading
from fluxibly.telemetry import setup
from fluxibly import AsyncLLM, LLMConfig
from fluxibly.middleware import Tracing
reader = os.open({str(pipe)!r}, os.O_RDONLY | os.O_NONBLOCK)
setup(file={str(pipe)!r})
async def ask():
    llm = AsyncLLM(LLMConfig(framework="echo", model="x" * 60000), [Tracing()])
    for _ in range(10):
        assert await llm.forward("hi") == "hi"
        await asyncio.sleep(0.15)
asyncio.run(asyncio.wait_for(ask(), 30))
print("done", flush=True)
os._exit(0)
""")
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr


@pytest.mark.parametrize("end", ["", "raise KeyboardInterrupt", "os.kill(os.getpid(), signal.SIGINT)", "sys.exit(3)"])
def test_nothing_is_lost_at_the_end(tmp_path, end):
    """The spans that wait are exported when the process ends, by Ctrl-C too."""
    path = tmp_path / "trace.jsonl"
    ran = script(f"file={str(path)!r}", then=f"import os, signal, sys\n{end}")
    assert len(spans_of(path)) == 4, ran.stderr


def test_forks_share_a_file(tmp_path):
    """Each process exports its own spans, each span once, and no line is mixed with another."""
    path = tmp_path / "trace.jsonl"
    then = """
import os
children = []
for _ in range(4):
    children.append(os.fork())
    if not children[-1]:
        assert setup(SETUP) is telemetry
        for _ in range(50):
            provider._answers.append(answer)
            pipeline.complete(request)
        telemetry.shutdown()
        os._exit(0)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""
    ran = script(f"file={str(path)!r}", then=then.replace("SETUP", f"file={str(path)!r}"))
    assert ran.returncode == 0, ran.stderr
    found = [span["spanId"] for span in spans_of(path)]
    assert len(found) == len(set(found)) == 4 + 4 * 50


def test_a_folder_that_vanishes_breaks_no_call(tmp_path):
    """The failure is reported once; the file is written again when it can be."""
    folder = tmp_path / "spans"
    folder.mkdir()
    then = f"""
import os, shutil
from opentelemetry import trace
flush = trace.get_tracer_provider().force_flush
flush()
shutil.rmtree({str(folder)!r})
for _ in range(2):
    provider._answers.append(answer)
    assert pipeline.complete(request).text == "forty two"
    flush()
os.mkdir({str(folder)!r})
provider._answers.append(answer)
pipeline.complete(request)
"""
    path = folder / "trace.jsonl"
    ran = script(f"file={str(path)!r}", then=then)
    assert ran.returncode == 0
    assert reports(ran) == [f"spans could not be written to {path}: No such file or directory; calls continue"]
    assert len(spans_of(path)) == 1


def test_a_full_disk_breaks_no_call():
    """The failure is reported once."""
    ran = script("file='/dev/full'")
    assert ran.returncode == 0
    assert reports(ran) == ["spans could not be written to /dev/full: No space left on device; calls continue"]


def test_a_disk_that_fills_up_in_the_middle_of_a_line(tmp_path):
    """What is written after there is space again stands in lines of its own."""
    path = tmp_path / "trace.jsonl"
    then = """
import resource
from opentelemetry import trace
flush = trace.get_tracer_provider().force_flush
everything = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, everything[1]))
flush()
resource.setrlimit(resource.RLIMIT_FSIZE, everything)
provider._answers.append(answer)
pipeline.complete(request)
"""
    ran = script(f"file={str(path)!r}", then=then)
    assert reports(ran) == [f"spans could not be written to {path}: the disk is full; calls continue"]
    cut, whole = path.read_text().splitlines()
    assert len(cut) == 1000
    assert len(json.loads(whole)["resourceSpans"][0]["scopeSpans"][0]["spans"]) == 1
    assert [span.outcome for span in trace_file.read(path).roots] == ["completed"]


def test_a_line_that_was_cut_spoils_no_other(tmp_path):
    """After a crash in the middle of a line, the next process begins a line of its own. The reader leaves the cut one out."""
    path = tmp_path / "trace.jsonl"
    path.write_text('{"resourceSpans":[{"reso')
    script(f"file={str(path)!r}")
    assert path.read_text().startswith('{"resourceSpans":[{"reso\n{"resourceSpans"')
    assert [span.name for span in trace_file.read(path).roots] == ["chat m-1", "chat m-1"]


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
    """The receiver gets the tree of spans, the usage once per call, the histograms, and the content only in events.

    All of it is sent by `shutdown`, before the process ends.
    """
    address, out = receiver
    ran = script(
        f"otlp={address!r}, signals=('traces', 'metrics', 'events')",
        "capture='event'",
        "telemetry.shutdown()\nimport os\nos._exit(0)",
    )
    assert (ran.returncode, ran.stdout) == (0, "")
    assert "rror" not in ran.stderr.replace("error_type", "").replace("error_message", "")
    text = received(out, "gen_ai.client.inference.operation.details")
    assert text.count('"name":"chat m-1"') == 2
    assert text.count('"name":"fluxibly.attempt"') == 2
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
