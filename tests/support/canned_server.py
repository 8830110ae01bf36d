"""A local HTTP server that speaks OpenAI chat and Anthropic messages. It computes its responses from the requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs


@attrs.define
class Seen:
    """A received request. Header names are in lower case."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@attrs.define
class Canned:
    """The settings of a server, and the requests that it has `seen`.

    `fail` is (status, body, headers), and `fail_only` the only model that fails. `refuse` returns the status and the
    body with which a request is refused, or None. `cut` ends the body of a stream before its last event, and `drop`
    ends the connection there. `stall` holds the response back until the server closes;
    `stall_after` holds the stream back after its first words. `blocks` are the content of an answer of Anthropic's,
    `items` the output of an answer of OpenAI's Responses, and `message` the message of an answer of OpenAI's chat.
    """

    url: str = ""
    seen: list[Seen] = attrs.Factory(list)
    got: list[Seen] = attrs.Factory(list)
    """The GET requests."""
    fail: tuple[int, str, dict[str, str]] | None = None
    fail_only: str | None = None
    body: str | None = None
    blocks: list[dict[str, Any]] | None = None
    items: list[dict[str, Any]] | None = None
    message: dict[str, Any] | None = None
    stream_error: dict[str, Any] | None = None
    cut: bool = False
    drop: bool = False
    stall: bool = False
    stall_after: bool = False
    refuse: Callable[[Seen], tuple[int, dict[str, Any]] | None] | None = None
    closing: threading.Event = attrs.Factory(threading.Event)
    gone: threading.Event = attrs.Factory(threading.Event)
    _open: int = 0
    _changed: threading.Condition = attrs.Factory(threading.Condition)

    @property
    def last(self) -> Seen:
        return self.seen[-1]

    def count(self, change: int) -> None:
        """Count a connection that was opened or closed."""
        with self._changed:
            self._open += change
            self._changed.notify_all()

    def none_open(self, seconds: float) -> bool:
        """Wait until no connection is open. Return whether that happened within `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, seconds)


@contextmanager
def canned_server() -> Iterator[Canned]:
    """Run a server on a free port of the loopback interface."""
    canned = Canned()

    class Handler(_Handler):
        orders = canned

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    canned.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield canned
    finally:
        canned.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class _Handler(BaseHTTPRequestHandler):
    orders: Canned
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name in the base class
        pass

    def setup(self) -> None:
        super().setup()
        self.orders.count(1)

    def finish(self) -> None:
        self.orders.count(-1)
        super().finish()

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.orders.got.append(Seen(self.path, headers, {}))
        self._whole(200, '{"data": []}', {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        orders = self.orders
        orders.seen.append(Seen(self.path, headers, body))
        if orders.stall:
            orders.closing.wait()
            self.close_connection = True
        elif orders.refuse and (refused := orders.refuse(orders.last)):
            self._whole(refused[0], json.dumps(refused[1]), {})
        elif orders.fail and orders.fail_only in (None, body["model"]):
            status, text, extra = orders.fail
            self._whole(status, text, extra)
        elif orders.body is not None:
            self._whole(200, orders.body, {})
        elif self.path.endswith("/messages"):
            self._answer(*_anthropic(body, orders.blocks))
        elif self.path.endswith("/responses"):
            self._answer(*_responses(body, orders.items or []))
        else:
            self._answer(*_openai(body, orders.message))

    def _whole(self, status: int, text: str, headers: dict[str, str]) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "x-request-id": "req-1", **headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, whole: dict[str, Any], events: list[tuple[str, Any]], streamed: bool) -> None:
        if not streamed:
            self._whole(200, json.dumps(whole), {"x-ratelimit-remaining-requests": "7"})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("x-request-id", "req-1")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            self._events(events)
        except OSError:
            self.close_connection = True
            self.orders.gone.set()

    def _events(self, events: list[tuple[str, Any]]) -> None:
        orders = self.orders
        kept = events[:3] if orders.cut or orders.drop or orders.stream_error or orders.stall_after else events
        for name, data in kept:
            self._event(name, data)
        if orders.stall_after:
            while not orders.closing.wait(0.02):  # keep-alives, until the client closes the connection
                self._chunk(b": ping\n\n")
            self.close_connection = True
        if orders.stream_error:
            self._event("error", orders.stream_error)
        if orders.drop:
            self.close_connection = True
            return
        self._chunk(b"")

    def _event(self, name: str, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        self._chunk((f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _words(text: str) -> list[str]:
    words = text.split(" ")
    return [word if last else word + " " for word, last in zip(words, [False] * (len(words) - 1) + [True], strict=True)]


def _openai(body: dict[str, Any], given: dict[str, Any] | None) -> tuple[dict[str, Any], list[tuple[str, Any]], bool]:
    said = "You said: " + _text(body["messages"][-1]["content"])
    base = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"] + "-0613"}
    usage = {
        "prompt_tokens": 11,
        "completion_tokens": 5,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    message: dict[str, Any] = {"role": "assistant", "content": said}
    finish = "stop"
    deltas: list[dict[str, Any]] = [{"content": word} for word in _words(said)]
    if body.get("tools") and body.get("tool_choice") != "none":
        finish = "tool_calls"
        name = body["tools"][0]["function"]["name"]
        message = {"role": "assistant", "content": None, "tool_calls": [_call("call_a", name, '{"city": "Oslo"}')]}
        deltas = [
            {"tool_calls": [{"index": 0, **_call("call_a", name, "")}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '"Oslo"}'}}]},
        ]
    elif given is not None:
        message = {"role": "assistant", **given}
        deltas = [given]
    elif (limit := body.get("max_completion_tokens") or body.get("max_tokens")) and limit < len(deltas):
        finish = "length"
        deltas = deltas[:limit]
        message["content"] = "".join(delta["content"] for delta in deltas)
    whole = {**base, "choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}
    base["object"] = "chat.completion.chunk"
    chunks = [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
    chunks += [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    chunks += [{"index": 0, "delta": {}, "finish_reason": finish}]
    events: list[tuple[str, Any]] = [("", {**base, "choices": [chunk]}) for chunk in chunks]
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append(("", {**base, "choices": [], "usage": usage}))
    return whole, [*events, ("", "[DONE]")], bool(body.get("stream"))


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _anthropic(
    body: dict[str, Any], given: list[dict[str, Any]] | None
) -> tuple[dict[str, Any], list[tuple[str, Any]], bool]:
    said = "You said: " + _text(body["messages"][-1]["content"])
    usage = {"input_tokens": 8, "output_tokens": 5, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 0}
    blocks: list[dict[str, Any]] = []
    stop = "end_turn"
    if body.get("thinking"):
        blocks.append({"type": "thinking", "thinking": "Let me see.", "signature": "c2ln"})
    if body.get("tools") and (body.get("tool_choice") or {}).get("type") != "none":
        stop = "tool_use"
        blocks.append(
            {"type": "tool_use", "id": "toolu_a", "name": body["tools"][0]["name"], "input": {"city": "Oslo"}}
        )
    else:
        blocks.append({"type": "text", "text": said})
    if given is not None:
        blocks, stop = given, "tool_use" if any(block["type"] == "tool_use" for block in given) else "end_turn"
    base = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"] + "-0613"}
    whole = {**base, "content": blocks, "stop_reason": stop, "stop_sequence": None, "usage": usage}
    start = {**base, "content": [], "stop_reason": None, "stop_sequence": None, "usage": {**usage, "output_tokens": 1}}
    events: list[tuple[str, Any]] = [("message_start", {"type": "message_start", "message": start})]
    for index, block in enumerate(blocks):
        events += [(event["type"], {"index": index, **event}) for event in _block_events(block)]
    delta = {"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None}, "usage": usage}
    events += [("message_delta", delta), ("message_stop", {"type": "message_stop"})]
    return whole, events, bool(body.get("stream"))


def _block_events(block: dict[str, Any]) -> Iterator[dict[str, Any]]:
    kind = block["type"]
    start, deltas = block, list[dict[str, Any]]()
    if kind == "text":
        start = {"type": "text", "text": ""}
        deltas = [{"type": "text_delta", "text": word} for word in _words(block["text"])]
        deltas += [{"type": "citations_delta", "citation": citation} for citation in block.get("citations") or ()]
    elif kind == "thinking":
        start = {**block, "thinking": "", "signature": ""}
        deltas = [{"type": "thinking_delta", "thinking": word} for word in _words(block["thinking"])]
        deltas.append({"type": "signature_delta", "signature": block["signature"]})
    elif "input" in block:
        start = {**block, "input": {}}
        first, comma, rest = json.dumps(block["input"]).partition(": ")
        deltas = [{"type": "input_json_delta", "partial_json": part} for part in (first + comma, rest)]
    yield {"type": "content_block_start", "content_block": start}
    for delta in deltas:
        yield {"type": "content_block_delta", "delta": delta}
    yield {"type": "content_block_stop"}


def _responses(body: dict[str, Any], items: list[dict[str, Any]]) -> tuple[dict[str, Any], list[tuple[str, Any]], bool]:
    usage = {
        "input_tokens": 11,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 16,
    }
    base = {"id": "resp_1", "object": "response", "created_at": 1, "model": body["model"], "error": None}
    settings = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "incomplete_details": None}
    whole = {**base, **settings, "status": "completed", "output": items, "usage": usage}
    begun = {**base, **settings, "status": "in_progress", "output": []}
    events: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
    for number, item in enumerate(items):
        events += [{"output_index": number, **event} for event in _item_events(item)]
    events.append({"type": "response.completed", "response": whole})
    numbered = [(event["type"], {"sequence_number": number, **event}) for number, event in enumerate(events)]
    return whole, numbered, bool(body.get("stream"))


def _item_events(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    kind, here = item["type"], {"item_id": item["id"]}
    if kind == "message":
        yield {"type": "response.output_item.added", "item": {**item, "content": []}}
        for number, part in enumerate(item["content"]):
            place = {**here, "content_index": number, "logprobs": []}
            for word in _words(part["text"]):
                yield {"type": "response.output_text.delta", "delta": word, **place}
            for which, annotation in enumerate(part["annotations"]):
                place["annotation_index"] = which
                yield {"type": "response.output_text.annotation.added", "annotation": annotation, **place}
            yield {"type": "response.output_text.done", "text": part["text"], **place}
    elif kind == "reasoning":
        yield {"type": "response.output_item.added", "item": {**item, "summary": []}}
        for number, part in enumerate(item["summary"]):
            place = {**here, "summary_index": number}
            yield {"type": "response.reasoning_summary_part.added", "part": {**part, "text": ""}, **place}
            for word in _words(part["text"]):
                yield {"type": "response.reasoning_summary_text.delta", "delta": word, **place}
    elif kind == "function_call":
        yield {"type": "response.output_item.added", "item": {**item, "arguments": ""}}
        for piece in _words(item["arguments"]):
            yield {"type": "response.function_call_arguments.delta", "delta": piece, **here}
    else:
        yield {"type": "response.output_item.added", "item": item}
    yield {"type": "response.output_item.done", "item": item}
