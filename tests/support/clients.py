"""What the services' own clients send when an answer goes back into the conversation.

Each function lets a client read an answer from a loopback server, puts the answer's object back into the conversation
the way that the client's documentation shows, lets the client make the next call, and returns the assistant's turn in
the body of that call. A test is skipped where its client is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from typing import Any

import httpx
import pytest

from support.dialects import answering
from support.recordings import Recording

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
TYPES = {
    "bedrock": ("application/json", "application/vnd.amazon.eventstream"),
    "gemini": ("application/json", "text/event-stream"),
    "ollama": ("application/json", "application/x-ndjson"),
}
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
    if dialect == "bedrock":  # a turn of nothing but reasoning is left out
        return [block for turn in body["messages"] if turn["role"] == "assistant" for block in turn["content"]]
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


def _cohere(recording: Recording, address: str) -> None:
    cohere = pytest.importorskip("cohere")
    http = httpx.Client(**PLAIN)
    with cohere.ClientV2(api_key="k", base_url=address, httpx_client=http) as client:
        call = client.chat_stream if recording.streaming else client.chat
        try:
            answer = call(model="m", messages=HELLO)
            message = _message_of(answer) if recording.streaming else answer.message
        except cohere.core.ApiError as error:
            raise NotAnAnswer from error
        again = call(model="m", messages=[*HELLO, message])
        if recording.streaming:
            list(again)


def _message_of(events: Iterable[Any]) -> dict[str, Any]:
    """Return the message of a stream, whose events the client's documentation joins by hand."""
    blocks: dict[int, dict[str, Any]] = {}
    calls: dict[int, dict[str, Any]] = {}
    message: dict[str, Any] = {"role": "assistant", "tool_plan": "", "citations": []}
    for event in events:
        if event.type in ("content-start", "content-delta"):
            _extend(blocks.setdefault(event.index, {}), event.delta.message.content.dict(exclude_none=True))
        elif event.type == "tool-plan-delta":
            message["tool_plan"] += event.delta.message.tool_plan
        elif event.type == "tool-call-start":
            calls[event.index] = event.delta.message.tool_calls.dict(exclude_none=True)
        elif event.type == "tool-call-delta":
            _extend(calls[event.index]["function"], event.delta.message.tool_calls.function.dict(exclude_none=True))
        elif event.type == "citation-start":
            message["citations"].append(event.delta.message.citations.dict(exclude_none=True))
    return {**message, "content": list(blocks.values()), "tool_calls": list(calls.values())}


def _extend(fields: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        fields[name] = fields[name] + value if name in fields else value


def bedrock_client(address: str) -> Any:
    """Return boto3's client of Bedrock at an address, or skip the test if boto3 is not installed."""
    boto3 = pytest.importorskip("boto3")
    from botocore.config import Config

    return boto3.client(
        "bedrock-runtime",
        region_name="us-east-1",
        endpoint_url=address,
        aws_access_key_id="AKIAEXAMPLE",
        aws_secret_access_key="s",  # noqa: S106  # it opens nothing
        config=Config(retries={"max_attempts": 0}),
    )


def _bedrock(recording: Recording, address: str) -> None:
    with closing(bedrock_client(address)) as client:
        from botocore.exceptions import BotoCoreError, ClientError

        call = client.converse_stream if recording.streaming else client.converse
        hello: Any = [{"role": "user", "content": [{"text": "Hi"}]}]
        try:
            answer = call(modelId="m", messages=hello)
            message = message_of_events(answer["stream"]) if recording.streaming else answer["output"]["message"]
        except (BotoCoreError, ClientError) as error:
            raise NotAnAnswer from error
        # The client has no name for blocks that it does not know, and cannot send them.
        message["content"] = [block for block in message["content"] if "SDK_UNKNOWN_MEMBER" not in block]
        again = call(modelId="m", messages=[*hello, message])
        if recording.streaming:
            list(again["stream"])


def message_of_events(events: Iterable[Any]) -> dict[str, Any]:
    """Return the message of a stream of boto3's events, which AWS's documentation joins by hand."""
    blocks: dict[int, dict[str, Any]] = {}
    role = ""
    for event in events:
        if "messageStart" in event:
            role = event["messageStart"]["role"]
        elif "contentBlockStart" in event:
            begun = event["contentBlockStart"]
            blocks[begun["contentBlockIndex"]] = dict(begun["start"])
        elif "contentBlockDelta" in event:
            piece = event["contentBlockDelta"]
            _continue(blocks.setdefault(piece["contentBlockIndex"], {}), piece["delta"])
    return {"role": role, "content": [_block_of(block) for _, block in sorted(blocks.items())]}


def _continue(block: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Add a delta to a block: texts and bytes go to the end, citations and a tool's results into a list."""
    for name, value in delta.items():
        if name == "citation":
            block.setdefault(name, []).append(value)
        elif name == "toolResult":
            block[name].setdefault("content", []).extend(value)
        elif isinstance(value, Mapping):
            _continue(block.setdefault(name, {}), value)
        else:
            block[name] = block[name] + value if name in block else value


def _block_of(block: dict[str, Any]) -> dict[str, Any]:
    """Return the block that the service takes for one that was joined."""
    if "toolUse" in block:
        return {"toolUse": {**block["toolUse"], "input": json.loads(block["toolUse"].get("input") or "{}")}}
    thought = block.get("reasoningContent", {})
    if thought and "redactedContent" not in thought:
        return {"reasoningContent": {"reasoningText": thought}}
    if "citation" in block:
        return {"citationsContent": {"content": [{"text": block["text"]}], "citations": block["citation"]}}
    return block


CLIENTS: Mapping[str, Callable[[Recording, str], None]] = {
    "messages": _anthropic,
    "chat": _openai,
    "responses": _responses,
    "gemini": _gemini,
    "ollama": _ollama,
    "cohere-chat": _cohere,
    "bedrock": _bedrock,
}
"""The client of each dialect, by the dialect's name in the recordings."""
