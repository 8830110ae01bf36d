"""Synthetic answers, in the shapes of the services' documentation: every feature of every dialect, whole and streamed.

Nobody recorded them. They stand in for recordings that need an account with the service.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from support import aws
from support.anthropic import finish
from support.cohere import USAGE, stream_of
from support.dialects import sse
from support.ollama import last, line, ndjson
from support.recordings import Recording

PIXEL = "iVBORw0KGgo="


def _halves(text: str) -> tuple[str, str]:
    return text[: len(text) // 2], text[len(text) // 2 :]


def _pair(name: str, dialect: str, provider: str, whole: object, stream: bytes) -> list[Recording]:
    body = json.dumps(whole).encode()
    return [
        Recording(
            f"{name}{'-stream' * streaming}", dialect, 200, streaming, {}, stream if streaming else body, None, provider
        )
        for streaming in (False, True)
    ]


# Anthropic

SEARCH = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "tides"}}
PAGE = {
    "type": "web_search_result",
    "url": "http://tides.test",
    "title": "Tides",
    "encrypted_content": "ENC",
    "page_age": None,
}
CITATION = {
    "type": "web_search_result_location",
    "url": "http://tides.test",
    "title": "Tides",
    "encrypted_index": "EI",
    "cited_text": "High at 4",
}
MESSAGES: dict[str, list[dict[str, Any]]] = {
    "interleaved-thinking": [
        {"type": "thinking", "thinking": "I need the port.", "signature": "c2lnMQ=="},
        {"type": "text", "text": "First the port."},
        {"type": "tool_use", "id": "toolu_1", "name": "port", "input": {"city": "Ostend"}},
        {"type": "thinking", "thinking": "And the tide.", "signature": "c2lnMg=="},
        {"type": "tool_use", "id": "toolu_2", "name": "tide", "input": {}},
    ],
    "redacted-thinking": [
        {"type": "redacted_thinking", "data": "EmwKAhgB"},
        {"type": "thinking", "thinking": "", "signature": "c2lnMw=="},
        {"type": "text", "text": "Four o'clock."},
    ],
    "search-and-citations": [
        {"type": "text", "text": "I search."},
        SEARCH,
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [PAGE]},
        {"type": "text", "text": "\n\n"},
        {"type": "text", "text": "It is high at "},
        {"type": "text", "text": "four o'clock", "citations": [CITATION, {**CITATION, "cited_text": "16:00"}]},
        {"type": "text", "text": "."},
    ],
    "code-execution": [
        {"type": "server_tool_use", "id": "srvtoolu_2", "name": "bash_code_execution", "input": {"command": "date"}},
        {
            "type": "bash_code_execution_tool_result",
            "tool_use_id": "srvtoolu_2",
            "content": {
                "type": "bash_code_execution_result",
                "stdout": "4",
                "stderr": "",
                "return_code": 0,
                "content": [],
            },
        },
        {"type": "text", "text": "Four."},
        {
            "type": "tool_use",
            "id": "toolu_3",
            "name": "tide",
            "input": {"port": "Ostend"},
            "caller": {"type": "code_execution_20250825", "tool_id": "srvtoolu_2"},
        },
    ],
    "remote-tools": [
        {"type": "mcp_tool_use", "id": "mcptoolu_1", "name": "tide", "server_name": "sea", "input": {"port": "Ostend"}},
        {
            "type": "mcp_tool_result",
            "tool_use_id": "mcptoolu_1",
            "is_error": False,
            "content": [{"type": "text", "text": "4"}],
        },
        {"type": "text", "text": "Four."},
    ],
    "compaction": [{"type": "compaction", "content": "They spoke of tides."}, {"type": "text", "text": "Four."}],
}
PAUSED = [
    {"type": "text", "text": "I search."},
    SEARCH,
    {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [PAGE]},
    {**SEARCH, "id": "srvtoolu_3"},
]


def _message(name: str, blocks: list[dict[str, Any]], reason: str = "end_turn") -> list[Recording]:
    head = {"type": "message", "id": "msg_1", "model": "m", "role": "assistant", "content": [], "stop_sequence": None}
    usage = {"input_tokens": 9, "output_tokens": 9}
    whole = {**head, "content": blocks, "stop_reason": reason, "usage": usage}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": {**head, "stop_reason": None, "usage": usage}}]
    for index, block in enumerate(blocks):
        events += [{"index": index, **event} for event in _block_events(block)]
    return _pair(name, "messages", "anthropic", whole, sse(*events, *finish(reason, output_tokens=9)))


def _block_events(block: dict[str, Any]) -> Iterator[dict[str, Any]]:
    kind = block["type"]
    begun, deltas = dict(block), list[dict[str, Any]]()
    if kind == "text":
        begun = {"type": "text", "text": ""}
        deltas += [{"type": "citations_delta", "citation": citation} for citation in block.get("citations", ())]
        deltas += [{"type": "text_delta", "text": half} for half in _halves(block["text"])]
    elif kind == "thinking":
        begun = {"type": "thinking", "thinking": "", "signature": ""}
        deltas += [{"type": "thinking_delta", "thinking": half} for half in _halves(block["thinking"]) if half]
        deltas.append({"type": "signature_delta", "signature": block["signature"]})
    elif kind == "compaction":
        begun["content"] = None
        deltas.append({"type": "compaction_delta", "content": block["content"]})
    elif "input" in block:
        begun["input"] = {}
        deltas += [{"type": "input_json_delta", "partial_json": half} for half in _halves(json.dumps(block["input"]))]
    yield {"type": "content_block_start", "content_block": begun}
    yield from ({"type": "content_block_delta", "delta": delta} for delta in deltas)
    yield {"type": "content_block_stop"}


# OpenAI's chat completions, and services that speak its dialect

LOOK = {"id": "call_1", "type": "function", "function": {"name": "tide", "arguments": '{"port": "Ostend"}'}}
SIGNED = {"google": {"thought_signature": "c2lnbmVk"}}
PICTURE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
THOUGHT = {"type": "reasoning.text", "text": "I need the tide.", "signature": "c2ln", "format": "anthropic-claude-v1"}
SEALED = {"type": "reasoning.encrypted", "data": "ENC", "id": "rs_1", "format": "openai-responses-v1"}
CHAT: dict[tuple[str, str], dict[str, Any]] = {
    ("openai", "parallel-calls"): {
        "content": None,
        "tool_calls": [LOOK, {**LOOK, "id": "call_2", "function": {"name": "now", "arguments": "{}"}}],
    },
    ("openai", "text-and-call"): {"content": "I look it up.", "tool_calls": [LOOK]},
    ("openai", "custom-tool"): {
        "content": None,
        "tool_calls": [{"id": "call_3", "type": "custom", "custom": {"name": "shell", "input": "date\nls"}}],
    },
    ("openai", "function-call"): {"content": None, "function_call": LOOK["function"]},
    ("openai", "refusal"): {"content": None, "refusal": "I can't help with that."},
    ("openai", "audio"): {
        "content": None,
        "audio": {"id": "audio_1", "data": PIXEL, "expires_at": 1, "transcript": "Four o'clock."},
    },
    ("openai", "annotations"): {
        "content": "Four.",
        "annotations": [{"type": "url_citation", "url_citation": {"url": "http://tides.test"}}],
    },
    ("openrouter", "reasoning-and-text"): {
        "content": "Four.",
        "reasoning": "Hm, hm.",
        "reasoning_details": [{**THOUGHT, "text": "Hm, hm.", "index": 0}],
    },
    ("openrouter", "reasoning-alone"): {"content": "Four.", "reasoning": "Hm, hm."},
    ("openrouter", "reasoning-alone-and-call"): {"content": None, "reasoning": "Hm, hm.", "tool_calls": [LOOK]},
    ("vllm", "reasoning-and-text"): {"content": "Four.", "reasoning": "Hm, hm."},
    ("vllm", "inline-thinking"): {"content": "<think>\nI need the tide.\n</think>\n\nI look it up."},
    ("xai", "reasoning-and-call"): {"content": "", "reasoning_content": "Hm, hm.", "tool_calls": [LOOK]},
    ("moonshot", "reasoning-and-call"): {"content": "", "reasoning_content": "Hm, hm.", "tool_calls": [LOOK]},
    ("openrouter", "reasoning-details"): {
        "content": "I look it up.",
        "reasoning": "I need the tide.",
        "reasoning_details": [{**THOUGHT, "index": 0}, {**SEALED, "index": 1}],
        "tool_calls": [LOOK],
    },
    ("openrouter", "images"): {"content": "Here it is.", "images": [PICTURE]},
    ("deepseek", "reasoning-and-call"): {"content": "", "reasoning_content": "I need the tide.", "tool_calls": [LOOK]},
    ("deepseek", "reasoning-and-text"): {"content": "Four.", "reasoning_content": "The tide is high at four."},
    ("vllm", "reasoning-and-call"): {"content": None, "reasoning": "I need the tide.", "tool_calls": [LOOK]},
    ("zai", "reasoning-and-call"): {"content": "\n", "reasoning_content": "I need the tide.", "tool_calls": [LOOK]},
    ("vllm", "inline-thinking-and-call"): {
        "content": "<think>\nI need the tide.\n</think>\n\nI look it up.",
        "tool_calls": [LOOK],
    },
    ("mistral", "thinking-parts"): {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "I need the tide."}]},
            {"type": "text", "text": "I look it up."},
        ],
        "tool_calls": [{**LOOK, "id": "D681PevKs"}],
    },
    ("litellm-proxy", "thinking-blocks"): {
        "content": "I look it up.",
        "reasoning_content": "I need the tide.",
        "thinking_blocks": [
            {"type": "thinking", "thinking": "I need the tide.", "signature": "c2lnMQ=="},
            {"type": "redacted_thinking", "data": "ENC1"},
            {"type": "redacted_thinking", "data": "ENC2"},
        ],
        "tool_calls": [LOOK],
    },
    ("litellm-proxy", "specific-fields"): {
        "content": "Four.",
        "provider_specific_fields": {"thought_signatures": ["c2lnMg=="], "compaction_blocks": None},
    },
    ("gemini-compatible", "signed-call"): {
        "content": None,
        "tool_calls": [{**LOOK, "extra_content": SIGNED}, {**LOOK, "id": "call_2"}],
    },
}


def _completion(provider: str, name: str, message: dict[str, Any]) -> list[Recording]:
    reason = "tool_calls" if message.get("tool_calls") else "stop"
    head = {"id": "chatcmpl-1", "created": 1, "model": "m"}
    whole = {
        **head,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}],
    }
    chunks = [
        {**head, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
        for delta, end in [*((delta, None) for delta in _deltas(message)), ({}, reason)]
    ]
    return _pair(f"{provider}-{name}", "chat", provider, whole, sse(*chunks, done=True))


def _deltas(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": ""}
    content = message["content"]
    yield from _reasoning_deltas(message)
    if isinstance(content, list):
        thinking, text = content
        for half in _halves(thinking["thinking"][0]["text"]):
            yield {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": half}]}]}
        content = text["text"]
    for name, text in (("content", content), ("refusal", message.get("refusal"))):
        yield from ({name: half} for half in _halves(text or "") if half)
    yield from (
        {name: message[name]} for name in ("images", "annotations", "provider_specific_fields") if name in message
    )
    yield from ({"audio": {name: value}} for name, value in message.get("audio", {}).items())
    if "function_call" in message:
        yield {"function_call": {**message["function_call"], "arguments": ""}}
        yield {"function_call": {"arguments": message["function_call"]["arguments"]}}
    for index, call in enumerate(message.get("tool_calls", ())):
        kind, text = ("custom", "input") if call["type"] == "custom" else ("function", "arguments")
        yield {"tool_calls": [{"index": index, **call, kind: {**call[kind], text: ""}}]}
        yield from ({"tool_calls": [{"index": index, kind: {text: half}}]} for half in _halves(call[kind][text]))


def _reasoning_deltas(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the reasoning. OpenRouter sends each piece twice, and the signature with the last piece."""
    for name in ("reasoning", "reasoning_content"):
        for half in _halves(message.get(name, "")):
            if half and "reasoning_details" not in message and "thinking_blocks" not in message:
                yield {name: half}
    for detail in message.get("reasoning_details", ()):
        if "text" not in detail:
            yield {"reasoning_details": [detail]}
            continue
        first, second = _halves(detail["text"])
        unsigned = {name: value for name, value in detail.items() if name != "signature"}
        yield {"reasoning": first, "reasoning_details": [{**unsigned, "text": first}]}
        yield {"reasoning": second, "reasoning_details": [{**detail, "text": second}]}
    yield from _thinking_deltas(message.get("thinking_blocks", ()))


def _thinking_deltas(blocks: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield reasoning as LiteLLM's proxy does: each piece twice, and the signature with the last piece, which is empty."""
    for block in blocks:
        if "thinking" not in block:
            yield {"thinking_blocks": [block]}
            continue
        for half in _halves(block["thinking"]):
            piece = {"type": "thinking", "thinking": half, "signature": None}
            yield {
                "reasoning_content": half,
                "thinking_blocks": [piece],
                "provider_specific_fields": {"thinking_blocks": [piece]},
            }
        yield {"reasoning_content": "", "thinking_blocks": [{**block, "thinking": ""}]}


# OpenAI's Responses


def _said(number: int, text: str, *notes: dict[str, Any], **more: Any) -> dict[str, Any]:
    content = {"type": "output_text", "text": text, "annotations": list(notes), "logprobs": []}
    return {
        "type": "message",
        "id": f"msg_{number}",
        "status": "completed",
        "role": "assistant",
        "content": [content],
        **more,
    }


def _thought(number: int, text: str) -> dict[str, Any]:
    summary = [{"type": "summary_text", "text": text}] if text else []
    return {"type": "reasoning", "id": f"rs_{number}", "summary": summary, "encrypted_content": f"ENC{number}"}


def _called(number: int, name: str, arguments: str) -> dict[str, Any]:
    ids = {"id": f"fc_{number}", "call_id": f"call_{number}"}
    return {"type": "function_call", **ids, "name": name, "arguments": arguments, "status": "completed"}


URL = {"type": "url_citation", "url": "http://tides.test", "title": "Tides", "start_index": 0, "end_index": 4}
ITEMS: dict[str, list[dict[str, Any]]] = {
    "phases": [
        _thought(1, "I need the port."),
        _said(1, "First the port.", phase="commentary"),
        _called(1, "port", '{"city": "Ostend"}'),
        _thought(2, ""),
        _called(2, "tide", "{}"),
    ],
    "text-before-reasoning": [
        _said(1, "Wait.", phase="commentary"),
        _thought(1, "Hm."),
        _said(2, "Four.", phase="final_answer"),
    ],
    "hosted-tools": [
        _thought(1, "I search."),
        {
            "type": "web_search_call",
            "id": "ws_1",
            "status": "completed",
            "action": {"type": "search", "query": "tides"},
        },
        {"type": "file_search_call", "id": "fs_1", "status": "completed", "queries": ["tides"], "results": None},
        {
            "type": "code_interpreter_call",
            "id": "ci_1",
            "status": "completed",
            "code": "4",
            "container_id": "cntr_1",
            "outputs": [{"type": "logs", "logs": "4"}],
        },
        _said(1, "Four o'clock.", URL),
    ],
    "image": [
        {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": PIXEL, "output_format": "png"},
        _said(1, "Here it is."),
    ],
    "remote-tools": [
        {
            "type": "mcp_list_tools",
            "id": "mcpl_1",
            "server_label": "sea",
            "tools": [{"name": "tide", "input_schema": {"type": "object"}}],
        },
        {
            "type": "mcp_call",
            "id": "mcp_1",
            "server_label": "sea",
            "name": "tide",
            "arguments": "{}",
            "output": "4",
            "status": "completed",
        },
        {"type": "mcp_approval_request", "id": "mcpr_1", "server_label": "sea", "name": "buoy", "arguments": "{}"},
    ],
    "local-tools": [
        {
            "type": "custom_tool_call",
            "id": "ctc_1",
            "call_id": "call_1",
            "name": "shell",
            "input": "date\nls",
            "status": "completed",
        },
        {
            "type": "shell_call",
            "id": "sh_1",
            "call_id": "call_2",
            "status": "completed",
            "action": {"commands": ["ls"], "timeout_ms": 100, "max_output_length": 100},
        },
        {
            "type": "computer_call",
            "id": "cu_1",
            "call_id": "call_4",
            "status": "completed",
            "action": {"type": "screenshot"},
            "pending_safety_checks": [],
        },
        {
            "type": "apply_patch_call",
            "id": "apc_1",
            "call_id": "call_3",
            "status": "completed",
            "operation": {"type": "delete_file", "path": "a.txt"},
        },
    ],
    "refusal": [
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "I can't help with that."}],
        }
    ],
    "two-texts": [
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [_said(1, text)["content"][0] for text in ("Four ", "o'clock.")],
        }
    ],
    "tool-search": [
        {
            "type": "tool_search_call",
            "id": "tsc_1",
            "call_id": None,
            "status": "completed",
            "execution": "server",
            "arguments": {"query": "tide"},
        },
        {
            "type": "tool_search_output",
            "id": "tso_1",
            "call_id": None,
            "status": "completed",
            "execution": "server",
            "tools": [],
        },
        _called(1, "tide", "{}"),
    ],
    "compaction": [{"type": "compaction", "id": "cmp_1", "encrypted_content": "ENC"}, _said(1, "Four.")],
}


def _response(name: str, items: list[dict[str, Any]]) -> list[Recording]:
    head = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m"}
    whole = {**head, "status": "completed", "output": items, "usage": None}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {**head, "status": "in_progress", "output": []}},
        *({"output_index": index, **event} for index, item in enumerate(items) for event in _item_events(item)),
        {"type": "response.completed", "response": whole},
    ]
    number = count()
    stream = sse(*({**event, "sequence_number": next(number)} for event in events))
    return _pair(f"responses-{name}", "responses", "openai-responses", whole, stream)


EMPTY = {"content": [], "summary": [], "arguments": "", "input": "", "result": None, "code": ""}
"""What an item's fields are before its deltas."""


def _item_events(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    begun = {key: EMPTY.get(key, value) for key, value in item.items()}
    yield {
        "type": "response.output_item.added",
        "item": begun | ({"status": "in_progress"} if "status" in item else {}),
    }
    for index, part in enumerate(item.get("content", ())):
        at = {"item_id": item["id"], "content_index": index}
        name = "text" if part["type"] == "output_text" else "refusal"
        yield {"type": "response.content_part.added", **at, "part": {**part, name: ""}}
        for half in _halves(part[name]):
            yield {
                "type": f"response.{'output_text' if name == 'text' else name}.delta",
                **at,
                "delta": half,
                "logprobs": [],
            }
        for number, note in enumerate(part.get("annotations", ())):
            yield {
                "type": "response.output_text.annotation.added",
                **at,
                "annotation_index": number,
                "annotation": note,
            }
        yield {"type": "response.content_part.done", **at, "part": part}
    for index, part in enumerate(item.get("summary", ())):
        at = {"item_id": item["id"], "summary_index": index}
        yield {"type": "response.reasoning_summary_part.added", **at, "part": {**part, "text": ""}}
        yield from (
            {"type": "response.reasoning_summary_text.delta", **at, "delta": half} for half in _halves(part["text"])
        )
        yield {"type": "response.reasoning_summary_part.done", **at, "part": part}
    for field, event in (("arguments", "function_call_arguments"), ("input", "custom_tool_call_input")):
        if item["type"] in ("function_call", "custom_tool_call") and field in item:
            for half in _halves(item[field]):
                yield {"type": f"response.{event}.delta", "item_id": item["id"], "delta": half}
            yield {"type": f"response.{event}.done", "item_id": item["id"], field: item[field]}
    yield {"type": "response.output_item.done", "item": item}


# Gemini

GEMINI: dict[str, list[dict[str, Any]]] = {
    "signed-calls": [
        {"text": "I need the tide.", "thought": True},
        {"text": "I look it up."},
        {"functionCall": {"name": "tide", "args": {"port": "Ostend"}, "id": "call_12"}, "thoughtSignature": "c2lnMQ=="},
        {"functionCall": {"name": "now", "args": {}}},
    ],
    "signed-text": [
        {"text": "Hm.", "thought": True, "thoughtSignature": "c2lnMg=="},
        {"text": "Four.", "thoughtSignature": "c2lnMw=="},
    ],
    "late-signature": [{"text": "Four."}, {"text": "", "thoughtSignature": "c2lnNA=="}],
    "code-execution": [
        {"text": "I compute."},
        {"executableCode": {"language": "PYTHON", "code": "print(4)"}, "thoughtSignature": "c2lnNQ=="},
        {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "4\n"}},
        {"text": "Four."},
    ],
    "images": [
        {"text": "One:"},
        {"inlineData": {"mimeType": "image/png", "data": PIXEL}, "thoughtSignature": "c2lnNg=="},
        {"text": "Two:"},
        {"inlineData": {"mimeType": "image/jpeg", "data": "/9j/4A=="}},
    ],
    "server-tools": [
        {
            "toolCall": {"toolType": "GOOGLE_SEARCH_WEB", "id": "t1", "args": {"queries": ["tides"]}},
            "thoughtSignature": "c2lnNw==",
        },
        {
            "toolResponse": {"toolType": "GOOGLE_SEARCH_WEB", "id": "t1", "response": {"html": "4"}},
            "thoughtSignature": "c2lnOA==",
        },
        {"text": "Four."},
    ],
}


def _content(name: str, parts: list[dict[str, Any]]) -> list[Recording]:
    pieces: list[dict[str, Any]] = []
    for part in parts:
        halves = _halves(part.get("text", ""))
        pieces += (
            [{**part, "text": half} for half in halves] if "thoughtSignature" not in part and all(halves) else [part]
        )
    stream = sse(*(_candidate(piece) for piece in pieces), _candidate({"text": ""}, reason="STOP"))
    return _pair(f"gemini-{name}", "gemini", "gemini", _candidate(*parts, reason="STOP"), stream)


def _candidate(*parts: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    finished = {"finishReason": reason} if reason else {}
    return {
        "candidates": [{"index": 0, "content": {"role": "model", "parts": list(parts)}, **finished}],
        "modelVersion": "m",
    }


# Ollama

TIDE = {"function": {"name": "tide", "arguments": {"port": "Ostend", "depth": 4}}}
OLLAMA: dict[str, dict[str, Any]] = {
    "thinking-and-calls": {
        "content": "",
        "thinking": "I need the tide.",
        "tool_calls": [TIDE, {"function": {"name": "now", "arguments": {}}}],
    },
    "thinking-and-text": {"content": "Four o'clock.", "thinking": "The tide is high at four."},
    "text-and-call": {"content": "I look it up.", "tool_calls": [TIDE]},
}


def _ollama(name: str, message: dict[str, Any]) -> list[Recording]:
    thought = [line(thinking=half) for half in _halves(message.get("thinking", "")) if half]
    said = [line(half) for half in _halves(message["content"]) if half]
    called = [line(tool_calls=[call]) for call in message.get("tool_calls", ())]
    return _pair(f"ollama-{name}", "ollama", "ollama", last(**message), ndjson(*thought, *said, *called, last()))


# Cohere

SOURCE = {"type": "tool", "id": "tide_1:0", "tool_output": {"tide": "4"}}
FOUND = {"start": 0, "end": 4, "text": "Four", "sources": [SOURCE], "content_index": 0, "type": "TEXT_CONTENT"}
PLANNED = {"start": 10, "end": 12, "text": "it", "sources": [SOURCE], "type": "PLAN"}
CALLED = {"id": "tide_1", "type": "function", "function": {"name": "tide", "arguments": '{"port": "Ostend"}'}}
COHERE: dict[str, dict[str, Any]] = {
    "plan-and-calls": {
        "tool_plan": "I look it up.",
        "tool_calls": [CALLED, {**CALLED, "id": "now_2", "function": {"name": "now", "arguments": "{}"}}],
    },
    "thinking-and-call": {
        "content": [{"type": "thinking", "thinking": "I need the tide."}],
        "tool_calls": [CALLED],
    },
    "thinking-and-text": {
        "content": [{"type": "thinking", "thinking": "The tide is high at four."}, {"type": "text", "text": "Four."}],
    },
    "two-texts": {"content": [{"type": "text", "text": "Four "}, {"type": "text", "text": "o'clock."}]},
    "citations": {
        "content": [{"type": "text", "text": "Four o'clock."}],
        "citations": [FOUND, {**FOUND, "start": 5, "end": 12, "text": "o'clock"}],
    },
    "cited-plan": {"tool_plan": "I look up it.", "tool_calls": [CALLED], "citations": [PLANNED]},
}


def _chat_answer(name: str, message: dict[str, Any]) -> list[Recording]:
    reason = "TOOL_CALL" if "tool_calls" in message else "COMPLETE"
    answer = {"id": "id_1", "message": {"role": "assistant", **message}, "finish_reason": reason, "usage": USAGE}
    stream = sse(*stream_of(message, reason), done=True)
    return _pair(f"cohere-{name}", "cohere-chat", "cohere", answer, stream)


# Bedrock

TIDE_CALL = {"toolUseId": "tooluse_1", "name": "tide", "input": {"port": "Ostend"}}
NOW_CALL = {"toolUseId": "tooluse_2", "name": "now", "input": {}}
BY_SERVICE = {"toolUseId": "srvtoolu_1", "name": "nova_code_interpreter", "type": "server_tool_use"}
RESULT = {"toolUseId": "srvtoolu_1", "status": "success", "type": "nova_code_interpreter_result"}
SOURCE_OF_TIDES = {"title": "Tides", "location": {"documentPage": {"documentIndex": 0, "start": 1, "end": 2}}}


def _reasoned(text: str, signature: str | None = None) -> dict[str, Any]:
    signed = {"signature": signature} if signature else {}
    return {"reasoningContent": {"reasoningText": {"text": text, **signed}}}


def _cited(text: str, *quotes: str) -> dict[str, Any]:
    citations = [{**SOURCE_OF_TIDES, "sourceContent": [{"text": quote}]} for quote in quotes]
    return {"citationsContent": {"content": [{"text": text}], "citations": citations}}


BEDROCK: dict[str, list[dict[str, Any]]] = {
    "parallel-calls": [{"toolUse": TIDE_CALL}, {"toolUse": NOW_CALL}],
    "text-and-call": [{"text": "I look it up."}, {"toolUse": TIDE_CALL}],
    "typed-call": [{"toolUse": {**TIDE_CALL, "type": "tool_use"}}],
    "signed-thinking": [_reasoned("I need the tide.", "c2lnMQ=="), {"text": "Four."}],
    "unsigned-thinking": [_reasoned("I need the tide."), {"text": "Four."}],
    "redacted-thinking": [
        {"reasoningContent": {"redactedContent": "RU5DMQ=="}},
        {"reasoningContent": {"redactedContent": "RU5DMg=="}},
        _reasoned("", "c2lnMg=="),
        {"text": "Four."},
    ],
    "thinking-and-calls": [
        _reasoned("I need the port.", "c2lnMw=="),
        {"text": "First the port."},
        {"toolUse": TIDE_CALL},
        _reasoned("And the time.", "c2lnNA=="),
        {"toolUse": NOW_CALL},
    ],
    "thinking-alone": [_reasoned("I need the tide.", "c2lnNQ==")],
    "two-texts": [{"text": "Four "}, {"text": "o'clock."}],
    "blank-text": [{"text": "\n"}, {"toolUse": TIDE_CALL}],
    "citations": [
        {"text": "It is high at "},
        _cited("four", "High at 4"),
        _cited("o'clock", "16:00", "4 pm"),
        {"text": "."},
    ],
    "server-tools": [
        {"text": "I compute."},
        {"toolUse": {**BY_SERVICE, "input": {"snippet": "2 + 2"}}},
        {"toolResult": {**RESULT, "content": [{"json": {"stdOut": "4"}}, {"text": "It is 4."}]}},
        {"text": "Four."},
        {"toolUse": NOW_CALL},
    ],
    "image": [
        {"text": "Here it is."},
        {"image": {"format": "png", "source": {"bytes": PIXEL}}},
        {"text": "And so on."},
    ],
    "unknown-block": [{"text": "See:"}, {"chart": {"points": [1, 2], "note": "up"}}, {"text": "Up."}],
}
BLOCKED = {"trace": {"guardrail": {"inputAssessment": {"gr1": {"wordPolicy": {"customWords": []}}}}}}


def _converse(name: str, blocks: list[dict[str, Any]], reason: str = "", **more: Any) -> list[Recording]:
    reason = reason or ("tool_use" if "toolUse" in blocks[-1] else "end_turn")
    stream = aws.stream(*aws.events_of(blocks, reason, **more))
    return _pair(f"bedrock-{name}", "bedrock", "bedrock", aws.whole(blocks, reason, **more), stream)


ANSWERS: list[Recording] = [
    *(each for name, blocks in MESSAGES.items() for each in _message(f"anthropic-{name}", blocks)),
    *_message("anthropic-pause-turn", PAUSED, "pause_turn"),
    *(each for (provider, name), message in CHAT.items() for each in _completion(provider, name, message)),
    *(each for name, items in ITEMS.items() for each in _response(name, items)),
    *(each for name, parts in GEMINI.items() for each in _content(name, parts)),
    *(each for name, message in OLLAMA.items() for each in _ollama(name, message)),
    *(each for name, message in COHERE.items() for each in _chat_answer(name, message)),
    *(each for name, blocks in BEDROCK.items() for each in _converse(name, blocks)),
    *_converse("guardrail", [{"text": "I can't say that."}], "guardrail_intervened", **BLOCKED),
]
