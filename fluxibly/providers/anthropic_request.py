"""Requests in Anthropic's dialect: the body of `POST /v1/messages`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fluxibly.providers.wire import bad_request, image_data, refuse, sent_arguments, system_text
from fluxibly.types import Image, Message, Part, Reasoning, Request, Text, Tool

NAME = "Anthropic"
DEFAULT_MAX_TOKENS = 4096
"""Sent where the request has no `max_tokens`, which this dialect requires. Every Claude model takes as much."""
DEFAULT_MAX_TOKENS_THINKING = 16_384
"""The same where the model thinks as much as it likes, since its thinking counts."""
BUDGETS = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 16_384, "xhigh": 24_576, "max": 32_768}
"""Tokens to think with, for models that take a budget and know no words for the effort; 1,024 is the least."""
ADAPTIVE_SINCE = (4, 6)
"""The Claude version from which models take an effort, and decide themselves how much to think."""

_VERSION = re.compile(r"claude-(?:[a-z]+-)?(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)")


def encode_body(request: Request, *, stream: bool) -> dict[str, Any]:
    """The body, without `extra`.

    Raises:
        BadRequest: a parameter is one that the dialect cannot take.

    """
    refuse(request, NAME, ("seed", "frequency_penalty", "presence_penalty", "n"))
    body: dict[str, Any] = {"model": request.model, "messages": _turns(request)}
    system = system_text(request, NAME)
    if system:
        body["system"] = system
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(request, name)
        if value is not None:
            body[name] = value
    if request.stop:
        body["stop_sequences"] = list(request.stop)
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    if request.tool_choice is not None:
        body["tool_choice"] = _tool_choice(request.tool_choice)
    output = _reason(request, body) | _format(request)
    if output:
        body["output_config"] = output
    if stream:
        body["stream"] = True
    return body


def _turns(request: Request) -> list[dict[str, Any]]:
    """The conversation. Neighbours of one role become one turn: the results of several tools have to."""
    turns: list[dict[str, Any]] = []
    ids = _CallIds()
    for message in request.messages:
        if message.role == "system":
            continue
        role = "assistant" if message.role == "assistant" else "user"
        blocks = _blocks(message, ids)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:  # an answer without content is no turn: the service refuses it
            turns.append({"role": role, "content": blocks})
    if not turns:
        raise bad_request(request, f"{NAME} needs a message besides the system's, with something in it")
    return turns


def _blocks(message: Message, ids: _CallIds) -> list[dict[str, Any]]:
    content = [_part(part) for part in message.content if not isinstance(part, Text) or part.text]
    if message.role == "tool":
        return [{"type": "tool_result", "tool_use_id": ids.of(message.tool_call_id or ""), "content": content}]
    thinking = [block for block in map(_thinking_block, message.reasoning) if block]
    calls = [
        {"type": "tool_use", "id": ids.new(call.id), "name": call.name, "input": sent_arguments(call)}
        for call in message.tool_calls
    ]
    return [*thinking, *content, *calls]


class _CallIds:
    """The ids of a conversation's tool calls, as the service takes them.

    One of another service may have more characters, or stand for a call in each turn, where this one takes it once.
    """

    def __init__(self) -> None:
        self._sent: dict[str, str] = {}
        """What the last call of each id is sent as."""
        self._used: set[str] = set()

    def new(self, call_id: str) -> str:
        """The id of a call."""
        plain = sent = self._plain(call_id)
        number = len(self._used)
        while sent in self._used:
            number += 1
            sent = f"{plain}_{number}"
        self._used.add(sent)
        self._sent[call_id] = sent
        return sent

    def of(self, call_id: str) -> str:
        """The id of the call that a result is for: the last one."""
        return self._sent.get(call_id) or self._plain(call_id)

    def _plain(self, call_id: str) -> str:
        return re.sub(r"[^a-zA-Z0-9_-]", "_", call_id) or "call"


def _thinking_block(reasoning: Reasoning) -> dict[str, Any] | None:
    """A block as the service sent it; None for reasoning of another dialect, or without proof that it is genuine."""
    if reasoning.raw is not None:
        return dict(reasoning.raw) if reasoning.raw.get("type") in ("thinking", "redacted_thinking") else None
    if reasoning.signature is None:
        return None
    return {"type": "thinking", "thinking": reasoning.text, "signature": reasoning.signature}


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image", "source": _source(part)}


def _source(image: Image) -> dict[str, Any]:
    data = image_data(image)
    if data is None:
        return {"type": "url", "url": image.url}
    return {"type": "base64", "media_type": data[0], "data": data[1]}


def _tool(tool: Tool) -> dict[str, Any]:
    encoded: dict[str, Any] = {"name": tool.name, "input_schema": tool.parameters}
    if tool.description:
        encoded["description"] = tool.description
    if tool.strict is not None:
        encoded["strict"] = tool.strict
    return encoded


def _tool_choice(choice: str) -> dict[str, Any]:
    if choice in ("auto", "none"):
        return {"type": choice}
    return {"type": "any"} if choice == "required" else {"type": "tool", "name": choice}


def _format(request: Request) -> dict[str, Any]:
    """What of `output_config` comes from `response_format`."""
    if isinstance(request.response_format, Mapping):
        return {"format": {"type": "json_schema", "schema": request.response_format}}
    if request.response_format == "json":
        raise bad_request(request, f"{NAME} takes response_format as a JSON Schema or 'text', not 'json'")
    return {}


def _reason(request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """Set `thinking` and `max_tokens`; what is returned of the reasoning effort belongs into `output_config`."""
    effort = request.reasoning_effort
    if effort is None or effort == "none":
        body["max_tokens"] = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        if effort:
            body["thinking"] = {"type": "disabled"}
        return {}
    if _is_adaptive(request.model):
        body["max_tokens"] = DEFAULT_MAX_TOKENS_THINKING if request.max_tokens is None else request.max_tokens
        body["thinking"] = {"type": "adaptive", "display": "summarized"}
        return {"effort": effort}
    budget = BUDGETS.get(effort)
    if budget is None:
        known = ", ".join(["none", *BUDGETS])
        raise bad_request(request, f"{NAME} takes as reasoning_effort {known}, not {effort!r}")
    if request.max_tokens is not None and request.max_tokens <= budget:
        raise bad_request(
            request,
            f"reasoning_effort={effort!r} is {budget} tokens of thinking, which max_tokens={request.max_tokens} includes "
            "and does not hold: raise max_tokens or lower the effort",
        )
    body["max_tokens"] = request.max_tokens or budget + DEFAULT_MAX_TOKENS
    body["thinking"] = {"type": "enabled", "budget_tokens": budget}
    return {}


def _is_adaptive(model: str) -> bool:
    """Whether a model takes an effort. Other makers' models, which speak this dialect too, take a budget."""
    version = _VERSION.search(model)
    return version is not None and (int(version[1]), int(version[2] or 0)) >= ADAPTIVE_SINCE
