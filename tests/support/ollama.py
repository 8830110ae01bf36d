"""Lines of Ollama's streams."""

from __future__ import annotations

import json
from typing import Any


def line(content: str = "", **message: Any) -> dict[str, Any]:
    return {
        "model": "qwen3",
        "created_at": "2025-07-01T10:00:00Z",
        "message": {"role": "assistant", "content": content, **message},
        "done": False,
    }


def last(reason: str | None = "stop", content: str = "", **message: Any) -> dict[str, Any]:
    end: dict[str, Any] = {
        **line(content, **message),
        "done": True,
        "total_duration": 5_000_000_000,
        "load_duration": 1_000_000_000,
        "prompt_eval_count": 26,
        "prompt_eval_duration": 130_000_000,
        "eval_count": 7,
        "eval_duration": 4_000_000_000,
    }
    return {**end, "done_reason": reason} if reason else end


def ndjson(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in lines)
