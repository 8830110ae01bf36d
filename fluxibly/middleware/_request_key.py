"""The key of a request, which is the same for requests that a service would answer alike."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import msgspec

from fluxibly._checks import public_headers
from fluxibly._dicts import plain
from fluxibly.types import Message, ProviderInfo, Request, Text

VERSION = 1
"""A part of every key. Change it with what keys are made of, so that nobody finds an answer to another request."""


def request_key(request: Request, info: ProviderInfo, namespace: str = "") -> str:
    """Return the key of a request to a provider: 40 hexadecimal digits.

    It is a hash of the provider and its configuration, the model, the messages, the tools and all parameters. Secret
    headers, such as the API key, are no part of it.

    Args:
        namespace: keeps the keys of different users apart.

    Raises:
        TypeError: the request contains something that JSON does not have, so it has no key.
    """
    found = _beside_messages(request, info, namespace)
    found += map(_of_message, request.messages)
    return _hashed(_encoded(found))


class KeysOfRows:
    """Makes the keys of many requests, which share what is sent beside the messages.

    Args:
        request: one of them.
        info: the provider.
    """

    def __init__(self, request: Request, info: ProviderInfo) -> None:
        self._beside = _encoded(_beside_messages(request, info, ""))

    def key(self, messages: Iterable[Message]) -> str:
        """Return the key of the request with these messages: 40 hexadecimal digits, but not those of `request_key`.

        Raises:
            TypeError: the messages contain something that JSON does not have.
        """
        return _hashed(self._beside + _encoded([*map(_of_message, messages)]))


def _hashed(data: bytes) -> str:
    return sha256(data).hexdigest()[:40]


def _beside_messages(request: Request, info: ProviderInfo, namespace: str) -> list[Any]:
    """Return what identifies a request beside its messages."""
    found: list[Any] = [VERSION, namespace, info.identity, request.model]
    # Written out, because a loop over the names of the parameters takes longer than the hash. Numbers are converted to
    # float, because 0 and 0.0 are sent to the same effect.
    given: dict[str, Any] = {}
    if request.temperature is not None:
        given["temperature"] = float(request.temperature)
    if request.max_tokens is not None:
        given["max_tokens"] = request.max_tokens
    if request.top_p is not None:
        given["top_p"] = float(request.top_p)
    if request.top_k is not None:
        given["top_k"] = request.top_k
    if request.frequency_penalty is not None:
        given["frequency_penalty"] = float(request.frequency_penalty)
    if request.presence_penalty is not None:
        given["presence_penalty"] = float(request.presence_penalty)
    if request.stop:
        given["stop"] = request.stop
    if request.seed is not None:
        given["seed"] = request.seed
    if request.n is not None:
        given["n"] = request.n
    if request.tools:
        given["tools"] = [(tool.name, tool.description, tool.parameters, tool.strict) for tool in request.tools]
    if request.tool_choice is not None:
        given["tool_choice"] = request.tool_choice
    if request.response_format is not None:
        given["response_format"] = request.response_format
    if request.reasoning_effort is not None:
        given["reasoning_effort"] = request.reasoning_effort
    if request.extra:
        given["extra"] = request.extra
    if request.headers:
        headers = public_headers(request.headers)
        if headers:
            given["headers"] = headers
    found.append(given)
    return found


def _of_message(message: Message) -> Any:
    """Return what identifies a message: its role and text, if it has nothing else."""
    content = message.content
    if len(content) == 1 and message.role in _PLAIN and type(text := content[0]) is Text:
        bare = text.raw is None and message.name is None and message.order is None
        if bare and not message.tool_calls and not message.reasoning:
            return (message.role, text.text)
    return message.to_dict()


_PLAIN = ("user", "system", "assistant")


_encode = msgspec.json.Encoder(order="deterministic").encode


def _encoded(value: Any) -> bytes:
    """Return JSON in which the keys of every object are sorted.

    Raises:
        TypeError: the value is not JSON.
    """
    try:
        return _encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        # Such as half of a surrogate pair, a number beyond 64 bits or a mapping that is no dict.
        try:
            return json.dumps(plain(value, value), sort_keys=True).encode()
        except TypeError as error:
            problem = str(error).partition(": ")[2]
    raise TypeError(f"the key of a request: {problem}")
