"""The services' own clients against the servers of these tests: so the servers have the shape that the services have."""

from __future__ import annotations

import json

import pytest
from support.batch_services import batch_service


def test_the_client_of_openai():
    openai = pytest.importorskip("openai")
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    rows = [
        {**row, "body": body},
        {**row, "custom_id": "b", "body": {**body, "messages": [{"role": "user", "content": "bad"}]}},
    ]
    with (
        batch_service(
            "openai", outcome=lambda prompt: (400, {"error": {"message": "no"}}) if prompt == "bad" else "answered"
        ) as service,
        openai.OpenAI(api_key="k", base_url=f"{service.url}/v1", max_retries=0) as client,
    ):
        file = client.files.create(file=("rows.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="batch")
        made = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"x": "y"}
        )
        assert made.status == "validating"
        assert client.batches.retrieve(made.id).status == "in_progress"
        ended = client.batches.retrieve(made.id)
        assert (ended.status, ended.metadata, ended.input_file_id) == ("completed", {"x": "y"}, file.id)
        assert [each.id for each in client.batches.list()] == [made.id]
        answer = json.loads(client.files.content(ended.output_file_id).text)
        assert answer["custom_id"] == "a"
        assert answer["response"]["body"]["choices"][0]["message"]["content"] == "re: hello"
        refused = json.loads(client.files.content(ended.error_file_id).text)
        assert (refused["custom_id"], refused["response"]["status_code"]) == ("b", 400)


def test_the_client_of_openai_is_told_of_failed_validations():
    openai = pytest.importorskip("openai")
    problem = {"code": "invalid_value", "message": "no", "line": 1, "param": None}
    with (
        batch_service("openai", problems=lambda _: [problem]) as service,
        openai.OpenAI(api_key="k", base_url=f"{service.url}/v1", max_retries=0) as client,
    ):
        row = {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": []},
        }
        row["body"] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        file = client.files.create(file=("rows.jsonl", json.dumps(row).encode()), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        failed = client.batches.retrieve(made.id)
        assert failed.status == "failed"
        assert failed.errors.data[0].line == 1


def test_the_client_of_anthropic():
    anthropic = pytest.importorskip("anthropic")
    params = {"model": "m", "max_tokens": 9}
    rows = [
        {"custom_id": name, "params": {**params, "messages": [{"role": "user", "content": prompt}]}}
        for name, prompt in (("a", "hello"), ("b", "bad"), ("c", "late"))
    ]
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}
    outcomes = {"hello": "answered", "bad": (400, error), "late": "expired"}
    with (
        batch_service("anthropic", outcome=outcomes.__getitem__) as service,
        anthropic.Anthropic(api_key="k", base_url=service.url, max_retries=0) as client,
    ):
        made = client.messages.batches.create(requests=rows)
        assert (made.processing_status, made.request_counts.processing) == ("in_progress", 3)
        client.messages.batches.retrieve(made.id)
        ended = client.messages.batches.retrieve(made.id)
        assert ended.processing_status == "ended"
        counts = ended.request_counts
        assert (counts.succeeded, counts.errored, counts.expired, counts.processing) == (1, 1, 1, 0)
        assert [each.id for each in client.messages.batches.list()] == [made.id]
        results = {each.custom_id: each.result for each in client.messages.batches.results(made.id)}
        assert results["a"].message.content[0].text == "re: hello"
        assert results["b"].error.error.type == "invalid_request_error"
        assert results["c"].type == "expired"


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_the_clients_can_cancel(kind):
    module = pytest.importorskip(kind)
    with batch_service(kind) as service:
        if kind == "openai":
            client = module.OpenAI(api_key="k", base_url=f"{service.url}/v1", max_retries=0)
            batches = client.batches
            service.files["f"] = (
                b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[{"role":"user","content":"x"}]}}'
            )
            made = batches.create(input_file_id="f", endpoint="/v1/chat/completions", completion_window="24h")
        else:
            client = module.Anthropic(api_key="k", base_url=service.url, max_retries=0)
            batches = client.messages.batches
            row = {
                "custom_id": "a",
                "params": {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]},
            }
            made = batches.create(requests=[row])
        batches.cancel(made.id)
        ended = batches.retrieve(made.id)
        assert getattr(ended, "status", None) == "cancelled" or ended.processing_status == "ended"
        client.close()
