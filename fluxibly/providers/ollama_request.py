"""Requests in Ollama's own dialects: the bodies of `POST /api/chat` and `POST /api/generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxibly.providers.wire import bad_request, image_data, refuse, sent_arguments, system_text, tool_name
from fluxibly.types import Image, Message, Request, Tool

NAME = "Ollama"
EFFORTS = ("low", "medium", "high")
"""What models that know grades of effort take (gpt-oss); for others any of them is "yes"."""

_OPTIONS = {
    "temperature": "temperature",
    "max_tokens": "num_predict",
    "top_p": "top_p",
    "top_k": "top_k",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
}


def encode_body(request: Request, *, stream: bool, chat: bool) -> dict[str, Any]:
    """The body, without `extra`.

    Raises:
        BadRequest: a parameter is one that the dialect cannot take.
    """
    refuse(request, NAME, ("n",))
    body: dict[str, Any] = {"model": request.model, "stream": stream}  # without it, answers are streamed
    if chat:
        body["messages"] = [_message(message, request) for message in request.messages]
        body |= _tools(request)
    else:
        body |= _prompt(request)
    options = {name: getattr(request, ours) for ours, name in _OPTIONS.items() if getattr(request, ours) is not None}
    if request.stop:
        options["stop"] = list(request.stop)
    if options:
        body["options"] = options
    if request.response_format == "json" or isinstance(request.response_format, Mapping):
        body["format"] = request.response_format
    effort = request.reasoning_effort
    if effort is not None:
        if effort not in ("none", *EFFORTS):
            known = ", ".join(["none", *EFFORTS])
            raise bad_request(request, f"{NAME} takes as reasoning_effort {known}, not {effort!r}")
        body["think"] = False if effort == "none" else effort
    return body


def _message(message: Message, request: Request) -> dict[str, Any]:
    encoded: dict[str, Any] = {"role": message.role, "content": message.text}
    images = _images(message, request)
    if images:
        encoded["images"] = images
    if message.role == "tool":
        encoded["tool_name"] = tool_name(message, request, NAME)
        encoded["tool_call_id"] = message.tool_call_id or ""
    ours = [part.text for part in message.reasoning if part.raw == {"thinking": part.text}]
    if ours:
        encoded["thinking"] = "".join(ours)
    if message.tool_calls:
        encoded["tool_calls"] = [
            {"id": call.id, "function": {"index": index, "name": call.name, "arguments": sent_arguments(call)}}
            for index, call in enumerate(message.tool_calls)
        ]
    return encoded


def _images(message: Message, request: Request) -> list[str]:
    encoded: list[str] = []
    for part in message.content:
        if isinstance(part, Image):
            data = image_data(part)
            if data is None:
                raise bad_request(
                    request, f"{NAME} fetches no images: give an Image as data= with media_type=, not as url="
                )
            encoded.append(data[1])
    return encoded


def _tools(request: Request) -> dict[str, Any]:
    if request.tool_choice not in (None, "auto", "none"):
        raise bad_request(request, f"{NAME} takes as tool_choice auto or none, not {request.tool_choice!r}")
    if not request.tools or request.tool_choice == "none":
        return {}  # a model that gets no tools calls none
    return {"tools": [_tool(tool, request) for tool in request.tools]}


def _tool(tool: Tool, request: Request) -> dict[str, Any]:
    if tool.strict:
        raise bad_request(request, f"{NAME} takes no strict tools, as {tool.name} is; leave strict out")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _prompt(request: Request) -> dict[str, Any]:
    """The prompt of `/api/generate`, which knows no conversation and no tools."""
    where = "/api/generate (framework ollama-generate)"
    if request.tools or request.tool_choice is not None:
        raise bad_request(request, f"{NAME}'s {where} takes no tools; use the framework ollama")
    turns = [message for message in request.messages if message.role != "system"]
    if len(turns) != 1 or turns[0].role != "user":
        raise bad_request(request, f"{NAME}'s {where} takes one user message; use the framework ollama")
    body: dict[str, Any] = {"prompt": turns[0].text}
    system = system_text(request, NAME)
    if system:
        body["system"] = system
    images = _images(turns[0], request)
    if images:
        body["images"] = images
    return body
