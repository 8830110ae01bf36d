"""The batch APIs without any I/O: what is sent, and what of the services' answers is read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.providers.dialects.anthropic_batches import AnthropicBatches
from fluxibly.providers.dialects.batches import BYTES_PER_TOKEN, Lost, Pack
from fluxibly.providers.dialects.json_values import read_json
from fluxibly.providers.dialects.openai_batches import OpenAIBatches

OPENAI, ANTHROPIC = OpenAIBatches(), AnthropicBatches()


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


def openai_batch(**fields: Any) -> dict[str, Any]:
    return {
        "id": "batch_1",
        "object": "batch",
        "status": "in_progress",
        "created_at": 5,
        "input_file_id": "file-1",
        **fields,
    }


def anthropic_batch(**fields: Any) -> dict[str, Any]:
    counts = {"processing": 3, "succeeded": 1, "errored": 1, "canceled": 0, "expired": 2}
    created = "2026-01-02T03:04:05Z"
    return {
        "id": "msgbatch_1",
        "processing_status": "in_progress",
        "request_counts": counts,
        "created_at": created,
        **fields,
    }


class TestRequests:
    def test_rows(self):
        body = b'{"model":"m"}'
        assert json.loads(OPENAI.row("a-1", body)) == {
            "custom_id": "a-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"},
        }  # fmt: skip
        assert json.loads(ANTHROPIC.row("a-1", body)) == {"custom_id": "a-1", "params": {"model": "m"}}
        assert b"\n" not in OPENAI.row("a-1", body)

    def test_an_upload_is_a_form(self):
        upload = OPENAI.upload("abc")
        assert upload.path == "/files"
        assert upload.content_type == "multipart/form-data; boundary=fluxibly-abc"
        assert (upload.head + b"{}" + upload.tail).decode() == (
            '--fluxibly-abc\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            '--fluxibly-abc\r\ncontent-disposition: form-data; name="file"; filename="abc.jsonl"\r\n'
            "content-type: application/jsonl\r\n\r\n{}\n\r\n--fluxibly-abc--\r\n"
        )

    def test_a_list_is_an_upload(self):
        upload = ANTHROPIC.upload("abc")
        rows = ANTHROPIC.separator.join([b'{"a":1}', b'{"b":2}'])
        assert json.loads(upload.head + rows + upload.tail) == {"requests": [{"a": 1}, {"b": 2}]}

    def test_a_submission(self):
        call = OPENAI.submit("abc", "file-1")
        assert (call.path, call.method) == ("/batches", "POST")
        assert json.loads(call.body) == {
            "input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h",
            "metadata": {"fluxibly": "abc"},
        }  # fmt: skip

    def test_ids_of_the_service_cannot_lead_elsewhere(self):
        assert OPENAI.status("../x?y").path == "/batches/..%2Fx%3Fy"
        assert ANTHROPIC.cancel("../x").path == "/messages/batches/..%2Fx/cancel"
        (path,) = OPENAI.read(encoded(openai_batch(status="completed", output_file_id="a/../b"))).results
        assert path == "/files/a%2F..%2Fb/content"

    def test_services_differ(self):
        together = OpenAIBatches(
            files="/files/upload", purpose="batch-api", upload_fields=(("file_name", "{label}.jsonl"),), metadata=False
        )
        upload = together.upload("abc")
        assert upload.path == "/files/upload"
        assert b"batch-api" in upload.head
        assert b"abc.jsonl\r\n" in upload.head
        assert "metadata" not in json.loads(together.submit("abc", "f").body)
        assert together.read(encoded({"job": openai_batch(status="IN_PROGRESS")})).status == "in_progress"
        assert [each.id for each in together.read_page(encoded([openai_batch()]))[0]] == ["batch_1"]


class TestBatches:
    @pytest.mark.parametrize(
        ("status", "ended"),
        [("validating", False), ("in_progress", False), ("finalizing", False), ("cancelling", False),
         ("completed", True), ("expired", True), ("cancelled", True), ("failed", True), ("something new", False)],
    )  # fmt: skip
    def test_states_of_openai(self, status, ended):
        batch = OPENAI.read(encoded(openai_batch(status=status)))
        assert (batch.status, batch.ended) == (status, ended)
        assert batch.cancelled == (status in ("cancelling", "cancelled"))
        assert bool(batch.problems) == (status == "failed")

    def test_facts_of_openai(self):
        counts = {"total": 9, "completed": 4, "failed": 2}
        facts = {"output_file_id": "o", "error_file_id": "e", "metadata": {"fluxibly": "abc"}, "completed_at": 9}
        batch = OPENAI.read(encoded(openai_batch(status="completed", request_counts=counts, **facts)))
        assert (batch.total, batch.processed, batch.file, batch.label) == (9, 6, "file-1", "abc")
        assert (batch.created_at, batch.ended_at) == (5, 9)
        assert batch.results == ("/files/o/content", "/files/e/content")

    def test_problems_of_openai(self):
        errors = {
            "object": "list",
            "data": [{"code": "invalid_json_line", "message": "no JSON", "line": 3, "param": None}],
        }
        (problem,) = OPENAI.read(encoded(openai_batch(status="failed", errors=errors))).problems
        assert problem == ("invalid_json_line", "no JSON", 3)

    def test_facts_of_anthropic(self):
        batch = ANTHROPIC.read(encoded(anthropic_batch()))
        assert (batch.ended, batch.total, batch.processed, batch.results, batch.cancelled) == (False, 7, 4, (), False)
        assert batch.created_at == 1767323045.0
        fields = {
            "processing_status": "ended",
            "results_url": "https://elsewhere.example/x",
            "cancel_initiated_at": "2026-01-02T03:04:05Z",
        }
        batch = ANTHROPIC.read(encoded(anthropic_batch(**fields)))
        assert (batch.ended, batch.cancelled) == (True, True)
        assert batch.results == ("/messages/batches/msgbatch_1/results",)  # the key goes to no other host

    def test_pages(self):
        page = {"data": [openai_batch(), openai_batch(id="batch_2")], "has_more": True, "last_id": "batch_2"}
        batches, cursor = OPENAI.read_page(encoded(page))
        assert ([each.id for each in batches], cursor) == (["batch_1", "batch_2"], "batch_2")
        assert OPENAI.page(cursor, limit=5).path == "/batches?limit=5&after=batch_2"
        assert ANTHROPIC.page("m").path == "/messages/batches?limit=100&after_id=m"
        assert OPENAI.read_page(encoded({"data": [], "has_more": False, "last_id": "x"})) == ((), "")

    def test_a_lost_batch(self):
        lost = Lost("abc", 7, "file-1", None, None)
        assert OPENAI.is_lost(OPENAI.read(encoded(openai_batch())), lost) is True
        assert (
            OPENAI.is_lost(OPENAI.read(encoded(openai_batch(input_file_id="x", metadata={"fluxibly": "abc"}))), lost)
            is True
        )
        assert OPENAI.is_lost(OPENAI.read(encoded(openai_batch(input_file_id="x"))), lost) is False
        assert ANTHROPIC.is_lost(ANTHROPIC.read(encoded(anthropic_batch())), lost) is None
        assert ANTHROPIC.is_lost(ANTHROPIC.read(encoded(anthropic_batch())), lost._replace(total=8)) is False

    @pytest.mark.parametrize("api", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
    @pytest.mark.parametrize(
        "body", [b"", b"[]", b"{}", b'{"id": 7}', b"<html>", b'{"id": ""}', encoded({"id": "x" * 1000})]
    )
    def test_other_bodies_are_errors(self, api, body):
        with pytest.raises(StreamProtocolError):
            api.read(body)

    @pytest.mark.parametrize("api", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
    def test_reported_errors_are_raised(self, api):
        body = encoded({"error": {"message": "not for you", "type": "permission_error"}})
        for read in (api.read, api.read_page):
            with pytest.raises(ProviderError, match="not for you"):
                read(body)


class TestResults:
    def test_answers(self):
        line = (
            b'{"id":"r","custom_id":"a-1","response":{"status_code":200,"request_id":"q","body":{"x": 1}},"error":null}'
        )
        assert OPENAI.result(line) == ("a-1", "answered", 200, b'{"x": 1}', "q")
        line = b'{"custom_id":"a-1","result":{"type":"succeeded","message":{"x": 1}}}'
        assert ANTHROPIC.result(line) == ("a-1", "answered", 200, b'{"x": 1}', None)

    def test_failures(self):
        line = b'{"custom_id":"a-1","response":{"status_code":400,"request_id":"q","body":{"error":{}}},"error":null}'
        assert OPENAI.result(line) == ("a-1", "failed", 400, b'{"error":{}}', "q")
        line = b'{"custom_id":"a-1","response":null,"error":{"code":"odd","message":"m"}}'
        assert OPENAI.result(line) == ("a-1", "failed", None, b'{"error":{"code":"odd","message":"m"}}', None)
        error = {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}
        found = ANTHROPIC.result(encoded({"custom_id": "a", "result": {"type": "errored", "error": error}}))
        assert found is not None
        assert (found.fate, found.status, json.loads(found.body)) == ("failed", 529, error)
        found = ANTHROPIC.result(encoded({"custom_id": "a", "result": {"type": "errored", "error": error["error"]}}))
        assert found is not None
        assert (found.status, json.loads(found.body)) == (529, error)

    @pytest.mark.parametrize(("word", "fate"), [("expired", "expired"), ("cancelled", "cancelled")])
    def test_requests_that_were_never_come_to(self, word, fate):
        line = encoded({"custom_id": "a", "response": None, "error": {"code": f"batch_{word}", "message": "m"}})
        found = OPENAI.result(line)
        assert found is not None
        assert found.fate == fate
        kind = "canceled" if word == "cancelled" else word
        assert ANTHROPIC.result(encoded({"custom_id": "a", "result": {"type": kind}})) == ("a", fate, None, b"", None)

    @pytest.mark.parametrize(("value", "read"), [(b'"\xff"', "\ufffd"), (b'"\\ud800"', "\ufffd"), (b"NaN", None)])
    def test_what_is_no_json_by_the_letter_costs_no_answer(self, value, read):
        lines = (
            b'{"custom_id":"a","response":{"status_code":200,"body":{"x":%b}}}' % value,
            b'{"custom_id":"a","result":{"type":"succeeded","message":{"x":%b}}}' % value,
        )
        for api, line in zip((OPENAI, ANTHROPIC), lines, strict=True):
            found = api.result(line)
            assert found is not None
            assert (found.custom_id, found.fate, found.status) == ("a", "answered", 200)
            assert read_json(found.body) == {"x": read}

    @pytest.mark.parametrize("api", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
    @pytest.mark.parametrize("line", [b"{}", b'{"custom_id": 3}', b'{"custom_id": null, "response": {}}'])
    def test_lines_without_an_id(self, api, line):
        assert api.result(line) is None

    @pytest.mark.parametrize("api", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
    def test_lines_that_are_no_json(self, api):
        with pytest.raises(StreamProtocolError):
            api.result(b'{"custom_id": "a", "resp')


class TestPack:
    def test_limits(self):
        pack = Pack(OpenAIBatches(max_rows=3, max_bytes=2_000 + 100))
        for _ in range(2):
            assert pack.fits(b"x" * 40)
            pack.add(b"x" * 40)
        assert not pack.fits(b"x" * 20)
        assert pack.fits(b"x" * 10)
        pack.add(b"x" * 10)
        assert pack.full
        assert not pack.fits(b"")

    def test_tokens(self):
        row = b"x" * int(10 * BYTES_PER_TOKEN)
        pack = Pack(OPENAI, max_tokens=25)
        assert pack.fits(row * 4)  # a batch has at least one row
        pack.add(row)
        pack.add(row)
        assert not pack.fits(row)
        assert pack.tokens == 20

    def test_the_users_limit_cannot_raise_the_services(self):
        assert Pack(OpenAIBatches(max_rows=1), max_rows=5).fits(b"a")
        pack = Pack(OpenAIBatches(max_rows=1), max_rows=5)
        pack.add(b"a")
        assert pack.full
