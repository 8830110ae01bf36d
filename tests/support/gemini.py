"""Responses of Gemini."""

from __future__ import annotations

from typing import Any


def answer(*parts: dict[str, Any], reason: str | None = None, index: int | None = None, **more: Any) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"parts": list(parts), "role": "model"}}
    if reason:
        candidate["finishReason"] = reason
    if index is not None:
        candidate["index"] = index
    return {"candidates": [candidate], **more}


WHOLE: dict[str, Any] = {
    "candidates": [
        {
            "content": {
                "parts": [
                    {"text": "Hm.", "thought": True},
                    {"text": "So.", "thought": True, "thoughtSignature": "t1"},
                    {"text": "Let me "},
                    {"text": "look.", "thoughtSignature": "t2"},
                    {"executableCode": {"code": "1"}},
                    {"functionCall": {"name": "weather", "args": {"city": "Zürich"}}, "thoughtSignature": "t3"},
                ],
                "role": "model",
            },
            "finishReason": "STOP",
            "index": 0,
            "safetyRatings": [],
        }
    ],
    "usageMetadata": {
        "promptTokenCount": 10,
        "toolUsePromptTokenCount": 2,
        "cachedContentTokenCount": 4,
        "candidatesTokenCount": 5,
        "thoughtsTokenCount": 6,
        "totalTokenCount": 23,
    },
    "modelVersion": "gemini-x",
    "responseId": "r1",
}
