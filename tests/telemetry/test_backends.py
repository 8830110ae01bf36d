"""Spans exported to real Phoenix and MLflow servers and read back. Each installs 850 MB, so run with `-m backends`."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from pathlib import Path

import pytest
from support.readme import blocks

pytestmark = [pytest.mark.backends, pytest.mark.timeout(1800)]

CALLS = """
import sys
from fluxibly.errors import Overloaded
from fluxibly.middleware import Retry, StreamMeter, Tracing
from fluxibly.pipeline import Pipeline
from fluxibly.telemetry import setup
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Chunk, Message, ProviderInfo, Request, Response, Tool, ToolCall, ToolCallDelta, Usage

class Remote(ScriptedProvider):
    info = ProviderInfo(name="OpenAIProvider", telemetry_name="openai", server_address="api.test", server_port=443)

def fall_back(request, call_next):
    try:
        return (yield from call_next(request))
    except Overloaded:
        return (yield from call_next(request.evolve(model="gpt-4o")))

telemetry = setup(otlp=sys.argv[1], headers={"x-mlflow-experiment-id": "0"})
usage = Usage(input_tokens=100, output_tokens=10, cached_tokens=60)
call = ToolCall("c1", "look", {"word": "life"})
provider = Remote(
    [
        Chunk(tool_calls=(ToolCallDelta(index=0, id="c1", name="look", arguments='{"word": '),)),
        Chunk(tool_calls=(ToolCallDelta(index=0, arguments='"life"}'),)),
        Chunk(finish_reason="tool_call", usage=usage),
    ],
    Overloaded("full"),
    Response("It is forty two.", finish_reason="stop", usage=usage),
    Overloaded("full"),
    Overloaded("full"),
    Response("Still forty two.", finish_reason="stop", usage=usage),
    ["one ", "two ", "three"],
)
stack = [Tracing(capture="span"), StreamMeter(), fall_back, Retry(max_retries=1, base_delay=0)]
pipeline = Pipeline(provider, stack)
opening = [Message.system("Be terse."), Message.user("What is the meaning of life?")]
tools = [Tool("look", "Looks things up")]
request = Request(model="gpt-4o-mini", messages=opening, tools=tools)
list(pipeline.stream(request))
pipeline.complete(request.evolve(messages=[*opening, Message.assistant("", tool_calls=[call]), Message.tool("42", call)]))
pipeline.complete(Request(model="gpt-4o-mini", messages="And now?"))
with pipeline.stream(Request(model="gpt-4o-mini", messages="Count")) as stream:
    next(stream), next(stream)
telemetry.shutdown()
"""

WITH_TOOLS = """
import sys
from fluxibly.middleware import Tools, Tracing
from fluxibly.pipeline import Pipeline
from fluxibly.telemetry import setup
from fluxibly.testing import ScriptedProvider
from fluxibly.types import ProviderInfo, Request, Response, ToolCall

class Remote(ScriptedProvider):
    info = ProviderInfo(name="OpenAIProvider", telemetry_name="openai", server_address="api.test", server_port=443)

def look_up(word: str) -> str:
    "Looks things up."
    return f"{word} is forty two"

def fails() -> str:
    raise LookupError

telemetry = setup(otlp=sys.argv[1], headers={"x-mlflow-experiment-id": "0"})
answer = Response("", tool_calls=[ToolCall("c1", "look_up", {"word": "life"}), ToolCall("c2", "fails")])
stack = [Tracing(capture="span"), Tools([look_up, fails])]
Pipeline(Remote(answer, "Forty two."), stack).complete(Request(model="with-tools", messages="What is life?"))
telemetry.shutdown()
"""


@pytest.fixture(autouse=True, scope="module")
def asked_for(request: pytest.FixtureRequest) -> None:
    """Skip these tests unless they are selected, because the backends are large."""
    if "backends" not in request.config.option.markexpr:
        pytest.skip("run with -m backends")


def environment(package: str) -> Path:
    """Return the folder of the package's own environment, from the user's cache if it is there."""
    home = Path.home() / ".cache" / "fluxibly-backends" / package
    if not (home / "complete").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([home / "bin" / "pip", "install", "-q", package], check=True)
        (home / "complete").touch()
    return home / "bin"


def serve(command: list[str | Path], path: str, **variables: str):
    """Run a server until the test ends, and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(part).replace("PORT", str(port)) for part in command]
    given = {key: value.replace("PORT", str(port)) for key, value in variables.items()}
    process = subprocess.Popen(command, env=os.environ | given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, f"{command[0]} ended"
            try:
                urllib.request.urlopen(address + path, timeout=5).read()  # noqa: S310  # the server that was started above
                break
            except OSError:
                time.sleep(0.5)
        subprocess.run([sys.executable, "-c", CALLS, address], check=True, timeout=120, capture_output=True)
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def phoenix(tmp_path_factory):
    yield from serve(
        [environment("arize-phoenix") / "phoenix", "serve"],
        "/healthz",
        PHOENIX_WORKING_DIR=str(tmp_path_factory.mktemp("phoenix")),
        PHOENIX_HOST="127.0.0.1",
        PHOENIX_PORT="PORT",
        PHOENIX_GRPC_PORT="0",
        PHOENIX_TELEMETRY_ENABLED="false",
    )


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    command = [environment("mlflow") / "mlflow", "server", "--host", "127.0.0.1", "--port", "PORT", "--workers", "1"]
    yield from serve(
        [*command, "--backend-store-uri", f"sqlite:///{folder}/m.db", "--artifacts-destination", str(folder)],
        "/health",
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        MLFLOW_DISABLE_TELEMETRY="true",
        MLFLOW_MODEL_CATALOG_URI="",  # otherwise it fetches prices from GitHub for each provider while spans wait
    )


def follow_the_readme(server: str, address: str) -> subprocess.CompletedProcess[str]:
    """Run the README's commands for this server, with the address of the test server and the `echo` framework."""
    (block,) = (code for code in blocks("text") if server in code)
    install, start, *lines = block.splitlines()
    assert install.startswith("pip install")
    assert start.startswith(server)
    typed = re.sub(r"http://127\.0\.0\.1:\d+", f"{address} --framework echo", "\n".join(lines))
    return subprocess.run(
        ["sh", "-c", typed],  # noqa: S607  # as a reader of the README types it
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def spans_of(phoenix: str) -> list[dict]:
    address = f"{phoenix}/v1/projects/default/spans?limit=100"
    with urllib.request.urlopen(address, timeout=30) as answer:  # noqa: S310  # the server of the fixture
        return json.load(answer)["data"]


def test_phoenix_shows_the_conversation_the_tree_and_the_tokens_once(phoenix):
    """Phoenix shows calls as LLM spans, but not attempts. The bubbles have the texts and the tools."""
    calls, attempts = [], []
    for _ in range(60):
        spans = spans_of(phoenix)
        calls = sorted((s for s in spans if s["name"].startswith("chat gpt")), key=lambda s: s["start_time"])
        parents = [call["context"]["span_id"] for call in calls]
        attempts = [span for span in spans if span["parent_id"] in parents]
        if len(calls) + len(attempts) == 9:
            break
        time.sleep(0.5)
    assert {attempt["name"] for attempt in attempts} == {"fluxibly.attempt"}
    assert [call["name"] for call in calls] == [
        "chat gpt-4o-mini",
        "chat gpt-4o-mini",
        "chat gpt-4o",
        "chat gpt-4o-mini",
    ]
    assert {call["span_kind"] for call in calls} == {"LLM"}
    assert "LLM" not in {attempt["span_kind"] for attempt in attempts}
    assert [sum(a["parent_id"] == parent for a in attempts) for parent in parents] == [0, 2, 3, 0]
    totals = [span["attributes"].get("llm.token_count.total", 0) for span in (*calls, *attempts)]
    assert sum(totals) == 330
    assert calls[1]["attributes"]["llm.token_count.prompt_details.cache_read"] == 60
    first, second, _, abandoned = [call["attributes"] for call in calls]
    assert first["llm.output_messages.0.message.tool_calls.0.tool_call.function.name"] == "look"
    roles = [second[f"llm.input_messages.{n}.message.role"] for n in range(4)]
    assert roles == ["system", "user", "assistant", "tool"]
    assert second["llm.output_messages.0.message.content"] == "It is forty two."
    assert abandoned["llm.output_messages.0.message.content"] == "one two "
    assert {call["status_code"] for call in calls} == {"UNSET"}
    assert sum(attempt["status_code"] == "ERROR" for attempt in attempts) == 3


def test_phoenix_shows_the_tools(phoenix):
    """The runs of functions hang under their call, with what went in and what came out."""
    subprocess.run([sys.executable, "-c", WITH_TOOLS, phoenix], check=True, timeout=120, capture_output=True)
    spans, tools = [], {}
    for _ in range(60):
        spans = spans_of(phoenix)
        tools = {span["name"]: span for span in spans if span["name"].startswith("execute_tool ")}
        if len(tools) == 2 and any(span["name"] == "chat with-tools" for span in spans):
            break
        time.sleep(0.5)
    (call,) = [span for span in spans if span["name"] == "chat with-tools"]
    assert {*tools} == {"execute_tool look_up", "execute_tool fails"}
    assert {span["parent_id"] for span in tools.values()} == {call["context"]["span_id"]}
    assert (tools["execute_tool fails"]["status_code"], call["status_code"]) == ("ERROR", "UNSET")
    assert "life is forty two" in json.dumps(tools["execute_tool look_up"]["attributes"])
    assert "LLM" not in {span["span_kind"] for span in tools.values()}


def test_phoenix_shows_a_chat_of_the_readmes(phoenix):
    """The README's chat is a bubble in Phoenix, with the answer and its tokens."""
    done = follow_the_readme("phoenix", phoenix)
    assert done.returncode == 0
    assert done.stderr == ""
    calls = []
    for _ in range(60):
        calls = [span["attributes"] for span in spans_of(phoenix) if span["name"] == "chat echo"]
        if calls:
            break
        time.sleep(0.5)
    (call,) = calls
    assert call["llm.input_messages.0.message.content"] == "Name three colours."
    assert call["llm.output_messages.0.message.content"].strip() == done.stdout.strip()
    assert call["llm.token_count.total"] > call["llm.token_count.prompt"] > 0


READ = """
import json, sys, warnings
warnings.simplefilter("ignore")
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
traces = mlflow.search_traces(locations=["0"], return_type="list", order_by=["timestamp_ms ASC"])
print(json.dumps([
    {
        "usage": trace.info.token_usage,
        "state": str(trace.info.state),
        "spans": [
            [span.name, span.span_type, span.parent_id is None, json.dumps(span.inputs), json.dumps(span.outputs)]
            for span in trace.data.spans
        ],
    }
    for trace in traces
]))
"""


def traces_of(mlflow: str) -> list[dict]:
    python = environment("mlflow") / "python"
    ran = subprocess.run([python, "-c", READ, mlflow], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(ran.stdout.splitlines()[-1])


def test_mlflow_shows_the_conversation_the_tree_and_the_tokens_once(mlflow):
    """MLflow shows one trace for each call, with its tokens, its messages and its attempts."""
    traces = []
    for _ in range(20):
        traces = [trace for trace in traces_of(mlflow) if trace["spans"][0][0].startswith("chat gpt")]
        if len(traces) == 4:
            break
        time.sleep(0.5)
    assert [len(trace["spans"]) for trace in traces] == [1, 3, 4, 1]
    assert [(trace["usage"] or {}).get("total_tokens") for trace in traces] == [110, 110, 110, None]
    assert all("OK" in trace["state"] for trace in traces)
    names = [trace["spans"][0][:3] for trace in traces]
    assert names == [
        ["chat gpt-4o-mini", "CHAT_MODEL", True],
        ["chat gpt-4o-mini", "CHAT_MODEL", True],
        ["chat gpt-4o", "CHAT_MODEL", True],
        ["chat gpt-4o-mini", "CHAT_MODEL", True],
    ]
    assert "meaning of life" in traces[1]["spans"][0][3]
    assert "It is forty two." in traces[1]["spans"][0][4]
    assert "one two" in traces[3]["spans"][0][4]


def test_mlflow_shows_a_chat_of_the_readmes(mlflow):
    """The README's chat is a trace in MLflow, with the question, the answer and its tokens."""
    done = follow_the_readme("mlflow", mlflow)
    assert done.returncode == 0
    assert done.stderr == ""
    traces = []
    for _ in range(20):
        traces = [trace for trace in traces_of(mlflow) if trace["spans"][0][0] == "chat echo"]
        if traces:
            break
        time.sleep(0.5)
    (trace,) = traces
    call = trace["spans"][0]
    assert call[1:3] == ["CHAT_MODEL", True]
    assert "Name three colours." in call[3]
    assert json.dumps(done.stdout.strip())[1:-1] in call[4]
    assert trace["usage"]["total_tokens"] > trace["usage"]["input_tokens"] > 0
