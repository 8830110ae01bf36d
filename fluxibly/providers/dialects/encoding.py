"""Helpers that the encoders of all dialects share: requests as JSON, and errors for unsupported requests."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping
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


def misplaced_media(request: Request, part: Media, where: str) -> BadRequest:
    """Return the error for media in an assistant's message, for dialects that take media only `where` it says."""
    return bad_request(
        request,
        f"expected media only in {where}, got {kind_of(part)} in an assistant's message; leave it out, or describe it "
        "in text",
    )


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
    except RecursionError as error:
        raise _unwritable(request, error) from None
    return json_of(body, request)


def json_of(value: object, request: Request) -> bytes:
    """Return a value of a request as JSON.

    Raises:
        BadRequest: it contains a value that JSON cannot represent.
    """
    try:
        return msgspec.json.encode(value, enc_hook=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        # A UnicodeEncodeError would quote the whole prompt in its arguments, so it is not chained.
        raise _unwritable(request, error) from None


def _unwritable(request: Request, error: Exception) -> BadRequest:
    what = "it contains a lone surrogate (half a character)" if isinstance(error, UnicodeError) else str(error)
    return bad_request(request, f"the request cannot be written as JSON: {what}")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, Any]", value))
    raise TypeError(f"it contains {kind_of(value)}")


def system_text(request: Request, service: str) -> str:
    """Return the text of all system messages, for dialects that keep it separate from the conversation."""
    texts = ["".join([part.text for part in parts]) for parts in system_texts(request, service)]
    return "\n\n".join([text for text in texts if text.strip()])


def system_texts(request: Request, service: str) -> list[list[Text]]:
    """Return the texts of each system message. Raises BadRequest for media."""
    found: list[list[Text]] = []
    for message in request.messages:
        if message.role != "system":
            continue
        texts = [part for part in message.content if isinstance(part, Text)]
        if len(texts) < len(message.content):
            other = next(part for part in message.content if not isinstance(part, Text))
            raise bad_request(request, f"expected only text in a system message for {service}, got {kind_of(other)}")
        found.append(texts)
    return found


def joined_turns(
    request: Request, service: str, blocks_of: Callable[[Message], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return the turns of the user and the assistant, for dialects whose turns alternate and are lists of blocks.

    Adjacent messages of a role share a turn, as the results of several tools must.

    Raises:
        BadRequest: there is no turn, or the last message is empty.
    """
    turns: list[dict[str, Any]] = []
    for message in request.messages:
        if message.role == "system":
            continue
        role = "assistant" if message.role == "assistant" else "user"
        blocks = blocks_of(message)
        if not blocks and message is request.messages[-1] and role == "user":
            raise bad_request(
                request, f"expected the last message to say something for {service}, got only white space"
            )
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:  # these services reject a turn without content
            turns.append({"role": role, "content": blocks})
    if not turns:
        raise bad_request(request, f"expected a non-empty message besides the system messages for {service}, got none")
    return turns


class CallIds:
    """A mapping from a conversation's tool call ids to ids that a service accepts.

    Ids from other services may contain other characters, or repeat from turn to turn. These services accept each id
    only once.

    Args:
        foreign: matches the characters that the service does not accept.
        longest: the longest id that it accepts.
    """

    def __init__(self, foreign: re.Pattern[str], longest: int) -> None:
        self._foreign = foreign
        self._longest = longest
        self._sent: dict[str, str] = {}
        """The id sent for the last call with each original id."""
        self._used: set[str] = set()

    def new(self, call_id: str) -> str:
        """Return the id to send for a new call."""
        plain = sent = self._plain(call_id)
        number = len(self._used)
        while sent in self._used:
            number += 1
            end = f"_{number}"
            sent = plain[: self._longest - len(end)] + end
        self._used.add(sent)
        self._sent[call_id] = sent
        return sent

    def of(self, call_id: str) -> str:
        """Return the id to send for a result: that of the last call with `call_id`."""
        return self._sent.get(call_id) or self._plain(call_id)

    def _plain(self, call_id: str) -> str:
        return self._foreign.sub("_", call_id)[: self._longest] or "call"


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
