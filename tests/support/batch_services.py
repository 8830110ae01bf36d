"""A local HTTP server with the batch APIs of OpenAI and of Anthropic. It checks what the services check, and keeps state."""

from __future__ import annotations

import email
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import attrs

Outcome = str | tuple[int, dict[str, Any]] | None
"""What becomes of a row: "answered", "expired", "cancelled", None (no result at all), or the status and the error of a refusal."""


@attrs.define
class FakeBatch:
    id: str
    rows: list[dict[str, Any]]
    created_at: float
    file: str | None = None
    endpoint: str = ""
    metadata: dict[str, str] | None = None
    status: str = "validating"
    looks: int = 0
    problems: list[dict[str, Any]] = attrs.Factory(list)
    cancelled: bool = False
    lines: dict[str, list[bytes]] = attrs.Factory(dict[str, list[bytes]])
    """The results, by the name of their file."""


@attrs.define(slots=False)
class BatchService:
    """A service. Its settings may be changed at any time.

    `outcome` says what becomes of a row, from its prompt. A batch ends when it has been looked at `looks` times. `refuse` returns
    the status and the body with which a submission is refused, or None; `problems` returns the errors with which a batch fails its
    validation. `cut` are the next submissions whose answer is lost: "after" the service has acted, or "before". `hold` is the step
    at which an answer is held back (`reached` is set there) until `release`: "upload", "submit before", "submit after", "status",
    "results".
    """

    kind: str
    url: str = ""
    key: str = "k"
    looks: int = 1
    outcome: Callable[[str], Outcome] = lambda _: "answered"
    refuse: Callable[[FakeBatch], tuple[int, dict[str, Any]] | None] = lambda _: None
    problems: Callable[[FakeBatch], list[dict[str, Any]]] = lambda _: []
    cut: list[str] = attrs.Factory(list)
    hold: str = ""
    extra_lines: list[bytes] = attrs.Factory(list)
    """Lines that are added to results."""
    cut_results: int | None = None
    """The lines after which the connection ends, the next time that results are read."""
    results_gone: bool = False
    batches: dict[str, FakeBatch] = attrs.Factory(dict)
    files: dict[str, bytes] = attrs.Factory(dict)
    uploads: list[str] = attrs.Factory(list)
    paths: list[str] = attrs.Factory(list)
    paid: Counter[str] = attrs.Factory(Counter)
    """How often each prompt was answered."""
    wrong: list[str] = attrs.Factory(list)
    """What the service would have refused a client for."""
    reached: threading.Event = attrs.Factory(threading.Event)
    released: threading.Event = attrs.Factory(threading.Event)
    online: Counter[str] = attrs.Factory(Counter)
    """How often each prompt was asked outside of batches."""
    lock: Any = attrs.Factory(threading.RLock)

    def release(self) -> None:
        self.hold = ""
        self.released.set()

    def hold_at(self, step: str) -> None:
        self.reached.clear()
        self.released.clear()
        self.hold = step

    def pass_step(self, step: str) -> None:
        if self.hold == step:
            self.reached.set()
            self.released.wait(30)

    # Batches

    def make(self, rows: list[dict[str, Any]], **facts: Any) -> FakeBatch:
        with self.lock:
            batch_id = f"{'batch' if self.kind == 'openai' else 'msgbatch'}_{len(self.batches):04}"
            batch = FakeBatch(batch_id, rows, time.time(), **facts)
            self.batches[batch_id] = batch
            batch.problems = self.problems(batch)
            return batch

    def look(self, batch: FakeBatch) -> None:
        """Let a batch go on, because somebody looks at it."""
        with self.lock:
            if batch.status in ("completed", "failed", "expired", "cancelled", "ended"):
                return
            batch.looks += 1
            batch.status = "in_progress"
            if batch.problems:
                batch.status = "failed"
            elif batch.looks > self.looks or batch.cancelled:
                self._end(batch)

    def _end(self, batch: FakeBatch) -> None:
        expired = False
        for row in batch.rows:
            body = row["params" if self.kind == "anthropic" else "body"]
            prompt = prompt_of(body)
            outcome = "cancelled" if batch.cancelled else self.outcome(prompt)
            expired = expired or outcome == "expired"
            if outcome is None:
                continue
            if outcome == "answered":
                self.paid[prompt] += 1
            name, line = self._line(row["custom_id"], body, prompt, outcome)
            batch.lines.setdefault(name, []).append(json.dumps(line).encode())
        for lines in batch.lines.values():
            random.Random(batch.id).shuffle(lines)  # noqa: S311
            lines.extend(self.extra_lines)
        batch.status = "ended" if self.kind == "anthropic" else "expired" if expired else "completed"
        if batch.cancelled and self.kind == "openai":
            batch.status = "cancelled"

    def _line(self, custom_id: str, body: dict[str, Any], prompt: str, outcome: Outcome) -> tuple[str, dict[str, Any]]:
        if self.kind == "anthropic":
            result: dict[str, Any]
            if outcome == "answered":
                result = {"type": "succeeded", "message": anthropic_answer(body, prompt)}
            elif isinstance(outcome, tuple):
                result = {"type": "errored", "error": {**outcome[1], "request_id": "req_1"}}
            else:
                result = {"type": "expired" if outcome == "expired" else "canceled"}
            return "results", {"custom_id": custom_id, "result": result}
        line: dict[str, Any] = {"id": f"batch_req_{custom_id[-4:]}", "custom_id": custom_id, "error": None}
        if outcome == "answered":
            answer = openai_answer(body, prompt)
            return "output", line | {"response": {"status_code": 200, "request_id": "req_1", "body": answer}}
        if isinstance(outcome, tuple):
            status, error = outcome
            return "error", line | {"response": {"status_code": status, "request_id": "req_1", "body": error}}
        code = "batch_expired" if outcome == "expired" else "batch_cancelled"
        return "error", line | {"response": None, "error": {"code": code, "message": "not executed"}}

    # As the services describe them

    def described(self, batch: FakeBatch) -> dict[str, Any]:
        return self._anthropic(batch) if self.kind == "anthropic" else self._openai(batch)

    def _openai(self, batch: FakeBatch) -> dict[str, Any]:
        ended = batch.status in ("completed", "expired", "cancelled")
        done = len(batch.lines.get("output", ()))
        created = int(batch.created_at)
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": batch.endpoint,
            "errors": {"object": "list", "data": batch.problems} if batch.status == "failed" else None,
            "input_file_id": batch.file,
            "completion_window": "24h",
            "status": batch.status,
            "output_file_id": f"{batch.id}-output" if "output" in batch.lines else None,
            "error_file_id": f"{batch.id}-error" if "error" in batch.lines else None,
            "created_at": created,
            "completed_at": created + 60 if ended else None,
            "request_counts": {"total": len(batch.rows), "completed": done, "failed": 0},
            "metadata": batch.metadata,
        }

    def _anthropic(self, batch: FakeBatch) -> dict[str, Any]:
        ended = batch.status == "ended"
        created = datetime.fromtimestamp(batch.created_at, UTC)
        counts = Counter(
            json.loads(line)["result"]["type"] for line in batch.lines.get("results", ()) if b"result" in line
        )
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": "ended" if ended else "canceling" if batch.cancelled else "in_progress",
            "request_counts": {
                "processing": 0 if ended else len(batch.rows),
                **{name: counts[name] for name in ("succeeded", "errored", "canceled", "expired")},
            },
            "created_at": created.isoformat(),
            "expires_at": (created + timedelta(days=1)).isoformat(),
            "ended_at": (created + timedelta(seconds=60)).isoformat() if ended else None,
            "archived_at": created.isoformat() if self.results_gone else None,
            "cancel_initiated_at": created.isoformat() if batch.cancelled else None,
            "results_url": f"{self.url}/v1/messages/batches/{batch.id}/results"
            if ended and not self.results_gone
            else None,
        }

    def in_bytes(self, lines: list[bytes]) -> bytes:
        """Return a file of results."""
        return b"\n".join(lines) + b"\n"

    @property
    def rows_submitted(self) -> Counter[str]:
        """How often each prompt is in a batch that was begun."""
        name = "params" if self.kind == "anthropic" else "body"
        begun = [batch for batch in self.batches.values() if not batch.problems]
        return Counter(prompt_of(row[name]) for batch in begun for row in batch.rows)


def prompt_of(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[0]["text"]


def openai_answer(body: dict[str, Any], prompt: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": f"re: {prompt}"}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
    }


def anthropic_answer(body: dict[str, Any], prompt: str) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [{"type": "text", "text": f"re: {prompt}"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1000, "output_tokens": 100},
    }


@contextmanager
def batch_service(kind: str, **settings: Any) -> Iterator[BatchService]:
    """Run a service on a free port of the loopback interface. `kind` is "openai" or "anthropic"."""
    service = BatchService(kind, **settings)

    class Handler(_Handler):
        pass

    Handler.service = service
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    service.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield service
        assert service.wrong == []
    finally:
        service.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Cut(Exception):
    """The connection is to end without an answer."""


class _Handler(BaseHTTPRequestHandler):
    service: BatchService
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name in the base class
        pass

    def do_GET(self) -> None:
        self._answer(self._got)

    def do_POST(self) -> None:
        self._answer(self._posted)

    def _answer(self, make: Callable[[str, dict[str, list[str]]], None]) -> None:
        parts = urlsplit(self.path)
        self.service.paths.append(f"{self.command} {parts.path}")
        header = self.headers.get("x-api-key") or self.headers.get("authorization", "").removeprefix("Bearer ")
        if header != self.service.key:
            self._send(401, {"error": {"type": "authentication_error", "message": "invalid key"}})
            return
        try:
            make(parts.path, parse_qs(parts.query))
        except (_Cut, OSError):
            self.close_connection = True
        except AssertionError as error:
            self.service.wrong.append(f"{error!r} at {self.path}")
            self._send(400, {"error": {"type": "invalid_request_error", "message": "the client is wrong"}})

    # GET

    def _got(self, path: str, query: dict[str, list[str]]) -> None:
        service = self.service
        root = "/v1/batches" if service.kind == "openai" else "/v1/messages/batches"
        if path == root:
            self._list(query)
        elif path.endswith("/results"):
            assert self.headers.get("anthropic-version")
            self._lines(service.batches[path.split("/")[-2]].lines.get("results", []))
        elif path.endswith("/content"):
            batch_id, _, name = path.split("/")[-2].partition("-")
            self._lines(service.batches[batch_id].lines[name])
        else:
            batch = service.batches.get(path.rpartition("/")[2])
            if batch is None:
                self._send(404, {"error": {"type": "not_found_error", "message": "no such batch"}})
                return
            service.look(batch)
            service.pass_step("status")
            self._send(200, service.described(batch))

    def _list(self, query: dict[str, list[str]]) -> None:
        service = self.service
        limit = min(int(query.get("limit", ["20"])[0]), 2)  # so that there are pages
        after = query.get("after" if service.kind == "openai" else "after_id", [""])[0]
        newest_first = list(reversed(list(service.batches.values())))
        for batch in newest_first:
            service.look(batch)
        start = 1 + next((place for place, batch in enumerate(newest_first) if batch.id == after), -1)
        page = newest_first[start : start + limit]
        self._send(
            200,
            {
                "object": "list",
                "data": [service.described(batch) for batch in page],
                "first_id": page[0].id if page else None,
                "last_id": page[-1].id if page else None,
                "has_more": start + limit < len(newest_first),
            },
        )

    def _lines(self, lines: list[bytes]) -> None:
        service = self.service
        data = service.in_bytes(lines)
        self.send_response(200)
        self.send_header("content-type", "application/jsonl")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if service.cut_results is not None or service.hold == "results":
            some = b"\n".join(lines[: service.cut_results or len(lines) // 2]) + b'\n{"half'
            self.wfile.write(some)
            self.wfile.flush()
            service.cut_results = None
            service.pass_step("results")
            raise _Cut
        self.wfile.write(data)

    # POST

    def _posted(self, path: str, query: dict[str, list[str]]) -> None:
        service = self.service
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if path == "/v1/files":
            service.pass_step("upload")
            self._upload(body)
        elif path.endswith("/cancel"):
            batch = service.batches[path.split("/")[-2]]
            if batch.status in ("completed", "failed", "expired", "cancelled", "ended"):
                self._send(400, {"error": {"type": "invalid_request_error", "message": "it has ended"}})
                return
            batch.cancelled = True
            self._send(200, service.described(batch))
        elif path in ("/v1/batches", "/v1/messages/batches"):
            self._submit(json.loads(body))
        else:
            self._online(path, json.loads(body))

    def _upload(self, body: bytes) -> None:
        service = self.service
        message = email.message_from_bytes(
            b"content-type: " + self.headers["content-type"].encode() + b"\r\n\r\n" + body
        )
        parts = {part.get_param("name", header="content-disposition"): part for part in message.get_payload()}  # type: ignore[union-attr]
        assert set(parts) == {"purpose", "file"}, f"fields {sorted(map(str, parts))}"
        assert parts["purpose"].get_payload() == "batch"  # type: ignore[union-attr]
        assert str(parts["file"].get_filename()).endswith(".jsonl")  # type: ignore[union-attr]
        with service.lock:
            name = f"file-{len(service.files):04}"
            service.files[name] = parts["file"].get_payload(decode=True)  # type: ignore[union-attr,assignment]
            service.uploads.append(name)
        self._send(200, {"id": name, "object": "file", "bytes": len(body), "created_at": int(time.time()), "purpose": "batch", "filename": "rows.jsonl", "status": "processed"})  # fmt: skip

    def _submit(self, fields: dict[str, Any]) -> None:
        service = self.service
        service.pass_step("submit before")
        cut = service.cut.pop(0) if service.cut else ""
        if cut == "before" or (service.released.is_set() and service.hold == "gone"):
            raise _Cut
        batch = self._made_of_file(fields) if service.kind == "openai" else self._made_of_list(fields)
        refusal = service.refuse(batch)
        if refusal is not None:
            del service.batches[batch.id]
            self._send(*refusal)
            return
        service.pass_step("submit after")
        if cut == "after":
            raise _Cut
        self._send(200, service.described(batch))

    def _made_of_file(self, fields: dict[str, Any]) -> FakeBatch:
        assert fields["completion_window"] == "24h"
        assert fields["endpoint"] == "/v1/chat/completions"
        assert all(len(key) <= 64 and len(value) <= 512 for key, value in fields.get("metadata", {}).items())
        rows = [json.loads(line) for line in self.service.files[fields["input_file_id"]].splitlines()]
        assert len(rows) <= 50_000
        for row in rows:
            assert set(row) == {"custom_id", "method", "url", "body"}, sorted(row)
            assert row["method"] == "POST"
            assert row["url"] == fields["endpoint"]
            assert not row["body"].get("stream")
        self._check_ids(rows)
        assert len({row["body"]["model"] for row in rows}) == 1, "more than one model"
        facts = {"file": fields["input_file_id"], "endpoint": fields["endpoint"], "metadata": fields.get("metadata")}
        return self.service.make(rows, **facts)

    def _made_of_list(self, fields: dict[str, Any]) -> FakeBatch:
        assert set(fields) == {"requests"}
        assert self.headers.get("anthropic-version")
        rows = fields["requests"]
        assert 1 <= len(rows) <= 100_000
        for row in rows:
            assert set(row) == {"custom_id", "params"}, sorted(row)
            assert row["params"]["max_tokens"] >= 1
            assert not row["params"].get("stream")
        self._check_ids(rows)
        return self.service.make(rows)

    def _check_ids(self, rows: list[dict[str, Any]]) -> None:
        ids = [row["custom_id"] for row in rows]
        assert len(set(ids)) == len(ids), "a custom_id twice"
        assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", each) for each in ids), ids[0]

    def _online(self, path: str, body: dict[str, Any]) -> None:
        prompt = prompt_of(body)
        self.service.online[prompt] += 1
        self._send(200, openai_answer(body, prompt) if path.endswith("completions") else anthropic_answer(body, prompt))

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "content-type": "application/json",
            "content-length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
