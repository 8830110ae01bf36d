"""What goes back to a service is what came from it: fluxibly sends what the service's own client sends.

An answer is read and put back into the conversation twice: by fluxibly, and by the official client of the service
(`support/clients.py`). The assistant's turns have to be equal, save for what the service takes either way: the tables
below say what that is. The answers are recordings of real servers (`tests/data/recorded`), synthetic ones for the
features that need an account (`support/synthetic.py`), and those in the folder that FLUXIBLY_RECORDED names.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from support.clients import CLIENTS, NotAnAnswer, turn_in, turn_of_client
from support.dialects import WEATHER, streamed
from support.recordings import FOLDER, OWN, Recording, read
from support.synthetic import ANSWERS

from fluxibly.config import LLMConfig
from fluxibly.errors import FluxiblyError
from fluxibly.providers.dialects.anthropic import AnthropicCodec
from fluxibly.providers.dialects.bedrock import BedrockCodec
from fluxibly.providers.dialects.codec import Codec
from fluxibly.providers.dialects.cohere import CohereCodec
from fluxibly.providers.dialects.gemini import GeminiCodec
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.providers.openai import codec_of
from fluxibly.providers.services import SERVICES
from fluxibly.types import Message, Request, Response, Text

RECORDED = [
    recording
    for file in [*sorted(OWN.glob("*.json")), *sorted(FOLDER.glob("*.json"))]
    if (recording := read(file)).status == 200 and recording.dialect in CLIENTS
]
ALL = [pytest.param(recording, id=recording.name) for recording in [*RECORDED, *ANSWERS]]
if not FOLDER.is_dir():
    ALL.append(pytest.param(None, id="others", marks=pytest.mark.skip("no folder that FLUXIBLY_RECORDED names")))


def codec_for(recording: Recording) -> Codec:
    """Return the codec with which a call to the service would be made."""
    if recording.dialect == "messages":
        return AnthropicCodec()
    if recording.dialect == "gemini":
        return GeminiCodec()
    if recording.dialect == "ollama":
        return OllamaCodec()
    if recording.dialect == "cohere-chat":
        return CohereCodec()
    if recording.dialect == "bedrock":
        return BedrockCodec()
    known = "openai-responses" if recording.dialect == "responses" else recording.provider
    row = SERVICES.get(known, SERVICES["openai"])
    own = None if known in SERVICES else "http://127.0.0.1:1/v1"
    return codec_of(row, LLMConfig(framework=row.framework, model="m", api_base=own))


def answer_of(recording: Recording) -> Response:
    codec = codec_for(recording)
    return streamed(codec, recording.body) if recording.streaming else codec.decode(recording.body)


def body_after(recording: Recording, response: Response, message: Message) -> bytes:
    """Return the body of the call after an answer, with the results of its tool calls."""
    results = [Message.tool("4", call) for call in response.tool_calls]
    turns = [Message.user("Hi"), message, *(results or [Message.user("And then?")])]
    return codec_for(recording).encode(Request(model="m", messages=turns, tools=[WEATHER]), stream=False).body


def turn_of_fluxibly(recording: Recording) -> list[dict[str, Any]]:
    response = answer_of(recording)
    return turn_in(recording.dialect, json.loads(body_after(recording, response, Message.assistant(response))))


# What the services take either way


def anthropic(turn: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Anthropic.

    - Fields that are null: the same as none.
    - Texts of only white space: the client sends them, and the service refuses them.
    """
    blocks = [without_nulls(block) for block in turn]
    return [block for block in blocks if block["type"] != "text" or block["text"].strip()]


def chat(turn: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """OpenAI's chat completions.

    - Fields that are null, and content that is white space: the same as none.
    - `audio`: its id is enough, says the documentation.
    - `annotations`: the service ignores them.
    - `reasoning` beside `reasoning_details`: OpenRouter reads the details.
    - `reasoning_content` beside `thinking_blocks`: LiteLLM's proxy reads the blocks. An empty `provider_specific_fields`.
    - `index` of a tool call, which the service ignores, and its `type`, which vLLM's streams leave out.
    - The arguments' JSON text: the same values in another writing.
    - The text of a thinking part, in one piece or several.
    """
    for given in turn:
        message = without_nulls(given)
        message["content"] = _joined_content(message.get("content", ""))
        if "audio" in message:
            message["audio"] = {"id": message["audio"]["id"]}
        message.pop("annotations", None)
        if "reasoning_details" in message:
            message.pop("reasoning", None)
        if "thinking_blocks" in message:
            message.pop("reasoning_content", None)
        if not message.get("provider_specific_fields"):
            message.pop("provider_specific_fields", None)
        for call in message.get("tool_calls", ()):
            call.pop("index", None)
            call.setdefault("type", "function")
            if "function" in call:
                call["function"]["arguments"] = _value(call["function"]["arguments"])
        yield message


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _joined_content(content: Any) -> Any:
    if not isinstance(content, list):
        return content if content.strip() else ""
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part["type"]
        said = "".join([piece["text"] for piece in part[kind]]) if kind == "thinking" else part[kind]
        if parts and parts[-1]["type"] == kind in ("thinking", "text"):
            parts[-1] = {**parts[-1], **part, kind: parts[-1][kind] + said}
        else:
            parts.append({**part, kind: said})
    return parts


def responses(turn: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """OpenAI's Responses.

    - Fields that are null: the same as none.
    - `status`, where the item is complete: the service sets it.
    - `logprobs` of a text: the service ignores them.
    """
    for given in turn:
        item = without_nulls(given)
        if item.get("status") == "completed":
            del item["status"]
        if item["type"] == "message":
            for part in item["content"]:
                part.pop("logprobs", None)
        yield item


def gemini(turn: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Gemini.

    - Adjacent texts without a signature: the client sends a stream's pieces as they came, fluxibly sends them as one.
    - Empty texts without a signature.
    - Names of fields in snake case, and base64 with the URL's alphabet: the client writes them in both ways.
    """
    parts: list[dict[str, Any]] = []
    for given in turn:
        part = _one_writing(given)
        unsigned = "text" in part and "thoughtSignature" not in part
        if unsigned and not part["text"]:
            continue
        before = parts[-1] if parts else {}
        if unsigned and before.keys() == part.keys() and before.get("thought") == part.get("thought"):
            before["text"] += part["text"]
        else:
            parts.append(part)
    return parts


def _one_writing(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        camel = {"mime_type": "mimeType", "tool_type": "toolType"}
        return {camel.get(key, key): _one_writing(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_one_writing(item) for item in value]
    if name in ("data", "thoughtSignature"):
        return urlsafe_b64decode(value.replace("+", "-").replace("/", "_"))
    return value


def ollama(turn: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Ollama.

    - Fields that are null or empty: the same as none.
    - `id` and `index` of a tool call: the client does not know them, and a service that does not either ignores them.
    """
    for given in turn:
        message = {name: value for name, value in given.items() if value not in (None, "", [])}
        for call in message.get("tool_calls", ()):
            call.pop("id", None)
            call["function"].pop("index", None)
        yield message


def cohere(turn: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Cohere.

    - Fields that are null or empty: the same as none.
    """
    for given in turn:
        yield {name: value for name, value in without_nulls(given).items() if value not in ("", [])}


def bedrock(turn: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Bedrock.

    - Reasoning without a signature, and a turn of nothing but reasoning: the service refuses them.
    - Texts of only white space: the client sends them, and the service refuses them.
    - Blocks of a new kind: the client cannot send them.
    - A text in a tool's result, in one piece or several.
    """
    blocks = [_with_joined_texts(block) for block in turn if "chart" not in block and block.get("text", "a").strip()]
    blocks = [block for block in blocks if "signature" in _thought(block) or not _thought(block)]
    return blocks if any("reasoningContent" not in block for block in blocks) else []


def _thought(block: dict[str, Any]) -> dict[str, Any]:
    return block.get("reasoningContent", {}).get("reasoningText", {})


def _with_joined_texts(block: dict[str, Any]) -> dict[str, Any]:
    if "toolResult" not in block:
        return block
    content: list[dict[str, Any]] = []
    for piece in block["toolResult"]["content"]:
        if content and "text" in piece and "text" in content[-1]:
            content[-1] = {"text": content[-1]["text"] + piece["text"]}
        else:
            content.append(piece)
    return {"toolResult": {**block["toolResult"], "content": content}}


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


EITHER_WAY: Mapping[str, Callable[[list[dict[str, Any]]], Iterable[dict[str, Any]]]] = {
    "messages": anthropic,
    "chat": chat,
    "responses": responses,
    "gemini": gemini,
    "ollama": ollama,
    "cohere-chat": cohere,
    "bedrock": bedrock,
}
"""For each dialect, the function that removes the differences of a turn that do not matter to the service."""


@pytest.mark.parametrize("recording", ALL)
def test_the_official_client_sends_the_same(recording: Recording) -> None:
    """The assistant's turn is what the service's own client sends, in content and order."""
    try:
        theirs = turn_of_client(recording)
    except NotAnAnswer:
        with pytest.raises(FluxiblyError):
            answer_of(recording)
        return
    same = EITHER_WAY[recording.dialect]
    assert list(same(turn_of_fluxibly(recording))) == list(same(theirs))


@pytest.mark.parametrize("recording", ALL)
def test_through_json(recording: Recording) -> None:
    """An answer, or its message, that went through JSON is sent in the same bytes."""
    try:
        response = answer_of(recording)
    except FluxiblyError as error:
        pytest.skip(f"the recording is of an error: {error}")
    message = Message.assistant(response)
    sent = body_after(recording, response, message)
    loaded = Message.from_dict(json.loads(json.dumps(message.to_dict())))
    assert loaded == message
    assert body_after(recording, response, loaded) == sent
    copied = Response.from_dict(json.loads(json.dumps(response.to_dict())))
    assert body_after(recording, copied, Message.assistant(copied)) == sent


PAIRS = [pytest.param(whole, stream, id=whole.name) for whole, stream in zip(ANSWERS[::2], ANSWERS[1::2], strict=True)]


@pytest.mark.parametrize(("whole", "stream"), PAIRS)
def test_modes_agree(whole: Recording, stream: Recording) -> None:
    """An answer has the same parts and details whole and streamed, and goes back the same."""
    assert answer_of(stream) == answer_of(whole)
    assert answer_of(stream).parts == answer_of(whole).parts
    assert answer_of(stream).details == answer_of(whole).details
    assert turn_of_fluxibly(stream) == turn_of_fluxibly(whole)


@pytest.mark.parametrize("dialect", CLIENTS)
def test_moves_to_another_service(dialect: str) -> None:
    """Another dialect gets the texts, but no signatures, encrypted data or opaque parts, which it cannot read."""
    other = next(answer for answer in ANSWERS if answer.dialect == dialect)
    for recording in ANSWERS:
        response = answer_of(recording)
        if (
            recording.dialect == dialect
            or response.media
            or (dialect, recording.provider) == ("messages", "litellm-proxy")
        ):
            continue  # LiteLLM's proxy has Anthropic's own blocks
        sent = body_after(other, response, Message.assistant(response)).decode()
        said = [part.text.strip() for part in response.parts if isinstance(part, Text)]
        assert all(json.dumps(text)[1:-1] in sent for text in said), recording.name
        assert not [mark for mark in SEALED if mark in sent], recording.name


SEALED = ("c2ln", "ENC", "srvtoolu_", "rs_", "ws_1")
"""The beginnings of all signatures, of encrypted data and of items' ids in the synthetic answers."""
