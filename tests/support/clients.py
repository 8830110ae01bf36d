"""What the services' own clients send when an answer goes back into the conversation.

Each function lets a client read an answer from a loopback server, puts the answer's object back into the conversation
the way that the client's documentation shows, lets the client make the next call, and returns the assistant's turn in
the body of that call. A test is skipped where its client is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from support.dialects import answering
from support.recordings import Recording

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
TYPES = {"gemini": ("application/json", "text/event-stream"), "ollama": ("application/json", "application/x-ndjson")}
"""The content types of whole answers and of streams, where they differ from the others'."""

PLAIN: dict[str, Any] = {"verify": False}
"""Settings of the clients' HTTP. The server has no certificate, and reading the authorities' takes a while."""


class NotAnAnswer(Exception):
    """The client raised an error when it read the answer."""


def turn_of_client(recording: Recording) -> list[dict[str, Any]]:
    """Return the assistant's turn as the service's own client sends it: its blocks, items or parts, or its message.

    Raises:
        NotAnAnswer: the client raised an error when it read the answer.
    """
    whole, stream = TYPES.get(recording.dialect, ("application/json", "text/event-stream"))
    with answering(stream if recording.streaming else whole, recording.body) as (address, asked):
        CLIENTS[recording.dialect](recording, address)
        return turn_in(recording.dialect, asked[-1][1])


def turn_in(dialect: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the assistant's turn in the body of a request, which is the second turn."""
    if dialect == "responses":
        return [item for item in body["input"] if item.get("role") != "user" and item["type"] not in RESULTS]
    if dialect == "gemini":
        return [part for content in body["contents"] if content["role"] == "model" for part in content["parts"]]
    turn = body["messages"][1]
    return turn["content"] if dialect == "messages" else [turn]


RESULTS = ("function_call_output", "custom_tool_call_output")
"""The items of the Responses API with which the caller answers tool calls."""


def _anthropic(recording: Recording, address: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    http = anthropic.DefaultHttpxClient(**PLAIN)
    with anthropic.Anthropic(api_key="k", base_url=address, max_retries=0, http_client=http) as client:
        try:
            if recording.streaming:
                with client.beta.messages.stream(max_tokens=10, model="m", messages=HELLO) as stream:
                    answer = stream.get_final_message()
            else:
                answer = client.beta.messages.create(max_tokens=10, model="m", messages=HELLO)
        except (anthropic.AnthropicError, RuntimeError) as error:
            raise NotAnAnswer from error
        turns = [*HELLO, {"role": "assistant", "content": answer.content}]
        client.beta.messages.create(max_tokens=10, model="m", messages=turns, stream=recording.streaming)


def _openai(recording: Recording, address: str) -> None:
    openai = pytest.importorskip("openai")
    http = openai.DefaultHttpxClient(**PLAIN)
    with openai.OpenAI(api_key="k", base_url=address, max_retries=0, http_client=http) as client:
        try:
            answer = client.chat.completions.create(model="m", messages=HELLO, stream=recording.streaming)
            if recording.streaming:
                message = _joined([chunk.choices[0].delta.to_dict(warnings=False) for chunk in answer if chunk.choices])
            else:
                message = answer.choices[0].message.to_dict(warnings=False)
        except openai.OpenAIError as error:
            raise NotAnAnswer from error
        client.chat.completions.create(model="m", messages=[*HELLO, message], stream=recording.streaming)


def _joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the message of a stream, as the client's helper joins its deltas.

    The helper cannot join lists of content (Mistral's), and would join words that each delta repeats.
    """
    from openai.lib.streaming._deltas import accumulate_delta

    message: dict[Any, Any] = {}
    content: list[Any] = []
    blocks: list[Any] = []
    for delta in deltas:
        piece = delta.pop("content", None)
        content += piece if isinstance(piece, list) else [{"type": "text", "text": piece}] if piece else []
        _drop_repeated(delta, message)
        blocks += delta.pop("thinking_blocks", None) or []
        message = accumulate_delta(message, delta)
    plain = all(part["type"] == "text" for part in content)
    thinking = {"thinking_blocks": _joined_blocks(blocks)} if blocks else {}
    return {**message, **thinking, "content": "".join(part["text"] for part in content) if plain else content}


def _joined_blocks(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return LiteLLM's blocks of reasoning, as its own helper joins their pieces: a block ends with its signature."""
    blocks: list[dict[str, Any]] = []
    for piece in pieces:
        if blocks and blocks[-1]["type"] == piece["type"] == "thinking" and not blocks[-1]["signature"]:
            said = blocks[-1]["thinking"] + piece["thinking"]
            blocks[-1] = {**piece, "thinking": said}
        else:
            blocks.append(piece)
    return blocks


def _drop_repeated(delta: dict[str, Any], message: Mapping[str, Any]) -> None:
    delta.get("provider_specific_fields", {}).pop("thinking_blocks", None)
    if "role" in message:
        delta.pop("role", None)
    begun = {detail["index"]: detail for detail in message.get("reasoning_details") or ()}
    for detail in delta.get("reasoning_details") or ():
        if "format" in begun.get(detail.get("index"), {}):
            detail.pop("format", None)


ENDS = ("response.completed", "response.incomplete")
"""The last event of a stream, which has the whole response."""


def _responses(recording: Recording, address: str) -> None:
    openai = pytest.importorskip("openai")
    http = openai.DefaultHttpxClient(**PLAIN)
    with openai.OpenAI(api_key="k", base_url=address, max_retries=0, http_client=http) as client:
        try:
            answer = client.responses.create(model="m", input=HELLO, stream=recording.streaming)
            if recording.streaming:
                ends = [event.response for event in answer if event.type in ENDS]
                if not ends:
                    raise NotAnAnswer
                answer = ends[-1]
        except openai.OpenAIError as error:
            raise NotAnAnswer from error
        client.responses.create(model="m", input=[*HELLO, *answer.output], stream=recording.streaming)


def _gemini(recording: Recording, address: str) -> None:
    pytest.importorskip("google.genai")
    from google import genai

    client = genai.Client(api_key="k", http_options={"base_url": address, "client_args": PLAIN})
    hello: Any = [{"role": "user", "parts": [{"text": "Hi"}]}]
    call = client.models.generate_content_stream if recording.streaming else client.models.generate_content
    try:
        read = call(model="m", contents=hello)
        answers = list(read) if recording.streaming else [read]
    except genai.errors.APIError as error:
        raise NotAnAnswer from error
    contents = [answer.candidates[0].content for answer in answers if answer.candidates]
    again = call(model="m", contents=[*hello, *[content for content in contents if content and content.parts]])
    if recording.streaming:
        list(again)
    client.close()


def _ollama(recording: Recording, address: str) -> None:
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=address, **PLAIN)
    try:
        if recording.streaming:
            parts = [part.message for part in client.chat("m", HELLO, stream=True)]
            message = {
                "role": "assistant",
                "content": "".join(part.content or "" for part in parts),
                "thinking": "".join(part.thinking or "" for part in parts),
                "tool_calls": [call for part in parts for call in part.tool_calls or ()],
            }
        else:
            message = client.chat("m", HELLO).message
    except ollama.ResponseError as error:
        raise NotAnAnswer from error
    again = client.chat("m", [*HELLO, message], stream=recording.streaming)
    if recording.streaming:
        list(again)


CLIENTS: Mapping[str, Callable[[Recording, str], None]] = {
    "messages": _anthropic,
    "chat": _openai,
    "responses": _responses,
    "gemini": _gemini,
    "ollama": _ollama,
}
"""The client of each dialect, by the dialect's name in the recordings."""
