"""AWS event streams, and the answers that Bedrock sends in them."""

from __future__ import annotations

import json
import re
import struct
from base64 import b64decode, b64encode
from binascii import crc32
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

TEXT = 7
"""The type of a header that is a string."""
TYPES: dict[int, int | None] = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 6: None, TEXT: None, 8: 8, 9: 16}
"""The types of headers, with the sizes of their values; None for those that have a length of their own."""


# Messages


def message(headers: Iterable[tuple[str, str]], payload: bytes) -> bytes:
    """Return a message of an event stream, with string headers and its checksums."""
    return framed(b"".join([header(name, TEXT, value.encode()) for name, value in headers]), payload)


def header(name: str, kind: int, data: bytes) -> bytes:
    """Return a header of a type."""
    length = struct.pack(">H", len(data)) if TYPES.get(kind) is None else b""
    return bytes([len(name.encode())]) + name.encode() + bytes([kind]) + length + data


def framed(headers: bytes, payload: bytes, *, length: int | None = None, room: int | None = None) -> bytes:
    """Return a message with its checksums. `length` and `room` stand for the lengths of itself and of its headers."""
    length = 16 + len(headers) + len(payload) if length is None else length
    prelude = struct.pack(">II", length, len(headers) if room is None else room)
    whole = prelude + struct.pack(">I", crc32(prelude)) + headers + payload
    return whole + struct.pack(">I", crc32(whole))


def event(name: str, payload: Any) -> bytes:
    """Return the message of an event."""
    headers = [(":event-type", name), (":content-type", "application/json"), (":message-type", "event")]
    return message(headers, payload if isinstance(payload, bytes) else json.dumps(payload).encode())


def exception(name: str, payload: Any) -> bytes:
    """Return the message of an exception, which ends a stream."""
    headers = [(":exception-type", name), (":content-type", "application/json"), (":message-type", "exception")]
    return message(headers, payload if isinstance(payload, bytes) else json.dumps(payload).encode())


def error(code: str, text: str) -> bytes:
    """Return the message of an error, which has its code and its text in the headers."""
    return message([(":error-code", code), (":error-message", text), (":message-type", "error")], b"")


def stream(*events: tuple[str, Any]) -> bytes:
    """Return the events, each with its name and its payload."""
    return b"".join([event(name, payload) for name, payload in events])


# Bedrock's answers

USAGE = {"inputTokens": 10, "outputTokens": 7, "totalTokens": 17}


def delta(index: int, kind: str, value: Any) -> tuple[str, Any]:
    """Return an event that continues a block."""
    return "contentBlockDelta", {"contentBlockIndex": index, "delta": {kind: value}, "p": "abcd"}


def start(index: int, kind: str, value: Any) -> tuple[str, Any]:
    """Return the event that begins a block."""
    return "contentBlockStart", {"contentBlockIndex": index, "start": {kind: value}, "p": "ab"}


def stop(index: int) -> tuple[str, Any]:
    """Return the event that ends a block."""
    return "contentBlockStop", {"contentBlockIndex": index, "p": "abcdefgh"}


def said(*texts: str, index: int = 0) -> list[tuple[str, Any]]:
    """Return the events of a text."""
    return [*(delta(index, "text", text) for text in texts), stop(index)]


def ends(reason: str = "end_turn", **metadata: Any) -> list[tuple[str, Any]]:
    """Return the last two events of an answer."""
    facts = {"usage": USAGE, "metrics": {"latencyMs": 5}, **metadata}
    return [("messageStop", {"stopReason": reason}), ("metadata", facts)]


def whole(blocks: list[dict[str, Any]], reason: str = "end_turn", **more: Any) -> dict[str, Any]:
    """Return a whole answer."""
    message = {"role": "assistant", "content": blocks}
    return {
        "output": {"message": message},
        "stopReason": reason,
        "usage": USAGE,
        "metrics": {"latencyMs": 5},
        **more,
    }


def events_of(blocks: list[dict[str, Any]], reason: str = "end_turn", **metadata: Any) -> list[tuple[str, Any]]:
    """Return the events of an answer, with each text and each base64 text in two pieces."""
    return [
        ("messageStart", {"role": "assistant"}),
        *(each for index, block in enumerate(blocks) for each in block_events(index, block)),
        *ends(reason, **metadata),
    ]


def block_events(index: int, block: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the events of a block."""
    ((kind, fields),) = block.items()
    if kind == "text":
        yield from (delta(index, "text", half) for half in _halves(fields))
    elif kind == "citationsContent":
        text = "".join([each["text"] for each in fields["content"]])
        yield from (delta(index, "text", half) for half in _halves(text))
        yield from (delta(index, "citation", each) for each in fields["citations"])
    elif kind == "reasoningContent" and "redactedContent" in fields:
        data = b64decode(fields["redactedContent"])
        yield from (delta(index, kind, {"redactedContent": _base64(half)}) for half in _halves(data))
    elif kind == "reasoningContent":
        thought = fields["reasoningText"]
        yield from (delta(index, kind, {"text": half}) for half in _halves(thought["text"]))
        if "signature" in thought:
            yield delta(index, kind, {"signature": thought["signature"]})
    elif kind == "toolUse":
        yield start(index, kind, {name: value for name, value in fields.items() if name != "input"})
        yield from (
            delta(index, kind, {"input": half}) for half in _halves(json.dumps(fields["input"], ensure_ascii=False))
        )
    elif kind == "toolResult":
        yield start(index, kind, {name: value for name, value in fields.items() if name != "content"})
        for each in fields["content"]:
            yield from (delta(index, kind, [{"text": half}]) for half in _halves(each.get("text", "")) if half)
            if "text" not in each:
                yield delta(index, kind, [each])
    elif kind == "image":
        yield start(index, kind, {"format": fields["format"]})
        data = b64decode(fields["source"]["bytes"])
        yield from (delta(index, kind, {"source": {"bytes": _base64(half)}}) for half in _halves(data))
    else:
        yield start(index, kind, fields)
    yield stop(index)


def _halves(text: Any) -> tuple[Any, Any]:
    return text[: len(text) // 2], text[len(text) // 2 :]


def _base64(data: bytes) -> str:
    return b64encode(data).decode()


# The service's model, in botocore


@cache
def _service() -> Any:
    from botocore.session import Session

    return Session().get_service_model("bedrock-runtime")


def problems(body: dict[str, Any], *, stream: bool = False) -> list[str]:
    """Return what is wrong with the body of a request by the service's model: names, types, formats and sizes."""
    from botocore.validate import ParamValidator

    shape = _service().operation_model("ConverseStream" if stream else "Converse").input_shape
    given = {"modelId": "m", **body}
    found = [*_problems(given, shape, "")]
    report = ParamValidator().validate(_with_blobs(given, shape), shape)
    return [*found, report.generate_report()] if report.has_errors() else found


def _problems(value: Any, shape: Any, path: str) -> Iterator[str]:
    """Yield the values that break what botocore's validator does not check: enumerations, patterns and sizes."""
    facts = shape.metadata
    if shape.type_name == "structure":
        for name, item in value.items() if not shape.is_document_type else ():
            if name in shape.members:
                yield from _problems(item, shape.members[name], f"{path}.{name}")
    elif shape.type_name == "list":
        for number, item in enumerate(value):
            yield from _problems(item, shape.member, f"{path}[{number}]")
    elif shape.type_name == "string" and isinstance(value, str):
        if shape.enum and value not in shape.enum:
            yield f"{path}: {value!r} is none of {', '.join(shape.enum)}"
        if "pattern" in facts and re.fullmatch(facts["pattern"], value) is None:
            yield f"{path}: {value!r} does not match {facts['pattern']}"
    if isinstance(value, (str, list)) and len(value) > facts.get("max", len(value)):
        yield f"{path}: {len(value)} is more than {facts['max']}"


def _with_blobs(value: Any, shape: Any) -> Any:
    """Return a value with bytes in place of base64, as boto3 takes it."""
    if shape.type_name == "blob":
        return b64decode(value, validate=True)
    if shape.type_name == "structure" and not shape.is_document_type:
        members = shape.members
        return {name: _with_blobs(item, members[name]) if name in members else item for name, item in value.items()}
    if shape.type_name == "list":
        return [_with_blobs(item, shape.member) for item in value]
    return value
