"""Requests in the words of OpenAI's Responses API.

Nothing is stored at the service (`store: false`): each request carries the whole conversation, and the model's
encrypted reasoning goes back with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fluxibly.providers.openai_request import function_of, image_url, is_reasoning_model, named_schema
from fluxibly.providers.wire import refuse
from fluxibly.types import Image, Message, Request

_NOT_TAKEN: Final = ("top_k", "frequency_penalty", "presence_penalty", "seed", "n")
_ENCRYPTED: Final = "reasoning.encrypted_content"


def responses_body(request: Request, service: str) -> dict[str, Any]:
    """The body of a request, without its `extra`.

    Raises:
        BadRequest: this API has no such parameter.
    """
    refuse(request, service, _NOT_TAKEN)
    if request.stop:
        refuse(request, service, ("stop",))
    body: dict[str, Any] = {
        "model": request.model,
        "input": [item for message in request.messages for item in _items(message)],
        "store": False,
    }
    if is_reasoning_model(request.model):
        body["include"] = [_ENCRYPTED]  # the other models refuse it
    for name, ours in (("temperature", "temperature"), ("top_p", "top_p"), ("max_output_tokens", "max_tokens")):
        value = getattr(request, ours)
        if value is not None:
            body[name] = value
    if request.reasoning_effort is not None:
        body["reasoning"] = {"effort": request.reasoning_effort}
    if request.tools:
        body["tools"] = [{"type": "function", "strict": False, **function_of(tool)} for tool in request.tools]
    choice = request.tool_choice
    if choice is not None:
        named = {"type": "function", "name": choice}
        body["tool_choice"] = choice if choice in {"auto", "none", "required"} else named
    if request.response_format is not None:
        body["text"] = {"format": _text_format(request.response_format)}
    return body


def _text_format(wanted: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(wanted, str):
        return {"type": "json_object" if wanted == "json" else "text"}
    return {"type": "json_schema", **named_schema(wanted)}


def _items(message: Message) -> list[dict[str, Any]]:
    """The items that a message is here: its reasoning, what it says, and its tool calls are one each."""
    if message.role == "tool":
        return [
            {
                "type": "function_call_output",
                "call_id": message.tool_call_id or "",
                "output": _contents(message) if _has_image(message) else message.text,
            }
        ]
    items = [dict(part.raw) for part in message.reasoning if part.raw and _goes_back(part.raw)]
    if message.content:
        items.append(_said(message))
    items.extend(
        {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.raw_arguments}
        for call in message.tool_calls
    )
    return items


def _said(message: Message) -> dict[str, Any]:
    if message.role == "assistant":  # llama.cpp takes it in no shorter form
        return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": message.text}]}
    return {"role": message.role, "content": _contents(message) if _has_image(message) else message.text}


def _goes_back(raw: Mapping[str, Any]) -> bool:
    """Whether a block is reasoning of this dialect, and whole: an id alone means nothing where nothing is stored."""
    return raw.get("type") == "reasoning" and bool(raw.get("encrypted_content") or raw.get("content"))


def _has_image(message: Message) -> bool:
    return any(isinstance(part, Image) for part in message.content)


def _contents(message: Message) -> list[dict[str, Any]]:
    return [
        {"type": "input_image", "image_url": image_url(part), "detail": part.detail or "auto"}
        if isinstance(part, Image)
        else {"type": "input_text", "text": part.text}
        for part in message.content
    ]
