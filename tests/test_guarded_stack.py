"""All layers that remember, count and guard, in one stack from YAML, over a real server: each sees what its place promises."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import aclosing, suppress

import pytest
from support.misbehaving import serve

from fluxibly import LLM, AsyncLLM, register_function
from fluxibly.errors import BudgetExceeded, GuardRefused, StreamInterrupted

STACK = """
llm:
  framework: vllm
  model: small
  api_base: {url}
  api_key: key-of-the-test
  middleware:
    - default_stack:
        logging: {{redact: {{patterns: [email]}}}}
        cost: {{prices: {{small: [1, 10]}}}}
        redact: {{patterns: [email], restore: true}}
        cache: {{store: "sqlite:{folder}/answers.db", namespace: tests}}
        record: {{file: "{folder}/calls.jsonl"}}
        guard: {{output: polite, release: sentence}}
        retry: {{max_delay: 0.01}}
        budget: {{tokens: 1000, store: "sqlite:{folder}/budget.db"}}
"""
ADA = "ada.lovelace@example.org"
HEAD = {"object": "chat.completion", "id": "1", "created": 1, "model": "small"}
USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}


def polite(response):
    return "it is rude" if "fool" in response.text else None


class Service:
    """Answers with the last word of the question, in a stream a few characters at a time; the first time with an error."""

    def __init__(self) -> None:
        self.failing = 1
        self.closed = 0

    def __call__(self, peer, request):
        body = json.loads(request.body)
        if self.failing:
            self.failing -= 1
            peer.answer('{"error": {"message": "busy"}}', status="503 Service Unavailable")
            return
        text = f"I wrote to {body['messages'][-1]['content'].split()[-1]}. That is all."
        if "rude" in body["messages"][-1]["content"]:
            text = "Good day. You fool! Good bye."
        if not body.get("stream"):
            message = {"role": "assistant", "content": text}
            peer.answer(
                {**HEAD, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": USAGE}
            )
            return
        peer.begin_stream()
        pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
        for number, piece in enumerate(pieces, 1):
            choice = {
                "index": 0,
                "delta": {"content": piece},
                "finish_reason": "stop" if number == len(pieces) else None,
            }
            peer.chunk(f"data: {json.dumps({**HEAD, 'choices': [choice]})}\n\n")
        peer.chunk(f"data: {json.dumps({**HEAD, 'choices': [], 'usage': USAGE})}\n\n")
        peer.chunk("data: [DONE]\n\n")
        peer.chunk("")


@pytest.fixture
def service():
    return Service()


@pytest.fixture
def server(service):
    register_function("polite", polite, replace=True)
    with serve(service) as running:
        yield running


@pytest.fixture
def file(server, tmp_path):
    path = tmp_path / "stack.yaml"
    path.write_text(STACK.format(url=server.url, folder=tmp_path), encoding="utf-8")
    return path


class Caller:
    """Calls of a model, sync or async, whole or streamed."""

    def __init__(self, file, kind: str, *, streamed: bool) -> None:
        self.file, self.kind, self.streamed = file, kind, streamed

    def __call__(self, *prompts):
        """Return the response of each prompt and the texts that came, or the error."""
        if self.kind == "async":
            return asyncio.run(self.acall(*prompts))
        with LLM.from_yaml(self.file) as llm:
            return [self.outcome(llm, prompt) for prompt in prompts]

    def outcome(self, llm, prompt):
        try:
            if not self.streamed:
                response = llm.complete(prompt)
                return response, [response.text]
            with llm.stream(prompt) as stream:
                texts = [chunk.text for chunk in stream]
            return stream.response, texts
        except Exception as error:  # noqa: BLE001  # it is the outcome
            return error, []

    async def acall(self, *prompts):
        found = []
        async with AsyncLLM.from_yaml(self.file) as llm:
            for prompt in prompts:
                try:
                    if not self.streamed:
                        response = await llm.complete(prompt)
                        found.append((response, [response.text]))
                        continue
                    async with aclosing(llm.stream(prompt)) as stream:
                        texts = [chunk.text async for chunk in stream]
                    found.append((stream.response, texts))
                except Exception as error:  # noqa: BLE001  # as above
                    found.append((error, []))
        return found


@pytest.fixture(params=["sync whole", "sync stream", "async whole", "async stream"])
def caller(request, file):
    kind, shape = request.param.split()
    return Caller(file, kind, streamed=shape == "stream")


def test_each_layer_keeps_its_promise(caller, server, tmp_path, caplog):
    """One question twice, and then again in another process's place: the service is asked once, and never sees the address."""
    caplog.set_level(logging.DEBUG, "fluxibly")
    (first, texts), (second, again) = caller(f"Write to {ADA}", f"Write to {ADA}")
    assert first.text == second.text == f"I wrote to {ADA}. That is all."
    assert "".join(texts) == "".join(again) == first.text
    assert (first.cache_hit, second.cache_hit) == (False, True)
    assert (float(first.cost), float(second.cost)) == (0.0006, 0.0)
    assert len(server.requests) == 2, "a failure, its retry, and then the cache"
    assert all(ADA.encode() not in request.body for request in server.requests)
    (third, _) = caller(f"Write to {ADA}")[0]
    assert third.cache_hit
    assert len(server.requests) == 2
    assert ADA not in caplog.text
    assert "key-of-the-test" not in caplog.text
    for kept in tmp_path.iterdir():
        if kept.name == "stack.yaml":
            continue
        with suppress(FileNotFoundError):  # SQLite removes its log when the last of the models is collected
            content, rights = kept.read_bytes(), kept.stat().st_mode & 0o077
            assert ADA.encode() not in content, kept.name
            assert b"key-of-the-test" not in content, kept.name
            assert rights == 0, kept.name
    # The cache is outside of the recording, which has what became of the call, and not its failed attempt.
    (line,) = (tmp_path / "calls.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["request"]["messages"][-1]["content"] == "Write to [email_1]"


def test_what_is_refused_is_not_kept(caller, server):
    """Not in the cache either; and what had been checked has gone out."""
    (error, _), (other, _) = caller("Be rude", "Be rude")
    for each in (error, other):
        if caller.streamed:
            assert isinstance(each, StreamInterrupted)
            assert each.partial.text.strip() == "Good"  # Redact held "day." back, which might have become an address
        refused = each.__cause__ if caller.streamed else each
        assert isinstance(refused, GuardRefused)
        assert refused.reason == "it is rude"
    assert len(server.requests) == 3


def test_the_budget_is_for_all_processes(caller, server):
    """Each time with a new `LLM`, as in a new process. What comes from the cache is never refused."""
    outcomes = [caller(f"Question {number}")[0][0] for number in range(8)]
    refused = [each for each in outcomes if isinstance(each, BudgetExceeded)]
    assert len(refused) == 2
    assert len(server.requests) == 7, "a failure, and six answers of 150 tokens"
    assert caller("Question 0")[0][0].cache_hit
