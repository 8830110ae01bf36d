"""Files of spans written by hand, with times that a test can reckon with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MS = 1_000_000


def span(
    name: str = "chat m", at: int = 0, took: int = 100, parent: str = "", key: str = "", **more: Any
) -> dict[str, Any]:
    """Return a span that begins `at` milliseconds and takes `took`. `key` is its id; `more` are attributes, dots as `__`."""
    attributes = {"gen_ai__operation__name": "chat"} | more
    return {
        "traceId": f"{at if not parent else int(parent, 16):032x}",
        "spanId": key or f"{at + 1:016x}",
        "parentSpanId": parent and f"{int(parent, 16) + 1:016x}",
        "name": name,
        "startTimeUnixNano": str(10**18 + at * MS),
        "endTimeUnixNano": str(10**18 + (at + took) * MS),
        "attributes": [
            {"key": key.replace("__", "."), "value": otlp(value)}
            for key, value in attributes.items()
            if value is not None
        ],
    }


def failing(found: dict[str, Any], message: str) -> dict[str, Any]:
    """Return the span as one that failed."""
    return {**found, "status": {"code": 2, "message": message}}


def otlp(value: Any) -> dict[str, Any]:
    """Return a value as OTLP's AnyValue."""
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [otlp(item) for item in value]}}
    if isinstance(value, dict):
        return {"kvlistValue": {"values": [{"key": name, "value": otlp(item)} for name, item in value.items()]}}
    return {"stringValue": value}


def said(*texts: str) -> str:
    """Return messages of a user and an assistant by turns, as the attribute holds them."""
    roles = ("user", "assistant")
    return json.dumps(
        [{"role": roles[n % 2], "parts": [{"type": "text", "content": text}]} for n, text in enumerate(texts)]
    )


def answered(text: str) -> str:
    """Return an answer, as the attribute holds it."""
    return json.dumps([{"role": "assistant", "parts": [{"type": "text", "content": text}], "finish_reason": "stop"}])


def write(path: Path, *spans: dict[str, Any], scope: str = "fluxibly") -> Path:
    """Write the spans of one instrumentation to a file, one on each line."""
    lines = [{"resourceSpans": [{"scopeSpans": [{"scope": {"name": scope}, "spans": [each]}]}]} for each in spans]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path
