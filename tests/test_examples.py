"""The examples, run as a user does: the package with the functions installed, the configuration given to the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from support.misbehaving import serve
from support.readme import ROOT

PRODUCTION = ROOT / "examples" / "production"
ORDER = [
    *(
        "tracing",
        "logging",
        "metrics",
        "timing",
        "stream_meter",
        "cost",
        "deadline",
        "defaults",
        "tools",
        "continue",
        "redact",
    ),
    *("cache", "record", "replay", "guard", "validation", "extract_reasoning", "fallback", "balance", "hedge", "retry"),
    *("circuit_breaker", "budget", "rate_limit", "concurrency", "stream_timeout", "simulate_stream"),
]
"""The order of the layers of a production's stack, outermost first."""
ADDRESS = "ada.lovelace@example.org"
HEAD = {"object": "chat.completion", "id": "1", "created": 1, "model": "small"}
USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the package with the example's functions, as its first line says, and return the folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), str(PRODUCTION)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot build the package: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture
def run(installed, tmp_path):
    """Return a function that runs fluxibly's command line in a folder of its own, with the package installed."""

    def fluxibly(*arguments, given=""):
        paths = os.pathsep.join([str(ROOT), str(installed)])
        return subprocess.run(
            [sys.executable, "-c", "from fluxibly.cli import main; main()", *map(str, arguments)],
            input=given,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": paths, "HELPDESK_DATA": str(tmp_path), "COLUMNS": "80"},
            capture_output=True,
            encoding="utf-8",
            timeout=110,
            check=False,
        )

    return fluxibly


def layers(file=PRODUCTION / "stack.yaml"):
    stack = yaml.safe_load(file.read_text(encoding="utf-8"))["llm"]["middleware"]
    return [each if isinstance(each, str) else next(iter(each)) for each in stack]


def test_the_layers_are_in_the_recommended_order():
    found = layers()
    assert found == [name for name in ORDER if name in found]
    assert {"tracing", "logging", "cache", "budget", "redact", "guard", "fallback", "circuit_breaker"} <= set(found)
    assert {"rate_limit", "deadline", "hedge", "retry", "tools"} <= set(found)


def test_the_stack_explains_itself_without_warnings(run):
    """Its order hurts nobody, so `--strict` accepts it."""
    done = run("explain", "--config", PRODUCTION / "stack.yaml", "--strict")
    assert done.returncode == 0, done.stderr
    for name in ("Tools", "Redact", "Cache", "Fallback", "RateLimit", "llama3.2", "smollm2", "get_weather"):
        assert name in done.stdout, name
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_stack_in_another_order_is_refused(run, tmp_path):
    """The same layers, with the cache outside of the redaction."""
    settings = yaml.safe_load((PRODUCTION / "stack.yaml").read_text(encoding="utf-8"))
    stack = settings["llm"]["middleware"]
    names = layers()
    stack.insert(names.index("redact"), stack.pop(names.index("cache")))
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    warned = run("explain", "--config", file)
    assert warned.returncode == 0, warned.stderr
    assert "Cache" in warned.stdout
    refused = run("explain", "--config", file, "--strict")
    assert refused.returncode == 2
    assert "Redact" in refused.stderr


@pytest.mark.model
def test_it_runs_on_the_local_model(run, tmp_path):
    """The first question is answered by the model, the second from the cache, which has no address."""
    question = f"Why is the sky blue? Answer {ADDRESS} in one sentence."
    first, second = (
        run("chat", "--config", PRODUCTION / "stack.yaml", "--json", "--no-stream", question) for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    said, again = json.loads(first.stdout), json.loads(second.stdout)
    assert said["text"] == again["text"] != ""
    assert said["id"] == again["id"], "the second has the answer's own id, from the cache"
    assert first.stderr == second.stderr == ""
    assert ADDRESS.encode() not in (tmp_path / "answers.db").read_bytes()


def at(server, tmp_path):
    """Return the example's configuration for a server in place of the local model."""
    settings = yaml.safe_load((PRODUCTION / "stack.yaml").read_text(encoding="utf-8"))
    settings["llm"] |= {"framework": "vllm", "model": "small", "api_base": server.url}
    del settings["llm"]["additional_params"]
    file = tmp_path / "stack.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return file


class HelpDesk:
    """A model that looks an order up, and answers with what it got. Its first answer is a failure."""

    def __init__(self):
        self.failing = 1

    def __call__(self, peer, request):
        if self.failing:
            self.failing -= 1
            peer.answer('{"error": {"message": "busy"}}', status="503 Service Unavailable")
            return
        last = request.json["messages"][-1]
        delta = {"content": f"Dear [email_1], it is {last['content']}."}
        reason = "stop"
        if last["role"] == "user":
            function = {"name": "order_status", "arguments": '{"order": "[order_1]"}'}
            delta = {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": function}]}
            reason = "tool_calls"
        if not request.json.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": None, **delta}, "finish_reason": reason}
            peer.answer({**HEAD, "choices": [choice], "usage": USAGE})
            return
        peer.begin_stream()
        for piece, end in ((delta, None), ({}, reason)):
            choice = {"index": 0, "delta": piece, "finish_reason": end}
            peer.chunk(f"data: {json.dumps({**HEAD, 'choices': [choice]})}\n\n")
        peer.chunk(f"data: {json.dumps({**HEAD, 'choices': [], 'usage': USAGE})}\n\n")
        peer.chunk("data: [DONE]\n\n")
        peer.chunk("")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_it_calls_functions_and_sends_no_address(run, tmp_path, stream):
    """The order is looked up, the service never sees its number or the address, and the user gets both back."""
    with serve(HelpDesk()) as server:
        done = run(
            *("chat", "--config", at(server, tmp_path), *(() if stream else ("--no-stream",))),
            f"I am {ADDRESS}. Where is my order A-1041?",
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"Dear {ADDRESS}, it is on its way, expected tomorrow."
    assert len(server.requests) == 3, "a failure, its retry, and the answer with the tool's result"
    for request in server.requests:
        assert ADDRESS.encode() not in request.body
        assert b"A-1041" not in request.body
    names = [tool["function"]["name"] for tool in server.requests[-1].json["tools"]]
    assert names == ["get_weather", "order_status"]


def test_a_refund_is_never_promised(run, tmp_path):
    """The guard's refusal ends the answer, and nothing unchecked was shown."""

    def generous(peer, _):
        message = {"role": "assistant", "content": "Sure. We refund you everything."}
        peer.answer({**HEAD, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": USAGE})

    with serve(generous) as server:
        done = run("chat", "--config", at(server, tmp_path), "--no-stream", "Give me my money back")
    assert done.returncode == 1
    assert "refund you everything" not in done.stdout
    assert "it promises a refund" in done.stderr
    assert len(server.requests) == 1, "no other model is asked"
