"""The command line as users run it: in a process of its own, behind a pipe or at a terminal."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from support.terminals import START, environment, fluxibly

from fluxibly._extras import EXTRAS

QUESTION = "What is the capital of France?"
pytest.importorskip("typer")


def check_mistake(result: subprocess.CompletedProcess[str], says: str, status: int = 2) -> None:
    """Check that a mistake is one line on standard error, and nothing else."""
    assert (result.returncode, result.stdout) == (status, "")
    assert result.stderr.startswith("fluxibly: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


@pytest.fixture
def misuse(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., None]]:
    """Return a function that checks a mistake in this process, which is faster. The loggers are restored."""
    from fluxibly.cli.commands import run

    loggers = [logging.getLogger("fluxibly"), logging.getLogger("opentelemetry")]
    before = [(each.level, each.propagate, list(each.handlers)) for each in loggers]
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def check(*arguments: str, says: str) -> None:
        status = run(arguments)
        check_mistake(subprocess.CompletedProcess(arguments, status, *capfd.readouterr()), says)

    yield check
    for each, (level, propagate, handlers) in zip(loggers, before, strict=True):
        each.setLevel(level)
        each.propagate = propagate
        each.handlers[:] = handlers


def test_help() -> None:
    """Without a command, the help is printed, which names every command."""
    result = fluxibly()
    assert result.returncode == 0
    for command in ("chat", "explain", "frameworks", "doctor", "logs", "trace"):
        assert f"  {command} " in result.stdout


def test_version() -> None:
    """--version prints the version."""
    result = fluxibly("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("fluxibly ")


def test_answer_in_a_pipe() -> None:
    """Piped output is the text alone."""
    result = fluxibly("chat", "--framework", "echo", "one two  three")
    assert (result.returncode, result.stdout, result.stderr) == (0, "one two  three\n", "")


def test_answer_that_is_not_streamed() -> None:
    """--no-stream prints the same answer."""
    result = fluxibly("chat", "--framework", "echo", "--no-stream", "one two")
    assert (result.returncode, result.stdout, result.stderr) == (0, "one two\n", "")


def test_prompt_from_standard_input() -> None:
    """The prompt - is read from standard input."""
    result = fluxibly("chat", "--framework", "echo", "-", given="caffè\nlatte\n")
    assert (result.returncode, result.stdout) == (0, "caffè\nlatte\n")


def test_huge_prompt() -> None:
    """A prompt of 10 MB is answered."""
    prompt = "word " * 2_000_000
    result = fluxibly("chat", "--framework", "echo", "--no-stream", "-", given=prompt)
    assert (result.returncode, len(result.stdout)) == (0, len(prompt) + 1)


def test_json() -> None:
    """--json prints the response, with keys that are always present."""
    result = fluxibly("chat", "--framework", "echo", "--json", "one two")
    response = json.loads(result.stdout)
    assert response["text"] == "one two"
    assert response["finish_reason"] == "stop"
    assert response["usage"]["output_tokens"] == 2
    assert response["stats"]["characters"] == 7
    assert response["tool_calls"] == []
    assert json.loads(fluxibly("chat", "--framework", "echo", "--json", "--no-stream", "x").stdout)["stats"] is None


def test_log_level() -> None:
    """Logs go to standard error, at the requested level."""
    result = fluxibly("chat", "--framework", "echo", "--log-level", "info", "one")
    assert result.stdout == "one\n"
    lines = result.stderr.splitlines()
    assert lines[0] == (
        "INFO    LLM streaming request started | name=EchoProvider, framework=echo, model=echo, prompt_length=3"
    )
    assert lines[1].startswith("INFO    LLM streaming completed | ")


def test_configuration_file(yaml: Path) -> None:
    """--config gives the provider and the stack; --model overrides its model."""
    yaml.write_text("llm: {framework: echo, model: mine, middleware: [logging]}")
    result = fluxibly("chat", "--config", str(yaml), "--log-level", "info", "x")
    assert "model=mine" in result.stderr
    result = fluxibly("chat", "--config", str(yaml), "--model", "yours", "--log-level", "info", "x")
    assert "model=yours" in result.stderr


def test_key_stays_with_its_service(yaml: Path) -> None:
    """Another framework does not get the key and the address of the file."""
    yaml.write_text("llm: {framework: openai, model: m, api_key: sk-secret, api_base: 'http://127.0.0.1:9'}")
    result = fluxibly("chat", "--config", str(yaml), "--framework", "groq", "--model", "m", "x")
    check_mistake(result, "GROQ_API_KEY")
    assert "sk-secret" not in result.stderr


def test_explain(yaml: Path) -> None:
    """The stack is printed outermost first, with its settings, the worst case and the warnings, 80 columns wide."""
    yaml.write_text("llm: {framework: echo, model: m, middleware: [timing, retry: {max_retries: 5}]}")
    result = fluxibly("explain", "--config", str(yaml))
    places = re.findall(r"^ {1,2}(\d+)  (\S+)", result.stdout, re.MULTILINE)
    assert places == [("1", "Timing"), ("2", "Retry"), ("3", "(provider)")]
    assert "max_retries=5" in result.stdout
    assert "framework=echo, model=m\n" in result.stdout
    assert "6 = 6 attempts (Retry (2))" in result.stdout
    assert "No warnings." in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    shown = fluxibly("explain").stdout
    assert "framework=local, model=smollm2, temperature=0.2, max_tokens=512" in shown
    names = [name for _, name in re.findall(r"^ {1,2}(\d+)  (\S+)", shown, re.MULTILINE)]
    assert names == ["Tracing", "Logging", "Metrics", "Timing", "StreamMeter", "Validation", "Retry", "(provider)"]


def test_explain_strictly(yaml: Path) -> None:
    """With --strict, warnings are an error that names them; without warnings, nothing changes."""
    yaml.write_text("llm: {framework: echo, model: m, middleware: [cache, redact, logging, tracing]}")
    result = fluxibly("explain", "--config", str(yaml))
    assert (result.returncode, result.stderr) == (0, "")
    assert "2 warnings:" in result.stdout
    strict = fluxibly("explain", "--config", str(yaml), "--strict")
    assert (strict.returncode, strict.stdout) == (2, result.stdout)
    assert strict.stderr.startswith("fluxibly: cache-outside-of-redact: Cache (1) stands outside of Redact (2): ")
    assert "; logging-outside-of-tracing: " in strict.stderr
    assert strict.stderr.count("\n") == 1
    assert fluxibly("explain", "--framework", "echo", "--strict").returncode == 0


def test_explain_as_a_flowchart(yaml: Path) -> None:
    """--mermaid prints a flowchart, and nothing else."""
    yaml.write_text("llm: {framework: echo, model: m, middleware: [timing, fallback: {to: [other]}]}")
    lines = fluxibly("explain", "--config", str(yaml), "--mermaid").stdout.splitlines()
    assert lines[0] == "flowchart TD"
    assert '    layer1["1 Timing"]' in lines
    assert "    layer1 --> layer2" in lines
    assert all(re.match(r"    \w+", line) for line in lines[1:])


def test_frameworks() -> None:
    """Each framework is listed with the package or key that is missing."""
    lines = fluxibly("frameworks", env={"GROQ_API_KEY": "x"}).stdout.splitlines()
    found = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert found["echo"] == "ready"
    assert found["groq"] == "ready"
    assert re.fullmatch(r"not ready +set OPENAI_API_KEY", found["openai"])


def test_doctor() -> None:
    """`doctor` lists versions and frameworks. A framework that is not set up fails only if the user asked for it."""
    result = fluxibly("doctor")
    assert result.returncode == 0
    assert re.search(r"^framework +openai +not set up +set OPENAI_API_KEY$", result.stdout, re.MULTILINE)
    assert re.search(r"^package +httpx +\d", result.stdout, re.MULTILINE)
    result = fluxibly("doctor", "--framework", "openai", "--model", "gpt-4o-mini")
    assert result.returncode == 1


@pytest.mark.model
def test_doctor_asks_the_server(local_server: str, yaml: Path) -> None:
    """`doctor` sends a request to the server; if the server does not answer, it says what to do."""
    yaml.write_text(f"llm: {{framework: llamacpp, model: smollm2, api_base: '{local_server}/v1'}}")
    result = fluxibly("doctor", "--config", str(yaml))
    assert result.returncode == 0
    assert re.search(r"^framework +llamacpp +127\.0\.0\.1:\d+ answers in ", result.stdout, re.MULTILINE)
    yaml.write_text("llm: {framework: llamacpp, model: smollm2, api_base: 'http://127.0.0.1:9/v1'}")
    result = fluxibly("doctor", "--config", str(yaml))
    assert result.returncode == 1
    assert "127.0.0.1:9 does not answer" in result.stdout
    assert "start llama.cpp (llama-server), or set api_base to its address" in result.stdout


def test_trace(tmp_path: Path) -> None:
    """--trace writes spans that `fluxibly trace` draws."""
    file = tmp_path / "spans.jsonl"
    assert fluxibly("chat", "--framework", "echo", "--trace", str(file), "one").returncode == 0
    assert all(json.loads(line)["resourceSpans"] for line in file.read_text().splitlines())
    result = fluxibly("trace", str(file))
    assert result.returncode == 0
    assert "chat echo" in result.stdout
    page = tmp_path / "page.html"
    result = fluxibly("trace", str(file), "--html", str(page))
    assert (result.returncode, result.stdout) == (0, f"wrote {page}\n")
    assert "chat echo" in page.read_text()


def test_capture(tmp_path: Path) -> None:
    """--capture records the prompt and the answer in the spans, which have no content otherwise."""
    plain, captured = tmp_path / "plain.jsonl", tmp_path / "captured.jsonl"
    assert fluxibly("chat", "--framework", "echo", "--trace", str(plain), "a secret").returncode == 0
    assert "secret" not in plain.read_text()
    assert fluxibly("chat", "--framework", "echo", "--trace", str(captured), "--capture", "a secret").returncode == 0
    assert captured.read_text().count("a secret") == 2


def test_capture_without_a_place_for_the_spans(misuse: Callable[..., None]) -> None:
    """--capture alone is a mistake, because the spans go nowhere."""
    misuse(
        "chat", "--framework", "echo", "--capture", "one", says="--capture: expected a place for the spans; add --trace"
    )


@contextmanager
def collector(status: int = 200) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Run a backend that answers with `status`; yield its address, and the paths and bodies that it got."""
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((self.path, gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", got
        finally:
            server.shutdown()
            thread.join()


def test_collector_that_refuses() -> None:
    """If a backend refuses the spans, one line on standard error has the status that it answered."""
    with collector(422) as (address, _):
        result = fluxibly("chat", "--framework", "echo", "--otlp", address, "one")
    assert (result.returncode, result.stdout) == (0, "one\n")
    assert "did not reach" in result.stderr
    assert "422" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("path", ["", "/", "/mine/v1/traces"])
def test_collector(path: str) -> None:
    """--otlp sends the spans to a backend, at OTLP's default path unless the URL has another."""
    with collector() as (address, got):
        result = fluxibly("chat", "--framework", "echo", "--otlp", address + path, "one")
    assert (result.returncode, result.stdout, result.stderr) == (0, "one\n", "")
    assert [where for where, _ in got] == [path if len(path) > 1 else "/v1/traces"]
    assert b"chat echo" in got[0][1]


def test_dead_collector() -> None:
    """A backend that does not answer changes neither the answer nor the status, and is reported in one line."""
    result = fluxibly("chat", "--framework", "echo", "--otlp", "http://127.0.0.1:9", "one")
    assert (result.returncode, result.stdout) == (0, "one\n")
    assert result.stderr.startswith("fluxibly: the spans did not reach http://127.0.0.1:9/v1/traces")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("chat",), "there is no prompt"),
        (("chat", ""), "the prompt is empty"),
        (("chat", "-"), "the prompt is empty"),
        (("chat", "two", "words"), "unexpected extra argument"),
        (("chat", "x", "--framwork", "echo"), "--framwork"),
        (("chat", "x", "--log-level", "loud"), "'loud' is not one of 'debug', 'info'"),
        (("chat", "x", "--framework", "opnai", "--model", "m"), "did you mean 'openai'?"),
        (("chat", "x", "--framework", "openai"), "give --model too"),
        (("chat", "x", "--framework", "openai", "--model", "m"), "set the environment variable OPENAI_API_KEY"),
        (("chat", "x", "--framework", ""), "LLM framework '' not registered"),
        (("chat", "x", "--model", ""), 'expected "framework:model", like "openai:gpt-4o-mini", got \'\''),
        (("chat", "x", "-m", "mistral:"), "'mistral' is a framework: write 'mistral:MODEL'"),
        (("chat", "x", "-m", "nobody-knows"), "write who serves it, like 'ollama:nobody-knows'"),
        (("chat", "x", "-m", "openai:gpt-4o-mini"), "set the environment variable OPENAI_API_KEY"),
        (("chat", "x\udcff", "--framework", "echo"), "the prompt is not text in this terminal's encoding"),
        (("chat", "x", "--system", "\udcff", "--framework", "echo"), "the prompt is not text"),
        (("chat", "x", "--model", "no/such.gguf"), "give smollm2, qwen2.5-coder-0.5b, or the path of a GGUF file"),
        (("chat", "x", "--config", "no/such.yaml"), "cannot read no/such.yaml"),
        (("chat", "x", "--framework", "echo", "--trace", "no/such/file"), "--trace: cannot write no/such/file"),
        (("chat", "x", "--framework", "echo", "--otlp", "here"), "is not an http:// or https:// URL"),
        (("explain", "--framework", "opnai"), "did you mean 'openai'?"),
        (("trace", "no/such.jsonl"), "no/such.jsonl: No such file"),
        (("trace", __file__), "not OTLP JSON"),
        (("dance",), "dance"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], says: str, misuse: Callable[..., None]) -> None:
    """A user's mistake is one line on standard error and exit status 2."""
    misuse(*arguments, says=says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "got a list"),
        ("llm: [", "not valid YAML"),
        ("lm: {framework: echo, model: m}", "has no section `llm:`; did you mean 'lm'?"),
        ("llm: {framework: echo}", "llm.model: is required"),
        ("llm: {framework: echo, model: m, temperature: 3}", "llm.temperature: expected a number from 0 to 2, got 3"),
        (
            "llm: {framework: echo, model: m, max_tokens: many}",
            "llm.max_tokens: expected a whole number from 1 up, got 'many'",
        ),
        ("llm: {framework: echo, model: m, temprature: 1}", "did you mean 'temperature'?"),
        ("llm: {framework: echo, model: '${FLUXIBLY_NO_SUCH}'}", "FLUXIBLY_NO_SUCH is not set"),
        ("llm: {framework: echo, model: m, middleware: [loging]}", "did you mean 'logging'?"),
        ("llm: {framework: echo, model: m, middleware: [retry: {max_retrys: 1}]}", "max_retrys"),
        ("llm: {framework: echo, temperature: 9, top_p: 7}", "top_p: expected a number from 0 to 1, got 7"),
    ],
)
def test_mistakes_in_a_file(yaml: Path, text: str, says: str, misuse: Callable[..., None]) -> None:
    """A configuration file with mistakes, however many, is one line on standard error and exit status 2."""
    yaml.write_text(text)
    misuse("chat", "--config", str(yaml), "x", says=says)


def test_trace_that_is_not_text(tmp_path: Path, misuse: Callable[..., None]) -> None:
    """A file that is not text is a mistake; the message names the file."""
    file = tmp_path / "spans.jsonl"
    file.write_bytes(b"\xff\xfe")
    misuse("trace", str(file), says=f"{file}: this is not OTLP JSON")


def test_file_that_is_a_folder(tmp_path: Path, misuse: Callable[..., None]) -> None:
    """A file that cannot be read is a mistake."""
    misuse("chat", "--config", str(tmp_path), "x", says="Is a directory")


def test_exit_status() -> None:
    """The console script exits with the status of the command."""
    check_mistake(fluxibly("chat"), "there is no prompt")


PROVIDER = """
from fluxibly import *
class Mine:
    def __init__(self, config): pass
    def complete(self, request): return "whole"
    {stream}
register_llm_framework("mine", Mine)
"""
MINE = ("chat", "x", "--framework", "mine", "--model", "m")


def test_provider_without_stream() -> None:
    """If a provider cannot stream, the message suggests --no-stream."""
    before = PROVIDER.format(stream="")
    check_mistake(fluxibly(*MINE, before=before), "try --no-stream")
    assert fluxibly(*MINE, "--no-stream", before=before).stdout == "whole\n"


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        ("def stream(self, request): yield 1", "yielded an int"),
        ("def stream(self, request): raise ProviderError('no\\nluck')", "fluxibly: no luck\n"),
        ("def stream(self, request): raise KeyError('mine')", "KeyError: 'mine'"),
    ],
)
def test_provider_that_fails(stream: str, says: str) -> None:
    """A provider's failure is one line and exit status 1, whatever the provider raised."""
    check_mistake(fluxibly(*MINE, before=PROVIDER.format(stream=stream)), says, status=1)


def test_prompt_that_is_too_long() -> None:
    """A prompt that is too long is the user's mistake, even if the provider finds it."""
    before = "from fluxibly.errors import ContextLengthExceeded\n" + PROVIDER.format(
        stream="def stream(self, request): raise ContextLengthExceeded('too long')"
    )
    check_mistake(fluxibly(*MINE, before=before), "too long")


def test_answer_that_was_cut_off() -> None:
    """In a pipe, which shows no figures, a line on standard error reports the cut."""
    before = PROVIDER.format(stream="def stream(self, request): yield Chunk('one two', finish_reason='length')")
    result = fluxibly(*MINE, before=before)
    assert (result.returncode, result.stdout) == (0, "one two\n")
    assert result.stderr == "fluxibly: the answer was cut off at the limit of its tokens\n"
    assert fluxibly(*MINE, "--json", before=before).stderr == ""


def test_media_of_an_answer() -> None:
    """Media that a model made have a line each, on standard error in a pipe; --json prints them with their bytes."""
    picture = "Image(data=b'12345', media_type='image/png', raw={'id': 'ig_1'})"
    speech = "Audio(url='https://example.org/a', media_type='audio/wav', transcript='hello')"
    before = "from fluxibly.parts import *\n" + PROVIDER.format(
        stream=f"def stream(self, request): yield Chunk('Look:', parts=({picture}, {speech}), details={{'odd': [1]}})"
    )
    result = fluxibly(*MINE, before=before)
    assert (result.returncode, result.stdout) == (0, "Look:\n")
    assert result.stderr == "[image/png, 5 bytes]\n[audio/wav, https://example.org/a] hello\n"
    response = json.loads(fluxibly(*MINE, "--json", before=before).stdout)
    assert response["media"] == [
        {"type": "image", "data": "MTIzNDU=", "media_type": "image/png", "raw": {"id": "ig_1"}},
        {"type": "audio", "url": "https://example.org/a", "media_type": "audio/wav", "transcript": "hello"},
    ]
    assert response["details"] == {"odd": [1]}


def test_failure_after_output() -> None:
    """Output that has arrived stays; the failure is reported after it."""
    before = PROVIDER.format(stream="def stream(self, request): yield 'half'; raise ProviderError('cut')")
    result = fluxibly(*MINE, before=before)
    assert (result.returncode, result.stdout) == (1, "half\n")
    assert result.stderr.count("\n") == 1


def test_failure_of_the_network(yaml: Path) -> None:
    """A server that does not answer is a failure, not a mistake; the message does not contain the key."""
    yaml.write_text(
        "llm: {framework: openai, model: m, api_key: sk-secret, api_base: 'http://127.0.0.1:9', max_retries: 0}"
    )
    result = fluxibly("chat", "--config", str(yaml), "x")
    check_mistake(result, "127.0.0.1", status=1)
    assert "sk-secret" not in result.stderr


def packages_of(*extras: str) -> str:
    return " ".join(package for extra in extras for package in EXTRAS[extra])


def test_without_the_extra() -> None:
    """Without the extra `cli`, one line names the packages to install."""
    result = fluxibly("chat", "x", before="import sys; sys.modules['typer'] = None")
    check_mistake(result, f"pip install {packages_of('cli', 'local')}\n")
    assert "fluxibly[" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "extras"),
    [
        (["doctor"], ["cli"]),
        (["chat", "--framework=echo", "x"], ["cli"]),
        (["chat", "x"], ["cli", "local"]),
        (["chat", "x", "--trace", "t"], ["cli", "local", "otel"]),
        ([], ["cli"]),
    ],
)
def test_all_that_a_command_needs_is_named_at_once(arguments: list[str], extras: list[str]) -> None:
    """The first message names all missing packages, not only the first."""
    before = (
        "import sys; sys.modules['typer'] = None\nimport importlib.metadata as m\n"
        "def gone(name): raise m.PackageNotFoundError(name)\nm.version = gone"
    )
    check_mistake(fluxibly(*arguments, before=before), f"pip install {packages_of(*extras)}\n")


def test_a_chat_names_what_its_framework_and_its_spans_need() -> None:
    """One line names the packages for the framework and for the spans."""
    before = (
        "import importlib.util as u; f = u.find_spec; import importlib.metadata as m; v = m.version\n"
        "u.find_spec = lambda n, *a: None if n.startswith(('xllamacpp', 'opentelemetry.sdk')) else f(n, *a)\n"
        "def version(n):\n    if n in ('xllamacpp', 'opentelemetry-sdk'): raise m.PackageNotFoundError(n)\n    return v(n)\n"
        "m.version = version"
    )
    result = fluxibly("chat", "x", "--trace", "t.jsonl", before=before)
    check_mistake(result, "need packages that are not installed: pip install xllamacpp opentelemetry-sdk\n")


def test_without_xllamacpp() -> None:
    """Without the extra `local`, one line names its package."""
    before = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'xllamacpp' else f(n, *a)"
    check_mistake(fluxibly("chat", "x", before=before), "needs packages that are not installed: pip install xllamacpp")


def test_reader_that_leaves() -> None:
    """If the reader closes the pipe, no traceback is printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, "chat", "--framework", "echo", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(b"word " * 100_000, timeout=100)
    assert errors == b""


@pytest.mark.model
def test_local_model(gguf: Path) -> None:
    """The local model, given by its path, answers in a pipe."""
    result = fluxibly("chat", "--model", str(gguf), "--json", QUESTION)
    response = json.loads(result.stdout)
    assert result.stderr == ""
    assert response["text"]
    assert response["usage"]["input_tokens"] == 16
