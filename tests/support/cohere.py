"""Events of Cohere's streams."""

from __future__ import annotations

from typing import Any

USAGE: dict[str, Any] = {
    "billed_units": {"input_tokens": 5, "output_tokens": 3},
    "tokens": {"input_tokens": 500, "output_tokens": 9},
    "cached_tokens": 480,
}


def event(kind: str, index: int | None = None, **message: Any) -> dict[str, Any]:
    """Return an event of a part of the message; with the part's index, if it has one."""
    return {"type": kind, **({} if index is None else {"index": index}), "delta": {"message": message}}


def start() -> dict[str, Any]:
    empty = {"content": [], "tool_plan": "", "tool_calls": [], "citations": []}
    return {"id": "id_1", "type": "message-start", "delta": {"message": {"role": "assistant", **empty}}}


def block(kind: str, *pieces: str, index: int = 0) -> list[dict[str, Any]]:
    """Return the events of a block of content, "text" or "thinking"."""
    return [
        event("content-start", index, content={"type": kind, kind: ""}),
        *(event("content-delta", index, content={kind: piece}) for piece in pieces),
        {"type": "content-end", "index": index},
    ]


def plan(*pieces: str) -> list[dict[str, Any]]:
    return [event("tool-plan-delta", tool_plan=piece) for piece in pieces]


def call(call_id: str, name: str, *arguments: str, index: int = 0) -> list[dict[str, Any]]:
    begun = {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
    return [
        event("tool-call-start", index, tool_calls=begun),
        *(event("tool-call-delta", index, tool_calls={"function": {"arguments": piece}}) for piece in arguments),
        {"type": "tool-call-end", "index": index},
    ]


def cite(citation: dict[str, Any], index: int = 0) -> list[dict[str, Any]]:
    return [event("citation-start", index, citations=citation), {"type": "citation-end", "index": index}]


def end(reason: str = "COMPLETE", **delta: Any) -> dict[str, Any]:
    return {"type": "message-end", "delta": {"finish_reason": reason, "usage": USAGE, **delta}}


def stream_of(message: dict[str, Any], reason: str = "COMPLETE") -> list[dict[str, Any]]:
    """Return the events of an answer, with its texts in two pieces each, and citations after the part that they cite."""
    citations = message.get("citations") or ()
    events = [start()]
    for index, part in enumerate(message.get("content") or ()):
        begun, *pieces, done = _block_of(part, index)
        cited = [each for item in citations if item.get("content_index") == index for each in cite(item)]
        events += [begun, *pieces, *cited, done]
    events += plan(*_halves(message.get("tool_plan") or ""))
    events += [each for item in citations if item.get("content_index") is None for each in cite(item)]
    for index, made in enumerate(message.get("tool_calls") or ()):
        function = made["function"]
        events += call(made["id"], function["name"], *_halves(function["arguments"]), index=index)
    return [*events, end(reason)]


def _block_of(part: dict[str, Any], index: int) -> list[dict[str, Any]]:
    """Return the events of a block of content; of an unknown type, a delta for each half of a text or item of a list."""
    kind = part["type"]
    if kind in ("text", "thinking"):
        return block(kind, *_halves(part[kind]), index=index)
    fields = {name: value for name, value in part.items() if name != "type"}
    deltas = [
        event("content-delta", index, content={"type": kind, name: piece})
        for name, value in fields.items()
        for piece in (_halves(value) if isinstance(value, str) else [[item] for item in value])
    ]
    empty = {name: type(value)() for name, value in fields.items()}
    begun = event("content-start", index, content={"type": kind, **empty})
    return [begun, *deltas, {"type": "content-end", "index": index}]


def _halves(said: str) -> list[str]:
    return [half for half in (said[: len(said) // 2], said[len(said) // 2 :]) if half]
