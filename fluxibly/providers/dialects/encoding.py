"""Helpers that the encoders of all dialects share: requests as JSON, and errors for unsupported requests."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any, Literal, cast
from urllib.parse import unquote_to_bytes

import msgspec

from fluxibly._checks import kind_of, problem
from fluxibly._formats import SchemaFormat, output_format
from fluxibly._merging import merge_into
from fluxibly.errors import BadRequest
from fluxibly.types import Media, Message, Request, Text, ToolCall


def bad_request(request: Request, message: str) -> BadRequest:
    """Return the error for a request that the dialect cannot express. The request was not sent."""
    return BadRequest(f"{message} (model {request.model})", model=request.model)


def reject_unsupported(request: Request, service: str, names: Iterable[str]) -> None:
    """Raise BadRequest if the request sets a parameter in `names`, or a `tool_choice` that is no str."""
    choice = request.tool_choice
    if choice is not None and not isinstance(choice, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        raise bad_request(request, problem("tool_choice", "'auto', 'none', 'required' or a tool's name", choice))
    for name in names:
        value = getattr(request, name)
        if value is not None and not (name == "n" and value == 1):
            raise bad_request(
                request, f"{service} does not support {name}; leave it out, or use extra= if your server supports it"
            )


def format_of(request: Request) -> Literal["text", "json"] | SchemaFormat | None:
    """Return the format that the request asks for. Raises BadRequest if there is no such format."""
    try:
        return output_format(request.response_format)
    except (TypeError, ValueError) as error:
        raise bad_request(request, str(error)) from None


def write_json(body: dict[str, Any], request: Request) -> bytes:
    """Return the body of a request as JSON, with `request.extra` merged in; see `_merging`.

    Raises:
        BadRequest: the body contains a value that JSON cannot represent.
    """
    try:
        if request.extra:
            merge_into(body, request.extra)
        return msgspec.json.encode(body, enc_hook=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        # A UnicodeEncodeError would quote the whole prompt in its arguments, so it is not chained.
        what = "it contains a lone surrogate (half a character)" if isinstance(error, UnicodeError) else str(error)
        raise bad_request(request, f"the request cannot be written as JSON: {what}") from None


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, Any]", value))
    raise TypeError(f"it contains {kind_of(value)}")


def system_text(request: Request, service: str) -> str:
    """Return the text of all system messages, for dialects that keep it separate from the conversation."""
    systems = [message for message in request.messages if message.role == "system"]
    for message in systems:
        for part in message.content:
            if not isinstance(part, Text):
                raise bad_request(request, f"expected only text in a system message for {service}, got {kind_of(part)}")
    return "\n\n".join([message.text for message in systems if message.text.strip()])


def media_data(media: Media) -> tuple[str, str] | None:
    """Return the media type and the base64 data of an image, audio or a document; None if it is given by its URL."""
    if media.data is not None:
        return media.media_type or "", base64.b64encode(media.data).decode("ascii")
    url = media.url or ""
    if not url.startswith("data:"):
        return None
    head, _, data = url[5:].partition(",")
    media_type, *parameters = head.split(";")
    if "base64" not in parameters:
        data = base64.b64encode(unquote_to_bytes(data)).decode("ascii")
    return media.media_type or media_type or "text/plain", data


def is_thinking_block(raw: Mapping[str, Any]) -> bool:
    """Whether reasoning is a block of Anthropic's, which LiteLLM passes on. Mistral's blocks have a list inside."""
    return raw.get("type") in ("thinking", "redacted_thinking") and not isinstance(raw.get("thinking"), list)


def sent_arguments(call: ToolCall) -> dict[str, Any]:
    """Return a tool call's arguments as an object. Text that is not a JSON object goes under `INVALID_JSON`."""
    return {"INVALID_JSON": call.raw_arguments} if call.error else dict(call.arguments)


def tool_name(message: Message, request: Request, service: str) -> str:
    """Return the tool's name for a tool message: the message's own, or the name in the last call with its id."""
    if message.name:
        return message.name
    earlier = list(takewhile(lambda other: other is not message, request.messages))
    for other in reversed(earlier):  # generated ids may repeat from turn to turn
        for call in other.tool_calls:
            if call.id == message.tool_call_id:
                return call.name
    raise bad_request(
        request,
        f"{service} requires the tool's name with its result: use Message.tool(content, tool_call), or pass name=",
    )
